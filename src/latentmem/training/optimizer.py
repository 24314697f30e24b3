"""AdamW for all trainers: which parameters move and at which rates; a gradient that is not finite moves none."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from safetensors.torch import save
from torch import Tensor

from latentmem.config import ComposerOptimizerFields, OptimizerFields
from latentmem.errors import CheckpointError
from latentmem.files import write_atomic
from latentmem.memory.checkpoints import is_finite, load_tensors
from latentmem.processes import Processes

Schedule = Literal["constant", "linear", "cosine"]
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter."""
_PROJECTS = ("projection", "gate", "frame")
"""The parts of a composer that move at the projection's rate, because they act on the latents directly."""


class Trained(Protocol):
    """The object that is trained: a composer, or the adapter of agents."""

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return the trained parameters by name."""

    def save_pretrained(self, folder: Path) -> None:
        """Write a checkpoint to a folder, as a whole."""

    def load_weights(self, folder: Path) -> None:
        """Read what `save_pretrained` wrote."""


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_steps: int, schedule: Schedule) -> float:
    """Return the rate of step 0, 1, ... num_steps - 1: a linear rise over the warm-up, then the schedule.

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


@dataclass(frozen=True)
class StepResult:
    """The result of one step of training."""

    metrics: dict[str, float]
    moved: bool
    """Whether the parameters changed. A step with nothing to learn from is finite and changes nothing."""
    finite: bool
    """Whether the loss and the gradient were finite."""


class Optimization:
    """AdamW on the trained parameters, guarded against non-finite gradients."""

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
        """Take the parameters and the settings of the optimizer.

        Args:
            trained: the object whose `trainable` parameters move.
            processes: the processes that train together.
            num_steps: length of the schedule.
            learning_rate: the rate at its peak.
            schedule: the schedule of the rate after the warm-up.
            warmup_steps: number of steps over which the rate rises.
            max_grad_norm: gradients are scaled down to this L2 norm.
            weight_decay: AdamW's.
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
        """The parameters by name, in AdamW's order."""
        self.adamw = torch.optim.AdamW(
            [{"params": list(group.values())} for group, _ in used], lr=learning_rate, weight_decay=weight_decay
        )

    @classmethod
    def of(cls, trained: Trained, settings: OptimizerFields, num_steps: int, processes: Processes) -> Self:
        """Make the optimizer that a section of the configuration describes."""
        return cls(
            trained,
            processes,
            num_steps=num_steps,
            learning_rate=settings.learning_rate,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
            max_grad_norm=settings.max_grad_norm,
            weight_decay=settings.weight_decay,
            projection_rate=settings.projection_rate if isinstance(settings, ComposerOptimizerFields) else 1.0,
        )

    def step(self, step: int, loss: float) -> tuple[bool, float]:
        """Apply the accumulated gradients, summed over processes, unless they or the loss are not finite.

        Args:
            step: number of steps done before; sets the learning rate.
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

    def move(self, step: int, loss: float, **metrics: float) -> StepResult:
        """Do a `step`; return its result with loss, gradient norm and learning rate besides `metrics`."""
        good, norm = self.step(step, loss)
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": self.rate(step), **metrics}
        return StepResult(metrics, moved=good, finite=good)

    def save(self, path: Path) -> None:
        """Write AdamW's moments, by parameter name; all processes call this, and the first one writes.

        Raises:
            RunError: the file cannot be written, for example on a full disk.
        """
        names = list(self.parameters)
        if self.processes.is_first:
            state = self.adamw.state_dict()["state"]
            parts = {f"{names[i]}/{key}": v.cpu() for i, part in state.items() for key, v in part.items()}
            write_atomic(path, save(parts))

    def load(self, path: Path) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of other parameters.
        """
        names = {name: i for i, name in enumerate(self.parameters)}
        state: dict[int, dict[str, Tensor]] = {}
        try:
            for key, value in load_tensors(path.read_bytes()).items():
                name, _, moment = key.rpartition("/")
                shape = torch.Size() if moment == "step" else self.parameters[name].shape
                if moment not in _MOMENTS or value.shape != shape or not is_finite(value):
                    raise ValueError(f"{key} is no state of AdamW")
                state.setdefault(names[name], {})[moment] = value
            if any(len(moments) < len(_MOMENTS) for moments in state.values()):
                raise ValueError("a moment is missing")
        except (OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: the optimizer cannot be read ({error}); train into a new run") from None
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})
