"""CrewAI: a crew of two agents, one task each."""

import os

os.environ["CREWAI_DISABLE_TELEMETRY"] = os.environ["OTEL_SDK_DISABLED"] = "true"

from asked import MODEL, PLACE, STREAM, body, headers, kind_of_place, url
from crewai import LLM, Agent, Crew, Process, Task
from crewai.tools import tool


def member(role, knows, tools=()):
    llm = LLM(
        model=f"openai/{MODEL}",
        base_url=url(role),
        api_key=os.environ["OPENAI_API_KEY"],
        stream=STREAM,
        default_headers=headers(role) or None,
        **({"extra_body": body(role)} if body(role) else {}),
    )
    return Agent(role=role, goal=f"Say the {knows}", backstory=f"You know {knows}s.", llm=llm, tools=list(tools))


members = [member("scout", "password", [tool("kind_of_place")(kind_of_place)]), member("porter", "emblem")]
tasks = [Task(description=PLACE, expected_output="One word", agent=agent) for agent in members]
done = Crew(agents=members, tasks=tasks, process=Process.sequential).kickoff()
print(" ".join(output.raw for output in done.tasks_output))
