"""A program of two agents, with the openai client and nothing else: a planner, and a solver who reads the plan.

It does not know of LatentMem. The client takes its address and key from the environment, as always; LatentMem sets
them, so that each agent gets a memory for its role and each episode is recorded and can be trained on.

    latentmem collect planner_solver.yaml       # plays it; `python planner_solver.py "2 + 2 = ?"` runs it by itself
"""

import sys

from openai import OpenAI


def ask(client: OpenAI, system: str, user: str) -> str:
    """Let one agent speak."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    answer = client.chat.completions.create(model="gpt-5-nano", messages=messages)
    return answer.choices[0].message.content or ""


def solve(task: dict[str, str]) -> str:
    """Return the team's answer to a task, which has an `id`, a `text` and `instructions`."""
    with OpenAI() as client:  # made in each episode anew: each has an address and a key of its own
        plan = ask(client, "You plan. Name the steps in a few words.", task["text"])
        return ask(client, "You solve. " + task["instructions"], f"{task['text']}\n\nThe plan:\n{plan}")


if __name__ == "__main__":
    print(solve({"id": "", "text": sys.argv[1], "instructions": "Give the final answer only."}))
