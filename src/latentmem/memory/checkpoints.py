"""Checkpoints of a composer: one file, composer.safetensors, with the trained tensors and, in its header, the settings.

One file can be replaced in one move. So weights and settings always belong together, and a checkpoint exists at every
moment, whatever is killed and whatever disk is full. composer.json beside it repeats the settings for people and
scripts; it is written after the weights and never read. What `train grpo` trains on the agents is stored in the same
form as agents.safetensors; the names keep the two kinds apart.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from latentmem.errors import CheckpointError, RunError
from latentmem.files import write_atomic
from latentmem.parsing import Form, checked, parse_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Version of the header; a newer one is refused."""
Kind = Literal["composer", "agents"]
_HEADER = "latentmem"
"""The header's single entry: several would have no fixed order, so equal composers would give unequal bytes."""
NAMES: dict[Kind, str] = {"composer": "composer", "agents": "LoRA of agents"}
"""The name of each kind in messages."""


_Count = Annotated[int, Field(gt=0)]
_Number = Annotated[float, Field(gt=0)]


class _Settings(Form):
    """What the settings of both kinds may be; who needs one that is absent says so."""

    base_model: str = ""
    agents: str = ""
    num_latents: _Count = 1
    d_composer: _Count = 1
    d_agent: _Count = 1
    rank: _Count = 1
    alpha: _Number = 1.0
    target_modules: tuple[str, ...] = ()
    template: str = ""
    words: dict[str, str] = Field(default={})
    max_prompt_tokens: _Count = 1
    slots: _Count | None = None
    sharpness: _Number = 1.0
    cue: str | None = None


def weights_file(folder: Path, kind: Kind = "composer") -> Path:
    """Return the path of the file that holds the tensors."""
    return folder / f"{kind}.safetensors"


def kind_of(folder: Path) -> Kind:
    """Return the kind of checkpoint in a folder; "composer" if it holds none."""
    return "agents" if weights_file(folder, "agents").exists() else "composer"


def write_checkpoint(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: Kind = "composer"
) -> None:
    """Write a checkpoint as a whole, over any older one; when this returns, it is on stable storage.

    Args:
        folder: made if there is none.
        settings: JSON values.
        tensors: by name, of any shape and on any device.
        kind: the kind of checkpoint.

    Raises:
        CheckpointError: the disk is full or not writable; an older checkpoint in `folder` is untouched.
    """
    described = {"format_version": FORMAT_VERSION, **settings}
    header = json.dumps(described, sort_keys=True)
    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {_HEADER: header})
    path = weights_file(folder, kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
        write_atomic(path.with_suffix(".json"), json.dumps(described, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise CheckpointError(f"{folder}: the folder cannot be made ({error.strerror}); name another") from None
    except RunError as error:
        raise CheckpointError(str(error)) from None


def read_checkpoint(folder: Path, kind: Kind = "composer") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and the tensors (on the CPU) of a checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged, of the other kind, of another program, or of a newer format.
    """
    path = weights_file(folder, kind)
    try:
        # Read once: safetensors' own reader opens the path twice, and could get one half of each of two checkpoints.
        content = path.read_bytes()
        tensors = load_tensors(content)
        length = int.from_bytes(content[:8], "little")
        header = parse_json(content[8 : 8 + length]).get("__metadata__") or {}
        settings = parse_json(header.get(_HEADER, "{}"))
    except FileNotFoundError:
        wanted, other = NAMES[kind], kind_of(folder)
        if other != kind and weights_file(folder, other).exists():
            name = "latent:FOLDER" if other == "composer" else "grpo:FOLDER"
            raise CheckpointError(f"{folder}: holds a {NAMES[other]}, not a {wanted}; write {name} to use it") from None
        raise CheckpointError(
            f"{folder}: no {wanted} here ({path.name} is missing); name a folder that holds one"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); restore it or take another checkpoint") from None
    version = settings.get("format_version") if isinstance(settings, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: not written by latentmem: its header names no {_HEADER} {NAMES[kind]}")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path}: format {version} is newer than {FORMAT_VERSION}; upgrade latentmem")
    try:
        checked(settings, _Settings)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); restore it or take another checkpoint") from None
    return settings, tensors


def load_tensors(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, on the CPU.

    Raises:
        ValueError: it is no whole file, or has a kind of numbers that torch does not know.
    """
    try:
        tensors: dict[str, Tensor] = load(content)
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds fractions, all of them finite."""
    return tensor.is_floating_point() and bool(tensor.float().isfinite().all())


def fill_parameters(
    folder: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    ours: Mapping[str, Any],
    *,
    must_agree: Sequence[str],
    told: Sequence[str],
    owner: str,
) -> None:
    """Put the tensors of a checkpoint into parameters, strictly; an error leaves the parameters unchanged.

    Args:
        folder: the checkpoint's folder, for errors.
        settings: the checkpoint's settings.
        tensors: the checkpoint's tensors.
        parameters: by the names that the tensors must have.
        ours: the settings that the parameters were made with.
        must_agree: settings that have to be equal.
        told: settings whose difference is only a warning, since one model may go by several names.
        owner: whose parameters they are, for errors.

    Raises:
        CheckpointError: a setting in `must_agree` differs; a tensor is missing, unexpected or of another shape.
    """
    for key in must_agree:
        if settings.get(key) != ours[key]:
            raise CheckpointError(
                f"{folder}: checkpoint has {key} {settings.get(key)!r}, {owner} {ours[key]!r}; "
                "use the configuration it was trained with"
            )
    for key in told:
        if settings.get(key) != ours[key]:
            logger.warning("%s was trained with %s %r, now it is %r", folder, key, settings.get(key), ours[key])
    missing, unexpected = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors missing {missing[:3]}, {len(unexpected)} unexpected "
            f"{unexpected[:3]}; use the model it was trained on"
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(tensors[name].shape)}, expected {list(parameter.shape)}; "
                "use the model it was trained on"
            )
        if not is_finite(tensors[name]):
            raise CheckpointError(
                f"{folder}: {name} holds whole numbers, or values that are not finite; take another checkpoint"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
