"""One optimizer for all trainers, and the loop around it: log, evaluate, save, resume.

All randomness of training is made from (seed, step, task), so a checkpoint needs no generator's state: weights, AdamW's
moments, the step and the position in the task stream are all there is to restore.

    FOLDER/  step-000005/     what is trained, and optimizer.safetensors, after five steps; the newest and the best
             progress.json    replaced last, in one move: a step folder that it does not name never happened
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from latentmem.errors import CheckpointError, TrainingError
from latentmem.files import write_atomic
from latentmem.models.language_model import stream_seed
from latentmem.processes import Processes

logger = logging.getLogger(__name__)
T = TypeVar("T")

Schedule = Literal["constant", "linear", "cosine"]
MAX_BAD_STEPS = 3
"""Steps in a row with a non-finite loss or gradient before training ends."""
_PROJECTS = ("projection", "gate", "frame")
"""What of a composer moves at the projection's rate: it acts on the latents directly."""
_OPTIMIZER = "optimizer.safetensors"
_PROGRESS = "progress.json"


class Trained(Protocol):
    """What is trained: a composer, or the adapter of agents."""

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """What training changes, by name."""

    def save_pretrained(self, folder: Path) -> None:
        """Write it to a folder, as a whole."""

    def load_weights(self, folder: Path) -> None:
        """Read what `save_pretrained` wrote."""


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_steps: int, schedule: Schedule) -> float:
    """The rate of step 0, 1, ... num_steps - 1: a linear rise over the warm-up, then the schedule.

    >>> [learning_rate_at(s, 4, 1.0, 2, "linear") for s in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak


class Optimization:
    """AdamW on what is trained, guarded against non-finite gradients."""

    def __init__(
        self,
        trained: Trained,
        processes: Processes,
        *,
        num_steps: int,
        learning_rate: float,
        schedule: Schedule,
        warmup_steps: int,
        max_grad_norm: float,
        weight_decay: float,
        projection_rate: float = 1.0,
    ) -> None:
        """Take what is to be optimised.

        Args:
            trained: whose `trainable` parameters move.
            processes: those that train together.
            num_steps: length of the schedule.
            learning_rate: at its peak.
            schedule: of the rate after the warm-up.
            warmup_steps: over which it rises.
            max_grad_norm: gradients are scaled down to this L2 norm.
            weight_decay: of AdamW.
            projection_rate: learning rate of a composer's projection, as a multiple of the others'.
        """
        self.processes = processes
        self.rate: Callable[[int], float] = lambda step: learning_rate_at(
            step, num_steps, learning_rate, warmup_steps, schedule
        )
        self.max_grad_norm = max_grad_norm
        groups: tuple[dict[str, torch.nn.Parameter], dict[str, torch.nn.Parameter]] = ({}, {})
        for name, parameter in trained.trainable().items():
            groups[name.partition(".")[0] in _PROJECTS][name] = parameter
        used = [(group, rate) for group, rate in zip(groups, (1.0, projection_rate), strict=True) if group]
        self.relative_rates = tuple(rate for _, rate in used)
        self.parameters = groups[0] | groups[1]
        """By name, in AdamW's order."""
        self.adamw = torch.optim.AdamW(
            [{"params": list(group.values())} for group, _ in used], lr=learning_rate, weight_decay=weight_decay
        )

    def step(self, step: int, loss: float) -> tuple[bool, float]:
        """Apply the accumulated gradients, summed over processes, unless they or the loss are not finite.

        Args:
            step: sets the learning rate.
            loss: the summed loss of this pass, over all processes.

        Returns:
            Whether the parameters moved, and the gradient's L2 norm before clipping.
        """
        for group, relative in zip(self.adamw.param_groups, self.relative_rates, strict=True):
            group["lr"] = self.rate(step) * relative
        self.processes.sum_gradients(self.parameters.values())
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm))
        good = math.isfinite(loss) and math.isfinite(norm)
        if good:
            self.adamw.step()
        self.adamw.zero_grad()
        return good, norm

    def move(self, step: int, loss: float) -> dict[str, float]:
        """`step`, told as the metrics that `train` asks for."""
        good, norm = self.step(step, loss)
        return {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": self.rate(step),
            "updated": float(good),
            "bad": float(not good),
        }

    def save(self, path: Path) -> None:
        """Write AdamW's moments, by parameter name; all processes call this, the first writes.

        Raises:
            RunError: the file cannot be written, as on a full disk.
        """
        names = list(self.parameters)
        if self.processes.is_first:
            state = self.adamw.state_dict()["state"]
            parts = {f"{names[i]}/{key}": v.cpu() for i, part in state.items() for key, v in part.items()}
            write_atomic(path, save(parts))

    def load(self, path: Path) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of something else.
        """
        names = {name: i for i, name in enumerate(self.parameters)}
        state: dict[int, dict[str, Tensor]] = {}
        try:
            for key, value in load_file(path).items():
                name, _, moment = key.rpartition("/")
                state.setdefault(names[name], {})[moment] = value
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{path}: the optimizer cannot be read ({error}); train into a new run") from None
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})


class Stream(Generic[T]):
    """Endless seeded passes over items, each pass in an order of its own; its position is all its state."""

    def __init__(self, items: Sequence[T], seed: int) -> None:
        self.items = items
        self.seed = seed

    def take(self, position: int, count: int) -> tuple[list[T], int]:
        """`count` different items (all of them, if there are fewer) from a position on, and the position after them.

        Where one pass ends and the next begins inside a take, an item that the take holds already is passed over.
        """
        order: list[int] = []
        chosen: list[int] = []
        while len(chosen) < min(count, len(self.items)):
            epoch, offset = divmod(position, len(self.items))
            if not order or offset == 0:
                generator = torch.Generator().manual_seed(stream_seed(self.seed, "epoch", epoch) >> 1)
                order = torch.randperm(len(self.items), generator=generator).tolist()
            if order[offset] not in chosen:
                chosen.append(order[offset])
            position += 1
        return [self.items[i] for i in chosen], position


@dataclass
class Progress:
    """Where training stands."""

    step: int = 0
    """Steps done."""
    position: int = 0
    """Where the stream of items goes on."""
    bad_steps: int = 0
    """Steps in a row that were stopped by a non-finite value."""
    best_step: int | None = None
    best_score: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """Score of each evaluated step."""


def train(
    trained: Trained,
    optimization: Optimization,
    folder: Path,
    processes: Processes,
    *,
    num_steps: int,
    save_every: int,
    eval_every: int | None,
    take_step: Callable[[Progress], dict[str, float]],
    evaluate: Callable[[int], tuple[float, dict[str, float]]],
    log: Callable[[dict[str, Any]], None],
    rewind: Callable[[int], None],
) -> Progress:
    """Train to the end, from the newest checkpoint in `folder` if there is one.

    Args:
        trained: what is trained.
        optimization: its optimizer.
        folder: of the checkpoints; the newest and the best are kept.
        processes: all take part; the first writes.
        num_steps: optimizer steps in all.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations, the first before any step; None for none.
        take_step: does one step and returns its metrics; `updated` 0 or 1 and `bad` say what became of it.
        evaluate: gives, after a number of steps, a score to choose by, higher is better, and the metrics to log.
        log: gets each step's metrics.
        rewind: drops logged steps after the given one.

    Raises:
        TrainingError: `MAX_BAD_STEPS` steps in a row were not finite; the last good checkpoint is kept.
        CheckpointError: a checkpoint cannot be read or written; on a full disk the last one is kept.
        RunError: likewise.
    """
    found = _read_progress(folder)
    processes.wait()  # all have looked before the first one writes
    progress = found or Progress()
    if found is not None:
        checkpoint = _step_folder(folder, progress.step)
        trained.load_weights(checkpoint)
        optimization.load(checkpoint / _OPTIMIZER)
        logger.info("going on from %s", checkpoint)
    if processes.is_first:
        rewind(progress.step if found else -1)
    # An evaluation belongs to its step and comes before that step is saved, so one that is cut short is done again.
    if found is None:
        if eval_every:
            _evaluate(progress, evaluate, log)
        _save(trained, optimization, folder, progress, processes)
    while progress.step < num_steps:
        metrics = take_step(progress)
        progress.step += 1
        progress.bad_steps = progress.bad_steps + 1 if metrics["bad"] else 0
        log({"step": progress.step, **metrics})
        if progress.bad_steps >= MAX_BAD_STEPS:
            raise TrainingError(
                f"{folder}: loss or gradient was not finite in {MAX_BAD_STEPS} steps in a row, up to step "
                f"{progress.step}; {newest_checkpoint(folder)} is the last good checkpoint. "
                "Lower the learning rate or use float32, in a new run"
            )
        last = progress.step == num_steps
        if eval_every and (progress.step % eval_every == 0 or last):
            _evaluate(progress, evaluate, log)
        # A stopped step left the weights as they were, so it may be saved, its count with it.
        if progress.step % save_every == 0 or last or progress.best_step == progress.step:
            _save(trained, optimization, folder, progress, processes)
    processes.wait()
    return progress


def _evaluate(
    progress: Progress,
    evaluate: Callable[[int], tuple[float, dict[str, float]]],
    log: Callable[[dict[str, Any]], None],
) -> None:
    score, metrics = evaluate(progress.step)
    log({"step": progress.step, **metrics})
    if not math.isfinite(score):
        return
    progress.scores[str(progress.step)] = score
    if progress.best_score is None or score > progress.best_score:
        progress.best_step, progress.best_score = progress.step, score


def _save(trained: Trained, optimization: Optimization, folder: Path, progress: Progress, processes: Processes) -> None:
    target = _step_folder(folder, progress.step)
    if processes.is_first:
        trained.save_pretrained(target)
    optimization.save(target / _OPTIMIZER)
    if not processes.is_first:
        return
    write_atomic(folder / _PROGRESS, json.dumps(vars(progress), indent=1, allow_nan=False) + "\n")
    remove_others(folder)


def remove_others(folder: Path) -> None:
    """Remove the checkpoints that are neither the newest nor the best: older ones, and what a killed process began."""
    kept = {newest_checkpoint(folder), selected_checkpoint(folder)}
    for other in folder.glob("step-*"):
        if other not in kept:
            shutil.rmtree(other)


def newest_checkpoint(folder: Path) -> Path | None:
    """That of the latest saved step, or None where nothing was saved yet."""
    progress = _read_progress(folder)
    return None if progress is None else _step_folder(folder, progress.step)


def selected_checkpoint(folder: Path) -> Path | None:
    """The one to use of a training: of the best evaluated step, else of the last; None if there is none."""
    progress = _read_progress(folder)
    if progress is None:
        return None
    return _step_folder(folder, progress.step if progress.best_step is None else progress.best_step)


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def _read_progress(folder: Path) -> Progress | None:
    path = folder / _PROGRESS
    if not path.exists():
        return None
    try:
        return Progress(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); train into a new run") from None
