"""A composer on disk: composer.safetensors with the trained tensors, composer.json with what they were made for.

Written beside the old one and moved into its place, so a crash or a full disk leaves the last good checkpoint.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentmem.errors import CheckpointError

FORMAT_VERSION = 1
WEIGHTS = "composer.safetensors"
SETTINGS = "composer.json"


def write_checkpoint(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files durably, replacing `folder` as a whole.

    Raises:
        CheckpointError: the disk is full or not writable; an older checkpoint in `folder` is untouched.
    """
    with replacing(folder) as fresh:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, fresh / WEIGHTS)
        text = json.dumps({"format_version": FORMAT_VERSION, **settings}, indent=2, ensure_ascii=False)
        (fresh / SETTINGS).write_text(text + "\n", encoding="utf-8")


class replacing:  # noqa: N801 - reads as a verb in `with replacing(folder) as fresh`
    """A context that fills a fresh folder and, on success, durably puts it in place of the old one.

    Raises:
        CheckpointError: what was written did not reach the disk; the old folder is untouched.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fresh = folder.with_name(f".{folder.name}.{os.getpid()}.new")
        self.old = folder.with_name(f".{folder.name}.{os.getpid()}.old")

    def __enter__(self) -> Path:
        shutil.rmtree(self.fresh, ignore_errors=True)
        try:
            self.fresh.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be written ({error.strerror})") from None
        return self.fresh

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                for path in [*self.fresh.iterdir(), self.fresh]:
                    _sync(path)
                if self.folder.exists():
                    self.folder.rename(self.old)
                self.fresh.rename(self.folder)
                _sync(self.folder.parent)
        except OSError as problem:
            raise CheckpointError(f"{self.folder}: cannot be written ({problem.strerror}); free some space") from None
        finally:
            shutil.rmtree(self.fresh, ignore_errors=True)
            shutil.rmtree(self.old, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"{self.folder}: cannot be written ({error}); the last checkpoint is kept") from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors (on the CPU) of a composer.

    Raises:
        CheckpointError: missing or damaged files, or a newer format.
    """
    try:
        settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: no composer checkpoint here ({Path(error.filename or WEIGHTS).name} is missing)"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: damaged composer checkpoint ({error})") from None
    if settings.get("format_version", 0) > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: checkpoint format {settings['format_version']} is newer than {FORMAT_VERSION}; upgrade latentmem"
        )
    return settings, tensors
