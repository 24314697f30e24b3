"""Passages over HTTP in the protocol of Search-R1, so that either side can be replaced by Search-R1's.

    POST /retrieve   {"queries": [text, ...], "topk": n, "return_scores": bool}
        200          {"result": [[{"document": {"id", "contents"}, "score": x}, ...], ...]}, one list per query;
                     without scores, the lists hold the documents themselves
    GET  /health     {"status": "ok", "passages": N, "method": ...}

The fields are those of `search_r1/search/retrieval_server.py` in PeterGriffinJin/Search-R1. A bad request is answered
by 4xx and `{"error": one line}`. The port is taken first and opened last: while an index is being made, a client that
connects is refused, and never served from a part of the index.
"""

import errno
import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentmem.errors import DataError, RetrieverError
from latentmem.models.embedder import Embedder
from latentmem.server.corpus import Corpus
from latentmem.server.passage_index import Hits, Method, Search, open_search

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route
except ImportError as error:
    raise RetrieverError(f"serving needs the package {error.name}; pip install 'latentmem[retriever]'") from None

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
MAX_QUERIES = 256
MAX_QUERY_CHARACTERS = 4096
MAX_TOPK = 100
DEFAULT_TOPK = 3
_BACKLOG = 256


class _Request(BaseModel):
    """The fields that are read of a request; other fields are ignored."""

    model_config = ConfigDict(strict=True)
    queries: list[str] = Field(min_length=1, max_length=MAX_QUERIES)
    topk: int | None = Field(default=None, ge=1, le=MAX_TOPK)
    return_scores: bool = False


def create_app(corpus: Corpus, search: Search, method: Method) -> Starlette:
    """Make the server from a corpus and a search over it."""

    async def retrieve(request: Request) -> JSONResponse:
        asked = _read(await _body(request))
        try:
            result = await run_in_threadpool(answer, asked)
        except DataError as error:  # the corpus was changed while we served it
            raise HTTPException(503, str(error)) from None
        return JSONResponse({"result": result})

    def answer(asked: _Request) -> list[list[dict[str, Any]]]:
        found = search(asked.queries, asked.topk or DEFAULT_TOPK)
        return [_documents(corpus, hits, asked.return_scores) for hits in found]

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "passages": len(corpus), "method": method})

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    return Starlette(
        routes=[Route("/retrieve", retrieve, methods=["POST"]), Route("/health", health)],
        exception_handlers={HTTPException: refuse},
    )


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request is longer than {MAX_BODY_BYTES} bytes; send fewer queries at once")
    return body


def _read(body: bytes) -> _Request:
    try:
        asked = _Request.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the request"
        raise HTTPException(400, f"{where}: {first['msg']}") from None
    for i, query in enumerate(asked.queries):
        if not query.strip():
            raise HTTPException(400, f"queries.{i}: is blank; expected text")
        if len(query) > MAX_QUERY_CHARACTERS:
            raise HTTPException(400, f"queries.{i}: has {len(query)} characters; at most {MAX_QUERY_CHARACTERS}")
    return asked


def _documents(corpus: Corpus, hits: Hits, with_scores: bool) -> list[dict[str, Any]]:
    passages = [(corpus[position], score) for position, score in hits]
    documents = [({"id": passage.id, "contents": passage.contents}, score) for passage, score in passages]
    return [{"document": d, "score": score} if with_scores else d for d, score in documents]


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
    with _take_port(host, port) as listener, closing(Corpus(path, on_bad_row)) as corpus:
        if corpus.num_bad:
            logger.warning("%s: %d rows are left out (%s)", path, corpus.num_bad, corpus.bad_rows)
        embed = None if method == "bm25" else Embedder(embedder, batch_size=32)
        search = open_search(corpus, method, index or path.with_name(f"{path.name}.index"), embedder, embed)
        app = create_app(corpus, search, method)
        # On a signal, uvicorn finishes its open answers and raises the signal again, for this handler.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        try:
            listener.listen(_BACKLOG)
        except OSError as error:
            raise _no_port(host, port, error) from None
        shown = f"[{host}]" if ":" in host else host
        announce(
            f"retriever: {len(corpus):,} passages by {method} at http://{shown}:{listener.getsockname()[1]}/retrieve"
        )
        uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, backlog=_BACKLOG)
        ).run(sockets=[listener])


def _take_port(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address but does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _no_port(host, port, error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _no_port(host, port, error) from None
    return listener


def _no_port(host: str, port: int, error: OSError) -> RetrieverError:
    if error.errno == errno.EADDRINUSE:
        return RetrieverError(f"port {port} of {host} is taken by another program; give another with --port")
    return RetrieverError(f"cannot listen on {host}, port {port} ({error.strerror}); see --host and --port")
