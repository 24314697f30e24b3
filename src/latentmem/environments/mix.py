"""Several domains as one: a team learns from a mix of benchmarks, and may be evaluated on one outside the mix.

A task is played in its own domain, by that domain's rules and within its number of turns. What is evaluated on is never
learned from: a train task that has the key or the exact text of a test task is left out.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

from latentmem.environments.environment import Domain, Environment, Listener, Outcome, Split
from latentmem.errors import DataError
from latentmem.trajectory import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A domain in a mix."""

    domain: Domain
    max_turns: int
    """Most turns of an episode on one of its tasks."""


class MixDomain:
    """The train splits of some domains, and the test splits of the same or other domains."""

    name = "mix"

    def __init__(self, train: Sequence[Part], test: Sequence[Part]) -> None:
        everything = (*train, *test)
        self._parts: dict[Split, tuple[Part, ...]] = {
            "experience": everything,
            "train": tuple(train),
            "dev": everything,
            "test": tuple(test),
        }

    def tasks(self, split: Split) -> list[Task]:
        """Return the tasks of a split.

        Train: the tasks of the train parts, in a fixed shuffled order. Test: those of the test parts, part after part.
        Experience and dev: those of all parts that have such a split, even parts only evaluated on, without test tasks.

        Raises:
            DataError: a row of a part cannot be used.
        """
        return [task for task, _ in self._tasks[split]]

    def skipped(self, split: Split) -> dict[str, int]:
        """Count the rows that the parts left out, by reason."""
        counts: Counter[str] = Counter()
        for part in self._parts[split]:
            counts.update(part.domain.skipped(split))
        return dict(counts)

    def start(self, task: Task) -> Environment:
        """Make a fresh environment of the domain that the task came from.

        Raises:
            DataError: no domain of the mix has this task.
        """
        if task.key not in self._origins:
            raise DataError(f"task {task.key}: belongs to none of the mixed benchmarks")
        part = self._origins[task.key]
        return _Bounded(part.domain.start(task), part.max_turns)

    @cached_property
    def _origins(self) -> dict[str, Part]:
        return {task.key: part for pairs in self._tasks.values() for task, part in pairs}

    @cached_property
    def _tasks(self) -> dict[Split, list[tuple[Task, Part]]]:
        test = [(task, part) for part in self._parts["test"] for task in part.domain.tasks("test")]
        train = [(task, part) for part in self._parts["train"] for task in part.domain.tasks("train")]
        keys, texts = {task.key for task, _ in test}, {task.text for task, _ in test}
        kept = [(task, part) for task, part in train if task.key not in keys and task.text not in texts]
        if len(kept) < len(train):
            logger.warning("%d train tasks of the mix are test tasks too and were left out", len(train) - len(kept))
        once = list({task.key: (task, part) for task, part in kept}.values())
        Random("mix").shuffle(once)  # noqa: S311  # an order, not a secret
        return {
            "experience": self._of_all("experience", keys),
            "train": once,
            "dev": self._of_all("dev", keys),
            "test": test,
        }

    def _of_all(self, split: Split, without: set[str]) -> list[tuple[Task, Part]]:
        pairs = [(task, part) for part in self._parts[split] for task in part.domain.tasks(split)]
        return list({task.key: (task, part) for task, part in pairs if task.key not in without}.values())


class _Bounded:
    """An environment whose episode ends after its own number of turns, even if other parts of the mix allow more."""

    def __init__(self, environment: Environment, max_turns: int) -> None:
        self._environment = environment
        self._turns_left = max_turns

    @property
    def instructions(self) -> str:
        return self._environment.instructions

    def hear(self, said: Mapping[str, str]) -> None:
        if isinstance(self._environment, Listener):
            self._environment.hear(said)

    def step(self, action: str) -> Outcome:
        outcome = self._environment.step(action)
        self._turns_left -= 1
        return replace(outcome, done=outcome.done or self._turns_left == 0)
