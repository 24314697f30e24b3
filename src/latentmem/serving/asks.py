"""The nouns of serving: who asks, what is asked, what is answered, and the desk behind the endpoints.

An endpoint reads a request into a `Who` and an `Ask`, the desk admits it as a `Turn`, the turn speaks, and the endpoint
writes the `Answer` in its own form. So a server that people run and a program that is played as a team differ in their
desk alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Protocol

from pydantic import JsonValue

from latentmem.trajectory import Conversation, Message, Recalled, Role

OnTokens = Callable[[Sequence[int]], bool]
"""A function that gets new tokens as they are sampled; False: nobody waits for the rest any more."""
_SLIP = 0.8
"""From here on a type of events is too like `reward`, by `difflib`: `rewards` is at .92, `forward` at .77."""


@dataclass(frozen=True)
class Who:
    """Who speaks, about what, as far as the request tells; see `identity`."""

    tenant: str = ""
    """From the API key alone; empty where there are no keys."""
    key: str = ""
    """Id of the API key, never its secret."""
    session: str | None = None
    role: str | None = None
    task: str | None = None
    """Id of the task."""
    domain: str | None = None


@dataclass(frozen=True)
class Speaker:
    """The role that a request speaks for."""

    role: Role
    is_known: bool | None = None
    """Whether the configuration has it; None: it has no roles."""
    warning: str | None = None
    """That it may be another one, misspelt."""


@dataclass(frozen=True)
class Ask:
    """A request for an agent's next message, whichever endpoint it came through. None: the server decides."""

    call: str
    """Id of the call; its answer bears it, and so does what is stored."""
    model: str
    conversation: Conversation
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
    stream: bool = False
    with_usage: bool = False
    """Whether a stream ends with the usage."""
    parallel_calls: bool = True
    """Whether one response may call several tools."""
    memory: str | None = None
    """The memory that the request itself asks for, as in `serve.memory`."""
    with_tokens: bool = False
    """Whether the answer tells token ids."""
    retry_key: str | None = None
    """The client's `Idempotency-Key`: requests of a session with equal keys are one request."""
    digest: str = ""
    """Hash of the request's body."""
    sent_again: bool = False
    """Whether the client says, without a key, that it sends this for another time: an earlier request of the session
    with the same digest is this one. Without that word, equal digests are requests of their own."""
    extra: Mapping[str, JsonValue] = field(default_factory=dict)
    """What the endpoint needs to write its answer, such as the request's `metadata`."""


@dataclass(frozen=True)
class Timings:
    """Where the time of a request went, in seconds."""

    recall: float = 0.0
    composing: float = 0.0
    queue: float = 0.0
    generation: float = 0.0


@dataclass(frozen=True)
class Counted:
    """What an engine counts of a response and no message keeps."""

    kept: int = 0
    """Tokens of the prompt that were kept from earlier prompts, and not read again."""
    sampled: int | None = None
    """Tokens of the response, from a server that does not tell the tokens."""

    def tokens_of(self, message: Message) -> int:
        """Return the number of tokens of the response."""
        return len(message.token_ids) if self.sampled is None else self.sampled


@dataclass(frozen=True)
class Spoken:
    """One sampled response."""

    message: Message
    timings: Timings = Timings()
    tool_calls: "tuple[ToolCall, ...] | None" = None
    """Tools that it calls, where a server of another model has read them already; None: they stand in the text."""
    counted: Counted = Counted()


@dataclass(frozen=True)
class ToolCall:
    """A tool that the agent calls."""

    id: str
    name: str
    arguments: str
    """JSON, as the model wrote it."""


@dataclass(frozen=True)
class Choice:
    """One response as the program reads it."""

    content: str
    """The response without tool calls."""
    tool_calls: tuple[ToolCall, ...]
    finish: str
    """`stop`, `length` or `tool_calls`."""
    message: Message
    """What is stored of it."""
    counted: Counted = Counted()

    @property
    def as_sent_back(self) -> dict[str, JsonValue]:
        """The response as the chat message that a program sends back when it goes on."""
        calls: list[JsonValue] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in self.tool_calls
        ]
        said: dict[str, JsonValue] = {"role": "assistant", "content": self.content or (None if calls else "")}
        return said | {"tool_calls": calls} if calls else said


@dataclass(frozen=True)
class Answer:
    """What a request is answered."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    session: str
    choices: tuple[Choice, ...]
    timings: Timings = Timings()
    role_is_known: bool | None = None
    """See `Speaker.is_known`."""
    warnings: tuple[str, ...] = ()
    """What its program has probably done by mistake, one line each."""


@dataclass(frozen=True)
class Earlier:
    """A call that was answered before, as far as one that names it goes on from there."""

    session: str
    conversation: Conversation
    """The chat that was sent, and after it what was answered: `Choice.as_sent_back`."""


class Refused(Exception):  # noqa: N818 - it is an answer, not a fault
    """A request that is not served, with the status and the words that its client gets."""

    def __init__(
        self,
        status: int,
        text: str,
        field: str | None = None,
        retry_after: float | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(text)
        self.status = status
        self.code = code
        """A word that programs look for, such as `context_length_exceeded`."""
        self.field = field
        """The request's field that is at fault."""
        self.retry_after = retry_after
        """Seconds after which the same request may be served."""


class Turn(Protocol):
    """One admitted request. Its functions block and are called from threads; exactly one of the last two is called."""

    @property
    def session(self) -> str:
        """The session that it belongs to."""

    @property
    def known(self) -> Answer | None:
        """The answer that the same request was given before, when it was sent again; then nothing else is called."""

    @property
    def speaker(self) -> Speaker:
        """The role that it speaks for."""

    @property
    def recalled(self) -> Recalled | None:
        """What was recalled for it, if that is known before the agent speaks."""

    @property
    def tool_form(self) -> str:
        """How the model writes calls of tools, as `Chat.tool_form` tells; see `tools`."""

    def speak(self, choice: int, on_tokens: OnTokens | None) -> Spoken:
        """Sample the response of one choice, from 0. Choices may be sampled at the same time.

        Raises:
            Refused: the engine cannot serve it now.
        """

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled tokens, tokens of tool calls included, the end of the response left out."""

    def answered(self, answer: Answer) -> None:
        """Keep the answer. When this returns it is on stable storage; only then does the client get its end."""

    def lost(self, reason: str) -> None:
        """Take note that the request got no answer: it failed, or its client went away."""


class Desk(Protocol):
    """What stands behind the endpoints."""

    def models(self) -> Sequence[str]:
        """Return the names of the models that can be asked."""

    async def admit(self, who: Who, ask: Ask) -> Turn:
        """Find the request's session and role, and wait for a place.

        Raises:
            Refused: it is not allowed, no such model is served, or there is no place.
        """

    async def earlier(self, who: Who, call: str) -> Earlier | None:
        """Return a call that was answered before and that this one may go on from; None: there is none, or not for it.

        `who.tenant` decides what may be seen, and `who.session` where it is given.
        """


def is_slip_of_reward(event_type: str) -> bool:
    """Return whether the type of an event is almost `reward`: taken as another one, it would lose a reward unseen."""
    return event_type != "reward" and bool(get_close_matches(event_type.strip().lower(), ["reward"], cutoff=_SLIP))
