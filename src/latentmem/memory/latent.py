"""Latent memory: the nearest trajectories, composed into K latents for each role of each task."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from latentmem.bank import ExperienceBank
from latentmem.config import BankSection
from latentmem.memory.composer import Composer
from latentmem.memory.memory import Recall, Recalls, Spent
from latentmem.memory.retrieval import Rate, retrieve
from latentmem.trajectory import Recalled, Role, Task, Trajectory

DEFAULTS = BankSection()


class LatentMemory:
    """A memory that searches a bank and composes latents from what is found."""

    kind = "latent"

    def __init__(
        self,
        bank: ExperienceBank,
        composer: Composer,
        num_retrieved: int = DEFAULTS.num_retrieved,
        only_successes: bool = DEFAULTS.only_successes,
        batch_size: int = 8,
        rate: Rate | None = None,
    ) -> None:
        self.bank = bank
        self.composer = composer
        self.num_retrieved = num_retrieved
        self.success = True if only_successes else None
        self.batch_size = batch_size
        self.rate = rate
        self._composing = Spent()

    @property
    def spent(self) -> Spent:
        """The cost of recalling so far."""
        return self._composing if self.rate is None else self._composing + self.rate.spent

    def retrieved(self, tasks: Sequence[Task]) -> dict[str, list[Trajectory]]:
        """Return the trajectories to compose from, best first, by the task's key; never one of the task itself."""
        return retrieve(self.bank, tasks, self.num_retrieved, self.success, self.rate)

    def records(self, queries: Sequence[tuple[Task, Role]]) -> list[Recalled]:
        """Return what would be composed from for each query, the composer's text and its sources, without composing."""
        found = self.retrieved([task for task, _ in queries])
        return [self.record(task, role, found[task.key]) for task, role in queries]

    def record(self, task: Task, role: Role, trajectories: Sequence[Trajectory]) -> Recalled:
        """Return the record of one role at one task, composed from these trajectories."""
        return Recalled(
            kind=self.kind,
            text=self.composer.prompt(task, role, trajectories),
            sources=tuple(trajectory.id for trajectory in trajectories),
            num_latents=self.composer.num_latents,
        )

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> Recalls:
        """Search once, then compose in batches, shortest texts together."""
        before = self.spent
        recalls = self.recall_from(queries, self.retrieved([task for task, _ in queries]))
        return Recalls(recalls, self.spent - before)

    def recall_from(
        self, queries: Sequence[tuple[Task, Role]], found: Mapping[str, Sequence[Trajectory]]
    ) -> list[Recall]:
        """Compose latents for each query from the given trajectories of its task, by the task's key."""
        return self.compose([self.record(task, role, found[task.key]) for task, role in queries])

    @torch.no_grad()
    def compose(self, records: Sequence[Recalled]) -> list[Recall]:
        """Compose the latents of each record in batches, shortest texts together; equal texts are composed once."""
        began = time.perf_counter()
        texts = sorted(dict.fromkeys(record.text for record in records), key=len)
        composed: dict[str, Tensor] = {}
        num_tokens = 0
        for start in range(0, len(texts), self.batch_size):
            batch = texts[start : start + self.batch_size]
            num_tokens += sum(len(self.composer.backbone.encode(text)) for text in batch)
            composed |= zip(batch, self.composer.compose(batch), strict=True)
        if self.composer.query_latents.is_cuda:
            torch.cuda.synchronize()  # once per rollout; else the composer's time would count as the agents'
        self._composing += Spent(prompt_tokens=num_tokens, composing_seconds=time.perf_counter() - began)
        return [Recall(record, composed[record.text]) for record in records]

    def add(self, trajectory: Trajectory) -> None:
        """Store the trajectory in the bank."""
        self.bank.add(trajectory)
