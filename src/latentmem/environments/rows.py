"""Rows of a data set, each remembering where it stood, so that every complaint can name file and line.

Rows come from local JSON Lines, or from the hub by `datasets`, which is loaded only then. A row is never skipped:
it is used, or it raises. Only a train row whose task also occurs in test is left out, and that is counted aloud.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import JsonValue

from latentmem.config import Rows
from latentmem.environments.environment import Split
from latentmem.errors import DataError, suggest
from latentmem.trajectory import Task

logger = logging.getLogger(__name__)

T = TypeVar("T", str, int, bool, list[Any], dict[str, Any])

_JSON_NAMES = {str: "a string", int: "an integer", bool: "true or false", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Row:
    """One record of a data set."""

    values: dict[str, JsonValue]
    where: str
    """`file:line`, or the hub data set, split and row."""

    def field(self, name: str, kind: type[T]) -> T:
        """The value of a field, which must be there and of that type.

        Raises:
            DataError: the field is missing or of another type.
        """
        if name not in self.values:
            raise DataError(f"{self.where}: no field {name!r}; {suggest(name, self.values)}")
        return typed(self.values[name], kind, f"{self.where}: field {name!r}")

    def text(self, name: str) -> str:
        """A string field that says something.

        Raises:
            DataError: the field is missing, no string, or blank.
        """
        value = self.field(name, str)
        if not value.strip():
            raise DataError(f"{self.where}: field {name!r} is blank; expected text")
        return value

    def strings(self, name: str) -> list[str]:
        """A field holding a list of strings.

        Raises:
            DataError: the field is missing or anything else.
        """
        return all_strings(self.field(name, list), f"{self.where}: field {name!r}")


def typed(value: Any, kind: type[T], where: str) -> T:
    """`value` if it is of the JSON type `kind`; true and false are no integers.

    Raises:
        DataError: it is of another type; the message begins with `where`.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DataError(f"{where} is {_name(value)}; expected {_JSON_NAMES[kind]}")
    return value


def all_strings(values: list[Any], where: str) -> list[str]:
    """`values` if every one is a string.

    Raises:
        DataError: one is not; the message begins with `where`.
    """
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(f"{where}: entry {i} is {_name(value)}; expected a string")
    return values


def read_rows(rows: Rows) -> list[Row]:
    """The rows of one split, in the order they are stored: at most `rows.limit` after the first `rows.skip`.

    Raises:
        DataError: no such file or data set, not JSON Lines in UTF-8, a line that is no object, or no row at all.
    """
    end = None if rows.limit is None else rows.skip + rows.limit
    found = list(islice(_local(Path(rows.path)) if rows.path is not None else _hub(rows), rows.skip, end))
    if not found:
        after = f" after the first {rows.skip}" if rows.skip else ""
        raise DataError(f"{rows.path or rows.hub}: holds no row{after}; expected at least one")
    return found


def split_tasks(train: list[Row], test: list[Row], make: Callable[[Row], Task]) -> dict[Split, list[Task]]:
    """The tasks of both splits; tasks of train that share id or text with one of test are left out and counted.

    Raises:
        DataError: two rows of one split have the same id, or no train task is left; whatever `make` raises.
    """
    tasks: dict[Split, list[Task]] = {"train": _distinct(train, make), "test": _distinct(test, make)}
    ids = {task.id for task in tasks["test"]}
    texts = {task.text for task in tasks["test"]}
    kept = [task for task in tasks["train"] if task.id not in ids and task.text not in texts]
    num_dropped = len(tasks["train"]) - len(kept)
    if num_dropped:
        logger.warning("%d of %d train tasks also occur in test and were left out", num_dropped, len(tasks["train"]))
    if not kept:
        raise DataError(f"{train[0].where}: every train task also occurs in test; give data.train other rows")
    tasks["train"] = kept
    return tasks


def _distinct(rows: list[Row], make: Callable[[Row], Task]) -> list[Task]:
    seen: dict[str | None, str] = {}
    tasks = []
    for row in rows:
        task = make(row)
        if task.id in seen:
            raise DataError(f"{row.where}: id {task.id!r} stands already at {seen[task.id]}; ids must differ")
        seen[task.id] = row.where
        tasks.append(task)
    return tasks


def _local(path: Path) -> Iterator[Row]:
    for file in _files(path):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from None
        # Only a line feed ends a row: a string may hold U+2028, which str.splitlines takes for an end too.
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                where = f"{file}:{number}"
                yield Row(_parse(line, where), where)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise DataError(f"{path}: the folder holds no .jsonl file; expected at least one")
        return files
    if not path.exists():
        if not path.parent.is_dir():
            raise DataError(f"{path}: no such file; its folder {path.parent} does not exist either")
        siblings = [p.name for p in path.parent.iterdir() if p.suffix == ".jsonl" or p.is_dir()]
        hint = suggest(path.name, siblings) if siblings else "its folder holds no .jsonl file"
        raise DataError(f"{path}: no such file or folder; {hint}")
    return [path]


def _parse(line: bytes, where: str) -> dict[str, JsonValue]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON number")

    try:
        value = json.loads(line.decode("utf-8"), parse_constant=refuse)
        if b"\\u" in line:  # half a surrogate pair can be spelled in JSON, but is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise DataError(f"{where}: not valid UTF-8 ({error}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); expected one object on each line") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {_name(value)}")
    return value


def _hub(rows: Rows) -> Iterator[Row]:
    name = f"{rows.hub}{f' ({rows.name})' if rows.name else ''}, split {rows.split}"
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


def _name(value: Any) -> str:
    return "null" if value is None else _JSON_NAMES.get(type(value), f"the number {value}")
