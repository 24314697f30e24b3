"""Memories that learn: the notes file, in what order and how often they learn, and what a kill leaves behind."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_composer import trajectory

from latentmem.bank import ExperienceBank
from latentmem.config import GenerativeSection, GMemorySection, VoyagerSection
from latentmem.errors import RunError
from latentmem.memory.graph import Graph
from latentmem.memory.insights import Insights
from latentmem.memory.learned import LearnedMemory, Scribe, Similarity
from latentmem.memory.memory import Spent, recall_one
from latentmem.memory.stream import Stream, scaled
from latentmem.memory.summaries import Summaries
from latentmem.models.agent import ScriptedModel
from latentmem.trajectory import Role, Task, Trajectory

Embed = Callable[[list[str]], np.ndarray]
ROLES = [Role(name="assistant", profile="Solves."), Role(name="critic", profile="Checks.")]
ASKED = Task(id="1", domain="d", text="the sum of 2 and 4")


@pytest.fixture
def bank(tmp_path: Path, fake_embed: Embed) -> Any:
    with ExperienceBank(tmp_path / "bank.sqlite", fake_embed, embedder="fake") as bank:
        yield bank


class Killed(BaseException):
    """As a kill: nothing catches it."""


class Answering(ScriptedModel):
    """Replies with what depends on the prompt alone, and dies at a wanted call; some replies are useless."""

    def __init__(self, die_at: int | None = None) -> None:
        super().__init__({})
        self.num_calls, self.die_at = 0, die_at

    def respond(self, prompts: Any, sampling: Any) -> Any:
        self.num_calls += 1
        if self.num_calls == self.die_at:
            raise Killed
        assert sampling.temperature == 0
        replies = []
        for prompt in prompts:
            size = len(prompt.user)
            text = ["", f"ADD: rule {size}", f"AGREE 1\nREMOVE 2\nADD: {size}", "EDIT 1: it"][size % 4]
            self.responses = {prompt.role: [text]}
            self._used = {prompt.role: 0}
            replies += super().respond([prompt], sampling)
        return replies


class Rating:
    """Rates by a function, for nothing."""

    spent = Spent()

    def __init__(self, function: Callable[[Any], list[float]]) -> None:
        self.function = function

    def __call__(self, pairs: Any) -> list[float]:
        return self.function(pairs)


rate = Rating(lambda pairs: [1.0 + len(episode.task.text) % 9 for _, episode in pairs])


def methods(embed: Embed, model: ScriptedModel, only: bool) -> dict[str, Any]:
    scribe = Scribe(model)
    return {
        "voyager": Summaries(scribe, Similarity(embed), 2, only_successes=only),
        "generative": Stream(rate, rate, 2, only_successes=only),
        "oagents": Insights(scribe, 2, only_successes=only),
        "gmemory": Graph(scribe, Similarity(embed), rate, 2, GMemorySection(threshold=0.2), only_successes=only),
    }


def make(
    name: str, bank: ExperienceBank, path: Path, model: ScriptedModel, batch_size: int = 3, only: bool = True
) -> LearnedMemory:
    embed = bank._embed_function
    assert embed is not None
    return LearnedMemory(bank, methods(embed, model, only)[name], path, batch_size)  # type: ignore[arg-type]


def lived(count: int) -> list[Trajectory]:
    return [
        trajectory(f"the sum of {i} and {i * i}", {"assistant": f"is {i}"}, success=i % 3 != 2) for i in range(count)
    ]


def content(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    del found["costs"]["seconds"]
    return found


ALL = ("voyager", "generative", "oagents", "gmemory")


@pytest.mark.parametrize("name", ALL)
def test_a_kill_between_two_batches_leads_to_the_notes_of_an_undisturbed_run(
    bank: ExperienceBank, tmp_path: Path, name: str
) -> None:
    bank.add(lived(11))
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    model = Answering()
    undisturbed = make(name, bank, whole, model)
    undisturbed.learn()
    expected = content(whole)
    assert expected["learned"] == [t.id for t in lived(11)]
    assert sum(expected["costs"]["malformed"].values()) > 0 or name == "generative"
    for die_at in range(1, model.num_calls + 1):
        cut.unlink(missing_ok=True)
        with pytest.raises(Killed):
            make(name, bank, cut, Answering(die_at)).learn()
        done = content(cut)["learned"] if cut.exists() else []
        assert len(done) % 3 == 0
        make(name, bank, cut, Answering()).learn()
        assert content(cut) == expected
    # What is read back is what was learned, and tells the same.
    again = make(name, bank, whole, Answering())
    assert (again.notes, again.learned, again.digest) == (undisturbed.notes, undisturbed.learned, undisturbed.digest)
    queries = [(ASKED, role) for role in ROLES]
    assert [r.record for r in again.recall_many(queries)] == [r.record for r in undisturbed.recall_many(queries)]


@pytest.mark.parametrize("name", ALL)
def test_failures_are_told_where_the_configuration_says_so_and_notes_without_them_are_made_again(
    bank: ExperienceBank, tmp_path: Path, name: str
) -> None:
    failures = [one for one in lived(9) if not one.success]
    bank.add(failures)
    path, queries = tmp_path / "notes.json", [(ASKED, role) for role in ROLES]
    told = {}
    for only in (True, False, True):
        memory = make(name, bank, path, Answering(), only=only)
        memory.learn()
        told[only] = {source for recall in memory.recall_many(queries) for source in recall.record.sources}
    assert (told[True], bool(told[False]), told[False] <= {one.id for one in failures}) == (set(), True, True)


@pytest.mark.parametrize("name", ALL)
def test_each_trajectory_is_learned_from_once_and_recalling_changes_nothing(
    bank: ExperienceBank, tmp_path: Path, name: str
) -> None:
    model, path = Answering(), tmp_path / "notes.json"
    memory = make(name, bank, path, model)
    assert recall_one(memory, ASKED, ROLES[0]).record.text == ""
    for episode in lived(4):
        memory.add(episode)
    assert content(path)["learned"] == [t.id for t in lived(4)]
    before, calls = path.read_bytes(), model.num_calls
    memory.add(lived(4)[2])
    seen: list[int] = []
    memory.learn(seen.append)
    assert (path.read_bytes(), model.num_calls, seen) == (before, calls, [])
    recall = recall_one(memory, ASKED, ROLES[0])
    assert recall.record.kind == name
    assert recall.record.text
    assert recall.latents is None
    assert path.read_bytes() == before


def test_what_is_spent_on_learning_stands_in_the_file_and_on_recalling_with_the_first_recall(
    bank: ExperienceBank, tmp_path: Path
) -> None:
    model = ScriptedModel({"condense": ["c", ""], "insights": ["ADD: i"], "brief": ["b", ""]})
    memory = make("gmemory", bank, tmp_path / "n.json", model)
    bank.add(lived(2))
    memory.learn()
    asked = list(model.prompts)
    costs = content(memory.path)["costs"]
    assert costs == {
        "num_asked": 3,
        "prompt_tokens": sum(len((p.system + p.user).encode()) for p in asked),
        "generated_tokens": len("c" + "ADD: i") + 3,
        "num_shortened": 0,
        "malformed": {"empty condensation": 1},
    }
    recalls = memory.recall_many([(ASKED, role) for role in ROLES])
    asked = model.prompts[3:]
    assert [p.role for p in asked] == ["brief", "brief"]
    num_read = sum(len((p.system + p.user).encode()) for p in asked)
    malformed = {"empty brief": 1}
    assert recalls.spent == Spent(2, prompt_tokens=num_read, generated_tokens=len("b") + 2, malformed=malformed)
    assert content(memory.path)["costs"] == costs


def test_notes_another_process_has_brought_up_to_the_bank_are_read_and_nobody_is_asked(
    bank: ExperienceBank, tmp_path: Path
) -> None:
    path = tmp_path / "n.json"
    first, second = make("oagents", bank, path, Answering()), make("oagents", bank, path, Answering(die_at=1))
    bank.add(lived(5))
    first.learn()
    before = path.stat().st_mtime_ns
    second.learn()
    assert second.digest == first.digest
    assert path.stat().st_mtime_ns == before


def test_notes_of_other_settings_or_of_a_changed_bank_are_made_again_with_a_warning(
    bank: ExperienceBank, tmp_path: Path, fake_embed: Embed, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "n.json"
    bank.add(lived(4))
    make("voyager", bank, path, ScriptedModel({"summary": ["old"]})).learn()
    scribe = Scribe(ScriptedModel({"summary": ["new"]}))
    method = Summaries(scribe, Similarity(fake_embed), section=VoyagerSection(summary="Again: {episode}"))
    LearnedMemory(bank, method, path).learn()
    assert set(content(path)["notes"]["summaries"].values()) == {"new"}
    assert f"{path}: made with other settings; it is made again" in caplog.text
    bank.delete(success=False)
    LearnedMemory(bank, method, path).learn()
    assert content(path)["learned"] == bank.ids()
    assert len(bank.ids()) == 3
    assert "made with trajectories that are not, or not so, in the bank" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        LearnedMemory(bank, method, path).learn()
    assert not caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 of a memory's notes; this version of latentmem reads 1; remove the file, and it"),
        ({"version": None}, "version None of a memory's notes"),
        ({"memory": "gmemory"}, "notes of memory 'gmemory', expected 'voyager'; remove the file"),
        ({"notes": ...}, "damaged (input should be an object); remove the file, and it"),
        ({"notes": {"summaries": {"x": 1}}}, "damaged (summaries.x: input should be a valid string)"),
        ({"learned": [None]}, "damaged (learned.0: input should be a valid string)"),
        ({"costs": []}, "damaged (costs: input should be an object)"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    bank: ExperienceBank, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "n.json"
    bank.add(lived(1))
    make("voyager", bank, path, Answering()).learn()
    found = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))
    with pytest.raises(RunError) as error:
        make("voyager", bank, path, Answering())
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)
    path.write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        make("voyager", bank, path, Answering())


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("generative", {"importance": {"x": None}}),
        ("oagents", {"insights": [{"text": "t", "score": 0, "sources": []}]}),
        ("oagents", {"insights": [{"text": "t", "score": 2}]}),
        (
            "gmemory",
            {"nodes": [{"id": "a", "task": "t", "solved": True, "links": [0], "condensed": "c"}], "insights": []},
        ),
        ("gmemory", {"nodes": {}, "insights": []}),
    ],
)
def test_notes_of_another_form_are_refused(bank: ExperienceBank, tmp_path: Path, name: str, notes: Any) -> None:
    path = tmp_path / "n.json"
    bank.add(lived(1))
    make(name, bank, path, Answering()).learn()
    assert make(name, bank, path, Answering()).learned, "what it writes itself cannot be read"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"notes": notes}))
    with pytest.raises(RunError, match=r"n\.json: damaged \(.*\); remove the file, and it is made again"):
        make(name, bank, path, Answering())


@pytest.mark.parametrize("name", ALL)
def test_nothing_of_the_very_task_is_told(bank: ExperienceBank, tmp_path: Path, name: str) -> None:
    own, other = trajectory("the sum of 7 and 7", {"assistant": "secret"}), trajectory("a sum", {"assistant": "open"})
    model = ScriptedModel({"summary": ["secret"], "insights": ["ADD: secret"], "condense": ["secret"], "brief": ["x"]})
    memory = make(name, bank, tmp_path / "n.json", model, batch_size=1)
    memory.add(own)
    assert recall_one(memory, own.task, ROLES[0]).record.text == ""
    assert recall_one(memory, ASKED, ROLES[0]).record.text != ""
    model.responses = {"summary": ["open"], "insights": ["ADD: open"], "condense": ["open"], "brief": ["open"]}
    model._used = dict.fromkeys(model.responses, 0)
    memory.add(other)
    told = recall_one(memory, own.task, ROLES[0]).record
    assert told.sources == (other.id,)
    assert "secret" not in told.text
    assert "7" not in told.text
    assert "a sum" in told.text


def test_long_episodes_lose_their_middle_and_are_counted(bank: ExperienceBank, tmp_path: Path) -> None:
    scribe = Scribe(ScriptedModel({}), max_episode_characters=6)
    assert [scribe.shorten(text) for text in ("abcdef", "abcdefg")] == ["abcdef", "abc\n[...]\nefg"]
    assert scribe.spent.num_shortened == 1


# Voyager


def test_successes_are_found_by_their_summaries_all_asked_for_at_once(
    bank: ExperienceBank, tmp_path: Path, fake_embed: Embed
) -> None:
    stored = [
        trajectory("first", {"assistant": "1"}),
        trajectory("second", {"assistant": "2"}, success=False),
        trajectory("third", {"assistant": "3"}),
        trajectory("of 4 sum", {"assistant": "4"}),
    ]
    model = ScriptedModel({"summary": ["about cities and rivers", "the sum of 2 and 4", " \n"]})
    scribe = Scribe(model)
    section = VoyagerSection(system="S", summary="<{episode}>")
    memory = LearnedMemory(bank, Summaries(scribe, Similarity(fake_embed), 2, section), tmp_path / "n.json")
    bank.add(stored)
    memory.learn()
    assert [(p.system, p.user) for p in model.prompts] == [
        ("S", f"<Task: {text}\nAnswer: the action\nOutcome: solved>") for text in ("first", "third", "of 4 sum")
    ]
    one, two, three = stored[0].id, stored[2].id, stored[3].id
    # An empty summary is counted, and the task's text stands in.
    assert memory.notes == {"summaries": {one: "about cities and rivers", two: "the sum of 2 and 4", three: "of 4 sum"}}
    assert memory.costs["malformed"] == {"empty summary": 1}
    record = recall_one(memory, ASKED, ROLES[0]).record
    assert record.sources == (two, three)
    assert "Task: third\nAnswer: the action\nOutcome: solved\n\nTask: of 4 sum" in record.text
    assert len(model.prompts) == 3


# Generative agents


def test_recency_importance_and_relevance_are_scaled_over_the_candidates_and_weighed(
    bank: ExperienceBank, tmp_path: Path
) -> None:
    assert scaled([]) == []
    stored = [trajectory(f"the sum of {i}", {"assistant": "x"}) for i in range(4)]
    importance = dict(zip((t.id for t in stored), (9.0, 1.0, 5.0, 5.0), strict=True))
    relevance = dict(zip((t.id for t in stored), (2.0, 6.0, 4.0, 2.0), strict=True))
    bank.add(stored)

    def best(**weights: float) -> list[int]:
        names = ("recency_weight", "importance_weight", "relevance_weight")
        section = GenerativeSection(
            **{name: weights.get(name.removesuffix("_weight"), 0.0) for name in names}, recency_decay=0.5
        )
        method = Stream(
            Rating(lambda pairs: [relevance[t.id] for _, t in pairs]),
            Rating(lambda pairs: [importance[t.id] for _, t in pairs]),
            2,
            section,
        )
        memory = LearnedMemory(bank, method, tmp_path / "n.json")
        memory.learn()
        assert memory.notes == {"importance": importance}
        ids = [t.id for t in stored]
        return [ids.index(source) for source in recall_one(memory, ASKED, ROLES[0]).record.sources]

    # recency 0.5^3 0.5^2 0.5 1 -> 0 1/7 3/7 1; importance -> 1 0 0.5 0.5; relevance -> 0 1 0.5 0
    assert best(recency=1) == [3, 2]
    assert best(relevance=1) == [1, 2]
    assert best(importance=1)[0] == 0
    assert best(recency=1, importance=1, relevance=1) == [3, 2]  # 1, 1.14, 1.43, 1.5
    assert best(recency=1, importance=1, relevance=3) == [1, 2]  # 1, 3.14, 2.43, 1.5
    assert best(importance=2, relevance=1.5) == [0, 2]  # 2, 1.5, 1.75, 1


def test_only_twice_as_many_candidates_are_rated_and_failures_never(bank: ExperienceBank, tmp_path: Path) -> None:
    rated: list[str] = []

    def relevance(pairs: Any) -> list[float]:
        rated.extend(episode.task.text for _, episode in pairs)
        return [1.0] * len(pairs)

    memory = LearnedMemory(bank, Stream(Rating(relevance), rate, 1), tmp_path / "n.json")
    bank.add(lived(9))
    memory.learn()
    memory.recall_many([(ASKED, role) for role in ROLES])
    assert rated == [hit.trajectory.task.text for hit in bank.search(ASKED, k=2, success=True)]
