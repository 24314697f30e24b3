"""The loop around the steps of all trainers: log, evaluate, save, resume, and stop if the numbers are not finite."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

from latentmem.errors import TrainingError
from latentmem.processes import Processes
from latentmem.training.checkpoint_folder import Progress, newest_checkpoint, read_progress, restore, save_checkpoint
from latentmem.training.journal import Journal
from latentmem.training.optimizer import Optimization, StepResult, Trained

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 3
"""Training ends after this many steps in a row with a non-finite loss or gradient."""


def train(
    trained: Trained,
    optimization: Optimization,
    folder: Path,
    processes: Processes,
    *,
    num_steps: int,
    save_every: int,
    eval_every: int | None,
    take_step: Callable[[Progress], StepResult],
    evaluate: Callable[[int], tuple[float, dict[str, float]]],
    journal: Journal,
) -> Progress:
    """Train to the end, from the newest checkpoint in `folder` if there is one.

    Args:
        trained: what is trained.
        optimization: its optimizer.
        folder: the folder of the checkpoints; the newest and the best are kept.
        processes: all take part; the first one writes.
        num_steps: number of optimizer steps in all.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations, the first before any step; None for no evaluations.
        take_step: does one step and returns its result.
        evaluate: takes the number of steps done; returns a score to select by (higher is better) and metrics to log.
        journal: gets each step's metrics.

    Raises:
        TrainingError: `MAX_BAD_STEPS` steps in a row were not finite; the last good checkpoint is kept.
        CheckpointError: a checkpoint cannot be read or written; on a full disk the last one is kept.
        RunError: likewise.
    """
    found = read_progress(folder)
    processes.wait()  # until all have read, before the first one writes
    progress = found or Progress()
    if found is not None:
        logger.info("going on from %s", restore(trained, optimization, folder, progress))
    if processes.is_first:
        journal.rewind(progress.step if found else -1)
    # An evaluation belongs to its step and comes before that step is saved, so an interrupted one is done again.
    if found is None:
        if eval_every:
            _evaluate(progress, evaluate, journal)
        save_checkpoint(trained, optimization, folder, progress, processes)
    while progress.step < num_steps:
        result = take_step(progress)
        progress.step += 1
        progress.bad_steps = 0 if result.finite else progress.bad_steps + 1
        became = {"updated": float(result.moved), "bad": float(not result.finite)}
        journal.log({"step": progress.step, **result.metrics, **became})
        if progress.bad_steps >= MAX_BAD_STEPS:
            raise TrainingError(
                f"{folder}: loss or gradient was not finite in {MAX_BAD_STEPS} steps in a row, up to step "
                f"{progress.step}; {newest_checkpoint(folder)} is the last good checkpoint. "
                "Lower the learning rate or use float32, in a new run"
            )
        last = progress.step == num_steps
        if eval_every and (progress.step % eval_every == 0 or last):
            _evaluate(progress, evaluate, journal)
        # A stopped step left the weights unchanged, so it may be saved, with the count of bad steps.
        if progress.step % save_every == 0 or last or progress.best_step == progress.step:
            save_checkpoint(trained, optimization, folder, progress, processes)
    processes.wait()
    return progress


def _evaluate(
    progress: Progress,
    evaluate: Callable[[int], tuple[float, dict[str, float]]],
    journal: Journal,
) -> None:
    journal.doing("evaluating")
    score, metrics = evaluate(progress.step)
    journal.log({"step": progress.step, **metrics})
    if not math.isfinite(score):
        return
    progress.scores[str(progress.step)] = score
    if progress.best_score is None or score > progress.best_score:
        progress.best_step, progress.best_score = progress.step, score
