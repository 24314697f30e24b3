"""A bank's records in SQLite: one file on one host.

We chose SQLite because, of the stores we measured, it alone lost nothing acknowledged over kill -9 and concurrent
writers, and because plain SQL can read it. A batch is one transaction, synced before it counts as stored. A trajectory
is kept as compressed JSON; the columns beside it are copies to filter on.
"""

import logging
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from latentmem.bank.copies import copy_bank
from latentmem.bank.sqlite_file import BUSY_SECONDS, explained, keep_log, open_database, place_of
from latentmem.bank.tables import BANK_SCHEMA_VERSION, check_version, now
from latentmem.bank.transaction import Transaction
from latentmem.errors import BankError

logger = logging.getLogger(__name__)

_READERS_SECONDS = 5.0
"""How long those who read an older state are waited for before the log is emptied."""

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
        tenant TEXT NOT NULL,                   -- whose it is; empty for the common pool
        session TEXT,                           -- of a served episode
        stored TEXT NOT NULL,                   -- date and time in UTC, ISO 8601
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
    "CREATE INDEX trajectories_by_session ON trajectories (session)",
)
# No record of version 1 has an origin. A constant as default is added without a record being written again; it says
# that the record was stored by then, which is all that is known. A process of an older version that still has the bank
# open goes on as it did.
_FROM_VERSION_1 = (
    "ALTER TABLE trajectories ADD COLUMN tenant TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE trajectories ADD COLUMN session TEXT",
    "ALTER TABLE trajectories ADD COLUMN stored TEXT NOT NULL DEFAULT '{now}'",
    "CREATE INDEX trajectories_by_session ON trajectories (session)",
    "UPDATE meta SET value = 2 WHERE key = 'schema_version'",
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
                keep_log(self._db)
        if begin:
            with self._transaction("BEGIN IMMEDIATE", "COMMIT"):
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
        values = {"schema_version": BANK_SCHEMA_VERSION, "created": now(), "generation": uuid.uuid4().hex}
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

    def erase(self) -> bool:
        """Write the file anew, without what was deleted, and empty its log; return whether that could be done.

        Where rows lay, SQLite leaves some of their bytes, even if told to overwrite what it deletes.
        """
        if os.getpid() != self._process:
            raise BankError(f"{self.path}: opened before a fork; open it again in the child process")
        with self._lock:
            try:
                self._db.execute("VACUUM")
                self._db.execute(f"PRAGMA busy_timeout = {int(1000 * _READERS_SECONDS)}")
                is_busy = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                left = "another process reads it" if is_busy else ""
            except sqlite3.Error as error:
                left = str(error)
            finally:
                self._db.execute(f"PRAGMA busy_timeout = {int(1000 * BUSY_SECONDS)}")
        if left:
            logger.warning(
                "%s: what was deleted is never recalled again, but its bytes are still in the file or its -wal (%s); "
                "mend that and delete with the same filters again, which removes them",
                self.path,
                left,
            )
        return not left

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
        """The one writer: synced to disk when the block ends, undone if it raises. An older bank is migrated by it.

        Raises:
            BankError: the file is not where it was when it was opened, so that what is written would be lost.
        """
        with self._transaction("BEGIN IMMEDIATE", "COMMIT") as transaction:
            if transaction.schema_version() == 1:
                for statement in _FROM_VERSION_1:
                    self._db.execute(statement.format(now=now()))
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

    def columns(self) -> dict[str, set[str]]:
        query = "SELECT t.name, c.name FROM sqlite_master AS t, pragma_table_info(t.name) AS c WHERE t.type = 'table'"
        there: dict[str, set[str]] = {}
        for table, column in self._db.execute(query):
            there.setdefault(table, set()).add(column)
        return there

    def broken(self) -> list[str]:
        found = [line for (line,) in self._db.execute("PRAGMA integrity_check").fetchall() if line != "ok"]
        for kind, name in self._db.execute("SELECT type, name FROM sqlite_master WHERE type NOT IN ('table', 'index')"):
            found.append(f"holds the {kind} {name!r}, which no bank has")
        return found
