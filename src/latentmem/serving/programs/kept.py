"""A user's program while it runs: started under a keeper, read with a bound, and ended with all that it started.

The keeper (`environments.sandbox.keeper`) is the program's ancestor. Closing its standard input ends everything, from
any thread, and so does the death of this process.
"""

import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO

from latentmem.environments import sandbox
from latentmem.environments.sandbox.keeper import CANNOT_START, REAP_SECONDS

_START_KEEPER = "import sys; sys.path.append(sys.argv.pop(1)); import sandbox.keeper; sandbox.keeper.main()"
_ROOM = str(Path(sandbox.__path__[0]).parent)
MAX_OUTPUT = 1 << 20
"""Bytes that are kept of each of a program's outputs: the last ones."""
_READ = 1 << 16


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    status: int
    """Its exit status; 128 and the signal's number if a signal ended it."""
    stdout: str
    stderr: str
    """The ends of its outputs."""
    is_late: bool
    """Whether it was ended because its time was up."""

    @property
    def could_start(self) -> bool:
        """Whether there was anything to run."""
        return self.status != CANNOT_START


class KeptProgram:
    """A running program. Each of its functions may be called from any thread, `outcome` and `receive` from one."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        passed: Sequence[int] = (),
        captured: bool = True,
    ) -> None:
        """Start the program.

        Args:
            command: the program and its arguments; no shell reads them.
            environment: all of its environment variables.
            passed: descriptors that it inherits.
            captured: whether its outputs are read; otherwise they are dropped.
        """
        where = subprocess.PIPE if captured else subprocess.DEVNULL
        self._keeper = subprocess.Popen(  # noqa: S603 - the user's own program, as the configuration names it
            [sys.executable, "-I", "-S", "-c", _START_KEEPER, _ROOM, *command],
            stdin=subprocess.PIPE,
            stdout=where,
            stderr=where,
            env=dict(environment),
            pass_fds=tuple(passed),
            start_new_session=True,
        )
        self._closing = Lock()

    def end(self) -> None:
        """Let the keeper kill the program and all that it started; returns at once."""
        assert self._keeper.stdin is not None
        with self._closing:
            self._keeper.stdin.close()

    def outcome(self, seconds: float) -> Ended:
        """Read the outputs until the program and all that it started have ended, at most for so many seconds."""
        assert self._keeper.stdout is not None
        assert self._keeper.stderr is not None
        tails = {pipe.fileno(): _Tail() for pipe in (self._keeper.stdout, self._keeper.stderr)}
        deadline = time.monotonic() + seconds
        is_late = False
        with selectors.DefaultSelector() as waiting:
            for pipe in tails:
                waiting.register(pipe, selectors.EVENT_READ)
            while waiting.get_map():
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                for key, _ in ready:
                    if not tails[key.fd].read(key.fd):
                        waiting.unregister(key.fd)
                if time.monotonic() >= deadline:
                    if is_late:
                        break  # what holds the outputs open cannot be ended
                    is_late, deadline = True, time.monotonic() + REAP_SECONDS
                    self.end()
        status = self.close()
        texts = [tail.text for tail in tails.values()]
        return Ended(status, texts[0], texts[1], is_late)

    def close(self) -> int:
        """End the program if it still runs, and return its exit status."""
        self.end()
        try:
            status = self._keeper.wait(2 * REAP_SECONDS)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            status = self._keeper.wait()
        for pipe in (self._keeper.stdout, self._keeper.stderr):
            if pipe is not None:
                pipe.close()
        return status if status >= 0 else 128 - status


class _Tail:
    """The last bytes of an output."""

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self._size = 0

    def read(self, descriptor: int) -> bool:
        """Take what there is; return whether there may be more."""
        part = os.read(descriptor, _READ)
        self._parts.append(part)
        self._size += len(part)
        while self._size - len(self._parts[0]) >= MAX_OUTPUT:
            self._size -= len(self._parts.popleft())
        return bool(part)

    @property
    def text(self) -> str:
        return b"".join(self._parts)[-MAX_OUTPUT:].decode("utf-8", "replace")


def pipes() -> tuple[int, int, IO[bytes], IO[bytes]]:
    """Return two ends for a program to inherit, to read from and to write to, and our ends: to write, and to read."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    return theirs_in, theirs_out, os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb")
