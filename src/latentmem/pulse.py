"""Notice that a process on another host is gone without a word, as after a power cut or on a broken network.

A process that dies closes its connections, and the others see that at once. A host that falls silent closes nothing.
The others would wait for it for days, because a slow process is no error. So each process counts up a number in the
launcher's store, from a thread that goes on beside any work, and looks at the numbers of the others.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Protocol

from torch.distributed import TCPStore  # type: ignore[attr-defined]

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 120.0
"""A process whose number stays the same for this long is gone. Nothing that we call holds Python's lock so long."""
GONE = "give the same command again, with the processes that are left or with new ones; it goes on from what was saved"
_OVER = b"over"


class Store(Protocol):
    """What is used of torch's store."""

    def set(self, key: str, value: str) -> None:
        """Set a value."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are set."""

    def get(self, key: str) -> bytes:
        """Return a value; waits for it if it is not set."""


class Pulse:
    """The sign of life of one process, and what it knows of the others'."""

    def __init__(self, store: Store, rank: int, size: int, lost: Callable[[list[int]], object]) -> None:
        """Take the store.

        Args:
            store: all processes see it.
            rank: number of this process.
            size: number of processes.
            lost: gets the numbers of the processes that are gone, once.
        """
        self.store, self.rank, self.lost = store, rank, lost
        self.count = 0
        self.heard = {other: time.monotonic() for other in range(size) if other != rank}
        """When each other process that has not ended was last heard of."""
        self._numbers: dict[int, bytes] = {}
        self._ended = threading.Event()

    def start(self) -> None:
        """Beat and watch until the process ends."""
        # Two threads, because the store itself may be on the host that is gone, and then a call to it never returns.
        threading.Thread(target=self._go_on, args=(self.beat,), daemon=True).start()
        threading.Thread(target=self._go_on, args=(self.watch,), daemon=True).start()
        atexit.register(self.end)

    def beat(self) -> None:
        """Give a sign of life, and look for those of the others."""
        self.count += 1
        self.store.set(_key(self.rank), str(self.count))
        for other in list(self.heard):
            number = self.store.get(_key(other)) if self.store.check([_key(other)]) else b""
            if number == _OVER:
                del self.heard[other]
            elif number != self._numbers.get(other, b""):
                self._numbers[other], self.heard[other] = number, time.monotonic()

    def watch(self) -> None:
        """Call `lost` if a process has been silent for too long."""
        now = time.monotonic()
        silent = [other for other, heard in list(self.heard.items()) if now - heard > SILENCE_SECONDS]
        if silent:
            self._ended.set()
            self.lost(silent)

    def end(self) -> None:
        """Tell the others that this process ends as it should."""
        self._ended.set()
        teller = threading.Thread(target=self._tell_end, daemon=True)
        teller.start()
        teller.join(BEAT_SECONDS)

    def _tell_end(self) -> None:
        with suppress(RuntimeError):  # the process that kept the store may have ended already
            self.store.set(_key(self.rank), _OVER.decode())

    def _go_on(self, act: Callable[[], None]) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(RuntimeError):  # no answer of the store; if that lasts, nobody is heard of
                act()


def watch_others(rank: int, size: int) -> None:
    """Begin to give signs of life and to watch for those of the others; end this process when one is gone."""
    where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(where, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SILENCE_SECONDS))
    Pulse(store, rank, size, _leave).start()


def _leave(silent: list[int]) -> None:
    """End this process, whose main thread waits for those that are gone and cannot be woken."""
    names = ", ".join(map(str, silent))
    sys.stdout.flush()
    sys.stderr.write(
        f"latentmem: no sign of life of process {names} for {SILENCE_SECONDS:g} seconds: its host or the network is "
        f"gone; {GONE}\n"
    )
    sys.stderr.flush()
    os._exit(2)


def _key(rank: int) -> str:
    return f"latentmem/pulse/{rank}"
