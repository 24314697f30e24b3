"""Batches of an evaluation. Each is played at once, and counts when its trajectories and its cost are on disk."""

import ctypes
import json
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from latentmem.config import Sampling
from latentmem.environments.environment import Environment
from latentmem.errors import RunError
from latentmem.files import append
from latentmem.kept_latents import SUFFIX, KeptLatents, keep_latents
from latentmem.memory.memory import Memory, Recall
from latentmem.models.agent import AgentModel
from latentmem.parsing import checked, parse_json
from latentmem.rollout import rollout
from latentmem.teams.turn import Player
from latentmem.trajectory import Task, Trajectory

MAX_KEPT_TASKS = 64
"""Tasks whose latents are kept for the map; 4 roles and K = 8 of width 2560 take 21 MB."""


@dataclass(frozen=True)
class Cost:
    """What one batch cost the process that played it; times in seconds, as in `rollout.Seconds`."""

    num_tasks: Annotated[int, Field(gt=0)]
    recall: float
    composing: float
    generation: float
    environment: float
    peak_memory_mb: float
    """Peak memory while the batch was played: of the GPU if there is one, otherwise of this process."""
    memory_prompt_tokens: int = 0
    memory_generated_tokens: int = 0
    memory_malformed: int = 0
    """As in `memory.Spent`; 0 in files written before this was counted."""


def play(
    team: Player,
    memory: Memory,
    model: AgentModel,
    start: Callable[[Task], Environment],
    sampling: Sampling,
    seed: int,
    max_turns: int,
    kept: frozenset[str],
    batch: Sequence[Task],
) -> tuple[list[Trajectory], Cost, KeptLatents | None]:
    """Play some tasks once; return trajectories, cost, and the latents given for the tasks whose keys are `kept`."""
    _reset_peak_memory()
    rollouts = rollout(team, memory, model, batch, start, sampling=sampling, seed=seed, max_turns=max_turns)
    cost = Cost(
        len(batch),
        **asdict(rollouts.seconds),
        peak_memory_mb=_peak_memory_mb(),
        memory_prompt_tokens=rollouts.spent.prompt_tokens,
        memory_generated_tokens=rollouts.spent.generated_tokens,
        memory_malformed=rollouts.spent.num_malformed,
    )
    return rollouts.trajectories, cost, _latents(team, rollouts.recalls, [t for t in batch if t.key in kept])


def kept_tasks(tasks: Sequence[Task]) -> frozenset[str]:
    """Draw the tasks whose latents are kept and return their keys; in a sorted split the first ones may be alike."""
    order = np.random.default_rng(0).permutation(len(tasks))
    return frozenset(tasks[i].key for i in order[:MAX_KEPT_TASKS])


def _latents(team: Player, recalls: Mapping[tuple[str, str], Recall], tasks: Sequence[Task]) -> KeptLatents | None:
    """Return what each known role was given for these tasks; None unless all of it was latents."""
    rows = [[recalls[task.key, role.name].latents for role in team.roles] for task in tasks]
    given = [[latents.float().cpu() for latents in row if latents is not None] for row in rows]
    if not tasks or not team.roles or not all(len(row) == len(team.roles) for row in given):
        return None
    return KeptLatents(
        tasks=tuple(task.key for task in tasks),
        domains=tuple(_domain(task) for task in tasks),
        roles=tuple(role.name for role in team.roles),
        latents=torch.stack([torch.stack(row) for row in given]).numpy(),
    )


def _domain(task: Task) -> str:
    """Return what the task is an instance of, as finely as its data tell: the family, the world, or the domain."""
    return str(task.data.get("family") or task.data.get("world") or task.domain)


def commit(path: Path, batch: Sequence[Trajectory], cost: Cost, latents: KeptLatents | None) -> None:
    """Write trajectories and latents first, then the cost: a batch counts once its cost is on disk."""
    if latents is not None:
        keep_latents(path.with_name(f"{path.stem}{SUFFIX}"), latents)
    for target, lines in (
        (path, [trajectory.to_json() for trajectory in batch]),
        (_costs_path(path), [json.dumps(asdict(cost))]),
    ):
        append(target, "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass"))


def resume(path: Path, tasks: Sequence[Task]) -> tuple[list[Trajectory], list[Cost]]:
    """Read the batches that count, and cut off what was written of a batch that does not."""
    lines = _whole_lines(path)
    cost_lines: list[bytes] = []
    costs: list[Cost] = []
    for line, cost in zip(*read_costs(path), strict=True):
        if sum(c.num_tasks for c in costs) + cost.num_tasks > len(lines):
            break
        costs.append(cost)
        cost_lines.append(line)
    lines = lines[: sum(cost.num_tasks for cost in costs)]
    for target, kept in ((path, lines), (_costs_path(path), cost_lines)):
        if target.exists() and target.stat().st_size > sum(map(len, kept)):
            os.truncate(target, sum(map(len, kept)))
    trajectories = [Trajectory.from_json(line, f"{path}:{i}") for i, line in enumerate(lines, 1)]
    for i, trajectory in enumerate(trajectories):
        if i >= len(tasks) or trajectory.task != tasks[i]:
            raise RunError(
                f"{path}:{i + 1}: task {trajectory.task.key!r} was played here, which is not task {i + 1} of the data "
                "now; restore the data, or name a new run folder with run=FOLDER"
            )
    return trajectories, costs


def read_costs(path: Path) -> tuple[list[bytes], list[Cost]]:
    """Return the costs beside a file of trajectories, as lines and read."""
    lines = _whole_lines(_costs_path(path))
    return lines, [_cost(line, _costs_path(path)) for line in lines]


def _cost(line: bytes, path: Path) -> Cost:
    try:
        return checked(parse_json(line), Cost)
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error}); remove it, and its memory is played again") from None


def _costs_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.costs")  # not .jsonl: those hold trajectories


def _whole_lines(path: Path) -> list[bytes]:
    return [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that an earlier phase freed must not count for this batch
        # This resets the kernel's high-water mark, where it has one.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak_memory_mb() -> float:
    """Return the peak memory since the reset: of the GPU if there is one, otherwise of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
