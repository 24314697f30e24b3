"""LMPO (arXiv 2602.03036, section 4): reinforcement learning of the composer on the team's reward.

A step rolls out a few tasks G times each under the present latents, compares the rewards inside each group, and moves
the composer towards latents under which the tokens of better rollouts are likelier. It trains on the sampled token ids,
on all messages of all turns, and composes from the same text as the rollout. With a LoRA of the agents in place of the
composer, the same steps are GRPO (arXiv 2402.03300), the parametric baseline: what is trained is a `policies.Policy`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentmem.config import GRPOSection, LMPOSection, Sampling, with_fields
from latentmem.environments.environment import Domain
from latentmem.errors import ConfigError, TrainingError
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import Memory
from latentmem.memory.parametric import ParametricMemory
from latentmem.models.agent import AgentModel
from latentmem.models.language_model import KeepingModel, LanguageModel
from latentmem.models.prefilling import Kept
from latentmem.processes import Processes
from latentmem.rollout import Rollouts, queries_of, rollout
from latentmem.seeds import stream_seed
from latentmem.teams.turn import Players
from latentmem.training.ahead import Ahead
from latentmem.training.checkpoint_folder import Progress
from latentmem.training.journal import Journal, journal_of
from latentmem.training.loop import train
from latentmem.training.losses import importance_weights, lmpo_loss
from latentmem.training.optimizer import Optimization, StepResult
from latentmem.training.policies import policy_of
from latentmem.training.scoring import Example
from latentmem.training.signal import Group, Silence, measure, signal_of
from latentmem.training.tasks import Passes, tasks_aside, without
from latentmem.trajectory import Task, Trajectory

ENGINE_CAP = 2.0
"""`importance_cap` if none is set and an engine samples in less than float32, so that it rounds otherwise."""
Logps = tuple[float, ...]
"""Log-probabilities of the tokens of one message."""


class Rolled(NamedTuple):
    """The rollouts of one step in this process."""

    groups: list[Group]
    """The groups that carry signal."""
    composed: dict[str, Tensor]
    """The latents [K, d_agent] that agents were given, by the text that they were composed from."""
    kept: Kept
    """The beginnings of prompts, as the agents read them."""
    metrics: dict[str, float]
    """Metrics over all groups of all processes."""
    stale: bool = False
    """Whether the trained parameters were updated since the latents were composed."""


@dataclass(frozen=True)
class Batch:
    """The messages of a step's groups in this process, with all that the loss needs besides their present logps.

    Rows are ragged: one per message, with as many numbers as its response has tokens.
    """

    examples: list[Example]
    advantages: list[float]
    """The advantage of each message."""
    old_logps: list[Logps]
    """Log-probabilities in the denominator of the ratio."""
    weights: list[Logps] | None
    """Weights of truncated importance sampling."""
    ref_logps: list[Logps] | None
    """Log-probabilities under the parameters from before training, for the KL term."""
    num_messages: int
    """Number of messages in all processes; the same holds for `num_tokens`."""
    num_tokens: int


class LMPOTrainer:
    """A trainer of a composer, or of the agents themselves, on rollouts of a team."""

    def __init__(
        self,
        memory: LatentMemory | ParametricMemory,
        model: LanguageModel,
        team: Players,
        domain: Domain,
        settings: LMPOSection | GRPOSection | None = None,
        *,
        tasks: Sequence[Task] | None = None,
        aside: Sequence[Task] | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 - it is frozen
        max_turns: int = 1,
        seed: int = 0,
        processes: Processes | None = None,
        carried: Callable[[], Mapping[str, float]] | None = None,
        **fields: Any,
    ) -> None:
        """Take all that training needs.

        Args:
            memory: the memory that the team plays with. Of a latent memory the composer is trained, and the bank does
                not change; of a parametric memory the agents' adapter is trained.
            model: the agents.
            team: the team that plays; of several teams, each task is given to one.
            domain: makes the environments, and the tasks if none are given.
            settings: the section `lmpo` or `grpo` of the configuration; `initial` is not read here. None takes the
                defaults.
            tasks: the tasks played for training; None takes the train split.
            aside: tasks played greedily every `eval_every` steps, and left out of `tasks`. None takes `eval_tasks`
                tasks: the first of the dev split, or the last of `tasks` if there is no such split.
            sampling: how rollouts are sampled; its temperature is part of the log-probabilities.
            max_turns: the most turns of an episode.
            seed: seed of the order of tasks and of all sampling.
            processes: the processes that train together, each on its share of the tasks; None takes those that were
                launched.
            carried: measures what the composer's latents carry; its numbers are logged with each evaluation.
            fields: fields of `settings` to replace.

        Raises:
            ConfigError: a field is unknown or has a wrong value; sampling is greedy, so nothing could be compared; it
                leaves tokens out, and an engine's log-probabilities are of the others; or `max_staleness` is 1 and the
                agents cannot sample while training goes on.
            TrainingError: there are no tasks to train on, or none to evaluate on.
        """
        self.phase = "grpo" if isinstance(memory, ParametricMemory) else "lmpo"
        defaults = GRPOSection() if isinstance(memory, ParametricMemory) else LMPOSection()
        self.settings = with_fields(settings or defaults, fields, self.phase)
        if sampling.temperature == 0:
            raise ConfigError(
                "sampling.temperature is 0; greedy rollouts of one task are all equal, set it to 0.6 or more"
            )
        if model.engine is not None and (sampling.top_p < 1 or sampling.top_k):
            raise ConfigError(
                "sampling.top_p and sampling.top_k leave tokens out, and the engine's log-probabilities are then of "
                "the tokens that are left; to train, set sampling.top_p=1 and sampling.top_k=0"
            )
        tasks = domain.tasks("train") if tasks is None else tasks
        if aside is None:
            aside = tasks_aside(tasks, domain.tasks("dev"), self.settings, self.phase)
        tasks = without(tasks, aside)
        if not tasks or (self.settings.eval_every and not aside):
            raise TrainingError(
                f"{len(tasks)} tasks to train on and {len(aside)} set aside to evaluate on; give at least one of each"
            )
        self.policy = policy_of(memory, model)
        self.ahead: Ahead | None = None
        """Plays the rollouts of the next step, if `max_staleness` allows it."""
        if isinstance(self.settings, LMPOSection) and self.settings.max_staleness:
            if not model.concurrent:
                raise ConfigError(
                    "lmpo.max_staleness is 1, but this process samples for the agents and cannot train meanwhile; set "
                    "it to 0, or let a server sample (model.engine)"
                )
            self.ahead = Ahead(self.policy.memory, model)
        self.team = team
        self.start = domain.start
        self.aside = list(aside)
        self.processes = processes or Processes()
        self.optimization = Optimization.of(self.policy.trained, self.settings, self.settings.num_steps, self.processes)
        self.sampling = sampling
        self.importance_cap = self.settings.importance_cap
        if self.importance_cap is None and model.engine is not None and model.model.dtype != torch.float32:
            self.importance_cap = ENGINE_CAP
        self.max_turns = max_turns
        self.seed = seed
        self.passes = Passes(tasks, seed)
        self.carried = carried or dict[str, float]
        self.silence = Silence(self.phase)
        self.last_error: str | None = None
        """What ended the last of this process's episodes that ended in an error."""
        self.initial = {name: p.detach().clone() for name, p in self.policy.trained.trainable().items()}
        """The trained parameters as they were before training, for the KL term."""

    def train(self, folder: str | Path, journal: Journal | None = None) -> Progress:
        """Train to the end, resuming from `folder`; see `loop.train`.

        Args:
            folder: the folder of the checkpoints.
            journal: gets the numbers of each step; None writes them into `folder` and shows a bar on a terminal.
        """
        folder = Path(folder)
        with journal_of(
            journal, folder, self.settings.num_steps, self.phase, "reward", self.processes.is_first
        ) as told:
            try:
                return self._train(folder, told)
            finally:
                if self.ahead is not None:
                    self.ahead.stop()

    def _train(self, folder: Path, journal: Journal) -> Progress:
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
            journal=journal,
        )

    def step(self, progress: Progress) -> StepResult:
        """Roll out, compare, and update."""
        began = time.perf_counter()
        rolled = self._rollouts(progress)
        middle = time.perf_counter()
        self._go_ahead(progress)
        result = self._update(rolled, progress.step)
        self.silence.note(rolled.metrics)
        seconds = {"rollout_seconds": middle - began, "update_seconds": time.perf_counter() - middle}
        return replace(result, metrics=rolled.metrics | result.metrics | seconds)

    def evaluate(self) -> float:
        """Return the mean reward of greedy responses on the tasks set aside."""
        greedy = Sampling(temperature=0.0, max_response_tokens=self.sampling.max_response_tokens)
        aside = self.processes.shard(self.aside)
        played = self._play(self.policy.memory, self.policy.model, aside, greedy, 1, "eval")
        rewards = self.processes.gather([trajectory.reward for trajectory in played.trajectories])
        return sum(rewards) / len(rewards)

    def _evaluate(self, step: int) -> tuple[float, dict[str, float]]:
        reward = self.evaluate()
        return reward, {"eval_reward": reward, **self.carried()}

    def _go_ahead(self, progress: Progress) -> None:
        """Begin to play the next step, unless its latents have to be composed after this step's update.

        That is so after a checkpoint, from which the same command may go on: a resumed run does the very same then.
        """
        settings, step = self.settings, progress.step + 1
        saved = step % settings.save_every == 0 or (settings.eval_every and step % settings.eval_every == 0)
        if self.ahead is None or saved or step == settings.num_steps:
            return
        tasks, _ = self.passes.take(progress.position, settings.tasks_per_step)
        mine = self.processes.shard(tasks)
        stream = _stream(step)
        self.ahead.begin(
            queries_of(self.team, mine),
            lambda memory, model: self._play(memory, model, mine, self.sampling, settings.group_size, stream),
        )

    def _play(
        self,
        memory: Memory,
        model: AgentModel,
        tasks: Sequence[Task],
        sampling: Sampling,
        group_size: int,
        stream: str,
    ) -> Rollouts:
        return rollout(
            self.team,
            memory,
            model,
            tasks,
            self.start,
            sampling=sampling,
            group_size=group_size,
            seed=stream_seed(self.seed, stream),
            max_turns=self.max_turns,
        )

    def _rollouts(self, progress: Progress) -> Rolled:
        """Roll tasks out, and further ones while too few groups carry signal, as far as `max_resamples` allows."""
        settings = self.settings
        model = KeepingModel(self.policy.model)
        kept: list[Group] = []
        played: list[list[Trajectory]] = []
        composed: dict[str, Tensor] = {}
        num_kept = 0
        begun = self.ahead.take() if self.ahead is not None else None
        for draw in range(1 + settings.max_resamples):
            tasks, progress.position = self.passes.take(progress.position, settings.tasks_per_step)
            rollouts = begun or self._play(
                *(self.policy.memory, model, self.processes.shard(tasks)),
                *(self.sampling, settings.group_size, _stream(progress.step, draw)),
            )
            played += rollouts.groups
            composed |= rollouts.composed
            kept += signal_of(rollouts.groups, settings.scale_advantages)
            num_kept = int(self.processes.sum({"kept": len(kept)})["kept"])
            if num_kept >= settings.tasks_per_step:
                break
        for error in (trajectory.error for group in played for trajectory in group):
            self.last_error = error or self.last_error
        metrics = measure(played, kept, self.processes)
        if self.ahead is not None:
            metrics["staleness"] = float(begun is not None)
        return Rolled(kept, composed, model.kept, metrics, stale=begun is not None)

    def _update(self, rolled: Rolled, step: int) -> StepResult:
        """Move the trained parameters towards the better rollouts of each group."""
        batch, importance = self._batch(rolled)
        if not batch.num_messages:
            return StepResult({}, moved=False, finite=True)
        settings, metrics = self.settings, dict[str, float]()
        parts: list[dict[str, Tensor]] = []  # of each micro-batch; read once per pass, so that a GPU need not wait
        for iteration in range(settings.num_iterations):
            num_micro_batches = 1
            if settings.loss_type == "bnpo":  # its N counts one micro-batch, so the step takes the mean over them
                mine = len(self.policy.micro_batches(batch.examples, settings.micro_batch_positions))
                num_micro_batches = int(self.processes.sum({"n": mine})["n"])
            loss_of = partial(self._loss, batch, num_micro_batches, parts)
            # An update has changed the composer since then, this step's or the one before.
            composed = rolled.composed if iteration == 0 and not rolled.stale else None
            loss = self.policy.accumulate(
                batch.examples, loss_of, settings.micro_batch_positions, composed, rolled.kept
            )
            loss = self.processes.sum({"loss": loss})["loss"]
            finite, norm = self.optimization.step(step, loss)
            if iteration == 0:
                metrics = {"loss": loss, "grad_norm": norm, "first_ratio_max": self._ratio_max(parts)}
                metrics["learning_rate"] = self.optimization.rate(step)
            if not finite:
                metrics |= {"loss": loss, "grad_norm": norm}
                break
        total = self.processes.sum({key: sum(_read(parts, key)) for key in ("tokens", "clipped", "kl")})
        metrics |= {"clip_fraction": total["clipped"] / total["tokens"], "ratio_max": self._ratio_max(parts)}
        if settings.beta:
            metrics["kl"] = total["kl"] / total["tokens"]
        return StepResult(metrics | importance, moved=finite or iteration > 0, finite=finite)

    def _batch(self, rolled: Rolled) -> tuple[Batch, dict[str, float]]:
        """Return the batch to learn from, and the metrics of its importance weights."""
        messages = [pair for group in rolled.groups for pair in group.messages()]
        examples = [self.policy.example(message, self.sampling.temperature) for message, _ in messages]
        sampled = [message.logps for message, _ in messages]
        sums = self.processes.sum({"messages": len(messages), "tokens": sum(map(len, sampled))})
        old_logps, weights, importance, ref_logps = sampled, None, dict[str, float](), None
        if sums["messages"] and self.settings.beta:
            ref_logps = self._reference_logps(examples, rolled.kept)
        if sums["messages"] and self.importance_cap is not None:
            # If sampling and scoring round differently, the ratio starts from the scored values, and a weight corrects.
            old_logps = self._logps(examples, rolled.kept, rolled.composed)
            weights, importance = self._importance(old_logps, sampled, self.importance_cap)
        advantages = [advantage for _, advantage in messages]
        counts = (int(sums["messages"]), int(sums["tokens"]))
        return Batch(examples, advantages, old_logps, weights, ref_logps, *counts), importance

    def _loss(
        self,
        batch: Batch,
        num_micro_batches: int,
        parts: list[dict[str, Tensor]],
        rows: list[int],
        logps: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Return the loss share of a micro-batch, `rows` of the batch; add its statistics to `parts`."""
        settings = self.settings
        loss, part = lmpo_loss(
            logps,
            _padded([batch.old_logps[row] for row in rows], logps),
            torch.tensor([batch.advantages[row] for row in rows], dtype=logps.dtype).to(logps.device),
            mask,
            loss_type=settings.loss_type,
            epsilon_low=settings.epsilon_low,
            epsilon_high=settings.epsilon_high,
            delta=settings.delta,
            beta=settings.beta,
            ref_logps=None if batch.ref_logps is None else _padded([batch.ref_logps[row] for row in rows], logps),
            weights=None if batch.weights is None else _padded([batch.weights[row] for row in rows], logps),
            max_response_tokens=self.sampling.max_response_tokens,
            num_messages=batch.num_messages,
            num_tokens=batch.num_tokens,
        )
        parts.append(part)
        return loss / num_micro_batches

    def _ratio_max(self, parts: Sequence[dict[str, Tensor]]) -> float:
        return max(self.processes.gather(_read(parts, "ratio_max")))

    def _importance(
        self, scored: Sequence[Logps], sampled: Sequence[Logps], cap: float
    ) -> tuple[list[Logps], dict[str, float]]:
        """Return a weight per token; and, over all processes, the largest before truncation and the mean after it."""
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
        return [tuple(row.tolist()) for row in weights], metrics

    def _logps(self, examples: Sequence[Example], kept: Kept, composed: dict[str, Tensor] | None = None) -> list[Logps]:
        """Return log-probabilities under the present parameters, by example."""
        result: list[Logps] = [() for _ in examples]
        for rows, logps, _ in self.policy.score_all(examples, self.settings.micro_batch_positions, composed, kept):
            for row, values in zip(rows, logps.tolist(), strict=True):
                result[row] = tuple(values[: len(examples[row].token_ids)])
        return result

    @torch.no_grad()
    def _reference_logps(self, examples: Sequence[Example], kept: Kept) -> list[Logps]:
        """Return log-probabilities under the parameters from before training, by example."""
        parameters = self.policy.trained.trainable()
        now = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.copy_(self.initial[name])
            return self._logps(examples, kept)
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(now[name])


def _stream(step: int, draw: int = 0) -> str:
    """Name the random stream of a step's rollouts."""
    return f"step {step} draw {draw}"


def _read(parts: Sequence[dict[str, Tensor]], key: str) -> list[float]:
    values: list[float] = torch.stack([part[key] for part in parts]).tolist() if parts else []
    return values


def _padded(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Pad ragged numbers with zeros on the right to [B, T], with the shape, dtype and device of `like`."""
    padded = torch.zeros(like.shape, dtype=like.dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=like.dtype)
    return padded.to(like.device)
