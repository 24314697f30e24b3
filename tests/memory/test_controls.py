"""Controls of a latent memory: what is gone, and that nothing else is."""

from collections.abc import Sequence

import pytest
import torch
from test_latent import ROLES, SUMS, memory  # noqa: F401 - the fixture
from torch.testing import assert_close

from latentmem.errors import ConfigError
from latentmem.memory.controls import ControlMemory, Replace, other_role, other_task, random_latents
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import Recall
from latentmem.trajectory import Role

QUERIES = [(task, role) for task in SUMS for role in ROLES]


def latents(recalls: Sequence[Recall]) -> torch.Tensor:
    return torch.stack([recall.latents for recall in recalls if recall.latents is not None])


def test_random_latents_are_as_long_as_the_real_ones_and_point_anywhere(memory: LatentMemory) -> None:  # noqa: F811
    control = ControlMemory(memory, random_latents(seed=3))
    real, given = latents(memory.recall_many(QUERIES)), latents(control.recall_many(QUERIES))
    assert given.shape == real.shape == (10, 3, 32)
    assert_close(given.norm(dim=2), real.norm(dim=2))
    cosines = torch.cosine_similarity(given, real, dim=2)
    assert cosines.abs().max() < 0.7  # 30 pairs in 32 dimensions
    between = torch.cosine_similarity(given.reshape(30, 1, 32), given.reshape(1, 30, 32), dim=2)
    assert (between - torch.eye(30)).abs().max() < 0.8
    real_between = torch.cosine_similarity(real.reshape(30, 1, 32), real.reshape(1, 30, 32), dim=2)
    assert real_between.min() > 0.9  # and real ones are nothing like that


def test_random_latents_depend_on_seed_task_and_role_alone_and_record_no_content(memory: LatentMemory) -> None:  # noqa: F811
    control = ControlMemory(memory, random_latents(seed=3))
    many = control.recall_many(QUERIES)
    for query, recall in zip(QUERIES, many, strict=True):
        alone = control.recall(*query)
        assert_close(alone.latents, recall.latents)
        record = alone.record
        assert (record.kind, record.text, record.sources, record.num_latents) == ("latent", "", (), 3)
    other = ControlMemory(memory, random_latents(seed=4)).recall(*QUERIES[0])
    assert not torch.allclose(other.latents, many[0].latents, atol=0.01)


def test_another_role_is_given_the_latents_of_the_next_one_at_the_same_task(memory: LatentMemory) -> None:  # noqa: F811
    roles = [*ROLES, Role(name="judge", profile="Decides.")]
    control = ControlMemory(memory, other_role(roles))
    for i, role in enumerate(roles):
        given, theirs = control.recall(SUMS[4], role), memory.recall(SUMS[4], roles[(i + 1) % 3])
        assert given.record == theirs.record
        assert_close(given.latents, theirs.latents)


def test_another_task_changes_the_trajectories_and_leaves_task_and_role(memory: LatentMemory) -> None:  # noqa: F811
    memory.num_retrieved = 1
    tasks = [SUMS[4], SUMS[1], SUMS[2]]
    drawn = set()
    for seed in range(8):
        control = ControlMemory(memory, other_task(tasks, seed))
        recall = control.recall(tasks[0], ROLES[1])
        trajectories = memory.bank.get(recall.record.sources)
        assert recall.record.text == memory.composer.prompt(tasks[0], ROLES[1], trajectories)
        assert_close(recall.latents, memory.composer.compose([recall.record.text])[0].detach(), rtol=0, atol=1e-5)
        near = [
            t.id
            for other in tasks[1:]
            for t in memory.bank.get(memory.recall(other, ROLES[0]).record.sources)
            if t.task.text != tasks[0].text
        ]
        assert set(recall.record.sources) <= set(near)
        assert recall.record == control.recall_many([(tasks[1], ROLES[0]), (tasks[0], ROLES[1])])[1].record
        drawn.add(recall.record.sources)
    assert len(drawn) == 2  # one for each other task


def test_a_trajectory_of_the_very_task_is_never_recalled_by_way_of_another(memory: LatentMemory) -> None:  # noqa: F811
    memory.num_retrieved = 4
    for seed in range(6):
        control = ControlMemory(memory, other_task(SUMS, seed))
        for task in SUMS[:3]:  # whose trajectories the bank holds
            found = memory.bank.get(control.recall(task, ROLES[0]).record.sources)
            assert found
            assert all(trajectory.task.text != task.text for trajectory in found)


def test_what_a_control_learns_and_costs_is_its_memorys(memory: LatentMemory) -> None:  # noqa: F811
    control = ControlMemory(memory, other_role(ROLES))
    control.recall(*QUERIES[0])
    assert control.composing_seconds == memory.composing_seconds > 0
    (first, *_) = memory.bank.get(memory.recall(*QUERIES[-1]).record.sources)
    memory.bank.delete(everything=True)
    control.add(first)
    assert len(memory.bank) == 1


@pytest.mark.parametrize("replace", [random_latents(3), other_role(ROLES), other_task(SUMS, 3)])
def test_what_a_control_has_the_composer_read_is_written_down_once(memory: LatentMemory, replace: Replace) -> None:  # noqa: F811
    recalls = ControlMemory(memory, replace).recall_many(QUERIES)
    assert memory.ledger.prompt_tokens > 0
    assert sum(recall.spent.prompt_tokens for recall in recalls) == memory.ledger.prompt_tokens


def test_a_control_without_another_is_refused() -> None:
    with pytest.raises(ConfigError, match="other-role needs a team of two roles or more, but this team has one"):
        other_role(ROLES[:1])
    with pytest.raises(ConfigError, match="other-task needs two tasks or more, but the test split has one"):
        other_task(SUMS[:1], seed=0)
