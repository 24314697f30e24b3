"""The application, made of parts: routes translate and call, and what may go wrong has a status and one line."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from http import HTTPStatus

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from latentmem.errors import LatentMemError
from latentmem.outside import one_line
from latentmem.serving.asks import Desk, Refused, Who
from latentmem.serving.desk import DRAIN_RETRY_SECONDS, ServingDesk, unstored
from latentmem.serving.document import openapi_of
from latentmem.serving.face.body import not_json
from latentmem.serving.face.errors import refuse
from latentmem.serving.face.fields import at_fault
from latentmem.serving.face.routes import openai_routes
from latentmem.serving.face.unknown import no_route
from latentmem.serving.operators.doors import DOORS
from latentmem.serving.sessions.endings import Endings
from latentmem.serving.sessions.forms import OTHER, REWARD
from latentmem.serving.sessions.routes import session_routes
from latentmem.serving.sessions.tokens import Tokens
from latentmem.serving.sessions.writer import StoreFailed

logger = logging.getLogger(__name__)

Authenticate = Callable[[Request], Awaitable[Who]]
"""A function: the request -> whose it is, by its API key or its session's own token. It raises `Refused`."""
_LOOK_SECONDS = 5.0
"""Between two looks at sessions that nobody uses any more."""
_FINISH_AGAIN_SECONDS = 60.0
"""After how long the end of a session that could not be stored is tried again."""


def create_app(
    desk: ServingDesk,
    endings: Endings,
    tokens: Tokens,
    *,
    authenticate: Authenticate | None = None,
    watched: Callable[[ServingDesk], Desk] = lambda desk: desk,
    routers: Iterable[APIRouter] = (),
) -> FastAPI:
    """Make the application.

    Args:
        desk: admits requests.
        endings: ends sessions.
        tokens: makes and reads the sessions' own tokens.
        authenticate: tells whose a request is; None: everybody is one tenant, and a session's own token tells its
            session.
        watched: puts somebody in front of the desk who keeps the books.
        routers: further routes.
    """
    pool = ThreadPoolExecutor(desk.parallel + 8, thread_name_prefix="turn")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(endings.resume)
        looking = asyncio.create_task(_look_after(endings))
        try:
            yield
        finally:
            looking.cancel()
            pool.shutdown(wait=True, cancel_futures=True)

    app = FastAPI(title="LatentMem", lifespan=lifespan, docs_url=None, redoc_url=None)
    whose = authenticate or _anybody(tokens)
    app.include_router(session_routes(desk, endings, tokens, whose))

    @app.get("/healthz", tags=["operators"])
    async def healthz() -> dict[str, str]:
        """Tell whether requests are taken."""
        desk.check_open()
        return {"status": "ok"}

    for router in routers:
        app.include_router(router)
    app.router.routes.extend(openai_routes(watched(desk), pool, whose))
    app.openapi = lambda: openapi_of(app)  # type: ignore[method-assign]
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(StoreFailed, _not_stored)
    app.add_exception_handler(LatentMemError, _not_now)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unknown)
    return app


def _anybody(tokens: Tokens) -> Authenticate:
    async def who(request: Request) -> Who:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        opened = tokens.read(token.strip()) if kind.lower() == "bearer" else None
        return Who() if opened is None else replace(Who(), session=opened.session)

    return who


async def _look_after(endings: Endings) -> None:
    """End sessions that nobody uses any more, until this is cancelled."""
    while True:
        await asyncio.sleep(min(_LOOK_SECONDS, endings.idle_seconds))
        try:
            await asyncio.to_thread(endings.end_idle)
            await asyncio.to_thread(endings.resume, time.time() - _FINISH_AGAIN_SECONDS)
        except (LatentMemError, StoreFailed) as error:
            logger.warning("sessions cannot be ended now: %s", error)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return refuse(error)


async def _not_stored(_: Request, error: Exception) -> Response:
    assert isinstance(error, StoreFailed)
    return refuse(unstored(error))


async def _not_now(_: Request, error: Exception) -> Response:
    """Tell that the bank does not take an episode now; it is kept, and tried again."""
    logger.warning("%s", error)
    full = "disk is full" in str(error)
    status = HTTPStatus.INSUFFICIENT_STORAGE if full else HTTPStatus.SERVICE_UNAVAILABLE
    what = "the disk is full" if full else "the bank cannot be used"
    return refuse(Refused(status, f"{what}; send the request again", retry_after=DRAIN_RETRY_SECONDS))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first, *_ = error.errors()
    (place, *path), body = first["loc"], error.body
    if first["type"] == "json_invalid":
        return refuse(Refused(400, f"the body is not valid JSON ({one_line(first['ctx']['error'])})"))
    if place == "body" and isinstance(body, bytes):
        return refuse(not_json(request))
    if place == "body" and not isinstance(body, dict):
        found = "missing" if body is None else f"a {type(body).__name__}"
        return refuse(Refused(400, f"the body is {found}; expected a JSON object"))
    values = body if place == "body" else dict.fromkeys(map(str, path))
    faults = [
        {**each, "loc": tuple(part for part in each["loc"][1:] if part not in (REWARD, OTHER))}
        for each in error.errors()
        if each["loc"][0] == place
    ]
    return refuse(at_fault(faults, values))


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    is_of_routing = error.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
    response: JSONResponse = refuse(
        no_route(request, DOORS, error.status_code) if is_of_routing else Refused(error.status_code, str(error.detail))
    )
    response.headers.update(error.headers or {})
    return response
