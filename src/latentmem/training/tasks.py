"""Which tasks are trained on, in which order, and which are set aside to select a checkpoint by."""

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

from latentmem.config import OptimizerFields
from latentmem.environments.environment import Split
from latentmem.errors import ConfigError
from latentmem.seeds import stream_seed
from latentmem.trajectory import Task

T = TypeVar("T")


class Passes(Generic[T]):
    """Endless seeded passes over items, each pass in its own order; a position is all their state."""

    def __init__(self, items: Sequence[T], seed: int) -> None:
        self.items = items
        self.seed = seed

    def take(self, position: int, count: int) -> tuple[list[T], int]:
        """Return `count` different items from a position on (all, if there are fewer), and the position after them.

        If a pass ends during a take, items of the next pass that the take already holds are skipped.
        """
        order: list[int] = []
        chosen: list[int] = []
        while len(chosen) < min(count, len(self.items)):
            epoch, offset = divmod(position, len(self.items))
            if not order or offset == 0:
                generator = torch.Generator().manual_seed(stream_seed(self.seed, "epoch", epoch) >> 1)
                order = torch.randperm(len(self.items), generator=generator).tolist()
            if order[offset] not in chosen:
                chosen.append(order[offset])
            position += 1
        return [self.items[i] for i in chosen], position


def last_tasks(tasks: Sequence[Task], count: int, key: str, split: Split) -> list[Task]:
    """Return the last tasks of a split, which are set aside.

    Args:
        tasks: the split.
        count: number of tasks to set aside.
        key: the configuration key of the count, for the error.
        split: the split's name, for the error.

    Raises:
        ConfigError: no task would be left.
    """
    if count >= len(tasks):
        raise ConfigError(
            f"{key} is {count}, but the {split} split has {len(tasks)} tasks; "
            "set it lower, so that some are left to train on"
        )
    return list(tasks[len(tasks) - count :])


def tasks_aside(train: Sequence[Task], dev: Sequence[Task], settings: OptimizerFields, phase: str) -> list[Task]:
    """Return tasks for selecting checkpoints: the first of the dev split, or the last train tasks if there is none.

    Args:
        train: the train split.
        dev: the dev split.
        settings: say how many, and whether checkpoints are evaluated at all.
        phase: the section's name, for the error.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    count = settings.eval_tasks if settings.eval_every else 0
    return list(dev[:count]) if dev else last_tasks(train, count, f"{phase}.eval_tasks", "train")


def without(tasks: Sequence[Task], others: Sequence[Task]) -> list[Task]:
    """Return the tasks that are not among the others."""
    keys = {task.key for task in others}
    return [task for task in tasks if task.key not in keys]
