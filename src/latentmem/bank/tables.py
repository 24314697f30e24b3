"""What a bank's tables hold, whichever database keeps them: the meta values, a record, and the columns beside its JSON.

A record's JSON is what counts; the columns are copies to filter on, and `check` compares the two.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from latentmem.bank.exact import Vectors
from latentmem.errors import BankError
from latentmem.trajectory import Trajectory

BANK_SCHEMA_VERSION = 2
"""Version of the tables; a bank of a newer version is refused. One of version 1 is read as it is and migrated by the
first write; it lacks the columns ADDED."""

UNIT_TOLERANCE = 1e-5
"""The most by which the length of a stored vector may differ from 1."""

META: Mapping[str, Callable[[Any], bool]] = {
    "schema_version": lambda value: isinstance(value, int),
    "created": lambda value: isinstance(value, str),
    "generation": lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None,
    "embedder": lambda value: value is None or isinstance(value, str),
    "width": lambda value: value is None or (isinstance(value, int) and 0 < value <= 1 << 20),
}
"""What stands in the meta table, and what it may be."""

COLUMNS = (
    "id", "domain", "success", "reward", "team", "model", "task_id", "task_key", "task_text", "tenant", "session",
)  # fmt: skip
"""The columns of `trajectories` that copy what the JSON says."""

ADDED = ("tenant", "session", "stored")
"""The columns of `trajectories` that version 2 added."""

SHAPES: Mapping[str, tuple[str, ...]] = {
    "meta": ("key", "value"),
    "trajectories": ("seq", *COLUMNS, "stored", "vector", "json"),
    "roles": ("seq", "role"),
}
"""The columns of each table."""

Filters = Mapping[str, str | bool | None]
"""Values to filter on, by the filter's name: success, domain, role, team, tenant, session, task_id, and before, a time
as `now` gives it. None lets everything pass."""


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

    kind: Literal["sqlite", "postgresql", "json", "id", "columns", "roles", "vector", "index"]
    where: str
    found: str


class Record(NamedTuple):
    """One record, as it is stored."""

    columns: tuple[str | float | None, ...]
    """What stands in COLUMNS; the first is the id."""
    roles: list[str]
    vector: bytes
    """The task's text embedded: float32, little endian, unit length."""
    json: bytes
    """The stored form."""
    stored: str | None = None
    """When it was stored, as `now` gives it; None: now."""


def record_of(trajectory: Trajectory, vector: Vectors, stored_form: bytes) -> Record:
    """Return the record of a trajectory with its vector [e] and what `encode` gave."""
    return Record(columns_of(trajectory), roles_of(trajectory), vector.astype("<f4").tobytes(), stored_form)


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
        "" if trajectory.origin is None else trajectory.origin.tenant,
        None if trajectory.origin is None else trajectory.origin.session,
    )


def now() -> str:
    """Return date and time in UTC, ISO 8601, in seconds; later times are larger texts."""
    return moment(datetime.now(UTC))


def moment(time: datetime) -> str:
    """Return a time as `now` does.

    Raises:
        ValueError: it has no zone.
    """
    if time.tzinfo is None:
        raise ValueError(f"{time} is a time without its zone; give one, such as datetime.now(UTC)")
    return time.astimezone(UTC).isoformat(timespec="seconds")


def roles_of(trajectory: Trajectory) -> list[str]:
    """The roles that spoke, in order."""
    return sorted({message.role for message in trajectory.messages})


def check_version(version: int, where: object) -> None:
    """Refuse a bank of a newer version.

    Raises:
        BankError: it is newer.
    """
    if version > BANK_SCHEMA_VERSION:
        raise BankError(
            f"{where}: bank schema {version} is newer than {BANK_SCHEMA_VERSION}, the newest this version reads; "
            "upgrade latentmem"
        )
