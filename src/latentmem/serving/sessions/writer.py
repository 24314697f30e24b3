"""One SQLite file whose writes are acknowledged only when they are on stable storage, many in one sync.

A single thread writes. What is asked for while it syncs forms the next transaction, so that a hundred clients who wait
for the disk wait for one sync and not for a hundred. A change that fails is taken back alone, also one for which the
disk has no room, and none is half done.
"""

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from latentmem.errors import ServingError

T = TypeVar("T")
Change = Callable[[sqlite3.Connection], T]
"""A function that writes, and may read what it needs for that; it runs in the writer's thread."""

_AT_ONCE = 256
"""Changes in one transaction at most."""


class StoreFailed(Exception):  # noqa: N818 - it is an answer to clients, with a status
    """A change was not stored: the disk is full (507) or fails (503)."""

    def __init__(self, path: Path, error: sqlite3.Error) -> None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        self.is_full = code == sqlite3.SQLITE_FULL
        what = "the disk is full" if self.is_full else f"the store cannot be written ({error})"
        super().__init__(f"{path.name}: {what}; nothing of this request is stored")


@dataclass(frozen=True)
class _Asked:
    """A change that was asked for."""

    change: Change[Any]
    future: "Future[Any]"


class Writer:
    """An open file with its writing thread; reads see what was committed. Threads may share it."""

    def __init__(self, path: Path, tables: Sequence[str], application_id: int, version: int) -> None:
        """Open the file, or begin it with these tables.

        Raises:
            ServingError: it is another program's file, was written by a newer version, or cannot be opened.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _connect(path)
            _begin(self._db, path, tables, application_id, version)
            self._reader = _connect(path)
        except OSError as error:
            raise ServingError(f"{path}: its folder cannot be made ({error.strerror})") from None
        except sqlite3.Error as error:
            raise ServingError(
                f"{path}: cannot be opened ({error}); check the path, its permissions and the disk"
            ) from None
        self._reading = threading.Lock()
        self._asked: SimpleQueue[_Asked | None] = SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=f"writes {path.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what was asked for, and close the file."""
        if not self._is_closed:
            self._is_closed = True
            self._asked.put(None)
            self._thread.join()
            with self._reading:
                self._reader.close()

    def submit(self, change: Change[T]) -> "Future[T]":
        """Ask for a change; the future has its result once it is on stable storage.

        An exception of the change takes it back and is the future's. `StoreFailed` says that the disk refused.
        """
        future: Future[T] = Future()
        if self._is_closed:
            future.set_exception(ServingError(f"{self.path}: closed"))
        else:
            self._asked.put(_Asked(change, future))
        return future

    def write(self, change: Change[T]) -> T:
        """Do a change and return its result once it is on stable storage."""
        return self.submit(change).result()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection to read from, of one thread at a time."""
        with self._reading:
            try:
                yield self._reader
            except sqlite3.OperationalError as error:
                raise StoreFailed(self.path, error) from None

    def _run(self) -> None:
        ending = False
        while not ending:
            batch = [self._asked.get()]
            while len(batch) < _AT_ONCE and not self._asked.empty():
                batch.append(self._asked.get())
            ending = None in batch
            self._commit([each for each in batch if each is not None and each.future.set_running_or_notify_cancel()])
        self._db.close()

    def _commit(self, batch: Sequence["_Asked"]) -> None:
        if not batch:
            return
        done: list[tuple[Future[Any], Any]] = []
        refused: list[tuple[Future[Any], BaseException]] = []
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for asked in batch:
                self._db.execute("SAVEPOINT one")
                try:
                    result = asked.change(self._db)
                except sqlite3.OperationalError:
                    raise
                except BaseException as error:
                    self._db.execute("ROLLBACK TO one")
                    refused.append((asked.future, error))
                else:
                    done.append((asked.future, result))
                self._db.execute("RELEASE one")
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            with suppress(sqlite3.Error):  # SQLite may have taken everything back by itself
                self._db.execute("ROLLBACK")
            if len(batch) == 1:
                batch[0].future.set_exception(StoreFailed(self.path, error))
            else:  # one change that does not fit must not take the others with it
                for asked in batch:
                    self._commit([asked])
            return
        for future, result in done:
            future.set_result(result)
        for future, failure in refused:
            future.set_exception(failure)


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA secure_delete = ON")
    return db


def _begin(db: sqlite3.Connection, path: Path, tables: Sequence[str], application_id: int, version: int) -> None:
    (found,) = db.execute("PRAGMA application_id").fetchone()
    (num_tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not num_tables:
        db.execute("BEGIN IMMEDIATE")
        for table in tables:
            db.execute(table)
        db.execute(f"PRAGMA application_id = {application_id}")
        db.execute(f"PRAGMA user_version = {version}")
        db.execute("COMMIT")
        return
    (stored,) = db.execute("PRAGMA user_version").fetchone()
    if found != application_id:
        raise ServingError(f"{path}: is another program's database; move it away, or name another run folder")
    if stored > version:
        raise ServingError(f"{path}: was written by a newer latentmem (version {stored}); upgrade latentmem")
