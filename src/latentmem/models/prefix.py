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


@dataclass(frozen=True)
class Beginnings:
    """The common beginning of each group's prompts, read once per group; what all share is read once for all."""

    prefix: Prefix | None
    """One row for each different beginning; None if nothing is shared."""
    rows: dict[str, int]
    """The row of each group."""
    lengths: dict[str, int]
    """Number of tokens that the prompts of each group share."""


class Kept:
    """Beginnings of prompts that a frozen model read recently, by their tokens.

    Scoring takes them from here, and so starts from what sampling started from. At most `positions` tokens are kept,
    the latest ones: 4,096 are 190 MB of keys and values for SmolLM2-135M in float32.
    """

    def __init__(self, positions: int = 4096) -> None:
        self._room = positions
        self._rows: dict[tuple[int, ...], Prefix] = {}

    def add(self, tokens: tuple[int, ...], row: Prefix) -> None:
        """Keep one row, and forget the oldest rows if that makes too many tokens."""
        self._rows.pop(tokens, None)
        self._rows[tokens] = row
        while sum(map(len, self._rows)) > self._room:
            del self._rows[next(iter(self._rows))]

    def find(self, beginnings: Sequence[tuple[int, ...]]) -> Prefix | None:
        """Return one row per beginning, an empty one for no tokens; return None if any beginning is not kept."""
        longest = max(map(len, beginnings))
        rows = [self._rows.get(tokens) for tokens in beginnings]
        first = next((row for row in rows if row is not None), None)
        if first is None or any(row is None and tokens for row, tokens in zip(rows, beginnings, strict=True)):
            return None
        layers = []
        for i, layer in enumerate(first.cache.layers):
            shape = (len(rows), layer.keys.shape[1], longest)
            keys = layer.keys.new_zeros(*shape, layer.keys.shape[3])
            values = layer.values.new_zeros(*shape, layer.values.shape[3])
            for place, (row, tokens) in enumerate(zip(rows, beginnings, strict=True)):
                if row is not None:
                    keys[place, :, : len(tokens)] = row.cache.layers[i].keys[0, :, : len(tokens)]
                    values[place, :, : len(tokens)] = row.cache.layers[i].values[0, :, : len(tokens)]
            layers.append(Slots.holding(keys, values, longest))
        lengths = torch.tensor([len(tokens) for tokens in beginnings], device=first.seen.device)
        seen = torch.arange(longest, device=first.seen.device)[None, :] < lengths[:, None]
        return Prefix(Cache(layers=layers), seen, first.hidden.expand(len(rows), -1))


@torch.no_grad()
def read_beginnings(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], groups: Sequence[str], kept: Kept | None = None
) -> Beginnings:
    """Let the frozen model read what the prompts of each group share.

    What all prompts share, such as one role's system prompt, is read once. For a prompt that is alone in its group,
    only this part is read.

    Args:
        model: a causal LM, whose adapters are switched as they were whenever `kept` was used.
        prompts: as for `prefill`.
        groups: as for `prefill`.
        kept: searched first; receives what is read.
    """
    members: dict[str, list[Sequence[int]]] = {}
    for prompt, group in zip(prompts, groups, strict=True):
        members.setdefault(group, []).append(prompt)
    shared = common_length(prompts) if len(members) > 1 else 0
    lengths = {group: common_length(rows) if len(rows) > 1 else shared for group, rows in members.items()}
    begins = {group: tuple(rows[0][: lengths[group]]) for group, rows in members.items()}
    beginnings = list(dict.fromkeys(begins.values()))  # prompts that are alone in their groups have the same one
    rows = {group: beginnings.index(tokens) for group, tokens in begins.items()}
    longest = max(lengths.values())
    if not longest:
        return Beginnings(None, rows, lengths)
    if kept is not None and (found := kept.find(beginnings)) is not None:
        return Beginnings(found, rows, lengths)
    ids, real = pad(beginnings, model.device)
    embeddings = model.get_input_embeddings()(ids)
    prefix = _empty(model, len(ids), longest)
    if shared:
        once = _empty(model, 1, shared)
        once.extend(model, embeddings[:1, :shared], real[:1, :shared])
        for slots, layer in zip(prefix.cache.layers, once.cache.layers, strict=True):
            slots.update(layer.keys.expand(len(ids), -1, -1, -1), layer.values.expand(len(ids), -1, -1, -1))
        prefix.seen, prefix.hidden = real[:, :shared], once.hidden.expand(len(ids), -1)
    if longest > shared:
        prefix.extend(model, embeddings[:, shared:], real[:, shared:])
    if kept is not None:
        for row, tokens in enumerate(beginnings):
            kept.add(tokens, prefix.select(torch.tensor([row], device=model.device)))
    return Beginnings(prefix, rows, lengths)


def _empty(model: PreTrainedModel, rows: int, room: int) -> Prefix:
    num_layers = model.config.get_text_config().num_hidden_layers
    nothing = torch.zeros(rows, 0, dtype=torch.bool, device=model.device)
    return Prefix(Cache(layers=[Slots(room) for _ in range(num_layers)]), nothing, nothing)


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[str],
    room: int,
    begun: Beginnings | None = None,
) -> Prefix:
    """Let the frozen model read prompts; the common beginning of a group's prompts is read once for the group.

    Args:
        model: a causal LM.
        prompts: token ids, B rows, none empty.
        groups: B names; prompts of one group are expected to share a beginning, but need not.
        room: number of columns that will be read after the prompts, by `extend`.
        begun: the beginnings of these groups, if they were read already; other prompts may have been among them.
    """
    device = model.device
    embed = model.get_input_embeddings()
    begun = begun or read_beginnings(model, prompts, groups)
    ends = [list(prompt[begun.lengths[group] :]) for prompt, group in zip(prompts, groups, strict=True)]  # never empty
    shared = 0 if begun.prefix is None else begun.prefix.seen.shape[1]
    prefix = _empty(model, len(prompts), shared + max(map(len, ends)) + room)
    if begun.prefix is not None:
        rows_of = torch.tensor([begun.rows[group] for group in groups], device=device)
        for slots, layer in zip(prefix.cache.layers, begun.prefix.cache.layers, strict=True):
            slots.update(layer.keys[rows_of], layer.values[rows_of])
        prefix.seen = begun.prefix.seen[rows_of]
    own = [row for row, end in enumerate(ends) if len(end) > 1]
    if shared and 0 < len(own) < len(prompts):
        # A prompt that equals all others of its group has one token left; in this pass it would be nothing but padding.
        ids, real = pad([end[:-1] for end in ends], device)
        rows = torch.tensor(own, device=device)
        part = prefix.select(rows)
        part.extend(model, embed(ids[rows]), real[rows])
        for slots, layer in zip(prefix.cache.layers, part.cache.layers, strict=True):
            slots.adopt(layer, rows)
        prefix.seen = torch.cat([prefix.seen, real], dim=1)
        ends = [end[-1:] for end in ends]
    ids, real = pad(ends, device, left=True)  # the last column holds each row's last token
    prefix.extend(model, embed(ids), real)
    return prefix


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
