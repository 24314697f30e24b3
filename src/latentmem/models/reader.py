"""How a causal LM is read: one seam behind which the fast path and the plain path stand.

The fast path reads prompts beforehand and keeps their keys and values (`prefix.py`, `branches.py`); the plain path runs
whole sequences (`plain.py`). Both give the same numbers, to rounding; `self_test.py` finds out which way a model takes.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from latentmem.models.branches import Branched, Said, branch_logps
from latentmem.models.prefilling import Beginnings, Kept, prefill, prefill_kept, read_beginnings
from latentmem.models.prefix import Prefix, hidden_states, judge_responses, response_logps


class Reader(Protocol):
    """Reads prompts, latents and responses with one causal LM, under the adapter that is on."""

    model: PreTrainedModel
    is_fast: bool
    """Whether what was read is kept for what comes after it."""

    def read_beginnings(
        self, prompts: Sequence[Sequence[int]], groups: Sequence[str], kept: Kept | None = None
    ) -> Beginnings:
        """Read what the prompts of each group begin with alike; see `prefilling.read_beginnings`."""

    def prefill(
        self, prompts: Sequence[Sequence[int]], groups: Sequence[str], room: int, begun: Beginnings | None = None
    ) -> Any:
        """Read prompts, to be continued by at most `room` columns; returns a `decoding.Continued`; see `prefilling`."""

    def prefill_kept(
        self, prompts: Sequence[Sequence[int]], owners: Sequence[str], room: int, kept: Kept
    ) -> tuple[Any, list[int]]:
        """Read prompts, each from what is kept of it, and keep them; see `prefilling.prefill_kept`."""

    def response_logps(
        self, prefix: Any, latents: Tensor | None, response_ids: Tensor, mask: Tensor, temperature: float
    ) -> Tensor:
        """Score responses, differentiable in the latents; see `prefix.response_logps`."""

    def judge_responses(
        self, prefix: Any, latents: Tensor | None, response_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score responses and say which tokens greedy decoding picks; see `prefix.judge_responses`."""

    def branch_logps(
        self, rows: Sequence[Branched], messages: Sequence[Said], temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Score whole messages, differentiable in a trained adapter; see `branches.branch_logps`."""

    def last_states(self, embeddings: Tensor, real: Tensor) -> Tensor:
        """Return the states after the final norm: embeddings [B, T, d] and real [B, T] bool -> [B, T, d]."""


class FastReader:
    """Reads prompts once and continues them; for models whose layers attend to all earlier columns or to a window."""

    is_fast = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def read_beginnings(
        self, prompts: Sequence[Sequence[int]], groups: Sequence[str], kept: Kept | None = None
    ) -> Beginnings:
        """Read what the prompts of each group begin with alike."""
        return read_beginnings(self.model, prompts, groups, kept)

    def prefill(
        self, prompts: Sequence[Sequence[int]], groups: Sequence[str], room: int, begun: Beginnings | None = None
    ) -> Prefix:
        """Read prompts, to be continued by at most `room` columns."""
        return prefill(self.model, prompts, groups, room, begun)

    def prefill_kept(
        self, prompts: Sequence[Sequence[int]], owners: Sequence[str], room: int, kept: Kept
    ) -> tuple[Prefix, list[int]]:
        """Read prompts, each from what is kept of it, and keep them."""
        return prefill_kept(self.model, prompts, owners, room, kept)

    def response_logps(
        self, prefix: Prefix, latents: Tensor | None, response_ids: Tensor, mask: Tensor, temperature: float
    ) -> Tensor:
        """Score responses, differentiable in the latents."""
        return response_logps(self.model, prefix, latents, response_ids, mask, temperature)

    def judge_responses(
        self, prefix: Prefix, latents: Tensor | None, response_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score responses and say which tokens greedy decoding picks."""
        return judge_responses(self.model, prefix, latents, response_ids, mask)

    def branch_logps(
        self, rows: Sequence[Branched], messages: Sequence[Said], temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Score whole messages, those that begin alike in one row."""
        return branch_logps(self.model, rows, messages, temperature)

    def last_states(self, embeddings: Tensor, real: Tensor) -> Tensor:
        """Return the states after the final norm."""
        return hidden_states(self.model, embeddings, real[:, :0], real)
