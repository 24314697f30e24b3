"""Places for requests that are answered at the same time, and a queue before them that never grows without bound."""

import asyncio
from collections import deque
from dataclasses import dataclass

from latentmem.serving.asks import Refused

RETRY_SECONDS = 1.0
"""After how long a request is told to come again when the queue is full."""


@dataclass(frozen=True)
class Load:
    """How busy the places are."""

    taken: int
    waiting: int


class Places:
    """A number of places; who comes first is served first. All but `free` belong to one event loop."""

    def __init__(self, number: int, queue: int) -> None:
        self._free = number
        self._number = number
        self._queue = queue
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def load(self) -> Load:
        """How busy they are."""
        return Load(self._number - self._free, len(self._waiting))

    async def take(self) -> None:
        """Wait for a place and take it.

        Raises:
            Refused: the queue is full.
        """
        if self._free and not self._waiting:
            self._free -= 1
            return
        if len(self._waiting) >= self._queue:
            raise Refused(429, "the server is busy; send the request again later", retry_after=RETRY_SECONDS)
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.give_back()  # it was handed over while its client went away
            else:
                self._waiting.remove(mine)
            raise

    def give_back(self) -> None:
        """Hand a place to whoever waits longest, or keep it free."""
        while self._waiting:
            next_one = self._waiting.popleft()
            if not next_one.done():
                next_one.set_result(None)
                return
        self._free += 1
