"""Supervised warm start: it makes the right responses likely, through memory of *other* trajectories.

The right responses come from the team's own successes, or are demonstrated (`demonstrations.py`). The loss is the mean
cross-entropy of the response tokens (including the closing EOS, where there was one).
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from latentmem.carrying import roles_of_teams
from latentmem.config import SFTSection, with_fields
from latentmem.errors import TrainingError
from latentmem.memory.latent import LatentMemory
from latentmem.models.language_model import LanguageModel
from latentmem.processes import Processes
from latentmem.teams.turn import Players, teams_of
from latentmem.training.checkpoint_folder import Progress
from latentmem.training.journal import Journal, journal_of
from latentmem.training.loop import train
from latentmem.training.optimizer import Optimization, StepResult
from latentmem.training.scoring import Example, accumulate, judge_all
from latentmem.training.tasks import Passes
from latentmem.trajectory import Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Judged:
    """The result of one held-out message."""

    task: str
    loss: float
    """Sum over the message's tokens, in nats."""
    num_tokens: int
    exact: bool
    """Whether greedy decoding picks each of its tokens after those before it."""


class SFTTrainer:
    """A trainer that fits a composer to successful trajectories."""

    def __init__(
        self,
        memory: LatentMemory,
        model: LanguageModel,
        team: Players,
        trajectories: Iterable[Trajectory],
        held_out: Iterable[Trajectory] = (),
        settings: SFTSection = SFTSection(),  # noqa: B008 - it is frozen
        *,
        seed: int = 0,
        processes: Processes | None = None,
        carried: Callable[[], Mapping[str, float]] | None = None,
        **fields: Any,
    ) -> None:
        """Take all that training needs.

        Args:
            memory: its composer is trained; its bank is searched, never for the trajectory's own task.
            model: the frozen agents.
            team: who played, for the roles' profiles. If one team is given, all trajectories count as its own.
            trajectories: episodes to learn from; failures and episodes of another model are left out and counted.
            held_out: episodes of other tasks for `eval_every`, so that no episode is on both sides. If none of them is
                a success, nothing is evaluated, the last checkpoint is selected, and a warning says so.
            settings: the section `sft` of the configuration; `initial` and `demonstrations` are not read here.
            seed: seed of the order of trajectories.
            processes: the processes that train together; None takes those that were launched.
            carried: measures what the composer's latents carry; its numbers are logged with each evaluation.
            fields: fields of `settings` to replace.

        Raises:
            ConfigError: a field is unknown or has a wrong value.
            TrainingError: no trajectory is left to learn from.
        """
        self.settings = with_fields(settings, fields, "sft")
        self.processes = processes or Processes()
        self.memory = memory
        self.model = model
        self.roles_of = roles_of_teams(teams_of(team))
        given, aside = list(trajectories), list(held_out)
        self.trajectories = self._usable(given)
        self.held_out = self._usable(aside)
        if not self.trajectories:
            raise TrainingError(
                f"none of {len(given)} trajectories is a success of model {model.name!r} with the team's roles; "
                "collect more, or on easier tasks, before sft"
            )
        if self.settings.eval_every and not self.held_out:
            logger.warning(
                "sft: none of the %d held-out trajectories is a success to evaluate on; the last step will be selected",
                len(aside),
            )
        self.optimization = Optimization.of(memory.composer, self.settings, self.settings.num_steps, self.processes)
        self.passes = Passes(self.trajectories, seed)
        self.carried = carried or dict[str, float]

    def _usable(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        ours = [
            t
            for t in trajectories
            if t.success and t.model == self.model.name and all(m.role in self.roles_of(t) for m in t.messages)
        ]
        usable = [t for t in ours if all(m.token_ids for m in t.messages)]
        if len(usable) < len(ours):
            logger.warning(
                "sft: %d of %d successes hold messages without token ids, as a server of another model tells none; "
                "nothing is learned from them",
                len(ours) - len(usable),
                len(ours),
            )
        logger.info("sft uses %d of %d trajectories: successes of this model and team", len(usable), len(trajectories))
        return usable

    def train(self, folder: str | Path, journal: Journal | None = None) -> Progress:
        """Train to the end, resuming from `folder`; see `loop.train`.

        Args:
            folder: the folder of the checkpoints.
            journal: gets the numbers of each step and evaluation, and for each held-out task `step`, `task` (its key),
                `loss` (nats per token) and `accuracy` (share of its messages that are exactly what greedy decoding
                gives); None writes them into `folder`, and shows a bar on a terminal.
        """
        folder = Path(folder)
        with journal_of(journal, folder, self.settings.num_steps, "sft", "loss", self.processes.is_first) as told:
            return self._train(folder, told)

    def _train(self, folder: Path, journal: Journal) -> Progress:
        def evaluate(step: int) -> tuple[float, dict[str, float]]:
            judged = self._judge()
            by_task: dict[str, list[_Judged]] = {trajectory.task.key: [] for trajectory in self.held_out}
            for message in judged:
                by_task[message.task].append(message)
            journal.log_tasks(
                [
                    {"step": step, "task": task, "loss": _loss(messages), "accuracy": _accuracy(messages)}
                    for task, messages in by_task.items()
                ]
            )
            loss = _loss(judged)
            return -loss, {"eval_loss": loss, "eval_accuracy": _accuracy(judged), **self.carried()}

        return train(
            self.memory.composer,
            self.optimization,
            folder,
            self.processes,
            num_steps=self.settings.num_steps,
            save_every=self.settings.save_every,
            eval_every=self.settings.eval_every if self.held_out else None,
            take_step=self.step,
            evaluate=evaluate,
            journal=journal,
        )

    def step(self, progress: Progress) -> StepResult:
        """Do one optimizer step on the next trajectories."""
        batch, progress.position = self.passes.take(progress.position, self.settings.trajectories_per_step)
        examples = self._examples(self.processes.shard(batch))
        mine = {"tokens": float(sum(len(example.token_ids) for example in examples))}
        tokens = self.processes.sum(mine)["tokens"]

        def loss_of(rows: list[int], logps: Tensor, mask: Tensor) -> Tensor:
            return -logps.sum() / tokens  # exactly 0 where the mask is False

        loss = accumulate(self.memory.composer, self.model, examples, loss_of, self.settings.micro_batch_positions)
        loss = self.processes.sum({"loss": loss})["loss"]
        return self.optimization.move(progress.step, loss, tokens=tokens)

    def held_out_loss(self) -> float:
        """Return the mean cross-entropy per token on the held-out trajectories, in nats."""
        return _loss(self._judge())

    def _judge(self) -> list[_Judged]:
        """Judge every held-out message, once over all processes."""
        mine = self.processes.shard(self.held_out)
        examples = self._examples(mine)
        keys = [trajectory.task.key for trajectory in mine for _ in trajectory.messages]
        budget = self.settings.micro_batch_positions
        judged: list[_Judged] = []
        for rows, logps, exact, _ in judge_all(self.memory.composer, self.model, examples, budget):
            for row, logp, good in zip(rows, logps.sum(1).tolist(), exact.all(1).tolist(), strict=True):
                judged.append(_Judged(keys[row], -logp, len(examples[row].token_ids), good))
        return self.processes.gather(judged)

    def _examples(self, trajectories: Sequence[Trajectory]) -> list[Example]:
        said = [(t.task, self.roles_of(t)[m.role], m) for t in trajectories for m in t.messages]
        records = self.memory.records([(task, role) for task, role, _ in said])
        # Likelihoods are computed at temperature 1, whatever the responses were sampled at.
        return [Example.of(m, self.model, r.text, 1.0) for (_, _, m), r in zip(said, records, strict=True)]


def _loss(judged: Sequence[_Judged]) -> float:
    """Return the mean loss in nats per token."""
    return math.fsum(message.loss for message in judged) / sum(message.num_tokens for message in judged)


def _accuracy(judged: Sequence[_Judged]) -> float:
    return sum(message.exact for message in judged) / len(judged)
