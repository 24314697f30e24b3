"""Controls: memories from which one part of what they give is taken away.

What a memory loses under a control is due to the missing part. Most controls change what was retrieved and let the
memory use it as usual (`empty`, `shuffled`, `irrelevant`, `corrupted`, `filler`). So they work for latent and for text
memories alike, through one interface, `Retrieving`; their names are those of a protocol that tests whether agents are
faithful to their experience (arXiv 2601.22436). The other controls exist for latents only (`other_role`,
`random_latents`, `zero_latents`). Each depends on a seed, the task and the role alone, never on other queries.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as with_fields
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from latentmem.bank import ExperienceBank
from latentmem.errors import BankError, ConfigError
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import Memory, Recall, Recalls, Spent
from latentmem.memory.text import TextMemory
from latentmem.seeds import stream_seed
from latentmem.trajectory import Recalled, Role, Task, Trajectory

POOL = 64
"""Number of episodes of the bank from which `corrupted` takes its replacement words."""

_WORD = re.compile(r"[^\W_]+")
_SMALL = """a an the this that these those it its i you he she we they my your his her our their me him us them is are
was were be been am do does did have has had will would can could should may might must not no and or but if then so as
at by for from in into of off on onto out over to up with about after before than there here what which who when where
how why"""
_FUNCTION_WORDS = frozenset(_SMALL.split())
"""Words that say nothing by themselves; `corrupted` keeps them."""


class Retrieving(Memory, Protocol):
    """A memory that finds trajectories for a task and makes its recalls from them."""

    @property
    def bank(self) -> ExperienceBank:
        """The bank that is searched."""

    @property
    def spent(self) -> Spent:
        """The cost of recalling so far."""

    def retrieved(self, tasks: Sequence[Task]) -> dict[str, list[Trajectory]]:
        """Return the trajectories found for each task, by the task's key."""

    def recall_from(
        self, queries: Sequence[tuple[Task, Role]], found: Mapping[str, Sequence[Trajectory]]
    ) -> list[Recall]:
        """Return the recall of each query, given what was found for each task, by the task's key."""


Replace = Callable[[Retrieving, Sequence[tuple[Task, Role]]], Sequence[Recall]]
"""A function of a memory and queries that returns what to recall in place of the memory's own recalls."""

Another = Callable[[Task], Task]
"""A function that returns another task to use in place of the given one."""


class ControlMemory:
    """A memory whose recalls are replaced by something else."""

    def __init__(self, memory: Retrieving, replace: Replace) -> None:
        self.memory = memory
        self.replace = replace

    @property
    def kind(self) -> str:
        """The memory's kind."""
        return self.memory.kind

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> Recalls:
        """Return what each role is given in place of the memory's own recall."""
        before = self.memory.spent
        return Recalls(self.replace(self.memory, queries), self.memory.spent - before)

    def add(self, trajectory: Trajectory) -> None:
        """Store the trajectory in the bank."""
        self.memory.add(trajectory)


class OtherTasksMemory:
    """Any memory, asked about another task: the control `irrelevant` for memories without the parts of `Retrieving`."""

    def __init__(self, memory: Memory, another: Another) -> None:
        self.memory = memory
        self.another = another

    @property
    def kind(self) -> str:
        """The memory's kind."""
        return self.memory.kind

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> Recalls:
        """Return what each role would be given at the other task."""
        return self.memory.recall_many([(self.another(task), role) for task, role in queries])

    def add(self, trajectory: Trajectory) -> None:
        """Let the memory learn from the episode."""
        self.memory.add(trajectory)


def of_other_tasks(memory: Memory, another: Another) -> Memory:
    """Put a memory of any kind under the control `irrelevant`."""
    if isinstance(memory, LatentMemory | TextMemory):
        return ControlMemory(memory, irrelevant(another))
    return OtherTasksMemory(memory, another)


def another_of(tasks: Sequence[Task], seed: int) -> Another:
    """Return a function that draws another of the tasks for each task, of the same domain if that has another.

    Raises:
        ConfigError: there is no other task.
    """
    if all(task.same_as(tasks[0]) for task in tasks):
        raise ConfigError(
            "evaluate.memories: the control irrelevant needs two tasks or more, but the test split has one; "
            "leave it out"
        )

    def another(task: Task) -> Task:
        others = [other for other in tasks if not other.same_as(task)]
        near = [other for other in others if other.domain == task.domain]
        return Random(stream_seed(seed, task.key)).choice(near or others)  # noqa: S311 - a draw, not a secret

    return another


# Controls that change what was retrieved


def irrelevant(another: Another) -> Replace:
    """Make the control that recalls for the task and role at hand, from what is retrieved for another task."""

    def replace(memory: Retrieving, queries: Sequence[tuple[Task, Role]]) -> Sequence[Recall]:
        others = {task.key: (task, another(task)) for task, _ in queries}
        found = memory.retrieved([other for _, other in others.values()])
        # A trajectory near the other task may belong to this task.
        fitting = {
            key: [trajectory for trajectory in found[other.key] if not trajectory.task.same_as(task)]
            for key, (task, other) in others.items()
        }
        return memory.recall_from(queries, fitting)

    return replace


def empty() -> Replace:
    """Make the control that recalls for the task and role at hand, from no trajectory at all."""
    return lambda memory, queries: memory.recall_from(queries, {task.key: [] for task, _ in queries})


def shuffled(seed: int) -> Replace:
    """Make the control with the words of each retrieved action, observation and response in random order."""

    def words_of(task: Task) -> Callable[[str], str]:
        def shuffle(text: str) -> str:
            words = text.split()
            Random(stream_seed(seed, task.key, text)).shuffle(words)  # noqa: S311 - equal texts are shuffled alike
            return " ".join(words)

        return shuffle

    return lambda memory, queries: _from_altered(memory, queries, words_of)


def corrupted(seed: int) -> Replace:
    """Make the control with each content word replaced by a random one from other episodes of the bank.

    A word has the same replacement throughout a task's recalls, so what is told stays consistent, but is wrong.
    """

    def replace(memory: Retrieving, queries: Sequence[tuple[Task, Role]]) -> list[Recall]:
        ids = memory.bank.ids()
        episodes = memory.bank.get(Random(seed).sample(ids, min(POOL, len(ids))))  # noqa: S311 - a draw, not a secret

        def words_of(task: Task) -> Callable[[str], str]:
            others = [episode for episode in episodes if not episode.task.same_as(task)]
            pool = sorted({word for episode in others for text in _texts(episode) for word in _content(text)})
            different = {word.lower() for word in pool}

            def another_word(match: re.Match[str]) -> str:
                word = match.group().lower()
                if word in _FUNCTION_WORDS:
                    return match.group()
                if different <= {word}:
                    raise BankError(
                        f"{memory.bank.path}: the control corrupt needs episodes of other tasks to take words from, "
                        f"but the {len(episodes)} that it drew have none for {word!r}; collect more, or leave it out"
                    )
                random = Random(stream_seed(seed, task.key, word))  # noqa: S311 - a draw, not a secret
                while (drawn := random.choice(pool)).lower() == word:
                    pass
                return drawn

            return lambda text: _WORD.sub(another_word, text)

        return _from_altered(memory, queries, words_of)

    return replace


def filler() -> Replace:
    """Make the control with dots in place of each word in the retrieved actions, observations and responses."""
    return lambda memory, queries: _from_altered(
        memory, queries, lambda task: lambda text: " ".join("..." for _ in text.split())
    )


def _from_altered(
    memory: Retrieving, queries: Sequence[tuple[Task, Role]], words_of: Callable[[Task], Callable[[str], str]]
) -> list[Recall]:
    """Recall from retrieved trajectories with altered texts; the sources stay those of the bank."""
    tasks = {task.key: task for task, _ in queries}
    found = memory.retrieved(list(tasks.values()))
    altered = {
        key: [_altered(trajectory, words_of(tasks[key])) for trajectory in trajectories]
        for key, trajectories in found.items()
    }
    recalls = memory.recall_from(queries, altered)
    sources = {key: tuple(trajectory.id for trajectory in trajectories) for key, trajectories in found.items()}
    return [
        with_fields(recall, record=recall.record.model_copy(update={"sources": sources[task.key]}))
        for (task, _), recall in zip(queries, recalls, strict=True)
    ]


def _altered(trajectory: Trajectory, alter: Callable[[str], str]) -> Trajectory:
    """Alter all that was said and observed in a trajectory; its task and its outcome stay."""
    steps = tuple(
        step.model_copy(
            update={
                "action": alter(step.action),
                "observation": alter(step.observation),
                "messages": tuple(m.model_copy(update={"response": alter(m.response)}) for m in step.messages),
            }
        )
        for step in trajectory.steps
    )
    return trajectory.model_copy(update={"steps": steps})


def _texts(trajectory: Trajectory) -> list[str]:
    """Return all that was said and observed."""
    said = [message.response for message in trajectory.messages]
    return said + [text for step in trajectory.steps for text in (step.action, step.observation)]


def _content(text: str) -> list[str]:
    return [word for word in _WORD.findall(text) if word.lower() not in _FUNCTION_WORDS]


# Controls that change the latents


def other_role(roles: Sequence[Role]) -> Replace:
    """Make the control that gives each role the recall of the next role at the same task; the last gets the first's.

    Raises:
        ConfigError: there is no other role.
    """
    if len(roles) < 2:
        raise ConfigError(
            "evaluate.memories: the control other-role needs a team of two roles or more, but this team has one; "
            "leave it out"
        )
    successors = {role.name: roles[(i + 1) % len(roles)] for i, role in enumerate(roles)}
    return lambda memory, queries: memory.recall_many([(task, successors[role.name]) for task, role in queries])


def random_latents(seed: int) -> Replace:
    """Make the control with vectors of random directions and the latents' lengths; nothing of the composer remains."""
    return _other_latents(
        lambda latents, task, role: _turned(latents, stream_seed(seed, task.key, role.name)),
    )


def zero_latents() -> Replace:
    """Make the control with zeros in place of the latents: agents attend to as many columns, which hold nothing."""
    return _other_latents(lambda latents, task, role: torch.zeros_like(latents))


def _other_latents(make: Callable[[Tensor, Task, Role], Tensor]) -> Replace:
    def replace(memory: Retrieving, queries: Sequence[tuple[Task, Role]]) -> list[Recall]:
        recalls = []
        for (task, role), recall in zip(queries, memory.recall_many(queries), strict=True):
            assert recall.latents is not None
            record = Recalled(kind=memory.kind, num_latents=recall.record.num_latents)
            recalls.append(Recall(record, make(recall.latents, task, role)))
        return recalls

    return replace


def _turned(latents: Tensor, seed: int) -> Tensor:
    """Return latents [K, d] of random directions and the same lengths."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    directions = (noise / noise.norm(dim=1, keepdim=True)).to(latents)
    turned: Tensor = directions * latents.norm(dim=1, keepdim=True)
    return turned
