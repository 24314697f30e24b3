"""What `evaluate` returns: a table, plain values, a data frame; and what it takes for granted."""

import json
from pathlib import Path

import pytest

from latentmem import NoMemory, Outcome, Role, ScriptedModel, Task, evaluate
from latentmem.errors import ConfigError
from latentmem.teams.turn import Call


class World:
    instructions = "Say 1."

    def step(self, action):
        return Outcome("", reward=float(action == "1"), done=True)


class Ones:
    """Four test tasks, of which the right answer is always 1."""

    name = "ones"

    def tasks(self, split):
        return [Task(id=str(i), domain="ones", text=f"task {i}") for i in range(4)] if split == "test" else []

    def start(self, task):
        return World()


class Solo:
    name, roles = "solo", (Role(name="a", profile="answers"),)

    def turn(self, task, instructions, history):
        (said,) = yield [Call(self.roles[0], instructions, task)]
        return said


@pytest.fixture
def results():
    model = ScriptedModel({"a": ["1", "2", "1", "1"]})
    return evaluate(Solo(), model, {"none": NoMemory(), "other": NoMemory}, Ones(), num_bootstraps=50)


def test_the_test_split_is_played_under_memories_and_under_what_makes_them(results):
    assert [(row["name"], row["accuracy"]) for row in results["memories"]] == [("none", 0.75), ("other", 0.75)]
    assert results["task_ids"] == [f"ones:{i}" for i in range(4)]
    assert results["temperature"] == 0


def test_they_print_as_a_table_and_are_plain_values(results):
    lines = results.table().splitlines()
    assert lines[0].split()[:2] == ["memory", "accuracy"]
    assert [line.split()[:2] for line in lines[2:4]] == [["none", "75.0%"], ["other", "75.0%"]]
    assert repr(results) == "Results(4 tasks: none=0.750, other=0.750)"
    assert json.loads(json.dumps(results.to_dict())) == results.to_dict() == dict(results)


def test_they_become_a_data_frame(results):
    pytest.importorskip("pandas")
    frame = results.to_dataframe()
    assert list(frame.index) == ["none", "other"]
    assert frame.loc["none", "accuracy"] == 0.75
    assert {"accuracy_low", "reward", "prompt_tokens", "seconds", "carried"} <= set(frame.columns)


def test_nothing_is_left_behind_without_a_folder_and_all_is_kept_with_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = ScriptedModel({"a": ["1"]})
    evaluate(Solo(), model, {"none": NoMemory()}, Ones(), num_bootstraps=50)
    assert list((tmp_path / "temporary").iterdir()) == []
    evaluate(Solo(), model, {"none": NoMemory()}, Ones(), folder=str(tmp_path / "kept"), num_bootstraps=50)
    assert sorted(path.name for path in Path(tmp_path / "kept").iterdir()) == ["none.costs", "none.jsonl"]


def test_no_task_is_told():
    with pytest.raises(ConfigError, match=r"^there is no task to evaluate on; "):
        evaluate(Solo(), ScriptedModel({"a": ["1"]}), {"none": NoMemory()}, Ones(), tasks=[])
