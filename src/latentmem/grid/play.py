"""Play a grid: run after run, by the ordinary recipes, each continued where it stopped; then write the table.

A cell is one memory of one run. A cell that cannot be played is recorded with its error, and the others go on. What one
run has computed is not computed again: equal models are loaded once, and a shared bank is collected once. A training,
and episodes played without memory or with text memory, are copied from a run that did exactly the same.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentmem import recipes
from latentmem.bank import bank_exists
from latentmem.bank_place import bank_place
from latentmem.config import Config, dump_config, team_label
from latentmem.errors import BankError, ConfigError, LatentMemError, RunError
from latentmem.files import read_as, read_json, write_atomic
from latentmem.grid.file import Grid, GridRun
from latentmem.grid.forms import PlayedResults
from latentmem.grid.report import write_tables
from latentmem.grid.results import Failure, Played, summarise
from latentmem.memory_names import MemoryName
from latentmem.processes import Processes
from latentmem.report.values import Row
from latentmem.runs import lock

PLAYED = "played.yaml"
"""File in a run's folder, written when all its cells are done: the configuration that they were played with."""


def play_grid(grid: Grid) -> Row:
    """Play what is not done yet, and write grid.json and the tables into the grid's folder.

    Returns:
        The content of grid.json.

    Raises:
        LatentMemError: several processes were launched, or a run has a mistake in its data, team or templates or names
            a bank that does not exist; such a mistake is reported before any run is played.
        RunError: raised at the end, if cells failed; the table has the others.
    """
    if Processes().size > 1:
        raise ConfigError("a grid is played by one process; start it without torchrun")
    shared = recipes.Shared()
    for run in grid.runs:
        shared.parts(run.config)
        if run.config.bank.path is None or run.bank is not None:
            continue
        if not bank_exists(place := bank_place(run.config.bank.path)):
            raise BankError(
                f"{place}: bank.path names a bank that is not there, and a grid fills only its own; collect it first"
            )
    teller = _Teller(sum(len(run.config.evaluate.memories) for run in grid.runs))
    played: list[Played] = []
    failures: list[Failure] = []
    banks: dict[str, str | None] = {}
    done = _Done()
    table: Row = {}
    for i, run in enumerate(grid.runs):
        began = time.perf_counter()
        results = _finished(run)
        lines: dict[MemoryName, str] = {}
        is_new = results is None
        if results is not None:
            for phase, _, users in _phases(run):
                if users:
                    done.add(run, phase)
        else:
            if run.bank is not None and run.bank.name not in banks:
                banks[run.bank.name] = _collect(run.bank.config, shared)
            missing = banks[run.bank.name] if run.bank is not None else None
            results, lines = _play(run, shared, done, missing)
        teller.tell(run, results, lines, time.perf_counter() - began if is_new else None)
        failures += [Failure(run.place, str(memory), line) for memory, line in lines.items()]
        if results is not None:
            played.append(Played(run.place, results))
            for row in results["memories"]:
                done.add(run, "evaluate", MemoryName.parse(row["name"]))
        if is_new or i == len(grid.runs) - 1:
            table = _tell_results(grid, played, failures, teller.num_cells)
    _say(write_tables(grid.folder, table))
    if failures:
        raise RunError(
            f"{grid.folder}: {len(failures)} of {teller.num_cells} cells failed, the first, "
            f"{failures[0].place.name} {failures[0].memory}, with: {failures[0].line}; "
            "mend that and run the same command again, the others are kept"
        )
    return table


def _tell_results(grid: Grid, played: list[Played], failures: list[Failure], num_cells: int) -> Row:
    """Write grid.json and return its content."""
    most = max(run.config.evaluate.num_bootstraps for run in grid.runs)
    teams = {run.config.train_teams for run in grid.runs if run.bank is not None}
    trained = [*map(team_label, teams.pop())] if len(teams) == 1 else []
    table = summarise(str(grid.folder), grid.section, played, failures, num_cells, most, trained)
    write_atomic(grid.folder / "grid.json", json.dumps(table, indent=1, allow_nan=False) + "\n")
    return table


def _finished(run: GridRun) -> Row | None:
    """Return the results of a run if all its cells were done with exactly this configuration, else None."""
    folder = Path(run.config.run)
    mark = folder / PLAYED
    if not mark.exists() or mark.read_bytes() != dump_config(run.config).encode():
        return None
    read_as(folder / "results.json", PlayedResults)
    return read_json(folder / "results.json")


def _collect(config: Config, shared: recipes.Shared) -> str | None:
    """Fill a shared bank; return the error's text if that failed."""
    parts = shared.parts(config)
    try:
        recipes.collect(config, parts)
    except LatentMemError as error:
        return _line(error)
    finally:
        parts.close()
    return None


def _play(
    run: GridRun, shared: recipes.Shared, done: "_Done", missing: str | None
) -> tuple[Row | None, dict[MemoryName, str]]:
    """Play a run; return the results of the memories that could be played, and an error line for each of the others.

    `missing` is the error that kept the run's bank from being filled, if any.
    """
    names = run.config.evaluate.memories
    lines = {} if missing is None else dict.fromkeys((name for name in names if name.needs_bank), missing)
    parts = shared.parts(run.config)
    try:
        for phase, recipe, users in _phases(run):
            waiting = [name for name in users if name not in lines]
            if waiting:
                try:
                    done.copy_training(run, phase)
                    recipe(run.config, parts)
                    done.add(run, phase)
                except LatentMemError as error:
                    lines |= dict.fromkeys(waiting, _line(error))
        for name in names:
            try:
                done.copy_episodes(run, name)
            except LatentMemError as error:
                lines[name] = _line(error)
        results = _evaluate(run.config, parts, lines)
    finally:
        parts.close()
    if results is not None and not lines:
        write_atomic(Path(run.config.run) / PLAYED, dump_config(run.config))
    return results, lines


def _phases(run: GridRun) -> list[tuple[str, Callable[[Config, Any], None], list[MemoryName]]]:
    """List the phases before the evaluation, each with the memories (and controls of them) that need it."""
    names = run.config.evaluate.memories
    recalling = [name for name in names if name.needs_bank]

    def users(phase: str) -> list[MemoryName]:
        return [name for name in names if phase in recipes.trainings(run.config, name.weights)]

    return [
        *([("collect", recipes.collect, recalling)] if run.config.bank.path is None else []),
        ("warmup", recipes.train_warmup, users("warmup")),
        ("sft", recipes.train_sft, users("sft")),
        ("lmpo", recipes.train_lmpo, users("lmpo")),
        ("grpo", recipes.train_grpo, users("grpo")),
    ]


def _evaluate(config: Config, parts: Any, lines: dict[MemoryName, str]) -> Row | None:
    """Play the memories that have no error in `lines` yet; if that fails, play each alone to find out which fail."""

    def play(names: list[MemoryName]) -> Row:
        section = config.evaluate.model_copy(update={"memories": tuple(names)})
        return recipes.play_test(config.model_copy(update={"evaluate": section}), parts)

    names = [name for name in config.evaluate.memories if name not in lines]
    for attempt in (names, None):
        left = [name for name in names if name not in lines]
        if not left:
            return None
        try:
            return play(left)
        except LatentMemError as error:
            if attempt is None or len(left) == 1:
                lines |= dict.fromkeys(left, _line(error))
                return None
        for name in left:
            try:
                play([name])
            except LatentMemError as error:
                lines[name] = _line(error)
    raise AssertionError("unreachable")


class _Done:
    """What runs have computed, and in which folder; a run that would compute exactly the same copies it."""

    def __init__(self) -> None:
        self._folders: dict[str, Path] = {}

    def add(self, run: GridRun, phase: str, memory: MemoryName | None = None) -> None:
        """Record that a run has done a phase; for `evaluate`, the part of one memory."""
        key = _key(run, phase, memory)
        folder = Path(run.config.run) / phase
        if key is not None and folder.exists():  # a user may have deleted the folder to free space
            self._folders.setdefault(key, folder)

    def copy_training(self, run: GridRun, phase: str) -> None:
        """Copy into a phase that has not begun all that another run did in it; a kill never leaves half a copy.

        Raises:
            RunError: the copy cannot be written, or another process works in the run's folder.
        """
        source, folder = self._folders.get(_key(run, phase) or ""), Path(run.config.run) / phase
        if source is None or folder.exists():
            return
        fresh = folder.with_name(f".{phase}.fresh")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with lock(folder.parent):
                shutil.rmtree(fresh, ignore_errors=True)
                shutil.copytree(source, fresh)
                fresh.rename(folder)
        except OSError as error:
            raise RunError(f"{folder}: cannot be copied from {source} ({error})") from None

    def copy_episodes(self, run: GridRun, memory: MemoryName) -> None:
        """Copy the episodes of a memory from a run in which the same team has played the same tasks with it.

        Raises:
            RunError: the copy cannot be written.
        """
        folder, stem = Path(run.config.run) / "evaluate", memory.file_stem
        source = self._folders.get(_key(run, "evaluate", memory) or "")
        if source is None or (folder / f"{stem}.costs").exists():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for suffix in ("jsonl", "costs"):  # in this order, because a batch counts once its cost is there
                write_atomic(folder / f"{stem}.{suffix}", (source / f"{stem}.{suffix}").read_bytes())
        except OSError as error:
            raise RunError(f"{folder}: {memory} cannot be copied from {source} ({error})") from None


def _key(run: GridRun, phase: str, memory: MemoryName | None = None) -> str | None:
    """Return a key that is equal for runs in which a phase is the same computation; None if that is not checked.

    Banks are compared by the phase that filled them. A bank filled outside the grid may change between two runs.
    """
    config = run.config
    bank = run.bank.name if run.bank is not None else config.run
    parts: list[Any] = [phase, None if memory is None else str(memory)]
    if memory is None:
        parts += [recipes.what_decides(config, phase), None if phase in ("warmup", "grpo") else bank]
        parts += [getattr(config, before).model_dump(mode="json") for before in recipes.trainings(config, phase)[1:]]
    elif str(memory) in ("none", "text") and not config.evaluate.online:
        values = config.model_dump(mode="json")
        parts += [values[key] for key in ("team", "max_turns", "data", "model", "sampling")]
        parts.append(
            {key: values["evaluate"][key] for key in ("num_tasks", "batch_size", "temperature", "max_response_tokens")}
        )
        if config.evaluate.temperature:
            parts.append(config.seed)
        if memory.kind == "text":
            parts += [values["bank"], values["memory"], bank]
    else:
        return None
    return json.dumps(parts)


class _Teller:
    """Prints one line for each cell, with an estimate of the remaining time."""

    def __init__(self, num_cells: int) -> None:
        self.num_cells = num_cells
        self._num_done = 0
        self._num_played = 0
        self._seconds = 0.0

    def tell(self, run: GridRun, results: Row | None, lines: dict[MemoryName, str], seconds: float | None) -> None:
        """Print the lines of a run's cells; `seconds` is the time they took, None if they were done before."""
        rows = {row["name"]: row for row in (results or {"memories": []})["memories"]}
        names = run.config.evaluate.memories
        if seconds is not None:
            self._num_played += len(names)
            self._seconds += seconds
        for name in names:
            self._num_done += 1
            if name in lines:
                said = f"failed: {lines[name]}"
            else:
                row = rows[str(name)]
                said = f"{100 * row['accuracy']:.1f}% ({sum(row['successes'])} of {len(row['successes'])})"
            if seconds is None:
                said += ", done before"
            elif name == names[-1] and self._num_done < self.num_cells:
                left = self._seconds / self._num_played * (self.num_cells - self._num_done)
                said += f"; about {_duration(left)} left"
            width = len(str(self.num_cells))
            _say(f"[{self._num_done:{width}}/{self.num_cells}] {run.place.name} {name}: {said}")


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{max(1, round(seconds / 60))} min"


def _line(error: LatentMemError) -> str:
    return " ".join(str(error).split())


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
