"""YAML and JSON of anybody become plain values here: what only looks like a value, or is made to hurt, is refused.

A value is text, a finite number (in YAML one that 64 bits hold), true, false, null, a list or a mapping, nested
`MAX_DEPTH` levels at most. A mapping has each key once. Text has no half of a surrogate pair, which no file can hold.
Loads no torch.
"""

import json
import math
import re
from collections import Counter
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

MAX_DEPTH = 100
"""Levels of lists and mappings; what goes through values level by level then never runs out of stack."""
MAX_VALUES = 100_000
"""Values in a YAML text, those that aliases repeat counted again: ten lines of aliases can stand for a billion."""
_LARGEST = 2**64  # seeds of episodes take all 64 bits
_MAX_DIGITS = 300
"""Of a whole number in JSON: tasks may be about large ones, and it still is a float's size."""
_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_LARGE_NUMBER = re.compile(r"[0-9]{300}|[eE]\+?[0-9]{3}")
_SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
"""A number for everybody but YAML 1.1, which wants a dot and a sign in it."""


def parse_json(text: str | bytes) -> Any:
    """Read one JSON value.

    Args:
        text: bytes are UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is none, or one that is refused; the message is the reason alone, on one line.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        # Python calls for every number are slow, and few texts need them.
        numbers: dict[str, Any] = {"parse_int": _integer, "parse_float": _finite} if _LARGE_NUMBER.search(text) else {}
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, **numbers)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(value)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair stands in a text") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    return value


def parse_yaml(text: str) -> Any:
    """Read one YAML value, None of an empty text. 1e-4 is a number, a date is text, and tags are refused.

    Raises:
        ValueError: it is none, or one that is refused; the message is the reason alone, on one line. It quotes the
            text, but not one with addresses that may hold a password.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.value_of(node)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (yaml.YAMLError, OverflowError, ValueError) as error:
        lines = str(error).replace('in "<unicode string>", ', "in ").splitlines()
        if "://" in text and "@" in text:
            lines = [
                line.removesuffix(":") for line in lines if not line.startswith("    ")
            ]  # a quoted line is indented
        reason = " ".join(" ".join(lines).split())
        raise ValueError(reason) from None


class Form(BaseModel):
    """What is relied on of a file; what else stands there is left alone."""

    model_config = ConfigDict(frozen=True)


def checked(values: Any, form: type[T]) -> T:
    """Return JSON values as a `Form`, or as a dataclass, which takes no others than its own.

    Raises:
        ValueError: one is missing or is of another type; the message is the reason alone, on one line.
    """
    if (
        is_dataclass(form)
        and isinstance(values, dict)
        and (more := set(values) - {field.name for field in fields(form)})
    ):
        raise ValueError(f"{min(more)}: is not a field of it")
    try:
        return TypeAdapter(form).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{key and f'{key}: '}{first['msg'][0].lower()}{first['msg'][1:]}") from None


class PlainDumper(yaml.SafeDumper):
    """Writes YAML that `parse_yaml` reads back: texts that it would take for numbers are quoted."""


class _Loader(yaml.SafeLoader):
    """The nodes of a YAML text, each checked once; aliases are written out, so no two values are one object."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}
        """Of each node that is read to its end: how many values it stands for."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node:
        """The next node, no larger and no deeper than is allowed."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if getattr(event, "tag", None) is not None:
            _fail(f"the tag {event.tag!r} is not allowed; write the value without a tag, quoted where it is text", mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            _fail(_TOO_DEEP, mark)
        node = super().compose_node(parent, index)
        assert node is not None
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self._sizes:
                _fail(f"the alias *{event.anchor} stands inside the value that it names", mark)
            return node
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        self._sizes[node] = 1 + sum(self._sizes[part] for part in parts)
        if self._sizes[node] > MAX_VALUES:
            _fail(f"more than {MAX_VALUES} values, those of aliases included", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The next mapping; its keys are single values, each there once."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                _fail("a key is a list or a mapping; a key is text", key_node.start_mark)
            key = self.value_of(key_node)
            if key in seen:
                _fail(f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return node

    def value_of(self, node: yaml.Node) -> Any:
        """What a node stands for."""
        if isinstance(node, yaml.MappingNode):
            self.flatten_mapping(node)  # <<, a mapping whose keys are taken over
            return {self.value_of(key): self.value_of(value) for key, value in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [self.value_of(part) for part in node.value]
        if node.tag == "tag:yaml.org,2002:merge":
            return node.value
        try:
            value = self.construct_object(node)
        except ValueError:
            _fail(f"{node.value[:20]!r} is not a number", node.start_mark)
        if isinstance(value, str):
            if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
                _fail("a NUL or half of a surrogate pair stands in a text", node.start_mark)
        elif isinstance(value, float) and not math.isfinite(value):
            _fail(f"{node.value[:20]!r} is not a finite number", node.start_mark)
        elif isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
            _fail(f"{node.value[:20]!r} does not fit into 64 bits", node.start_mark)
        return value


_KNOWN = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "merge")}
# The others, such as dates, are text.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag in _KNOWN]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, PlainDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+.0123456789"))


def _fail(problem: str, mark: yaml.Mark) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!r} is given twice")
    return values


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"{digits[:20]}... is too large for a number")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is too large for a number")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = (part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole))
        level = [part for part in parts if type(part) in (list, dict)] if type(value) in (list, dict) else []
        if not level:
            return
    raise ValueError(_TOO_DEEP)
