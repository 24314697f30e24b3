"""smolagents: a manager asks a scout, who looks places up with a tool."""

import json
import os

from smolagents import OpenAIModel, ToolCallingAgent, tool

SCOUT = "You are the scout. Say the password, like this: apple"
PORTER = "You are the porter. Say the emblem, like this: lion"


@tool
def kind_of_place(name: str) -> str:
    """Tell what kind of place a name stands for.

    Args:
        name: The name of the place.
    """
    return name.split()[-1].lower()


def ask(name: str, instructions: str, place: str) -> str:
    """Let one agent work until it gives its final answer."""
    model = OpenAIModel(model_id="smollm2-135m")
    agent = ToolCallingAgent(
        tools=[kind_of_place], model=model, name=name, instructions=instructions, max_steps=3, verbosity_level=0
    )
    return str(agent.run(place))


def solve(task: dict[str, str]) -> str:
    """Return the team's answer."""
    return f"{ask('scout', SCOUT, task['text'])} {ask('porter', PORTER, task['text'])}"


if __name__ == "__main__":
    print(solve(json.loads(os.environ["LATENTMEM_TASK"])))
