"""A mix plays each task in its own domain, and what is evaluated on is never learned from."""

import pytest

from latentmem.environments.environment import Outcome
from latentmem.environments.mix import MixDomain, Part
from latentmem.errors import DataError
from latentmem.trajectory import Task


class World:
    """A domain of given texts; its environments say whose they are and never end by themselves."""

    def __init__(self, name, train, test, ids=True):
        self.name = name
        self.splits = {
            split: [Task(id=text if ids else None, domain=name, text=text) for text in texts]
            for split, texts in (("train", train), ("test", test))
        }

    def tasks(self, split):
        return list(self.splits.get(split, ()))

    def skipped(self, split):
        return {"blank": 2} if split == "train" else {}

    def start(self, task):
        assert any(task in tasks for tasks in self.splits.values())
        return Endless(self.name)


class Endless:
    def __init__(self, name):
        self.instructions = f"Rules of {name}."

    def step(self, action):
        return Outcome(action, 0.5, False)


def test_train_tasks_are_those_of_all_parts_in_one_order_and_test_tasks_follow_each_other():
    a, b = World("a", [f"a{i}" for i in range(20)], ["x"]), World("b", [f"b{i}" for i in range(20)], ["y", "z"])
    mix = MixDomain([Part(a, 1), Part(b, 1)], [Part(b, 1), Part(a, 1)])
    train = mix.tasks("train")
    assert sorted(task.text for task in train) == sorted(task.text for task in a.tasks("train") + b.tasks("train"))
    assert {task.domain for task in train[:10]} == {"a", "b"}
    assert train == MixDomain([Part(a, 1), Part(b, 1)], [Part(a, 1)]).tasks("train")
    assert [task.text for task in mix.tasks("test")] == ["y", "z", "x"]
    assert mix.skipped("train") == {"blank": 4}


def test_what_is_also_evaluated_on_is_left_out_of_train_by_key_and_by_text(caplog):
    seen = World("a", ["1", "2", "same text"], [])
    unseen = World("b", [], ["3"])
    twin = World("c", [], ["same text"], ids=False)
    again = World("a", [], ["2"])
    mix = MixDomain([Part(seen, 1)], [Part(unseen, 1), Part(twin, 1), Part(again, 1)])
    assert [task.text for task in mix.tasks("train")] == ["1"]
    assert "2 train tasks of the mix are test tasks too" in caplog.text


def test_a_task_is_played_by_its_own_domain_for_its_own_number_of_turns():
    a, b = World("a", ["1"], []), World("b", ["2"], ["3"])
    mix = MixDomain([Part(a, 1), Part(b, 3)], [Part(b, 3)])
    of = {task.text: mix.start(task) for task in [*mix.tasks("train"), *mix.tasks("test")]}
    assert of["1"].instructions == "Rules of a."
    assert of["2"].instructions == of["3"].instructions == "Rules of b."
    assert of["1"].step("x") == Outcome("x", 0.5, True)
    assert [of["2"].step("x").done for _ in range(3)] == [False, False, True]


def test_a_task_of_no_part_is_refused():
    mix = MixDomain([Part(World("a", ["1"], []), 1)], [Part(World("b", [], ["2"]), 1)])
    with pytest.raises(DataError, match="task c:9: belongs to none of the mixed benchmarks"):
        mix.start(Task(id="9", domain="c", text="?"))


def test_experience_and_dev_are_those_of_all_parts_that_have_them_without_test_tasks():
    a, b = World("a", ["1"], []), World("b", ["2"], ["3"])
    a.splits |= {"experience": [Task(id="e", domain="a", text="e")], "dev": [Task(id="d", domain="a", text="d")]}
    b.splits["experience"] = [Task(id="f", domain="b", text="f"), b.splits["test"][0]]
    mix = MixDomain([Part(a, 1)], [Part(b, 1)])
    assert [task.text for task in mix.tasks("experience")] == ["e", "f"]
    assert [task.text for task in mix.tasks("dev")] == ["d"]
    assert [mix.start(task).instructions for task in mix.tasks("experience")] == ["Rules of a.", "Rules of b."]
    assert MixDomain([Part(World("c", ["1"], ["2"]), 1)], [Part(World("d", [], ["3"]), 1)]).tasks("dev") == []
