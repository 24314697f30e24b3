"""The server that programs speak to while they are played: a thread of this process, on this machine's own address."""

import asyncio
import logging
import resource
import socket
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from latentmem.errors import ServingError
from latentmem.listening import take_port
from latentmem.outside import one_line
from latentmem.serving.allocation import giving_memory_back
from latentmem.serving.asks import Refused, Who, is_slip_of_reward
from latentmem.serving.face.body import read_body
from latentmem.serving.face.errors import refusal_of, refuse
from latentmem.serving.face.routes import openai_routes
from latentmem.serving.face.unknown import no_route
from latentmem.serving.programs.desk import HOW, ProgramDesk
from latentmem.serving.programs.session import Session

logger = logging.getLogger(__name__)

BACKLOG = 2048
VOICES = 512
"""Threads in which agents wait for their responses."""
_REMEMBERED = 4096
"""Tokens of ended episodes that are told from unknown ones."""
MAX_ROLE_CHARACTERS = 200


class ProgramHost:
    """The server; it starts with its first episode."""

    def __init__(self, desk: ProgramDesk) -> None:
        """Take the desk that admits the requests."""
        self.desk = desk
        self._ended: deque[str] = deque(maxlen=_REMEMBERED)
        self._starting = threading.Lock()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._until_closed = ExitStack()
        self.url = ""

    def open(self, session: Session) -> None:
        """Admit the requests of an episode; the server starts if it does not run."""
        with self._starting:
            if self._server is None:
                self._start()
        self.desk.sessions[session.id] = session

    def end(self, session: Session) -> None:
        """Admit no requests of an episode any more."""
        self.desk.sessions.pop(session.id, None)
        self._ended.append(session.token)

    def close(self) -> None:
        """End the server; returns when its thread has ended."""
        with self._starting:
            server, thread, pool = self._server, self._thread, self._pool
            self._server = self._thread = self._pool = None
        if server is not None and thread is not None and pool is not None:
            server.should_exit = server.force_exit = True
            thread.join()
            pool.shutdown(cancel_futures=True)
            self._until_closed.close()

    def _start(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:  # each episode takes a few descriptors, and there may be hundreds
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._pool = ThreadPoolExecutor(VOICES, thread_name_prefix="program")
        routes = openai_routes(self.desk, self._pool, self._caller)
        events = Route("/sessions/{sid}/events", _answering(self._event), methods=["POST"])
        known = [
            f"{method} {route.path}"
            for route in (*routes, events)
            if isinstance(route, Route)
            for method in route.methods or ()
        ]

        async def unknown(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            return refuse(no_route(request, known, error.status_code))

        config = uvicorn.Config(
            Starlette(routes=[*routes, events], exception_handlers={HTTPException: unknown}),
            log_config=None,
            access_log=False,
            lifespan="off",
            backlog=BACKLOG,
            timeout_graceful_shutdown=1,
        )
        listener = take_port("127.0.0.1", 0, ServingError)
        listener.listen(BACKLOG)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = _Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="programs", daemon=True)
        self._thread.start()
        self._until_closed.enter_context(giving_memory_back())
        self._server.is_up.wait()

    async def _caller(self, request: Request) -> Who:
        """Return whose token a request bears."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        session = self.desk.holder_of(token.strip()) if scheme.lower() == "bearer" else None
        if session is not None:
            return Who(session=session.id)
        if token.strip() in self._ended:
            raise Refused(409, f"the episode of this key is over; {HOW}, in each episode anew", code="session_ended")
        raise Refused(401, f"no episode that is played has this key; {HOW}", code="invalid_api_key")

    async def _event(self, request: Request) -> Response:
        """Take an event of an episode: a reward of one agent, or of the team."""
        who = await self._caller(request)
        if request.path_params["sid"] != who.session:
            raise Refused(403, "the token belongs to another session than the one that is named", "session")
        session = self.desk.session_of(who)
        values, _ = await read_body(request)
        kind = values.get("event_type")
        if isinstance(kind, str) and is_slip_of_reward(kind):
            said = f"event_type: {one_line(repr(kind), 60)} would reward nobody; did you mean 'reward'?"
            raise Refused(400, said, "event_type")
        if kind != "reward":
            return JSONResponse({"status": "ignored"})
        data = values.get("data")
        value = data.get("value") if isinstance(data, dict) else None
        agent = data.get("agent") if isinstance(data, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise Refused(
                400, f"data.value is {one_line(repr(value), 60)}; expected a number from 0 to 1", "data.value"
            )
        if agent is not None and not (isinstance(agent, str) and 0 < len(agent) <= MAX_ROLE_CHARACTERS):
            raise Refused(400, f"data.agent is {one_line(repr(agent), 60)}; expected a role's name", "data.agent")
        session.reward(float(value), agent)
        return JSONResponse({"status": "ok"})


class _Server(uvicorn.Server):
    """A server that tells when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = threading.Event()

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        await super().startup(list(sockets) if sockets is not None else None)
        asyncio.get_running_loop().set_exception_handler(_complain)
        self.is_up.set()


def _complain(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    logger.warning("the server of programs: %s", context.get("exception") or context.get("message"))


def _answering(serve: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            return await serve(request)
        except Exception as error:
            return refuse(refusal_of(error))

    return answer
