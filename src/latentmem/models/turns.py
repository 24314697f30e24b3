"""A lock that threads get in the order in which they asked for it.

One thread may hold it several times over. With a common lock, a thread that samples token by token would take it back
each time before any other could.
"""

import threading
from collections import deque


class InTurn:
    """A reentrant lock that is handed on in the order of asking."""

    def __init__(self) -> None:
        self._state = threading.Lock()
        self._holder: int | None = None
        self._depth = 0
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._state:
            if self._holder in (me, None):  # it is handed on, never put down, while somebody waits
                self._holder = me
                self._depth += 1
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append((me, gate))
        try:
            gate.acquire()
        except BaseException:  # Ctrl-C
            with self._state:
                if (me, gate) in self._waiting:
                    self._waiting.remove((me, gate))
                else:
                    self._hand_on()
            raise

    def __exit__(self, *_: object) -> None:
        with self._state:
            self._depth -= 1
            if not self._depth:
                self._hand_on()

    def _hand_on(self) -> None:
        self._holder, self._depth = None, 0
        if self._waiting:
            self._holder, gate = self._waiting.popleft()
            self._depth = 1
            gate.release()
