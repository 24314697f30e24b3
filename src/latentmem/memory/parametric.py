"""Parametric memory, a baseline: what was learned lies in the agents' own weights, in one LoRA that all roles share.

To a rollout it is a memory like the others. It recalls neither text nor latents, but the adapter that the agents are to
speak with. So agents with and without it share one backbone, and each prompt names the adapter to use.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentmem.config import GRPOSection
from latentmem.memory.checkpoints import fill_parameters, read_checkpoint, write_checkpoint
from latentmem.memory.memory import Recall, Recalls
from latentmem.models.language_model import LanguageModel
from latentmem.trajectory import Recalled, Role, Task, Trajectory

DEFAULTS = GRPOSection()
_MUST_AGREE = ("d_agent", "rank", "alpha", "target_modules")


class ParametricMemory:
    """LoRA on the agents' language model; it changes nothing until it is trained."""

    kind = "parametric"

    def __init__(
        self,
        model: LanguageModel,
        *,
        rank: int = DEFAULTS.rank,
        alpha: float = DEFAULTS.alpha,
        target_modules: Sequence[str] = DEFAULTS.target_modules,
        seed: int = 0,
    ) -> None:
        """Put a new adapter on the agents' model.

        Args:
            model: the agents' model; a composer may share it.
            rank: LoRA's r.
            alpha: LoRA's scale is alpha / rank.
            target_modules: names of the linear layers that get an adapter.
            seed: seed of the initial weights.

        Raises:
            ConfigError: a target module is missing from the model, or is its embedding or output layer.
        """
        self.model = model
        self.rank = rank
        self.alpha = alpha
        self.target_modules = tuple(target_modules)
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self._adapter = model.adapters.add(
                rank=rank, alpha=alpha, target_modules=target_modules, key="grpo.target_modules"
            )

    @property
    def adapter(self) -> str:
        """The adapter's name on the model."""
        return self._adapter.name

    def detach(self) -> None:
        """Take the adapter off the agents; this memory cannot be used afterwards."""
        self.model.adapters.remove(self.adapter)

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> Recalls:
        """Return the adapter for each query, whatever the task and the role."""
        return Recalls([Recall(Recalled(kind=self.kind), adapter=self.adapter) for _ in queries])

    def add(self, trajectory: Trajectory) -> None:
        """Keep nothing: only training changes the weights."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name: the LoRA matrices."""
        return {f"lora.{name}": matrix for name, matrix in self._adapter.matrices.items()}

    def settings(self) -> dict[str, Any]:
        """Return the settings that are stored in a checkpoint, as JSON values."""
        return {
            "agents": self.model.name,
            "d_agent": self.model.width,
            "rank": self.rank,
            "alpha": self.alpha,
            "target_modules": list(self.target_modules),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter to a folder as one file; an older one there is replaced as a whole.

        Raises:
            CheckpointError: the disk is full or not writable; an older checkpoint is untouched.
        """
        tensors = {name: matrix.detach() for name, matrix in self.trainable().items()}
        write_checkpoint(Path(folder), self.settings(), tensors, "agents")

    def load_weights(self, folder: str | Path) -> None:
        """Read a checkpoint into this adapter, strictly; an error leaves the adapter unchanged.

        Raises:
            CheckpointError: there is no checkpoint of agents; its width, rank, alpha or target modules differ; a tensor
                is missing, unexpected or of another shape.
        """
        folder = Path(folder)
        settings, tensors = read_checkpoint(folder, "agents")
        fill_parameters(
            folder,
            settings,
            tensors,
            self.trainable(),
            self.settings(),
            must_agree=_MUST_AGREE,
            told=("agents",),
            owner="this adapter",
        )
