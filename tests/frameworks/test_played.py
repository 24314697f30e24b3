"""Two agents of each framework, as it is released, are played as a team: the test sees the engine's input."""

import json
from pathlib import Path

import pytest
import torch
from talking import ARGUMENTS, PLACE, WORDS, BothWords, RoleLatents, Talker, call_of, results_in
from venvs import python_of

from latentmem import Task, rollout
from latentmem.config import ProgramSection
from latentmem.serving.programs.team import ProgramTeam

pytestmark = pytest.mark.slow
PROGRAMS = Path(__file__).with_name("programs")
PROFILES = {"scout": "The password of the place", "porter": "The emblem of the place"}
FACES = [
    ("autogen", "chat"),
    ("agent_framework", "chat"),
    ("agent_framework", "responses"),
    ("camel", "chat"),
    ("crewai", "chat"),
    ("langgraph", "chat"),
    ("openai_agents", "chat"),
    ("openai_agents", "responses"),
    ("smolagents", "chat"),
]
WAYS = [("header", False), ("body", True), ("url", False), ("system", True)]


def play(framework, program, told_by="system", stream=False, api="chat"):
    """Two episodes of a program, and the prompts that the engine saw."""
    roles = [
        {"name": name, "profile": profile, "pattern": rf"\b{name}\b" if told_by == "system" else None}
        for name, profile in PROFILES.items()
    ]
    asked = {"TOLD_BY": told_by, "STREAM": str(int(stream)), "API": api}
    command = ("env", *(f"{name}={value}" for name, value in asked.items()), str(python_of(framework)))
    section = ProgramSection(kind="program", command=(*command, str(PROGRAMS / program)), roles=roles)
    model = Talker()
    team = ProgramTeam(section, lambda: model)
    task = Task(id="t", domain="toy", text=PLACE)
    try:
        first, second = rollout(team, RoleLatents(), model, [task], lambda task: BothWords(), group_size=2).trajectories
    finally:
        team.close()
    assert first.error is None, first.error
    said = [sorted((m.role, m.response) for m in each.messages) for each in (first, second)]
    assert said[0] == said[1]
    return first, model.prompts


@pytest.mark.parametrize(
    ("told_by", "stream"), WAYS, ids=lambda value: {True: "streamed", False: "whole"}.get(value, value)
)
@pytest.mark.parametrize(("framework", "api"), FACES)
def test_each_agent_gets_its_roles_latents_and_its_episode_is_kept_as_it_went(framework, api, told_by, stream):
    trajectory, prompts = play(framework, f"{framework}_pair.py", told_by, stream, api)
    assert trajectory.reward == 1

    by_role = {role: [m for m in trajectory.messages if m.role == role] for role in WORDS}
    calling, telling = by_role["scout"]
    (porter,) = by_role["porter"]
    assert len(trajectory.messages) == 3
    assert len(prompts) == 6

    for prompt in prompts:
        assert torch.equal(prompt.latents, torch.full((2, 3), float(len(prompt.role))))
    for message in trajectory.messages:
        assert message.recalled.text == f"{PLACE} {message.role}: {PROFILES[message.role]}"
        assert (message.token_ids, message.finish) == ((*message.response.encode(), 256), "stop")
        assert message.served.composer == "c"
        assert message.served.prompt_ids == (1, 2, 3)

    response = f"I look. {call_of('kind_of_place', ARGUMENTS['kind_of_place'])}"
    assert response.endswith(calling.response)
    assert (calling.response == response) == (framework != "smolagents")  # which says that a tool has to be called
    asked = calling.served.conversation
    tools = {tool["function"]["name"]: tool["function"] for tool in asked.tools}
    assert tools["kind_of_place"]["parameters"]["properties"]["name"]["type"] == "string"
    assert "scout" in asked.system
    assert PLACE in asked.user
    assert not any(results_in(message) for message in asked.messages)

    went_on = telling.served.conversation
    assert went_on.messages[: len(asked.messages)] == asked.messages
    (result,) = [message for message in went_on.messages if results_in(message)]
    assert "mill" in json.dumps(result["content"])
    if framework != "smolagents":  # which tells calls and results in words of its own, and answers by a call
        assert trajectory.messages.index(telling) in porter.reads
        (call,) = [call for message in went_on.messages for call in message.get("tool_calls", ())]
        assert json.loads(call["function"]["arguments"]) == {"name": "the Crimson Mill"}
        assert result["tool_call_id"] == call["id"]

    assert telling.served.lineage == calling.served.lineage
    assert porter.served.lineage != calling.served.lineage
    assert "porter" in porter.served.conversation.system


def test_an_agent_that_is_the_tool_of_another_has_a_conversation_of_its_own():
    trajectory, prompts = play("openai_agents", "openai_agents_nested.py")
    assert trajectory.reward == 1
    calling, nested, telling = trajectory.messages
    assert [m.role for m in trajectory.messages] == ["scout", "porter", "scout"]
    assert telling.served.lineage == calling.served.lineage != nested.served.lineage
    assert nested.user == ARGUMENTS["ask_porter"]["input"]
    assert telling.reads == (1,)
    for prompt in prompts:
        assert torch.equal(prompt.latents, torch.full((2, 3), float(len(prompt.role))))
