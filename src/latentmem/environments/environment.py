"""What the world of one episode looks like to a team: it gives instructions, takes actions, returns outcomes.

An environment serves one episode and is thrown away; it knows tasks and rewards and has never heard of memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from pydantic import JsonValue

from latentmem.trajectory import Task

Split = Literal["experience", "train", "dev", "test"]
"""What tasks are for. `experience` is played into the bank, and neither trained on nor asked; `dev` is for choosing
settings and checkpoints. Most domains have neither: then the train split is collected and its last tasks are set aside.
"""


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


@runtime_checkable
class Listener(Protocol):
    """An environment that judges what the members of a team said, and not the team's action alone."""

    def hear(self, said: Mapping[str, str]) -> None:
        """Take the last response of each role in this turn, by the role's name. Called before each `step`."""


@runtime_checkable
class Demonstrator(Protocol):
    """A domain that can say what the members of a team should say."""

    def demonstrations(self, task: Task) -> Mapping[str, str]:
        """The right response of each role, by its name; the empty name stands for every role that is not named."""


class Domain(Protocol):
    """A source of tasks, and of the environments that they are played in."""

    @property
    def name(self) -> str:
        """The `domain` of its tasks."""

    def tasks(self, split: Split) -> list[Task]:
        """All tasks of a split, in a fixed order; no task is in two splits. Empty where the domain has no such split.

        Raises:
            DataError: a row cannot be used, or there is none.
        """

    def skipped(self, split: Split) -> dict[str, int]:
        """Rows of a split that could not be used and were left out, counted by reason; empty where tasks are made."""

    def start(self, task: Task) -> Environment:
        """A fresh environment for one episode on this task."""
