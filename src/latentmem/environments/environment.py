"""What the world of one episode offers a team: it gives instructions, takes actions and returns outcomes.

An environment serves one episode and is then thrown away. It knows tasks and rewards, and nothing of memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from pydantic import JsonValue

from latentmem.trajectory import Task

Split = Literal["experience", "train", "dev", "test"]
"""The purposes of tasks. `experience` fills the bank and is neither trained on nor evaluated; `dev` is for choosing
settings and checkpoints. Most domains have neither; then the train split is collected, and its last tasks set aside.
"""


@dataclass(frozen=True)
class Outcome:
    """The result of an action."""

    observation: str
    """The environment's reply, shown to the team in its next turn; empty if there is nothing to say."""
    reward: float
    """A number in [0, 1]; it counts when `done`."""
    done: bool
    info: dict[str, JsonValue] = field(default_factory=dict)
    """Recorded with the step. `extracted` is the answer read from the action, None if none was found."""


class Environment(Protocol):
    """One episode on one task."""

    @property
    def instructions(self) -> str:
        """How an answer has to look in this domain; teams place it into their prompts."""

    def step(self, action: str) -> Outcome:
        """Take the team's action and return the outcome; called again until an outcome is `done`."""


@runtime_checkable
class Listener(Protocol):
    """An environment that judges what the members of a team said, not only the team's action."""

    def hear(self, said: Mapping[str, str]) -> None:
        """Receive the last response of each role in this turn, by the role's name. Called before each `step`."""


@runtime_checkable
class Demonstrator(Protocol):
    """A domain that can say what the members of a team should say."""

    def demonstrations(self, task: Task) -> Mapping[str, str]:
        """Return the right response of each role, by its name; the empty name stands for every role not named."""


class Domain(Protocol):
    """A source of tasks, and of the environments in which they are played."""

    @property
    def name(self) -> str:
        """The `domain` of its tasks."""

    def tasks(self, split: Split) -> list[Task]:
        """Return all tasks of a split, in a fixed order; no task is in two splits. Empty if the domain lacks the split.

        Raises:
            DataError: a row cannot be used, or there are no rows.
        """

    def skipped(self, split: Split) -> dict[str, int]:
        """Count the unusable rows of a split that were left out, by reason; empty if tasks are generated."""

    def start(self, task: Task) -> Environment:
        """Make a fresh environment for one episode on this task."""
