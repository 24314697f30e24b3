"""LoRA adapters on one frozen backbone: any number may be attached, and at most one is active.

Each composer reads with its own adapter, agents that were trained themselves speak with another one, and all other
agents speak with none. All share one copy of the backbone. A `with` block around the use of the model names the active
adapter, so none can stay active by mistake. One thread at a time is in such a block, in the order of asking; so a
composer can read between two steps of sampling.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from latentmem.errors import ConfigError, suggest
from latentmem.models.turns import InTurn


@dataclass(frozen=True)
class Adapter:
    """One adapter on a backbone."""

    name: str
    """The adapter's name, unique on this backbone."""
    matrices: dict[str, nn.Parameter]
    """The adapter's matrices by layer name; float32 or wider, whatever the backbone's dtype."""


class Adapters:
    """The adapters of one backbone; none at first."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self._model = model
        self._model_name = name
        self._layers: list[BaseTunerLayer] = []
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._on: str | None = None
        self._num_added = 0
        self._in_turn = InTurn()

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def add(self, *, rank: int, alpha: float, target_modules: Sequence[str], key: str) -> Adapter:
        """Attach a new adapter, initialised from torch's global random state; it does not change any output yet.

        Args:
            rank: LoRA's r.
            alpha: LoRA's scale is alpha / rank.
            target_modules: names of the linear layers to adapt.
            key: the configuration key of `target_modules`, for the error.

        Raises:
            ConfigError: a target module is missing from the backbone, or is its embedding or output layer.
        """
        with self._in_turn:
            return self._add(rank, alpha, target_modules, key)

    def _add(self, rank: int, alpha: float, target_modules: Sequence[str], key: str) -> Adapter:
        self._num_added += 1
        name = f"adapter{self._num_added}"
        self._check_targets(target_modules, key)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(target_modules), lora_dropout=0.0, bias="none"
        )
        inject_adapter_in_model(config, self._model, adapter_name=name)
        del self._model.peft_config  # else peft warns when the next adapter is added
        dtype = torch.promote_types(self._model.dtype, torch.float32)
        found = {path: matrix for path, matrix in self._model.named_parameters() if f".{name}." in path}
        for matrix in found.values():
            matrix.data = matrix.data.to(dtype)
        self._parameters[name] = {path.replace(f".{name}.", "."): matrix for path, matrix in found.items()}
        self._layers = [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]
        self._turn_on(self._on)
        return Adapter(name, self._parameters[name])

    def remove(self, name: str) -> None:
        """Remove an adapter; a layer that carries no other adapter gets the backbone's own module back."""
        with self._in_turn:
            self._remove(name)

    def _remove(self, name: str) -> None:
        assert self._on != name, "an adapter is taken off while it is used"
        del self._parameters[name]
        carried = {path.rpartition(".lora_")[0] for matrices in self._parameters.values() for path in matrices}
        for path, module in list(self._model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.delete_adapter(name)
                if path not in carried:
                    parent, _, child = path.rpartition(".")
                    setattr(self._model.get_submodule(parent), child, module.get_base_layer())
        self._layers = [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]

    @contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """Make the named adapter (None: no adapter) the only active one in the block; afterwards restore the state.

        Another thread that asks meanwhile waits until the block has ended.
        """
        with self._in_turn:
            assert name is None or name in self, f"the backbone has no adapter {name!r}"
            before = self._on
            if name != before:
                self._turn_on(name)
            try:
                yield
            finally:
                if name != before:
                    self._turn_on(before)

    def _turn_on(self, name: str | None) -> None:
        for layer in self._layers:
            layer.set_adapter([] if name is None else [name])
        # peft's switch also clears requires_grad, but a backward pass may run after its adapter was switched off.
        for matrices in self._parameters.values():
            for matrix in matrices.values():
                matrix.requires_grad_(True)
        self._on = name

    def _check_targets(self, target_modules: Sequence[str], key: str) -> None:
        """Check that each target names a layer: peft is content if one of them does, and silently skips the others."""
        paths = [path for path, tensor in self._model.named_parameters() if tensor.ndim == 2 and ".lora_" not in path]
        layers = {path.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2] for path in paths}
        ends = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        outside = {path.rpartition(".")[2] for path, module in self._model.named_modules() if module in ends}
        for target in target_modules:
            name = target.rpartition(".")[2]
            if name in outside:  # log-probabilities are computed from the output layer's plain weight
                raise ConfigError(
                    f"{key}: {target!r} is the embedding or the output layer of model {self._model_name!r}; name "
                    "layers between them, such as q_proj"
                )
            if name not in layers:
                raise ConfigError(
                    f"{key}: model {self._model_name!r} has no layer {target!r}; {suggest(target, layers - outside)}"
                )
