"""Microsoft Agent Framework: a sequential workflow of two agents, over the endpoint that API names."""

import asyncio
import os
from collections import defaultdict

from agent_framework import AgentResponse
from agent_framework.openai import OpenAIChatClient, OpenAIChatCompletionClient
from agent_framework.orchestrations import SequentialBuilder
from asked import MODEL, PLACE, PORTER, SCOUT, STREAM, body, headers, kind_of_place, url

KINDS = {"chat": OpenAIChatCompletionClient, "responses": OpenAIChatClient}


def member(role, system, tools=()):
    client = KINDS[os.environ["API"]](
        model=MODEL, base_url=url(role), api_key=os.environ["OPENAI_API_KEY"], default_headers=headers(role)
    )
    options = {"extra_body": body(role)} if body(role) else {}
    return client.as_agent(name=role, instructions=system, tools=list(tools), default_options=options)


async def main():
    members = [member("scout", SCOUT, [kind_of_place]), member("porter", PORTER)]
    workflow = SequentialBuilder(participants=members, output_from="all").build()
    said = {}
    if STREAM:
        updates = defaultdict(list)
        async for event in workflow.run(PLACE, stream=True):
            if event.type == "output":
                updates[event.executor_id].append(event.data)
        assert all(len(some) > 1 for some in updates.values())
        said = {name: AgentResponse.from_updates(some) for name, some in updates.items()}
    else:
        said = {event.executor_id: event.data for event in await workflow.run(PLACE) if event.type == "output"}
    print(" ".join(said[name].messages[-1].text for name in ("scout", "porter")))


asyncio.run(main())
