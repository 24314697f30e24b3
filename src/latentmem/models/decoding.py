"""Sampling of tokens after a prefix: each row has its own random numbers and leaves the batch when it has ended."""

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from latentmem.config import Sampling

_FIRST_CHECKS = frozenset({2, 4})
_CHECK_EVERY = 8
"""Decoding steps between checks for rows that have ended; each check makes a GPU wait. Two checks come earlier
(`_FIRST_CHECKS`), because agents may answer with one word."""


class Continued(Protocol):
    """Rows that a model has read and that can be continued."""

    def extend(self, model: PreTrainedModel, embeddings: Tensor, new: Tensor) -> None:
        """Read further columns: embeddings [B, T, d], and [B, T] bool, True on real columns."""

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Return the logits [B, V] of the token that follows each row."""

    def select(self, rows: Tensor) -> Self:
        """Return the given rows [R] long."""

    def joined(self, others: Self, room: int) -> Self:
        """Return these rows and others behind them, to be continued by at most `room` columns."""


def stack_latents(latents: Sequence[Tensor | None]) -> Tensor | None:
    """Stack B latent memories [K, d] to [B, K, d]; return None if no prompt has any. A mix of both is a bug."""
    present = [latent for latent in latents if latent is not None]
    if not present:
        return None
    assert len(present) == len(latents), "a batch mixes prompts with and without latents"
    return torch.stack(present)


def draw_uniform(seeds: Sequence[int], length: int) -> Tensor:
    """Draw uniform numbers in [0, 1): [B, length] float64, each row from its own seed alone."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(seed)).random(length) for seed in seeds]))


def decode(
    model: PreTrainedModel, prefix: Continued, draws: Tensor, sampling: Sampling, eos_ids: frozenset[int]
) -> tuple[Tensor, Tensor]:
    """Sample token by token after a prefix; rows that have ended leave the batch.

    Args:
        model: the causal LM that read the prefix.
        prefix: B prompts; the call uses it up.
        draws: [B, T] float64 in [0, 1), one number per token.
        sampling: how to draw.
        eos_ids: tokens that end a row.

    Returns:
        Token ids [B, T'] and log-probabilities [B, T'] float32, T' <= T; entries after a row's EOS are meaningless.
    """
    num_rows, length = draws.shape
    tokens = torch.full((num_rows, length), -1, dtype=torch.long, device=draws.device)
    logps = torch.zeros(num_rows, length, dtype=torch.float32, device=draws.device)
    eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=draws.device)
    alive = torch.arange(num_rows, device=draws.device)  # the original row of each row still in the batch
    ended = torch.zeros(num_rows, dtype=torch.bool, device=draws.device)
    embed = model.get_input_embeddings()
    for t in range(length):
        chosen, chosen_logps = pick(prefix.logits(model), draws[alive, t], sampling)
        tokens[alive, t], logps[alive, t] = chosen, chosen_logps
        ended = ended | torch.isin(chosen, eos)
        if t == length - 1:
            break
        if t + 1 in _FIRST_CHECKS or (t + 1) % _CHECK_EVERY == 0:
            num_ended = int(ended.sum())
            if num_ended == len(alive):
                return tokens[:, : t + 1], logps[:, : t + 1]
            # Copying the rows that stay costs about as much as one step, so it pays when a quarter of the rows goes.
            if num_ended * 4 >= len(alive):
                stay = (~ended).nonzero()[:, 0]
                prefix, alive, ended, chosen = prefix.select(stay), alive[stay], ended[stay], chosen[stay]
        real = torch.ones(len(alive), 1, dtype=torch.bool, device=draws.device)
        prefix.extend(model, embed(chosen[:, None]), real)
    return tokens, logps


def pick(logits: Tensor, draws: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Choose the next token of each row by inverting the cumulative distribution.

    Args:
        logits: [B, V].
        draws: [B] float64 in [0, 1).
        sampling: temperature first, then top-k, then top-p (the fewest most likely tokens whose sum reaches it).

    Returns:
        Token ids [B] and their log-probabilities [B] float32 under the tempered distribution *before* top-k and top-p,
        which is what training computes. At temperature 0: the most likely token, with its log-probability at 1.
    """
    logps = (logits.float() / (sampling.temperature or 1.0)).log_softmax(1)
    if sampling.temperature == 0:
        chosen = logps.argmax(1)
        return chosen, logps.gather(1, chosen[:, None])[:, 0]
    probs = logps.exp()  # [B, V]
    order = None
    if sampling.top_k or sampling.top_p < 1:
        probs, order = probs.sort(dim=1, descending=True, stable=True)
        if sampling.top_k:
            probs[:, sampling.top_k :] = 0
        if sampling.top_p < 1:
            kept = probs / probs.sum(1, keepdim=True)
            probs[kept.cumsum(1) - kept >= sampling.top_p] = 0
    cumulative = probs.cumsum(1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # A draw below 1, times the total, stays below the total in float64, so it falls on a token with probability.
    # The clamp is for logits that are not finite: they lead to position V, where a GPU would abort.
    position = torch.searchsorted(cumulative, draws[:, None] * total, right=True).clamp(max=probs.shape[1] - 1)
    chosen = order.gather(1, position) if order is not None else position
    return chosen[:, 0], logps.gather(1, chosen)[:, 0]
