"""LangGraph: a scout and a porter are two nodes of a graph that run side by side."""

import json
import operator
import os
from collections.abc import Callable
from typing import Annotated, TypedDict

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

SCOUT = "You are the scout. Say the password, like this: apple"
PORTER = "You are the porter. Say the emblem, like this: lion"


class State(TypedDict):
    """What the nodes read and write."""

    place: str
    said: Annotated[dict[str, str], operator.or_]


def member(name: str, system: str) -> Callable[[State], dict[str, dict[str, str]]]:
    """Make the node of one agent."""
    llm = ChatOpenAI(model="smollm2-135m")

    def speak(state: State) -> dict[str, dict[str, str]]:
        answer = llm.invoke([SystemMessage(system), HumanMessage(state["place"])])
        return {"said": {name: answer.text}}

    return speak


def solve(task: dict[str, str]) -> str:
    """Return the team's answer."""
    graph = StateGraph(State)
    for name, system in (("scout", SCOUT), ("porter", PORTER)):
        graph.add_node(name, member(name, system))
        graph.add_edge(START, name)
        graph.add_edge(name, END)
    said = graph.compile().invoke({"place": task["text"], "said": {}})["said"]
    return f"{said['scout']} {said['porter']}"


if __name__ == "__main__":
    print(solve(json.loads(os.environ["LATENTMEM_TASK"])))
