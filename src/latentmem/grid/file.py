"""Turn the file of a grid into ordinary configurations, one for each run, and check all before any run is started.

The file is a configuration without `data`, with a section `grid` beside the other sections. What varies (benchmark,
team, seed, variant) is laid over it key by key. Runs that would fill their banks alike share one bank. It is collected
in its own folder, and the runs name it as `bank.path`. Loads no torch.
"""

import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, PlainSerializer, model_validator

from latentmem.config import (
    FILLS_BANK,
    FILLS_BANK_IN_BANK,
    BankSection,
    Config,
    Section,
    load_config,
    parse_config,
    parse_section,
    read_values,
)
from latentmem.config.section import AsTuple, MemoryNames, PathText
from latentmem.config.team import ProgramSection, SomeTeams, team_label
from latentmem.errors import ConfigError
from latentmem.memory_names import DEFAULT_MEMORIES
from latentmem.passwords import hidden_in

Changes = Annotated[dict[str, JsonValue], PlainSerializer(hidden_in)]
"""Dotted keys and their values, to be laid over a configuration; what is written down has no password of a URL."""

_WHOLE = ("data", "data.train", "data.test", "team")
"""A mapping given for one of these replaces the old one whole: tasks come from one source, and one team plays."""


def _named(value: Any) -> Any:
    """Turn a list of benchmarks into a mapping from each one's short name to itself; leave anything else unchanged."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        if len(set(value)) < len(value):
            raise ValueError("names one benchmark twice")
        return {Path(name).stem: name for name in value}
    return value


class GridSection(Section):
    """What the grid varies. Every combination is a run, and each of a run's memories is a cell."""

    base: PathText | None = None
    """A packaged configuration or a file, over which the sections beside `grid` are laid; null: only those sections."""
    benchmarks: Annotated[dict[str, str | Changes], BeforeValidator(_named), Field(min_length=1)]
    """By name, either a packaged configuration or file, of which `data`, `max_turns` and `sampling.max_response_tokens`
    are used, or keys and values; among these, `base` may name such a configuration to begin with."""
    teams: SomeTeams = ("autogen",)
    """Packaged teams, files that describe teams, or sections of kind `program`."""
    memories: MemoryNames = DEFAULT_MEMORIES
    """Memories, as in `evaluate.memories`; what they need is collected and trained first."""
    seeds: Annotated[tuple[int, ...], AsTuple, Field(min_length=1)] = (0,)
    """Seeds of all randomness except that of the tasks, which are the same for all seeds."""
    variants: dict[str, Changes] = Field(default={})
    """By name, the keys and values that a variant changes, such as `composer.num_latents: 4`."""
    leave_out: Literal["none", "benchmark", "team"] = "none"
    """`benchmark`: a run learns from all other benchmarks and is evaluated on its own. `team`: all other teams collect
    and train, and the run's own team is evaluated."""

    @model_validator(mode="after")
    def _no_two_alike(self) -> Self:
        for key, names in (("teams", [*map(team_label, self.teams)]), ("seeds", [*self.seeds])):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f"has {twice[0]!r} twice among its {key}; leave one out, or rename its file")
        if self.leave_out == "benchmark" and len(self.benchmarks) < 2:
            raise ValueError("has one benchmark; leave_out: benchmark needs another to learn from")
        if self.leave_out == "team" and len(self.teams) < 2:
            raise ValueError("has one team; leave_out: team needs another to learn with")
        return self


class _File(Section):
    grid: GridSection


@dataclass(frozen=True)
class Place:
    """The position of a run in the grid."""

    benchmark: str
    team: str
    variant: str
    """The variant's name; empty if the grid has no variants."""
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        parts = [self.benchmark, self.team, *([self.variant] if self.variant else []), f"seed{self.seed}"]
        return "-".join(re.sub(r"[^\w.+]+", "_", part) for part in parts)


@dataclass(frozen=True)
class GridBank:
    """A bank that runs share, and the run that collects it."""

    name: str
    config: Config


@dataclass(frozen=True)
class GridRun:
    """One run of a grid."""

    place: Place
    config: Config
    bank: GridBank | None = None
    """The shared bank that it reads; None if it needs none, has its own, or was given one in `bank.path`."""


@dataclass(frozen=True)
class Grid:
    """All runs of a grid's file, in the order in which they are played."""

    folder: Path
    section: GridSection
    runs: tuple[GridRun, ...]


def load_grid(values: Mapping[str, Any], source: str) -> Grid:
    """Make all runs of a grid and check their configurations.

    Args:
        values: the values that `read_values` read; they have a key `grid`.
        source: the file's name, for errors.

    Raises:
        ConfigError: a mistake in the grid, or in the configuration of one of its runs, which the message names.
    """
    section = parse_section(_File, {"grid": values["grid"]}, source).grid
    beside = {key: value for key, value in values.items() if key != "grid"}
    if not isinstance(beside.get("run"), str) or not beside["run"]:
        raise ConfigError(f"{source}: run is missing; it names the grid's folder")
    common = overlay(read_values(section.base), beside) if section.base is not None else beside
    if "grid" in common:
        raise ConfigError(f"{source}: grid.base is {section.base!r}, which is a grid itself; name a configuration")
    folder = Path(beside["run"])
    benchmarks = {
        name: _benchmark(common, given, f"{source}: benchmark {name}") for name, given in section.benchmarks.items()
    }
    runs: list[GridRun] = []
    for name, team, (variant, changes), seed in product(
        section.benchmarks, section.teams, (section.variants or {"": {}}).items(), section.seeds
    ):
        place = Place(name, team_label(team), variant, seed)
        run = {
            "run": str(folder / "cells" / place.name),
            "team": _plain(team),
            "seed": seed,
            "evaluate.memories": [*map(str, section.memories)],
        }
        run_values = overlay(overlay(benchmarks[name], run), changes)
        if section.leave_out == "benchmark":
            run_values = overlay(run_values, _others_mixed(benchmarks, name))
        elif section.leave_out == "team":
            run_values["train_teams"] = [_plain(other) for other in section.teams if other != team]
        config = parse_config(run_values, f"{source}: run {place.name}")
        if config.evaluate.split != "test":
            raise ConfigError(
                f"{source}: run {place.name}: evaluate.split is {config.evaluate.split!r}; a grid plays the test "
                "split only; for another split, evaluate each configuration on its own"
            )
        runs.append(GridRun(place, config))
    twice = [name for name, count in Counter(run.place.name for run in runs).items() if count > 1]
    if twice:
        raise ConfigError(f"{source}: two runs would be called {twice[0]}; rename a benchmark or a variant")
    return Grid(folder, section, tuple(_with_bank(run, folder) for run in runs))


def overlay(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay changes over values and return the result: keys may be dotted, mappings are merged, all else is replaced.

    A mapping given for `data`, `data.train`, `data.test` or `team` is not merged: it replaces the old one.

    >>> overlay({"lmpo": {"group_size": 8, "beta": 0.0}}, {"lmpo.group_size": 4})
    {'lmpo': {'group_size': 4, 'beta': 0.0}}
    """
    result = copy.deepcopy(dict(values))
    for key, value in changes.items():
        _lay(result, key, value, "")
    return result


def _lay(values: dict[str, Any], key: str, value: Any, parents: str) -> None:
    first, dot, rest = key.partition(".")
    path = f"{parents}{first}"
    if dot or (isinstance(value, dict) and path not in _WHOLE):
        if not isinstance(values.get(first), dict):
            values[first] = {}
        for name, part in {rest: value}.items() if dot else value.items():
            _lay(values[first], name, part, f"{path}.")
    else:
        values[first] = copy.deepcopy(value)


def _benchmark(common: Mapping[str, Any], given: str | Changes, where: str) -> dict[str, Any]:
    """Return the values that all runs on a benchmark share."""
    changes = {"base": given} if isinstance(given, str) else dict(given)
    base = changes.pop("base", None)
    values = dict(common)
    if base is not None:
        try:
            config = load_config(str(base))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        tasks = config.model_dump(mode="json", by_alias=True, include={"data": True, "max_turns": True})
        values = overlay(values, tasks | {"sampling.max_response_tokens": config.sampling.max_response_tokens})
    values = overlay(values, changes)
    parse_config(values, where)
    return values


def _others_mixed(benchmarks: Mapping[str, Mapping[str, Any]], left_out: str) -> Changes:
    """Return the changes that make a run learn from all benchmarks but one, and be evaluated on that one."""

    def part(name: str) -> dict[str, JsonValue]:
        return {"data": benchmarks[name].get("data"), "max_turns": benchmarks[name].get("max_turns", 1)}

    lengths = [values.get("sampling", {}).get("max_response_tokens") for values in benchmarks.values()]
    changes: Changes = {
        "data": {
            "kind": "mix",
            "train": [part(name) for name in benchmarks if name != left_out],
            "test": [part(left_out)],
        },
        "max_turns": max(values.get("max_turns", 1) for values in benchmarks.values()),
    }
    if any(lengths):
        changes["sampling.max_response_tokens"] = max(length for length in lengths if length)
    return changes


def _with_bank(run: GridRun, folder: Path) -> GridRun:
    bank = _bank_for(run, folder)
    if bank is None:
        return run
    section = run.config.bank.model_copy(update={"path": str(Path(bank.config.run) / "bank.sqlite")})
    return replace(run, config=run.config.model_copy(update={"bank": section}), bank=bank)


def _bank_for(run: GridRun, folder: Path) -> GridBank | None:
    """Return the bank that a run reads; runs that would fill a bank alike, without memory, share one."""
    config = run.config
    if (
        config.bank.path is not None
        or config.collect.memory != "none"
        or not any(name.needs_bank for name in config.evaluate.memories)
    ):
        return None
    values = config.model_dump(mode="json", by_alias=True)
    players = config.train_teams or (config.team,)
    kept = {key: values[key] for key in FILLS_BANK} | {
        "team": _plain(players[0]),  # also if the run's own team is only evaluated and others collect
        # Keys at their defaults do not change the name, so banks collected before such a key existed are still found.
        "bank": {
            key: values["bank"][key]
            for key in FILLS_BANK_IN_BANK
            if key == "embedder" or values["bank"][key] != getattr(BankSection(), key)
        },
    }
    digest = hashlib.sha256(json.dumps(kept).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    place = replace(run.place, team="+".join(map(team_label, players)), variant="")
    name = f"{place.name}-{digest}"
    return GridBank(name, parse_config(kept | {"run": str(folder / "banks" / name)}))


def _plain(team: str | ProgramSection) -> JsonValue:
    """Return a team as it stands in a file."""
    return team if isinstance(team, str) else team.model_dump(mode="json")
