"""A bank's file: opened for writing where that may be, else for reading, and looked for where it was.

What SQLite complains of becomes one line.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from latentmem.errors import BankError

BUSY_SECONDS = 60.0
_AGAIN_SECONDS = 0.01
_CANNOT_WRITE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)

Place = tuple[tuple[int, int] | None, ...]
"""Which files a database, its log and the log's index are; None where there is none."""


def open_database(path: Path, *, create: bool) -> sqlite3.Connection:
    """Open a database; where neither it nor its folder can be written, what it holds can still be read.

    Raises:
        sqlite3.Error: it cannot be opened.
        BankError: it cannot be read without writing, for its log holds what is not in it yet.
    """
    there = path.exists()
    db = _connect(path, "mode=rwc" if create else "mode=rw")
    try:
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        db.close()
        if not there or getattr(error, "sqlite_errorcode", 0) & 0xFF not in _CANNOT_WRITE:
            raise
    else:
        return db
    log = _beside(path)[1]
    if log.exists() and log.stat().st_size:
        raise BankError(
            f"{path}: cannot be opened in a read-only folder, because {log.name} holds changes that are not in it yet; "
            "copy both files into a folder that can be written"
        )
    return _connect(path, "mode=ro&immutable=1")


def keep_log(db: sqlite3.Connection) -> None:
    """Let a new database keep a log beside it, so that it is read while it is written.

    Of processes that begin one file together, each would wait for the others to stop reading. SQLite then refuses one
    of them at once, however long it may wait otherwise.

    Raises:
        sqlite3.Error: another process holds it for long, or it cannot be written.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(_AGAIN_SECONDS)
        else:
            return


def place_of(path: Path) -> Place:
    """Which files stand there now."""
    found: list[tuple[int, int] | None] = []
    for file in _beside(path):
        try:
            status = file.stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_dev, status.st_ino))
    return tuple(found)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what SQLite says of the file and the machine into one line; misuse of it is our bug."""
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
        raise
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0)  # misuse of the Python module carries no code
        if code == sqlite3.SQLITE_IOERR_SHMSIZE:
            raise BankError(
                f"{path}: the disk is full; even reading a bank needs 32 kB for {path.name}-shm beside it. "
                "Free some space and repeat"
            ) from None
        advice = {
            sqlite3.SQLITE_NOTADB: "not a SQLite file, so not an experience bank; check the path",
            sqlite3.SQLITE_BUSY: f"locked by another process for {BUSY_SECONDS:g} s; end that one or try again",
            sqlite3.SQLITE_PROTOCOL: "too many processes want the lock at once; try again",
            sqlite3.SQLITE_FULL: "disk is full, this batch is not stored; free some space and repeat",
            sqlite3.SQLITE_IOERR: "disk error, this batch is not stored; check the disk and its quota, then repeat",
            sqlite3.SQLITE_READONLY: "cannot be written; check the permissions of the file and its folder",
            sqlite3.SQLITE_CANTOPEN: "cannot be opened; check that it is a file, and its folder's permissions",
        }.get(code & 0xFF, "damaged; `latentmem bank verify` says where, restore it from an export")
        raise BankError(f"{path}: {advice} ({error})") from None
    except UnicodeEncodeError as error:
        raise BankError(f"{path}: a filter is {error.object[:80]!a}, which is not valid Unicode") from None


def _beside(path: Path) -> list[Path]:
    return [path.with_name(path.name + tail) for tail in ("", "-wal", "-shm")]


def _connect(path: Path, how: str) -> sqlite3.Connection:
    place = f"file:{quote(bytes(path.absolute()))}?{how}"
    return sqlite3.connect(place, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True)
