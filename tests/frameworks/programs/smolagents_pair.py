"""smolagents: two agents that call tools, the second one told what the first has found."""

from asked import MODEL, PLACE, PORTER, SCOUT, STREAM, body, headers, kind_of_place, url
from smolagents import OpenAIModel, ToolCallingAgent, tool


def run(role, instructions, tools, text):
    model = OpenAIModel(
        model_id=MODEL,
        api_base=url(role),
        client_kwargs={"default_headers": headers(role)},
        **({"extra_body": body(role)} if body(role) else {}),
    )
    agent = ToolCallingAgent(
        tools=tools,
        model=model,
        name=role,
        instructions=instructions,
        max_steps=4,
        stream_outputs=STREAM,
        verbosity_level=0,
    )
    return str(agent.run(text))


said = run("scout", SCOUT, [tool(kind_of_place)], PLACE)
then = run("porter", PORTER, [], f"{PLACE}\nThe scout says: {said}")
print(f"\n{said} {then}")  # a stream leaves its own text on the line
