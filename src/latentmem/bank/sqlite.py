"""A bank's records in SQLite: one file on one host.

We chose SQLite because, of the stores we measured, it alone lost nothing acknowledged over kill -9 and concurrent
writers, and because plain SQL can read it. A batch is one transaction, synced before it counts as stored. A trajectory
is kept as compressed JSON; the columns beside it are copies to filter on.
"""

import os
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from latentmem.bank.copies import copy_bank
from latentmem.bank.sqlite_file import explained, open_database, place_of
from latentmem.bank.tables import BANK_SCHEMA_VERSION, SHAPES, check_version
from latentmem.bank.transaction import Transaction
from latentmem.errors import BankError

_APPLICATION_ID = 0x4C4D454D
_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID",
    """CREATE TABLE trajectories (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of storing; never used twice, so a larger one is newer
        id TEXT NOT NULL UNIQUE,                -- Trajectory.id, a hash of what was said
        domain TEXT NOT NULL,
        success INTEGER NOT NULL,
        reward REAL NOT NULL,
        team TEXT NOT NULL,
        model TEXT NOT NULL,
        task_id TEXT,
        task_key TEXT,                          -- Task.key where there is a task_id
        task_text TEXT NOT NULL,
        vector BLOB NOT NULL,                   -- the task's text embedded: float32, little endian, unit length
        json BLOB NOT NULL                      -- zlib of the canonical JSON in UTF-8
    )""",
    """CREATE TABLE roles (
        seq INTEGER NOT NULL REFERENCES trajectories (seq) ON DELETE CASCADE,
        role TEXT NOT NULL,
        PRIMARY KEY (seq, role)
    ) WITHOUT ROWID""",
    "CREATE INDEX trajectories_by_task_key ON trajectories (task_key)",
    "CREATE INDEX trajectories_by_task_text ON trajectories (task_text)",
)


class SqliteRecords:
    """The open file. Threads take turns; a forked child must open its own."""

    def __init__(self, path: Path, create: bool) -> None:
        """Open a database; with `create`, begin one if there is none.

        Raises:
            BankError: there is no file and `create` is False; or the file is not a bank, was written by a newer
                version, or cannot be opened.
        """
        self.path = path
        self.beside = path
        self._lock = threading.Lock()
        self._process = os.getpid()
        if not create and not path.exists():
            raise BankError(f"{path}: no bank there; check the path, or open it with an embedder to begin one")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BankError(f"{path}: its folder cannot be made ({error.strerror})") from None
        with explained(self.path):
            self._db = open_database(path, create=create)
        try:
            self._open(create)
        except BaseException:
            self._db.close()
            raise

    def _open(self, create: bool) -> None:
        with explained(self.path):
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            begin = create and self._is_empty()
            if begin:
                self._db.execute("PRAGMA journal_mode = WAL")
        if begin:
            with self.write():
                if self._is_empty():  # checked again, now that nobody else can begin it
                    self._create()
        with self.read() as transaction:
            if self._db.execute("PRAGMA application_id").fetchone() != (_APPLICATION_ID,):
                raise BankError(f"{self.path}: is a SQLite database, but not an experience bank; check the path")
            check_version(transaction.schema_version(), self.path)
        self._place = place_of(self.path)

    def _is_empty(self) -> bool:
        return bool(self._db.execute("SELECT count(*) = 0 FROM sqlite_master").fetchone()[0])

    def _create(self) -> None:
        for statement in _TABLES:
            self._db.execute(statement)
        self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        created = datetime.now(UTC).isoformat(timespec="seconds")
        values = {"schema_version": BANK_SCHEMA_VERSION, "created": created, "generation": uuid.uuid4().hex}
        self._db.executemany("INSERT INTO meta VALUES (?, ?)", values.items())

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    def files(self) -> list[Path]:
        """The files that hold the records, those that are not there too."""
        return [self.path.with_name(self.path.name + tail) for tail in ("", "-wal", "-shm")]

    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.files() if file.exists())

    def copy_to(self, target: Path) -> None:
        """Copy the bank, as it is at one moment, to a SQLite file; an existing bank there is replaced.

        Raises:
            BankError: it cannot be copied.
        """
        copy_bank(self.path, target)

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """Open a snapshot: it does not see what others write meanwhile, and they need not wait for it."""
        with self._transaction("BEGIN DEFERRED", "ROLLBACK") as transaction:
            yield transaction

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """The one writer: synced to disk when the block ends, undone if it raises.

        Raises:
            BankError: the file is not where it was when it was opened, so that what is written would be lost.
        """
        with self._transaction("BEGIN IMMEDIATE", "COMMIT") as transaction:
            yield transaction
            self._check_place()
        self._check_place()

    def _check_place(self) -> None:
        opened = getattr(self, "_place", ())  # none yet while a bank is begun
        gone = [before for before, now in zip(opened, place_of(self.path), strict=False) if before not in (None, now)]
        if gone:
            raise BankError(
                f"{self.path}: it, or its -wal or -shm, was removed, renamed or replaced while the bank was open, so "
                "nothing was saved; put it back, open the bank again and repeat"
            )

    @contextmanager
    def _transaction(self, begin: str, end: str) -> Iterator[Transaction]:
        if os.getpid() != self._process:
            raise BankError(f"{self.path}: opened before a fork; open it again in the child process")
        with self._lock, explained(self.path):
            self._db.execute(begin)
            try:
                yield Transaction(_Session(self._db), str(self.path))
                self._db.execute(end)
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")


class _Session:
    """SQLite's own ways."""

    kind: Literal["sqlite"] = "sqlite"
    faults = (sqlite3.Error,)

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def execute(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._db.execute(query, values)

    def executemany(self, query: str, rows: Iterable[Sequence[Any]]) -> int:
        return max(0, self._db.executemany(query, rows).rowcount)

    def stream(self, query: str) -> Iterator[Any]:
        self._db.text_factory = lambda raw: raw.decode("utf-8", "replace")  # what is no UTF-8 will not agree
        try:
            yield from self._db.execute(query)
        finally:
            self._db.text_factory = str

    def meta(self) -> dict[str, Any]:
        return dict(self._db.execute("SELECT key, value FROM meta"))

    def set_meta(self, values: Mapping[str, str | int]) -> None:
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())

    def tally(self, until: int) -> tuple[int, int]:
        # The plus makes SQLite read an index and not the table itself, where each record takes kilobytes.
        query = "SELECT count(*), coalesce(sum(seq), 0) FROM trajectories WHERE +seq <= ?"
        num_records, total = self._db.execute(query, (until,)).fetchone()
        return num_records, total

    def broken(self) -> list[str]:
        found = [line for (line,) in self._db.execute("PRAGMA integrity_check").fetchall() if line != "ok"]
        for table, columns in SHAPES.items():
            there = {name for _, name, *_ in self._db.execute(f"PRAGMA table_info({table})")}
            if not there:
                found.append(f"no table {table}")
            elif lacks := [column for column in columns if column not in there]:
                found.append(f"table {table} has no {', '.join(lacks)}")
        for kind, name in self._db.execute("SELECT type, name FROM sqlite_master WHERE type NOT IN ('table', 'index')"):
            found.append(f"holds the {kind} {name!r}, which no bank has")
        return found
