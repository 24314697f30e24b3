"""A composer on disk is one file, composer.safetensors: the trained tensors, and in its header what they were made for.

One file can be replaced in one move, so weights and settings always belong together and there is no moment without a
checkpoint, whatever is killed and whatever disk is full. composer.json beside it says the same for people and scripts;
it is written after the weights and never read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from latentmem.errors import CheckpointError, RunError
from latentmem.runs import write_atomic

FORMAT_VERSION = 1
"""Version of the header; a reader refuses a newer one."""
WEIGHTS = "composer.safetensors"
SETTINGS = "composer.json"
_HEADER = "latentmem"
"""A single entry: several would be written in no fixed order, and equal composers would not give equal bytes."""


def write_checkpoint(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a composer; when this returns it is on stable storage. An older one in `folder` is replaced as a whole.

    Args:
        folder: made where there is none.
        settings: JSON values.
        tensors: by name, of any shape and on any device.

    Raises:
        CheckpointError: the disk is full or not writable; an older checkpoint in `folder` is untouched.
    """
    described = {"format_version": FORMAT_VERSION, **settings}
    header = json.dumps(described, sort_keys=True)
    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {_HEADER: header})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / WEIGHTS, content)
        write_atomic(folder / SETTINGS, json.dumps(described, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise CheckpointError(f"{folder}: the folder cannot be made ({error.strerror}); name another") from None
    except RunError as error:
        raise CheckpointError(str(error)) from None


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors (on the CPU) of a composer.

    Raises:
        CheckpointError: no such file, a damaged one, not a composer's, or a newer format.
    """
    path = folder / WEIGHTS
    try:
        # Read once: safetensors' own reader opens the path twice, and a save in between would give it half of each.
        content = path.read_bytes()
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        settings: dict[str, Any] = json.loads(header.get(_HEADER, "{}"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no composer here ({WEIGHTS} is missing); name a composer's folder") from None
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: damaged ({reason}); restore it or take another checkpoint") from None
    version = settings.get("format_version")
    if version is None:
        raise CheckpointError(f"{path}: written by something else, its header names no {_HEADER} composer")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path}: format {version} is newer than {FORMAT_VERSION}; upgrade latentmem")
    return settings, tensors
