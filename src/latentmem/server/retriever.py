"""Passages over HTTP in the protocol of Search-R1, so that either side can be replaced by Search-R1's.

    POST /retrieve   {"queries": [text, ...], "topk": n, "return_scores": bool}
        200          {"result": [[{"document": {"id", "contents"}, "score": x}, ...], ...]}, one list per query;
                     without scores, the lists hold the documents themselves
    GET  /health     {"status": "ok", "passages": N, "method": ...}

The fields are those of `search_r1/search/retrieval_server.py` in PeterGriffinJin/Search-R1, whose client sends all
queries of a step at once, blank ones too: a blank query finds nothing, and bytes alone bound a request. A bad one is
answered by 4xx and `{"error": one line}`. The port is taken first and opened last: while an index is being made,
whoever connects is refused, and never served a part of it.
"""

import asyncio
import ipaddress
import json
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentmem.errors import DataError, RetrieverError
from latentmem.listening import BACKLOG, listen, no_port, take_port
from latentmem.models.embedder import Embedder
from latentmem.server.corpus import Corpus
from latentmem.server.passage_index import Hits, Method, Search, open_search

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise RetrieverError(f"serving needs the package {error.name}; pip install 'latentmem[retriever]'") from None
logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 << 20
MAX_ANSWER_BYTES = 128 << 20
MAX_QUERY_CHARACTERS = 4096
"""What is searched for of a longer query."""
MAX_TOPK = 100
DEFAULT_TOPK = 3
_GONE = 499
"""Status that nobody reads."""
_AT_ONCE = 64
"""Queries searched for before anybody else gets a turn, and before it is seen whether the client is still there."""


class _Request(BaseModel):
    """The fields that are read of a request; other fields are ignored."""

    model_config = ConfigDict(strict=True)
    queries: list[str] = Field(min_length=1)
    topk: int | None = Field(default=None, ge=1, le=MAX_TOPK)
    return_scores: bool = False


def create_app(corpus: Corpus, search: Search, method: Method) -> Starlette:
    """Make the server from a corpus and a search over it."""

    async def retrieve(request: Request) -> Response:
        asked = _read(await _body(request))
        lists: list[bytes] = []
        num_bytes = 0
        for start in range(0, len(asked.queries), _AT_ONCE):
            if await request.is_disconnected():
                raise HTTPException(_GONE, "the client has gone away")
            try:
                lists += await run_in_threadpool(answer, asked, asked.queries[start : start + _AT_ONCE])
            except (DataError, RetrieverError) as error:  # the corpus or the index was changed under our hands
                raise HTTPException(503, str(error)) from None
            except asyncio.CancelledError:
                raise HTTPException(503, "the server ends") from None
            num_bytes += sum(map(len, lists[start:]))
            if num_bytes > MAX_ANSWER_BYTES:
                raise HTTPException(413, f"the answer is longer than {MAX_ANSWER_BYTES} bytes; {_FEWER}")
        return Response(b'{"result":[' + b",".join(lists) + b"]}", media_type="application/json")

    def answer(asked: _Request, queries: list[str]) -> list[bytes]:
        """A list of documents in JSON for each query."""
        said = [query[:MAX_QUERY_CHARACTERS] for query in queries if query.strip()]
        found = iter(search(said, asked.topk or DEFAULT_TOPK) if said else ())
        hits = [next(found) if query.strip() else [] for query in queries]
        return [_json(_documents(corpus, each, asked.return_scores)) for each in hits]

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "passages": len(corpus), "method": method})

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    return Starlette(
        routes=[Route("/retrieve", retrieve, methods=["POST"]), Route("/health", health)],
        exception_handlers={HTTPException: refuse},
    )


_FEWER = "send fewer queries at once"


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise HTTPException(413, f"the request is longer than {MAX_BODY_BYTES} bytes; {_FEWER}")
    except ClientDisconnect:
        raise HTTPException(_GONE, "the client has gone away") from None
    return bytes(body)


def _read(body: bytes) -> _Request:
    try:
        return _Request.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the request"
        raise HTTPException(400, f"{where}: {first['msg']}") from None


def _documents(corpus: Corpus, hits: Hits, with_scores: bool) -> list[dict[str, Any]]:
    passages = [(corpus[position], score) for position, score in hits]
    documents = [({"id": passage.id, "contents": passage.contents}, score) for passage, score in passages]
    return [{"document": d, "score": score} if with_scores else d for d, score in documents]


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def serve(
    path: Path,
    *,
    method: Method = "bm25",
    host: str = "127.0.0.1",
    port: int = 8000,
    index: Path | None = None,
    embedder: str = "all-minilm-l6-v2",
    on_bad_row: Literal["error", "skip"] = "error",
    announce: Callable[[str], object],
) -> None:
    """Index a corpus, or find its index, and answer requests until SIGTERM or SIGINT.

    Args:
        path: the corpus, JSON Lines.
        method: how passages are found.
        host: address to listen on.
        port: port to listen on; 0 takes a free one, which is announced.
        index: folder of the index; None is CORPUS.index beside the corpus.
        embedder: for dense search, as `bank.embedder` in a configuration.
        on_bad_row: `skip` leaves out rows that are not passages, and says which.
        announce: called once it can answer, with one line that says where.

    Raises:
        DataError: the corpus cannot be read or holds bad rows.
        RetrieverError: the port is taken, the index cannot be written, or bm25s is not installed.
        ModelError: the embedder cannot be loaded.
    """
    with take_port(host, port, RetrieverError) as listener, closing(Corpus(path, on_bad_row)) as corpus:
        if corpus.num_bad:
            logger.warning("%s: %d rows are left out (%s)", path, corpus.num_bad, corpus.bad_rows)
        embed = None if method == "bm25" else Embedder(embedder, batch_size=32)
        search = open_search(corpus, method, index or path.with_name(f"{path.name}.index"), embedder, embed)
        app = create_app(corpus, search, method)
        # On a signal, uvicorn finishes its open answers and raises the signal again, for this handler.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        try:
            listener.listen(BACKLOG)
        except OSError as error:
            raise no_port(host, port, error, RetrieverError) from None
        address, taken, *_ = listener.getsockname()
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            logger.warning(
                "%s is open to anyone who can reach this machine, without a login; serve on 127.0.0.1, or "
                "behind a proxy that asks",
                address,
            )
        shown = f"[{host}]" if ":" in host else host
        announce(f"retriever: {len(corpus):,} passages by {method} at http://{shown}:{taken}/retrieve")
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=5,
            backlog=BACKLOG,
        )
        asyncio.run(listen(uvicorn.Server(config), listener))
