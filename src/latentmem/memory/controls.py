"""Controls of a latent memory: the same number of latents at the same places, with a part of what made them taken away.

What a memory loses under a control is due to the part that is gone: its content at all (`random_latents`), that it was
composed for this role (`other_role`), or that what was retrieved belongs to this task (`other_task`).
"""

from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor

from latentmem.errors import ConfigError
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import Recall, charge
from latentmem.memory.retrieval import retrieve
from latentmem.models.language_model import stream_seed
from latentmem.trajectory import Recalled, Role, Task, Trajectory

Replace = Callable[[LatentMemory, Sequence[tuple[Task, Role]]], list[Recall]]
"""What is recalled for some tasks and roles, in the place of what the memory itself would recall."""


class ControlMemory:
    """A latent memory of which other latents are given."""

    kind = LatentMemory.kind

    def __init__(self, memory: LatentMemory, replace: Replace) -> None:
        self.memory = memory
        self.replace = replace

    @property
    def composing_seconds(self) -> float:
        """Time spent in the composer so far, which a control needs as well."""
        return self.memory.composing_seconds

    def recall(self, task: Task, role: Role) -> Recall:
        """What one role is given in place of its latents."""
        return self.recall_many([(task, role)])[0]

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> list[Recall]:
        """`recall` for several at once; the same for a query, whatever others are asked with it."""
        before = self.memory.ledger.spent()
        return charge(self.replace(self.memory, queries), self.memory.ledger.spent(since=before))

    def add(self, trajectory: Trajectory) -> None:
        """Store the trajectory in the bank."""
        self.memory.add(trajectory)


def random_latents(seed: int) -> Replace:
    """Vectors of random direction, each as long as the one that it replaces; nothing of the composer's text is left."""

    def replace(memory: LatentMemory, queries: Sequence[tuple[Task, Role]]) -> list[Recall]:
        recalls = []
        for (task, role), recall in zip(queries, memory.recall_many(queries), strict=True):
            assert recall.latents is not None
            record = Recalled(kind=memory.kind, num_latents=recall.record.num_latents)
            recalls.append(Recall(record, _turned(recall.latents, stream_seed(seed, task.key, role.name))))
        return recalls

    return replace


def other_role(roles: Sequence[Role]) -> Replace:
    """What the next role of the team would be given at the same task; the last one gets what is the first one's.

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


def other_task(tasks: Sequence[Task], seed: int) -> Replace:
    """Composed for the task and role at hand, but from what is retrieved for a random other one of `tasks`.

    Raises:
        ConfigError: there is no other task.
    """
    if len({task.key for task in tasks}) < 2:
        raise ConfigError(
            "evaluate.memories: the control other-task needs two tasks or more, but the test split has one; "
            "leave it out"
        )

    def another(task: Task) -> Task:
        random = Random(stream_seed(seed, task.key))  # noqa: S311 - a draw, not a secret
        while (drawn := random.choice(tasks)).same_as(task):
            pass
        return drawn

    def replace(memory: LatentMemory, queries: Sequence[tuple[Task, Role]]) -> list[Recall]:
        others = {task.key: another(task) for task, _ in queries}
        found = retrieve(memory.bank, list(others.values()), memory.num_retrieved, memory.success, memory.rate)
        records = []
        for task, role in queries:
            # What is near to the other task may belong to this one.
            trajectories = [t for t in found[others[task.key].key] if not t.task.same_as(task)]
            records.append(memory.record(task, role, trajectories))
        return memory.compose(records)

    return replace


def _turned(latents: Tensor, seed: int) -> Tensor:
    """Latents [K, d] of random directions and the same lengths."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    directions = (noise / noise.norm(dim=1, keepdim=True)).to(latents)
    turned: Tensor = directions * latents.norm(dim=1, keepdim=True)
    return turned
