"""Memories compared: the same tasks, seeds and prompts for each; what it brought and what it cost.

Tasks are played in fixed batches. A batch counts once its trajectories and its cost are on disk, so an interrupted
evaluation goes on at the next batch and ends with the same numbers. Several processes are dealt whole batches: each
batch is the same computation whoever plays it, and so are the numbers, however many processes there are.
"""

import ctypes
import hashlib
import json
import logging
import math
import os
import resource
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue

from latentmem.bank import ExperienceBank
from latentmem.carrying import measure_carried
from latentmem.environments.environment import Environment
from latentmem.errors import ConfigError, RunError
from latentmem.files import append, read_json, write_atomic
from latentmem.kept_latents import SUFFIX, KeptLatents, keep_latents
from latentmem.memory.memory import Memory, Recall
from latentmem.memory_names import MemoryName
from latentmem.models.language_model import AgentModel, LanguageModel, Sampling
from latentmem.processes import Processes
from latentmem.rollout import rollout
from latentmem.stats import mean_interval, paired_bootstrap, wilson_interval
from latentmem.teams.turn import Team
from latentmem.trajectory import Task, Trajectory

logger = logging.getLogger(__name__)

RESULTS_VERSION = 1

MAX_KEPT_TASKS = 64
"""Tasks whose latents are kept for the map: with 4 roles and K = 8 of width 2560 these are 21 MB."""


@dataclass(frozen=True)
class Cost:
    """What one batch cost the process that played it; times in seconds of wall clock, as in `rollout.Seconds`."""

    num_tasks: int
    recall: float
    composing: float
    generation: float
    environment: float
    peak_memory_mb: float
    """Highest memory while it was played: of the GPU where there is one, else of this process."""
    memory_prompt_tokens: int = 0
    memory_generated_tokens: int = 0
    memory_malformed: int = 0
    """As in `memory.Spent`; 0 in what was written before it was counted."""


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
    processes: Processes | None = None,
    bank: ExperienceBank | None = None,
    held_out: Sequence[Trajectory] | None = None,
    starts: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Play the tasks once under each memory and compare; then measure what each of them carries.

    Where several processes were launched, all of them call this alike: they share the batches, the first writes, and
    each returns the table.

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
        processes: those that share the batches; None is those that were launched.
        bank: what the memories recall from, if they do. It tells which task a recalled trajectory is of, and must not
            change meanwhile, unless `online`.
        held_out: successes on tasks that nothing was learned from, whose responses are scored for `carried`; None is,
            of each task, the episode of the first memory that solved it.
        starts: of memories that were trained from another one, that one's name; they are compared with it.

    Returns:
        The table as plain JSON values; see docs/evaluation.md.

    Raises:
        BankError: the bank changed.
        RunError: the folder holds trajectories of other tasks, or cannot be written, as on a full disk; what was played
            before is kept.
        ConfigError: `online` with several processes.
    """
    processes = processes or Processes()
    check_online(online, processes)
    if processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
    kept_tasks = _kept_tasks(tasks)
    played: dict[str, tuple[list[Trajectory], list[Cost]]] = {}
    names = {name: MemoryName.parse(name) for name in memories}
    with nullcontext() if bank is None or online else bank.frozen("an evaluation"):
        for name, make in memories.items():
            path = folder / f"{names[name].file_stem}.jsonl"
            trajectories, costs = processes.from_first(partial(_resume, path, tasks))
            if trajectories:
                on_progress(name, len(trajectories), _mean_reward(trajectories))
            if len(trajectories) < len(tasks):
                memory = make()
                if online:
                    _learn(memory, trajectories)
                # A control's latents say nothing about its composer.
                kept = kept_tasks if names[name].control is None else frozenset[str]()
                play = partial(_play, team, memory, model, start, sampling, seed, max_turns, kept)
                per_round = batch_size * processes.size
                for i in range(len(trajectories), len(tasks), per_round):
                    batches = [tasks[j : j + batch_size] for j in range(i, min(i + per_round, len(tasks)), batch_size)]
                    for batch, cost, latents in processes.map(play, batches):
                        if processes.is_first:
                            _commit(path, batch, cost, latents)
                        trajectories += batch
                        costs.append(cost)
                        if online:
                            _learn(memory, batch)
                    on_progress(name, len(trajectories), _mean_reward(trajectories))
            played[name] = (trajectories, costs)
        scored = _first_successes(tasks, played) if held_out is None else held_out
        carried: dict[str, dict[str, Any] | None] = dict.fromkeys(memories)
        # Scripted agents score nothing; a memory that has learned from these very tasks has nothing left to be asked.
        if isinstance(model, LanguageModel) and not online:
            carry = partial(_carried, team, model, scored, seed, folder, processes)
            carried |= {name: carry(names[name], make) for name, make in memories.items() if names[name].may_carry}
    answers = _tasks_of_sources(bank, played)
    rows = [
        _row(names[name], *played[name], played, seed, num_bootstraps, starts.get(name))
        | {"carried": carried[name]}
        | _retrieval(played[name][0], answers)
        for name in memories
    ]
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


def check_online(online: bool, processes: Processes) -> None:
    """Refuse to share an evaluation in which each batch learns from the one before it.

    Raises:
        ConfigError: `online` with several processes.
    """
    if online and processes.size > 1:
        raise ConfigError(
            f"evaluate.online is true: each batch learns from the one before it, in one process, but {processes.size} "
            "were launched; start it without torchrun, or set it to false"
        )


def forget(folder: Path, name: MemoryName) -> None:
    """Remove what was recorded of a memory, so that it is played again from the first task."""
    for path in folder.glob(f"{name.file_stem}.*"):
        path.unlink()


def _first_successes(
    tasks: Sequence[Task], played: Mapping[str, tuple[list[Trajectory], list[Cost]]]
) -> list[Trajectory]:
    """For each task that some memory solved the episode of the first one: the same responses for all memories."""
    solved = ([t for episodes, _ in played.values() if (t := episodes[i]).success] for i in range(len(tasks)))
    return [episodes[0] for episodes in solved if episodes]


def _carried(
    team: Team,
    model: LanguageModel,
    trajectories: Sequence[Trajectory],
    seed: int,
    folder: Path,
    processes: Processes,
    name: MemoryName,
    make: Callable[[], Memory],
) -> dict[str, Any] | None:
    """What a memory carries; measured once for these trajectories, and kept beside its own."""
    path = folder / f"{name.file_stem}.carried.json"
    of = hashlib.sha256(json.dumps([seed, model.name, [t.id for t in trajectories]]).encode()).hexdigest()
    kept = processes.from_first(lambda: read_json(path) if path.exists() else {})
    if kept.get("of") == of:
        known: dict[str, Any] | None = kept["carried"]
        return known
    roles = {role.name: role for role in team.roles}
    measured = measure_carried(make(), model, trajectories, lambda t: roles, seed=seed, processes=processes)
    found = None if measured is None else measured.as_json()
    if measured is not None and not math.isfinite(measured.total.difference):
        logger.warning("evaluate: %s gives values that are not finite; what it carries cannot be told", name)
        found = None
    if processes.is_first:
        write_atomic(path, json.dumps({"of": of, "carried": found}, indent=1, allow_nan=False) + "\n")
    return found


def _mean_reward(trajectories: Sequence[Trajectory]) -> float:
    return float(np.mean([trajectory.reward for trajectory in trajectories]))


def _learn(memory: Memory, trajectories: Sequence[Trajectory]) -> None:
    for trajectory in trajectories:
        memory.add(trajectory)


def _play(
    team: Team,
    memory: Memory,
    model: AgentModel,
    start: Callable[[Task], Environment],
    sampling: Sampling,
    seed: int,
    max_turns: int,
    kept_tasks: frozenset[str],
    batch: Sequence[Task],
) -> tuple[list[Trajectory], Cost, KeptLatents | None]:
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
    return rollouts.trajectories, cost, _latents(team, rollouts.recalls, [t for t in batch if t.key in kept_tasks])


def _kept_tasks(tasks: Sequence[Task]) -> frozenset[str]:
    """Keys of the tasks whose latents are kept: drawn, for a split may be sorted by what its tasks are about."""
    order = np.random.default_rng(0).permutation(len(tasks))
    return frozenset(tasks[i].key for i in order[:MAX_KEPT_TASKS])


def _latents(team: Team, recalls: Mapping[tuple[str, str], Recall], tasks: Sequence[Task]) -> KeptLatents | None:
    """What each role was given at these tasks; None where that was no latents."""
    rows = [[recalls[task.key, role.name].latents for role in team.roles] for task in tasks]
    given = [[latents.float().cpu() for latents in row if latents is not None] for row in rows]
    if not tasks or not all(len(row) == len(team.roles) for row in given):
        return None
    return KeptLatents(
        tasks=tuple(task.key for task in tasks),
        domains=tuple(_domain(task) for task in tasks),
        roles=tuple(role.name for role in team.roles),
        latents=torch.stack([torch.stack(row) for row in given]).numpy(),
    )


def _domain(task: Task) -> str:
    """What a task is one of, as finely as its data tell: the family, the world, or the domain."""
    return str(task.data.get("family") or task.data.get("world") or task.domain)


def _commit(path: Path, batch: Sequence[Trajectory], cost: Cost, latents: KeptLatents | None) -> None:
    """Trajectories and latents first, then the cost: a batch counts once its cost is on disk."""
    if latents is not None:
        keep_latents(path.with_name(f"{path.stem}{SUFFIX}"), latents)
    for target, lines in (
        (path, [trajectory.to_json() for trajectory in batch]),
        (_costs_path(path), [json.dumps(asdict(cost))]),
    ):
        append(target, "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass"))


def _resume(path: Path, tasks: Sequence[Task]) -> tuple[list[Trajectory], list[Cost]]:
    """The batches that count; what was written of a batch that does not is cut off."""
    lines = _whole_lines(path)
    cost_lines: list[bytes] = []
    costs: list[Cost] = []
    for line in _whole_lines(_costs_path(path)):
        cost = Cost(**json.loads(line))
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


def _costs_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.costs")  # not .jsonl: those hold trajectories


def _whole_lines(path: Path) -> list[bytes]:
    return [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def _row(
    name: MemoryName,
    trajectories: Sequence[Trajectory],
    costs: Sequence[Cost],
    played: Mapping[str, tuple[list[Trajectory], list[Cost]]],
    seed: int,
    num_bootstraps: int,
    start: str | None,
) -> dict[str, Any]:
    successes = [int(t.success) for t in trajectories]
    rewards = [t.reward for t in trajectories]
    low, high = wilson_interval(sum(successes), len(successes))
    reward_low, reward_high = mean_interval(rewards, seed, num_bootstraps)
    num = len(trajectories)
    messages = [message for t in trajectories for message in t.messages]
    last = [t.steps[-1].info if t.steps else {} for t in trajectories]
    flags = sorted({key for info in last for key, value in info.items() if isinstance(value, bool)})
    seconds = {
        part: sum(getattr(cost, part) for cost in costs) / num
        for part in ("recall", "composing", "generation", "environment")
    }
    row: dict[str, Any] = {
        "name": str(name),
        "trajectories": f"{name.file_stem}.jsonl",
        "accuracy": sum(successes) / num,
        "accuracy_low": low,
        "accuracy_high": high,
        "reward": sum(rewards) / num,
        "reward_low": reward_low,
        "reward_high": reward_high,
        "extra": {flag: sum(info.get(flag) is True for info in last) / num for flag in flags}
        | _team_measures(trajectories),
        "no_answer": sum("extracted" in info and info["extracted"] is None for info in last) / num,
        "num_errors": sum(t.error is not None for t in trajectories),
        "prompt_tokens": sum(m.num_prompt_tokens for m in messages) / num,
        "latent_tokens": sum(m.recalled.num_latents for m in messages) / num,
        "generated_tokens": sum(len(m.token_ids) for m in messages) / num,
        "memory_prompt_tokens": sum(cost.memory_prompt_tokens for cost in costs) / num,
        "memory_generated_tokens": sum(cost.memory_generated_tokens for cost in costs) / num,
        "memory_malformed": sum(cost.memory_malformed for cost in costs),
        "seconds": seconds | {"total": sum(seconds.values())},
        "peak_memory_mb": max(cost.peak_memory_mb for cost in costs),
        "successes": successes,
        "rewards": rewards,
    }

    def against(other: str | None) -> dict[str, Any] | None:
        if other is None or other == str(name) or other not in played:
            return None
        theirs = [int(t.success) for t in played[other][0]]
        return asdict(paired_bootstrap(successes, theirs, num_bootstraps, seed))

    row |= {"vs_none": against("none"), "vs_text": against("text"), "start": start, "vs_start": against(start)}
    if name.control is not None and str(name.real) in played:
        row["vs_real"] = against(str(name.real))
    return row


def _tasks_of_sources(
    bank: ExperienceBank | None, played: Mapping[str, tuple[list[Trajectory], list[Cost]]]
) -> dict[str, str]:
    """Keys of the tasks of all trajectories that were recalled, by their id; none where no task asks for them."""
    episodes = [trajectory for trajectories, _ in played.values() for trajectory in trajectories]
    if bank is None or not any(_answered_by(trajectory.task) for trajectory in episodes):
        return {}
    ids = dict.fromkeys(source for t in episodes for m in t.messages for source in m.recalled.sources)
    return {t.id: t.task.key for t in bank.get(id_ for id_ in ids if id_ in bank)}


def _answered_by(task: Task) -> set[str]:
    """Keys of the tasks whose episodes hold this one's answer, where its data tell."""
    ids = task.data.get("answered_by")
    return {f"{task.domain}:{id_}" for id_ in ids} if isinstance(ids, list) else set()


def _retrieval(trajectories: Sequence[Trajectory], tasks_of: Mapping[str, str]) -> dict[str, Any]:
    """What was found of what holds the answers, and the accuracy where it was; accuracy by group of tasks."""
    asked = [t for t in trajectories if _answered_by(t.task)]
    recalled = {t.id: {source for m in t.messages for source in m.recalled.sources} for t in trajectories}
    known = bool(asked) and any(recalled.values())
    hits = [t for t in asked if known and _answered_by(t.task) <= {tasks_of.get(source) for source in recalled[t.id]}]
    groups = sorted({str(t.task.data["group"]) for t in trajectories if "group" in t.task.data})

    def of_group(group: str, episodes: Sequence[Trajectory]) -> dict[str, Any]:
        return _accuracy([t for t in episodes if str(t.task.data.get("group")) == group])

    return {
        "retrieval_hits": len(hits) / len(asked) if known else None,
        "accuracy_hit": _accuracy(hits) if known else None,
        "groups": {
            group: {**of_group(group, trajectories), "hit": of_group(group, hits) if known else None}
            for group in groups
        }
        or None,
    }


def _accuracy(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Share of successes with its interval; null where there are no tasks."""
    successes, total = sum(t.success for t in trajectories), len(trajectories)
    low, high = wilson_interval(successes, total)
    return {"accuracy": successes / total if total else None, "low": low, "high": high, "num_tasks": total}


def _team_measures(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means, over all turns, of the numbers that the team recorded, by names such as `team.importance.doer`."""
    found: dict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        for step in trajectory.steps:
            for name, value in _numbers("team", step.info.get("team")):
                found[name].append(value)
    return {name: float(np.mean(values)) for name, values in sorted(found.items())}


def _numbers(name: str, value: JsonValue) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(f"{name}.{key}", part)
    elif isinstance(value, int | float):
        yield name, float(value)


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier phase used and freed is none of this batch's
        # The kernel's high-water mark, where it has one.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
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
