"""Supervised warm start: make the team's own successful responses likely, through memory of *other* trajectories.

The loss is the mean cross-entropy of the response tokens (their closing EOS included where there was one).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentmem.carrying import roles_of_teams
from latentmem.errors import TrainingError
from latentmem.memory.latent import LatentMemory
from latentmem.models.language_model import LanguageModel
from latentmem.processes import Processes
from latentmem.teams.turn import Team
from latentmem.training.optimization import Optimization, Progress, Stream, train
from latentmem.training.scoring import Example, accumulate, score_all
from latentmem.trajectory import Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SFTSettings:
    """How to warm up; the fields are those of `sft` in the configuration."""

    num_steps: int
    trajectories_per_step: int
    save_every: int
    eval_every: int | None
    micro_batch_positions: int


class SFTTrainer:
    """Fits a composer to successful trajectories of a bank."""

    def __init__(
        self,
        memory: LatentMemory,
        model: LanguageModel,
        trajectories: Sequence[Trajectory],
        held_out: Sequence[Trajectory],
        teams: Sequence[Team],
        optimization: Optimization,
        processes: Processes,
        settings: SFTSettings,
        seed: int = 0,
        carried: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """Take what is needed for training.

        Args:
            memory: its composer is trained; its bank is searched, never for the trajectory's own task.
            model: the frozen agents.
            trajectories: episodes to learn from; the failed ones, and those of another model, are left out and counted.
            held_out: episodes of other tasks for `eval_every`, so that no episode is on both sides. If none of them is
                a success, nothing is evaluated and the last checkpoint is the one selected; that is told.
            teams: those that played, for their roles' profiles. With one, all trajectories are taken for its own.
            optimization: of the composer.
            processes: those that train together.
            settings: sizes.
            seed: of the order of trajectories.
            carried: measures what the composer's latents carry; its numbers are logged with each evaluation.

        Raises:
            TrainingError: nothing is left to learn from.
        """
        self.memory = memory
        self.model = model
        self.roles_of = roles_of_teams(teams)
        self.trajectories = self._usable(trajectories)
        self.held_out = self._usable(held_out)
        self.optimization = optimization
        self.processes = processes
        self.settings = settings
        self.stream = Stream(self.trajectories, seed)
        self.carried = carried or dict[str, float]
        if not self.trajectories:
            raise TrainingError(
                f"none of {len(trajectories)} trajectories is a success of model {model.name!r} with the team's roles; "
                "collect more, or on easier tasks, before sft"
            )

        if settings.eval_every and not self.held_out:
            logger.warning(
                "sft: none of the %d held-out trajectories is a success to evaluate on; the last step will be selected",
                len(held_out),
            )

    def _usable(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        usable = [
            t
            for t in trajectories
            if t.success
            and t.model == self.model.name
            and all(m.role in self.roles_of(t) and m.token_ids for m in t.messages)
        ]
        logger.info("sft uses %d of %d trajectories: successes of this model and team", len(usable), len(trajectories))
        return usable

    def train(self, folder: Path, log: Callable[[dict[str, Any]], None], rewind: Callable[[int], None]) -> Progress:
        """Train to the end, resuming from `folder`; see `optimization.train`."""
        return train(
            self.memory.composer,
            self.optimization,
            folder,
            self.processes,
            num_steps=self.settings.num_steps,
            save_every=self.settings.save_every,
            eval_every=self.settings.eval_every if self.held_out else None,
            take_step=self.step,
            evaluate=self._evaluate,
            log=log,
            rewind=rewind,
        )

    def step(self, progress: Progress) -> dict[str, float]:
        """One optimizer step on the next trajectories of the stream; its metrics."""
        batch, progress.position = self.stream.take(progress.position, self.settings.trajectories_per_step)
        examples = self._examples(self.processes.shard(batch))
        mine = {"tokens": float(sum(len(example.token_ids) for example in examples))}
        tokens = self.processes.sum(mine)["tokens"]

        def loss_of(rows: list[int], logps: Tensor, mask: Tensor) -> Tensor:
            return -logps.sum() / tokens  # exactly 0 where the mask is False

        loss = accumulate(self.memory.composer, self.model, examples, loss_of, self.settings.micro_batch_positions)
        loss = self.processes.sum({"loss": loss})["loss"]
        good, norm = self.optimization.step(progress.step, loss)
        return {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": self.optimization.rate(progress.step),
            "tokens": tokens,
            "updated": float(good),
            "bad": float(not good),
        }

    def held_out_loss(self) -> float:
        """Mean cross-entropy a token on the held-out trajectories, in nats."""
        examples = self._examples(self.processes.shard(self.held_out))
        parts = [
            logps.sum()
            for _, logps, _ in score_all(
                self.memory.composer, self.model, examples, self.settings.micro_batch_positions
            )
        ]
        mine = {
            "loss": -float(torch.stack(parts).sum()) if parts else 0.0,
            "tokens": float(sum(len(example.token_ids) for example in examples)),
        }
        sums = self.processes.sum(mine)
        return sums["loss"] / sums["tokens"]

    def _evaluate(self) -> tuple[float, dict[str, float]]:
        loss = self.held_out_loss()
        return -loss, {"eval_loss": loss, **self.carried()}

    def _examples(self, trajectories: Sequence[Trajectory]) -> list[Example]:
        said = [(t.task, self.roles_of(t)[m.role], m) for t in trajectories for m in t.messages]
        records = self.memory.records([(task, role) for task, role, _ in said])
        # Likelihoods are those at temperature 1, whatever the responses were sampled at.
        return [Example.of(m, self.model, r.text, 1.0) for (_, _, m), r in zip(said, records, strict=True)]
