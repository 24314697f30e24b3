"""Whole messages with gradients, for agents that are trained themselves: those that begin alike share one row.

Weights that are trained change the keys and values of a prompt too, so nothing can be read beforehand without gradients
as `prefix.py` does. What several messages begin with is read once all the same. A row holds this trunk and behind
it, one after the other, what each message adds, its branch; a mask lets a branch see the trunk and itself, and its
positions go on from the trunk's. One forward and one backward pass through the model give what each message alone
would give, to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latentmem.models.fused import token_logps
from latentmem.models.prefix import attend, common_length, pad

Said = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt, and of the response to it; neither is empty."""

_ATTENTION_AS_DEAR = 4096
"""Columns of a row at which attending to each other costs about as much as the products with the weights.

A layer has about 12 d^2 weights, and attention multiplies 2 d numbers for each pair of columns: equal at 6 d columns,
3456 for SmolLM2-135M, more for larger models.
"""


@dataclass(frozen=True)
class Branched:
    """Messages side by side behind the trunk that they share."""

    messages: tuple[int, ...]
    """Their positions in the list that the rows were made of."""
    trunk: int
    """Tokens that all their prompts begin with."""
    columns: int
    """Tokens of the trunk and of all branches."""

    def joined(self, message: int, own: int, shared: int) -> "Branched":
        """With one message more, of `own` columns alone, whose prompt shares `shared` tokens with the trunk."""
        longer = (self.trunk - shared) * len(self.messages)  # what the trunk loses is in each old branch now
        return Branched((*self.messages, message), shared, self.columns - self.trunk + longer + own)


def grow_rows(messages: Sequence[Said], limit: int) -> list[Branched]:
    """Rows for all messages: neighbours in the order of their prompts share one wherever that is cheaper.

    Args:
        messages: prompts and responses.
        limit: columns of a row with several messages.
    """
    rows: list[Branched] = []
    for i in sorted(range(len(messages)), key=lambda i: list(messages[i][0])):
        prompt, response = messages[i]
        alone = Branched((i,), len(prompt) - 1, len(prompt) + len(response) - 1)
        if rows:
            last = rows[-1]
            shared = min(last.trunk, common_length([messages[last.messages[0]][0], prompt]))
            both = last.joined(i, alone.columns, shared)
            if both.columns <= limit and _cost(both) < _cost(last) + _cost(alone):
                rows[-1] = both
                continue
        rows.append(alone)
    return rows


def _cost(row: Branched) -> float:
    return row.columns + row.columns**2 / _ATTENTION_AS_DEAR


def branch_logps(
    model: PreTrainedModel, rows: Sequence[Branched], messages: Sequence[Said], temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of responses, differentiable in whatever of the model's decoder layers is trained.

    Args:
        model: the causal LM.
        rows: of `grow_rows`; B messages in all.
        messages: what the rows were made of.
        temperature: logits are divided by it; must be above 0.

    Returns:
        logps [B, T] float32 (float64 for a model of float64), the messages in the order of the rows, exactly 0 where
        the mask is False; and the mask [B, T] bool of response tokens.
    """
    device = model.device
    ids: list[list[int]] = []
    branch: list[list[int]] = []  # of each column, from 1; 0 is the trunk
    places: list[list[int]] = []
    predicting: list[tuple[int, int]] = []  # row and column before each response token
    for number, row in enumerate(rows):
        beginning = messages[row.messages[0]][0][: row.trunk]
        ids.append(list(beginning))
        branch.append([0] * row.trunk)
        places.append(list(range(row.trunk)))
        for k, message in enumerate(row.messages, 1):
            prompt, response = messages[message]
            own = [*prompt[row.trunk :], *response[:-1]]
            ids[-1] += own
            branch[-1] += [k] * len(own)
            places[-1] += range(row.trunk, row.trunk + len(own))
            end = len(ids[-1])
            predicting += [(number, column) for column in range(end - len(response), end)]
    branches = pad(branch, device, fill=-1)[0]
    mask = _branch_mask(branches)
    embeddings = model.get_input_embeddings()(pad(ids, device)[0])
    positions = pad(places, device)[0]
    hidden = attend(model, embeddings, mask, positions, positions)  # [R, C, d]
    responses, said = pad([messages[message][1] for row in rows for message in row.messages], device)
    at = torch.tensor(predicting, device=device)
    head = model.get_output_embeddings()
    logps = token_logps(head.weight, head.bias, hidden[at[:, 0], at[:, 1]], responses[said], temperature)
    return logps.new_zeros(said.shape).masked_scatter(said, logps), said


def _branch_mask(branches: Tensor) -> Tensor:
    """Which columns see which: [R, C] long, 0 the trunk, k a branch, -1 padding -> [R, 1, C, C] bool.

    A column sees the trunk and its own branch up to itself. Padding sees what stands there, itself in any case; a
    softmax over nothing would be nan.
    """
    columns = branches.shape[1]
    causal = torch.ones(columns, columns, dtype=torch.bool, device=branches.device).tril()
    seen = branches[:, None, :]
    return (causal & ((seen == 0) | (seen == branches[:, :, None])))[:, None]
