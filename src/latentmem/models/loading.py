"""From a model's name to its weights and its tokenizer, whole or refused."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from latentmem.errors import ModelError
from latentmem.models.assets import is_in_reach, quiet_loading, resolve_model

logger = logging.getLogger(__name__)

_NAMED = 3
"""Tensors that a message names, at most."""


def load(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM to the CPU, and its tokenizer.

    Args:
        name: see `assets.resolve_model`.
        dtype: `float32` or `bfloat16`.

    Raises:
        ModelError: no such model; weights that are missing, damaged, or quantised in a way that cannot be read here; an
            adapter beside the weights; a tokenizer with more tokens than the model has embeddings.
    """
    source = resolve_model(name)
    if isinstance(source, Path) and (source / "adapter_config.json").exists():
        raise _adapter(name)
    cached = not is_in_reach(source)
    try:
        with quiet_loading():
            model, found = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told, and refused below
                local_files_only=cached,
                adapter_kwargs={"local_files_only": cached},  # else an adapter is asked for over the network
            )
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=cached)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {name!r} cannot be loaded ({reason}); give a folder, a .gguf file, a hub id that is "
            "cached or can be reached, or the embedded smollm2-135m"
        ) from None
    if getattr(model, "_hf_peft_config_loaded", False):  # from the hub, where it cannot be seen beforehand
        raise _adapter(name)
    _check_weights(name, model, found)
    rows = len(model.get_input_embeddings().weight)
    most = max(tokenizer.get_vocab().values(), default=0)
    if most >= rows:
        raise ModelError(
            f"model {name!r}: its tokenizer has a token of id {most}, but there are embeddings for {rows}; take the "
            "tokenizer that belongs to these weights"
        )
    return model, tokenizer


def _adapter(name: str) -> ModelError:
    return ModelError(
        f"model {name!r} comes with an adapter (adapter_config.json), which would be on or off as others are put "
        "beside it; merge it into the weights first (merge_and_unload of peft), or move it away"
    )


def _check_weights(name: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing or found["mismatched_keys"]:
        lacks = missing or sorted(str(key[0]) for key in found["mismatched_keys"])
        also = f"; it holds {_some(unexpected)} instead" if unexpected else ""
        raise ModelError(
            f"model {name!r} lacks {_some(lacks)}{also}; save the whole model again, under its architecture's names"
        )
    if unexpected:
        logger.warning("model %s holds weights that its architecture does not use: %s", name, _some(unexpected))
    quantised = getattr(model.config, "quantization_config", None)
    if quantised is not None and getattr(model, "hf_quantizer", None) is None:
        raise ModelError(
            f"model {name!r} is quantised ({_method(quantised)}), but was read as if its numbers were plain; unpack it "
            "first, or take the model that it was made from"
        )
    if quantised is not None:
        logger.warning("model %s is quantised (%s)", name, _method(quantised))


def _method(quantised: Any) -> str:
    values = quantised if isinstance(quantised, dict) else quantised.to_dict()
    return str(values.get("quant_method", "unknown"))


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
