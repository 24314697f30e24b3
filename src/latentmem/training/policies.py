"""Policies, the difference between LMPO and GRPO: what is trained, and how it decides the likelihood of a message.

LMPO trains the composer through the latents that it gives to frozen agents. GRPO, the baseline, trains a LoRA on the
agents, who get no memory. Groups, advantages, loss and update belong to one trainer, `lmpo.py`, which uses only this
interface.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import Memory
from latentmem.memory.parametric import ParametricMemory
from latentmem.models.branches import Branched, grow_rows
from latentmem.models.language_model import LanguageModel
from latentmem.models.prefilling import Kept
from latentmem.models.prefix import check_window
from latentmem.training.optimizer import Trained
from latentmem.training.scoring import Example, accumulate, even_batches, micro_batches_of, score_all
from latentmem.trajectory import Message

LossOf = Callable[[list[int], Tensor, Tensor], Tensor]
"""A function: positions of some examples, their logps [B, T] and mask [B, T] -> their share of the loss."""


class Policy(Protocol):
    """The parts that a trainer plays with and trains."""

    @property
    def memory(self) -> Memory:
        """The memory that the team plays with."""

    @property
    def model(self) -> LanguageModel:
        """The agents."""

    @property
    def trained(self) -> Trained:
        """The object whose parameters are trained."""

    def example(self, message: Message, temperature: float) -> Example:
        """Return what is needed to score a message."""

    def micro_batches(self, examples: Sequence[Example], budget: int) -> list[list[int]]:
        """Return the examples (by position) of each forward pass, with at most `budget` columns that have gradients."""

    def accumulate(
        self,
        examples: Sequence[Example],
        loss_of: LossOf,
        budget: int,
        composed: Mapping[str, Tensor] | None = None,
        kept: Kept | None = None,
    ) -> float:
        """Add the gradient of the summed loss to the trained parameters and return that loss (`scoring.accumulate`)."""

    def score_all(
        self,
        examples: Sequence[Example],
        budget: int,
        composed: Mapping[str, Tensor] | None = None,
        kept: Kept | None = None,
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield positions, logps [B, T] and mask [B, T] of each micro-batch of `accumulate`, without gradients."""


class LatentPolicy:
    """A composer, trained through the latents that it gives to frozen agents."""

    def __init__(self, memory: LatentMemory, model: LanguageModel) -> None:
        self.memory = memory
        self.model = model
        self.trained = memory.composer

    def example(self, message: Message, temperature: float) -> Example:
        """Return the message with the same text that its memory was composed from."""
        return Example.of(message, self.model, message.recalled.text, temperature)

    def micro_batches(self, examples: Sequence[Example], budget: int) -> list[list[int]]:
        """Return the micro-batches of `scoring.accumulate`."""
        return micro_batches_of(self.trained, examples, budget)

    def accumulate(
        self,
        examples: Sequence[Example],
        loss_of: LossOf,
        budget: int,
        composed: Mapping[str, Tensor] | None = None,
        kept: Kept | None = None,
    ) -> float:
        """Call `scoring.accumulate`."""
        return accumulate(self.trained, self.model, examples, loss_of, budget, composed, kept)

    def score_all(
        self,
        examples: Sequence[Example],
        budget: int,
        composed: Mapping[str, Tensor] | None = None,
        kept: Kept | None = None,
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Call `scoring.score_all`."""
        return score_all(self.trained, self.model, examples, budget, composed, kept)


class AgentsPolicy:
    """The agents themselves, trained through the LoRA of a parametric memory."""

    def __init__(self, memory: ParametricMemory) -> None:
        self.memory = memory
        self.model = memory.model
        self.trained = memory

    def example(self, message: Message, temperature: float) -> Example:
        """Return the message alone: nothing was composed for it."""
        return Example.of(message, self.model, "", temperature)

    def micro_batches(self, examples: Sequence[Example], budget: int) -> list[list[int]]:
        """Return the micro-batches of `accumulate`; `budget` counts tokens, and those of shared beginnings once."""
        return [_positions(rows) for rows in _batches(examples, budget)]

    def accumulate(
        self,
        examples: Sequence[Example],
        loss_of: LossOf,
        budget: int,
        composed: Mapping[str, Tensor] | None = None,
        kept: Kept | None = None,
    ) -> float:
        """Run forward and backward passes through the agents, one micro-batch after the other."""
        total = torch.zeros((), device=self.model.device)
        for rows in _batches(examples, budget):
            loss = loss_of(_positions(rows), *self._score(examples, rows))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return float(total)

    @torch.no_grad()
    def score_all(
        self,
        examples: Sequence[Example],
        budget: int,
        composed: Mapping[str, Tensor] | None = None,
        kept: Kept | None = None,
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield positions, logps and mask of each micro-batch."""
        for rows in _batches(examples, budget):
            yield _positions(rows), *self._score(examples, rows)

    def _score(self, examples: Sequence[Example], rows: Sequence[Branched]) -> tuple[Tensor, Tensor]:
        (temperature,) = {example.temperature for example in examples}
        longest = max(len(e.prompt_ids) + len(e.token_ids) for e in examples)
        check_window(self.model.model, longest, "a stored message")
        with self.model.as_agent(self.memory.adapter) as agent:
            return agent.branch_logps(rows, _said(examples), temperature)


def policy_of(memory: LatentMemory | ParametricMemory, model: LanguageModel) -> Policy:
    """Return the policy for a memory: its composer, or the agents' own adapter."""
    return AgentsPolicy(memory) if isinstance(memory, ParametricMemory) else LatentPolicy(memory, model)


def _batches(examples: Sequence[Example], budget: int) -> list[list[Branched]]:
    """Group rows that pass through the model together; each group has similar lengths, since it is padded alike."""
    rows = sorted(grow_rows(_said(examples), budget), key=lambda row: row.columns)
    lengths = {i: row.columns for i, row in enumerate(rows)}
    return [[rows[i] for i in batch] for batch in even_batches(range(len(rows)), lengths, budget)]


def _positions(rows: Sequence[Branched]) -> list[int]:
    return [message for row in rows for message in row.messages]


def _said(examples: Sequence[Example]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(example.prompt_ids, example.token_ids) for example in examples]
