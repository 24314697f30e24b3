"""The bodies of the endpoints of sessions: what is asked, and what is answered."""

import json
from collections.abc import Collection, Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, field_validator

from latentmem.errors import suggest
from latentmem.serving.asks import is_slip_of_reward
from latentmem.serving.closed import Closed
from latentmem.serving.sessions.session import Counts, Ending, KeptCall, Mode, Session, State
from latentmem.trajectory import Message

Label = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f/?#]+$")]
Line = Annotated[str, Field(max_length=2000)]
Reward = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


LISTED_TASK = 200
"""Characters of a task that a list of sessions tells."""


class Form(Closed):
    """A strict form: a misspelt field is an error, not nothing."""

    model_config = ConfigDict(strict=True)


class OpenRequest(Form):
    """Opens a session."""

    id: Label | None = None
    """A name of your own; null makes one that nobody can guess."""
    task: str | None = Field(default=None, max_length=200_000)
    """The task's text; null: the first user message of the first call."""
    task_id: Label | None = None
    domain: Label | None = None
    mode: Mode = "serve"
    """`val`: the episode never enters the bank."""


class SessionOpened(Form):
    """A session that was opened."""

    id: str
    state: State
    base_url: str
    """The `base_url` for a client of this session."""
    token: str
    """The `api_key` for a client of this session; with it, a plain `/v1` is this session's too."""


class RewardData(Form):
    """A reward."""

    value: Reward
    agent: Label | None = None
    """The role that it is for; null: the whole team."""
    source: Line | None = None
    """Who gave it."""
    reason: Line | None = None


class RewardEvent(Form):
    """Tells a reward; of several, the last one counts."""

    event_type: Literal["reward"]
    data: RewardData
    id: Label | None = None
    """Events of equal id are one event."""


class OtherEvent(Form):
    """Anything else that is to be kept with the session. A type that is almost `reward` is refused as a slip."""

    event_type: Annotated[str, Field(min_length=1, max_length=100, json_schema_extra={"not": {"const": "reward"}})]
    data: dict[str, JsonValue] = Field(default_factory=dict)
    id: Label | None = None

    @field_validator("event_type")
    @classmethod
    def _is_no_slip(cls, value: str) -> str:
        if is_slip_of_reward(value):
            raise ValueError(f"{value!r} would reward nobody; did you mean 'reward'?")
        return value

    @field_validator("data")
    @classmethod
    def _can_be_written(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise ValueError(f"has no form in JSON ({error})") from None
        return value


def _kind(event: Any) -> str:
    kind = event.get("event_type") if isinstance(event, dict) else getattr(event, "event_type", None)
    return REWARD if kind == "reward" else OTHER


REWARD, OTHER = "(reward)", "(other)"
"""How pydantic calls the forms of an event where one is at fault; no body has such fields."""
Event = Annotated[Annotated[RewardEvent, Tag(REWARD)] | Annotated[OtherEvent, Tag(OTHER)], Discriminator(_kind)]


class EventKept(Form):
    """An event that was kept."""

    number: int
    """Its number in the session, from 1."""
    warnings: list[str] = Field(default_factory=list)
    """That the rewarded role, which has said nothing yet, may be another one, misspelt."""


class CompleteRequest(Form):
    """Ends a session."""

    reward: Reward | None = None
    """The team's reward; null: what the last event told, or none."""
    rewards: dict[Label, Reward] = Field(default_factory=dict)
    """Rewards of single roles, by name."""
    answer: str | None = Field(default=None, max_length=200_000)
    """What the program made of the task; null: its last response."""
    feedback: str = Field(default="", max_length=200_000)
    """What was replied to the answer."""
    error: Line | None = None
    """Why the program failed."""

    def ending(self) -> Ending:
        """Return how the session ends."""
        return Ending(cause="completed", **self.model_dump())


class Calls(Form):
    """Numbers of calls."""

    answered: int
    lost: int
    """Without a whole answer, and not sent again: they mask the session."""
    running: int


class SessionView(Form):
    """A session as it is."""

    id: str
    state: State
    mode: Mode
    domain: str
    task_id: str | None
    task: str | None
    opened: float
    """Seconds since 1970."""
    touched: float
    """When something was last asked or told in it, in seconds since 1970."""
    calls: Calls
    reward: float | None
    rewards: dict[str, float]
    outcome: str | None
    """What became of the ended session, in words."""
    trajectory: str | None
    """Id of its trajectory in the bank."""


class Sessions(Form):
    """Some sessions, the one that was opened last first. Of each task only the beginning is told."""

    sessions: list[SessionView]
    next: str | None
    """What to ask for as `after` to get older ones; null: that was all."""


class CompletedView(SessionView):
    """A session that was ended, and what its rewards do not do."""

    warnings: list[str] = Field(default_factory=list)
    """A line for each role that was rewarded and said nothing."""


def unheard(rewards: Iterable[str], spoke: Collection[str]) -> list[str]:
    """Return a line for each rewarded role that said nothing.

    Args:
        rewards: the roles that were rewarded.
        spoke: the roles that spoke.
    """
    return [
        f"a reward was told for the role {role!r}, which said nothing in this session; {suggest(role, spoke)}"
        if spoke
        else f"a reward was told for the role {role!r}, and no call of this session was answered"
        for role in rewards
        if role not in spoke
    ]


def view_of(session: Session, counts: Counts, ending: Ending) -> SessionView:
    """Return a session as it is told.

    Args:
        session: the session.
        counts: its calls.
        ending: its rewards, those of events included.
    """
    return SessionView(
        id=session.id,
        state=session.state,
        mode=session.mode,
        domain=session.domain,
        task_id=session.task_id,
        task=session.task_text,
        opened=session.opened,
        touched=session.touched,
        calls=Calls(answered=counts.answered, lost=counts.lost, running=counts.running),
        reward=ending.reward,
        rewards=dict(ending.rewards),
        outcome=session.outcome,
        trajectory=session.trajectory,
    )


class Trace(BaseModel):
    """One sampled response of a session, with all that training needs."""

    call: str
    """Id of the answer; of `n` choices, several traces have it."""
    lineage: str
    seed: int
    """Of choice i, the random stream is made of this and i."""
    lost: str | None = None
    """Why there is no answer; then nothing below is told."""
    role: str | None = None
    messages: list[dict[str, Any]] = []
    """The chat that was sent, without any memory."""
    tools: list[dict[str, Any]] = []
    response: str | None = None
    finish: str | None = None
    temperature: float | None = None
    prompt_ids: list[int] = []
    """The prompt as the model read it; latents are left out."""
    completion_ids: list[int] = []
    logps: list[float] = []
    weights: str = ""
    """Version of the agents' weights."""
    memory: str = ""
    """Kind of the memory."""
    memory_text: str = ""
    """What a text memory put into the prompt; empty for another memory, and once what it was made of was forgotten."""
    sources: list[str] = []
    """Ids of the trajectories that the memory was made of, best first."""
    latents: str = ""
    """Digest of the latents."""
    composer: str = ""
    """Version of the composer's weights."""
    timings: dict[str, float] = {}


class Traces(BaseModel):
    """Some traces of a session, in the order of the answers; lost calls last."""

    traces: list[Trace]
    next: int | None
    """What to ask for as `after` to get the rest; null: that was all."""


def traces_of(call: KeptCall) -> list[Trace]:
    """Return what is told of a call: a trace for each of its choices."""
    if call.answer is None:
        return [Trace(call=call.id, lineage=call.lineage, seed=call.seed, lost=call.lost)]
    timings = vars(call.answer.timings)
    return [_trace(call, choice.message, timings) for choice in call.answer.choices]


def _trace(call: KeptCall, message: Message, timings: dict[str, float]) -> Trace:
    served = message.served
    assert served is not None
    return Trace(
        call=call.id,
        lineage=call.lineage,
        seed=call.seed,
        role=message.role,
        messages=list(served.conversation.messages),
        tools=list(served.conversation.tools),
        response=message.response,
        finish=message.finish,
        temperature=message.temperature,
        prompt_ids=list(served.prompt_ids),
        completion_ids=list(message.token_ids),
        logps=list(message.logps),
        weights=served.weights,
        memory=message.recalled.kind,
        memory_text=message.recalled.text if message.recalled.kind == "text" else "",
        sources=list(message.recalled.sources),
        latents=served.latents,
        composer=served.composer,
        timings=timings,
    )
