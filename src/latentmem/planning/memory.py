"""What one backbone takes of memory: keys and values, what is kept for a backward pass, and what comes and goes.

The numbers follow the fast way of reading (`models/prefix.py`) operation by operation. Tests hold them to what torch
keeps for a backward pass and to what a process was seen to take.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from latentmem.planning.shapes import Shape

_FLOAT = 4
"""Bytes of a number of float32."""
_LOGITS_AT_ONCE = 2**22
"""Number of logits that scoring computes at a time; see `models/fused.py`."""
_READ_TOGETHER = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "gate_proj": "mlp",
    "up_proj": "mlp",
}
"""Linear layers that read the same tensor, by a name for it."""


@dataclass(frozen=True)
class Backbone:
    """A causal LM as it stands in memory."""

    shape: Shape
    item: int
    """Bytes of one of its numbers: 4 for float32, 2 for bfloat16."""
    fused: bool
    """Whether its small operations are replaced by those of `models/fused.py`."""

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return self.shape.parameters * self.item

    @property
    def column(self) -> int:
        """Bytes of the keys and values of one position."""
        return 2 * self.shape.layers * self.shape.key * self.item

    def kept_by_position(self, target_modules: Sequence[str] = (), rank: int = 0) -> int:
        """Return the bytes that a forward pass keeps for its backward pass, for one position; keys and values apart.

        Args:
            target_modules: linear layers with LoRA that is trained; empty for frozen agents.
            rank: LoRA's r.
        """
        shape, item = self.shape, self.item
        # A norm keeps its input, in float32 if it is transformers' own; attention keeps its queries and its result.
        norm = item if self.fused else _FLOAT
        kept = 2 * (shape.width * norm + _FLOAT) + 2 * shape.query * item + shape.heads * _FLOAT
        if shape.head_norms:
            kept += (shape.query + shape.key) * norm + (shape.heads + shape.kv_heads) * _FLOAT
        kept += (2 if self.fused else 3) * shape.feed_forward * item
        read = set()
        for target in target_modules:
            name = target.rpartition(".")[2]
            tensor = _READ_TOGETHER.get(name, name)
            # LoRA is float32: it reads a copy of its own of a bfloat16 input, else the one that its neighbours read.
            if item < _FLOAT or tensor not in read:
                kept += shape.linears[name].inputs * _FLOAT
            read.add(tensor)
            kept += rank * _FLOAT
        once = shape.width * norm + _FLOAT + 2 * shape.head_width * item  # the last norm, and the angles of rotation
        return shape.layers * kept + once

    def mask(self, rows: int, length: int, columns: int) -> int:
        """Return the bytes of the mask of a pass, one for all layers.

        Args:
            rows: rows of the pass.
            length: new positions of each row.
            columns: positions that a row sees, new ones included.
        """
        groups = self.shape.heads // self.shape.kv_heads  # query heads that share keys are stacked
        return rows * length * columns * (1 if length == 1 else groups) * self.item

    def passing(self, positions: int, differentiated: bool) -> int:
        """Return the bytes of the tensors that come and go inside the largest layer, for all positions of a pass."""
        shape, item = self.shape, self.item
        norm = (0 if self.fused else 2) * shape.width * _FLOAT
        attention = (2 * shape.width + 4 * shape.query + 2 * shape.key) * item
        feed_forward = ((4 if differentiated else 3) * shape.feed_forward + 3 * shape.width) * item
        return positions * (norm + max(attention, feed_forward))

    def drawing(self, rows: int, truncated: bool) -> int:
        """Return the bytes of choosing one token of each row: logits, probabilities and their sums.

        Args:
            rows: rows decoded together.
            truncated: whether top-k or top-p is used, which sorts the vocabulary.
        """
        return rows * self.shape.vocabulary * (self.item + (28 if truncated else 16))

    def scoring_logits(self, tokens: int) -> int:
        """Return the bytes of the logits of responses, block by block, and of their derivative [tokens, d]."""
        at_once = min(tokens * self.shape.vocabulary, max(_LOGITS_AT_ONCE, self.shape.vocabulary))
        return at_once * (2 * _FLOAT + self.item) + 2 * tokens * self.shape.width * self.item
