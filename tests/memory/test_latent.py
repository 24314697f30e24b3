"""Latent memory: what it finds, never of the task itself, and that batches change nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_composer import trajectory
from torch.testing import assert_close

from latentmem.bank import ExperienceBank
from latentmem.config import MemorySection
from latentmem.memory.composer import Composer
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import NoMemory, recall_one
from latentmem.models.language_model import LanguageModel
from latentmem.trajectory import Role, Task

ROLES = [Role(name="assistant", profile="Solves the task."), Role(name="critic", profile="Looks for mistakes.")]
SUMS = [Task(id=None, domain="sums", text=f"What is {i} + {i}?") for i in range(5)]


@pytest.fixture
def memory(
    tiny_model_dir: Path, tmp_path: Path, fake_embed: Callable[[list[str]], np.ndarray]
) -> Iterator[LatentMemory]:
    model = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")
    with ExperienceBank(tmp_path / "bank.sqlite", fake_embed, embedder="fake") as bank:
        for i, task in enumerate(SUMS[:4]):
            said = {"assistant": f"the assistant said {i}", "critic": f"the critic said {i}"}
            bank.add(trajectory(task.text, said, success=i != 3))
        yield LatentMemory(bank, Composer(model, num_latents=3, rank=2), num_retrieved=2, batch_size=2)


def test_recall_composes_the_text_it_records(memory: LatentMemory) -> None:
    recall = recall_one(memory, SUMS[4], ROLES[0])
    record = recall.record
    assert (record.kind, record.num_latents, len(record.sources)) == ("latent", 3, 2)
    found = memory.bank.get(record.sources)
    assert record.text == memory.composer.prompt(SUMS[4], ROLES[0], found)
    assert recall.latents is not None
    assert recall.latents.shape == (3, 32)
    assert not recall.latents.requires_grad
    assert_close(recall.latents, memory.composer.compose([record.text])[0].detach(), rtol=0, atol=1e-5)


def test_roles_are_told_what_they_said_themselves(memory: LatentMemory) -> None:
    first, second = memory.recall_many([(SUMS[4], role) for role in ROLES])
    assert first.record.sources == second.record.sources
    assert "the assistant said" in first.record.text
    assert "the critic said" not in first.record.text
    assert "the critic said" in second.record.text
    assert not torch.allclose(first.latents, second.latents, atol=1e-3)


def test_many_equal_one_by_one_in_their_order(memory: LatentMemory) -> None:
    queries = [(task, role) for task in SUMS for role in ROLES]
    for query, recall in zip(queries, memory.recall_many(queries), strict=True):
        alone = recall_one(memory, *query)
        assert recall.record == alone.record
        assert_close(recall.latents, alone.latents, rtol=0, atol=1e-5)
    assert list(memory.recall_many([])) == []
    assert memory.records([]) == []


def test_trajectory_of_the_asked_task_and_failures_are_never_used(memory: LatentMemory) -> None:
    for task in SUMS:
        found = memory.bank.get(recall_one(memory, task, ROLES[0]).record.sources)
        assert len(found) == 2
        assert all(t.task.text != task.text and t.success for t in found)
    with_failures = LatentMemory(memory.bank, memory.composer, num_retrieved=4, only_successes=False)
    found = memory.bank.get(recall_one(with_failures, SUMS[4], ROLES[0]).record.sources)
    assert sorted(t.success for t in found) == [False, True, True, True]


def test_added_trajectory_is_found_from_then_on(memory: LatentMemory) -> None:
    memory.num_retrieved = 9
    before = recall_one(memory, SUMS[0], ROLES[0]).record.sources
    memory.add(trajectory("What is 0 + 1?", {"assistant": "1"}))
    assert len(recall_one(memory, SUMS[0], ROLES[0]).record.sources) == len(before) + 1


def test_empty_bank_gives_latents_of_a_text_that_says_so(
    memory: LatentMemory, tmp_path: Path, fake_embed: Callable[[list[str]], np.ndarray]
) -> None:
    with ExperienceBank(tmp_path / "empty.sqlite", fake_embed, embedder="fake") as bank:
        recall = recall_one(LatentMemory(bank, memory.composer), SUMS[0], ROLES[0])
    assert recall.record.sources == ()
    assert recall.record.text.count(MemorySection().nothing) == 2
    assert recall.latents is not None


def test_composing_time_is_counted(memory: LatentMemory) -> None:
    spent = memory.recall_many([(SUMS[0], ROLES[0])]).spent
    assert spent.composing_seconds == memory.spent.composing_seconds > 0
    assert memory.recall_many([(SUMS[0], ROLES[0])]).spent.composing_seconds < memory.spent.composing_seconds


def test_no_memory_remembers_nothing() -> None:
    memory = NoMemory()
    memory.add(trajectory("What is 0 + 1?", {"assistant": "1"}))
    recalls = memory.recall_many([(SUMS[0], ROLES[0]), (SUMS[1], ROLES[1])])
    assert [(r.record.kind, r.record.text, r.record.num_latents, r.latents) for r in recalls] == [
        ("none", "", 0, None)
    ] * 2
