"""Attention over preallocated keys and values: each column is written once, and query heads share keys uncopied."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from latentmem.models.fused import fuse


class Slots(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer in preallocated memory, so that a decoding step copies no earlier column."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.used = 0

    @classmethod
    def holding(cls, keys: Tensor, values: Tensor, used: int) -> Self:
        """Return slots over existing tensors, of which the first `used` columns are written."""
        slots = cls(keys.shape[2])
        slots.keys, slots.values, slots.used, slots.is_initialized = keys, values, used, True
        return slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the memory, now that the shapes are known."""
        rows, heads, _, width = key_states.shape
        self.keys = key_states.new_empty(rows, heads, self.capacity, width)
        self.values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new columns; return all columns so far (a view)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.used + key_states.shape[2]
        self.keys[:, :, self.used : end] = key_states
        self.values[:, :, self.used : end] = value_states
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def adopt(self, further: "Slots", rows: Tensor) -> None:
        """Take over the columns by which some rows were continued; in the other rows these columns are padding."""
        new = slice(self.used, further.used)
        for ours, theirs in ((self.keys, further.keys), (self.values, further.values)):
            ours[:, :, new] = 0  # untouched memory may hold nan, and attention would multiply it by a weight of 0
            ours[rows, :, new] = theirs[:, :, new]
        self.used = further.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of a mask for the next columns."""
        return self.used + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of columns written."""
        return self.used

    def get_max_length(self) -> int:
        """Return the number of columns that fit."""
        return self.capacity


class _Append(torch.autograd.Function):
    """An operation that writes new columns behind finished ones, differentiable in the new ones.

    It copies no old column and stores none twice. Overwriting the new columns while a graph still needs them makes the
    backward pass of that graph raise.
    """

    @staticmethod
    def forward(ctx: Any, new: Tensor, room: Tensor, used: int) -> Tensor:
        ctx.used = used
        end = used + new.shape[2]
        room[:, :, used:end] = new
        return room[:, :, :end]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[:, :, ctx.used :], None, None


_append: Callable[[Tensor, Tensor, int], Tensor] = _Append.apply


class Frozen(Slots):
    """A finished prompt of one layer, continued with gradients in the free columns behind it; `used` never grows."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new columns behind the prompt; return all columns, differentiable in the new ones."""
        return _append(key_states, self.keys, self.used), _append(value_states, self.values, self.used)


def _grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Compute attention of query heads that share keys and values, without copying those for each head.

    The queries that share a head are stacked along time instead. With a mask, transformers does that for a single
    column only and otherwise repeats keys and values; these copies, kept for the backward pass, would be most of what
    scoring stores.

    Args:
        module: the attention layer.
        query: [B, H, T, d].
        key: [B, H', S, d], H a multiple of H'.
        value: [B, H', S, d].
        attention_mask: [B, 1, T, S] bool; or a mask to add, stacked already by `prefix.attend`: [B, 1, T * H / H', S],
            or [B, 1, 1, S] for T = 1; or None for causal attention without padding.
        scaling: factor of the dot products; None is d ** -0.5.
        kwargs: for transformers' own function, which computes attention without a mask.

    Returns:
        [B, T, H, d], and None in place of the attention weights.
    """
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)  # type: ignore[no-any-return]
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    stacks = attention_mask.shape[2] == 1 or attention_mask.shape[2] == groups * length  # a single row is broadcast
    mask = attention_mask if stacks else attention_mask.repeat(1, 1, groups, 1)
    stacked = query.reshape(rows, key.shape[1], groups * length, width)
    output = functional.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(rows, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


_ATTENTION = "latentmem_grouped"
AttentionInterface.register(_ATTENTION, _grouped_attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def may_be_fast(model: PreTrainedModel) -> bool:
    """Return whether, by its configuration, each layer attends to all earlier columns or to a window of them."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return not kinds and not getattr(config, "attn_logit_softcapping", None)


def prepare(model: PreTrainedModel, fused: bool) -> None:
    """Give a causal LM the attention that our masks are made for.

    Args:
        model: the causal LM.
        fused: whether to replace the model's small operations by fast ones too.
    """
    model.set_attn_implementation(_ATTENTION)
    if fused:
        fuse(model)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Return whether the logits are one matrix times the last hidden state, neither scaled nor capped."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return False
    ids = torch.arange(3, device=model.device)[None]
    states = model.base_model(ids, use_cache=False).last_hidden_state
    return torch.allclose(model(ids, use_cache=False).logits, head(states), rtol=1e-3, atol=1e-3)
