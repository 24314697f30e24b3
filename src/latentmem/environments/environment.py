"""What the world of one episode looks like to a team: it gives instructions, takes actions, returns outcomes.

An environment serves one episode and is thrown away; it knows tasks and rewards and has never heard of memory.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

from pydantic import JsonValue

from latentmem.trajectory import Task

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Outcome:
    """What an action brought about."""

    observation: str
    """The environment's reply, shown to the team in its next turn; empty when there is nothing to say."""
    reward: float
    """In [0, 1]; counts when `done`."""
    done: bool
    info: dict[str, JsonValue] = field(default_factory=dict)
    """Recorded with the step. `extracted` is the answer read from the action, None where none could be found."""


class Environment(Protocol):
    """One episode on one task."""

    @property
    def instructions(self) -> str:
        """How an answer has to look in this domain; teams place it into their prompts."""

    def step(self, action: str) -> Outcome:
        """Take the team's action. Called again until an outcome is `done`."""


class Domain(Protocol):
    """A source of tasks, and of the environments that they are played in."""

    @property
    def name(self) -> str:
        """The `domain` of its tasks."""

    def tasks(self, split: Split) -> list[Task]:
        """All tasks of a split, in a fixed order; no task is in both splits.

        Raises:
            DataError: a row cannot be used, or there is none.
        """

    def skipped(self, split: Split) -> dict[str, int]:
        """Rows of a split that could not be used and were left out, counted by reason; empty where tasks are made."""

    def start(self, task: Task) -> Environment:
        """A fresh environment for one episode on this task."""
