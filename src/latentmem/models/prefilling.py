"""How prompts are read before anything follows them: what they share once, and what was read lately not again.

Either the common beginnings of groups are kept, which is all that scoring a group needs, or whole prompts, for chats
that grow and system messages that come again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from latentmem.models.attention import Slots
from latentmem.models.prefix import Prefix, common_length, pad


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
    """A prefix cache: prompts, or beginnings of them, that a frozen model read recently, by their tokens.

    Scoring takes them from here, and so starts from what sampling started from. At most `positions` tokens are kept,
    those used last: 4,096 are 190 MB of keys and values for SmolLM2-135M in float32.
    """

    def __init__(self, positions: int = 4096) -> None:
        self.positions = positions
        self._rows: dict[tuple[str, tuple[int, ...]], Prefix] = {}
        """By the owner and the tokens; those used last come last."""

    def add(self, tokens: tuple[int, ...], row: Prefix, owner: str = "") -> None:
        """Keep one row in place of its own beginnings, and forget the oldest rows if that makes too many tokens."""
        if len(tokens) > self.positions:
            return
        begins = [(of, kept) for of, kept in self._rows if of == owner and tokens[: len(kept)] == kept]
        for beginning in begins:
            del self._rows[beginning]
        self._rows[owner, tokens] = row
        while sum(len(kept) for _, kept in self._rows) > self.positions:
            del self._rows[next(iter(self._rows))]

    def holds(self, tokens: tuple[int, ...], owner: str = "") -> bool:
        """Return whether these tokens are kept, or more that begin with them."""
        return self._row(tokens, owner) is not None

    def longest(self, prompt: Sequence[int], owner: str = "") -> tuple[int, ...]:
        """Return the longest beginning of a prompt that can be found here, without the prompt's last token."""
        best, length = None, 0
        for of, kept in self._rows:
            if of == owner and (same := _num_alike(kept, prompt)) > length:
                best, length = (of, kept), same
        if best is not None:  # it is used, so it becomes the newest
            self._rows[best] = self._rows.pop(best)
        return tuple(prompt[: min(length, len(prompt) - 1)])

    def find(self, beginnings: Sequence[tuple[int, ...]], owners: Sequence[str] | None = None) -> Prefix | None:
        """Return one row per beginning, an empty one for no tokens; return None if any beginning is not kept."""
        longest = max(map(len, beginnings))
        rows = [self._row(*asked) for asked in zip(beginnings, owners or [""] * len(beginnings), strict=True)]
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

    def _row(self, tokens: tuple[int, ...], owner: str) -> Prefix | None:
        """Return a row that begins with these tokens."""
        if not tokens:
            return None
        begin = ((of, kept[: len(tokens)]) for of, kept in self._rows)
        return next((row for row, key in zip(self._rows.values(), begin, strict=True) if key == (owner, tokens)), None)


def _num_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


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


@torch.no_grad()
def prefill_kept(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], owners: Sequence[str], room: int, kept: Kept
) -> tuple[Prefix, list[int]]:
    """Let the frozen model read prompts, each from the longest beginning of it that is kept, and keep them whole.

    What one owner's prompts all begin with is read once, even where nothing of it is kept. Nothing is taken from
    another owner's prompts: how fast an answer comes must not tell what others have asked.

    Args:
        model: a causal LM, whose adapters are switched as they were whenever `kept` was used.
        prompts: token ids, B rows, none empty.
        owners: B names.
        room: number of columns that will be read after the prompts, by `extend`.
        kept: searched first; receives the prompts.

    Returns:
        The prompts, and how many tokens of each were kept before.
    """
    begins = [kept.longest(*asked) for asked in zip(prompts, owners, strict=True)]
    num_kept = [len(begin) for begin in begins]
    shared = common_length(prompts) if len(prompts) > 1 and len(set(owners)) == 1 else 0
    if min(map(len, begins)) < shared <= kept.positions:
        prefill_kept(model, [prompts[0][:shared]], owners[:1], 0, kept)
        begins = [kept.longest(*asked) for asked in zip(prompts, owners, strict=True)]
    names = [str(row) for row in range(len(prompts))]
    begun = Beginnings(
        prefix=kept.find(begins, owners) if any(begins) else None,
        rows={name: row for row, name in enumerate(names)},
        lengths={name: len(begin) for name, begin in zip(names, begins, strict=True)},
    )
    prefix = prefill(model, prompts, names, room, begun)
    for row, (prompt, owner) in enumerate(zip(prompts, owners, strict=True)):
        if len(prompt) <= kept.positions and not kept.holds(tuple(prompt), owner):
            kept.add(tuple(prompt), prefix.alone(row, len(prompt)), owner)
    return prefix, num_kept
