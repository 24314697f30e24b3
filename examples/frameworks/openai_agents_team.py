"""OpenAI Agents SDK: a scout and a porter run in parallel."""

import asyncio
import json
import os

from agents import Agent, Runner, set_default_openai_api, set_tracing_disabled

SCOUT = "You are the scout. Say the password, like this: apple"
PORTER = "You are the porter. Say the emblem, like this: lion"

set_tracing_disabled(True)  # else each run is sent to OpenAI
set_default_openai_api("chat_completions")  # over the other API, a response that reached its limit is an error


async def solve(task: dict[str, str]) -> str:
    """Return the team's answer."""
    scout = Agent(name="scout", instructions=SCOUT, model="smollm2-135m")
    porter = Agent(name="porter", instructions=PORTER, model="smollm2-135m")
    results = await asyncio.gather(Runner.run(scout, task["text"]), Runner.run(porter, task["text"]))
    return " ".join(result.final_output for result in results)


if __name__ == "__main__":
    print(asyncio.run(solve(json.loads(os.environ["LATENTMEM_TASK"]))))
