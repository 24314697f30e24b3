"""The one layout of [prompt ; m ; response], for sampling and for scoring alike.

Latent memory m stands after the prompt and attention is causal, so the prompt's keys and values do not depend on the
composer. They are computed once, without gradients, and what the rollouts of one group have in common is computed once
for all of them. Forward and backward passes then run on [m ; response] alone. Rows of a batch differ in length, so a
row may have padding columns between real ones; a boolean mask says which columns are real, and positions count real
columns only. The result equals that of each row alone, up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from latentmem.errors import WindowError
from latentmem.models.attention import Frozen, Slots
from latentmem.models.fused import judge_tokens, product, token_logps


def causal_mask(seen: Tensor, new: Tensor) -> Tensor:
    """Return which columns the new columns attend to.

    Args:
        seen: [B, S] bool, True where an earlier column is real.
        new: [B, T] bool, True where a new column is real.

    Returns:
        [B, 1, T, S + T] bool: a new column sees earlier real columns, and new real columns up to itself. A padding
        column sees itself too, because a softmax over nothing is nan and would spread.
    """
    length = new.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=new.device).tril()
    among_new = (causal & new[:, None, :]) | torch.eye(length, dtype=torch.bool, device=new.device)
    return torch.cat([seen[:, None, :].expand(-1, length, -1), among_new], dim=2)[:, None]


def next_positions(seen: Tensor, new: Tensor) -> Tensor:
    """Number the new columns, counting real ones only. seen: [B, S] bool, new: [B, T] bool -> [B, T] long."""
    return (seen.sum(1, keepdim=True) + new.cumsum(1) - 1).clamp(min=0)


def pad(
    rows: Sequence[Sequence[int]], device: torch.device, fill: int = 0, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids on the right or left: return [B, T] long, and the mask [B, T] bool of real columns."""
    length = max(len(row) for row in rows)
    fills = [[fill] * (length - len(row)) for row in rows]
    ids = torch.tensor([[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, fills, strict=True)])
    columns = torch.arange(length - 1, -1, -1) if left else torch.arange(length)
    mask = columns[None, :] < torch.tensor([len(row) for row in rows])[:, None]
    return ids.long().to(device), mask.to(device)


@dataclass
class Prefix:
    """Prompts that a frozen model has read, one row per prompt, ready to be continued.

    `seen` is [B, P] bool, True on real columns; `hidden` [B, d] is the state after the final norm at each row's last
    column, from which the next token is predicted.
    """

    cache: Cache
    seen: Tensor
    hidden: Tensor

    def extend(self, model: PreTrainedModel, embeddings: Tensor, new: Tensor) -> None:
        """Read further columns, without gradients, and append them to this prefix.

        Args:
            model: the causal LM that read the prompt.
            embeddings: [B, T, d] input embeddings.
            new: [B, T] bool, True on real columns; the last column counts as each row's last.
        """
        self.hidden = hidden_states(model, embeddings, self.seen, new, self.cache)[:, -1]
        self.seen = torch.cat([self.seen, new], dim=1)

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Return the logits [B, V] of the token that follows each row."""
        head = model.get_output_embeddings()
        return product(self.hidden, head.weight, head.bias)

    def select(self, rows: Tensor) -> "Prefix":
        """Return the given rows [R] long as a prefix of their own with the same room."""
        layers = [
            Slots.holding(layer.keys.index_select(0, rows), layer.values.index_select(0, rows), layer.used)
            for layer in self.cache.layers
        ]
        return Prefix(Cache(layers=layers), self.seen[rows], self.hidden[rows])

    def alone(self, row: int, length: int) -> "Prefix":
        """Return one row, of so many real columns, without its padding and without room behind it."""
        real = (~self.seen[row]).to(torch.uint8).argsort(stable=True)[:length]
        one = slice(row, row + 1)
        layers = [
            Slots.holding(layer.keys[one].index_select(2, real), layer.values[one].index_select(2, real), length)
            for layer in self.cache.layers
        ]
        return Prefix(Cache(layers=layers), self.seen.new_ones(1, length), self.hidden[one])

    def joined(self, others: "Prefix", room: int) -> "Prefix":
        """Return these rows and others behind them, with `room` free columns; padding between real columns goes."""
        lengths = torch.cat([self.seen.sum(1), others.seen.sum(1)])
        longest = int(lengths.max())
        layers = []
        for ours, theirs in zip(self.cache.layers, others.cache.layers, strict=True):
            both = []
            for mine, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                made = mine.new_zeros(len(lengths), mine.shape[1], longest + room, mine.shape[3])
                _close_up(mine, self.seen, made[: len(mine)])
                _close_up(other, others.seen, made[len(mine) :])
                both.append(made)
            layers.append(Slots.holding(both[0], both[1], longest))
        seen = torch.arange(longest, device=lengths.device)[None, :] < lengths[:, None]
        return Prefix(Cache(layers=layers), seen, torch.cat([self.hidden, others.hidden]))


def _close_up(columns: Tensor, real: Tensor, into: Tensor) -> None:
    """Copy each row's real columns to the front of its new row: [B, H, S', d], real [B, S] bool -> [B, H, L, d]."""
    length = min(real.shape[1], into.shape[2])
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, None, :length, None]
    shape = (-1, columns.shape[1], -1, columns.shape[3])
    into[:, :, :length] = columns.gather(2, order.expand(shape))


def hidden_states(
    model: PreTrainedModel, embeddings: Tensor, seen: Tensor, new: Tensor, cache: Cache | None = None
) -> Tensor:
    """Return hidden states, after the final norm, of new columns that follow those in a cache.

    embeddings: [B, T, d]; seen: [B, S] bool, the columns in the cache (S = 0 without one); new: [B, T] bool, True on
    real columns -> [B, T, d].
    """
    among = torch.cat([seen, new], dim=1).cumsum(1) - 1  # the position of each column, where it is real
    return attend(model, embeddings, causal_mask(seen, new), next_positions(seen, new), among, cache)


def attend(
    model: PreTrainedModel,
    embeddings: Tensor,
    mask: Tensor,
    positions: Tensor,
    among: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """Return hidden states, after the final norm, of new columns that see what a mask allows.

    embeddings: [B, T, d]; mask: [B, 1, T, S + T] bool over the S columns in the cache and the new ones, none of its
    rows all False; positions: [B, T] long, of the new columns; among: [B, S + T] long, of all of them -> [B, T, d].
    """
    output = model.base_model(
        inputs_embeds=embeddings,
        attention_mask=_masks(model, mask, positions, among, embeddings.dtype),
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state  # type: ignore[no-any-return]


def _masks(
    model: PreTrainedModel, mask: Tensor, positions: Tensor, among: Tensor, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Return the mask that the layers take: one per kind of layer if some see only a window of the last columns."""
    config = model.config.get_text_config()
    groups = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    def added(seen: Tensor) -> Tensor:
        # Made and stacked once: given a bool one, torch's attention would make and keep such a mask in every layer.
        made = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)
        return made if seen.shape[2] == 1 else made.repeat(1, 1, groups, 1)

    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not window or kinds == {"full_attention"} or mask.shape[3] <= window:
        return added(mask)
    near = among[:, None, None, :] > positions[:, None, :, None] - window
    windowed = added(mask & near)
    if not kinds or kinds == {"sliding_attention"}:
        return windowed
    return {"full_attention": added(mask), "sliding_attention": windowed}


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, leaving out the last token of the shortest prompt.

    >>> common_length([[1, 2, 3, 4], [1, 2, 9]]), common_length([[1, 2], [1, 2]])
    (2, 1)
    """
    limit = min(len(prompt) for prompt in prompts) - 1
    first = prompts[0]
    for i in range(limit):
        if any(prompt[i] != first[i] for prompt in prompts[1:]):
            return i
    return limit


def response_logps(
    model: PreTrainedModel,
    prefix: Prefix,
    latents: Tensor | None,
    response_ids: Tensor,
    mask: Tensor,
    temperature: float,
) -> Tensor:
    """Compute log-probabilities of responses under the frozen model, differentiable in the latents.

    Args:
        model: the causal LM that read the prefix.
        prefix: B prompts, with room for K + T - 1 columns; they stay as they are, the columns behind are overwritten.
        latents: [B, K, d] latent memories, or None for prompts without.
        response_ids: [B, T] long, right-padded.
        mask: [B, T] bool, True on response tokens.
        temperature: logits are divided by it; must be above 0.

    Returns:
        [B, T] float32 (float64 for a model of float64), exactly 0 where the mask is False.
    """
    head = model.get_output_embeddings()
    predicting = _predicting(model, prefix, latents, response_ids, mask)
    logps = token_logps(head.weight, head.bias, predicting, response_ids[mask], temperature)
    return logps.new_zeros(mask.shape).masked_scatter(mask, logps)


@torch.no_grad()
def judge_responses(
    model: PreTrainedModel, prefix: Prefix, latents: Tensor | None, response_ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities of responses at temperature 1, and which of their tokens greedy decoding would pick.

    Each token is predicted from the response before it. So a response whose tokens are all picked is, up to rounding,
    the one that greedy decoding gives.

    Args:
        model: as for `response_logps`, like the other arguments.
        prefix: B prompts.
        latents: [B, K, d] or None.
        response_ids: [B, T] long.
        mask: [B, T] bool.

    Returns:
        logps [B, T], exactly 0 where the mask is False, and [B, T] bool, True where the mask is False.
    """
    head = model.get_output_embeddings()
    predicting = _predicting(model, prefix, latents, response_ids, mask)
    logps, picked = judge_tokens(head.weight, head.bias, predicting, response_ids[mask])
    return logps.new_zeros(mask.shape).masked_scatter(mask, logps), (~mask).masked_scatter(mask, picked)


def _predicting(
    model: PreTrainedModel, prefix: Prefix, latents: Tensor | None, response_ids: Tensor, mask: Tensor
) -> Tensor:
    """Return the hidden states [N, d] from which the N response tokens are predicted, row by row."""
    embeddings = model.get_input_embeddings()(response_ids[:, :-1])
    new = mask[:, :-1]
    if latents is not None:
        embeddings = torch.cat([latents.to(embeddings.dtype), embeddings], dim=1)  # [B, K + T - 1, d]
        new = torch.cat([new.new_ones(latents.shape[:2]), new], dim=1)
    length = response_ids.shape[1] - (latents is None)
    predicting = prefix.hidden[:, None]  # the column before each response token
    if new.shape[1]:
        cache = Cache(layers=[Frozen.holding(layer.keys, layer.values, layer.used) for layer in prefix.cache.layers])
        hidden = hidden_states(model, embeddings, prefix.seen, new, cache)[:, -length:]
        predicting = hidden if latents is not None else torch.cat([predicting, hidden], dim=1)
    return predicting[mask]


def check_window(model: PreTrainedModel, length: int, what: str) -> None:
    """Refuse a sequence that does not fit the model.

    Raises:
        WindowError: `length` tokens exceed the context window.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise WindowError(
            f"{what} needs {length} tokens with its latents and response, but the model's window is {limit}; "
            "shorten the task, the responses (sampling.max_response_tokens) or take a model with a longer window"
        )
