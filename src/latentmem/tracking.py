"""The numbers of a run also go to trackers, by accelerate's; what a tracker shows is what metrics.jsonl has.

A phase of a run is one run of a tracker. Its first number starts it, and it is told all that metrics.jsonl has of the
phase: what was logged before the tracker was asked for is there too, and what a rewind dropped is not told twice. A
tracker that fails is left alone until the phase ends, for no training ends because of a page to look at. Loads no torch
before a tracker starts.
"""

import hashlib
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

from latentmem.errors import ConfigError

logger = logging.getLogger(__name__)

Numbers = dict[str, float]
Row = Mapping[str, Any]


def check_trackers(names: Sequence[str]) -> None:
    """Make sure that the library of each tracker is there.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        try:
            distribution(name)  # no search for a module: wandb leaves a folder of that name where it was started
        except PackageNotFoundError:
            raise ConfigError(
                f"report_to names {name}, which is not installed; pip install 'latentmem[{name}]', or leave it out"
            ) from None


class Tracked(NamedTuple):
    """The phase of a run that a tracker shows."""

    folder: Path
    """The run's."""
    phase: str
    started: str
    """When the run was; with the folder it tells two runs apart."""
    configuration: str
    """The whole resolved one, as YAML."""

    @property
    def id(self) -> str:
        """Equal whenever this phase of this run goes on, and for nothing else."""
        return hashlib.sha256(f"{self.folder.resolve()}\n{self.started}\n{self.phase}".encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """A name for people."""
        return f"{self.folder.resolve().name} {self.phase}"


class Table(NamedTuple):
    """The comparison of memories at the end of an evaluation."""

    cells: Sequence[Sequence[str]]
    """A header and rows."""
    markdown: str
    """The same with the verdict in words."""
    numbers: Numbers
    """All numbers of the results, by their names."""


class _Tracker(ABC):
    """One tracker, by accelerate's class of it."""

    _tracker: Any

    @abstractmethod
    def start(self, tracked: Tracked) -> None:
        """Start it, and tell the configuration."""

    @abstractmethod
    def log(self, step: int, numbers: Numbers) -> None:
        """Tell the numbers of a step, unless it has them."""

    @abstractmethod
    def show(self, table: Table) -> None:
        """Tell the comparison."""

    def close(self) -> None:
        """Let it write what is left."""
        self._tracker.finish()


class _TensorBoard(_Tracker):
    """Event files in RUN/tensorboard/PHASE; when it starts anew, what older files hold is declared void."""

    def start(self, tracked: Tracked) -> None:
        """Declare what is there void, and begin a file."""
        from accelerate.tracking import TensorBoardTracker

        self._tracker = TensorBoardTracker(tracked.phase, tracked.folder / "tensorboard", purge_step=0)
        self._tracker.start()
        # Its own way to store a configuration makes another folder, which TensorBoard takes for a run, at each start.
        indented = "".join(
            f"    {line}\n" for line in tracked.configuration.splitlines()
        )  # Markdown for "as it stands"
        self._tracker.log({"configuration": indented}, step=0)

    def log(self, step: int, numbers: Numbers) -> None:
        """One scalar each."""
        self._tracker.log(numbers, step=step)

    def show(self, table: Table) -> None:
        """The table as a text, and scalars."""
        self._tracker.log({"results": table.markdown, **table.numbers}, step=0)


class _WandB(_Tracker):
    """A run of Weights & Biases, gone on with by its id; a step that its server has is not told again."""

    def start(self, tracked: Tracked) -> None:
        """Begin the run, or go on with it."""
        import wandb
        from accelerate.tracking import WandBTracker

        self._tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", "latentmem"),
            id=tracked.id,
            name=tracked.title,
            group=tracked.folder.resolve().name,
            dir=str(tracked.folder),
            resume="allow",
            settings=wandb.Settings(console="off"),  # what the terminal shows stays there
        )
        self._tracker.start()
        self._first = self._tracker.run.starting_step
        self._tracker.store_init_configuration(_values(tracked))

    def log(self, step: int, numbers: Numbers) -> None:
        """One row."""
        if step >= self._first:
            self._tracker.log(numbers, step=step)

    def show(self, table: Table) -> None:
        """The table as one of theirs, and the numbers as the run's summary."""
        header, *rows = table.cells
        self._tracker.log_table("results", columns=list(header), data=[list(row) for row in rows])
        self._tracker.run.summary.update(table.numbers)


class _Trackio(_Tracker):
    """A run of trackio; it cannot be told that steps are void, so a phase that goes on is another run, told all."""

    def start(self, tracked: Tracked) -> None:
        """Begin a run."""
        from accelerate.tracking import TrackioTracker

        self._tracker = TrackioTracker(
            os.environ.get("TRACKIO_PROJECT", "latentmem"),
            name=f"{tracked.title} {datetime.now():%Y-%m-%d %H:%M:%S}",
            group=tracked.title,
            resume="never",
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        self._tracker.start()
        self._tracker.store_init_configuration(_values(tracked))

    def log(self, step: int, numbers: Numbers) -> None:
        """One row."""
        self._tracker.log(numbers, step=step)

    def show(self, table: Table) -> None:
        """The table as a text, and one row."""
        import trackio

        self._tracker.log({"results": trackio.Markdown(table.markdown), **table.numbers})


_TRACKERS: dict[str, type[_Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "trackio": _Trackio}


class Tracking:
    """The trackers of one phase; without names there are none, and nothing is told."""

    def __init__(self, names: Sequence[str], tracked: Tracked) -> None:
        self._tracked = tracked
        self._names = list(dict.fromkeys(names))
        """Those that have not failed."""
        self._under_way: dict[str, _Tracker] = {}

    def log(self, row: Row, logged: Callable[[], Sequence[Row]]) -> None:
        """Tell the numbers of a row that metrics.jsonl has; `logged` reads all that it has of the phase."""
        new = self._start()
        for name in new:
            self._try(name, lambda tracker: _log(tracker, logged()))
        for name in [name for name in self._under_way if name not in new]:
            self._try(name, lambda tracker: _log(tracker, [row]))

    def show(self, cells: Sequence[Sequence[str]], markdown: str, results: Row) -> None:
        """Tell the comparison of memories: its table, and the numbers of each memory."""
        memories = {memory["name"]: memory for memory in results["memories"]}
        table = Table(cells, markdown, dict(_leaves(memories, self._tracked.phase)))
        self._start()
        for name in [*self._under_way]:
            self._try(name, lambda tracker: tracker.show(table))

    def close(self) -> None:
        """Let all write what is left; the next number starts them anew."""
        for name in [*self._under_way]:
            self._try(name, lambda tracker: tracker.close())
        self._under_way.clear()

    def _start(self) -> list[str]:
        """Start those that are not under way; their names."""
        new = [name for name in self._names if name not in self._under_way]
        if new:
            from accelerate import PartialState

            PartialState()  # its trackers log by it; where the recipes run there is one already
        for name in new:
            self._under_way[name] = _TRACKERS[name]()
            self._try(name, lambda tracker: tracker.start(self._tracked))
        return [name for name in new if name in self._under_way]

    def _try(self, name: str, tell: Callable[[_Tracker], object]) -> None:
        try:
            tell(self._under_way[name])
        except Exception as error:
            self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._names.remove(name)
        with suppress(Exception):  # a run that were left open would be taken for that of the next phase
            self._under_way.pop(name).close()
        why = " ".join(str(error).split()) or type(error).__name__
        logger.warning(
            "report_to: %s fails (%s) and is told nothing more of this phase, which goes on; metrics.jsonl has all",
            name,
            why,
        )


def _log(tracker: _Tracker, rows: Sequence[Row]) -> None:
    for row in rows:
        values = {key: value for key, value in row.items() if key != "step"}
        tracker.log(row["step"], dict(_leaves(values, row["phase"])))


def _leaves(values: Row, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of nested mappings, under the names on their way joined by a slash."""
    for key, value in values.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        elif isinstance(value, int | float) and math.isfinite(value):
            yield name, value


def _values(tracked: Tracked) -> dict[str, Any]:
    import yaml

    values: dict[str, Any] = yaml.safe_load(tracked.configuration)
    return values
