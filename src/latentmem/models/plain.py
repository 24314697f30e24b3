"""The plain path through a causal LM: whole sequences, the model's own attention and its own logits.

It is right for any model that takes input embeddings and looks at no later column: state-space and hybrid layers,
attention in chunks, capped scores, scaled logits. It keeps nothing between two passes, so each sampled token costs a
pass over all that stands before it. The fast path (`reader.py`) is taken wherever it gives the same numbers.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from latentmem.models.branches import Branched, Said
from latentmem.models.prefilling import Beginnings, Kept
from latentmem.models.prefix import pad


@dataclass
class PlainPrefix:
    """Rows to be continued, as the embeddings of all their columns.

    `embeddings` is [B, S, d]; `seen` [B, S] bool is True on real columns. Holes are left out before the model reads.
    """

    reader: "PlainReader"
    embeddings: Tensor
    seen: Tensor

    def extend(self, model: PreTrainedModel, embeddings: Tensor, new: Tensor) -> None:
        """Add further columns: embeddings [B, T, d], and [B, T] bool, True on real columns."""
        self.embeddings = torch.cat([self.embeddings, embeddings.to(self.embeddings.dtype)], dim=1)
        self.seen = torch.cat([self.seen, new], dim=1)

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Read all rows, and return the logits [B, V] of the token that follows each."""
        last = self.seen.sum(1) - 1
        longest = int(last.max()) + 1  # with the padding behind it, rows may be longer than the model's window
        return self.reader.logits(_closed_up(self.embeddings, self.seen)[:, :longest], last[:, None])[:, 0]

    def select(self, rows: Tensor) -> "PlainPrefix":
        """Return the given rows [R] long."""
        return PlainPrefix(self.reader, self.embeddings[rows], self.seen[rows])

    def joined(self, others: "PlainPrefix", room: int) -> "PlainPrefix":
        """Return these rows and others behind them; padding between real columns goes."""
        longest = int(torch.cat([self.seen.sum(1), others.seen.sum(1)]).max())
        embeddings, seen = [], []
        for rows in (self, others):
            closed, num_real = _closed_up(rows.embeddings, rows.seen)[:, :longest], rows.seen.sum(1, keepdim=True)
            embeddings.append(functional.pad(closed, (0, 0, 0, longest - closed.shape[1])))
            seen.append(torch.arange(longest, device=num_real.device)[None, :] < num_real)
        return PlainPrefix(self.reader, torch.cat(embeddings), torch.cat(seen))


class PlainReader:
    """Reads with whole forward passes of the model; see `Reader` for what each method returns."""

    is_fast = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._picks_columns = "logits_to_keep" in inspect.signature(model.forward).parameters
        named = (model.base_model, model.get_decoder(), getattr(model, "model", None))  # not each class names them all
        self._decoder = next(found for found in named if found is not None and found is not model)

    def read_beginnings(
        self, prompts: Sequence[Sequence[int]], groups: Sequence[str], kept: Kept | None = None
    ) -> Beginnings:
        """Read nothing: nothing can be kept for later."""
        return Beginnings(None, {}, {})

    def prefill(
        self, prompts: Sequence[Sequence[int]], groups: Sequence[str], room: int, begun: Beginnings | None = None
    ) -> PlainPrefix:
        """Embed the prompts; they are read when logits are asked for."""
        ids, real = pad(prompts, self.model.device)
        return PlainPrefix(self, self.model.get_input_embeddings()(ids), real)

    def prefill_kept(
        self, prompts: Sequence[Sequence[int]], owners: Sequence[str], room: int, kept: Kept
    ) -> tuple[PlainPrefix, list[int]]:
        """Embed the prompts; nothing can be kept."""
        return self.prefill(prompts, owners, room), [0] * len(prompts)

    def response_logps(
        self, prefix: PlainPrefix, latents: Tensor | None, response_ids: Tensor, mask: Tensor, temperature: float
    ) -> Tensor:
        """Score responses [B, T] behind prompts and latents; differentiable in the latents and in trained adapters."""
        logps = (self._predicting(prefix, latents, response_ids, mask) / temperature).log_softmax(-1)
        chosen = logps.gather(-1, response_ids[..., None])[..., 0]
        return chosen.masked_fill(~mask, 0.0)

    @torch.no_grad()
    def judge_responses(
        self, prefix: PlainPrefix, latents: Tensor | None, response_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score responses at temperature 1, and say which tokens are the most likely ones."""
        logps = self._predicting(prefix, latents, response_ids, mask).log_softmax(-1)
        chosen = logps.gather(-1, response_ids[..., None])[..., 0]
        return chosen.masked_fill(~mask, 0.0), (logps.argmax(-1) == response_ids) | ~mask

    def branch_logps(
        self, rows: Sequence[Branched], messages: Sequence[Said], temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Score each message on its own, in the order of the rows."""
        said = [messages[message] for row in rows for message in row.messages]
        prefix = self.prefill([prompt for prompt, _ in said], [""] * len(said), 0)
        ids, mask = pad([response for _, response in said], self.model.device)
        return self.response_logps(prefix, None, ids, mask, temperature), mask

    def last_states(self, embeddings: Tensor, real: Tensor) -> Tensor:
        """Return the states after the final norm: embeddings [B, T, d] and real [B, T] bool -> [B, T, d]."""
        states = self._decoder(inputs_embeds=_closed_up(embeddings, real), use_cache=False).last_hidden_state
        places = (real.cumsum(1) - 1).clamp(min=0)  # where each real column stands once the holes are gone
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))  # type: ignore[no-any-return]

    def logits(self, embeddings: Tensor, columns: Tensor) -> Tensor:
        """Return the model's own logits at some columns, at least in float32.

        Args:
            embeddings: [B, L, d], real columns first.
            columns: [B, C] long.

        Returns:
            [B, C, V].
        """
        kept = {}
        if self._picks_columns:  # the others' logits would take most of the memory
            wanted, columns = torch.unique(columns, return_inverse=True)
            kept = {"logits_to_keep": wanted}
        # Without a mask: later columns are not looked at, so padding behind a row changes nothing in it.
        logits: Tensor = self.model(inputs_embeds=embeddings, use_cache=False, **kept).logits
        picked = logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1]))
        return picked.to(torch.promote_types(picked.dtype, torch.float32))

    def _predicting(self, prefix: PlainPrefix, latents: Tensor | None, response_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the logits [B, T, V] from which each response token is predicted."""
        parts, seen = [prefix.embeddings], [prefix.seen]
        if latents is not None:
            parts.append(latents.to(prefix.embeddings.dtype))
            seen.append(torch.ones(latents.shape[:2], dtype=torch.bool, device=mask.device))
        parts.append(self.model.get_input_embeddings()(response_ids[:, :-1]))
        seen.append(mask[:, :-1])
        real = torch.cat(seen, dim=1)
        before = torch.cat(seen[:-1], dim=1).sum(1)  # [B], columns before the response
        steps = torch.arange(response_ids.shape[1], device=mask.device)
        columns = (before[:, None] - 1 + steps).clamp(max=real.shape[1] - 1)
        return self.logits(_closed_up(torch.cat(parts, dim=1), real), columns)


def _closed_up(embeddings: Tensor, real: Tensor) -> Tensor:
    """Move each row's real columns to its front, in their order; what stands behind them means nothing."""
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    return embeddings.gather(1, order[..., None].expand_as(embeddings))
