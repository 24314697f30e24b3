"""The routes of the OpenAI-compatible endpoints over a desk; they translate and call.

Each endpoint stands under `/v1`, and for programs of which only the base URL can be set under `/agents/{agent}/v1`,
`/sessions/{sid}/v1` and `/sessions/{sid}/agents/{agent}/v1`.
"""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from latentmem.outside import one_line
from latentmem.serving.asks import Answer, Ask, Choice, Desk, Refused, Turn, Who
from latentmem.serving.face.body import read_body
from latentmem.serving.face.chat_answer import ChatStream, chat_object
from latentmem.serving.face.chat_request import ChatRequest, read_chat
from latentmem.serving.face.described import answers, path_parameters, refusals, request_body
from latentmem.serving.face.errors import error_of, refusal_of, refuse
from latentmem.serving.face.own_part import headers_of
from latentmem.serving.face.responses_answer import ResponsesStream, responses_object
from latentmem.serving.face.responses_request import ResponsesRequest, go_on, read_responses
from latentmem.serving.face.speaking import GONE, Speaking, until_gone
from latentmem.serving.identity import who_speaks
from latentmem.serving.reading import TextOf
from latentmem.serving.tools import Piece

BASES = ("", "/agents/{agent}", "/sessions/{sid}", "/sessions/{sid}/agents/{agent}")
"""What may stand before `/v1`."""
Caller = Callable[[Request], Awaitable[Who]]
"""A function: the request -> what its API key, or its session's own token, tells. It raises `Refused`."""
STARTED = int(time.time())
MAX_RETRY_KEY = 255


class Stream(Protocol):
    """How an endpoint writes an answer bit by bit."""

    def begin(self) -> Any:
        """Return what stands before all else."""

    def say(self, number: int, piece: Piece) -> Any:
        """Return what a piece of a choice adds."""

    def end_choice(self, number: int, choice: Choice) -> Any:
        """Return what stands after the last piece of a choice."""

    def end(self, answer: Answer) -> Any:
        """Return what stands after all is kept."""

    def fail(self, error: dict[str, Any]) -> Any:
        """Return what ends a stream that fails."""


@dataclass(frozen=True)
class Form:
    """What makes an endpoint out of the one way in which all are served."""

    prefix: str
    """Of the ids of its answers."""
    summary: str
    kind: str
    """What its answer says it is."""
    listed: str
    """The field of its answer that holds what was said."""
    body: type[BaseModel]
    """What its body is read by."""
    read: Callable[[dict[str, Any], str], tuple[Ask, Any]]
    write: Callable[[Answer, Ask, TextOf], dict[str, Any]]
    stream: Callable[[Ask, str, int, TextOf], Stream]


FORMS = {
    "/v1/chat/completions": Form(
        "chatcmpl-",
        "Continue a chat.",
        "chat.completion",
        "choices",
        ChatRequest,
        read_chat,
        chat_object,
        ChatStream,
    ),
    "/v1/responses": Form(
        "resp_",
        "Continue a chat, in the form of the Responses API.",
        "response",
        "output",
        ResponsesRequest,
        read_responses,
        responses_object,
        ResponsesStream,
    ),
}


async def nobody(request: Request) -> Who:
    """Return what is known where there are no keys."""
    del request
    return Who()


def openai_routes(desk: Desk, pool: Executor, caller: Caller = nobody) -> list[BaseRoute]:
    """Make the routes.

    Args:
        desk: admits requests.
        pool: threads in which turns speak; a request takes one for each of its choices.
        caller: see `Caller`.
    """

    async def models(request: Request) -> Response:
        try:
            await caller(request)
        except Refused as refused:
            return refuse(refused)
        return JSONResponse({"object": "list", "data": [_model(name) for name in desk.models()]})

    async def model(request: Request) -> Response:
        name = request.path_params["model"]
        try:
            await caller(request)
            if name not in desk.models():
                raise Refused(404, f"there is no model {one_line(name)!r}", "model", code="model_not_found")
        except Refused as refused:
            return refuse(refused)
        return JSONResponse(_model(name))

    def endpoint(form: Form) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                return await serve(request, desk, pool, caller, form)
            except Exception as error:
                return refuse(refusal_of(error))

        return answer

    router = APIRouter(tags=["agents"], route_class=_PlainRoute)
    for base in BASES:
        for path, form in FORMS.items():
            router.add_api_route(
                f"{base}{path}",
                endpoint(form),
                methods=["POST"],
                summary=form.summary,
                responses=answers(form.kind, form.listed),
                response_class=Response,
                openapi_extra={"requestBody": request_body(form.body), "parameters": path_parameters(base)},
            )
        for path, listing, said in (
            (f"{base}/v1/models", models, "List the models."),
            (f"{base}/v1/models/{{model:path}}", model, "Tell about a model."),
        ):
            router.add_api_route(
                path,
                listing,
                summary=said,
                responses=refusals(),
                openapi_extra={"parameters": path_parameters(path)},
            )
    return list(router.routes)


class _PlainRoute(APIRoute):
    """A route that FastAPI describes and does not read: the body is read by `read_body`, and any app may hold it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the endpoint itself."""
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


async def serve(request: Request, desk: Desk, pool: Executor, caller: Caller, form: Form) -> Response:
    """Answer one request.

    Raises:
        Exception: see `errors.refusal_of`.
    """
    known = await caller(request)
    values, raw = await read_body(request)
    ask, body = form.read(values, f"{form.prefix}{secrets.token_hex(16)}")
    who, memory = who_speaks(known, request.headers, values, request.path_params)
    ask = replace(ask, memory=memory or ask.memory, **_sent_before(request.headers, raw))
    if isinstance(body, ResponsesRequest) and body.previous_response_id is not None:
        who, ask = await _continued(desk, who, ask, body)
    gone = asyncio.ensure_future(until_gone(request))
    try:
        turn = await _unless_gone(desk.admit(who, ask), gone)
        try:
            speaking = Speaking(turn, ask, pool)
        except RuntimeError:  # the pool takes nothing any more
            turn.lost("the server ends")
            raise Refused(503, "the server ends; send the request again", retry_after=1) from None
    except BaseException:
        gone.cancel()
        raise
    gone.add_done_callback(partial(_tell, speaking))
    if not ask.stream:
        try:
            async for _ in speaking.pieces():
                pass
        finally:
            gone.cancel()
            speaking.give_up("the request was ended")
        assert speaking.answer is not None
        answer = form.write(speaking.answer, ask, turn.text_of)
        return JSONResponse(answer, headers=headers_of(turn, speaking.answer, speaking.answer.id))
    return await _streamed(speaking, form, gone)


async def _streamed(speaking: Speaking, form: Form, gone: asyncio.Future[None]) -> Response:
    """Return the response that streams; what fails before the first piece fails as it does without a stream."""
    turn, known = speaking.turn, speaking.turn.known
    call = speaking.ask.call if known is None else known.id
    created = int(time.time()) if known is None else known.created
    stream = form.stream(speaking.ask, call, created, turn.text_of)
    pieces = speaking.pieces()
    try:
        first = await anext(pieces)
    except BaseException:
        gone.cancel()
        speaking.give_up("the request failed")
        raise

    async def events() -> AsyncIterator[bytes]:
        try:
            for event in stream.begin():
                yield event
            for event in _of(stream, *first):
                yield event
            async for number, piece in pieces:
                for event in _of(stream, number, piece):
                    yield event
            assert speaking.answer is not None
            for event in stream.end(speaking.answer):
                yield event
        except Exception as error:
            refused = refusal_of(error)
            if refused.status != GONE:
                for event in stream.fail(error_of(refused)):
                    yield event

    return EventStream(events(), speaking, gone, headers_of(turn, known, call))


def _of(stream: Stream, number: int, piece: Piece | Choice) -> Any:
    return stream.end_choice(number, piece) if isinstance(piece, Choice) else stream.say(number, piece)


class EventStream(StreamingResponse):
    """A stream of events; a client that goes away is told to the turn at once."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        speaking: Speaking,
        gone: asyncio.Future[None],
        headers: Mapping[str, str],
    ) -> None:
        self._speaking, self._gone = speaking, gone
        more = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers={**headers, **more}, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, as long as somebody reads them."""
        try:
            await self.stream_response(send)
        except (OSError, ClientDisconnect):
            pass  # nobody reads
        finally:
            self._gone.cancel()
            self._speaking.give_up("the client went away")


def _tell(speaking: Speaking, gone: asyncio.Future[None]) -> None:
    if not gone.cancelled():
        speaking.give_up("the client went away")


async def _unless_gone(admitting: Any, gone: asyncio.Future[None]) -> Turn:
    """Wait for a place, and stop waiting when the client goes away."""
    waiting: asyncio.Task[Turn] = asyncio.ensure_future(admitting)
    try:
        await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        waiting.add_done_callback(_drop)
        waiting.cancel()
        raise
    if waiting.done():
        return waiting.result()
    waiting.add_done_callback(_drop)
    waiting.cancel()
    raise Refused(GONE, "the client went away")


def _drop(waiting: asyncio.Task[Turn]) -> None:
    """Lose a turn that was admitted just when nobody waited for it any more."""
    if not waiting.cancelled() and waiting.exception() is None:
        waiting.result().lost("the client went away")


async def _continued(desk: Desk, who: Who, ask: Ask, body: ResponsesRequest) -> tuple[Who, Ask]:
    """Return who speaks and what is asked, after the response that is named."""
    name = str(body.previous_response_id)
    earlier = await desk.earlier(who, name)
    if earlier is None:
        raise Refused(
            400,
            f"previous_response_id: there is no response {name!r} to go on from",
            "previous_response_id",
            code="previous_response_not_found",
        )
    conversation = go_on(earlier.conversation, ask.conversation, body.instructions is not None)
    return replace(who, session=who.session or earlier.session), replace(ask, conversation=conversation)


def _sent_before(headers: Mapping[str, str], raw: bytes) -> dict[str, Any]:
    """Return what the request tells about having been sent before."""
    key = headers.get("idempotency-key", "").strip()
    if len(key) > MAX_RETRY_KEY:
        raise Refused(400, f"Idempotency-Key: at most {MAX_RETRY_KEY} characters are read", "Idempotency-Key")
    count = headers.get("x-stainless-retry-count", "0").strip()
    return {
        "retry_key": key or None,
        "digest": hashlib.sha256(raw).hexdigest(),
        "sent_again": count.isdecimal() and int(count[:4]) > 0,
    }


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "latentmem"}
