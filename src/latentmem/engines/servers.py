"""Servers that serve the same model: which one is asked, and what happens when one is down, slow, full or wrong."""

import http.client
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed, wait
from contextlib import suppress
from dataclasses import replace
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from latentmem.engines.answers import BadAnswer, Refused, refusal
from latentmem.errors import EngineError
from latentmem.models.agent import Sampled
from latentmem.outside import one_line
from latentmem.posting import TooLong, ask

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R", covariant=True)

MAX_ANSWER_BYTES = 64 << 20
REST_SECONDS = 10.0
"""How long a server that failed is asked only if no other is left."""
MAX_PAUSE_SECONDS = 30.0
_PATIENT_STATUSES = (408, 425, 429)
"""Client error statuses after which asking again may succeed."""


class Abandoned(Exception):  # noqa: N818 - names what happened to a request
    """The caller no longer wants the answer."""


class Call:
    """Some requests that belong together; all of them can be ended early from another thread."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []

    def hold(self, opened: socket.socket) -> None:
        """Remember a connection.

        Raises:
            Abandoned: the call has ended.
        """
        with self._lock:
            if self._ended.is_set():
                raise Abandoned
            self._sockets.append(opened)

    def pause(self, seconds: float) -> None:
        """Wait.

        Raises:
            Abandoned: the call has ended, before or meanwhile.
        """
        if self._ended.wait(seconds):
            raise Abandoned

    def end(self) -> None:
        """End all requests; each raises `Abandoned`."""
        with self._lock:
            self._ended.set()
            for opened in self._sockets:
                with suppress(OSError):  # it is closed already
                    opened.shutdown(socket.SHUT_RDWR)


def ask_all(pool: Executor, ask: Callable[[int, Call], Sampled], num_prompts: int) -> list[Sampled]:
    """Ask for the responses to prompts at the same time, and return them in their order, with how long each waited.

    Args:
        pool: runs what is asked.
        ask: is called with the number of a prompt, from 0, and the call that all belong to.
        num_prompts: how many there are.

    Raises:
        Exception: what the first prompt that fails raises; the others are ended.
    """
    began, call = time.perf_counter(), Call()

    def ask_one(number: int) -> Sampled:
        waited = time.perf_counter() - began
        return replace(ask(number, call), queue_seconds=waited)

    waiting = [pool.submit(ask_one, number) for number in range(num_prompts)]
    try:
        for one in as_completed(waiting):
            one.result()
    except BaseException:
        for one in waiting:
            one.cancel()
        call.end()
        wait(waiting)
        raise
    return [one.result() for one in waiting]


class Stream(Protocol[R]):
    """Reads one answer as it comes."""

    def take(self, block: bytes) -> bool:
        """Take the next bytes, and return whether no more are needed.

        Raises:
            BadAnswer: it is not what was asked for.
        """

    def result(self) -> R:
        """Return what was read.

        Raises:
            BadAnswer: something is missing.
        """


class Servers:
    """A list of addresses; many threads may ask at the same time."""

    def __init__(
        self,
        urls: Sequence[str],
        timeout_seconds: float,
        retries: int,
        backoff_seconds: float = 0.5,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            urls: addresses; the path of a request is put behind them.
            timeout_seconds: wall-clock limit of one attempt, from connecting to the last byte.
            retries: attempts after the first.
            backoff_seconds: pause before the first retry at an address that just failed; each further pause is twice as
                long, at most `MAX_PAUSE_SECONDS`.
            headers: sent with each request, such as a key.
        """
        self.urls = [url.rstrip("/") for url in urls]
        self.timeout_seconds = timeout_seconds
        self.retries = retries
        self.backoff_seconds = backoff_seconds
        secure = any(urlsplit(url).scheme == "https" for url in urls)
        self._tls = ssl.create_default_context() if secure else None
        self._headers = headers
        self._resting: dict[str, float] = {}

    def insist(self, path: str, request: bytes, home: int, read: Callable[[bytes], T], call: Call) -> T:
        """Ask until a server gives an answer that can be read.

        Args:
            path: the part of the address behind the server.
            request: the body, in JSON.
            home: any number that requests which begin alike share; they go to one server while it answers.
            read: reads the answer, or raises `BadAnswer`.
            call: what the request belongs to.

        Raises:
            EngineError: no attempt got a usable answer, or a server refuses the request.
            Abandoned: the call has ended.
        """
        return self._insist(home, lambda url: read(self.once(url, path, request, call)), call)

    def insist_stream(self, path: str, request: bytes, home: int, begin: Callable[[], Stream[T]], call: Call) -> T:
        """Do what `insist` does with an answer that is read piece by piece; `begin` makes what reads one attempt."""

        def attempt(url: str) -> T:
            stream = begin()
            self.once(url, path, request, call, stream.take)
            return stream.result()

        return self._insist(home, attempt, call)

    def _insist(self, home: int, attempt: Callable[[str], T], call: Call) -> T:
        pauses = 0
        for number in range(self.retries + 1):
            url, is_fresh = self._choose(home + number, home)
            if number and not is_fresh:
                call.pause(min(self.backoff_seconds * 2**pauses, MAX_PAUSE_SECONDS))
                pauses += 1
            try:
                return attempt(url)
            except Refused as error:
                raise EngineError(f"{url}: the server refuses the request: {error}") from None
            except BadAnswer as error:
                cause = error
                self._let_rest(url, cause)
        raise EngineError(
            f"{url}: no usable answer after {self.retries + 1} attempts ({cause}); see to the server "
            "(`latentmem engine check` looks at those of vLLM), and run the same command again"
        )

    def once(
        self, url: str, path: str, request: bytes | None, call: Call, take: Callable[[bytes], bool] | None = None
    ) -> bytes:
        """Make one attempt at one address and return the body of the answer; with `take`, give it the body.

        Raises:
            BadAnswer: there is none; a `Refused` says that asking again is of no use.
            Abandoned: the call has ended.
        """
        tls = self._tls if url.startswith("https:") else None
        try:
            status, body = ask(
                f"{url}{path}", request, self.timeout_seconds, MAX_ANSWER_BYTES, tls, call.hold, self._headers, take
            )
        except (OSError, http.client.HTTPException, TooLong) as error:
            call.pause(0)  # the caller may have shut the connection
            if isinstance(error, TimeoutError):
                raise BadAnswer(f"no whole answer within {self.timeout_seconds:g} s") from None
            raise BadAnswer(f"{type(error).__name__}: {one_line(str(error))}") from None
        if status != 200:
            said = refusal(body)
            refused = 400 <= status < 500 and status not in _PATIENT_STATUSES
            raise (Refused if refused else BadAnswer)(f"status {status}: {said}")
        return body

    def _choose(self, next_one: int, home: int) -> tuple[str, bool]:
        """Return an address, and whether it is not resting: the home address, or the next that is not."""
        now = time.monotonic()
        for i in range(len(self.urls)):
            url = self.urls[(home + i) % len(self.urls)]
            if self._resting.get(url, 0.0) <= now:
                return url, True
        return self.urls[next_one % len(self.urls)], False

    def _let_rest(self, url: str, cause: BadAnswer) -> None:
        now = time.monotonic()
        if self._resting.get(url, 0.0) <= now:
            logger.warning("%s gives no usable answer (%s); what it was asked is asked again", url, cause)
        self._resting[url] = now + REST_SECONDS
