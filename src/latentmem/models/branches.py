"""Log-probabilities of whole messages with gradients, for agents that are trained themselves.

Trained weights change the keys and values of a prompt too, so no prompt can be read beforehand without gradients as
`prefix.py` does. Still, what several messages begin with is read once. A row holds this common beginning, the trunk,
and behind it, one after the other, what each message adds: its branch. A mask lets a branch see the trunk and itself,
and its positions continue from the trunk's. One forward and one backward pass through the model give, up to rounding,
what each message alone would give.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latentmem.models.fused import token_logps
from latentmem.models.prefix import attend, common_length, pad

Said = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of the response to it; neither is empty."""

_ATTENTION_AS_DEAR = 4096
"""Number of columns in a row at which attention costs about as much as the products with the weights.

A layer has about 12 d^2 weights, and attention multiplies 2 d numbers for each pair of columns. Both cost the same at
6 d columns: 3456 for SmolLM2-135M, more for larger models.
"""


@dataclass(frozen=True)
class Branched:
    """One row: a trunk that several messages share, and a branch for each message."""

    messages: tuple[int, ...]
    """The indices of the row's messages in the list of all messages."""
    trunk: int
    """Number of tokens that all their prompts begin with."""
    columns: int
    """Number of tokens in the trunk and all branches."""

    def joined(self, message: int, own: int, shared: int) -> "Branched":
        """Return the row with one more message, `own` columns long, that shares `shared` tokens with the trunk."""
        longer = (self.trunk - shared) * len(self.messages)  # what the trunk loses goes into each old branch
        return Branched((*self.messages, message), shared, self.columns - self.trunk + longer + own)


def grow_rows(messages: Sequence[Said], limit: int) -> list[Branched]:
    """Group all messages into rows: neighbours in the sorted order of prompts share a row wherever that is cheaper.

    Args:
        messages: prompts and responses.
        limit: the most columns of a row with several messages.
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
    """Compute log-probabilities of responses, differentiable in the trained weights of the decoder layers.

    Args:
        model: the causal LM.
        rows: made by `grow_rows`; they hold B messages in all.
        messages: the list that the rows were made from.
        temperature: logits are divided by it; must be above 0.

    Returns:
        logps [B, T] float32 (float64 for a model of float64), with messages in the order of the rows, exactly 0 where
        the mask is False; and the mask [B, T] bool, True on response tokens.
    """
    device = model.device
    ids: list[list[int]] = []
    branch: list[list[int]] = []  # the number of each column's branch, from 1; 0 is the trunk
    places: list[list[int]] = []
    predicting: list[tuple[int, int]] = []  # the row of each response token, and the column before it
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
    """Return which columns see which: [R, C] long, 0 the trunk, k a branch, -1 padding -> [R, 1, C, C] bool.

    A column sees the trunk and its own branch up to itself. Padding counts as a branch and so sees at least itself; a
    softmax over nothing would be nan.
    """
    columns = branches.shape[1]
    causal = torch.ones(columns, columns, dtype=torch.bool, device=branches.device).tril()
    seen = branches[:, None, :]
    return (causal & ((seen == 0) | (seen == branches[:, :, None])))[:, None]
