"""The endpoints of sessions; they translate and call."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Annotated, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Body, Header, Query, Request

from latentmem.serving.asks import Refused, Who
from latentmem.serving.desk import ServingDesk
from latentmem.serving.identity import near_role
from latentmem.serving.sessions.endings import Endings, merged
from latentmem.serving.sessions.forms import (
    LISTED_TASK,
    CompletedView,
    CompleteRequest,
    Event,
    EventKept,
    OpenRequest,
    OtherEvent,
    RewardEvent,
    SessionOpened,
    Sessions,
    SessionView,
    Traces,
    traces_of,
    unheard,
    view_of,
)
from latentmem.serving.sessions.session import Ending, Session, State
from latentmem.serving.sessions.tables import Opening
from latentmem.serving.sessions.tokens import Opened, Tokens

T = TypeVar("T")
Caller = Callable[[Request], Awaitable[Who]]
"""A function: the request -> what its API key, or its session's own token, tells. It raises `Refused`."""


def session_routes(desk: ServingDesk, endings: Endings, tokens: Tokens, caller: Caller) -> APIRouter:
    """Make the routes.

    Args:
        desk: knows what a new session is told, and whether the server ends.
        endings: ends sessions, and has their store.
        tokens: makes the sessions' own tokens.
        caller: tells who asks.
    """
    router = APIRouter(tags=["sessions"])
    store = endings.store

    async def find(request: Request, sid: str) -> Session:
        who = await caller(request)
        session = None
        if who.session in (None, sid):
            session = await asyncio.to_thread(store.get, who.tenant, sid)
        if session is None:
            raise Refused(404, f"there is no session {sid[:200]!r}", "sid")
        return session

    def view(session: Session) -> SessionView:
        ending = session.ending or Ending(cause="completed")
        return view_of(session, store.counts(session), merged(ending, store.events(session)))

    def completed(session: Session) -> CompletedView:
        seen = view(session)
        warnings = unheard(seen.rewards, store.spoke(session)) if seen.rewards else []
        return CompletedView(**seen.model_dump(), warnings=warnings)

    def told(session: Session, event: RewardEvent | OtherEvent) -> list[str]:
        role = event.data.agent if isinstance(event, RewardEvent) else None
        near = None if role is None else near_role(role, {*desk.known_roles, *store.spoke(session)})
        return [] if near is None else [f"the role {role!r} has said nothing yet; did you mean {near!r}?"]

    @router.post("/sessions", status_code=201)
    async def open_session(
        request: Request, body: Annotated[OpenRequest, Body(default_factory=OpenRequest)]
    ) -> SessionOpened:
        """Open a session."""
        desk.check_open()
        who = await caller(request)
        if who.session is not None:
            raise Refused(403, "a session's own token opens no other session")
        opening = Opening(
            tenant=who.tenant,
            id=body.id,
            key=who.key,
            mode=body.mode,
            domain=body.domain or desk.domain,
            task_id=body.task_id,
            task_text=body.task,
            shares=desk.shares(who),
        )
        session = await asyncio.wrap_future(store.open(opening))
        return SessionOpened(
            id=session.id,
            state=session.state,
            base_url=f"{request.base_url}sessions/{quote(session.id, safe='')}/v1",
            token=tokens.make(Opened(session.tenant, session.id, session.key)),
        )

    def listed(sessions: Sequence[Session]) -> Iterator[SessionView]:
        for session in sessions:
            with suppress(Refused):  # it was forgotten just now
                seen = view(session)
                yield seen.model_copy(update={"task": seen.task and seen.task[:LISTED_TASK]})

    @router.get("/sessions")
    async def list_sessions(
        request: Request,
        state: State | None = None,
        after: Annotated[str | None, Query(max_length=200)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> Sessions:
        """List the sessions of the key's tenant, the one that was opened last first."""
        who = await caller(request)
        if who.session is not None:
            raise Refused(403, "a session's own token lists no sessions")
        found = await asyncio.to_thread(store.page, who.tenant, state, after, limit + 1)
        seen = await asyncio.to_thread(lambda: list(listed(found[:limit])))
        return Sessions(sessions=seen, next=found[limit - 1].id if len(found) > limit else None)

    @router.get("/sessions/{sid}")
    async def get_session(request: Request, sid: str) -> SessionView:
        """Tell how a session is."""
        return await asyncio.to_thread(view, await find(request, sid))

    @router.post("/sessions/{sid}/events")
    async def add_event(
        request: Request,
        sid: str,
        body: Event,
        idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
    ) -> EventKept:
        """Keep an event, such as a reward."""
        session = await find(request, sid)
        event = body.model_dump(exclude_none=True)
        number = await asyncio.wrap_future(store.tell(session, event, body.id or idempotency_key))
        return EventKept(number=number, warnings=await asyncio.to_thread(told, session, body))

    @router.post("/sessions/{sid}/complete")
    async def complete(
        request: Request, sid: str, body: Annotated[CompleteRequest, Body(default_factory=CompleteRequest)]
    ) -> CompletedView:
        """End a session. When this is answered, its episode is in the bank; asking again changes nothing."""
        session = await find(request, sid)
        return await asyncio.to_thread(lambda: completed(endings.complete(session, body.ending())))

    @router.get("/sessions/{sid}/traces")
    async def get_traces(
        request: Request,
        sid: str,
        after: Annotated[int, Query(ge=0, le=2**31)] = 0,
        limit: Annotated[int, Query(ge=1, le=100)] = 100,
    ) -> Traces:
        """Tell what was sampled in a session, with token ids, log-probabilities and what was recalled."""
        session = await find(request, sid)
        calls = await asyncio.to_thread(store.calls, session, after, limit + 1)
        traces = [trace for call in calls[:limit] for trace in traces_of(call)]
        return Traces(traces=traces, next=after + limit if len(calls) > limit else None)

    return router
