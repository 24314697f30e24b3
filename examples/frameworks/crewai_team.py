"""CrewAI: a crew of a scout and a porter, one task each."""

import json
import os

os.environ.setdefault("CREWAI_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OTEL_SDK_DISABLED", "true")

from crewai import LLM, Agent, Crew, Process, Task


def solve(task: dict[str, str]) -> str:
    """Return the team's answer."""
    llm = LLM(model="openai/smollm2-135m", base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
    scout = Agent(role="scout", goal="Say the password of the place", backstory="You know all passwords.", llm=llm)
    porter = Agent(role="porter", goal="Say the emblem of the place", backstory="You know all emblems.", llm=llm)
    crew = Crew(
        agents=[scout, porter],
        tasks=[
            Task(description=task["text"], expected_output="One word", agent=agent, async_execution=False)
            for agent in (scout, porter)
        ],
        process=Process.sequential,
    )
    return " ".join(done.raw for done in crew.kickoff().tasks_output)


if __name__ == "__main__":
    print(solve(json.loads(os.environ["LATENTMEM_TASK"])))
