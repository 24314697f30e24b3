"""What rollouts teach: the groups whose rewards differ, with their advantages, and the numbers that are told of all."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from latentmem.processes import Processes
from latentmem.training.losses import group_advantages
from latentmem.trajectory import Trajectory


class Group(NamedTuple):
    """Rollouts of one task that differ in their reward."""

    trajectories: list[Trajectory]
    advantages: list[float]
    """The advantage of each trajectory."""


def signal_of(groups: Sequence[Sequence[Trajectory]], scale: bool) -> list[Group]:
    """Return the groups that carry signal, without crashed episodes; `scale` divides by the group's deviation."""
    kept = []
    for group in groups:
        fair = [trajectory for trajectory in group if trajectory.error is None]  # a crash is not a low reward
        if len({trajectory.reward for trajectory in fair}) > 1:
            rewards = torch.tensor([[trajectory.reward for trajectory in fair]])
            kept.append(Group(fair, group_advantages(rewards, scale)[0].tolist()))
    return kept


def measure(played: Sequence[Sequence[Trajectory]], kept: Sequence[Group], processes: Processes) -> dict[str, float]:
    """Return the metrics of a step's rollouts over all processes.

    Args:
        played: all groups that this process has played.
        kept: those that carry signal.
        processes: all of them call this.
    """
    everything = [trajectory for group in played for trajectory in group]
    messages = [message for trajectory in everything for message in trajectory.messages]
    spread = [float(torch.tensor([t.reward for t in group]).std()) for group in played]
    sums = processes.sum(
        {
            "groups": len(played),
            "signal_groups": len(kept),
            "episodes": len(everything),
            "reward": sum(t.reward for t in everything),
            "success": sum(t.success for t in everything),
            "reward_std": sum(spread),
            "errors": sum(t.error is not None for t in everything),
            "messages": len(messages),
            "truncated": sum(message.finish == "length" for message in messages),
            "response_tokens": sum(len(message.token_ids) for message in messages),
            "no_answer": sum(
                "extracted" in s.info and s.info["extracted"] is None for t in everything for s in t.steps[-1:]
            ),
        }
    )
    spreads = processes.gather([advantage for _, advantages in kept for advantage in advantages])
    return {
        "groups": sums["groups"],
        "signal_groups": float(sums["signal_groups"]),
        "reward": sums["reward"] / sums["episodes"],
        "success": sums["success"] / sums["episodes"],
        "reward_std": sums["reward_std"] / sums["groups"],
        "advantage_std": float(torch.tensor(spreads).std()) if spreads else 0.0,
        "no_answer": sums["no_answer"] / sums["episodes"],
        "errors": sums["errors"],
        "truncated": sums["truncated"] / sums["messages"],
        "response_tokens": sums["response_tokens"] / sums["messages"],
    }
