"""AutoGen: two assistants in a group chat, each with a client of its own."""

import asyncio

from asked import MODEL, PLACE, PORTER, SCOUT, STREAM, body, headers, kind_of_place, url
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.messages import ModelClientStreamingChunkEvent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import ModelFamily
from autogen_ext.models.openai import OpenAIChatCompletionClient

INFO = {
    "vision": False,
    "function_calling": True,
    "json_output": False,
    "family": ModelFamily.UNKNOWN,
    "structured_output": False,
}


def member(role, system, tools=()):
    kept = {"extra_body": body(role)} if body(role) else {}
    client = OpenAIChatCompletionClient(
        model=MODEL, base_url=url(role), default_headers=headers(role), model_info=INFO, **kept
    )
    return AssistantAgent(
        role,
        client,
        system_message=system,
        tools=list(tools),
        reflect_on_tool_use=bool(tools),
        model_client_stream=STREAM,
    )


async def main():
    members = [member("scout", SCOUT, [kind_of_place]), member("porter", PORTER)]
    # The scout's message, its call of the tool aside, and the porter's.
    team = RoundRobinGroupChat(members, termination_condition=MaxMessageTermination(3))
    chunks = 0
    async for event in team.run_stream(task=PLACE):
        chunks += isinstance(event, ModelClientStreamingChunkEvent)
        if isinstance(event, TaskResult):
            said = [m.to_text() for m in event.messages if m.type == "TextMessage"][1:]
    assert bool(chunks) == STREAM
    print(" ".join(said))


asyncio.run(main())
