"""One optimizer for both trainers, and the loop around it: log, evaluate, save, resume.

All randomness of training is made from (seed, step, task), so a checkpoint needs no generator's state: weights, AdamW's
moments, the step and the position in the task stream are all there is to restore.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import load_file, save_file

from latentmem.errors import CheckpointError, TrainingError
from latentmem.memory.checkpoints import replacing
from latentmem.memory.composer import Composer
from latentmem.models.language_model import stream_seed
from latentmem.training.processes import Processes

logger = logging.getLogger(__name__)
T = TypeVar("T")

Schedule = Literal["constant", "linear", "cosine"]
MAX_BAD_STEPS = 3
"""Steps in a row with a non-finite loss or gradient before training ends."""


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
    """AdamW on what a composer trains, guarded against non-finite gradients."""

    def __init__(
        self,
        composer: Composer,
        processes: Processes,
        *,
        num_steps: int,
        learning_rate: float,
        schedule: Schedule,
        warmup_steps: int,
        max_grad_norm: float,
        weight_decay: float,
    ) -> None:
        self.parameters = composer.trainable()
        self.processes = processes
        self.rate: Callable[[int], float] = lambda step: learning_rate_at(
            step, num_steps, learning_rate, warmup_steps, schedule
        )
        self.max_grad_norm = max_grad_norm
        self.adamw = torch.optim.AdamW(self.parameters.values(), lr=learning_rate, weight_decay=weight_decay)

    def step(self, step: int, loss: float) -> tuple[bool, float]:
        """Apply the accumulated gradients, summed over processes, unless they or the loss are not finite.

        Args:
            step: sets the learning rate.
            loss: the summed loss of this pass, over all processes.

        Returns:
            Whether the parameters moved, and the gradient's L2 norm before clipping.
        """
        self.processes.sum_gradients(self.parameters.values())
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm))
        good = math.isfinite(loss) and math.isfinite(norm)
        if good:
            for group in self.adamw.param_groups:
                group["lr"] = self.rate(step)
            self.adamw.step()
        self.adamw.zero_grad()
        return good, norm

    def save(self, path: Path) -> None:
        """Write AdamW's moments, by parameter name."""
        names = list(self.parameters)
        state = self.adamw.state_dict()["state"]
        save_file({f"{names[i]}/{key}": value.cpu() for i, part in state.items() for key, value in part.items()}, path)

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        names = {name: i for i, name in enumerate(self.parameters)}
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_file(path).items():
            name, _, moment = key.rpartition("/")
            state.setdefault(names[name], {})[moment] = value
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})


class Stream:
    """Endless seeded passes over items, each pass in an order of its own; its position is all its state."""

    def __init__(self, items: Sequence[T], seed: int) -> None:
        self.items = items
        self.seed = seed

    def take(self, position: int, count: int) -> list[Any]:
        """`count` items from a position on; no item twice unless there are fewer than `count`."""
        taken: list[int] = []
        while len(taken) < min(count, len(self.items)):
            epoch, offset = divmod(position, len(self.items))
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "epoch", epoch) >> 1)
            index = int(torch.randperm(len(self.items), generator=generator)[offset])
            position += 1
            if index not in taken:
                taken.append(index)
        return [self.items[i] for i in taken]


@dataclass
class Progress:
    """Where training stands."""

    step: int = 0
    """Steps done."""
    position: int = 0
    """Items drawn from the stream."""
    bad_steps: int = 0
    """Steps in a row that were stopped by a non-finite value."""
    best_step: int | None = None
    best_score: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """Score of each evaluated step."""


def train(
    composer: Composer,
    optimization: Optimization,
    folder: Path,
    processes: Processes,
    *,
    num_steps: int,
    save_every: int,
    eval_every: int | None,
    take_step: Callable[[Progress], dict[str, float]],
    evaluate: Callable[[], float],
    log: Callable[[dict[str, Any]], None],
    rewind: Callable[[int], None],
) -> Progress:
    """Train to the end, from the newest checkpoint in `folder` if there is one.

    Args:
        composer: what is trained.
        optimization: its optimizer.
        folder: gets `step-000005` and so on; the newest and the best are kept.
        processes: all take part; the first writes.
        num_steps: optimizer steps in all.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations, the first before any step; None for none.
        take_step: does one step and returns its metrics; `updated` 0 or 1 and `bad` say what became of it.
        evaluate: a score, higher is better.
        log: gets each step's metrics.
        rewind: drops logged steps after the given one.

    Raises:
        TrainingError: `MAX_BAD_STEPS` steps in a row were not finite; the last good checkpoint is kept.
    """
    progress = Progress()
    newest = newest_checkpoint(folder)
    if newest is not None:
        composer.load_weights(newest)
        optimization.load(newest / "optimizer.safetensors")
        progress = _read_progress(newest)
        logger.info("going on from %s", newest)
    if processes.is_first:
        rewind(progress.step or -1)  # an evaluation logged at step 0 is done again
    if newest is None and processes.is_first:
        _save(composer, optimization, folder, progress)
    while progress.step < num_steps:
        # A step's evaluation belongs to it, but comes after it: an interrupted one is done again.
        if eval_every and progress.step == 0 and "0" not in progress.scores:
            _evaluate(progress, evaluate, log)
        metrics = take_step(progress)
        progress.step += 1
        progress.bad_steps = progress.bad_steps + 1 if metrics.get("bad") else 0
        log({"step": progress.step, **metrics})
        if progress.bad_steps == MAX_BAD_STEPS:
            raise TrainingError(
                f"{folder}: the loss was not finite in {MAX_BAD_STEPS} steps in a row, up to step {progress.step}; "
                f"{newest_checkpoint(folder)} is the last good checkpoint. Lower the learning rate or use float32"
            )
        last = progress.step == num_steps
        if eval_every and (progress.step % eval_every == 0 or last):
            _evaluate(progress, evaluate, log)
        best_now = progress.best_step == progress.step
        if not progress.bad_steps and (progress.step % save_every == 0 or last or best_now) and processes.is_first:
            _save(composer, optimization, folder, progress)
    processes.wait()
    return progress


def _evaluate(progress: Progress, evaluate: Callable[[], float], log: Callable[[dict[str, Any]], None]) -> None:
    score = evaluate()
    progress.scores[str(progress.step)] = score
    if progress.best_score is None or score > progress.best_score:
        progress.best_step, progress.best_score = progress.step, score
    log({"step": progress.step, "eval_reward": score})


def _save(composer: Composer, optimization: Optimization, folder: Path, progress: Progress) -> None:
    target = folder / f"step-{progress.step:06d}"
    with replacing(target) as fresh:
        composer.save_pretrained(fresh / "composer")
        optimization.save(fresh / "optimizer.safetensors")
        (fresh / "progress.json").write_text(json.dumps(vars(progress), indent=2) + "\n", encoding="utf-8")
    for other in folder.glob("step-*"):
        if other != target and other.name != f"step-{progress.best_step or 0:06d}":
            shutil.rmtree(other)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest step, or None."""
    return max(folder.glob("step-*"), default=None)


def selected_checkpoint(folder: Path) -> Path | None:
    """The composer to use of a finished training: of the best evaluated step, else of the last; None if there is none."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    best = _read_progress(newest).best_step
    return (newest if best is None else folder / f"step-{best:06d}") / "composer"


def _read_progress(checkpoint: Path) -> Progress:
    try:
        return Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: progress.json cannot be read ({error})") from None
