"""Values as they stand in files that anybody may have written: each may be missing, or anything."""

from math import isfinite
from typing import Any

Row = dict[str, Any]


def memories_in(results: Row) -> list[Row]:
    """The rows of the memories that a results.json compares."""
    return [m for m in results.get("memories") or [] if isinstance(m, dict) and "name" in m]


def has(row: Row, *keys: str) -> bool:
    """Whether all of these keys have a finite number."""
    return all(number(row.get(key)) is not None for key in keys)


def number(value: Any) -> float | None:
    """The value if it is a finite number. Files are read as they are, so it may be anything."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) else None


def as_dict(value: Any) -> Row:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def short(value: Any) -> str:
    """A number in four digits; anything else as it is."""
    return f"{value:.4g}" if number(value) is not None else str(value)
