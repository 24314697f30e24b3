"""The authors' bank, read entry by entry; an entry that cannot be read is left out, counted and reported."""

import json
import logging
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from string import Formatter
from typing import Any

from latentmem.errors import DataError
from latentmem.trajectory import Message, Recalled, Step, Task, Trajectory

logger = logging.getLogger(__name__)

CHROMA = "chroma.sqlite3"
"""The database in Chroma's persist folder. The vectors beside it are not needed, since a bank makes its own."""
DOMAIN = "released"
"""The domain of all tasks. They name none and have no ids, so they are compared by their text."""

_EMPTY_MEMORY = "<|Memory_Empty|>"
"""The authors' placeholder in a prompt without text memory."""
_MAX_PROMPT_CHARACTERS = 10_000_000
"""The longest filled template; one that names a long field a million times must not fill the machine's memory."""
_SQLITE = b"SQLite format 3\0"
_DOCUMENTS = """
    SELECT e.id, m.key, coalesce(m.string_value, m.bool_value) FROM embeddings e LEFT JOIN embedding_metadata m
    ON m.id = e.id AND m.key IN ('task_init_description', 'label', 'trajectory') ORDER BY e.id
"""


@dataclass(frozen=True)
class Unreadable:
    """An entry of a released bank that could not be read."""

    where: str
    why: str


@dataclass(frozen=True)
class ReleasedBank:
    """A bank of the authors in our terms, in its own order."""

    trajectories: tuple[Trajectory, ...]
    unreadable: tuple[Unreadable, ...]


def is_released_bank(source: Path) -> bool:
    """Return whether this is a bank of the authors and not our JSON Lines: a folder, SQLite, or a JSON list."""
    if source.is_dir():
        return True
    try:
        with source.open("rb") as file:
            start = file.read(4096)
    except OSError:
        return False  # whoever then reads it as our own raises the error
    return start.startswith(_SQLITE) or start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def read_bank(source: Path) -> ReleasedBank:
    """Read a bank in the authors' format; both forms of one bank give the same trajectories.

    The bank holds no tokens, so neither do the messages: the trajectories can be recalled and composed from, but not
    trained on. Other missing facts are filled in: finish `stop`, temperature 1, seed 0, no prompt length.

    Args:
        source: Chroma's persist folder (or the database in it, which is opened for reading only), or their data.json.

    Raises:
        DataError: the file cannot be read, or no entry in it can.
    """
    path = source / CHROMA if source.is_dir() else source
    try:
        with path.open("rb") as file:
            is_database = file.read(len(_SQLITE)) == _SQLITE
    except OSError as error:
        expected = f"expected Chroma's persist folder, with {CHROMA} in it" if source.is_dir() else "check the path"
        raise DataError(f"{path}: cannot be read ({error.strerror}); {expected}") from None
    trajectories, unreadable = [], []
    entries = _chroma_entries(path) if is_database or source.is_dir() else _json_entries(path)
    for number, entry in enumerate(entries, 1):
        try:
            trajectories.append(_trajectory(entry))
        except DataError as error:
            unreadable.append(Unreadable(f"entry {number}", str(error)))
    if not trajectories:
        first = f"; {unreadable[0].where}: {unreadable[0].why}" if unreadable else ""
        raise DataError(
            f"{path}: none of its {len(unreadable)} entries can be read as a trajectory{first}; "
            "expected a bank as the authors save it"
        )
    return ReleasedBank(tuple(trajectories), tuple(unreadable))


def _json_entries(path: Path) -> list[Any]:
    try:
        entries = _parsed(path.read_bytes().decode("utf-8-sig"), "the file")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}); expected the authors' data.json") from None
    except DataError as error:
        raise DataError(f"{path}: {error}; expected the authors' data.json") from None
    if not isinstance(entries, list):
        raise DataError(f"{path}: is {_kind(entries)}; expected the authors' data.json, a list of trajectories")
    return entries


def _chroma_entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the documents of a Chroma database with their metadata as stored: bytes, and numbers for booleans."""
    for tail in ("-wal", "-journal"):
        beside = path.with_name(path.name + tail)
        if beside.exists() and beside.stat().st_size:
            raise DataError(
                f"{beside}: holds changes that are not in the database yet; let the program that writes it end, "
                "or open and close it once with Chroma"
            )
    try:
        # Immutable: SQLite takes no lock and writes nothing beside the file, so a read-only folder is enough.
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            db.text_factory = bytes  # decoded entry by entry, so that one that is not UTF-8 does not stop the others
            db.execute("PRAGMA trusted_schema = OFF")
            for _, rows in groupby(db.execute(_DOCUMENTS), key=lambda row: row[0]):
                yield {key.decode("utf-8", "replace"): value for _, key, value in rows if key is not None}
    except sqlite3.Error as error:
        raise DataError(
            f"{path}: is not a whole Chroma database ({error}); copy it again, or take the data.json"
        ) from None


def _trajectory(entry: Any) -> Trajectory:
    """Turn one entry of either form into ours; raise a DataError that says what is wrong, but not where."""
    if not isinstance(entry, dict):
        raise DataError(f"is {_kind(entry)}, expected an object")
    text = _text(entry, "task_init_description")
    if not text.strip():
        raise DataError("task_init_description is blank")
    label = entry.get("label")
    if label not in (True, False):  # a database stores 1 and 0
        raise DataError(f"label is {_kind(label)}, expected true or false")
    steps = entry.get("trajectory")
    if isinstance(steps, bytes):
        steps = _parsed(_text(entry, "trajectory"), "trajectory")
    if not isinstance(steps, list) or not steps:
        raise DataError(f"trajectory is {_kind(steps)}, expected a list of steps")
    trajectory = Trajectory(
        task=Task(id=None, domain=DOMAIN, text=text),
        team=DOMAIN,
        model="unknown",  # an entry names only the class of the model
        steps=tuple(map(_step, steps)),
        reward=float(label),
        success=bool(label),
        seed=0,
    )
    try:
        trajectory.to_json().encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("holds a lone surrogate, which is no character") from None
    return trajectory


def _step(step: Any) -> Step:
    if not isinstance(step, dict):
        raise DataError(f"a step is {_kind(step)}, expected an object")
    graph = step.get("mas_message_graph")
    if "mas_message_graph_data" in step:
        stored = _text(step, "mas_message_graph_data")
        graph = _parsed(stored, "a message graph") if stored else {}
    graph = {} if graph is None else graph
    nodes = _list(graph, "nodes")
    links = _list(graph, "edges" if "edges" in graph else "links")  # networkx 3.6 renamed them
    roles = [node.get("id") if isinstance(node, dict) else None for node in nodes]
    if not all(isinstance(role, str) for role in roles) or len(set(roles)) < len(roles):
        raise DataError("the nodes of a message graph are not named by different roles")
    position = {role: i for i, role in enumerate(roles)}
    reads: list[set[int]] = [set() for _ in roles]
    for link in links:
        ends = [link.get("source"), link.get("target")] if isinstance(link, dict) else [None]
        if not all(isinstance(end, str) and end in position for end in ends):
            raise DataError("a message graph has an edge that does not join two of its messages")
        read, reader = (position[end] for end in ends)
        if read >= reader:
            raise DataError("a message reads a later one")
        reads[reader].add(read)
    return Step(
        messages=tuple(map(_message, nodes, reads)),
        action=_text(step, "action"),
        observation=_text(step, "observation"),
    )


def _message(node: Mapping[str, Any], reads: set[int]) -> Message:
    message = node.get("message")
    if not isinstance(message, dict):
        raise DataError(f"a message is {_kind(message)}, expected an object")
    fields = {part: message.get(f"{part}_prompt_fields") or {} for part in ("system", "user")}
    for part, values in fields.items():
        if not isinstance(values, dict):
            raise DataError(f"{part}_prompt_fields is {_kind(values)}, expected an object")
    had_memory = fields["user"].get("memory_content") not in (None, "", _EMPTY_MEMORY)
    return Message(
        role=node["id"],
        system=_filled(_text(message, "system_prompt_template"), fields["system"]),
        user=_filled(_text(message, "user_prompt_template"), fields["user"]),
        response=_text(message, "response"),
        token_ids=(),
        logps=(),
        finish="stop",
        temperature=1.0,
        num_prompt_tokens=0,
        reads=tuple(sorted(reads)),
        # Their memory is part of the user's text, where their template puts it, and it stays there.
        recalled=Recalled(kind="text" if had_memory else "none"),
    )


def _filled(template: str, fields: Mapping[str, Any]) -> str:
    """Fill a template of theirs, in the syntax of `str.format`; nothing in it can reach into objects."""
    pieces: list[str] = []
    length = 0
    try:
        for literal, name, spec, conversion in Formatter().parse(template):
            value = "" if name is None else fields.get(name, [])
            if spec or conversion or not isinstance(value, str | int | float | None):
                raise DataError(f"a template names {{{str(name)[:40]}}}, for which there is no plain value")
            pieces += [literal, str(value)]
            length += len(literal) + len(pieces[-1])
            if length > _MAX_PROMPT_CHARACTERS:
                raise DataError(f"a filled template is longer than {_MAX_PROMPT_CHARACTERS} characters")
    except ValueError:
        raise DataError("a template has a brace without its partner") from None
    return "".join(pieces)


def _text(record: Mapping[str, Any], key: str) -> str:
    """Return a text of a record; it is empty if the record lacks it, because the authors leave out empty texts."""
    value = record.get(key)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{key} is not UTF-8") from None
    if value is not None and not isinstance(value, str):
        raise DataError(f"{key} is {_kind(value)}, expected a text")
    return value or ""


def _list(graph: Any, key: str) -> list[Any]:
    value = graph.get(key, []) if isinstance(graph, dict) else None
    if not isinstance(value, list):
        raise DataError(f"a message graph is {_kind(graph)}, expected an object with lists of nodes and links")
    return value


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{what} is nested too deeply") from None
    except ValueError:
        raise DataError(f"{what} is not valid JSON") from None


def _kind(value: Any) -> str:
    """Name the type of a value in terms of JSON, for errors."""
    names = {dict: "an object", list: "a list", str: "a text", bytes: "a text", bool: "true or false"}
    if value is None:
        return "missing"
    return "an empty list" if value == [] else names.get(type(value), "a number")
