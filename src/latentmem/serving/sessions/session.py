"""A session is one episode of a program: what is known of it, how it moves, and the trajectory that it becomes.

A session is queuing until its first call, running until it is ended, and then succeeded or failed for good. It teaches
only if it is whole: a call that was lost or cut masks it, however well it was rewarded.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from latentmem.rollout import read_by
from latentmem.serving.asks import Answer
from latentmem.trajectory import Finite, Message, Origin, Record, Step, Task, Trajectory

Mode = Literal["train", "val", "serve"]
"""Why a session is played; one of `val` never enters the bank."""
UNJUDGED = "(unjudged)"
"""The tenant under which unjudged episodes of a server without tenants are stored: nobody recalls them."""


class State(StrEnum):
    """How far a session is."""

    QUEUING = "queuing"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


MOVES: Mapping[State, frozenset[State]] = {
    State.QUEUING: frozenset({State.RUNNING, State.FAILED}),
    State.RUNNING: frozenset({State.SUCCEEDED, State.FAILED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
}
"""The moves that are allowed."""

Reward = Annotated[Finite, Field(ge=0, le=1)]


class Ending(Record):
    """How a session was ended."""

    cause: Literal["completed", "idle"]
    reward: Reward | None = None
    """The team's reward; None if nobody judged the team."""
    rewards: dict[str, Reward] = Field(default_factory=dict)
    """Rewards of single roles, by name."""
    answer: str | None = None
    """What the program made of the task; None: its last response."""
    feedback: str = ""
    """What was replied to the answer."""
    error: str | None = None
    """Why the program failed."""

    def of_those_who(self, spoke: Collection[str]) -> "Ending":
        """Return it with the rewards of the roles that spoke; another is often misspelt, and counts for nobody."""
        return self.model_copy(update={"rewards": {role: r for role, r in self.rewards.items() if role in spoke}})

    @property
    def is_judged(self) -> bool:
        """Whether anybody told a reward."""
        return self.reward is not None or bool(self.rewards)

    @property
    def team_reward(self) -> float | None:
        """The team's reward, or the mean of its roles' rewards; None if nobody told any."""
        if self.reward is None and self.rewards:
            return sum(self.rewards.values()) / len(self.rewards)
        return self.reward


@dataclass(frozen=True)
class Session:
    """What is known of a session."""

    tenant: str
    id: str
    key: str
    """Id of the API key that opened it."""
    state: State
    mode: Mode
    is_named: bool
    """Whether the program knows that it has a session; else it was made for a request that named none."""
    domain: str
    task_id: str | None
    task_text: str | None
    """None until the first call."""
    seed: int
    opened: float
    """Seconds since 1970."""
    touched: float
    """When something was last asked or told in it, in seconds since 1970."""
    shares: bool
    """Whether its judged episode goes to the common pool."""
    ending: Ending | None = None
    """How it was ended; from then on it only waits to be stored."""
    trajectory: str | None = None
    """Id of the trajectory in the bank."""
    outcome: str | None = None
    """What became of it, in words."""

    @property
    def is_over(self) -> bool:
        """Whether it takes nothing any more."""
        return self.ending is not None or not MOVES[self.state]

    @property
    def task(self) -> Task:
        """The task of the episode."""
        return Task(id=self.task_id, domain=self.domain, text=self.task_text or "")


@dataclass(frozen=True)
class Counts:
    """The calls of a session."""

    answered: int = 0
    lost: int = 0
    """Calls that got no whole answer, by the client's or the server's fault, and were not sent again."""
    running: int = 0


@dataclass(frozen=True)
class KeptCall:
    """One call of a session, as it is stored."""

    id: str
    lineage: str
    seed: int
    began: float
    """Seconds since 1970."""
    answer: Answer | None = None
    """None: it is running, or lost."""
    lost: str | None = None
    """Why it got no answer."""


@dataclass(frozen=True)
class Ended:
    """What an ended session becomes."""

    state: State
    outcome: str
    trajectory: Trajectory | None = None
    """What is put into the bank; None: nothing."""


@dataclass(frozen=True)
class Storing:
    """What decides whether and how an episode is stored."""

    team: str
    """The team's name in the trajectories."""
    model: str
    """The name of the agents' model."""
    unjudged: Literal["store", "drop"]


def end(session: Session, calls: Sequence[KeptCall], storing: Storing) -> Ended:
    """Return what an ended session becomes.

    Args:
        session: a session with an ending.
        calls: all its calls; those with an answer in the order of their answers.
        storing: what decides whether it is stored.
    """
    assert session.ending is not None
    messages = [choice.message for call in calls if call.answer is not None for choice in call.answer.choices]
    ending = session.ending.of_those_who({message.role for message in messages})
    num_lost = sum(call.answer is None for call in calls)
    if not messages:
        return Ended(State.FAILED, "not stored: no call of it was answered")
    is_judged = ending.is_judged and not num_lost
    failed = num_lost or ending.error is not None or (ending.cause == "idle" and not ending.is_judged)
    state = State.FAILED if failed else State.SUCCEEDED
    if session.mode == "val":
        return Ended(state, "not stored: its mode is val")
    missing = "only roles that said nothing were rewarded" if session.ending.is_judged else "it has no reward"
    why = f"{num_lost} of {len(calls)} calls were lost or cut" if num_lost else missing
    if not is_judged and storing.unjudged == "drop":
        return Ended(state, f"not stored: {why}")
    trajectory = _trajectory(session, ending, messages, storing, is_judged, why if num_lost else None)
    return Ended(state, "stored" if is_judged else f"stored as unjudged: {why}", trajectory)


def _trajectory(
    session: Session,
    ending: Ending,
    messages: Sequence[Message],
    storing: Storing,
    is_judged: bool,
    masked: str | None,
) -> Trajectory:
    reward = (ending.team_reward or 0.0) if is_judged else 0.0
    told = session.task.text
    reading = [
        message.model_copy(update={"reads": read_by(f"{message.system}\n{message.user}", messages[:place], told)})
        for place, message in enumerate(messages)
    ]
    info = {"session": session.id, "mode": session.mode, "cause": ending.cause}
    return Trajectory(
        task=session.task,
        team=storing.team,
        model=storing.model,
        steps=(
            Step(
                messages=tuple(reading),
                action=messages[-1].response if ending.answer is None else ending.answer,
                observation=ending.feedback,
                info=dict(info),
            ),
        ),
        reward=reward,
        success=reward == 1,
        error=masked or ending.error,
        seed=session.seed,
        rewards=dict(ending.rewards) if is_judged else {},
        origin=Origin(tenant=pool_of(session, is_judged), session=session.id, is_judged=is_judged),
    )


def pool_of(session: Session, is_judged: bool) -> str:
    """Return the tenant under which an episode is stored; the common pool gets judged episodes alone."""
    if is_judged:
        return "" if session.shares else session.tenant
    return session.tenant or UNJUDGED
