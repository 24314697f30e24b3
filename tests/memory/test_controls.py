"""Controls: what is gone, and that nothing else is."""

from collections.abc import Sequence

import pytest
import torch
from test_composer import trajectory
from test_latent import ROLES, SUMS, memory  # noqa: F401 - the fixture
from torch.testing import assert_close

from latentmem.errors import BankError, ConfigError
from latentmem.memory.controls import (
    ControlMemory,
    OtherTasksMemory,
    Replace,
    another_of,
    corrupted,
    empty,
    filler,
    irrelevant,
    of_other_tasks,
    other_role,
    random_latents,
    shuffled,
    zero_latents,
)
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import NoMemory, Recall, Recalls, recall_one
from latentmem.memory.text import TextMemory
from latentmem.trajectory import Role, Task

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
        alone = recall_one(control, *query)
        assert_close(alone.latents, recall.latents)
        record = alone.record
        assert (record.kind, record.text, record.sources, record.num_latents) == ("latent", "", (), 3)
    other = recall_one(ControlMemory(memory, random_latents(seed=4)), *QUERIES[0])
    assert not torch.allclose(other.latents, many[0].latents, atol=0.01)


def test_another_role_is_given_the_latents_of_the_next_one_at_the_same_task(memory: LatentMemory) -> None:  # noqa: F811
    roles = [*ROLES, Role(name="judge", profile="Decides.")]
    control = ControlMemory(memory, other_role(roles))
    for i, role in enumerate(roles):
        given, theirs = recall_one(control, SUMS[4], role), recall_one(memory, SUMS[4], roles[(i + 1) % 3])
        assert given.record == theirs.record
        assert_close(given.latents, theirs.latents)


def test_another_task_changes_the_trajectories_and_leaves_task_and_role(memory: LatentMemory) -> None:  # noqa: F811
    memory.num_retrieved = 1
    tasks = [SUMS[4], SUMS[1], SUMS[2]]
    drawn = set()
    for seed in range(8):
        control = ControlMemory(memory, irrelevant(another_of(tasks, seed)))
        recall = recall_one(control, tasks[0], ROLES[1])
        trajectories = memory.bank.get(recall.record.sources)
        assert recall.record.text == memory.composer.prompt(tasks[0], ROLES[1], trajectories)
        assert_close(recall.latents, memory.composer.compose([recall.record.text])[0].detach(), rtol=0, atol=1e-5)
        near = [
            t.id
            for other in tasks[1:]
            for t in memory.bank.get(recall_one(memory, other, ROLES[0]).record.sources)
            if t.task.text != tasks[0].text
        ]
        assert set(recall.record.sources) <= set(near)
        assert recall.record == control.recall_many([(tasks[1], ROLES[0]), (tasks[0], ROLES[1])])[1].record
        drawn.add(recall.record.sources)
    assert len(drawn) == 2  # one for each other task


def test_a_trajectory_of_the_very_task_is_never_recalled_by_way_of_another(memory: LatentMemory) -> None:  # noqa: F811
    memory.num_retrieved = 4
    for seed in range(6):
        control = ControlMemory(memory, irrelevant(another_of(SUMS, seed)))
        for task in SUMS[:3]:  # whose trajectories the bank holds
            found = memory.bank.get(recall_one(control, task, ROLES[0]).record.sources)
            assert found
            assert all(trajectory.task.text != task.text for trajectory in found)


def test_what_a_control_learns_and_costs_is_its_memorys(memory: LatentMemory) -> None:  # noqa: F811
    control = ControlMemory(memory, other_role(ROLES))
    assert control.recall_many(QUERIES[:1]).spent == memory.spent
    assert memory.spent.composing_seconds > 0
    (first, *_) = memory.bank.get(recall_one(memory, *QUERIES[-1]).record.sources)
    memory.bank.delete(everything=True)
    control.add(first)
    assert len(memory.bank) == 1


ALL = [
    empty(), shuffled(3), irrelevant(another_of(SUMS, 3)), corrupted(3), filler(), random_latents(3), other_role(ROLES),
    zero_latents(),
]  # fmt: skip


@pytest.mark.parametrize("replace", ALL)
def test_what_a_control_has_the_composer_read_is_written_down_once(memory: LatentMemory, replace: Replace) -> None:  # noqa: F811
    recalls = ControlMemory(memory, replace).recall_many(QUERIES)
    assert recalls.spent.prompt_tokens == memory.spent.prompt_tokens > 0


def test_a_control_without_another_is_refused() -> None:
    with pytest.raises(ConfigError, match="other-role needs a team of two roles or more, but this team has one"):
        other_role(ROLES[:1])
    with pytest.raises(ConfigError, match="irrelevant needs two tasks or more, but the test split has one"):
        another_of(SUMS[:1], seed=0)


# What was retrieved is changed, for latent and text memories alike

CHANGING = {"empty": empty(), "shuffle": shuffled(3), "corrupt": corrupted(3), "filler": filler()}


@pytest.fixture(params=["latent", "text"])
def either(request, memory):  # noqa: F811
    """A latent and a text memory of one bank, and what each was given to recall from, as text."""
    episodes = [acting(t, f"Add {i} and {i} to have {2 * i} in the end.") for i, t in enumerate(memory.bank)]
    memory.bank.delete(everything=True)
    memory.bank.add(episodes)
    return memory if request.param == "latent" else TextMemory(memory.bank, num_retrieved=2)


def acting(episode, action):
    return episode.model_copy(update={"steps": tuple(s.model_copy(update={"action": action}) for s in episode.steps)})


def recalled(memory, replace, query=(SUMS[4], ROLES[0])):  # noqa: F811
    return recall_one(ControlMemory(memory, replace), *query)


def texts(memory, query=(SUMS[4], ROLES[0])):  # noqa: F811
    return [t for found in memory.retrieved([query[0]]).values() for t in found]


def test_an_empty_memory_is_what_is_recalled_of_an_empty_bank(either):
    given = recalled(either, empty())
    assert given.record.sources == ()
    bank, either.bank = either.bank, either.bank
    bank.delete(everything=True)
    assert given.record == recall_one(either, SUMS[4], ROLES[0]).record


def test_shuffled_words_are_the_same_words_in_another_order_and_no_other_words_move(either):
    real, given = recall_one(either, SUMS[4], ROLES[0]).record, recalled(either, shuffled(3)).record
    assert given.text != real.text
    assert sorted(given.text.split()) == sorted(real.text.split())
    assert (given.kind, given.sources, given.num_latents) == (real.kind, real.sources, real.num_latents)
    for episode in texts(either):
        assert episode.task.text in given.text
    orders = {recalled(either, shuffled(seed)).record.text for seed in range(5)}
    assert len(orders) > 1


def test_filler_has_as_many_words_and_none_of_what_was_said(either):
    real, given = recall_one(either, SUMS[4], ROLES[0]).record, recalled(either, filler()).record
    assert len(given.text.split()) == len(real.text.split())
    assert given.sources == real.sources
    for episode in texts(either):
        assert episode.steps[0].action in real.text
        assert episode.steps[0].action not in given.text
        assert episode.task.text in given.text
    assert "the assistant said" not in given.text


def test_corrupt_words_are_others_of_other_episodes_and_little_words_stay(memory):  # noqa: F811
    memory.bank.delete(everything=True)
    memory.bank.add(acting(trajectory("the password of the barn", {"assistant": "it is apple"}), "The word is apple."))
    memory.bank.add(acting(trajectory("the password of the mill", {"assistant": "it is plum"}), "The name is plum, 7."))
    memory.bank.add(acting(trajectory("the password of the inn", {"assistant": "it is pear"}), "The sign is pear."))
    text_memory = TextMemory(memory.bank, num_retrieved=3)
    asked = Task(id=None, domain="sums", text="the password of the inn")
    given = recalled(text_memory, corrupted(3), (asked, ROLES[0])).record
    actions = [line.removeprefix("Answer: ") for line in given.text.splitlines() if line.startswith("Answer: ")]
    assert len(actions) == 2  # never the task's own episode
    for action in actions:
        words = action.replace(".", "").replace(",", "").split()
        assert (words[0], words[2]) == ("The", "is")
        # Nor a word of it.
        assert {words[1], *words[3:]} <= {"word", "apple", "name", "plum", "7"}
    assert not {"The word is apple.", "The name is plum, 7."} & set(actions)
    assert "the password of the barn" in given.text
    # The same word is replaced alike in what the role said and in the action.
    told = recalled(memory, corrupted(3), (asked, ROLES[0])).record
    for action in actions:
        assert f"it is {action.split()[3].strip('.,')}" in told.text


def test_corrupt_without_other_episodes_is_refused(memory):  # noqa: F811
    memory.bank.delete(everything=True)
    memory.bank.add(acting(trajectory("the password of the barn", {"assistant": "lone"}), "It is lone."))
    with pytest.raises(BankError, match=r"corrupt needs episodes of other tasks .* have none for 'lone'; collect more"):
        recall_one(ControlMemory(TextMemory(memory.bank), corrupted(3)), SUMS[4], ROLES[0])


@pytest.mark.parametrize("name", CHANGING)
def test_a_changed_recall_depends_on_seed_task_and_role_alone(either, name):
    control = ControlMemory(either, CHANGING[name])
    many = control.recall_many(QUERIES)
    for query, recall in zip(QUERIES, many, strict=True):
        assert recall_one(control, *query).record == recall.record
    assert control.kind == either.kind


def test_zero_latents_are_zero_and_as_many(memory):  # noqa: F811
    given = recalled(memory, zero_latents())
    assert given.latents.shape == (3, 32)
    assert not given.latents.any()
    assert (given.record.text, given.record.sources, given.record.num_latents) == ("", (), 3)


def test_another_task_is_of_the_same_domain_where_there_is_one():
    tasks = [Task(id=str(i), domain="a" if i < 3 else "b", text=f"t{i}") for i in range(4)]
    for seed in range(6):
        another = another_of(tasks, seed)
        assert {another(task).domain for task in tasks[:3]} == {"a"}
        assert all(another(task).key != task.key for task in tasks)
        assert another(tasks[3]).domain == "a"


def test_any_memory_can_be_asked_about_another_task(either):
    class Echo(NoMemory):
        kind = "echo"

        def recall_many(self, queries):
            return Recalls([task.id for task, _ in queries])

    tasks = [Task(id=str(i), domain="a", text=f"t{i}") for i in range(2)]
    other = of_other_tasks(Echo(), another_of(tasks, 0))
    assert isinstance(other, OtherTasksMemory)
    assert (other.kind, *other.recall_many([(tasks[0], ROLES[0]), (tasks[1], ROLES[0])])) == ("echo", "1", "0")
    assert isinstance(of_other_tasks(either, another_of(SUMS, 0)), ControlMemory)
