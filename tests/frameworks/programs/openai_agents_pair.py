"""OpenAI Agents SDK: two agents, one after the other, over the endpoint that API names."""

import asyncio
import os

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from asked import MODEL, PLACE, PORTER, SCOUT, STREAM, body, headers, kind_of_place, url
from openai import AsyncOpenAI

KINDS = {"chat": OpenAIChatCompletionsModel, "responses": OpenAIResponsesModel}


def member(role, system, tools=()):
    return Agent(
        name=role,
        instructions=system,
        tools=list(tools),
        model=KINDS[os.environ["API"]](MODEL, openai_client=AsyncOpenAI(base_url=url(role))),
        model_settings=ModelSettings(extra_headers=headers(role) or None, extra_body=body(role) or None),
    )


async def run(agent, text):
    if not STREAM:
        return (await Runner.run(agent, text)).final_output
    result, deltas = Runner.run_streamed(agent, text), 0
    async for event in result.stream_events():
        deltas += event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    assert deltas
    return result.final_output


async def main():
    set_tracing_disabled(True)
    first = await run(member("scout", SCOUT, [function_tool(kind_of_place)]), PLACE)
    second = await run(member("porter", PORTER), f"{PLACE}\nThe scout says: {first}")
    print(first, second)


asyncio.run(main())
