"""Warm-up of a composer with slots, before any data: agents learn to read a slot, and the composer to fill it.

There are two stages. In the *frame* stage, constants around the embedding of a random word are trained until the frozen
agents say that word. In the *copy* stage, the composer reads made-up episodes, and the agents must say the word that
they are asked for. A composer that starts from there copies what it reads, even words that it was never trained on.
Without the warm-up, it learns a code for the values that it saw (docs/results/tried.md).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from latentmem.config import WarmupSection, with_fields
from latentmem.errors import TrainingError
from latentmem.memory.composer import Composer
from latentmem.models.language_model import LanguageModel
from latentmem.processes import Processes
from latentmem.seeds import stream_seed
from latentmem.teams.turn import Players, Program, teams_of
from latentmem.training.checkpoint_folder import Progress, newest_checkpoint
from latentmem.training.journal import Journal, journal_of
from latentmem.training.loop import train
from latentmem.training.optimizer import Optimization, StepResult
from latentmem.training.scoring import Example, accumulate, score, score_all
from latentmem.training.warmup_texts import MIN_WORDS, Lesson, draw_lesson, words_of

FRAME_TEXT = " is the answer"
"""The initial content of the latents behind the slots."""


class FrameOnly:
    """A composer of which only the frame is trained."""

    def __init__(self, composer: Composer) -> None:
        self.composer = composer

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return the frame [K, d_agent]."""
        return {"frame": self.composer.frame}

    def save_pretrained(self, folder: Path) -> None:
        """Write the whole composer."""
        self.composer.save_pretrained(folder)

    def load_weights(self, folder: Path) -> None:
        """Read the whole composer."""
        self.composer.load_weights(folder)


class _Later:
    """A journal that counts steps on from an earlier stage; its step 0 comes after the last step of that stage."""

    def __init__(self, journal: Journal, num_before: int) -> None:
        self.journal = journal
        self.num_before = num_before

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.journal.log({**metrics, "step": metrics["step"] + self.num_before + 1})

    def log_tasks(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.journal.log_tasks([{**row, "step": row["step"] + self.num_before + 1} for row in rows])

    def doing(self, what: str) -> None:
        self.journal.doing(what)

    def rewind(self, step: int) -> None:
        self.journal.rewind(step + self.num_before + 1 if step >= 0 else self.num_before)


class WarmupTrainer:
    """A trainer that teaches agents to read the slots of a composer, and the composer to fill them."""

    def __init__(
        self,
        composer: Composer,
        model: LanguageModel,
        team: Players | None = None,
        settings: WarmupSection = WarmupSection(),  # noqa: B008 - it is frozen
        *,
        seed: int = 0,
        processes: Processes | None = None,
        **fields: Any,
    ) -> None:
        """Take all that the warm-up needs.

        Args:
            composer: the composer to train; it must have slots.
            model: the frozen agents.
            team: a team whose prompts are used beside the built-in ones, if any; those of a program are not known.
            settings: the section `warmup` of the configuration.
            seed: seed of words and examples.
            processes: the processes that train together; None takes those that were launched.
            fields: fields of `settings` to replace.

        Raises:
            ConfigError: a field is unknown or has a wrong value.
            TrainingError: the composer has no slots, or the tokenizer has too few words that are one token.
        """
        if composer.slots is None:
            raise TrainingError(
                "composer.slots is null: without slots there is nothing to warm up; set it to the number of words that "
                "an agent has to be told, or leave `train warmup` out"
            )
        self.composer = composer
        self.slots = composer.slots
        self.model = model
        self.teams = [one for one in ([] if team is None else teams_of(team)) if not isinstance(one, Program)]
        self.frame_only = FrameOnly(composer)
        self.settings = settings = with_fields(settings, fields, "warmup")
        self.processes = processes or Processes()
        optimize = partial(
            Optimization,
            processes=self.processes,
            schedule="constant",
            warmup_steps=0,
            max_grad_norm=settings.max_grad_norm,
            weight_decay=0.0,
        )
        self.framing = optimize(self.frame_only, num_steps=settings.frame_steps, learning_rate=settings.frame_rate)
        self.copying = optimize(
            composer,
            num_steps=settings.copy_steps,
            learning_rate=settings.learning_rate,
            projection_rate=settings.projection_rate,
        )
        self.seed = seed
        self.words = words_of(model, stream_seed(seed, "words"))
        if (found := len(self.words.learned) + len(self.words.held_out)) < MIN_WORDS:
            raise TrainingError(
                f"model {model.name!r} has {found} words of 4 to 12 letters that are one token, and a warm-up "
                f"needs {MIN_WORDS}; leave `train warmup` out"
            )
        self.eos = int(model.tokenizer.eos_token_id)

    def train(self, folder: str | Path, journal: Journal | None = None) -> Progress:
        """Go through both stages, resuming from `folder`; see `loop.train`.

        The checkpoints of the whole composer are in FOLDER, those of the frame stage in FOLDER/frame. Steps are counted
        through both stages: step 0 of the copy stage comes after the last step of the frame stage.

        Args:
            folder: the folder of the checkpoints.
            journal: gets the numbers of each step; None writes them into `folder`, and shows a bar on a terminal.
        """
        folder = Path(folder)
        num_steps = self.settings.frame_steps + self.settings.copy_steps
        with journal_of(journal, folder, num_steps, "warmup", "loss", self.processes.is_first) as told:
            return self._train(folder, told)

    def _train(self, folder: Path, journal: Journal) -> Progress:
        settings = self.settings
        go = partial(train, processes=self.processes, save_every=settings.save_every)
        if newest_checkpoint(folder) is None:  # else the copy stage has begun, and its checkpoints hold the frame
            self._open_slots()
            go(
                self.frame_only,
                self.framing,
                folder / "frame",
                num_steps=settings.frame_steps,
                eval_every=settings.eval_every,
                take_step=self._frame_step,
                evaluate=self._evaluate_frame,
                journal=journal,
            )
        return go(
            self.composer,
            self.copying,
            folder,
            num_steps=settings.copy_steps,
            eval_every=settings.eval_every if settings.copy_steps else None,  # else there is nothing to choose from
            take_step=self._copy_step,
            evaluate=self._evaluate_copy,
            journal=_Later(journal, settings.frame_steps),
        )

    def _open_slots(self) -> None:
        """Let a slot hold nothing but its word; start the latents behind the slots as the words of a phrase."""
        embeddings = self.model.model.get_input_embeddings().weight
        with torch.no_grad():
            self.composer.frame[: self.slots] = 0
            for place, token in enumerate(self.model.encode(FRAME_TEXT)[: self.composer.num_latents - self.slots]):
                self.composer.frame[self.slots + place] = embeddings[token].to(self.composer.frame)

    # The frame

    def _frame_step(self, progress: Progress) -> StepResult:
        """Train on words in slots, said after some prompts; each prompt is read once for several words."""
        lessons = self._after_shared_prompts(
            self._random("frame", progress.step), self.words.learned, self.settings.lessons_per_step
        )
        mine = self.processes.shard(lessons)
        examples = [self._example(lesson) for lesson in mine]
        tokens = self._num_tokens(examples)
        total = 0.0
        for logps in self._said(mine, examples):
            loss = -logps.sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return self.framing.move(progress.step, self.processes.sum({"loss": total})["loss"])

    def _said(self, lessons: Sequence[Lesson], examples: Sequence[Example]) -> Iterator[Tensor]:
        """Yield the log-probabilities [B, T] of what should be said, in passes of `micro_batch_positions`."""
        for start in range(0, len(lessons), self._per_pass):
            part = slice(start, start + self._per_pass)
            yield score(self.model, examples[part], self._shown(lessons[part]))[0]

    def _shown(self, lessons: Sequence[Lesson]) -> Tensor:
        """Return latents [B, K, d_agent]: the embeddings of each lesson's words in the slots, plus the frame."""
        embeddings = self.model.model.get_input_embeddings().weight
        held = torch.zeros(len(lessons), *self.composer.frame.shape).to(self.composer.frame)
        for row, lesson in enumerate(lessons):
            ids = [self.model.encode(value)[0] for value in lesson.values]
            held[row, : len(ids)] = embeddings[ids].to(held)
        return held + self.composer.frame

    @torch.no_grad()
    def _evaluate_frame(self, step: int) -> tuple[float, dict[str, float]]:
        lessons = self._held_out_framed
        parts = self._said(lessons, [self._example(lesson) for lesson in lessons])
        return self._scores(torch.cat([logps.sum(1) for logps in parts]), "framed")

    # The copy

    def _copy_step(self, progress: Progress) -> StepResult:
        """Train on made-up episodes that the composer reads; the agents say the words that are asked for."""
        settings = self.settings
        lessons = self._lessons(self._random("copy", progress.step), self.words.learned, settings.lessons_per_step)
        examples = [self._example(lesson) for lesson in self.processes.shard(lessons)]
        tokens = self._num_tokens(examples)

        def loss_of(rows: list[int], logps: Tensor, mask: Tensor) -> Tensor:
            return -logps.sum() / tokens

        loss = accumulate(self.composer, self.model, examples, loss_of, settings.micro_batch_positions)
        return self.copying.move(progress.step, self.processes.sum({"loss": loss})["loss"])

    @torch.no_grad()
    def _evaluate_copy(self, step: int) -> tuple[float, dict[str, float]]:
        examples = [self._example(lesson) for lesson in self._held_out]
        parts = score_all(self.composer, self.model, examples, self.settings.micro_batch_positions)
        return self._scores(torch.cat([logps.sum(1) for _, logps, _ in parts]), "copied")

    # For both stages

    @property
    def _per_pass(self) -> int:
        return max(1, self.settings.micro_batch_positions // (self.composer.num_latents + self.slots + 1))

    def _random(self, stage: str, step: int) -> Random:
        return Random(stream_seed(self.seed, stage, step))  # noqa: S311 - a draw, not a secret

    def _lessons(self, random: Random, values: Sequence[str], count: int) -> list[Lesson]:
        return [draw_lesson(random, self.words.learned, values, self.slots, self.teams) for _ in range(count)]

    def _after_shared_prompts(self, random: Random, values: Sequence[str], count: int) -> list[Lesson]:
        """Draw lessons of which `words_per_prompt` at a time share a prompt, each with words of its own."""
        shared = self.settings.words_per_prompt
        lessons = [
            replace(lesson, values=tuple(random.choices(values, k=len(lesson.values))))
            for lesson in self._lessons(random, values, math.ceil(count / shared))
            for _ in range(shared)
        ]
        return lessons[:count]

    @cached_property
    def _held_out(self) -> list[Lesson]:
        """Lessons about words that are never trained on; always the same."""
        return self._lessons(self._random("held out", 0), self.words.held_out, self.settings.eval_lessons)

    @cached_property
    def _held_out_framed(self) -> list[Lesson]:
        """As `_held_out`, with shared prompts, so that an evaluation of the frame does not cost more than a step."""
        return self._after_shared_prompts(self._random("held out", 0), self.words.held_out, self.settings.eval_lessons)

    def _example(self, lesson: Lesson) -> Example:
        text = self.composer.prompt(lesson.task, lesson.role, [lesson.episode])
        prompt = self.model.encode_prompt(lesson.system, lesson.user)
        return Example(text, tuple(prompt), (*self.model.encode(lesson.response), self.eos), 1.0)

    def _num_tokens(self, examples: Sequence[Example]) -> float:
        return self.processes.sum({"tokens": float(sum(len(example.token_ids) for example in examples))})["tokens"]

    def _scores(self, logps: Tensor, share: str) -> tuple[float, dict[str, float]]:
        """Return the score and metrics: mean nats per response, and the share of responses likelier than one half."""
        loss = -logps.mean().item()
        return -loss, {"eval_loss": loss, share: (logps > math.log(0.5)).float().mean().item()}
