"""A trainer's folder: its checkpoints, and a file that says which of them count.

    FOLDER/  step-000005/     what is trained, and optimizer.safetensors, after five steps; the newest and the best
             progress.json    replaced last, in one move; a step folder that it does not name does not count

All randomness of training is made from (seed, step, task), so a checkpoint needs no generator's state. Weights, AdamW's
moments, the step and the position in the order of tasks are all there is to restore.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from latentmem.errors import CheckpointError, RunError
from latentmem.files import read_as, write_atomic

if TYPE_CHECKING:  # looking which checkpoint counts loads no torch
    from latentmem.processes import Processes
    from latentmem.training.optimizer import Optimization, Trained

_OPTIMIZER = "optimizer.safetensors"
_PROGRESS = "progress.json"


@dataclass
class Progress:
    """How far training has come; weights and moments are stored apart."""

    step: int = 0
    """Number of steps done."""
    position: int = 0
    """The position at which the stream of items goes on."""
    bad_steps: int = 0
    """Number of latest steps in a row that were stopped by a non-finite value."""
    best_step: int | None = None
    best_score: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """The score after each evaluated step."""


def save_checkpoint(
    trained: "Trained", optimization: "Optimization", folder: Path, progress: Progress, processes: "Processes"
) -> None:
    """Write a checkpoint of the steps done so far; all processes call this, and the first one writes.

    Raises:
        CheckpointError: a file cannot be written; on a full disk the last checkpoint is kept.
        RunError: likewise.
    """
    target = _step_folder(folder, progress.step)
    if processes.is_first:
        trained.save_pretrained(target)
    optimization.save(target / _OPTIMIZER)
    if not processes.is_first:
        return
    write_atomic(folder / _PROGRESS, json.dumps(vars(progress), indent=1, allow_nan=False) + "\n")
    remove_others(folder)


def restore(trained: "Trained", optimization: "Optimization", folder: Path, progress: Progress) -> Path:
    """Read the checkpoint of `progress` and return its folder.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    checkpoint = _step_folder(folder, progress.step)
    trained.load_weights(checkpoint)
    optimization.load(checkpoint / _OPTIMIZER)
    return checkpoint


def remove_others(folder: Path) -> None:
    """Remove checkpoints that are neither the newest nor the best: older ones, and those of a killed process."""
    kept = {newest_checkpoint(folder), selected_checkpoint(folder)}
    for other in folder.glob("step-*"):
        if other not in kept:
            shutil.rmtree(other)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the latest saved step, or None if nothing was saved yet."""
    progress = read_progress(folder)
    return None if progress is None else _step_folder(folder, progress.step)


def selected_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint to use: of the best evaluated step, else of the last step; None if there is none."""
    progress = read_progress(folder)
    if progress is None:
        return None
    return _step_folder(folder, progress.step if progress.best_step is None else progress.best_step)


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """Return the number of steps after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def read_progress(folder: Path) -> Progress | None:
    """Return how far training has come, or None if nothing was saved yet.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / _PROGRESS
    if not path.exists():
        return None
    try:
        return read_as(path, Progress)
    except RunError as error:
        raise CheckpointError(str(error)) from None
