"""What a phase begins with: its processes, its parts and its run; and the settings that it is held to."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from latentmem.config import Config, dump_config, parse_config
from latentmem.environments.environment import Domain, Split
from latentmem.errors import ConfigError
from latentmem.evaluation import check_online
from latentmem.processes import Processes
from latentmem.recipes.folders import EVALUATIONS
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
    """A phase under way, in one of the processes that work on it together."""

    config: Config
    name: str
    parts: Parts
    processes: Processes
    opened: Run | None
    """The run, open for writing; None in all processes but the first."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.opened is not None

    @property
    def run(self) -> Run | SilentRun:
        """Where this process logs."""
        return self.opened or SilentRun()

    def say(self, text: str) -> None:
        """Write a line, or several, to standard output, once for all processes."""
        if self.is_first:
            say(text)


@contextmanager
def begin(config: Config, phase: str, parts: Parts | None) -> Iterator[Phase]:
    """Begin a phase: make its parts where they are not given, and open the run in the first process.

    A mistake in one process ends all of them. One in the cheap parts is told before the run's folder is made.
    """
    processes = Processes()
    with processes.one_fate():
        check_trackers(config.report_to)
        parts = parts or Parts(config)
        check_online(phase in EVALUATIONS.values() and config.evaluate.online, processes)
        with open_run(config, phase, parts.domain) if processes.is_first else nullcontext() as run:
            processes.wait()  # what was found there is found by all
            if parts.sharding == "fsdp":  # all load it, also one that will be dealt nothing: each has to send its part
                logger.info("%s is spread over %d processes", parts.model.name, processes.size)
            yield Phase(config, phase, parts, processes, run)


def prepare(config: Config) -> Parts:
    """The parts of several phases; a mistake in them ends all processes."""
    with Processes().one_fate():
        check_trackers(config.report_to)
        return Parts(config)


def say_once(text: str) -> None:
    """What `say` does, in the first process."""
    if Processes().is_first:
        say(text)


def open_run(config: Config, phase: str, domain: Domain) -> Run:
    """The run of a configuration, held to what the phase was started with."""
    # Each memory is played on its own and keeps files of its own: others may join them.
    free = ["evaluate.memories"]
    if not _plays_itself(config, phase):
        free.append("team")
    skipped = {split: domain.skipped(split) for split in get_args(Split)}
    told = {split: counts for split, counts in skipped.items() if counts or split in ("train", "test")}
    sections = _sections(config, phase)
    data = config.model_dump(mode="json", by_alias=True)["data"]
    complete = partial(_completed, data, names=[*sections])
    return Run.open(Path(config.run), dump_config(config), phase, sections, told, free, complete, config.report_to)


def _completed(data: Any, sections: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The sections that a phase was started with, and others of `names`; missing keys are at their defaults.

    Data have none: a phase that does not keep its own takes those of now, which are not told.
    """
    try:
        values = parse_config({"run": "unnamed", "data": data, **sections}).model_dump(mode="json", by_alias=True)
    except ConfigError:  # they have a key that is no more, which then is told as the difference
        return sections
    return {key: values[key] for key in dict.fromkeys([*sections, *names])}


def _sections(config: Config, phase: str) -> dict[str, Any]:
    values = config.model_dump(mode="json", by_alias=True)
    keys = [
        *(_WARMUP_SETUP if phase == "warmup" else _SETUP),
        "evaluate" if phase in EVALUATIONS.values() else phase,
        *(["train_teams"] if config.train_teams else []),
    ]
    return {key: values[key] for key in keys}


def what_decides(config: Config, phase: str) -> dict[str, Any]:
    """The settings that decide a phase's outcome: two runs with equal ones and the same bank give the same result."""
    sections = _sections(config, phase)
    if not _plays_itself(config, phase):
        del sections["team"]
    return sections


def initials(config: Config) -> dict[str, str]:
    """What each training of a composer starts from, as the configuration names it."""
    return {"sft": config.sft.initial, "lmpo": config.lmpo.initial}


def _plays_itself(config: Config, phase: str) -> bool:
    """Whether it is the team that plays in a phase, and not others in its place."""
    return phase in EVALUATIONS.values() or not config.train_teams


def say(text: str) -> None:
    """Write a line, or several, to standard output at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
