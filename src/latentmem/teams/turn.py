"""The interface between a team and the rollout: who is asked what, and what the team does in the end.

A team plays one turn as a generator. It yields calls that do not depend on each other, is sent their responses, and so
on until it returns its action. The rollout advances many such turns in step, so that all agents at one depth, over all
episodes, are one batch of the model. What the team wants recorded of a turn goes with its action into the step.
"""

import hashlib
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pydantic import JsonValue

from latentmem.templates import fill
from latentmem.trajectory import Conversation, Message, Role, Step, Task

if TYPE_CHECKING:
    from latentmem.models.agent import Sampled

PAST = "Turn {number}\nWe answered: {action}\nReply: {observation}"
"""How an earlier turn of the episode is told, unless the team's file says otherwise."""
PAST_FIELDS = ("number", "action", "observation")


@dataclass(frozen=True)
class Call:
    """One agent's prompt, waiting for a response."""

    role: Role
    system: str
    user: str
    reads: tuple[int, ...] = ()
    """The earlier responses of this turn that the prompt quotes, numbered in the order they were asked for."""
    served: "ServedCall | None" = None
    """What a program asked for over HTTP; `system` and `user` then only show its chat."""


@dataclass(frozen=True)
class ServedCall:
    """One request of a program, and what is to be done with it."""

    call: str
    """Id of its answer."""
    conversation: Conversation
    lineage: str
    number: int = 0
    """Which request of its lineage it is, from 0."""
    choice: int = 0
    """Which of the responses to one request, from 0."""
    limit: int | None = None
    """Longest response in tokens, if the program sets one."""
    stop: tuple[str, ...] = ()
    """Texts that end the response."""
    on_tokens: Callable[[Sequence[int]], bool] | None = None
    """See `Prompt.on_tokens`."""
    on_sampled: "Callable[[Sampled], object] | None" = None
    """Called with what was sampled; it has counts that no message keeps."""


@dataclass(frozen=True)
class Action:
    """What a team does, with its own record of how it decided."""

    text: str
    record: Mapping[str, JsonValue] = field(default_factory=dict)
    """Kept as `Step.info["team"]`; `evaluate` reports the means of its numbers."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Rewards of single roles, by name, from 0 to 1, if a program tells any; see `Trajectory.rewards`."""


Turn = Generator[list[Call], list[str], str | Action]
"""A generator that yields calls, is sent one response per call, and returns the action (a text: without a record)."""


class Team(Protocol):
    """A team of agents; it keeps no state between turns."""

    @property
    def name(self) -> str:
        """The team's name, as written into the trajectories."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The team's members."""

    def turn(self, task: str, instructions: str, history: Sequence[Step]) -> Turn:
        """Play one turn.

        Args:
            task: the task's text.
            instructions: the form an answer must have, from the environment.
            history: the steps of this episode so far.
        """


Speak = Callable[[Sequence[Call]], list[Message]]
"""A function that lets agents speak now, from any thread: calls -> their messages, in the order of the calls."""


class ProgramFailed(Exception):  # noqa: N818 - it ends an episode, and is no fault of ours
    """A program that gave no action; its text says why, and becomes the trajectory's `error`."""


@runtime_checkable
class Program(Protocol):
    """A team with a control flow of its own: it runs by itself and lets its agents speak when it wants."""

    @property
    def name(self) -> str:
        """The team's name, as written into the trajectories."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The members that are known beforehand; others may speak too."""

    @property
    def parallel(self) -> int:
        """The number of episodes that may be played at the same time."""

    def play(self, task: Task, instructions: str, seed: int, speak: Speak) -> Action:
        """Play a whole episode and return the action.

        Raises:
            ProgramFailed: the program gave no action. So does any other exception that is no `LatentMemError`: the
                cause is written into the trajectory, and the episode has reward 0.
        """

    def stop(self) -> None:
        """End the episodes that are being played: each `play` raises soon. Called from another thread."""


Player = Team | Program
"""One team, whichever way it plays."""


@dataclass(frozen=True)
class Teams:
    """Several teams that share the work: each task goes to one of them, always to the same one."""

    teams: tuple[Player, ...]
    seed: int

    def of(self, task: Task) -> Player:
        """Return the team that plays this task, in all its rollouts, since those are compared with each other."""
        digest = hashlib.sha256(f"{self.seed} {task.key}".encode("utf-8", "surrogatepass")).digest()
        return self.teams[int.from_bytes(digest[:8]) % len(self.teams)]


Players = Player | Teams
"""Who plays the tasks."""


def teams_of(players: Players) -> tuple[Player, ...]:
    """Return all teams that play."""
    return players.teams if isinstance(players, Teams) else (players,)


def render(template: str, fields: Mapping[str, str]) -> str:
    """Fill a prompt; an empty field leaves no run of blank lines, and blank lines inside a field stay."""
    kept = fill(template, **{name: "" for name, text in fields.items() if not text})
    return fill(re.sub(r"\n\s*\n", "\n\n", kept), **fields).strip()


def describe_history(history: Sequence[Step], template: str = PAST) -> str:
    """Write the earlier turns of this episode as text; it is empty in the first turn."""
    turns = [
        fill(template, number=str(i), action=s.action.strip(), observation=s.observation.strip())
        for i, s in enumerate(history, 1)
    ]
    return "\n\n".join(turns)
