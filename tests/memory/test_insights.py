"""OAgents' insights: operations against tables worked out by hand, whatever a model replies; who is told what."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_composer import trajectory

from latentmem.bank import ExperienceBank
from latentmem.config import InsightsSection, MemorySection
from latentmem.memory.insights import Insights, apply, numbered, ranked
from latentmem.memory.learned import Scribe
from latentmem.memory.memory import describe
from latentmem.models.agent import ScriptedModel
from latentmem.trajectory import Role, Task

ROLES = [Role(name="assistant", profile="Solves."), Role(name="critic", profile="Checks.")]


def before() -> list[dict]:
    return [
        {"text": "count twice", "score": 3, "sources": ["a"]},
        {"text": "be brief", "score": 1, "sources": ["b"]},
    ]


COUNT, BRIEF = before()
TABLE = {
    # reply: (insights afterwards as (text, score, sources), what was malformed)
    "ADD: check units": ([("count twice", 3, "a"), ("be brief", 1, "b"), ("check units", 2, "x")], {}),
    "AGREE 1": ([("count twice", 4, "ax"), ("be brief", 1, "b")], {}),
    "EDIT 2: be very brief": ([("count twice", 3, "a"), ("be very brief", 2, "bx")], {}),
    "REMOVE 1": ([("count twice", 2, "ax"), ("be brief", 1, "b")], {}),
    "REMOVE 2": ([("count twice", 3, "a")], {}),
    # Numbers are those of the list as it was shown, also where an insight goes in between.
    "REMOVE 2\nAGREE 1\nADD: c": ([("count twice", 4, "ax"), ("c", 2, "x")], {}),
    "ADD: be brief": ([("count twice", 3, "a"), ("be brief", 2, "bx")], {}),
    "ADD 3: spaced   out\ttext ": (
        [("count twice", 3, "a"), ("be brief", 1, "b"), ("spaced out text", 2, "x")],
        {},
    ),
    "  - **AGREE** 1\n2. REMOVE #2: no longer true\n": ([("count twice", 4, "ax")], {}),
    # What cannot be used
    "": ([], {"reply without an operation": 1}),
    "Sure! I agree with 1.\nadd: lower case": ([], {"reply without an operation": 1}),
    "Here it comes:\nAGREE 1\nBye": (
        [("count twice", 4, "ax"), ("be brief", 1, "b")],
        {"line without an operation": 2},
    ),
    "AGREE 0\nAGREE 3\nEDIT : x\nREMOVE": ([], {"no insight of that number": 4}),
    "AGREE 99999999999999999999999": ([], {"no insight of that number": 1}),
    "ADD\nADD:   \nEDIT 1\nEDIT 1 text without a colon": ([], {"operation without a text": 4}),
    "AGREE 1\nREMOVE 1": ([("count twice", 4, "ax"), ("be brief", 1, "b")], {"second operation on one insight": 1}),
    "ADD: 1\nADD: 2\nADD: 3\nADD: 4\nADD: 5\nAGREE 1": (
        [("count twice", 3, "a"), ("be brief", 1, "b"), *((str(i), 2, "x") for i in range(1, 5))],
        {"operation beyond the limit": 2},
    ),
    "ADDED: not a word of ours": ([], {"reply without an operation": 1}),
}


@pytest.mark.parametrize("reply", TABLE)
def test_a_reply_changes_the_list_as_worked_out_by_hand(reply: str) -> None:
    expected, malformed = TABLE[reply]
    insights = before()
    assert apply(insights, reply, ["x"], max_insights=9) == malformed
    wanted = [{"text": text, "score": score, "sources": list(sources)} for text, score, sources in expected]
    assert insights == (wanted or before())


def test_a_list_that_is_full_drops_the_lowest_score_the_oldest_first() -> None:
    insights = [*before(), {"text": "new", "score": 1, "sources": ["c"]}]
    apply(insights, "ADD: newest", ["x"], max_insights=3)
    assert [insight["text"] for insight in insights] == ["count twice", "new", "newest"]


def test_an_insight_is_cut_to_its_longest_length() -> None:
    insights: list[dict] = []
    apply(insights, f"ADD: {'long ' * 1000}", ["x"], max_insights=3)
    assert insights[0]["text"] == ("long " * 60).strip()


def test_the_best_come_first_and_none_that_a_banned_episode_had_a_part_in() -> None:
    insights = [*before(), {"text": "later", "score": 3, "sources": ["c", "d"]}]
    assert numbered(ranked(insights)) == "1. count twice\n2. later\n3. be brief"
    assert numbered(ranked(insights, without=["d", "z"])) == "1. count twice\n2. be brief"


def test_each_round_is_shown_the_list_and_the_next_episodes_in_their_order() -> None:
    model = ScriptedModel({"insights": ["ADD: one", "AGREE 1\nADD: two", "nonsense"]})
    section = InsightsSection(episodes_per_round=2, revise="{insights}|{episodes}|{max_insights}", max_insights=7)
    scribe = Scribe(model)
    method = Insights(scribe, section=section)
    episodes = [trajectory(f"task {i}", {"assistant": "x"}, success=i % 2 == 0) for i in range(5)]
    notes = method.begin()
    method.learn(notes, episodes)
    ids = [episode.id for episode in episodes]
    assert notes == {
        "insights": [
            {"text": "one", "score": 3, "sources": ids[:4]},
            {"text": "two", "score": 2, "sources": ids[2:4]},
        ]
    }
    told = [describe(episode) for episode in episodes]
    assert "Outcome: not solved" in told[1]
    assert [prompt.user for prompt in model.prompts] == [
        f"(none so far)|{told[0]}\n\n{told[1]}|7",
        f"1. one|{told[2]}\n\n{told[3]}|7",
        f"1. one\n2. two|{told[4]}|7",
    ]
    assert {prompt.system for prompt in model.prompts} == {section.system}
    assert scribe.spent.malformed == {"reply without an operation": 1}
    # a prompt's length is its bytes, a reply's its bytes and the end
    assert scribe.spent.generated_tokens == len("ADD: one" + "AGREE 1\nADD: two" + "nonsense") + 3
    assert scribe.spent.prompt_tokens == sum(len(p.system + p.user) for p in model.prompts)


def test_insights_and_nearest_successes_are_told_but_none_that_comes_of_the_very_task(
    tmp_path: Path, fake_embed: Callable[[list[str]], np.ndarray]
) -> None:
    near, own = trajectory("the sum of 2 and 3", {"assistant": "five"}), trajectory("the sum of 2 and 9", {"a": "x"})
    failed = trajectory("the sum of 2 and 8", {"assistant": "x"}, success=False)
    words = MemorySection(text="Past:\n{memory}", task="{task}", step="", solved="")
    method = Insights(Scribe(ScriptedModel({})), 1, InsightsSection(told="Know:\n{insights}"), words)
    notes = {
        "insights": [
            {"text": "of the task itself", "score": 9, "sources": [near.id, own.id]},
            {"text": "low", "score": 1, "sources": [near.id]},
            {"text": "high", "score": 4, "sources": [failed.id]},
        ]
    }
    with ExperienceBank(tmp_path / "bank.sqlite", fake_embed, embedder="fake") as bank:
        bank.add([near, own, failed])
        asked, other = own.task, Task(id="1", domain="d", text="what else")
        queries = [(asked, ROLES[0]), (asked, ROLES[1]), (other, ROLES[0])]
        first, second, third = method.recall(notes, bank, queries)
        assert first == second
        assert first.text == "Know:\n1. high\n2. low\n\nPast:\nthe sum of 2 and 3"
        assert (first.kind, first.sources) == ("oagents", (near.id,))
        assert third.text.startswith("Know:\n1. of the task itself\n2. high\n3. low\n\nPast:\n")
        nothing = method.recall(method.begin(), bank, queries)[0]
        assert nothing.text == "Past:\nthe sum of 2 and 3"
