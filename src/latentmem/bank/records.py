"""The bank's records: SQLite tables, and all SQL statements except those of `copies`.

We chose SQLite because, of the stores we measured, it alone lost nothing acknowledged over kill -9 and concurrent
writers, and because plain SQL can read it. A batch is one transaction, synced before it counts as stored. A trajectory
is kept as compressed JSON; the columns beside it are copies to filter on, and `Transaction.check` compares the two.
"""

import os
import re
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentmem.bank.database import explained, open_database, place_of
from latentmem.bank.exact import Vectors
from latentmem.bank.matrix import Label
from latentmem.errors import BankError
from latentmem.trajectory import Task, Trajectory

BANK_SCHEMA_VERSION = 1
"""Version of the tables; a bank of a newer version is refused."""

UNIT_TOLERANCE = 1e-5
"""The most by which the length of a stored vector may differ from 1."""

_META: Mapping[str, Callable[[Any], bool]] = {
    "schema_version": lambda value: isinstance(value, int),
    "created": lambda value: isinstance(value, str),
    "generation": lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None,
    "embedder": lambda value: value is None or isinstance(value, str),
    "width": lambda value: value is None or (isinstance(value, int) and 0 < value <= 1 << 20),
}
"""What stands in the meta table, and what it may be."""

Filters = Mapping[str, str | bool | None]
"""Values of success, domain, role and team to filter on; None lets everything pass."""

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
COLUMNS = ("id", "domain", "success", "reward", "team", "model", "task_id", "task_key", "task_text")
_SHAPES = {
    "meta": ("key", "value"),
    "trajectories": ("seq", *COLUMNS, "vector", "json"),
    "roles": ("seq", "role"),
}
_INSERT = """
    INSERT INTO trajectories (id, domain, success, reward, team, model, task_id, task_key, task_text, vector, json)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING
"""
_DELETE = """
    DELETE FROM trajectories WHERE (:success IS NULL OR success = :success) AND (:domain IS NULL OR domain = :domain)
    AND (:team IS NULL OR team = :team) AND (:role IS NULL OR seq IN (SELECT seq FROM roles WHERE role = :role))
"""
_SAME_TEXT = "SELECT seq FROM trajectories WHERE task_text = ?"
_SAME_KEY = """
    SELECT seq FROM trajectories WHERE task_key = ?
    UNION ALL SELECT seq FROM trajectories WHERE task_text = ? AND task_id IS NULL
"""
_CHECKED = """
    SELECT seq, vector, json, id, domain, success, reward, team, model, task_id, task_key, task_text
    FROM trajectories ORDER BY seq
"""


@dataclass(frozen=True)
class Meta:
    """The content of a bank's meta table."""

    schema_version: int
    created: str
    generation: str
    """Renewed when vectors are removed or changed, which voids every index."""
    embedder: str | None = None
    """None until the first trajectory is stored; the same holds for `width`."""
    width: int | None = None


@dataclass(frozen=True)
class Problem:
    """One problem that a check found."""

    kind: Literal["sqlite", "json", "id", "columns", "roles", "vector", "index"]
    where: str
    found: str


class Records:
    """The open database. Threads take turns; a forked child must open its own."""

    def __init__(self, path: Path, create: bool) -> None:
        """Open a database; with `create`, begin one if there is none.

        Raises:
            BankError: there is no file and `create` is False; or the file is not a bank, was written by a newer
                version, or cannot be opened.
        """
        self.path = path
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
            version = transaction.schema_version()
            if version > BANK_SCHEMA_VERSION:
                raise BankError(
                    f"{self.path}: bank schema {version} is newer than {BANK_SCHEMA_VERSION}, the newest this version "
                    "reads; upgrade latentmem"
                )
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

    @contextmanager
    def read(self) -> Iterator["Transaction"]:
        """Open a snapshot: it does not see what others write meanwhile, and they need not wait for it."""
        with self._transaction("BEGIN DEFERRED", "ROLLBACK") as transaction:
            yield transaction

    @contextmanager
    def write(self) -> Iterator["Transaction"]:
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
    def _transaction(self, begin: str, end: str) -> Iterator["Transaction"]:
        if os.getpid() != self._process:
            raise BankError(f"{self.path}: opened before a fork; open it again in the child process")
        with self._lock, explained(self.path):
            self._db.execute(begin)
            try:
                yield Transaction(self._db, self.path)
                self._db.execute(end)
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")


class Transaction:
    """What can be read from the records, and done to them, between BEGIN and COMMIT."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db = db
        self._path = path

    # The meta table

    def schema_version(self) -> int:
        """Version of the tables, read before anything else of them is relied on."""
        version: int = self._values(("schema_version",))["schema_version"]
        return version

    def meta(self) -> Meta:
        """The meta table.

        Raises:
            BankError: it lacks something, or holds what is none.
        """
        return Meta(**self._values(tuple(_META)))

    def _values(self, names: Sequence[str]) -> dict[str, Any]:
        rows = dict(self._db.execute("SELECT key, value FROM meta"))
        values = {name: rows.get(name) for name in names}
        for name, value in values.items():
            if not _META[name](value):
                found = f"holds {str(value)[:80]!r} as {name!r}" if name in rows else f"lacks {name!r}"
                raise BankError(f"{self._path}: its meta table {found}; restore the bank from an export")
        return values

    def set_embedder(self, embedder: str, width: int) -> None:
        """Set the name of the embedder of all vectors, and their width e."""
        values = [("embedder", embedder), ("width", width)]
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values)

    def counts(self) -> dict[str, Any]:
        """Count trajectories, in all and by name; the mean reward is among the values (None without trajectories)."""
        query = "SELECT count(*), coalesce(sum(success), 0), avg(reward) FROM trajectories"
        num_trajectories, num_successes, mean_reward = self._db.execute(query).fetchone()
        return {
            "num_trajectories": num_trajectories,
            "num_successes": num_successes,
            "mean_reward": mean_reward,
            "domains": dict(self._db.execute("SELECT domain, count(*) FROM trajectories GROUP BY 1 ORDER BY 1")),
            "teams": dict(self._db.execute("SELECT team, count(*) FROM trajectories GROUP BY 1 ORDER BY 1")),
            "models": dict(self._db.execute("SELECT model, count(*) FROM trajectories GROUP BY 1 ORDER BY 1")),
            "roles": dict(self._db.execute("SELECT role, count(*) FROM roles GROUP BY 1 ORDER BY 1")),
        }

    # Trajectories

    def insert(self, trajectory: Trajectory, vector: Vectors, compressed: bytes) -> bool:
        """Store one trajectory with its vector [e] and what `encode` gave; False if it was there already."""
        cursor = self._db.execute(_INSERT, (*columns_of(trajectory), vector.astype("<f4").tobytes(), compressed))
        if cursor.rowcount == 0:
            return False
        self._db.executemany(
            "INSERT INTO roles VALUES (?, ?)", [(cursor.lastrowid, role) for role in roles_of(trajectory)]
        )
        return True

    def delete(self, filters: Filters) -> int:
        """Delete the trajectories that meet all filters and return their number."""
        num_deleted = self._db.execute(_DELETE, filters).rowcount
        if num_deleted:
            self._renew_generation()
        return num_deleted

    def replace_vectors(self, vectors: Mapping[int, Vectors]) -> None:
        """Give all records, by number, new vectors [e]; the caller then sets the embedder."""
        self._db.execute("DELETE FROM meta WHERE key IN ('embedder', 'width')")
        pairs = ((vector.astype("<f4").tobytes(), seq) for seq, vector in vectors.items())
        self._db.executemany("UPDATE trajectories SET vector = ? WHERE seq = ?", pairs)
        self._renew_generation()

    def _renew_generation(self) -> None:
        self._db.execute("UPDATE meta SET value = ? WHERE key = 'generation'", (uuid.uuid4().hex,))

    def seq_of(self, id_: str) -> int | None:
        """Return the record number of a trajectory, or None if it is not stored."""
        row = self._db.execute("SELECT seq FROM trajectories WHERE id = ?", (id_,)).fetchone()
        return row[0] if row else None

    def id_of(self, seq: int) -> str:
        """Return the id of an existing record."""
        return str(self._db.execute("SELECT id FROM trajectories WHERE seq = ?", (seq,)).fetchone()[0])

    def ids(self) -> list[str]:
        """Return the ids of all records, in order."""
        return [id_ for (id_,) in self._db.execute("SELECT id FROM trajectories ORDER BY seq")]

    def compressed(self, seq: int) -> bytes:
        """The stored form of an existing record."""
        stored: bytes = self._db.execute("SELECT json FROM trajectories WHERE seq = ?", (seq,)).fetchone()[0]
        return stored

    def page(self, after: int, size: int) -> list[tuple[int, bytes]]:
        """Return up to `size` pairs (record number, stored form) with numbers above `after`, in order."""
        query = "SELECT seq, json FROM trajectories WHERE seq > ? ORDER BY seq LIMIT ?"
        return self._db.execute(query, (after, size)).fetchall()

    def newest(self, size: int, success: bool) -> list[tuple[int, bytes]]:
        """Return up to `size` pairs (record number, stored form) of successes or failures, the newest first."""
        query = "SELECT seq, json FROM trajectories WHERE success = ? ORDER BY seq DESC LIMIT ?"
        return self._db.execute(query, (success, size)).fetchall()

    def texts(self, after: int) -> list[tuple[int, str, str]]:
        """Return triples (record number, task text, trajectory id) with numbers above `after`, in order."""
        query = "SELECT seq, task_text, id FROM trajectories WHERE seq > ? ORDER BY seq"
        return self._db.execute(query, (after,)).fetchall()

    def same_task(self, task: Task) -> list[int]:
        """Return the numbers of the records whose task is the same as this one (`Task.same_as`)."""
        by_text = task.id is None
        rows = self._db.execute(*((_SAME_TEXT, (task.text,)) if by_text else (_SAME_KEY, (task.key, task.text))))
        return [seq for (seq,) in rows]

    # What an index is made of

    def tally(self, until: int) -> tuple[int, int]:
        """Return the number of records up to and including `until`, and the sum of their record numbers."""
        # The plus makes SQLite read an index and not the table itself, where each record takes kilobytes.
        query = "SELECT count(*), coalesce(sum(seq), 0) FROM trajectories WHERE +seq <= ?"
        num_records, total = self._db.execute(query, (until,)).fetchone()
        return num_records, total

    def vectors(self, after: int, size: int, width: int) -> tuple[list[int], Vectors, str]:
        """Return numbers and vectors [n, e] of up to `size` records above `after`, in order, and the last one's id.

        Raises:
            BankError: a vector has another width.
        """
        query = "SELECT seq, vector, id FROM trajectories WHERE seq > ? ORDER BY seq LIMIT ?"
        rows = self._db.execute(query, (after, size)).fetchall()
        for seq, vector, _ in rows:
            if not isinstance(vector, bytes) or len(vector) != 4 * width:
                has = f"{len(vector)} bytes" if isinstance(vector, bytes) else f"a {type(vector).__name__}"
                raise BankError(
                    f"{self._path}: record {seq}: its vector has {has}, but width {width} needs {4 * width}; "
                    "call reembed() to make the vectors again"
                )
        numbers = np.frombuffer(b"".join(vector for _, vector, _ in rows), dtype="<f4").reshape(len(rows), width)
        return [seq for seq, _, _ in rows], numbers, rows[-1][2] if rows else ""

    def labels(self, after: int, until: int) -> Iterator[list[Label]]:
        """Yield the labels of each record above `after`, up to and including `until`, in order."""
        roles = self._role_names(after, until)
        query = "SELECT seq, success, domain, team FROM trajectories WHERE seq > ? AND seq <= ? ORDER BY seq"
        for seq, success, domain, team in self._db.execute(query, (after, until)):
            facts: list[Label] = [("success", success), ("domain", domain), ("team", team)]
            yield facts + [("role", role) for role in roles.get(seq, ())]

    def _role_names(self, after: int, until: int) -> dict[int, list[str]]:
        roles: dict[int, list[str]] = {}
        query = "SELECT seq, role FROM roles WHERE seq > ? AND seq <= ? ORDER BY seq, role"
        for seq, role in self._db.execute(query, (after, until)):
            roles.setdefault(seq, []).append(role)
        return roles

    # Checking

    def broken(self) -> list[str]:
        """What SQLite itself finds wrong with the file, and how its tables are not those of a bank."""
        found = [line for (line,) in self._db.execute("PRAGMA integrity_check").fetchall() if line != "ok"]
        for table, columns in _SHAPES.items():
            there = {name for _, name, *_ in self._db.execute(f"PRAGMA table_info({table})")}
            if not there:
                found.append(f"no table {table}")
            elif lacks := [column for column in columns if column not in there]:
                found.append(f"table {table} has no {', '.join(lacks)}")
        for kind, name in self._db.execute("SELECT type, name FROM sqlite_master WHERE type NOT IN ('table', 'index')"):
            found.append(f"holds the {kind} {name!r}, which no bank has")
        return found

    def stray_roles(self) -> list[int]:
        """Numbers of records that have roles, and are not there."""
        query = "SELECT DISTINCT seq FROM roles EXCEPT SELECT seq FROM trajectories"
        return [seq for (seq,) in self._db.execute(query)]

    def everything(self) -> Iterator[tuple[int, Any, Any, list[Any], list[Any]]]:
        """Of each record its number, vector, stored form, what stands in COLUMNS, and its roles; of whatever type."""
        self._db.text_factory = lambda raw: raw.decode("utf-8", "replace")  # what is no UTF-8 will not agree
        try:
            for seq, vector, compressed, *columns in self._db.execute(_CHECKED):
                yield seq, vector, compressed, columns, self._role_names(seq - 1, seq).get(seq, [])
        finally:
            self._db.text_factory = str


def columns_of(trajectory: Trajectory) -> tuple[str | float | None, ...]:
    """What stands in COLUMNS for a trajectory."""
    task = trajectory.task
    return (
        trajectory.id,
        task.domain,
        int(trajectory.success),
        trajectory.reward,
        trajectory.team,
        trajectory.model,
        task.id,
        task.key if task.id is not None else None,
        task.text,
    )


def roles_of(trajectory: Trajectory) -> list[str]:
    """The roles that spoke, in order."""
    return sorted({message.role for message in trajectory.messages})
