"""Compute the numbers of a grid from its runs' results: pool seeds, compare memories, correct p-values over all.

Input and output are plain JSON values. Within a benchmark all teams, seeds and memories have the same tasks, and every
interval and test keeps them paired.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from latentmem.errors import RunError
from latentmem.grid.file import GridSection, Place
from latentmem.memory_names import MemoryName
from latentmem.report.values import Row
from latentmem.stats import crossed_comparison, crossed_interval, holm

SCHEMA_VERSION = 1
"""Version of grid.json; a reader refuses a newer one."""

BASELINES = ("none", "text", "real")
"""What a memory is compared with: no memory, text memory, or, for a control, the memory that it belongs to."""

_MEANS = (
    "reward",
    "no_answer",
    "prompt_tokens",
    "latent_tokens",
    "generated_tokens",
    "memory_prompt_tokens",
    "memory_generated_tokens",
)
"""Numbers per task whose mean over its runs a row holds; runs of older versions lack some."""


@dataclass(frozen=True)
class Played:
    """A run that was evaluated."""

    place: Place
    results: Row
    """The content of its results.json."""


@dataclass(frozen=True)
class Failure:
    """A cell that could not be played."""

    place: Place
    memory: str
    line: str
    """What is wrong, and what to do about it."""


def summarise(
    folder: str,
    section: GridSection,
    played: Sequence[Played],
    failures: Sequence[Failure],
    num_cells: int,
    num_bootstraps: int,
    train_teams: Sequence[str] = (),
    seed: int = 0,
) -> Row:
    """Make grid.json: all cells, a row for each memory of a benchmark, team and variant, and a row over all of those.

    Args:
        folder: the grid's folder.
        section: what was varied.
        played: runs with results, in the grid's order.
        failures: cells without results.
        num_cells: number of cells in the whole grid.
        num_bootstraps: resamples for intervals and p-values that the runs' results do not have yet.
        train_teams: teams that collected and trained for all runs; if empty, each run's own team did, or all others
            (`leave_out`).
        seed: seed of the resampling.

    Returns:
        The table as plain JSON values; see docs/grid.md.

    Raises:
        RunError: runs of one benchmark, team and variant were played on different tasks.
    """
    cells = [_cell(run, memory) for run in played for memory in run.results["memories"]]
    groups: dict[tuple[str, str, str], list[Played]] = {}
    for run in played:
        groups.setdefault((run.place.variant, run.place.benchmark, run.place.team), []).append(run)
    tables = {group: _tables(runs) for group, runs in groups.items()}
    rows = [
        row
        for (variant, benchmark, team), runs in groups.items()
        for row in _rows(
            {"variant": variant, "benchmark": benchmark, "team": team},
            runs,
            tables[variant, benchmark, team],
            num_bootstraps,
            seed,
        )
    ]
    overall = []
    for variant in dict.fromkeys(variant for variant, _, _ in groups):
        of_variant = {group: table for group, table in tables.items() if group[0] == variant}
        if len(of_variant) > 1:
            overall += _overall(variant, of_variant, rows, num_bootstraps, seed)
    return {
        "schema_version": SCHEMA_VERSION,
        "run": folder,
        "grid": section.model_dump(mode="json")
        | {"teams": [team if isinstance(team, str) else team.label for team in section.teams]},
        "train_teams": list(train_teams),
        "models": sorted({run.results["model"] for run in played}),
        "temperatures": sorted({run.results["temperature"] for run in played}),
        "num_cells": num_cells,
        "num_done": len(cells),
        "num_comparisons": _correct([*rows, *overall]),
        "rows": rows,
        "overall": overall,
        "cells": cells,
        "failures": [asdict(failure.place) | {"memory": failure.memory, "line": failure.line} for failure in failures],
    }


@dataclass(frozen=True)
class _Tables:
    """The successes of one benchmark, team and variant."""

    tasks: tuple[str, ...]
    successes: Mapping[str, np.ndarray]
    """By memory, [S, n], for the memories that all seeds have."""


def _cell(run: Played, memory: Row) -> Row:
    kept = (
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "num_errors",
        "seconds",
        "peak_memory_mb",
        "successes",
        "rewards",
    )
    return (
        asdict(run.place)
        | {"memory": memory["name"], "run": run.place.name}
        | {key: memory.get(key) for key in ("learning", "carried")}
        | {key: memory[key] for key in kept}
        | {key: memory.get(key, 0.0) for key in _MEANS}
    )


def _tables(runs: Sequence[Played]) -> _Tables:
    first = runs[0]
    for run in runs:
        if run.results["task_ids"] != first.results["task_ids"]:
            raise RunError(
                f"runs {first.place.name} and {run.place.name} were played on different tasks and cannot be pooled; "
                "give the grid a new folder with run=FOLDER"
            )
    by_run = [{memory["name"]: memory["successes"] for memory in run.results["memories"]} for run in runs]
    everywhere = [name for name in by_run[0] if all(name in found for found in by_run)]
    return _Tables(
        tuple(first.results["task_ids"]),
        {name: np.array([found[name] for found in by_run], dtype=float) for name in everywhere},
    )


def _rows(place: Row, runs: Sequence[Played], tables: _Tables, num_bootstraps: int, seed: int) -> list[Row]:
    rows = []
    for name, successes in tables.successes.items():
        of_seeds = [next(m for m in run.results["memories"] if m["name"] == name) for run in runs]
        row = place | {
            "memory": name,
            "num_tasks": len(tables.tasks),
            "seeds": [run.place.seed for run in runs],
            "accuracy": float(successes.mean()),
            "by_seed": successes.mean(axis=1).tolist(),
        }
        if len(runs) == 1:  # then the run's own interval holds
            row |= {key: of_seeds[0][key] for key in ("accuracy_low", "accuracy_high")}
        else:
            ends = crossed_interval([successes], [tables.tasks], (0.0, 1.0), seed, num_bootstraps)
            row |= dict(zip(("accuracy_low", "accuracy_high"), ends, strict=True))
        row |= {key: float(np.mean([memory.get(key, 0.0) for memory in of_seeds])) for key in _MEANS}
        row["carried"] = _carried(of_seeds)
        row["num_errors"] = sum(memory["num_errors"] for memory in of_seeds)
        row["seconds"] = {
            part: float(np.mean([memory["seconds"][part] for memory in of_seeds])) for part in of_seeds[0]["seconds"]
        }
        told = of_seeds[0] if len(runs) == 1 else {}
        rows.append(row | _compared(name, [tables], tables.successes, num_bootstraps, seed, told))
    return rows


def _carried(rows: Sequence[Row]) -> Row | None:
    """Return what a memory carries: one row's value with its interval, or several rows' mean; None if any lacks it."""
    found = [row["carried"] for row in rows if row.get("carried")]
    if len(found) < len(rows):
        return None
    return dict(found[0]) if len(found) == 1 else {"nats": float(np.mean([carried["nats"] for carried in found]))}


def _overall(
    variant: str, groups: Mapping[tuple[str, str, str], _Tables], rows: Sequence[Row], num_bootstraps: int, seed: int
) -> list[Row]:
    """Average over benchmarks and teams, each with equal weight, for the memories that all of them have."""
    tables = list(groups.values())
    tasks = [table.tasks for table in tables]
    everywhere = [name for name in tables[0].successes if all(name in table.successes for table in tables)]
    overall = []
    for name in everywhere:
        successes = [table.successes[name] for table in tables]
        low, high = crossed_interval(successes, tasks, (0.0, 1.0), seed, num_bootstraps)
        parts = [row for row in rows if row["variant"] == variant and row["memory"] == name]
        row: Row = {
            "variant": variant,
            "memory": name,
            "num_tasks": len({key for keys in tasks for key in keys}),
            "accuracy": float(np.mean([values.mean() for values in successes])),
            "accuracy_low": low,
            "accuracy_high": high,
            "carried": _carried(parts),
            "num_errors": sum(part["num_errors"] for part in parts),
            "seconds": {"total": float(np.mean([part["seconds"]["total"] for part in parts]))},
        }
        row |= {key: float(np.mean([part[key] for part in parts])) for key in _MEANS}
        overall.append(row | _compared(name, tables, everywhere, num_bootstraps, seed))
    return overall


def _compared(
    memory: str,
    tables: Sequence[_Tables],
    played: Collection[str],
    num_bootstraps: int,
    seed: int,
    told: Mapping[str, Any] = MappingProxyType({}),
) -> Row:
    """Compare a memory with each baseline over all tables; take over comparisons in `told`; None where none is due."""
    found: Row = {}
    for baseline in BASELINES:
        key, other = f"vs_{baseline}", _other(memory, baseline, played)
        if other is None:
            found[key] = None
        elif told.get(key):
            found[key] = dict(told[key])
        else:
            ours, theirs = ([table.successes[name] for table in tables] for name in (memory, other))
            tasks = [table.tasks for table in tables]
            found[key] = asdict(crossed_comparison(ours, theirs, tasks, num_bootstraps, seed))
    return found


def _other(memory: str, baseline: str, played: Collection[str]) -> str | None:
    """Return the memory to compare with, so that each pair occurs once: none against text is text against none."""
    name = MemoryName.parse(memory)
    if name.control is not None and str(name.real) in played:
        # For a control only one question is asked: what does the memory itself lose?
        return str(name.real) if baseline == "real" else None
    return baseline if baseline in played and memory not in ("none", baseline) else None


def _correct(rows: Sequence[Row]) -> int:
    """Add to each comparison its p-value corrected for all of them, and return their number."""
    found = [row[f"vs_{baseline}"] for row in rows for baseline in BASELINES if row[f"vs_{baseline}"]]
    for comparison, p in zip(found, holm([comparison["p_value"] for comparison in found]), strict=True):
        comparison["p_holm"] = p
    return len(found)
