"""The authors' trained weights, read tensor by tensor into a composer's form.

Only trained tensors are read, because gigabytes of frozen base weights may lie beside them; nothing is unpickled.
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from latentmem.config import ComposerSection, MemorySection
from latentmem.errors import CheckpointError, ModelError
from latentmem.memory.composer import TEMPLATE, composer_words
from latentmem.models.assets import quiet_loading, resolve_model
from latentmem.parsing import parse_json

logger = logging.getLogger(__name__)

_QUERIES = "centralized_memory.weaver.query_latents"
_PROJECTION = "centralized_memory.weaver2agent_proj"
_LM = "centralized_memory.weaver.model.base_model.model."
"""The prefix of the names that a causal LM wrapped by peft gives its weights."""
_LORA_A, _LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"

_NUM_NAMED = 6
"""The most wrong keys that an error names; further ones are only counted."""
_NUM_COMPARED = 64
"""Number of rows of a frozen tensor that are read to compare it."""
_HALF_PRECISION = 2.0**-7
"""Bound of the relative difference between two roundings of one number to bfloat16, the coarsest of the dtypes."""


@dataclass(frozen=True)
class ReleasedWeights:
    """A composer of the authors in our terms; `memory.checkpoints.write_checkpoint` takes its settings and tensors."""

    settings: dict[str, Any]
    """The settings, as of `Composer.settings`."""
    tensors: dict[str, Tensor]
    """The tensors, named as in `Composer.trainable`, float32."""
    base_check: str
    """One line: which frozen base weights were found, and how they compare with those of the named base."""


def read_weights(
    source: Path,
    base: str,
    *,
    agents: str | None = None,
    alpha: float | None = None,
    template: str | None = None,
    max_prompt_tokens: int | None = None,
) -> ReleasedWeights:
    """Read weights in the authors' format: LoRA, query latents and projection, with or without a base.

    K, rank, target modules and widths come from the tensors; the arguments say what the file does not tell.

    Args:
        source: a .safetensors file, the index of one in shards (`model.safetensors.index.json`), or a folder with
            one of them.
        base: the composer's base model by name, folder or hub id. Its configuration is read. If its weights are on this
            machine, at most two of their tensors are read, to compare.
        agents: the model that will be given the latents; None is `base`.
        alpha: LoRA's scale is alpha / rank; None is the default of the configuration.
        template: text that the composer reads, with the fields of `composer.FIELDS`; None is our own, with a warning.
        max_prompt_tokens: longest such text; None is the default of the configuration.

    Raises:
        CheckpointError: a file cannot be read; keys are missing or unexpected; ranks differ between layers; shapes do
            not fit the models; values are not finite; or the base weights are not those of `base`.
        ModelError: a model is unknown.
    """
    defaults = ComposerSection()
    if template is None:
        logger.warning(
            "%s: no template is given, so the composer will read our own text, which is not what these weights were "
            "trained on; docs/released-weights.md tells where to find theirs",
            source,
        )
    shapes = _shapes(base)
    d_composer = _width(shapes)
    d_agent = d_composer if agents is None else _width(_shapes(agents))
    with ExitStack() as stack:
        found = _open(_files(source), stack)
        layers = _adapted_layers(source, found)
        targets = sorted({layer.rpartition(".")[2] for layer in layers})
        _check_keys(source, found, base, shapes, targets)
        # An empty or a scalar tensor counts as 1 here; its shape is refused below.
        num_latents, rank = (max([1, *_shape(found, name)[:1]]) for name in (_QUERIES, _LM + layers[0] + _LORA_A))
        expected = {_QUERIES: [num_latents, d_composer]}
        expected |= {f"{_PROJECTION}.weight": [d_agent, d_composer], f"{_PROJECTION}.bias": [d_agent]}
        for layer in layers:
            d_out, d_in = shapes[f"{layer}.weight"]
            expected |= {_LM + layer + _LORA_A: [rank, d_in], _LM + layer + _LORA_B: [d_out, rank]}
        for name, shape in expected.items():
            if _shape(found, name) != shape:
                raise CheckpointError(
                    f"{source}: {name} has shape {_shape(found, name)}, expected {shape} "
                    f"(K {num_latents}, rank {rank}, base {base!r}, agents {agents or base!r}); "
                    "name the models it was trained with"
                )
        tensors = {_our_name(name): found[name].get_tensor(name).float() for name in expected}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"{source}: {name} holds values that are not finite; get the file again")
        base_check = _compare_base(source, found, base, shapes)
    settings = {
        "base_model": base,
        "agents": agents or base,
        "num_latents": num_latents,
        "d_composer": d_composer,
        "d_agent": d_agent,
        "rank": rank,
        "alpha": float(defaults.alpha if alpha is None else alpha),
        "target_modules": targets,
        "template": TEMPLATE if template is None else template,
        "words": composer_words(MemorySection()),
        "max_prompt_tokens": max_prompt_tokens or defaults.max_prompt_tokens,
        "slots": None,  # the authors' composer has the form of the paper
        "sharpness": defaults.sharpness,
        "cue": None,
    }
    return ReleasedWeights(settings, tensors, base_check)


def _files(source: Path) -> list[Path]:
    """Return the .safetensors files of a file, an index or a folder."""
    if source.is_dir():
        inside = [source / name for name in ("model.safetensors", "model.safetensors.index.json")]
        present = [path for path in inside if path.is_file()]
        if not present:
            raise CheckpointError(f"{source}: holds no model.safetensors and no index of shards; name the file itself")
        source = present[0]
    if not source.name.endswith(".json"):
        return [source]
    try:
        names = sorted(set(parse_json(source.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        raise CheckpointError(
            f"{source}: is not an index of shards (a JSON object with weight_map); get it again"
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{source}: shard {name!r} is not the name of a file beside it; get the index again")
    return [source.parent / name for name in names]


def _open(files: list[Path], stack: ExitStack) -> dict[str, Any]:
    """Open files and return their handles by tensor name; only their headers are read so far."""
    found: dict[str, Any] = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
        except FileNotFoundError:
            raise CheckpointError(f"{file}: no such file; check the path, or that every shard is there") from None
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{file}: is not a whole safetensors file ({reason}); get it again") from None
        found |= dict.fromkeys(handle.keys(), handle)
    return found


def _shape(found: Mapping[str, Any], name: str) -> list[int]:
    return list(found[name].get_slice(name).get_shape())


def _shapes(name: str) -> dict[str, list[int]]:
    """Return the shapes of a causal LM's tensors by name, from its configuration alone; token embeddings come first."""
    source = resolve_model(name)
    try:
        with quiet_loading(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {name!r}: its configuration cannot be read ({reason}); "
            "give a folder, or a hub id that can be reached"
        ) from None
    embeddings = model.get_input_embeddings().weight
    tensors = model.state_dict(keep_vars=True)
    first = next(key for key, tensor in tensors.items() if tensor is embeddings)
    return {first: list(embeddings.shape)} | {key: list(tensor.shape) for key, tensor in tensors.items()}


def _width(shapes: Mapping[str, list[int]]) -> int:
    return next(iter(shapes.values()))[1]


def _adapted_layers(source: Path, found: Mapping[str, Any]) -> list[str]:
    """Return the names of the layers with a LoRA matrix, as the base calls them, in order."""
    matrices = [name.removeprefix(_LM) for name in found if name.startswith(_LM)]
    layers = {name.removesuffix(tail) for tail in (_LORA_A, _LORA_B) for name in matrices if name.endswith(tail)}
    if not layers:
        raise CheckpointError(
            f"{source}: none of its {len(found)} keys is a LoRA matrix such as {_LM}...{_LORA_A}; "
            "expected weights laid out as the authors save them"
        )
    return sorted(layers)


def _check_keys(
    source: Path, found: Mapping[str, Any], base: str, shapes: Mapping[str, list[int]], targets: list[str]
) -> None:
    adapted = [
        layer
        for layer, shape in ((name.removesuffix(".weight"), shape) for name, shape in shapes.items())
        if len(shape) == 2 and layer.rpartition(".")[2] in targets
    ]
    needed = {_QUERIES, f"{_PROJECTION}.weight", f"{_PROJECTION}.bias"}
    needed |= {_LM + layer + tail for layer in adapted for tail in (_LORA_A, _LORA_B)}
    allowed = needed | {name for name in found if _base_name(name) in shapes}
    missing, unexpected = sorted(needed - found.keys()), sorted(found.keys() - allowed)
    if missing or unexpected:
        told = [f"{len(names)} keys {what}: {_some(names)}" for what, names in
                (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        raise CheckpointError(
            f"{source}: {'; '.join(told)}; is {base!r} the base it was trained on, and the file whole?"
        )


def _some(names: list[str]) -> str:
    more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def _base_name(name: str) -> str:
    """Return the base's name of a frozen weight, or "" for other tensors; peft keeps targets under `base_layer`."""
    return name.removeprefix(_LM).replace(".base_layer.", ".") if name.startswith(_LM) else ""


def _our_name(name: str) -> str:
    if name == _QUERIES:
        return "query_latents"
    if name.startswith(_PROJECTION):
        return name.replace(_PROJECTION, "projection")
    return f"lora.{name.removeprefix(_LM).replace('.default.', '.')}"


def _compare_base(source: Path, found: Mapping[str, Any], base: str, shapes: Mapping[str, list[int]]) -> str:
    """Check that the frozen weights in the file are those of `base`, and say what was compared.

    All shapes are compared, and the values of two tensors that are cheap to read and tell models of one architecture
    apart: the last one-dimensional tensor, which is the final norm, and the first rows of the token embeddings.
    """
    theirs = {name: key for key in found if (name := _base_name(key)) in shapes}
    if not theirs:
        return f"no base weights beside them; the LoRA matrices fit {base!r}"
    for name, key in theirs.items():
        if _shape(found, key) != shapes[name]:
            raise CheckpointError(
                f"{source}: {key} has shape {_shape(found, key)}, {base!r} has {shapes[name]}; "
                "name the base it was trained on"
            )
    probes = [next(iter(shapes)), [name for name, shape in shapes.items() if len(shape) == 1][-1]]
    told = f"{len(theirs)} base weights beside them have the shapes of {base!r}"
    folder = _local_folder(base)
    with ExitStack() as stack:
        ours = _open(_files(folder), stack) if folder else {}
        compared = [name for name in probes if name in ours and name in theirs]
        for name in compared:
            key = theirs[name]
            rows = [
                handle.get_slice(k)[:_NUM_COMPARED].float() for handle, k in ((found[key], key), (ours[name], name))
            ]
            if rows[0].shape != rows[1].shape or not torch.allclose(rows[0], rows[1], rtol=_HALF_PRECISION, atol=1e-6):
                raise CheckpointError(
                    f"{source}: its base weights are not those of {base!r}, {name} differs; "
                    "name the base it was trained on"
                )
    if not compared:
        return (
            f"{told}; values were not compared, since on this machine there are no weights of {base!r} by these names"
        )
    return f"{told}, and the values of {' and '.join(compared)}"


def _local_folder(base: str) -> Path | None:
    """Return the folder of a model's weights on this machine; None if they would have to be fetched first."""
    source = resolve_model(base)
    if isinstance(source, Path):
        return source
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if isinstance(cached := try_to_load_from_cache(source, name), str):
            folder = Path(cached).parent
            return folder if all(file.is_file() for file in _files(folder)) else None
    return None


def sections(settings: Mapping[str, Any]) -> str:
    """Return what a configuration must say to load this checkpoint: the sections `model` and `composer`, as YAML."""
    kept = ("num_latents", "rank", "alpha", "target_modules", "template", "max_prompt_tokens")
    own_base = {"model": settings["base_model"]} if settings["base_model"] != settings["agents"] else {}
    values = {"model": {"name": settings["agents"]}, "composer": own_base | {key: settings[key] for key in kept}}
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that writes text of several lines as a block, where YAML can."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _write_text)
