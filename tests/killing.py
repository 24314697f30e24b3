"""A process that is killed while it writes, as tests of what survives that need it."""

import os
import signal
from collections.abc import Callable

import pytest


def killed_at_sync(number: int, monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> bool:
    """Run an action in a child that kills itself at its `number`-th write to stable storage; whether it was killed."""
    child = os.fork()
    if child == 0:
        left = iter(range(number - 1, -1, -1))
        sync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda handle: sync(handle) if next(left, 1) else os.kill(os.getpid(), 9))
        try:
            action()
        finally:
            os._exit(1)  # whatever happens, the child is never a second pytest
    return os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
