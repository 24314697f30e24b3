"""From YAML and the command line to a configuration: packaged files, dotted overrides, and mistakes in one line."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from latentmem.config.data import (
    CodeSection,
    HiddenFactsSection,
    MixSection,
    OwnDataSection,
    PDDLSection,
    QASection,
    ReasoningSection,
)
from latentmem.config.engine import ENGINES
from latentmem.config.experiment import Config
from latentmem.config.section import AnySection, Section
from latentmem.config.team import FORMS, ProgramSection
from latentmem.errors import ConfigError, suggest
from latentmem.parsing import PlainDumper, parse_yaml
from latentmem.passwords import hidden_in


def packaged_configs() -> dict[str, Path]:
    """Names and files of the configurations that ship with the package."""
    folder = Path(str(files("latentmem"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def packaged_grids() -> dict[str, Path]:
    """Names and files of the grids of runs that ship with the package."""
    folder = Path(str(files("latentmem"))) / "configs" / "grids"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(source: str, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, or the packaged configuration of that name, and apply `key=value` overrides.

    Raises:
        ConfigError: no such file or name, not YAML, a grid of many runs, an unknown key, a wrong type or value.
    """
    return _load(source, overrides, {})


def load_serving_config(source: str, overrides: list[str] | None = None) -> Config:
    """Read a configuration as `load_config` does, for a server: nothing is played, so `data` may be left out.

    Raises:
        ConfigError: as there.
    """
    return _load(source, overrides, {"data": {"kind": "hidden_facts"}})


def _load(source: str, overrides: list[str] | None, absent: dict[str, Any]) -> Config:
    values = read_values(source, overrides)
    if "grid" in values:
        raise ConfigError(f"{source}: is a grid of many runs; start it with `latentmem evaluate`")
    return parse_config(absent | values, source)


def read_values(source: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """What stands in a YAML file, or under a packaged name, with the overrides applied; not checked any further.

    Raises:
        ConfigError: no such file or name, or not a mapping in YAML.
    """
    packaged = packaged_configs() | packaged_grids()
    path = packaged.get(source) or Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = suggest(source, packaged)
        raise ConfigError(f"{source}: no such file, and no packaged configuration of that name; {hint}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source}: cannot be read ({error})") from None
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of keys to values, found {type(values).__name__}")
    for override in overrides or []:
        _override(values, override)
    return values


def parse_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Check a mapping against the schema.

    Raises:
        ConfigError: one line naming the first wrong key, what was found and what was expected.
    """
    return parse_section(Config, values, source)


def parse_section(schema: type[AnySection], values: dict[str, Any], source: str) -> AnySection:
    """`parse_config` for another schema.

    Raises:
        ConfigError: as there.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, values, schema)}") from None


def with_fields(section: AnySection, fields: Mapping[str, Any], source: str) -> AnySection:
    """The section with some of its fields set anew, checked as if they stood in a file.

    Raises:
        ConfigError: an unknown field or a wrong value, in one line that begins with `source`.
    """
    return parse_section(type(section), {**dict(section), **fields}, source) if fields else section


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, defaults written out; `load_config` reads it back to an equal one.

    Passwords of URLs are left out, wherever they stand.
    """
    return yaml.dump(hidden_in(config.model_dump(mode="json", by_alias=True)), Dumper=PlainDumper, sort_keys=False)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{override!r} is not an override; write key=value, as in lmpo.group_size=8")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        # A URL that cannot even be read may have its password anywhere.
        shown = f"{key}=..." if "://" in text else override
        raise ConfigError(f"{shown!r}: the value is not valid YAML: {error}") from None
    *parents, last = key.split(".")
    section: Any = values
    for part in parents:
        if isinstance(section, list):
            section = section[_position(part, section, override)]
        else:
            if section.get(part) is None:  # absent, or written without a value
                section[part] = {}
            section = section[part]
        if not isinstance(section, dict | list):
            raise ConfigError(f"{override!r}: {part} is a value, not a section")
    section[_position(last, section, override) if isinstance(section, list) else last] = value


def _position(part: str, entries: list[Any], override: str) -> int:
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(entries):
        raise ConfigError(
            f"{override!r}: the list there has {len(entries)} entries; give a position from 0, below that"
        )
    return int(part)


def _explain(error: ValidationError, values: dict[str, Any], schema: type[Section]) -> str:
    # A misspelt key that is required is both missing and unknown; the second tells what to do.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # The discriminator of a union stands in the location although no user wrote it.
    location = [str(part) for part in first["loc"] if part not in {*_KINDS, *ENGINES, *FORMS}]
    key = ".".join(location)
    found = first.get("input")
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {suggest(location[-1], _known_keys(location[:-1], values, schema))}"
    if first["type"] == "invalid_key":
        return f"key {key!r} is not text; quote it, or remove it"
    if first["type"] == "missing":
        return f"{key}: missing; it has no default"
    if first["type"] == "value_error":
        return f"{key} {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    if first["type"] == "union_tag_not_found" and found is not None and not isinstance(found, dict):
        return f"{key} is {_quoted(found)} ({type(found).__name__}); {_EXPECTED['model_type']}"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kind = found.get("kind") if isinstance(found, dict) else found
        if location[-1] == "engine":
            return f"{key}.kind is {kind!r}; {suggest(str(kind), ENGINES)}"
        known = [kind for kind in _KINDS if kind != "own"]
        return f"{key}.kind is {kind!r}; {suggest(str(kind), known)}, or `module:Name` of a class of your own"
    if first["type"] == "literal_error":
        return f"{key} is {_quoted(found)}; expected {first['ctx']['expected']}"
    if first["type"] in ("model_type", "model_attributes_type") and found is None:
        return f"{key} is empty; give it keys and values, or remove the line"
    expected = _EXPECTED.get(first["type"]) or f"{first['msg'][0].lower()}{first['msg'][1:]}"
    return f"{key} is {_quoted(found)} ({type(found).__name__}); {expected}"


def _quoted(found: Any) -> str:
    """Return what was found, for an error; nothing of what may be the pieces of a database's address."""
    quoted = repr(found)
    return "..." if "postgres" in quoted and "://" in quoted else quoted


_KINDS: dict[str, type[Section]] = {
    "reasoning_gym": ReasoningSection,
    "qa": QASection,
    "code": CodeSection,
    "pddl": PDDLSection,
    "hidden_facts": HiddenFactsSection,
    "mix": MixSection,
    "own": OwnDataSection,
}
"""The sections that `data` may be, by their kind."""
_EXPECTED = {
    "model_type": "expected a section of keys and values",
    "model_attributes_type": "expected a section of keys and values",
    "tuple_type": "expected a list",
    "too_short": "expected at least one entry",
    "string_too_short": "expected some text",
}
"""Our words where pydantic speaks of Python's types."""


def _known_keys(location: list[str], values: Any, schema: type[Section]) -> list[str]:
    """Keys of the section that a location names, found by walking the schema along with the values."""
    section: Any = schema
    for part in location:
        values = values[int(part)] if part.isdigit() else values.get(part, {})
        if part.isdigit():
            continue
        if part == "data":
            section = _KINDS.get(values["kind"], OwnDataSection)
            continue
        if part == "engine":
            section = ENGINES[values["kind"]]
            continue
        if part in ("team", "train_teams", "teams"):
            section = ProgramSection
            continue
        annotation = section.model_fields[part].annotation
        arguments = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, Section)]
        section = arguments[0] if arguments else annotation
    return [field.alias or name for name, field in section.model_fields.items()]
