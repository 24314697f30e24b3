"""Where a trainer writes what happens: by default beside its checkpoints, with a progress bar on a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from latentmem.files import keep_rows
from latentmem.progress import on_terminal, progress
from latentmem.runs import append_rows

METRICS = "metrics.jsonl"
DEV_TASKS = "dev-tasks.jsonl"


class Journal(Protocol):
    """The receiver of what a trainer reports."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Take the numbers of a step, or of an evaluation after it; `step` says which."""

    def log_tasks(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take what an evaluation found for each held-out task; `step` says after which step."""

    def doing(self, what: str) -> None:
        """Take the name of work between two steps, such as an evaluation; it ends with the next numbers."""

    def rewind(self, step: int) -> None:
        """Drop what was reported of later steps, because training goes on from this one."""


class StepBar:
    """A progress bar that shows the numbers of the last step, and what is done between two steps."""

    def __init__(self, bar: Any, num_steps: int, name: str, shown: str) -> None:
        self.bar = bar
        self.num_steps = num_steps
        self.name = name
        self.shown = (shown, "eval_loss", "eval_reward")
        self.is_busy = False

    def doing(self, what: str) -> None:
        """Show at once what goes on, until the next numbers come."""
        self.is_busy = True
        self.bar.set_description_str(f"{self.name}, {what}")

    def show(self, metrics: Mapping[str, Any]) -> None:
        """Move the bar to the step of these numbers and show them."""
        figures = {key: f"{metrics[key]:.3f}" for key in self.shown if key in metrics}
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update(min(metrics["step"], self.num_steps) - self.bar.n)
        if self.is_busy:
            self.is_busy = False
            self.bar.set_description_str(self.name)


@contextmanager
def journal_of(
    given: Journal | None, folder: Path, num_steps: int, name: str, shown: str, is_first: bool
) -> Iterator[Journal]:
    """Yield the given journal; without one, yield one in the training's folder, with a `step_bar` on a terminal."""
    if given is not None:
        yield given
        return
    with step_bar(num_steps, name, shown, visible=is_first and on_terminal()) as bar:
        yield FolderJournal(folder, bar, is_first)


@contextmanager
def step_bar(num_steps: int, name: str, shown: str, begun: int = 0, visible: bool = True) -> Iterator[StepBar]:
    """Yield a progress bar for the steps of a training.

    Args:
        num_steps: number of steps in all.
        name: name of the training.
        shown: key of the number that stands beside the bar.
        begun: number of steps done before.
        visible: whether this process shows the bar.
    """
    with progress(num_steps, name, "step", begun, shown=visible) as bar:
        yield StepBar(bar, num_steps, name, shown)


class FolderJournal:
    """A journal in two files of a training's folder, `metrics.jsonl` and `dev-tasks.jsonl`; it also moves a bar."""

    def __init__(self, folder: Path, bar: StepBar, is_first: bool = True) -> None:
        """Take the folder.

        Args:
            folder: the training's folder; made when something is written.
            bar: shows the last step.
            is_first: whether this process is the one that writes.
        """
        self.folder = folder
        self.bar = bar
        self.is_first = is_first

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append the numbers to `metrics.jsonl`."""
        self._append(METRICS, [metrics])
        self.bar.show(metrics)

    def log_tasks(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the rows to `dev-tasks.jsonl`."""
        self._append(DEV_TASKS, rows)

    def doing(self, what: str) -> None:
        """Show it beside the bar."""
        self.bar.doing(what)

    def rewind(self, step: int) -> None:
        """Drop the rows of later steps from both files."""
        for name in (METRICS, DEV_TASKS):
            keep_rows(self.folder / name, lambda row: row["step"] <= step)

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            append_rows(self.folder / name, rows)
