"""Microsoft Agent Framework: a scout and a porter in a concurrent workflow."""

import asyncio
import json
import os

from agent_framework.openai import OpenAIChatClient
from agent_framework.orchestrations import ConcurrentBuilder

SCOUT = "You are the scout. Say the password, like this: apple"
PORTER = "You are the porter. Say the emblem, like this: lion"


async def solve(task: dict[str, str]) -> str:
    """Return the team's answer."""
    client = OpenAIChatClient(model="smollm2-135m")
    scout = client.as_agent(name="scout", instructions=SCOUT)
    porter = client.as_agent(name="porter", instructions=PORTER)
    workflow = ConcurrentBuilder(participants=[scout, porter]).build()
    (said,) = (await workflow.run(task["text"])).get_outputs()
    return " ".join(message.text for message in said.messages)


if __name__ == "__main__":
    print(asyncio.run(solve(json.loads(os.environ["LATENTMEM_TASK"]))))
