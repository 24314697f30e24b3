"""One memory's row of the comparison: its results, its cost, and its differences from others on the same tasks."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from pydantic import JsonValue

from latentmem.bank import ExperienceBank
from latentmem.evaluation.batches import Cost
from latentmem.memory_names import MemoryName
from latentmem.stats import mean_interval, paired_bootstrap, wilson_interval
from latentmem.trajectory import Task, Trajectory

Played = Mapping[str, tuple[list[Trajectory], list[Cost]]]
"""By memory name: its trajectories, in the order of the tasks, and the cost of each batch."""


def row_of(
    name: MemoryName,
    trajectories: Sequence[Trajectory],
    costs: Sequence[Cost],
    played: Played,
    seed: int,
    num_bootstraps: int,
    start: str | None,
) -> dict[str, Any]:
    """Return accuracy, reward, costs and paired differences of one memory.

    Args:
        name: the memory's name.
        trajectories: the episodes it played, in the order of the tasks.
        costs: the costs of its batches.
        played: the same for all memories, to compare with.
        seed: seed of the resampling.
        num_bootstraps: number of resamples.
        start: name of the memory that it was trained from, if any.
    """
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


def tasks_of_sources(bank: ExperienceBank | None, played: Played) -> dict[str, str]:
    """Map the id of each recalled trajectory to its task's key; empty if no task tells which episodes answer it."""
    episodes = [trajectory for trajectories, _ in played.values() for trajectory in trajectories]
    if bank is None or not any(_answered_by(trajectory.task) for trajectory in episodes):
        return {}
    ids = dict.fromkeys(source for t in episodes for m in t.messages for source in m.recalled.sources)
    return {t.id: t.task.key for t in bank.get(id_ for id_ in ids if id_ in bank)}


def _answered_by(task: Task) -> set[str]:
    """Return the keys of the tasks whose episodes hold this task's answer, if its data name them."""
    ids = task.data.get("answered_by")
    return {f"{task.domain}:{id_}" for id_ in ids} if isinstance(ids, list) else set()


def retrieval(trajectories: Sequence[Trajectory], tasks_of: Mapping[str, str]) -> dict[str, Any]:
    """Return how often all episodes that hold the answer were recalled, the accuracy then, and accuracy by group."""
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
    """Return the share of successes with its interval; null where there are no tasks."""
    successes, total = sum(t.success for t in trajectories), len(trajectories)
    low, high = wilson_interval(successes, total)
    return {"accuracy": successes / total if total else None, "low": low, "high": high, "num_tasks": total}


def _team_measures(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return means over all turns of the numbers that the team recorded, by names such as `team.importance.doer`."""
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
