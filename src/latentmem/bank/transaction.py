"""What is read from a bank's records and done to them, in SQL that SQLite and PostgreSQL understand alike.

Where the two differ, a `Session` does it: there is one for each database, and one `Transaction` for both. A bank of an
older version is read through a subquery that adds the columns it lacks, so no statement here has a second form.
"""

import hashlib
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from latentmem.bank.exact import Vectors
from latentmem.bank.matrix import Label
from latentmem.bank.tables import ADDED, COLUMNS, META, SHAPES, Filters, Meta, Record, now
from latentmem.errors import BankError
from latentmem.trajectory import Task

Tenants = Collection[str] | None
"""The tenants whose trajectories are read; None: everybody's."""

_AT_ONCE = 256

_INSERT = f"""
    INSERT INTO trajectories ({", ".join(COLUMNS)}, vector, json, stored)
    VALUES ({", ".join("?" * len(COLUMNS))}, ?, ?, ?) ON CONFLICT (id) DO NOTHING
"""  # noqa: S608 - the names of columns are ours
_INSERT_ROLE = "INSERT INTO roles (seq, role) SELECT seq, ? FROM trajectories WHERE id = ?"
_PASSES = {
    "success": "success = ?",
    "domain": "domain = ?",
    "team": "team = ?",
    "role": "seq IN (SELECT seq FROM roles WHERE role = ?)",
    "tenant": "tenant = ?",
    "session": "session = ?",
    "task_id": "task_id = ?",
    "before": "stored < ?",
}
_VERSION_1 = """(
    SELECT trajectories.*, '' AS tenant, CAST(NULL AS TEXT) AS session, CAST(NULL AS TEXT) AS stored FROM trajectories
) AS trajectories"""
_SAME_TEXT = "SELECT seq FROM trajectories WHERE task_text = ?"
_SAME_KEY = """
    SELECT seq FROM trajectories WHERE task_key = ?
    UNION ALL SELECT seq FROM trajectories WHERE task_text = ? AND task_id IS NULL
"""


class Rows(Protocol):
    """The result of a statement."""

    @property
    def rowcount(self) -> int:
        """Number of rows that the statement changed."""

    def fetchone(self) -> Any:
        """Return the next row, or None."""

    def fetchall(self) -> list[Any]:
        """Return all rows that are left."""

    def __iter__(self) -> Iterator[Any]: ...


class Session(Protocol):
    """An open transaction of one database, and what the databases do differently."""

    @property
    def kind(self) -> Literal["sqlite", "postgresql"]:
        """Which database it is."""

    @property
    def faults(self) -> tuple[type[Exception], ...]:
        """The errors that the database raises."""

    def execute(self, query: str, values: Sequence[Any] = ()) -> Rows:
        """Run a statement; each ? in it stands for a value."""

    def executemany(self, query: str, rows: Iterable[Sequence[Any]]) -> int:
        """Run a statement for each row of values, and return the number of rows changed."""

    def stream(self, query: str) -> Iterator[Any]:
        """Yield the rows of a query one after another, of whatever type; never hold all of them."""

    def meta(self) -> dict[str, Any]:
        """Return the meta table."""

    def set_meta(self, values: Mapping[str, str | int]) -> None:
        """Set some values of the meta table."""

    def tally(self, until: int) -> tuple[int, int]:
        """Return the number of records up to and including `until`, and the sum of their record numbers."""

    def columns(self) -> dict[str, set[str]]:
        """Return the columns of each table."""

    def broken(self) -> list[str]:
        """Return what is wrong with the store itself, and what it holds besides tables."""


class Transaction:
    """What can be read from the records, and done to them, between BEGIN and COMMIT."""

    def __init__(self, session: Session, where: str) -> None:
        """Work in a session; `where` names the bank in errors."""
        self._db = session
        self._where = where
        self.kind = session.kind
        self.faults = session.faults

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
        return Meta(**self._values(tuple(META)))

    def _values(self, names: Sequence[str]) -> dict[str, Any]:
        rows = self._db.meta()
        values = {name: rows.get(name) for name in names}
        for name, value in values.items():
            if not META[name](value):
                found = f"holds {str(value)[:80]!r} as {name!r}" if name in rows else f"lacks {name!r}"
                raise BankError(f"{self._where}: its meta table {found}; restore the bank from an export")
        return values

    def set_embedder(self, embedder: str, width: int) -> None:
        """Set the name of the embedder of all vectors, and their width e."""
        self._db.set_meta({"embedder": embedder, "width": width})

    @cached_property
    def _source(self) -> str:
        """What trajectories are read from: the table, or what makes one of version 1 look like it."""
        return "trajectories" if self.schema_version() > 1 else _VERSION_1

    def _select(self, what: str, tenants: Tenants, rest: str = "", values: Sequence[Any] = ()) -> Rows:
        """Read trajectories of some tenants; `rest` follows the WHERE, and begins with AND or ORDER BY."""
        seen, names = _of_tenants(tenants)
        query = f"SELECT {what} FROM {self._source} WHERE {seen} {rest}"  # noqa: S608 - the words are ours
        return self._db.execute(query, [*names, *values])

    def size(self, tenants: Tenants = None) -> int:
        """Number of trajectories."""
        num_trajectories: int = self._select("count(*)", tenants).fetchone()[0]
        return num_trajectories

    def counts(self, tenants: Tenants = None) -> dict[str, Any]:
        """Count trajectories, in all and by name; the mean reward is among the values (None without trajectories)."""
        what = "count(*), coalesce(sum(success), 0), avg(reward)"
        num_trajectories, num_successes, mean_reward = self._select(what, tenants).fetchone()

        def by(column: str) -> dict[str, int]:
            return dict(self._select(f"{column}, count(*)", tenants, "GROUP BY 1 ORDER BY 1"))

        seen, names = _of_tenants(tenants)
        roles = (
            f"SELECT role, count(*) FROM roles WHERE seq IN (SELECT seq FROM {self._source} WHERE {seen}) "  # noqa: S608
            "GROUP BY 1 ORDER BY 1"
        )
        return {
            "num_trajectories": num_trajectories,
            "num_successes": num_successes,
            "mean_reward": mean_reward,
            "domains": by("domain"),
            "teams": by("team"),
            "models": by("model"),
            "tenants": by("tenant"),
            "roles": dict(self._db.execute(roles, names)),
        }

    # Trajectories

    def insert(self, records: Sequence[Record]) -> int:
        """Store records and return their number; those whose ids are there already are left out."""
        there = self.present([record.columns[0] for record in records])
        new = [record for record in records if record.columns[0] not in there]
        time = now()
        rows = [(*record.columns, record.vector, record.json, record.stored or time) for record in new]
        num_added = self._db.executemany(_INSERT, rows)
        self._db.executemany(_INSERT_ROLE, [(role, record.columns[0]) for record in new for role in record.roles])
        return num_added

    def present(self, ids: Sequence[Any]) -> set[str]:
        """Return those of the ids that are stored."""
        found: set[str] = set()
        for start in range(0, len(ids), _AT_ONCE):
            some = ids[start : start + _AT_ONCE]
            found.update(id_ for (id_,) in self._db.execute(_among("SELECT id FROM trajectories WHERE id", some), some))
        return found

    def meeting(self, filters: Filters, tenants: Tenants = None) -> dict[int, str]:
        """Return the ids of the trajectories that meet all filters, by record number, in order."""
        given = {name: value for name, value in filters.items() if value is not None}
        values = [int(value) if isinstance(value, bool) else value for value in given.values()]
        rest = "".join(f"AND {_PASSES[name]} " for name in given)
        return dict(self._select("seq, id", tenants, f"{rest}ORDER BY seq", values))

    def delete(self, seqs: Collection[int]) -> None:
        """Delete records, by number."""
        doomed = list(seqs)
        for start in range(0, len(doomed), _AT_ONCE):
            some = doomed[start : start + _AT_ONCE]
            self._db.execute(_among("DELETE FROM trajectories WHERE seq", some), some)
        if doomed:
            self._renew_generation()

    def replace_vectors(self, vectors: Mapping[int, Vectors]) -> None:
        """Give all records, by number, new vectors [e]; the caller then sets the embedder."""
        self._db.execute("DELETE FROM meta WHERE key IN ('embedder', 'width')")
        pairs = ((vector.astype("<f4").tobytes(), seq) for seq, vector in vectors.items())
        self._db.executemany("UPDATE trajectories SET vector = ? WHERE seq = ?", pairs)
        self._renew_generation()

    def _renew_generation(self) -> None:
        self._db.set_meta({"generation": uuid.uuid4().hex})

    def seq_of(self, id_: str, tenants: Tenants = None) -> int | None:
        """Return the record number of a trajectory, or None if it is not stored."""
        row = self._select("seq", tenants, "AND id = ?", (id_,)).fetchone()
        return row[0] if row else None

    def digest(self, tenants: Tenants = None) -> str:
        """Return a hash of the generation and the ids."""
        content = [self.meta().generation, *self.ids(tenants)]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    def ids_at(self, seqs: Sequence[int], tenants: Tenants = None) -> list[str]:
        """Return the ids of existing records, by number, those of other tenants left out, in order."""
        found: list[str] = []
        for start in range(0, len(seqs), _AT_ONCE):
            some = sorted(seqs)[start : start + _AT_ONCE]
            rest = f"AND {_among('seq', some)} ORDER BY seq"
            found += [id_ for (id_,) in self._select("id", tenants, rest, some)]
        return found

    def ids(self, tenants: Tenants = None) -> list[str]:
        """Return the ids of all records, in order."""
        return [id_ for (id_,) in self._select("id", tenants, "ORDER BY seq")]

    def stored_forms(self, seqs: Collection[int]) -> dict[int, bytes]:
        """Return the stored forms of existing records, by number."""
        wanted = sorted(seqs)
        found: dict[int, bytes] = {}
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            found.update(self._db.execute(_among("SELECT seq, json FROM trajectories WHERE seq", some), some))
        return found

    def records(self, after: int, size: int) -> tuple[int, list[Record]]:
        """Return up to `size` records with numbers above `after`, in order, and the number of the last one."""
        what = f"seq, vector, json, stored, {', '.join(COLUMNS)}"
        rows = self._select(what, None, "AND seq > ? ORDER BY seq LIMIT ?", (after, size)).fetchall()
        last = rows[-1][0] if rows else after
        roles = self._role_names(after, last)
        return last, [
            Record(tuple(columns), roles.get(seq, []), vector, json, stored)
            for seq, vector, json, stored, *columns in rows
        ]

    def pages(self) -> Iterator[list[Record]]:
        """Yield all records, some at once, in order."""
        reached, records = self.records(0, _AT_ONCE)
        while records:
            yield records
            reached, records = self.records(reached, _AT_ONCE)

    def page(self, after: int, size: int, tenants: Tenants = None) -> list[tuple[int, bytes]]:
        """Return up to `size` pairs (record number, stored form) with numbers above `after`, in order."""
        return self._select("seq, json", tenants, "AND seq > ? ORDER BY seq LIMIT ?", (after, size)).fetchall()

    def newest(self, size: int, success: bool, tenants: Tenants = None) -> list[tuple[int, bytes]]:
        """Return up to `size` pairs (record number, stored form) of successes or failures, the newest first."""
        rest = "AND success = ? ORDER BY seq DESC LIMIT ?"
        return self._select("seq, json", tenants, rest, (int(success), size)).fetchall()

    def texts(self, after: int) -> list[tuple[int, str, str]]:
        """Return triples (record number, task text, trajectory id) with numbers above `after`, in order."""
        query = "SELECT seq, task_text, id FROM trajectories WHERE seq > ? ORDER BY seq"
        return self._db.execute(query, (after,)).fetchall()

    def same_task(self, task: Task) -> list[int]:
        """Return the numbers of the records whose task is the same as this one (`Task.same_as`)."""
        by_text = task.id is None
        rows = self._db.execute(*((_SAME_TEXT, (task.text,)) if by_text else (_SAME_KEY, (task.key, task.text))))
        return [seq for (seq,) in rows]

    def numbers(self) -> set[int]:
        """Return the numbers of all records."""
        return {seq for (seq,) in self._db.execute("SELECT seq FROM trajectories")}

    # What an index is made of

    def tally(self, until: int) -> tuple[int, int]:
        """Return the number of records up to and including `until`, and the sum of their record numbers."""
        return self._db.tally(until)

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
                    f"{self._where}: record {seq}: its vector has {has}, but width {width} needs {4 * width}; "
                    "call reembed() to make the vectors again"
                )
        numbers = np.frombuffer(b"".join(vector for _, vector, _ in rows), dtype="<f4").reshape(len(rows), width)
        return [seq for seq, _, _ in rows], numbers, rows[-1][2] if rows else ""

    def labels(self, after: int, until: int) -> Iterator[list[Label]]:
        """Yield the labels of each record above `after`, up to and including `until`, in order."""
        roles = self._role_names(after, until)
        rest = "AND seq > ? AND seq <= ? ORDER BY seq"
        for seq, success, *names in self._select("seq, success, domain, team, tenant", None, rest, (after, until)):
            facts: list[Label] = [("success", success), *zip(("domain", "team", "tenant"), names, strict=True)]
            yield facts + [("role", role) for role in roles.get(seq, ())]

    def _role_names(self, after: int, until: int) -> dict[int, list[str]]:
        roles: dict[int, list[str]] = {}
        query = "SELECT seq, role FROM roles WHERE seq > ? AND seq <= ? ORDER BY seq, role"
        for seq, role in self._db.execute(query, (after, until)):
            roles.setdefault(seq, []).append(role)
        return roles

    # Checking

    def broken(self) -> list[str]:
        """What the database itself finds wrong, and how its tables are not those of a bank."""
        found, there = self._db.broken(), self._db.columns()
        is_old = there.get("meta", set()) >= {*SHAPES["meta"]} and self._db.meta().get("schema_version") == 1
        for table, columns in SHAPES.items():
            if table not in there:
                found.append(f"no table {table}")
            elif lacks := [name for name in columns if name not in there[table] and not (is_old and name in ADDED)]:
                found.append(f"table {table} has no {', '.join(lacks)}")
        return found

    def stray_roles(self) -> list[int]:
        """Numbers of records that have roles, and are not there."""
        query = "SELECT DISTINCT seq FROM roles EXCEPT SELECT seq FROM trajectories"
        return [seq for (seq,) in self._db.execute(query)]

    def everything(self) -> Iterator[tuple[int, Any, Any, list[Any], list[Any]]]:
        """Of each record its number, vector, stored form, what stands in COLUMNS, and its roles; of whatever type."""
        roles: dict[int, list[Any]] = {}
        reached = 0
        query = f"SELECT seq, vector, json, {', '.join(COLUMNS)} FROM {self._source} ORDER BY seq"  # noqa: S608 - ours
        for seq, vector, compressed, *columns in self._db.stream(query):
            if seq > reached:
                reached = seq + _AT_ONCE
                roles = self._role_names(seq - 1, reached)
            yield seq, vector, compressed, columns, roles.get(seq, [])


def names_of(tenants: Tenants) -> frozenset[str] | None:
    """Return the tenants as a set; refuse a text, which would stand for its letters.

    Raises:
        ValueError: it is a text.
    """
    if isinstance(tenants, str):
        raise ValueError(f"tenants is the text {tenants!r}; give a list of names, such as ['', {tenants!r}]")
    return None if tenants is None else frozenset(tenants)


def _of_tenants(tenants: Tenants) -> tuple[str, list[str]]:
    """Return the condition that a row belongs to one of the tenants, and its values."""
    if tenants is None:
        return "TRUE", []
    names = list(tenants)
    return (_among("tenant", names), names) if names else ("FALSE", [])


def _among(query: str, values: Sequence[Any]) -> str:
    return f"{query} IN ({', '.join('?' * len(values))})"
