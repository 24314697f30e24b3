"""What every request passes before anything reads it: whose it is, whether that may be, how large it is, how many.

The gate stands around the whole application, so no route can be forgotten: one that it does not know is for the
operator alone. It takes the body in, bounded, before it takes a place of the key's, so slow senders hold none. However
a request ends, its place is given back, and the visit is counted and logged.
"""

import ipaddress
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentmem.errors import LatentMemError
from latentmem.serving.asks import Refused
from latentmem.serving.face.errors import refuse
from latentmem.serving.face.unknown import no_route
from latentmem.serving.operators.doors import TENANTS_DOORS, door_of
from latentmem.serving.operators.keys import Key, Keys
from latentmem.serving.operators.limits import Limits
from latentmem.serving.operators.visits import NOBODY, Caller, Visit, current
from latentmem.serving.sessions.tokens import Opened

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 2 << 20
MAX_JSON_DEPTH = 100
_LATER_SECONDS = 1
_LONGEST_CREDENTIAL = 200
_OTHERS = bytes(set(range(256)) - set(b'[]{}"'))
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_GONE = 499
"""Status of a request whose client went away before the answer began; nobody reads it."""


SessionOf = Callable[[str], Opened | None]
"""A function from a session's own token to the session; None: there is none of that token, or it has ended."""


class Gate:
    """Stands in front of an application."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        limits: Limits,
        session_of: SessionOf = lambda token: None,
        ended: Callable[[Visit], None] = lambda visit: None,
    ) -> None:
        """Put a gate in front of an application.

        Args:
            app: what answers the requests that pass.
            keys: who may pass; as long as no key was ever made, everybody on this machine.
            limits: how much each key may ask for.
            session_of: finds a session by its own token.
            ended: gets each visit at its end.
        """
        self._app = app
        self._keys = keys
        self._limits = limits
        self._session_of = session_of
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        door = door_of(scope["method"], scope["path"])
        visit = Visit(f"req-{uuid.uuid4().hex}", door.method, door.name)
        began = time.perf_counter()
        token = current.set(visit)
        try:
            await self._pass(scope, receive, _watched(send, visit), visit)
        except BaseException as error:
            if not visit.status:
                visit.status = 500
            visit.reason = visit.reason or type(error).__name__
            raise
        finally:
            current.reset(token)
            visit.status = visit.status or _GONE
            visit.seconds = time.perf_counter() - began
            self._ended(visit)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, visit: Visit) -> None:
        try:
            with ExitStack() as held:
                key = self._check(scope, visit)
                body = await _body(scope, receive)
                if body is None:
                    visit.reason = "client gone"
                    return
                if key is not None:
                    held.enter_context(self._limits.admitted(key))
                scope = {**scope, "latentmem.caller": visit.caller}
                await self._app(scope, _given(body, receive), send)
        except Refused as refused:
            if visit.status:
                raise
            visit.reason = str(refused)
            answer = refuse(refused)
            if refused.status == HTTPStatus.UNAUTHORIZED:
                answer.headers["WWW-Authenticate"] = "Bearer"
            await answer(scope, receive, send)

    def _check(self, scope: Scope, visit: Visit) -> Key | None:
        """Find out who asks, note it, and return the key whose limits count.

        Raises:
            Refused: it may not be.
        """
        door = door_of(scope["method"], scope["path"])
        if door.is_open:
            return None
        headers = scope["headers"]
        try:
            with_keys = self._keys.exist()
            if not with_keys:
                _is_local(headers)
            visit.caller, key = self._caller(_credential(headers), with_keys)
        except LatentMemError as error:
            logger.warning("%s", error)
            raise Refused(503, "the keys cannot be read now", retry_after=_LATER_SECONDS) from None
        caller = visit.caller
        if caller is NOBODY:
            raise Refused(401, "this server asks for a valid API key: `Authorization: Bearer lm_...`", code="bad_key")
        if caller.session is not None and door.session_of(scope["path"]) not in (None, caller.session):
            raise Refused(404, "there is no such session")
        if door.is_for_operator and not caller.is_operator:
            raise no_route(Request(scope), TENANTS_DOORS)  # as if there were none
        if not door.opens_for(caller.scopes) or (caller.session is not None and not door.is_of_session):
            raise Refused(403, f"this key lacks the scope {door.scope}", code="missing_scope")
        return key

    def _caller(self, credential: str | None, with_keys: bool) -> tuple[Caller, Key | None]:
        if credential is not None and (key := self._keys.find(credential)) is not None:
            return Caller(key.tenant, key.id, key.scopes, None, key.shares), key
        opened = self._session_of(credential) if credential else None
        if opened is None:
            return (NOBODY, None) if with_keys else (Caller(), None)
        # Its token lives no longer than the key that opened it.
        key = self._keys.valid(opened.key) if with_keys else None
        if with_keys and key is None:
            return NOBODY, None
        scopes = frozenset(("infer", "read", "write"))
        return Caller(opened.tenant, opened.key, scopes, opened.session, bool(key and key.shares)), key


def caller_of(scope: Scope) -> Caller:
    """Return who sends a request that has passed the gate; without a gate everybody is one tenant."""
    found = scope.get("latentmem.caller")
    return found if isinstance(found, Caller) else Caller()


def _credential(headers: list[tuple[bytes, bytes]]) -> str | None:
    """Return the bearer token; of two or none, and of anything else, None."""
    found = [value for name, value in headers if name.lower() == b"authorization"]
    if len(found) != 1 or len(found[0]) > _LONGEST_CREDENTIAL:
        return None
    kind, _, token = found[0].decode("latin-1").partition(" ")
    return token.strip() if kind.lower() == "bearer" else None


def _is_local(headers: list[tuple[bytes, bytes]]) -> None:
    """Refuse what a web page could make a browser on this machine send: only keys would tell it from a program.

    Raises:
        Refused: the request comes from a page, or calls this machine by another name.
    """
    for name, value in headers:
        if name.lower() == b"origin":
            raise Refused(403, "requests of web pages need an API key; make one with `latentmem keys create CONFIG`")
        if name.lower() == b"host" and not _names_this_machine(value.decode("latin-1")):
            raise Refused(
                403,
                "without API keys only 127.0.0.1 and localhost are served; make one with "
                "`latentmem keys create CONFIG`",
            )


def _names_this_machine(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name.lower() in _LOCAL:
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


async def _body(scope: Scope, receive: Receive) -> bytes | None:
    """Return a request's body, or None if its client goes away before it is whole.

    Raises:
        Refused: it is too long, or nested too deeply.
    """
    for name, value in scope["headers"]:
        if name.lower() == b"content-length" and value.isdigit() and int(value[:20]) > MAX_BODY_BYTES:
            raise _too_long()
    parts = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts += message.get("body", b"")
        if len(parts) > MAX_BODY_BYTES:
            raise _too_long()
        more = message.get("more_body", False)
    body = bytes(parts)
    if depth_exceeds(body, MAX_JSON_DEPTH):
        raise Refused(400, f"the body is nested deeper than {MAX_JSON_DEPTH} levels")
    return body


def _too_long() -> Refused:
    return Refused(413, f"the body is longer than {MAX_BODY_BYTES} bytes", code="body_too_long")


def depth_exceeds(body: bytes, most: int) -> bool:
    """Return whether JSON is nested deeper than `most` levels, without parsing it; brackets in texts do not count."""
    if body.count(b"[") + body.count(b"{") <= most:
        return False
    # A quote that a backslash escapes ends no text, unless that backslash is escaped itself.
    structure = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _OTHERS)
    depth = 0
    for byte in b"".join(structure.split(b'"')[::2]):
        depth += 1 if byte in b"[{" else -1
        if depth > most:
            return True
    return False


def _given(body: bytes, receive: Receive) -> Receive:
    """Return a function that gives the body that was read, and then tells whether the client is still there."""
    waiting = [body]

    async def next_message() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return next_message


def _watched(send: Send, visit: Visit) -> Send:
    async def sent(message: Any) -> None:
        if message["type"] == "http.response.start":
            visit.status = message["status"]
            headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
            message = {**message, "headers": [*headers, (b"x-request-id", visit.id.encode())]}
        await send(message)

    return sent
