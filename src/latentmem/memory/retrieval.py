"""Retrieval for memories: the nearest trajectories of a bank, or the best rated among twice as many.

There are two stages. The similarity of task texts finds candidates, quickly among any number. A rating, if one is
given, chooses among them. Both depend on the task alone, so each is asked once per task, whatever its roles and
rollouts.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from latentmem.bank import ExperienceBank
from latentmem.memory.memory import Spent
from latentmem.trajectory import Task, Trajectory


class Rate(Protocol):
    """A function that rates past episodes for tasks."""

    @property
    def spent(self) -> Spent:
        """The cost of rating so far."""

    def __call__(self, pairs: Sequence[tuple[Task, Trajectory]]) -> list[float]:
        """Return how useful each episode is for its task; more is better."""


def retrieve(
    bank: ExperienceBank, tasks: Sequence[Task], k: int, success: bool | None = None, rate: Rate | None = None
) -> dict[str, list[Trajectory]]:
    """Return at most k trajectories for each task, best first, by the task's key; never one of the task itself.

    Args:
        bank: searched once.
        tasks: a task given twice counts once.
        k: number of trajectories per task.
        success: take only successes (True) or failures (False); None takes both.
        rate: chooses k among the 2k nearest, the nearer one on ties; None keeps the k nearest.
    """
    asked = list({task.key: task for task in tasks}.values())
    hits = bank.search_many(asked, k=k if rate is None else 2 * k, success=success)
    found = {task.key: [hit.trajectory for hit in result] for task, result in zip(asked, hits, strict=True)}
    return found if rate is None else best_rated(rate, asked, found, k)


def best_rated(
    rate: Rate, tasks: Sequence[Task], candidates: Mapping[str, Sequence[Trajectory]], k: int
) -> dict[str, list[Trajectory]]:
    """Return at most k of each task's candidates, best rated first, ties in their order; by the task's key.

    Args:
        rate: called once.
        tasks: each given once.
        candidates: the candidates of each task, by its key.
        k: number of trajectories per task.
    """
    ratings = iter(rate([(task, trajectory) for task in tasks for trajectory in candidates[task.key]]))
    best = {}
    for task in tasks:
        rated = [(next(ratings), trajectory) for trajectory in candidates[task.key]]
        best[task.key] = [trajectory for _, trajectory in sorted(rated, key=lambda pair: -pair[0])[:k]]
    return best
