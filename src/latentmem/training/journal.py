"""Where a trainer writes what happens: by default beside its checkpoints, with a bar on a terminal."""

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
    """What a trainer tells as it goes."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """The numbers of a step, or of an evaluation after it; `step` says which."""

    def log_tasks(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """What an evaluation found for each held-out task; `step` says after which step."""

    def rewind(self, step: int) -> None:
        """Drop what was told of later steps: training goes on from here."""


class StepBar:
    """A progress bar that shows the numbers of the last step."""

    def __init__(self, bar: Any, num_steps: int, shown: str) -> None:
        self.bar = bar
        self.num_steps = num_steps
        self.shown = (shown, "eval_loss", "eval_reward")

    def show(self, metrics: Mapping[str, Any]) -> None:
        """Move to the step of these numbers."""
        figures = {key: f"{metrics[key]:.3f}" for key in self.shown if key in metrics}
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update(min(metrics["step"], self.num_steps) - self.bar.n)


@contextmanager
def journal_of(
    given: Journal | None, folder: Path, num_steps: int, name: str, shown: str, is_first: bool
) -> Iterator[Journal]:
    """The journal that was given, else one in the training's folder, with a bar of `step_bar` on a terminal."""
    if given is not None:
        yield given
        return
    with step_bar(num_steps, name, shown, visible=is_first and on_terminal()) as bar:
        yield FolderJournal(folder, bar, is_first)


@contextmanager
def step_bar(num_steps: int, name: str, shown: str, begun: int = 0, visible: bool = True) -> Iterator[StepBar]:
    """A bar for the steps of a training.

    Args:
        num_steps: in all.
        name: of the training.
        shown: the number that stands beside the bar.
        begun: steps done before.
        visible: whether this process shows it.
    """
    with progress(num_steps, name, "step", begun, shown=visible) as bar:
        yield StepBar(bar, num_steps, shown)


class FolderJournal:
    """Writes into two files of a training's folder, `metrics.jsonl` and `dev-tasks.jsonl`, and moves a bar."""

    def __init__(self, folder: Path, bar: StepBar, is_first: bool = True) -> None:
        """Take the folder.

        Args:
            folder: of the training; made when something is written.
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

    def rewind(self, step: int) -> None:
        """Drop the rows of later steps from both files."""
        for name in (METRICS, DEV_TASKS):
            keep_rows(self.folder / name, lambda row: row["step"] <= step)

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            append_rows(self.folder / name, rows)
