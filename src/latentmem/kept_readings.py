"""What latents say, as JSON kept beside the latents and as a table, so that a report needs no model.

`latent_reading` finds out what they say. Loads no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMAT_VERSION = 1
"""Version of `readings_as_json`."""
READING_SUFFIX = ".read.json"
"""Suffix of the file, which lies beside a memory's trajectories."""
_NOTHING = "-"


@dataclass(frozen=True)
class LatentReading:
    """What one latent says."""

    gate: float | None
    """The slot's gate; None where the latent is not a slot."""
    length: float
    """Length of the composed part, without frame or bias, relative to the agents' token embeddings (root mean square).
    At 0 the latent is the same for every task."""
    nearest: tuple[tuple[str, float], ...]
    """Tokens and their shares, nearest first."""
    frame: tuple[str, float] | None
    """The token nearest to the frame, and its share; None without slots, or where the frame is zero."""


def reading_cells(
    after: Sequence[LatentReading],
    before: Sequence[LatentReading] | None,
    titles: tuple[str, str] = ("nearest after", "nearest before"),
) -> list[list[str]]:
    """Return header and rows of a table; the frame and before-training columns appear only where there are any.

    `titles` head the columns of tokens after and before training, where both exist.
    """
    columns = {
        "latent": [str(number) for number in range(1, len(after) + 1)],
        "gate": [_NOTHING if found.gate is None else f"{found.gate:.2f}" for found in after],
        "length": [f"{found.length:.2f}" for found in after],
        "nearest": [_told(found.nearest) for found in after],
    }
    if before is not None:
        columns[titles[0]] = columns.pop("nearest")
        columns[titles[1]] = [_told(found.nearest) for found in before]
    if any(found.frame for found in after):
        columns["frame"] = [_told([found.frame] if found.frame else []) for found in after]
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def _told(tokens: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{token} {share:.2f}" for token, share in tokens) or _NOTHING


def readings_as_json(
    memory: str,
    before: str | None,
    tasks: Mapping[str, Mapping[str, tuple[Sequence[LatentReading], Sequence[LatentReading] | None]]],
) -> dict[str, Any]:
    """Return what a memory's latents say at some tasks, as JSON values.

    Args:
        memory: the memory's name.
        before: name of the memory that it was trained from, if it was trained.
        tasks: by the task's key and the role's name, what each latent says and what it said before.
    """
    return {
        "format_version": FORMAT_VERSION,
        "memory": memory,
        "before": before,
        "tasks": [
            {
                "task": task,
                "roles": [
                    {"role": role, "after": _values(after), "before": None if before is None else _values(before)}
                    for role, (after, before) in roles.items()
                ],
            }
            for task, roles in tasks.items()
        ],
    }


def _values(readings: Sequence[LatentReading]) -> list[dict[str, Any]]:
    return [
        {
            "gate": found.gate,
            "length": round(found.length, 4),
            "nearest": [[token, round(share, 4)] for token, share in found.nearest],
            "frame": None if found.frame is None else [found.frame[0], round(found.frame[1], 4)],
        }
        for found in readings
    ]
