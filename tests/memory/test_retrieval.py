"""Retrieval in two stages: the nearest, and the best rated among twice as many; for both memories alike."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from test_composer import trajectory

from latentmem.bank import ExperienceBank
from latentmem.memory.composer import Composer
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import Spent
from latentmem.memory.retrieval import retrieve
from latentmem.memory.text import TextMemory
from latentmem.models.language_model import LanguageModel
from latentmem.trajectory import Role, Task, Trajectory

ROLES = [Role(name="assistant", profile="Solves."), Role(name="critic", profile="Checks.")]
ASKED = [Task(id=None, domain="d", text=text) for text in ("one two three four five six", "six seven eight nine")]


class Rate:
    """Ratings by the last word of the episode's task; remembers what it was asked."""

    def __init__(self, ratings: dict[str, float]) -> None:
        self.ratings = ratings
        self.calls: list[list[tuple[str, str]]] = []
        self.spent = Spent()

    def __call__(self, pairs: Sequence[tuple[Task, Trajectory]]) -> list[float]:
        self.calls.append([(task.text, episode.task.text) for task, episode in pairs])
        return [self.ratings.get(episode.task.text.split()[-1], 0.0) for _, episode in pairs]


@pytest.fixture
def bank(tmp_path: Path, fake_embed: Callable[[list[str]], np.ndarray]) -> Iterator[ExperienceBank]:
    with ExperienceBank(tmp_path / "bank.sqlite", fake_embed, embedder="fake") as bank:
        words = ASKED[0].text.split()
        bank.add([trajectory(" ".join([*words[:i], "and", str(i)]), {"assistant": "a"}) for i in range(6, 0, -1)])
        bank.add(trajectory(ASKED[0].text, {"assistant": "the very task"}))
        yield bank


def texts(found: Sequence[Trajectory]) -> list[str]:
    return [episode.task.text for episode in found]


def nearest(bank: ExperienceBank, task: Task, k: int) -> list[str]:
    return texts([hit.trajectory for hit in bank.search(task, k=k)])


def test_without_ratings_the_nearest_are_kept(bank: ExperienceBank) -> None:
    found = retrieve(bank, [*ASKED, ASKED[0]], k=2)
    assert {key: texts(value) for key, value in found.items()} == {task.key: nearest(bank, task, 2) for task in ASKED}


def test_the_best_rated_of_twice_as_many_are_kept_and_nearer_ones_where_they_tie(bank: ExperienceBank) -> None:
    near = nearest(bank, ASKED[0], 6)
    last = [text.split()[-1] for text in near]
    rate = Rate({last[1]: 5.0, last[2]: 5.0, last[3]: 9.0, last[4]: 10.0})
    found = retrieve(bank, ASKED[:1], k=2, rate=rate)[ASKED[0].key]
    assert texts(found) == [near[3], near[1]]  # the fourth, though last[4] would be better still: it is no candidate
    assert rate.calls == [[(ASKED[0].text, text) for text in near[:4]]]
    assert texts(retrieve(bank, ASKED[:1], k=2, rate=Rate({}))[ASKED[0].key]) == near[:2]


def test_all_tasks_are_rated_in_one_call_each_once_and_never_the_asked_task_itself(bank: ExperienceBank) -> None:
    rate = Rate({"3": 1.0})
    found = retrieve(bank, [ASKED[0], ASKED[1], ASKED[0]], k=3, rate=rate)
    (asked,) = rate.calls
    assert asked == [(task.text, text) for task in ASKED for text in nearest(bank, task, 6)]
    assert (ASKED[0].text, ASKED[0].text) not in asked
    assert (ASKED[1].text, ASKED[0].text) in asked
    assert texts(found[ASKED[0].key])[0].endswith("3")
    assert all(len(value) == 3 for value in found.values())


def test_fewer_than_k_and_none_at_all(
    bank: ExperienceBank, tmp_path: Path, fake_embed: Callable[[list[str]], np.ndarray]
) -> None:
    rate = Rate({"3": 1.0})
    found = retrieve(bank, ASKED[:1], k=9, rate=rate)[ASKED[0].key]
    assert len(found) == len(rate.calls[0]) == 6  # all but the asked task
    assert found[0].task.text.endswith("3")
    assert retrieve(bank, ASKED[:1], k=2, success=False, rate=rate) == {ASKED[0].key: []}
    assert retrieve(bank, [], k=2, rate=rate) == {}
    with ExperienceBank(tmp_path / "empty.sqlite", fake_embed, embedder="fake") as empty:
        assert retrieve(empty, ASKED, k=2, rate=rate) == {task.key: [] for task in ASKED}


def test_latent_and_text_memory_recall_what_is_rated_best_once_for_all_roles(
    bank: ExperienceBank, tiny_model_dir: Path
) -> None:
    composer = Composer(LanguageModel.from_pretrained(str(tiny_model_dir), "cpu"), num_latents=3, rank=2)
    queries = [(task, role) for task in ASKED for role in ROLES]
    near = nearest(bank, ASKED[0], 4)
    for make in (LatentMemory, TextMemory):
        arguments = (bank, composer) if make is LatentMemory else (bank,)
        rate = Rate({near[3].split()[-1]: 9.0, near[2].split()[-1]: 8.0})
        recalls = make(*arguments, num_retrieved=2, rate=rate).recall_many(queries)
        assert len(rate.calls) == 1
        assert len(rate.calls[0]) == 2 * 4
        for recall in recalls[:2]:
            assert texts(bank.get(recall.record.sources)) == [near[3], near[2]]
            assert recall.record.text.index(near[3]) < recall.record.text.index(near[2])
        plain = make(*arguments, num_retrieved=2).recall_many(queries)
        assert texts(bank.get(plain[0].record.sources)) == near[:2]
