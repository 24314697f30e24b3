"""Memories compared: the same tasks, seeds and prompts for each; what it brought and what it cost.

Tasks are played in fixed batches. A batch counts once its trajectories and its cost are on disk, so an interrupted
evaluation goes on at the next batch and ends with the same numbers.
"""

import json
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentmem.environments.environment import Environment
from latentmem.memory.memory import Memory
from latentmem.models.language_model import AgentModel, Sampling
from latentmem.rollout import rollout
from latentmem.stats import mean_interval, paired_bootstrap, wilson_interval
from latentmem.teams.team import Team
from latentmem.trajectory import Task, Trajectory

RESULTS_VERSION = 1


@dataclass(frozen=True)
class Cost:
    """What one batch cost; seconds of wall clock."""

    num_tasks: int
    recall: float
    composing: float
    generation: float
    environment: float
    peak_memory_mb: float


def evaluate(
    team: Team,
    model: AgentModel,
    memories: Mapping[str, Callable[[], Memory]],
    tasks: Sequence[Task],
    start: Callable[[Task], Environment],
    folder: Path,
    *,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 32,
    max_turns: int = 1,
    online: bool = False,
    num_bootstraps: int = 10_000,
    on_progress: Callable[[str, int, float], None] = lambda name, num_tasks, reward: None,
) -> dict[str, Any]:
    """Play the tasks once under each memory and compare.

    Args:
        team: who plays.
        model: the agents.
        memories: by name, in the order of the table; each is made when its turn comes.
        tasks: the held-out tasks.
        start: makes an environment for a task.
        folder: keeps the trajectories and costs of each memory, and what is needed to go on.
        sampling: of the agents; the same for all memories.
        seed: of all sampling.
        batch_size: tasks played side by side.
        max_turns: of an episode.
        online: let each memory store what it played, batch by batch; its bank must be its own copy.
        num_bootstraps: for intervals and paired differences.
        on_progress: told the memory, tasks done, and the mean reward so far.

    Returns:
        The table as plain JSON values; see docs/evaluation.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    played: dict[str, tuple[list[Trajectory], list[Cost]]] = {}
    for name, make in memories.items():
        path = folder / f"{name.replace(':', '-').replace('/', '_')}.jsonl"
        trajectories, costs = _resume(path)
        if len(trajectories) < len(tasks):
            memory = make()
            if online and trajectories:
                _learn(memory, trajectories)
            for batch, cost in _play(
                team, memory, model, tasks[len(trajectories) :], start, sampling, seed, batch_size, max_turns
            ):
                _commit(path, batch, cost)
                trajectories += batch
                costs.append(cost)
                if online:
                    _learn(memory, batch)
                on_progress(name, len(trajectories), float(np.mean([t.reward for t in trajectories])))
        else:
            on_progress(name, len(trajectories), float(np.mean([t.reward for t in trajectories])))
        played[name] = (trajectories, costs)
    rows = [_row(name, *played[name], played, seed, num_bootstraps) for name in memories]
    return {
        "schema_version": RESULTS_VERSION,
        "seed": seed,
        "num_tasks": len(tasks),
        "domain": ", ".join(sorted({task.domain for task in tasks})),
        "team": team.name,
        "model": model.name,
        "temperature": sampling.temperature,
        "task_ids": [task.key for task in tasks],
        "memories": rows,
    }


def _learn(memory: Memory, trajectories: Sequence[Trajectory]) -> None:
    for trajectory in trajectories:
        memory.add(trajectory)


def _play(
    team: Team,
    memory: Memory,
    model: AgentModel,
    tasks: Sequence[Task],
    start: Callable[[Task], Environment],
    sampling: Sampling,
    seed: int,
    batch_size: int,
    max_turns: int,
) -> Iterator[tuple[list[Trajectory], Cost]]:
    for i in range(0, len(tasks), batch_size):
        batch = tasks[i : i + batch_size]
        _reset_peak_memory()
        rollouts = rollout(team, memory, model, batch, start, sampling=sampling, seed=seed, max_turns=max_turns)
        yield (
            rollouts.trajectories,
            Cost(len(batch), **asdict(rollouts.seconds), peak_memory_mb=_peak_memory_mb()),
        )


def _commit(path: Path, batch: Sequence[Trajectory], cost: Cost) -> None:
    """Trajectories first, then the cost: a batch counts once its cost is on disk."""
    for target, lines in (
        (path, [trajectory.to_json() for trajectory in batch]),
        (_costs_path(path), [json.dumps(asdict(cost))]),
    ):
        with target.open("ab") as file:
            file.write("".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())


def _resume(path: Path) -> tuple[list[Trajectory], list[Cost]]:
    """The batches that count; what was written of a batch that does not is cut off."""
    costs_path = _costs_path(path)
    if not costs_path.exists():
        path.unlink(missing_ok=True)
        return [], []
    cost_lines = _whole_lines(costs_path)
    costs = [Cost(**json.loads(line)) for line in cost_lines]
    lines = _whole_lines(path)[: sum(cost.num_tasks for cost in costs)]
    for target, kept in ((path, lines), (costs_path, cost_lines)):
        os.truncate(target, sum(map(len, kept)))
    return [Trajectory.from_json(line, f"{path}:{i}") for i, line in enumerate(lines, 1)], costs


def _costs_path(path: Path) -> Path:
    return path.with_suffix(".costs.jsonl")


def _whole_lines(path: Path) -> list[bytes]:
    return [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]]


def _row(
    name: str,
    trajectories: Sequence[Trajectory],
    costs: Sequence[Cost],
    played: Mapping[str, tuple[list[Trajectory], list[Cost]]],
    seed: int,
    num_bootstraps: int,
) -> dict[str, Any]:
    successes = [int(t.success) for t in trajectories]
    rewards = [t.reward for t in trajectories]
    low, high = wilson_interval(sum(successes), len(successes))
    reward_low, reward_high = mean_interval(rewards, seed, num_bootstraps)
    num = len(trajectories)
    messages = [message for t in trajectories for message in t.messages]
    last = [t.steps[-1].info for t in trajectories]
    flags = sorted({key for info in last for key, value in info.items() if isinstance(value, bool)})
    seconds = {
        part: sum(getattr(cost, part) for cost in costs) / num
        for part in ("recall", "composing", "generation", "environment")
    }
    row: dict[str, Any] = {
        "name": name,
        "accuracy": sum(successes) / num,
        "accuracy_low": low,
        "accuracy_high": high,
        "reward": sum(rewards) / num,
        "reward_low": reward_low,
        "reward_high": reward_high,
        "extra": {flag: sum(info.get(flag) is True for info in last) / num for flag in flags},
        "no_answer": sum("extracted" in info and info["extracted"] is None for info in last) / num,
        "num_errors": sum(t.error is not None for t in trajectories),
        "prompt_tokens": sum(m.num_prompt_tokens for m in messages) / num,
        "latent_tokens": sum(m.recalled.num_latents for m in messages) / num,
        "generated_tokens": sum(len(m.token_ids) for m in messages) / num,
        "seconds": seconds | {"total": sum(seconds.values())},
        "peak_memory_mb": max(cost.peak_memory_mb for cost in costs),
        "successes": successes,
        "rewards": rewards,
    }
    for other in ("none", "text"):
        row[f"vs_{other}"] = None
        if other in played and other != name:
            theirs = [int(t.success) for t in played[other][0]]
            row[f"vs_{other}"] = asdict(paired_bootstrap(successes, theirs, num_bootstraps, seed))
    return row


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel's high-water mark, where it has one
    except OSError:
        return


def _peak_memory_mb() -> float:
    """Highest memory since the reset: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
