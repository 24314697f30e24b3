"""OpenAI Agents SDK: the scout has the porter as a tool, so one conversation stands inside another."""

import asyncio

from agents import Agent, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from asked import MODEL, PLACE, PORTER, SCOUT
from openai import AsyncOpenAI


async def main():
    set_tracing_disabled(True)
    model = OpenAIChatCompletionsModel(MODEL, openai_client=AsyncOpenAI())
    porter = Agent(name="porter", instructions=PORTER, model=model)
    ask = porter.as_tool(tool_name="ask_porter", tool_description="Ask the porter.")
    scout = Agent(name="scout", instructions=SCOUT, model=model, tools=[ask])
    result = await Runner.run(scout, PLACE)
    (told,) = [item.output for item in result.new_items if item.type == "tool_call_output_item"]
    print(result.final_output, told)


asyncio.run(main())
