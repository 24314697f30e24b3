"""Keep latents that an evaluation composed in one small file, so that a map of them needs no model.

The file is one safetensors tensor [T, R, K, d], for some tasks and every role of the team; its header names the tasks
and roles. Each batch replaces the whole file, and a task that is composed again replaces its earlier latents. After a
crash the file may be ahead of the trajectories; repeating the batch sets it right. Loads no torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from latentmem.errors import RunError
from latentmem.files import write_atomic
from latentmem.parsing import parse_json

FORMAT_VERSION = 1
"""Version of the header; a reader refuses a newer one."""
SUFFIX = ".safetensors"
"""Suffix of the file, which lies beside a memory's trajectories."""
_HEADER = "latentmem"


@dataclass(frozen=True)
class KeptLatents:
    """The latents that one memory gave to the roles of a team for T tasks."""

    tasks: tuple[str, ...]
    """Keys of the T tasks."""
    domains: tuple[str, ...]
    """What each task is an instance of (family, world or domain), [T]."""
    roles: tuple[str, ...]
    """Names of the R roles, in the team's order."""
    latents: NDArray[np.float32]
    """[T, R, K, d_agent]."""

    def __post_init__(self) -> None:
        shape = (len(self.tasks), len(self.roles))
        if self.latents.ndim != 4 or self.latents.shape[:2] != shape or len(self.domains) != shape[0]:
            raise ValueError(f"latents {list(self.latents.shape)} of {shape[0]} tasks and {shape[1]} roles")


def keep_latents(path: Path, new: KeptLatents) -> None:
    """Add latents to the file, or create it; tasks that it already has are replaced.

    Raises:
        RunError: the file is damaged, has other roles, K or width, or cannot be written.
    """
    tasks, domains, latents = new.tasks, new.domains, new.latents
    if path.exists():
        old = read_latents(path)
        if old.roles != new.roles or old.latents.shape[1:] != new.latents.shape[1:]:
            raise RunError(
                f"{path}: holds latents {list(old.latents.shape[1:])} of the roles {', '.join(old.roles)}, and "
                f"{list(new.latents.shape[1:])} of {', '.join(new.roles)} are to be added; remove it, or name a new "
                "run folder with run=FOLDER"
            )
        kept = [i for i, task in enumerate(old.tasks) if task not in new.tasks]
        tasks = (*(old.tasks[i] for i in kept), *new.tasks)
        domains = (*(old.domains[i] for i in kept), *new.domains)
        latents = np.concatenate([old.latents[kept], new.latents])
    names = {"format_version": FORMAT_VERSION, "tasks": tasks, "domains": domains, "roles": new.roles}
    write_atomic(path, save({"latents": np.ascontiguousarray(latents)}, {_HEADER: json.dumps(names)}))


def read_latents(path: Path) -> KeptLatents:
    """Read what `keep_latents` wrote.

    Raises:
        RunError: the file is missing, damaged or of a newer format.
    """
    try:
        content = path.read_bytes()
        latents = load(content)["latents"]
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        names: dict[str, Any] = parse_json(header["__metadata__"][_HEADER])
        version = int(names["format_version"])
        rows = [tuple(map(str, names[key])) for key in ("tasks", "domains", "roles")]
        kept = KeptLatents(rows[0], rows[1], rows[2], latents)
        if latents.dtype != np.float32 or not np.isfinite(latents).all():
            raise ValueError(f"latents are {latents.dtype}, not all of them finite float32")
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path}: damaged ({reason}); remove it, its tasks are then missing from the map") from None
    if version > FORMAT_VERSION:
        raise RunError(f"{path}: format {version} is newer than {FORMAT_VERSION}; upgrade latentmem")
    return kept
