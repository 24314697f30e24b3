"""Send the numbers of a run to trackers as well, through accelerate; a tracker shows what metrics.jsonl holds.

One phase of a run is one run in the tracker. The phase's first number starts the tracker, which then receives all lines
that metrics.jsonl has for the phase. So it also shows what was logged before it was asked for, and lines that a rewind
dropped are not sent again. A tracker that fails is left alone until the phase ends: training must not end because of a
page to look at. Loads no torch before a tracker starts.
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
from latentmem.parsing import parse_yaml

logger = logging.getLogger(__name__)

Numbers = dict[str, float]
Row = Mapping[str, Any]


def check_trackers(names: Sequence[str]) -> None:
    """Check that the library of each tracker is installed.

    Raises:
        ConfigError: a library is not installed.
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
    """The run's folder."""
    phase: str
    started: str
    """When the run was started; this and the folder tell two runs apart."""
    configuration: str
    """The whole resolved configuration, as YAML."""

    @property
    def id(self) -> str:
        """An id that stays the same when this phase of this run continues, and that nothing else has."""
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
    """The same as Markdown, with the verdict in words."""
    numbers: Numbers
    """All numbers of the results, by their names."""


class _Tracker(ABC):
    """One tracker, through accelerate's class for it."""

    _tracker: Any

    @abstractmethod
    def start(self, tracked: Tracked) -> None:
        """Start the tracker, and send the configuration."""

    @abstractmethod
    def log(self, step: int, numbers: Numbers) -> None:
        """Send the numbers of a step, unless the tracker has them."""

    @abstractmethod
    def show(self, table: Table) -> None:
        """Send the comparison of memories."""

    def close(self) -> None:
        """Let the tracker write what is left."""
        self._tracker.finish()


class _TensorBoard(_Tracker):
    """Event files in RUN/tensorboard/PHASE; a new start declares the contents of older files void."""

    def start(self, tracked: Tracked) -> None:
        """Declare older files void, and begin a new one."""
        from accelerate.tracking import TensorBoardTracker

        self._tracker = TensorBoardTracker(tracked.phase, tracked.folder / "tensorboard", purge_step=0)
        self._tracker.start()
        # accelerate would store the configuration in another folder at each start, which TensorBoard takes for a run.
        indented = "".join(
            f"    {line}\n" for line in tracked.configuration.splitlines()
        )  # indented text is shown verbatim by Markdown
        self._tracker.log({"configuration": indented}, step=0)

    def log(self, step: int, numbers: Numbers) -> None:
        """Write one scalar for each number."""
        self._tracker.log(numbers, step=step)

    def show(self, table: Table) -> None:
        """Write the table as text, and the numbers as scalars."""
        self._tracker.log({"results": table.markdown, **table.numbers}, step=0)


class _WandB(_Tracker):
    """A run of Weights & Biases, continued by its id; steps that the server has are not sent again."""

    def start(self, tracked: Tracked) -> None:
        """Begin the run, or continue it."""
        import wandb
        from accelerate.tracking import WandBTracker

        self._tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", "latentmem"),
            id=tracked.id,
            name=tracked.title,
            group=tracked.folder.resolve().name,
            dir=str(tracked.folder),
            resume="allow",
            settings=wandb.Settings(console="off"),  # terminal output is not uploaded
        )
        self._tracker.start()
        self._first = self._tracker.run.starting_step
        self._tracker.store_init_configuration(_values(tracked))

    def log(self, step: int, numbers: Numbers) -> None:
        """Send one row."""
        if step >= self._first:
            self._tracker.log(numbers, step=step)

    def show(self, table: Table) -> None:
        """Send the table as a W&B table, and the numbers as the run's summary."""
        header, *rows = table.cells
        self._tracker.log_table("results", columns=list(header), data=[list(row) for row in rows])
        self._tracker.run.summary.update(table.numbers)


class _Trackio(_Tracker):
    """A run of trackio. Its steps cannot be declared void, so a phase that continues begins a new run and sends all."""

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
        """Send one row."""
        self._tracker.log(numbers, step=step)

    def show(self, table: Table) -> None:
        """Send the table as text, and the numbers as one row."""
        import trackio

        self._tracker.log({"results": trackio.Markdown(table.markdown), **table.numbers})


_TRACKERS: dict[str, type[_Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "trackio": _Trackio}


class Tracking:
    """The trackers of one phase; without names it has none and does nothing."""

    def __init__(self, names: Sequence[str], tracked: Tracked) -> None:
        self._tracked = tracked
        self._names = list(dict.fromkeys(names))
        """Trackers that have not failed."""
        self._under_way: dict[str, _Tracker] = {}

    def log(self, row: Row, logged: Callable[[], Sequence[Row]]) -> None:
        """Send a row that metrics.jsonl holds; `logged` reads all rows of the phase, for trackers that start now."""
        new = self._start()
        for name in new:
            self._try(name, lambda tracker: _log(tracker, logged()))
        for name in [name for name in self._under_way if name not in new]:
            self._try(name, lambda tracker: _log(tracker, [row]))

    def show(self, cells: Sequence[Sequence[str]], markdown: str, results: Row) -> None:
        """Send the comparison of memories: its table, and the numbers of each memory."""
        memories = {memory["name"]: memory for memory in results["memories"]}
        table = Table(cells, markdown, dict(_leaves(memories, self._tracked.phase)))
        self._start()
        for name in [*self._under_way]:
            self._try(name, lambda tracker: tracker.show(table))

    def close(self) -> None:
        """Let all trackers write what is left; the next number starts them anew."""
        for name in [*self._under_way]:
            self._try(name, lambda tracker: tracker.close())
        self._under_way.clear()

    def _start(self) -> list[str]:
        """Start the trackers that are not running, and return their names."""
        new = [name for name in self._names if name not in self._under_way]
        if new:
            from accelerate import PartialState

            PartialState()  # accelerate's trackers log through it; in a recipe it exists already
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
        with suppress(Exception):  # an open run would be taken for the run of the next phase
            self._under_way.pop(name).close()
        why = " ".join(str(error).split()) or type(error).__name__
        logger.warning(
            "report_to: %s failed (%s), so it gets no more of this phase; the run goes on, and metrics.jsonl holds all",
            name,
            why,
        )


def _log(tracker: _Tracker, rows: Sequence[Row]) -> None:
    for row in rows:
        values = {key: value for key, value in row.items() if key != "step"}
        tracker.log(row["step"], dict(_leaves(values, row["phase"])))


def _leaves(values: Row, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of nested mappings, each under its path of names joined by slashes."""
    for key, value in values.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        elif isinstance(value, int | float) and math.isfinite(value):
            yield name, value


def _values(tracked: Tracked) -> dict[str, Any]:
    values: dict[str, Any] = parse_yaml(tracked.configuration)
    return values
