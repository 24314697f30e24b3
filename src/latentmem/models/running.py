"""Responses in the making: rows join while others are sampled, and leave when they have ended.

All rows share the model's passes, whatever their sampling. Each draws from its own random stream and sees its own
columns only, so what it says does not depend on who else is there. `decoding.decode` samples rows that begin together
and that nobody watches, without asking a GPU for each token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from latentmem.config import Sampling
from latentmem.models.agent import Prompt
from latentmem.models.decoding import Continued, draw_uniform, pick
from latentmem.models.ending import Ending


@dataclass(eq=False)
class Row:
    """One response in the making."""

    prompt: Prompt
    ids: list[int]
    """The prompt's tokens."""
    sampling: Sampling
    limit: int
    """Most tokens of the response."""
    ending: Ending
    num_kept: int = 0
    """How many of the prompt's tokens were kept from earlier prompts."""
    logps: list[float] = field(default_factory=list)
    error: Exception | None = None
    """What failed when the caller was given a token."""
    is_ended: bool = False

    @property
    def num_latents(self) -> int:
        """K."""
        return 0 if self.prompt.latents is None else len(self.prompt.latents)

    @property
    def room(self) -> int:
        """Number of columns that may still follow the prompt and its latents."""
        return self.limit - len(self.logps)

    @property
    def is_finite(self) -> bool:
        """Whether the model's values were finite; a row ends with the first that is not."""
        return all(map(math.isfinite, self.logps))

    def add(self, token: int, logp: float) -> None:
        """Take the next token; a row that fails ends alone."""
        self.logps.append(logp)
        try:
            self.is_ended = self.ending.add(token) or not math.isfinite(logp)
        except Exception as error:  # whoever listens to the tokens failed
            self.error, self.is_ended = error, True


class Running:
    """The rows that are sampled now."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Begin without rows; whoever calls `join` and `step` has the right adapter on."""
        self._model = model
        self._prefix: Continued | None = None
        self._rows: list[Row | None] = []
        """The row of each place in the batch; None once it has ended."""
        self._draws = torch.empty(0, 0, dtype=torch.float64)

    def __len__(self) -> int:
        return sum(row is not None for row in self._rows)

    @property
    def rows(self) -> list[Row]:
        """The rows that have not ended."""
        return [row for row in self._rows if row is not None]

    @torch.no_grad()
    def join(self, rows: Sequence[Row], prefix: Continued) -> None:
        """Add rows that the model has read."""
        draws = draw_uniform([row.prompt.seed for row in rows], max(row.limit for row in rows))
        self._leave(everyone=True)
        if self._prefix is None:
            self._prefix = prefix
        else:
            room = max(row.room for row in [*self.rows, *rows])
            self._prefix = self._prefix.joined(prefix, room)
        width = max(self._draws.shape[1], draws.shape[1])
        self._draws = torch.cat([_widened(self._draws, width), _widened(draws, width)])
        self._rows += rows

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Sample the next token of each row, and return the rows that it ended."""
        assert self._prefix is not None, "nothing runs"
        chosen = self._sample(self._prefix.logits(self._model))
        ended = [row for row in self.rows if row.is_ended]
        self._rows = [None if row is None or row.is_ended else row for row in self._rows]
        stay = self._leave()
        if self._prefix is not None:
            chosen = chosen[stay] if stay is not None else chosen
            # A row that has ended reads nothing more: it would come to positions behind the model's window.
            real = torch.tensor([[row is not None] for row in self._rows], device=chosen.device)
            self._prefix.extend(self._model, self._model.get_input_embeddings()(chosen[:, None]), real)
        return ended

    def drop(self, rows: Sequence[Row]) -> None:
        """Let rows go that nobody waits for."""
        if not rows:
            return
        self._rows = [None if row in rows else row for row in self._rows]
        self._leave(everyone=True)

    def _sample(self, logits: Tensor) -> Tensor:
        """Choose the next token of each place [B]; rows of one sampling are chosen at once."""
        kinds: dict[tuple[float, float, int], list[int]] = {}
        done = [0 if row is None else len(row.logps) for row in self._rows]
        for place, row in enumerate(self._rows):
            if row is not None:
                how = row.sampling
                kinds.setdefault((how.temperature, how.top_p, how.top_k), []).append(place)
        chosen = torch.zeros(len(self._rows), dtype=torch.long, device=logits.device)
        logps = torch.zeros(len(self._rows), dtype=torch.float32, device=logits.device)
        for (temperature, top_p, top_k), places in kinds.items():
            how = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
            draws = self._draws[places, [done[place] for place in places]].to(logits.device)
            of_kind = logits if len(places) == len(self._rows) else logits[places]
            chosen[places], logps[places] = pick(of_kind, draws, how)
        for row, token, logp in zip(self._rows, chosen.tolist(), logps.tolist(), strict=True):
            if row is not None:
                row.add(token, logp)
        return chosen

    def _leave(self, everyone: bool = False) -> Tensor | None:
        """Take the places of ended rows out of the batch, and return those that stay if any left.

        Copying the rows that stay costs about as much as one step, so it pays when a quarter of the rows goes.
        """
        stay = [place for place, row in enumerate(self._rows) if row is not None]
        num_ended = len(self._rows) - len(stay)
        if not stay:
            self._prefix, self._rows, self._draws = None, [], self._draws[:0]
            return None
        if not num_ended or (num_ended * 4 < len(self._rows) and not everyone):
            return None
        assert self._prefix is not None
        places = torch.tensor(stay)
        self._rows, self._draws = [*self.rows], self._draws[places]
        places = places.to(self._model.device)
        self._prefix = self._prefix.select(places)
        return places


def _widened(draws: Tensor, width: int) -> Tensor:
    """Return draws [B, T] with columns of zeros behind them: [B, width]."""
    return functional.pad(draws, (0, width - draws.shape[1]))
