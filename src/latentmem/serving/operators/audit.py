"""An append-only log of what a law or an operator may ask about, as JSON lines that are chained by their hashes.

Each line holds the hash of the line before it, so one that was altered, removed from the middle, or put in is found.
Lines removed from the end are not: note the last hash elsewhere now and then, and `verify` finds whether it is still
there. The log tells ids, counts and who, never what was said. Several processes may append to one file.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import IO, Any

from pydantic import JsonValue

from latentmem.errors import AuditError
from latentmem.files import open_ordinary, remedy, sync
from latentmem.parsing import parse_json

FIRST = "0" * 64
"""Stands in the first line, before which there is none."""
EVENTS = (
    "key created",
    "key revoked",
    "forgetting",
    "forgotten",
    "recalled",
    "refused",
    "replayed",
    "torn line dropped",
)
"""What is logged."""
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Verified:
    """What a check of a log found."""

    num_lines: int
    last: str
    """Hash of the last line; `FIRST` for an empty log."""
    problem: str | None
    """The first line that does not fit, and why; None for a whole log."""


class AuditLog:
    """One log file, open for appending. Threads may share it."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Open the file, or make it.

        Raises:
            AuditError: it cannot be opened for appending.
        """
        self.path = path
        self._clock = clock
        self._lock = Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not path.exists()
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._file = os.fdopen(descriptor, "r+b", buffering=0)
            if fresh:
                sync(path.parent)
        except OSError as error:
            raise AuditError(f"{path}: the audit log cannot be opened ({error.strerror}); see serve.audit") from None
        self._end, self._number, self._last = -1, 0, FIRST

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def append(self, event: str, told: Mapping[str, JsonValue], *, durable: bool = False) -> str:
        """Append one line and return its hash.

        Args:
            event: one of `EVENTS`.
            told: what happened, without what was said.
            durable: whether the line is on stable storage when this returns.

        Raises:
            AuditError: the line cannot be written, as on a full disk; the log is then as it was before.
        """
        assert event in EVENTS, event
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                return self._append(event, told, durable)
            except OSError as error:
                raise AuditError(f"{self.path}: cannot be added to ({error.strerror}). {remedy(error)}") from None
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _append(self, event: str, told: Mapping[str, JsonValue], durable: bool) -> str:
        if os.fstat(self._file.fileno()).st_size != self._end:
            torn = self._catch_up()
            if torn:
                self._write("torn line dropped", {"bytes": torn})
        hash = self._write(event, told)
        if durable:
            os.fsync(self._file.fileno())
        return hash

    def _write(self, event: str, told: Mapping[str, JsonValue]) -> str:
        moment = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        content = {**told, "number": self._number + 1, "time": moment, "event": event, "previous": self._last}
        hash = hash_of(content)
        line = _canonical({**content, "hash": hash}) + b"\n"
        if len(line) > _LONGEST_LINE:
            raise AuditError(f"{self.path}: a line of {len(line)} bytes is too long for the audit log")
        size = os.fstat(self._file.fileno()).st_size
        written = self._file.write(line)
        if written != len(line):
            os.ftruncate(self._file.fileno(), size)
            raise OSError(28, os.strerror(28))
        self._end, self._number, self._last = size + len(line), self._number + 1, hash
        return hash

    def _catch_up(self) -> int:
        """Read how the log ends now, and drop a line that a killed process left half written; return its bytes."""
        size = os.fstat(self._file.fileno()).st_size
        start = max(0, size - 2 * _LONGEST_LINE)
        tail = os.pread(self._file.fileno(), size - start, start)
        whole = tail.rfind(b"\n") + 1
        torn = len(tail) - whole
        if torn:
            os.ftruncate(self._file.fileno(), size - torn)
        lines = tail[:whole].splitlines()
        if lines:
            try:
                last = parse_json(lines[-1])
                self._number, self._last = int(last["number"]), str(last["hash"])
            except (ValueError, KeyError, TypeError):
                raise AuditError(
                    f"{self.path}: its last line is damaged; `latentmem audit verify` says which one, move the file "
                    "away and keep it"
                ) from None
        else:
            self._number, self._last = 0, FIRST
        self._end = size - torn
        return torn


def verify(path: Path, known: str | None = None) -> Verified:
    """Check a log's chain.

    Args:
        path: the log.
        known: hash of a line that was noted earlier; that it is missing is a problem.

    Raises:
        AuditError: the file cannot be read.
    """
    try:
        with open_ordinary(path) as file:
            return _verified(file, known)
    except OSError as error:
        raise AuditError(f"{path}: the audit log cannot be read ({error.strerror})") from None


def _verified(file: IO[bytes], known: str | None) -> Verified:
    last, number, seen = FIRST, 0, known is None
    for number, line in enumerate(file, start=1):
        problem = _problem(line, number, last)
        if problem is not None:
            return Verified(number - 1, last, f"line {number} {problem}")
        last = str(json.loads(line)["hash"])
        seen = seen or last == known
    return Verified(number, last, None if seen else f"no line has the hash {known}: lines were removed from the end")


def _problem(line: bytes, number: int, previous: str) -> str | None:
    if not line.endswith(b"\n"):
        return "is cut off"
    try:
        found: Any = parse_json(line)
        content = {key: value for key, value in found.items() if key != "hash"}
        numbered, before, hash = found["number"], found["previous"], found["hash"]
    except (ValueError, KeyError, AttributeError):
        return "is not a line of an audit log"
    if before != previous or numbered != number:
        return "does not follow the line before it: something was removed, put in or moved"
    if hash_of(content) != hash or _canonical(found) + b"\n" != line:
        return "was altered"
    return None


def hash_of(content: Mapping[str, JsonValue]) -> str:
    """Return the hash of a line's content."""
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
