"""What a memory is made from: the nearest trajectories of a bank, or the best rated among twice as many.

Two stages: similarity of task texts finds candidates, quickly among any number; a rating, if one is given, chooses
among them. Both look at the task alone, so each is asked once for a task, whatever its roles and rollouts.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from latentmem.bank import ExperienceBank
from latentmem.memory.memory import Spent
from latentmem.trajectory import Task, Trajectory


class Rate(Protocol):
    """What rates past episodes for a task."""

    @property
    def spent(self) -> Spent:
        """What rating has taken so far."""

    def __call__(self, pairs: Sequence[tuple[Task, Trajectory]]) -> list[float]:
        """How useful each episode is for its task; more is better."""


def retrieve(
    bank: ExperienceBank, tasks: Sequence[Task], k: int, success: bool | None = None, rate: Rate | None = None
) -> dict[str, list[Trajectory]]:
    """At most k trajectories for each task, best first, by the task's key; never one of the task itself.

    Args:
        bank: searched once.
        tasks: a task named twice counts once.
        k: trajectories for each task.
        success: only those that succeeded, or failed; None takes both.
        rate: chooses k among the 2k nearest, the nearer one where ratings are equal; None keeps the k nearest.
    """
    asked = list({task.key: task for task in tasks}.values())
    hits = bank.search_many(asked, k=k if rate is None else 2 * k, success=success)
    found = {task.key: [hit.trajectory for hit in result] for task, result in zip(asked, hits, strict=True)}
    return found if rate is None else best_rated(rate, asked, found, k)


def best_rated(
    rate: Rate, tasks: Sequence[Task], candidates: Mapping[str, Sequence[Trajectory]], k: int
) -> dict[str, list[Trajectory]]:
    """At most k of each task's candidates, best rated first, in their order where equal; by the task's key.

    Args:
        rate: asked once.
        tasks: no task twice.
        candidates: of each task, by its key.
        k: trajectories for each task.
    """
    ratings = iter(rate([(task, trajectory) for task in tasks for trajectory in candidates[task.key]]))
    best = {}
    for task in tasks:
        rated = [(next(ratings), trajectory) for trajectory in candidates[task.key]]
        best[task.key] = [trajectory for _, trajectory in sorted(rated, key=lambda pair: -pair[0])[:k]]
    return best
