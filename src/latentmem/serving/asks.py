"""The nouns of serving: who asks, what is asked, what is answered, and the desk behind the endpoints.

An endpoint reads a request into a `Who` and an `Ask`, the desk admits it as a `Turn`, the turn speaks, and the endpoint
writes the `Answer` in its own form. So a server that people run and a program that is played as a team differ in their
desk alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import JsonValue

from latentmem.trajectory import Conversation, Message

OnTokens = Callable[[Sequence[int]], bool]
"""A function that gets new tokens as they are sampled; False: nobody waits for the rest any more."""


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
class Ask:
    """A request for an agent's next message, whichever endpoint it came through. None: the server decides."""

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
    tool_choice: str = "auto"
    """`auto`, `none`, `required`, or the name of the one tool that has to be called."""
    memory: str | None = None
    """The memory that the request itself asks for, as in `serve.memory`."""
    with_tokens: bool = False
    """Whether the answer tells token ids."""
    retry_key: str | None = None
    """Requests of a session with equal keys are one request that was sent again."""
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
class Spoken:
    """One sampled response."""

    message: Message
    timings: Timings = Timings()


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


class Refused(Exception):  # noqa: N818 - it is an answer, not a fault
    """A request that is not served, with the status and the words that its client gets."""

    def __init__(self, status: int, text: str, field: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.status = status
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
            Refused: it is not allowed, or there is no place.
        """
