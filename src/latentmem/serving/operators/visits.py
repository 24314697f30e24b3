"""One request as operators see it, from its first byte to its last: who sent it, what it took, how it ended.

The gate begins a visit and ends it; the desk behind the endpoints adds what it learns, found by the running request's
context. Metrics, logs and the audit read it at its end. It holds no text of a prompt or a response.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field

from latentmem.serving.asks import Timings
from latentmem.serving.operators.keys import SCOPES


@dataclass(frozen=True)
class Caller:
    """Who sends a request, as far as its credentials tell."""

    tenant: str = ""
    key: str = ""
    """Id of the API key; empty where there are no keys."""
    scopes: frozenset[str] = frozenset(SCOPES)
    session: str | None = None
    """The one session that a session's own token opens; None: an API key, or no keys at all."""
    shares: bool = False
    """Whether the tenant's judged episodes go to the pool that every tenant recalls."""

    @property
    def is_operator(self) -> bool:
        """Whether it may act for every tenant."""
        return not self.tenant and "admin" in self.scopes and self.session is None


NOBODY = Caller(scopes=frozenset())
"""Somebody without valid credentials."""


@dataclass
class Visit:
    """One request."""

    id: str
    method: str
    route: str
    """The route's template, such as `/sessions/{sid}/events`."""
    caller: Caller = NOBODY
    status: int = 0
    """0 until the answer begins."""
    seconds: float = 0.0
    reason: str = ""
    """Why it was refused or lost, in a word or two."""
    session: str = ""
    role: str = ""
    calls: list[str] = field(default_factory=list)
    """Ids of answers."""
    prompt_tokens: int = 0
    kept_tokens: int = 0
    """How many of these were kept from earlier prompts."""
    latent_tokens: int = 0
    generated_tokens: int = 0
    recalled: str = ""
    """Kind of the memory that was given."""
    sources: tuple[str, ...] = ()
    """Ids of the trajectories that it was made of."""
    timings: Timings | None = None
    texts: dict[str, object] = field(default_factory=dict)
    """What was asked and answered; empty unless it is to be logged."""

    @property
    def tokens(self) -> int:
        """Tokens that count against a limit."""
        return self.prompt_tokens + self.latent_tokens + self.generated_tokens


current: ContextVar[Visit | None] = ContextVar("current visit", default=None)
"""The request that is being answered."""
