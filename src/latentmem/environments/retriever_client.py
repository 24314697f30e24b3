"""Ask a server for passages by the Search-R1 protocol; the result is an answer, or an error that tells the reason.

"Nothing was found" is an answer of the server. It never stands for a server that is down, slow or sends nonsense: a
team must not learn that searching is useless because a port was closed. Only the standard library is used, with a fresh
connection for each request. Proxies in the environment are ignored, because the server is usually nearby.
"""

import http.client
import json
import logging
import ssl
import threading
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from latentmem.errors import RetrieverError
from latentmem.outside import one_line, well_formed
from latentmem.posting import TooLong, ask

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 16_384
"""Number of answers kept; the least recently used ones are dropped."""
MAX_ANSWER_BYTES = 16 << 20
MAX_TITLE_CHARACTERS = 200
"""What is shown of a longer title."""
_PATIENT_STATUSES = (408, 425, 429)
"""Client error statuses after which asking again may succeed."""


@dataclass(frozen=True)
class Passage:
    """What a server found; the text may come from anybody."""

    title: str
    text: str


class RetrievalFailed(Exception):  # noqa: N818 - names what happened to a step, and is shown there
    """The server gave no usable answer to any attempt; no mistake of the user, so only the episode ends."""


class _BadAnswer(Exception):  # noqa: N818
    """One attempt failed; another may succeed."""


class _Refused(_BadAnswer):
    """The server refuses this request, and will refuse it again."""


@dataclass(frozen=True)
class Counts:
    """What a client has done so far."""

    requests: int = 0
    """Requests sent, including repetitions."""
    remembered: int = 0
    """Queries answered from memory."""
    retries: int = 0
    failures: int = 0
    """Queries given up."""


class RetrieverClient:
    """A client of one server, with one `topk`; many threads may use it."""

    def __init__(
        self, url: str, *, topk: int, timeout_seconds: float, retries: int, backoff_seconds: float = 0.5
    ) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            url: the server's address; `/retrieve` is added if it has no path.
            topk: number of passages asked for.
            timeout_seconds: wall-clock limit of one attempt, from connecting to the last byte.
            retries: attempts after the first.
            backoff_seconds: pause before the first retry; each further pause is twice as long.
        """
        parts = urlsplit(url)
        self.url = url if parts.path.strip("/") else f"{url.rstrip('/')}/retrieve"
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._topk = topk
        self._timeout_seconds = timeout_seconds
        self._retries = retries
        self._backoff_seconds = backoff_seconds
        self._answer = lru_cache(MAX_REMEMBERED)(self._insist)  # exceptions are not remembered
        self._counts = Counts()
        self._lock = threading.Lock()

    @property
    def counts(self) -> Counts:
        """The present counts."""
        return replace(self._counts, remembered=self._answer.cache_info().hits)

    def probe(self) -> None:
        """Ask once, so that a server that is down is reported before work begins.

        Raises:
            RetrieverError: the server gave no usable answer.
        """
        try:
            self._ask("probe")
        except _BadAnswer as error:
            raise RetrieverError(
                f"{self.url}: the search server gives no passages ({error}); start one with "
                "`latentmem retriever serve CORPUS`, or mend data.search"
            ) from None

    def retrieve(self, query: str) -> tuple[Passage, ...]:
        """Return the passages found, best first: at most `topk`, none if the server found none.

        Raises:
            RetrievalFailed: no attempt got a usable answer.
        """
        return self._answer(query)

    def _insist(self, query: str) -> tuple[Passage, ...]:
        for attempt in range(self._retries + 1):
            if attempt:
                self._count("retries")
                time.sleep(self._backoff_seconds * 2 ** (attempt - 1))
            try:
                return self._ask(query)
            except _BadAnswer as error:
                cause = error
                if isinstance(error, _Refused):
                    break
        failures = self._count("failures")
        message = f"{self.url}: no passages after {attempt + 1} attempts: {cause}"
        if failures in (1, 10, 100) or failures % 1000 == 0:  # each single failure is in its trajectory
            logger.warning("search failed (%d times so far): %s", failures, message)
        raise RetrievalFailed(message)

    def _count(self, name: str) -> int:
        with self._lock:
            value: int = getattr(self._counts, name) + 1
            self._counts = replace(self._counts, **{name: value})
        return value

    def _ask(self, query: str) -> tuple[Passage, ...]:
        """Make one attempt."""
        self._count("requests")
        request = json.dumps({"queries": [query], "topk": self._topk, "return_scores": True}).encode()
        try:
            status, body = ask(self.url, request, self._timeout_seconds, MAX_ANSWER_BYTES, self._tls)
        except TimeoutError:
            raise _BadAnswer(f"no whole answer within {self._timeout_seconds:g} s") from None
        except TooLong as error:
            raise _BadAnswer(str(error)) from None
        except (OSError, http.client.HTTPException) as error:
            raise _BadAnswer(f"{type(error).__name__}: {one_line(str(error))}") from None
        if status != 200:
            said = one_line(body[:800].decode("utf-8", "replace"))
            refused = 400 <= status < 500 and status not in _PATIENT_STATUSES
            raise (_Refused if refused else _BadAnswer)(f"status {status}: {said}")
        return _passages(body)[: self._topk]


def _passages(body: bytes) -> tuple[Passage, ...]:
    """Read the passages in an answer to one query that asked for scores."""
    try:
        answer: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise _BadAnswer(f"the answer is not JSON: {body[:80]!r}") from None
    try:
        (found,) = answer["result"]
        documents = [entry["document"] for entry in found]
        return tuple(_passage(document) for document in documents)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _BadAnswer(f"the answer is not of the Search-R1 protocol: {body[:80]!r}") from None


def _passage(document: dict[str, Any]) -> Passage:
    """The first line is the title where text follows it; a line that is too long for one, and not quoted, is text."""
    if "contents" not in document:
        title = document.get("title")
        return Passage("" if title is None else well_formed(title).strip(), well_formed(document["text"]).strip())
    contents = well_formed(document["contents"])
    title, _, text = contents.partition("\n")
    quoted = title.startswith('"') and title.endswith('"')
    if not text.strip() or (len(title) > MAX_TITLE_CHARACTERS and not quoted):
        return Passage("", contents.strip())
    return Passage(title.strip().strip('"'), text.strip())
