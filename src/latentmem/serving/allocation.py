"""Freed memory goes back to the system, so that a server which runs for weeks stays as large as its work.

Batches of a server differ in size from one to the next. The C library keeps freed blocks of up to 32 MiB in heaps,
where blocks of other sizes seldom fit, and the process grows for hours. Larger ones it takes from the system and gives
back at once; so that is what it is told to do with all but small ones.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 256 << 10
"""Bytes from which on a block is taken from the system alone. Setting it also ends glibc's own adjustment."""


def give_memory_back() -> None:
    """Tell the C library to give freed blocks back; only glibc, as on most Linux machines, has such a setting."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, 4 * _LARGE)
