"""What a phase begins with: its processes, its parts, its run, and the settings that it must keep."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from latentmem.config import ENGINE_FREE, TEAM_FREE, Config, ProgramSection, dump_config, parse_config
from latentmem.environments.environment import Domain, Split
from latentmem.errors import ConfigError
from latentmem.evaluation import check_online
from latentmem.folders import EVALUATIONS
from latentmem.memory_names import TRAININGS
from latentmem.passwords import hidden_in
from latentmem.processes import Processes
from latentmem.recipes.parts import Parts
from latentmem.runs import Run, SilentRun
from latentmem.tracking import check_trackers

logger = logging.getLogger(__name__)

_SETUP = ("seed", "team", "own", "max_turns", "data", "model", "composer", "bank", "memory", "rivals", "sampling")
"""Sections that matter to every phase but the warm-up."""
_WARMUP_SETUP = ("seed", "team", "own", "model", "composer", "memory")
"""Sections that matter to the warm-up, which reads neither data nor bank and plays nothing."""


@dataclass(frozen=True)
class Phase:
    """A phase in progress, in one of the processes that work on it together."""

    config: Config
    name: str
    parts: Parts
    processes: Processes
    opened: Run | None
    """The run, open for writing; None in all processes but the first."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.opened is not None

    @property
    def run(self) -> Run | SilentRun:
        """Where this process logs."""
        return self.opened or SilentRun()

    def say(self, text: str) -> None:
        """Print one or more lines to standard output, once for all processes."""
        if self.is_first:
            say(text)


@contextmanager
def begin(config: Config, phase: str, parts: Parts | None) -> Iterator[Phase]:
    """Begin a phase: make its parts unless they are given, and open the run in the first process.

    A mistake in one process ends all of them. A mistake in the cheap parts is reported before the run's folder is made.
    Programs that parts made here have started end with the phase.
    """
    processes = Processes()
    with processes.one_fate(), ExitStack() as ending:
        check_trackers(config.report_to)
        if parts is None:
            parts = Parts(config)
            ending.callback(parts.end_programs)
        check_online(phase in EVALUATIONS.values() and config.evaluate.online, processes)
        with open_run(config, phase, parts.domain) if processes.is_first else nullcontext() as run:
            processes.wait()  # no process goes on before the run is open
            if parts.sharding == "fsdp":  # all processes load the model, even one without work: each holds a part of it
                logger.info("%s is spread over %d processes", parts.model.name, processes.size)
            yield Phase(config, phase, parts, processes, run)


def prepare(config: Config) -> Parts:
    """Make parts for several phases; a mistake in them ends all processes."""
    with Processes().one_fate():
        check_trackers(config.report_to)
        return Parts(config)


def say_once(text: str) -> None:
    """Call `say` in the first process alone."""
    if Processes().is_first:
        say(text)


def open_run(config: Config, phase: str, domain: Domain) -> Run:
    """Open the run of a configuration, with the settings that the phase was started with."""
    # Each memory is played separately and keeps its own files, so the list of memories may change.
    free = ["evaluate.memories", *(f"model.engine.{key}" for key in ENGINE_FREE)]
    free += [f"team.{key}" for key in TEAM_FREE]
    if not _plays_itself(config, phase):
        free += ["team", *(f"team.{key}" for key in ProgramSection.model_fields)]
    skipped = {split: domain.skipped(split) for split in get_args(Split)}
    told = {split: counts for split, counts in skipped.items() if counts or split in ("train", "test")}
    sections = _sections(config, phase)
    data = config.model_dump(mode="json", by_alias=True)["data"]
    complete = partial(_completed, data, names=[*sections])
    return Run.open(Path(config.run), dump_config(config), phase, sections, told, free, complete, config.report_to)


def _completed(data: Any, sections: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the sections that a phase was started with and the others of `names`, with defaults for missing keys.

    `data` has no default. For a phase that does not record it, the present data stand in and are not returned.
    """
    try:
        values = parse_config({"run": "unnamed", "data": data, **sections}).model_dump(mode="json", by_alias=True)
    except ConfigError:  # a key that no longer exists; it is then reported as the difference
        return sections
    return {key: hidden_in(values[key]) for key in dict.fromkeys([*sections, *names])}


def _sections(config: Config, phase: str) -> dict[str, Any]:
    values = config.model_dump(mode="json", by_alias=True)
    keys = [
        *(_WARMUP_SETUP if phase == "warmup" else _SETUP),
        "evaluate" if phase in EVALUATIONS.values() else phase,
        *(["train_teams"] if config.train_teams else []),
    ]
    return {key: hidden_in(values[key]) for key in keys}


def what_decides(config: Config, phase: str) -> dict[str, Any]:
    """Return the settings that decide a phase's outcome.

    Two runs with equal settings and the same bank give the same result.
    """
    sections = _sections(config, phase)
    if not _plays_itself(config, phase):
        del sections["team"]
    return sections


def initials(config: Config) -> dict[str, str]:
    """Return what each training of a composer starts from, as the configuration names it."""
    return {"sft": config.sft.initial, "lmpo": config.lmpo.initial}


def trainings(config: Config, phase: str) -> list[str]:
    """Return a training of this run, the training it started from, and so on; empty if `phase` is not a training."""
    initial = initials(config)
    needed: list[str] = []
    while phase in (*TRAININGS, "grpo"):
        needed.append(phase)
        phase = initial.get(phase, "")
    return needed


def _plays_itself(config: Config, phase: str) -> bool:
    """Return whether the configured team itself plays in a phase, and not the teams in `train_teams`."""
    return phase in EVALUATIONS.values() or not config.train_teams


def say(text: str) -> None:
    """Print one or more lines to standard output at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
