"""LMPO (arXiv 2602.03036, section 4): reinforcement learning of the composer on the team's reward.

A step rolls a few tasks out G times each under today's latents, compares the rewards inside each group, and moves the
composer towards latents under which the better rollouts' tokens are likelier. It trains on the sampled token ids, all
messages of all turns, and composes from the very text the rollout composed from. With a LoRA of the agents in place of
the composer the same steps are GRPO (arXiv 2402.03300), the parametric rival: what is trained is a `policies.Policy`.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentmem.environments.environment import Environment
from latentmem.errors import ConfigError, TrainingError
from latentmem.models.language_model import Sampling, stream_seed
from latentmem.processes import Processes
from latentmem.rollout import Rollouts, rollout
from latentmem.teams.turn import Team, Teams
from latentmem.training.losses import LossType, group_advantages, importance_weights, lmpo_loss
from latentmem.training.optimization import Optimization, Progress, Stream, train
from latentmem.training.policies import Policy
from latentmem.training.scoring import Example
from latentmem.trajectory import Task, Trajectory

logger = logging.getLogger(__name__)

Logps = tuple[float, ...]
"""Log-probabilities of the tokens of one message."""


@dataclass(frozen=True)
class LMPOSettings:
    """How to train; the fields are those of `lmpo` and `grpo` in the configuration."""

    num_steps: int
    tasks_per_step: int
    group_size: int
    num_iterations: int
    loss_type: LossType
    scale_advantages: bool
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    beta: float
    importance_cap: float | None
    max_resamples: int
    save_every: int
    eval_every: int | None
    micro_batch_positions: int


class Group(NamedTuple):
    """Rollouts of one task that differ in their reward."""

    trajectories: list[Trajectory]
    advantages: list[float]
    """Of each trajectory."""


class Rolled(NamedTuple):
    """What a step rolled out, in this process."""

    groups: list[Group]
    """Those that carry signal."""
    composed: dict[str, Tensor]
    """The latents [K, d_agent] that were given to agents, by the text that they were composed from."""
    metrics: dict[str, float]
    """Over all groups of all processes."""


@dataclass(frozen=True)
class _Scored:
    """One message with what the loss needs besides its log-probabilities now."""

    example: Example
    old_logps: Logps
    advantage: float


class LMPOTrainer:
    """Trains a composer, or the agents themselves, on rollouts of a team."""

    def __init__(
        self,
        policy: Policy,
        team: Team | Teams,
        start: Callable[[Task], Environment],
        tasks: Sequence[Task],
        eval_tasks: Sequence[Task],
        optimization: Optimization,
        processes: Processes,
        settings: LMPOSettings,
        sampling: Sampling,
        max_turns: int = 1,
        seed: int = 0,
        carried: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """Take what is needed for training.

        Args:
            policy: what is trained, and plays; the bank of a latent memory stays as it is.
            team: who plays; of several teams the one that a task is dealt to.
            start: makes an environment for a task.
            tasks: played for training.
            eval_tasks: played greedily every `eval_every` steps; none of `tasks`.
            optimization: of what is trained.
            processes: those that train together, each on its share of the tasks.
            settings: sizes and the loss.
            sampling: of the rollouts; its temperature is part of the log-probabilities.
            max_turns: of an episode.
            seed: of the order of tasks and of all sampling.
            carried: measures what the composer's latents carry; its numbers are logged with each evaluation.

        Raises:
            ConfigError: a group of one rollout, or greedy sampling: neither leaves anything to compare.
            TrainingError: no tasks.
        """
        if settings.group_size < 2:
            raise ConfigError(
                f"group_size is {settings.group_size}; advantages need at least 2 rollouts per task, "
                "set it to 4 or more"
            )
        if not tasks or (settings.eval_every and not eval_tasks):
            raise TrainingError(
                f"{len(tasks)} tasks to train on and {len(eval_tasks)} set aside to evaluate on; "
                "give at least one of each"
            )
        if sampling.temperature == 0:
            raise ConfigError(
                "sampling.temperature is 0; greedy rollouts of one task are all equal, set it to 0.6 or more"
            )
        self.policy = policy
        self.team = team
        self.start = start
        self.eval_tasks = list(eval_tasks)
        self.optimization = optimization
        self.processes = processes
        self.settings = settings
        self.sampling = sampling
        self.max_turns = max_turns
        self.seed = seed
        self.stream = Stream(tasks, seed)
        self.carried = carried or dict[str, float]
        self.initial = {name: p.detach().clone() for name, p in policy.trained.trainable().items()}
        """What is trained as it was before, for the KL term."""

    def train(self, folder: Path, log: Callable[[dict[str, Any]], None], rewind: Callable[[int], None]) -> Progress:
        """Train to the end, resuming from `folder`; see `optimization.train`."""
        return train(
            self.policy.trained,
            self.optimization,
            folder,
            self.processes,
            num_steps=self.settings.num_steps,
            save_every=self.settings.save_every,
            eval_every=self.settings.eval_every,
            take_step=self.step,
            evaluate=self._evaluate,
            log=log,
            rewind=rewind,
        )

    def step(self, progress: Progress) -> dict[str, float]:
        """Roll out, compare, update; the step's metrics."""
        with self.policy.model.keeping_beginnings():
            began = time.perf_counter()
            rolled = self._rollouts(progress)
            middle = time.perf_counter()
            metrics = rolled.metrics | self._update(rolled.groups, rolled.composed, progress.step)
            seconds = {"rollout_seconds": middle - began, "update_seconds": time.perf_counter() - middle}
        return metrics | seconds

    def evaluate(self) -> float:
        """Mean reward of greedy responses on the tasks set aside."""
        greedy = Sampling(temperature=0.0, max_response_tokens=self.sampling.max_response_tokens)
        played = self._play(self.processes.shard(self.eval_tasks), greedy, 1, "eval")
        rewards = self.processes.gather([trajectory.reward for trajectory in played.trajectories])
        return sum(rewards) / len(rewards)

    def _evaluate(self, step: int) -> tuple[float, dict[str, float]]:
        reward = self.evaluate()
        return reward, {"eval_reward": reward, **self.carried()}

    def _play(self, tasks: Sequence[Task], sampling: Sampling, group_size: int, stream: str) -> Rollouts:
        return rollout(
            self.team,
            self.policy.memory,
            self.policy.model,
            tasks,
            self.start,
            sampling=sampling,
            group_size=group_size,
            seed=stream_seed(self.seed, stream),
            max_turns=self.max_turns,
        )

    def _rollouts(self, progress: Progress) -> Rolled:
        """Roll tasks out, and again while too few groups carry signal, as far as `max_resamples` allows."""
        settings = self.settings
        kept: list[Group] = []
        played: list[list[Trajectory]] = []
        composed: dict[str, Tensor] = {}
        num_kept = 0
        for draw in range(1 + settings.max_resamples):
            tasks, progress.position = self.stream.take(progress.position, settings.tasks_per_step)
            rollouts = self._play(
                self.processes.shard(tasks), self.sampling, settings.group_size, f"step {progress.step} draw {draw}"
            )
            played += rollouts.groups
            composed |= rollouts.composed
            for group in rollouts.groups:
                fair = [trajectory for trajectory in group if trajectory.error is None]  # a crash is no low reward
                if len({trajectory.reward for trajectory in fair}) > 1:
                    rewards = torch.tensor([[trajectory.reward for trajectory in fair]])
                    kept.append(Group(fair, group_advantages(rewards, settings.scale_advantages)[0].tolist()))
            num_kept = int(self.processes.sum({"kept": len(kept)})["kept"])
            if num_kept >= settings.tasks_per_step:
                break
        everything = [trajectory for group in played for trajectory in group]
        messages = [message for trajectory in everything for message in trajectory.messages]
        spread = [float(torch.tensor([t.reward for t in group]).std()) for group in played]
        sums = self.processes.sum(
            {
                "groups": len(played),
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
        spreads = self.processes.gather([advantage for _, advantages in kept for advantage in advantages])
        metrics = {
            "groups": sums["groups"],
            "signal_groups": float(num_kept),
            "reward": sums["reward"] / sums["episodes"],
            "success": sums["success"] / sums["episodes"],
            "reward_std": sums["reward_std"] / sums["groups"],
            "advantage_std": float(torch.tensor(spreads).std()) if spreads else 0.0,
            "no_answer": sums["no_answer"] / sums["episodes"],
            "errors": sums["errors"],
            "truncated": sums["truncated"] / sums["messages"],
            "response_tokens": sums["response_tokens"] / sums["messages"],
        }
        return Rolled(kept, composed, metrics)

    def _update(self, groups: list[Group], composed: dict[str, Tensor], step: int) -> dict[str, float]:
        """Move what is trained towards the better rollouts of each group; the update's metrics."""
        settings, policy = self.settings, self.policy
        scored = [
            _Scored(policy.example(message, self.sampling.temperature), message.logps, advantage)
            for group, advantages in groups
            for trajectory, advantage in zip(group, advantages, strict=True)
            for message in trajectory.messages
        ]
        examples = [item.example for item in scored]
        sampled = [item.old_logps for item in scored]
        sums = self.processes.sum({"messages": len(scored), "tokens": sum(len(item.old_logps) for item in scored)})
        if not sums["messages"]:
            return {"updated": 0.0, "bad": 0.0}
        ref_logps = self._reference_logps(examples) if settings.beta else None
        old_logps, weights, importance = sampled, None, dict[str, float]()
        if settings.importance_cap is not None:
            # Where sampling and scoring round differently, the ratio begins at what is scored; a weight tells the rest.
            old_logps = self._logps(examples, composed)
            weights, importance = self._importance(old_logps, sampled, settings.importance_cap)
        num_micro_batches = 1
        parts: list[dict[str, Tensor]] = []  # of each micro-batch; read once a pass, so that no GPU waits in between

        def loss_of(rows: list[int], logps: Tensor, mask: Tensor) -> Tensor:
            loss, part = lmpo_loss(
                logps,
                _padded([old_logps[row] for row in rows], logps),
                torch.tensor([scored[row].advantage for row in rows], dtype=logps.dtype).to(logps.device),
                mask,
                loss_type=settings.loss_type,
                epsilon_low=settings.epsilon_low,
                epsilon_high=settings.epsilon_high,
                delta=settings.delta,
                beta=settings.beta,
                ref_logps=None if ref_logps is None else _padded([ref_logps[row] for row in rows], logps),
                weights=None if weights is None else _padded([weights[row] for row in rows], logps),
                max_response_tokens=self.sampling.max_response_tokens,
                num_messages=int(sums["messages"]),
                num_tokens=int(sums["tokens"]),
            )
            parts.append(part)
            return loss / num_micro_batches

        metrics: dict[str, float] = {}
        for iteration in range(settings.num_iterations):
            if settings.loss_type == "bnpo":  # its N is the micro-batch's; the step takes the mean over micro-batches
                mine = len(policy.micro_batches(examples, settings.micro_batch_positions))
                num_micro_batches = int(self.processes.sum({"n": mine})["n"])
            made = composed if iteration == 0 else None  # afterwards the composer is another
            loss = policy.accumulate(examples, loss_of, settings.micro_batch_positions, made)
            loss = self.processes.sum({"loss": loss})["loss"]
            good, norm = self.optimization.step(step, loss)
            if iteration == 0:
                metrics = {"loss": loss, "grad_norm": norm, "first_ratio_max": self._ratio_max(parts)}
                metrics["learning_rate"] = self.optimization.rate(step)
            if not good:
                metrics |= {"loss": loss, "grad_norm": norm}
                break
        total = self.processes.sum({key: sum(_read(parts, key)) for key in ("tokens", "clipped", "kl")})
        metrics |= {"clip_fraction": total["clipped"] / total["tokens"], "ratio_max": self._ratio_max(parts)}
        if settings.beta:
            metrics["kl"] = total["kl"] / total["tokens"]
        return metrics | importance | {"updated": float(good or iteration > 0), "bad": float(not good)}

    def _ratio_max(self, parts: Sequence[dict[str, Tensor]]) -> float:
        return max(self.processes.gather(_read(parts, "ratio_max")))

    def _importance(
        self, scored: Sequence[Logps], sampled: Sequence[Logps], cap: float
    ) -> tuple[list[list[float]], dict[str, float]]:
        """A weight for each token; and over all processes the largest before truncation and the mean after it."""
        pairs = [(torch.tensor(ours), torch.tensor(theirs)) for ours, theirs in zip(scored, sampled, strict=True)]
        weights = [importance_weights(*pair, cap) for pair in pairs]
        largest = [float(importance_weights(*pair, math.inf).max()) for pair in pairs]
        sums = self.processes.sum(
            {"weight": sum(float(row.sum()) for row in weights), "tokens": sum(len(row) for row in weights)}
        )
        metrics = {
            "importance_max": max(self.processes.gather(largest)),
            "importance_mean": sums["weight"] / sums["tokens"],
        }
        return [row.tolist() for row in weights], metrics

    def _logps(self, examples: Sequence[Example], composed: dict[str, Tensor] | None = None) -> list[Logps]:
        """Log-probabilities under what is trained as it is now, by example."""
        result: list[Logps] = [() for _ in examples]
        for rows, logps, _ in self.policy.score_all(examples, self.settings.micro_batch_positions, composed):
            for row, values in zip(rows, logps.tolist(), strict=True):
                result[row] = tuple(values[: len(examples[row].token_ids)])
        return result

    @torch.no_grad()
    def _reference_logps(self, examples: Sequence[Example]) -> list[Logps]:
        """Log-probabilities under what is trained as it was before, by example."""
        parameters = self.policy.trained.trainable()
        now = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.copy_(self.initial[name])
            return self._logps(examples)
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(now[name])


def _read(parts: Sequence[dict[str, Tensor]], key: str) -> list[float]:
    values: list[float] = torch.stack([part[key] for part in parts]).tolist() if parts else []
    return values


def _padded(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Ragged numbers as [B, T] of the shape, dtype and device of `like`, zeros to the right."""
    padded = torch.zeros(like.shape, dtype=like.dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=like.dtype)
    return padded.to(like.device)
