"""The bank's records: SQLite tables, and all SQL statements except those of `copies`.

We chose SQLite because, of the stores we measured, it alone lost nothing acknowledged over kill -9 and concurrent
writers, and because plain SQL can read it. A batch is one transaction, synced before it counts as stored. A trajectory
is kept as compressed JSON; the columns beside it are copies to filter on, and `Transaction.check` compares the two.
"""

import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentmem.bank.exact import Vectors
from latentmem.bank.matrix import Label
from latentmem.bank.stored_form import decode, decompress
from latentmem.errors import BankError, DataError
from latentmem.trajectory import Task, Trajectory

BANK_SCHEMA_VERSION = 1
"""Version of the tables; a bank of a newer version is refused."""

UNIT_TOLERANCE = 1e-5
"""The most by which the length of a stored vector may differ from 1."""

Filters = Mapping[str, str | bool | None]
"""Values of success, domain, role and team to filter on; None lets everything pass."""

_APPLICATION_ID = 0x4C4D454D
_BUSY_SECONDS = 60.0
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
_COLUMNS = ("id", "domain", "success", "reward", "team", "model", "task_id", "task_key", "task_text")
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
        with self._explained():
            self._db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            self._open(create)
        except BaseException:
            self._db.close()
            raise

    def _open(self, create: bool) -> None:
        with self._explained():
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
                raise BankError(f"{self.path}: a SQLite database, but no experience bank; check the path")
            version = transaction.schema_version()
            if version > BANK_SCHEMA_VERSION:
                raise BankError(
                    f"{self.path}: bank schema {version} is newer than {BANK_SCHEMA_VERSION}, the newest this version "
                    "reads; upgrade latentmem"
                )

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
        """Open the only write transaction: synced to disk when the block ends, undone if it raises."""
        with self._transaction("BEGIN IMMEDIATE", "COMMIT") as transaction:
            yield transaction

    @contextmanager
    def _transaction(self, begin: str, end: str) -> Iterator["Transaction"]:
        if os.getpid() != self._process:
            raise BankError(f"{self.path}: opened before a fork; open it again in the child process")
        with self._lock, self._explained():
            self._db.execute(begin)
            try:
                yield Transaction(self._db, self.path)
                self._db.execute(end)
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors about the file and the machine into one line; its other errors are our bugs."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)  # errors of the Python module itself carry no code
            if code == sqlite3.SQLITE_IOERR_SHMSIZE:
                raise BankError(
                    f"{self.path}: disk is full; even to read, a bank needs 32 kB for {self.path.name}-shm beside it. "
                    "Free some space and repeat"
                ) from None
            advice = {
                sqlite3.SQLITE_NOTADB: "not a SQLite file, so no experience bank; check the path",
                sqlite3.SQLITE_BUSY: f"locked by another process for {_BUSY_SECONDS:g} s; end that one or try again",
                sqlite3.SQLITE_PROTOCOL: "too many processes want the lock at once; try again",
                sqlite3.SQLITE_FULL: "disk is full, this batch is not stored; free some space and repeat",
                sqlite3.SQLITE_IOERR: "disk error, this batch is not stored; check the disk and its quota, then repeat",
                sqlite3.SQLITE_READONLY: "cannot be written; check the permissions of the file and its folder",
                sqlite3.SQLITE_CANTOPEN: "cannot be opened; check that it is a file, and its folder's permissions",
                sqlite3.SQLITE_CORRUPT: "damaged; `latentmem bank verify` says where, restore it from an export",
            }.get(code & 0xFF)
            if advice is None:
                raise
            raise BankError(f"{self.path}: {advice} ({error})") from None


class Transaction:
    """What can be read from the records, and done to them, between BEGIN and COMMIT."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db = db
        self._path = path

    # The meta table

    def schema_version(self) -> int:
        """Return the version of the tables; read it before relying on anything else in them."""
        return int(self._values()["schema_version"])

    def meta(self) -> Meta:
        """Return the content of the meta table."""
        return Meta(**self._values())

    def _values(self) -> dict[str, Any]:
        values = dict(self._db.execute("SELECT key, value FROM meta"))
        for key in ("schema_version", "created", "generation"):
            if key not in values:
                raise BankError(f"{self._path}: its meta table lacks {key!r}; restore the bank from an export")
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
        """Store one trajectory, its vector [e] and the result of `encode`; return False if it was there already."""
        cursor = self._db.execute(_INSERT, (*_columns(trajectory), vector.astype("<f4").tobytes(), compressed))
        if cursor.rowcount == 0:
            return False
        self._db.executemany(
            "INSERT INTO roles VALUES (?, ?)", [(cursor.lastrowid, role) for role in _roles(trajectory)]
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
        """Return the stored form of an existing record."""
        return bytes(self._db.execute("SELECT json FROM trajectories WHERE seq = ?", (seq,)).fetchone()[0])

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
            if len(vector) != 4 * width:
                raise BankError(
                    f"{self._path}: record {seq}: its vector has {len(vector)} bytes, width {width} takes {4 * width}; "
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

    def check(self) -> tuple[int, list[Problem]]:
        """Check all records; return how many were read, and the problems, those of the database file first."""
        problems: list[Problem] = []
        num_checked = 0
        try:
            for (line,) in self._db.execute("PRAGMA integrity_check").fetchall():
                if line != "ok":
                    problems.append(Problem("sqlite", str(self._path), " ".join(line.split())))
            for (seq,) in self._db.execute("SELECT DISTINCT seq FROM roles EXCEPT SELECT seq FROM trajectories"):
                problems.append(Problem("roles", f"{self._path}: record {seq}", "has roles, but no trajectory"))
            width = self.meta().width
            for seq, vector, compressed, *columns in self._db.execute(_CHECKED):
                where = f"{self._path}: record {seq}"
                roles = self._role_names(seq - 1, seq).get(seq, [])
                problems += _vector_problems(where, vector, width)
                problems += _content_problems(where, compressed, columns, roles)
                num_checked += 1
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
                raise
            problems.append(Problem("sqlite", str(self._path), f"{error}; checked {num_checked} records up to there"))
        return num_checked, problems


def _vector_problems(where: str, vector: bytes, width: int | None) -> Iterator[Problem]:
    if width is None or len(vector) != 4 * width:
        yield Problem("vector", where, f"{len(vector)} bytes, but the width is {width}")
        return
    length = float(np.linalg.norm(np.frombuffer(vector, dtype="<f4").astype(np.float64)))
    if not abs(length - 1) <= UNIT_TOLERANCE:  # nan fails too
        yield Problem("vector", where, f"length {length:.6g}, expected 1")


def _content_problems(where: str, compressed: bytes, columns: Sequence[Any], roles: list[str]) -> Iterator[Problem]:
    try:
        trajectory = decode(compressed, where)
    except DataError as error:
        yield Problem("json", where, str(error).removeprefix(f"{where}: "))
        return
    if trajectory.to_json().encode("utf-8") != decompress(compressed, where):
        yield Problem("json", where, "not in canonical form")
    for name, found, expected in zip(_COLUMNS, columns, _columns(trajectory), strict=True):
        if found != expected:
            kind: Literal["id", "columns"] = "id" if name == "id" else "columns"
            yield Problem(kind, where, f"{name} is {found!r}, but the JSON says {expected!r}")
    if roles != _roles(trajectory):
        yield Problem("roles", where, f"roles are {roles}, but the JSON says {_roles(trajectory)}")


def _columns(trajectory: Trajectory) -> tuple[str | float | None, ...]:
    """Return the values of the columns in _COLUMNS."""
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


def _roles(trajectory: Trajectory) -> list[str]:
    return sorted({message.role for message in trajectory.messages})
