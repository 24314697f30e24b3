"""The seam between a team and the rollout: who is asked what, and what the team does in the end.

A team plays one turn as a generator: it yields calls that do not depend on each other and is sent their responses,
until it returns its action. The rollout advances many such turns in step, so that all agents at one depth, over all
episodes, are one batch of the model. What the team wants remembered of a turn goes with its action, into the step.
"""

import hashlib
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import JsonValue

from latentmem.templates import fill
from latentmem.trajectory import Role, Step, Task

PAST = "Turn {number}\nWe answered: {action}\nReply: {observation}"
"""How an earlier turn of the episode is told, unless the team's file says otherwise."""
PAST_FIELDS = ("number", "action", "observation")


@dataclass(frozen=True)
class Call:
    """One agent's prompt, to be answered."""

    role: Role
    system: str
    user: str
    reads: tuple[int, ...] = ()
    """Which earlier responses of this turn the prompt quotes, counted in the order they were asked for."""


@dataclass(frozen=True)
class Action:
    """What a team does, with its own record of how it came about."""

    text: str
    record: Mapping[str, JsonValue] = field(default_factory=dict)
    """Kept as `Step.info["team"]`; `evaluate` reports the means of its numbers."""


Turn = Generator[list[Call], list[str], str | Action]
"""Yields calls, is sent one response for each, returns the team's action; a plain text is one without a record."""


class Team(Protocol):
    """A team of agents; it keeps no state between turns."""

    @property
    def name(self) -> str:
        """Written into the trajectories."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """Its members."""

    def turn(self, task: str, instructions: str, history: Sequence[Step]) -> Turn:
        """Play one turn.

        Args:
            task: the task's text.
            instructions: how an answer has to look, from the environment.
            history: the steps of this episode so far.
        """


@dataclass(frozen=True)
class Teams:
    """Several teams that share the work: each task is dealt to one of them, always to the same."""

    teams: tuple[Team, ...]
    seed: int

    def of(self, task: Task) -> Team:
        """Who plays this task, in all its rollouts: they are compared with each other."""
        digest = hashlib.sha256(f"{self.seed} {task.key}".encode("utf-8", "surrogatepass")).digest()
        return self.teams[int.from_bytes(digest[:8]) % len(self.teams)]


def teams_of(team: Team | Teams) -> tuple[Team, ...]:
    """All who play."""
    return team.teams if isinstance(team, Teams) else (team,)


def render(template: str, fields: Mapping[str, str]) -> str:
    """The prompt; where a field is empty no run of blank lines is left, and blank lines inside a field stay."""
    kept = fill(template, **{name: "" for name, text in fields.items() if not text})
    return fill(re.sub(r"\n\s*\n", "\n\n", kept), **fields).strip()


def describe_history(history: Sequence[Step], template: str = PAST) -> str:
    """Earlier turns of this episode as text; empty in the first turn."""
    turns = [
        fill(template, number=str(i), action=s.action.strip(), observation=s.observation.strip())
        for i, s in enumerate(history, 1)
    ]
    return "\n\n".join(turns)
