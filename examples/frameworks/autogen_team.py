"""AutoGen: a scout and a porter take turns in a group chat."""

import asyncio
import json
import os

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import ModelFamily
from autogen_ext.models.openai import OpenAIChatCompletionClient

SCOUT = "You are the scout. Say the password, like this: apple"
PORTER = "You are the porter. Say the emblem, like this: lion"


async def solve(task: dict[str, str]) -> str:
    """Return the team's answer."""
    client = OpenAIChatCompletionClient(
        model="smollm2-135m",
        model_info={
            "vision": False,
            "function_calling": True,
            "json_output": False,
            "family": ModelFamily.UNKNOWN,
            "structured_output": False,
        },
    )
    team = RoundRobinGroupChat(
        [
            AssistantAgent("scout", client, system_message=SCOUT),
            AssistantAgent("porter", client, system_message=PORTER),
        ],
        termination_condition=MaxMessageTermination(3),
    )
    result = await team.run(task=task["text"])
    await client.close()
    return " ".join(message.to_text() for message in result.messages[1:])


if __name__ == "__main__":
    print(asyncio.run(solve(json.loads(os.environ["LATENTMEM_TASK"]))))
