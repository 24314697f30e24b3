"""The shape of a model from its config.json alone; parameters are counted on torch's meta device, without values."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from latentmem.errors import ConfigError, ModelError, suggest
from latentmem.models.assets import is_in_reach, quiet_loading, resolve_config, resolve_embedder
from latentmem.models.attention import may_be_fast
from latentmem.models.embedder import HashingEmbedder


@dataclass(frozen=True)
class Linear:
    """The linear layers of one name, such as q_proj, over all decoder layers."""

    count: int
    inputs: int
    """Features that one of them reads."""
    outputs: int
    """Features that one of them writes."""


@dataclass(frozen=True)
class Shape:
    """The numbers of a causal LM that decide its memory."""

    name: str
    parameters: int
    """Number of parameters; tied ones count once."""
    layers: int
    width: int
    """d, the width of the hidden states."""
    heads: int
    kv_heads: int
    """Heads of keys and values."""
    head_width: int
    feed_forward: int
    """Width inside the feed-forward part; with experts, of all that one token visits."""
    vocabulary: int
    head_norms: bool
    """Whether queries and keys are normalised head by head, as in Qwen3."""
    is_fast: bool
    """Whether its layers attend to all earlier columns or to a window, as far as its configuration tells."""
    is_quantised: bool
    linears: dict[str, Linear]

    @property
    def query(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_width

    @property
    def key(self) -> int:
        """Width of the keys of all heads; values have the same."""
        return self.kv_heads * self.head_width

    def lora(self, rank: int, target_modules: tuple[str, ...], key: str) -> int:
        """Return the number of parameters of LoRA matrices.

        Args:
            rank: LoRA's r.
            target_modules: names of the linear layers that get an adapter.
            key: the configuration's key of these names, for the error.

        Raises:
            ConfigError: the model has no linear layer of that name.
        """
        total = 0
        for target in target_modules:
            linear = self.linears.get(target.rpartition(".")[2])
            if linear is None:
                raise ConfigError(
                    f"{key}: model {self.name!r} has no layer {target!r}; {suggest(target, list(self.linears))}"
                )
            total += linear.count * rank * (linear.inputs + linear.outputs)
        return total


def read_shape(name: str) -> Shape:
    """Read the shape of a causal LM, named as in `model.name`; no weights are needed.

    Raises:
        ModelError: there is no such model, or its configuration cannot be read.
    """
    place, gguf = resolve_config(name)
    cached = {"local_files_only": not is_in_reach(place)}
    try:
        with quiet_loading():
            config = AutoConfig.from_pretrained(place, **cached, **({} if gguf is None else {"gguf_file": gguf}))
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {name!r}: its configuration cannot be read ({reason}); give a folder with a config.json, a .gguf "
            "file, a hub id that is cached or can be reached, or the embedded smollm2-135m"
        ) from None
    text = config.get_text_config()
    heads = text.num_attention_heads
    linears = _linears(model)
    return Shape(
        name=name,
        parameters=_count(model),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_width=getattr(text, "head_dim", None) or text.hidden_size // heads,
        feed_forward=_feed_forward(text, linears),
        vocabulary=int(model.get_input_embeddings().weight.shape[0]),
        head_norms=any(path.endswith("q_norm") for path, _ in model.named_modules()),
        is_fast=may_be_fast(model),
        is_quantised=getattr(config, "quantization_config", None) is not None,
        linears=linears,
    )


def read_embedder(name: str) -> tuple[int, int]:
    """Return the number of parameters and of dimensions of an embedder, named as in `bank.embedder`.

    Raises:
        ModelError: there is no such model, or its configuration cannot be read.
    """
    if name == HashingEmbedder.name:
        return 0, HashingEmbedder().width
    place = resolve_embedder(name)
    if isinstance(place, Path) and (modules := place / "modules.json").exists():
        place = place / json.loads(modules.read_text(encoding="utf-8"))[0]["path"]
    try:
        with quiet_loading(), torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(place, local_files_only=not is_in_reach(place)))
        return _count(model), int(model.config.hidden_size)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"embedder {name!r}: its configuration cannot be read ({reason})") from None


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # a tied one is listed once


def _linears(model: Any) -> dict[str, Linear]:
    """Return the linear layers between the embedding and the output layer."""
    found: dict[str, Linear] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            name = path.rpartition(".")[2]
            before = found.get(name)
            found[name] = Linear((before.count if before else 0) + 1, module.in_features, module.out_features)
    return found


def _feed_forward(text: Any, linears: dict[str, Linear]) -> int:
    experts = getattr(text, "num_experts_per_tok", None)
    if experts and getattr(text, "moe_intermediate_size", None):
        return int(experts * text.moe_intermediate_size)
    width = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None)
    if width is None:
        width = linears["down_proj"].inputs if "down_proj" in linears else 4 * text.hidden_size
    return int(width) * (experts or 1)
