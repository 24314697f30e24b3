"""Rows of a data set, each with the place it came from, so that every error can name file and line.

Rows come from local files, or from the hub by `datasets`, which is loaded only then. A row that cannot be used is
an error, or, where the configuration says so, left out; then it is counted under the kind of its mistake, and nothing
goes missing unsaid. A train row whose task also occurs in test is left out as well.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import JsonValue

from latentmem.config import Rows
from latentmem.environments.environment import Split
from latentmem.environments.row_files import Cell, check_text, json_name, read_files
from latentmem.errors import BadRowError, DataError, suggest
from latentmem.trajectory import Task

logger = logging.getLogger(__name__)

T = TypeVar("T", str, int, bool, list[Any], dict[str, Any])

MAX_FIELD_CHARACTERS = 200_000
"""Longest text, or list of texts, that a used field may have; in the benchmarks the longest is under 10,000."""

_JSON_NAMES = {str: "a string", int: "an integer", bool: "true or false", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Row:
    """One record of a data set."""

    values: dict[str, JsonValue]
    where: str
    """`file:line`, or the file or hub data set and the row's number."""

    def field(self, name: str, kind: type[T]) -> T:
        """Return the value of a field, which must exist and have that type.

        Raises:
            BadRowError: the field is missing, of another type, or too long.
        """
        if name not in self.values:
            known = [key[:40] for key in self.values][:40]
            raise BadRowError("missing field", f"{self.where}: no field {name!r}; {suggest(name, known)}")
        return typed(self.values[name], kind, f"{self.where}: field {name!r}")

    def text(self, name: str) -> str:
        """Return a string field, which must not be blank.

        Raises:
            BadRowError: the field is missing, not a string, blank, or too long.
        """
        value = self.field(name, str)
        if not value.strip():
            raise BadRowError("blank", f"{self.where}: field {name!r} is blank; expected text")
        return value

    def strings(self, name: str) -> list[str]:
        """Return a field that holds a list of strings.

        Raises:
            BadRowError: the field is missing, not a list of strings, or too long.
        """
        return all_strings(self.field(name, list), f"{self.where}: field {name!r}")


def typed(value: Any, kind: type[T], where: str) -> T:
    """Return `value` if it is of the JSON type `kind`; true and false are not integers.

    Raises:
        BadRowError: it is of another type, or a string that is too long or no text; the message begins with `where`.
    """
    if isinstance(value, Cell):
        value = value.as_type(kind)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        reason = "null" if value is None else "wrong type"
        raise BadRowError(reason, f"{where} is {json_name(value)}; expected {_JSON_NAMES[kind]}")
    if isinstance(value, str):
        _check_length(len(value), where)
        check_text(value, where)
    return value


def all_strings(values: list[Any], where: str) -> list[str]:
    """Return `values` if all are strings.

    Raises:
        BadRowError: one is not a string, or all together are too long; the message begins with `where`.
    """
    for i, value in enumerate(values):
        if not isinstance(value, str):
            reason = "null" if value is None else "wrong type"
            raise BadRowError(reason, f"{where}: entry {i} is {json_name(value)}; expected a string")
    _check_length(sum(map(len, values)), where)
    check_text(values, where)
    return values


def _check_length(num_characters: int, where: str) -> None:
    if num_characters > MAX_FIELD_CHARACTERS:
        raise BadRowError(
            "too long", f"{where} has {num_characters:,} characters; expected at most {MAX_FIELD_CHARACTERS:,}"
        )


@dataclass(frozen=True)
class Splits:
    """The tasks that were made from rows."""

    tasks: dict[Split, list[Task]]
    skipped: dict[Split, dict[str, int]]
    """For each split, the number of unusable rows left out, by kind of mistake; empty if there are none."""


def split_tasks(train: Rows, test: Rows, make: Callable[[Row], Task]) -> Splits:
    """Make the tasks of both splits; train tasks that share id or text with a test task are left out with a warning.

    Raises:
        BadRowError: `make` refuses a row, or its id occurred before, and `on_bad_row` is error.
        DataError: the rows do not exist, none can be used, or no train task is left.
    """
    train_tasks, train_skipped = read_tasks(train, make)
    test_tasks, test_skipped = read_tasks(test, make)
    ids = {task.id for task in test_tasks}
    texts = {task.text for task in test_tasks}
    kept = [task for task in train_tasks if task.id not in ids and task.text not in texts]
    num_dropped = len(train_tasks) - len(kept)
    if num_dropped:
        logger.warning("%d of %d train tasks also occur in test and were left out", num_dropped, len(train_tasks))
    if not kept:
        raise DataError(f"{_source(train)}: every train task also occurs in test; give data.train other rows")
    return Splits({"train": kept, "test": test_tasks}, {"train": train_skipped, "test": test_skipped})


def read_tasks(rows: Rows, make: Callable[[Row], Task]) -> tuple[list[Task], dict[str, int]]:
    """Make the tasks of one split in the order of its rows, and count the rows left out by kind of mistake.

    Counting usable and unusable rows alike, `rows.skip` rows are skipped and at most `rows.limit` are read.

    Raises:
        BadRowError: a row cannot be used, and `on_bad_row` is error.
        DataError: the rows do not exist, or none can be used.
    """
    end = None if rows.limit is None else rows.skip + rows.limit
    found = _local(Path(rows.path)) if rows.path is not None else _hub(rows)
    tasks: list[Task] = []
    places: dict[str | None, str] = {}
    skipped: Counter[str] = Counter()
    first: dict[str, BadRowError] = {}
    for row in islice(found, rows.skip, end):
        try:
            task = _task(row, make, places)
        except BadRowError as error:
            if rows.on_bad_row == "error":
                raise
            logger.info("skipped (%s): %s", error.reason, error)
            skipped[error.reason] += 1
            first.setdefault(error.reason, error)
        else:
            tasks.append(task)
    if skipped:
        kinds = "; ".join(f"{count} {reason} (first: {first[reason]})" for reason, count in skipped.most_common())
        num_rows = len(tasks) + skipped.total()
        logger.warning("%s: %d of %d rows skipped: %s", _source(rows), skipped.total(), num_rows, kinds)
    if not tasks:
        after = f" after the first {rows.skip}" if rows.skip else ""
        which = "none that can be used" if skipped else "none"
        raise DataError(f"{_source(rows)}: expected at least one row{after}, found {which}")
    return tasks, dict(skipped)


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a local file or folder, each of which must be an object.

    Raises:
        BadRowError: a line is not an object.
        DataError: the file does not exist.
    """
    for row in _local(path):
        if isinstance(row, BadRowError):
            raise row
        yield row


def _task(row: "Row | BadRowError", make: Callable[[Row], Task], places: dict[str | None, str]) -> Task:
    if isinstance(row, BadRowError):
        raise row
    task = make(row)
    if task.id in places:
        raise BadRowError(
            "duplicate id",
            f"{row.where}: id {str(task.id)[:80]!r} is used already at {places[task.id]}; ids must differ",
        )
    places[task.id] = row.where
    return task


def _source(rows: Rows) -> str:
    return rows.path or f"{rows.hub}{f' ({rows.name})' if rows.name else ''}, split {rows.split}"


def _local(path: Path) -> Iterator[Row | BadRowError]:
    for where, found in read_files(path):
        yield found if isinstance(found, BadRowError) else Row(found, where)


def _hub(rows: Rows) -> Iterator[Row]:
    name = _source(rows)
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name}: reading from the hub needs the package datasets; pip install 'latentmem[hub]', or give a path"
        ) from None
    try:
        table = datasets.load_dataset(rows.hub, rows.name, split=rows.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name}: cannot be loaded from the hub ({reason}); check the names, or give a local path"
        ) from None
    for number, values in enumerate(table):
        yield Row(dict(values), f"{name}, row {number}")
