"""What rollouts teach: the groups whose rewards differ, with their advantages, and the numbers that are told of all.

A message is judged by its role's own reward where the episode tells one, else by the team's. The advantage compares it
with the rewards of the same role in the other rollouts of the task.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from latentmem.processes import Processes
from latentmem.training.losses import group_advantages
from latentmem.trajectory import Message, Trajectory

logger = logging.getLogger(__name__)

SILENT_STEPS = 8
"""After so many steps in a row without signal, a warning says so."""
TEAM = ""
"""Stands for all roles that have no rewards of their own in a group."""


class Group(NamedTuple):
    """Rollouts of one task that differ in a reward."""

    trajectories: list[Trajectory]
    advantages: list[dict[str, float]]
    """For each trajectory, the advantages by role; under `TEAM` that of the roles without rewards of their own. A role
    whose rewards are all equal is missing, and so is one that said nothing in this trajectory."""
    own: frozenset[str]
    """The roles with rewards of their own."""

    def messages(self) -> list[tuple[Message, float]]:
        """Return the messages that teach something, each with its advantage; one without tokens teaches nothing."""
        return [
            (message, advantages[key])
            for trajectory, advantages in zip(self.trajectories, self.advantages, strict=True)
            for message in trajectory.messages
            if message.token_ids and (key := message.role if message.role in self.own else TEAM) in advantages
        ]


def signal_of(groups: Sequence[Sequence[Trajectory]], scale: bool) -> list[Group]:
    """Return the groups that carry signal, without crashed episodes; `scale` divides by the group's deviation."""
    kept = []
    for group in groups:
        fair = [trajectory for trajectory in group if trajectory.error is None]  # a crash is not a low reward
        spoke = [{message.role for message in trajectory.messages} for trajectory in fair]
        own = frozenset(role for trajectory in fair for role in trajectory.rewards)
        advantages: list[dict[str, float]] = [{} for _ in fair]
        for role in (TEAM, *sorted(own)):
            rows = [i for i, roles in enumerate(spoke) if role == TEAM or role in roles]
            rewards = [fair[i].reward if role == TEAM else fair[i].reward_of(role) for i in rows]
            if len(set(rewards)) > 1:
                found = group_advantages(torch.tensor([rewards]), scale)[0].tolist()
                for i, advantage in zip(rows, found, strict=True):
                    advantages[i][role] = advantage
        found_group = Group(fair, advantages, own)
        if found_group.messages():
            kept.append(found_group)
    return kept


class Silence:
    """Tells once if many steps in a row had nothing to learn from: such a training ends well and teaches nothing.

    It tells once, too, if messages came without their tokens.
    """

    def __init__(self, phase: str) -> None:
        self._phase = phase
        self._num_steps = 0
        self._has_told = False

    def note(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step's rollouts."""
        if metrics.get("without_tokens") and not self._has_told:
            self._has_told = True
            logger.warning(
                "%s: %.0f%% of a step's messages have no token ids, as a server of another model tells none; "
                "nothing is learned from them, see `without_tokens` in the metrics",
                self._phase,
                100 * metrics["without_tokens"],
            )
        self._num_steps = 0 if metrics["signal_groups"] else self._num_steps + 1
        if self._num_steps == SILENT_STEPS:
            logger.warning(
                "%s: in %d steps in a row no group had rewards that differ, so nothing was learned; the last step's "
                "mean reward is %.3f, and %d of its episodes ended in an error; see docs/training.md, Signal",
                self._phase,
                SILENT_STEPS,
                metrics["reward"],
                metrics["errors"],
            )


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
            "without_tokens": sum(not message.token_ids for message in messages),
            "response_tokens": sum(len(message.token_ids) for message in messages),
            "no_answer": sum(
                "extracted" in s.info and s.info["extracted"] is None for t in everything for s in t.steps[-1:]
            ),
        }
    )
    spreads = processes.gather(
        [advantage for group in kept for advantages in group.advantages for advantage in advantages.values()]
    )
    num_messages = max(1, sums["messages"])  # a program may fail before anybody speaks
    return {
        "groups": sums["groups"],
        "signal_groups": float(sums["signal_groups"]),
        "reward": sums["reward"] / sums["episodes"],
        "success": sums["success"] / sums["episodes"],
        "reward_std": sums["reward_std"] / sums["groups"],
        "advantage_std": float(torch.tensor(spreads).std()) if spreads else 0.0,
        "no_answer": sums["no_answer"] / sums["episodes"],
        "errors": sums["errors"],
        "truncated": sums["truncated"] / num_messages,
        "without_tokens": sums["without_tokens"] / num_messages,
        "response_tokens": sums["response_tokens"] / num_messages,
    }
