"""Freed memory goes back to the system, so that a server which runs for weeks stays as large as its work.

Batches of a server differ in size from one to the next. The C library keeps freed blocks in heaps, where blocks of
other sizes seldom fit, and the process grows for hours. Taking every block from the system alone would end that, but
the system has to clear each page of it anew: reading prompts then takes a quarter longer. So the free pages of all
heaps are given back every few seconds instead, which takes milliseconds.
"""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_SECONDS = 5.0


@contextmanager
def giving_memory_back(every: float = EVERY_SECONDS) -> Iterator[None]:
    """Give free memory back every so many seconds; only glibc, as on most Linux machines, can be told to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is None:
        yield
        return
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(every):
            trim(0)

    thread = threading.Thread(target=work, name="giving memory back", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
