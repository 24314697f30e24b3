"""The endpoints of what a person may ask about what was recorded; they translate and call.

One of them works at a time: scoring and sampling again is work for the model that others wait for.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from latentmem.bank import ExperienceBank
from latentmem.bank.embedding import Embed
from latentmem.errors import DataError, ModelError
from latentmem.models.agent import AgentModel
from latentmem.models.language_model import LanguageModel
from latentmem.serving.asks import Refused, Who
from latentmem.serving.closed import Closed
from latentmem.serving.identity import KnownRole, role_of
from latentmem.serving.operators.audit import AuditLog
from latentmem.serving.operators.visits import current
from latentmem.serving.rights.forget import Forgetting, Forgotten, Wish
from latentmem.serving.rights.replay import Replayed, left_out, replay
from latentmem.serving.rights.why import Remaking, Why, why
from latentmem.serving.sessions.forms import Label
from latentmem.serving.sessions.session import Session
from latentmem.serving.sessions.store import SessionStore
from latentmem.trajectory import Message

T = TypeVar("T")
Caller = Callable[[Request], Awaitable[Who]]
"""A function: the request -> what its API key, or its session's own token, tells. It raises `Refused`."""


@dataclass(frozen=True)
class Rights:
    """What the endpoints work with."""

    store: SessionStore
    bank: ExperienceBank
    """As everybody sees it."""
    embed: Embed
    memory: Remaking
    model: AgentModel
    """Samples again."""
    weights: LanguageModel | None
    """Scores; None if there are no weights here."""
    roles: Sequence[KnownRole]
    pools: Callable[[str], Sequence[str]]
    """Whose episodes a tenant recalls, and so may see."""
    forgetting: Forgetting
    audit: AuditLog

    def answered(self, session: Session, call: str, choice: int) -> Message:
        """Return what was answered to a call.

        Raises:
            Refused: there is no such call or choice.
        """
        answer = self.store.answered_call(session.tenant, session.id, call)
        if answer is None or choice >= len(answer.choices):
            raise Refused(404, f"there is no answer {call[:200]!r} in this session", "call")
        return answer.choices[choice].message

    def why(self, session: Session, call: str, choice: int) -> Why:
        """Return why a call was answered as it was.

        Raises:
            Refused: there is no such call, or it cannot be scored.
        """
        message = self.answered(session, call, choice)
        assert message.served is not None
        role = role_of(message.role, message.served.conversation, self.roles)
        seen = self.bank.seen_by(self.pools(session.tenant))
        try:
            return why(message, session.task, role, seen, self.embed, self.memory, self.weights)
        except ModelError as error:
            raise Refused(400, str(error)) from None

    def replay(self, session: Session, limit: int) -> tuple[list[Replayed], str | None]:
        """Sample a session's calls again; return also why some are left out.

        Raises:
            Refused: a call does not fit the model's window.
        """
        calls = self.store.calls(session)
        messages = [choice.message for call in calls if call.answer is not None for choice in call.answer.choices]
        try:
            found = replay(messages, self.model, self.memory, limit, tenant=session.tenant)
        except ModelError as error:
            raise Refused(400, str(error)) from None
        self.audit.append("replayed", {"tenant": session.tenant, "session": session.id, "calls": len(found)})
        return found, left_out(messages)


class ForgetRequest(Closed):
    """What is to be forgotten: what meets all that is given."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    tenant: Annotated[str, Field(max_length=64)] | None = None
    """Whose; only the operator may name another than their own, and null is everybody's then."""
    session: Label | None = None
    domain: Label | None = None
    task_id: Label | None = None
    success: Annotated[bool, Field(strict=True)] | None = None
    before: AwareDatetime | None = None
    """A time with its zone; what was recorded earlier."""
    everything: Annotated[bool, Field(strict=True)] = False
    """That no filter is given is meant so."""
    derived: Annotated[bool, Field(strict=True)] = False
    """Whether episodes that were played with a memory made of these are forgotten too."""
    dry_run: Annotated[bool, Field(strict=True)] = False
    """Whether it is only counted."""


class Calls(BaseModel):
    """A session's calls, sampled again."""

    calls: list[Replayed]
    num_tokens_with: int
    num_tokens_without: int
    warnings: list[str]
    """Why calls are left out, such as that their memory was forgotten."""


def rights_routes(rights: Rights, caller: Caller) -> APIRouter:
    """Make the routes.

    Args:
        rights: what they work with.
        caller: tells who asks.
    """
    router = APIRouter(tags=["rights"])
    one = asyncio.Lock()

    async def alone(work: Callable[..., T], *arguments: Any) -> T:
        async with one:
            return await asyncio.to_thread(work, *arguments)

    async def find(request: Request, sid: str) -> Session:
        who = await caller(request)
        session = await asyncio.to_thread(rights.store.get, who.tenant, sid) if who.session in (None, sid) else None
        if session is None:
            raise Refused(404, f"there is no session {sid[:200]!r}", "sid")
        return session

    @router.get("/sessions/{sid}/calls/{call}/why")
    async def why_so(request: Request, sid: str, call: str, choice: Annotated[int, Query(ge=0, le=7)] = 0) -> Why:
        """Tell what the memory of a call was made of, and what it did to the response."""
        session = await find(request, sid)
        return await alone(rights.why, session, call, choice)

    @router.post("/sessions/{sid}/replay")
    async def play_again(request: Request, sid: str, limit: Annotated[int, Query(ge=1, le=1024)] = 256) -> Calls:
        """Sample a session's calls greedily, with and without memory, and tell the difference."""
        session = await find(request, sid)
        calls, missing = await alone(rights.replay, session, limit)
        return Calls(
            calls=calls,
            num_tokens_with=sum(call.with_memory.num_tokens for call in calls),
            num_tokens_without=sum(call.without_memory.num_tokens for call in calls),
            warnings=[] if missing is None else [missing],
        )

    @router.post("/forget")
    async def forget(request: Request, body: ForgetRequest) -> Forgotten:
        """Delete episodes wherever they are, and prove that nothing of them is recalled any more."""
        who = await caller(request)
        if who.session is not None:
            raise Refused(403, "a session's own token forgets nothing")
        wish = _wish(body, who)
        visit = current.get()
        by = who.key or (visit.caller.key if visit is not None else "")
        try:
            return await alone(lambda: rights.forgetting.forget(wish, by, dry_run=body.dry_run))
        except DataError as error:
            raise Refused(400, str(error), "everything") from None

    return router


def _wish(body: ForgetRequest, who: Who) -> Wish:
    """Return the wish, bound to the tenant that asks.

    Raises:
        Refused: another tenant is named.
    """
    if who.tenant and body.tenant not in (None, who.tenant):
        raise Refused(404, "there is no such tenant", "tenant")
    tenant = who.tenant or body.tenant
    return Wish(tenant=tenant, **body.model_dump(exclude={"tenant", "dry_run"}))
