"""Read values from files that anybody may have written, where a value may be missing or of any type."""

from math import isfinite
from typing import Any

Row = dict[str, Any]


def memories_in(results: Row) -> list[Row]:
    """Return the rows of the memories that a results.json compares."""
    return [m for m in results.get("memories") or [] if isinstance(m, dict) and "name" in m]


def has(row: Row, *keys: str) -> bool:
    """Return whether all of these keys hold a finite number."""
    return all(number(row.get(key)) is not None for key in keys)


def number(value: Any) -> float | None:
    """Return the value if it is a finite number, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) else None


def as_dict(value: Any) -> Row:
    """Return the value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return the value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def short(value: Any) -> str:
    """Format a number with four digits, and anything else as it is."""
    return f"{value:.4g}" if number(value) is not None else str(value)
