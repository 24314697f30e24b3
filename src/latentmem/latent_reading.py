"""Say what each latent says, in words: the tokens of the agents' vocabulary that are nearest to it.

Latents are given in the place of token embeddings, so they are read as points among them. All embeddings of a model
have a large part in common, which is subtracted from both sides first; the rest is compared by its cosine. A slot is
read as its word alone, without gate and frame. Any other latent is read whole, because what remains without its frame
or bias is near to no word. This does not tell what a latent is good for: for that, each latent is also left out and
the responses are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from latentmem.carrying import message_logps
from latentmem.config import Sampling
from latentmem.kept_readings import LatentReading, reading_cells
from latentmem.memory.composer import Composer
from latentmem.memory.memory import Recall
from latentmem.models.agent import Prompt
from latentmem.models.language_model import LanguageModel
from latentmem.trajectory import Message

NUM_NEAREST = 3
"""Nearest tokens shown for each latent."""
MAX_CHARACTERS = 60
"""Length at which a response is cut in a table."""

SHARPNESS = 30.0
"""Factor of the cosine. Measured on SmolLM2-135M: a token's own embedding, rare or common, then gives it a share of
four fifths or more; random vectors give less than a hundredth."""
_ROWS = 8192
"""Rows of the vocabulary that are compared at once."""
_CLOSED = 1e-3
"""A gate below this leaves nothing of its word to read; such a slot is read whole."""


@dataclass(frozen=True)
class WithoutLatent:
    """What changes in a greedy response when one latent is left out."""

    response: str
    """The greedy response with the other latents."""
    change: float
    """Log-probability of the original response with the other latents minus that with all, in nats."""


def nearest_tokens(vectors: Tensor, embeddings: Tensor, k: int = NUM_NEAREST) -> list[list[tuple[int, float]]]:
    """Find the tokens nearest to each vector, with their shares.

    Let c_v be the cosine of the vector and token v's embedding after the mean embedding is subtracted from both. The
    share of token v is softmax(30 c)_v: the shares of all tokens sum to 1, and are equal where no token is nearer.

    Args:
        vectors: [K, d].
        embeddings: [V, d], one row for each token.
        k: number of tokens to return.

    Returns:
        K lists of at most k token ids and shares, nearest first.
    """
    centre = embeddings.float().mean(dim=0)
    directions = normalize(vectors.float() - centre, dim=1)
    blocks = (embeddings[i : i + _ROWS].float() - centre for i in range(0, len(embeddings), _ROWS))
    parts = [directions @ normalize(rows, dim=1).T for rows in blocks]
    shares = (SHARPNESS * torch.cat(parts, dim=1)).softmax(dim=1)  # [K, V]
    top = shares.topk(min(k, shares.shape[1]), dim=1)
    return [list(zip(*row, strict=True)) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


@torch.no_grad()
def read_out(composer: Composer, agents: LanguageModel, latents: Tensor) -> list[LatentReading]:
    """Read K latents that the composer composed with its present weights.

    Args:
        composer: unchanged since it composed them.
        agents: the model whose vocabulary is read from.
        latents: [K, d_agent].
    """
    embeddings = agents.model.get_input_embeddings().weight[: len(agents.tokenizer)]  # [V, d_agent]; without padding
    latents = latents.to(embeddings.device)
    gates: list[float | None] = [None] * len(latents)
    frames: list[tuple[str, float] | None] = [None] * len(latents)
    read = latents
    if composer.slots is None:
        composed = latents - composer.projection.bias.to(latents)
    else:
        frame, gate = composer.frame.to(latents), composer.gate.to(latents)
        composed = latents - frame
        gates[: composer.slots] = gate.tolist()
        # The gate scales the word. Undoing it makes the word a mean of embeddings again, not a point away from them.
        open_slots = gate.abs() > _CLOSED
        words = composed[: composer.slots] / gate.where(open_slots, 1)[:, None]
        words = words.where(open_slots[:, None], latents[: composer.slots])
        read = torch.cat([words, latents[composer.slots :]])
        nearest = _spelled(agents, frame, embeddings, 1)
        frames = [tokens[0] if row.any() else None for row, tokens in zip(frame, nearest, strict=True)]
    usual = embeddings.float().square().sum(1).mean().sqrt()
    lengths = (composed.float().norm(dim=1) / usual).tolist()
    rows = zip(gates, lengths, _spelled(agents, read, embeddings, NUM_NEAREST), frames, strict=True)
    return [LatentReading(*row) for row in rows]


def _spelled(agents: LanguageModel, vectors: Tensor, embeddings: Tensor, k: int) -> list[tuple[tuple[str, float], ...]]:
    found = nearest_tokens(vectors, embeddings, k)
    return [tuple((spell_token(agents, token), share) for token, share in row) for row in found]


@torch.no_grad()
def leave_out_each(model: LanguageModel, message: Message, latents: Tensor, limit: int) -> list[WithoutLatent]:
    """For each latent sample the greedy response without it, and score how much less likely the original becomes.

    The K - 1 other latents close up. The original response is not sampled again: its recorded tokens are scored.

    Args:
        model: the agents.
        message: what was said with all latents.
        latents: [K, d_agent], those that the message's role was given.
        limit: longest response, in tokens.

    Raises:
        ModelError: the prompt does not fit the context window.
    """
    num = len(latents)
    left = [torch.cat([latents[:k], latents[k + 1 :]]) if num > 1 else None for k in range(num)]
    chat = None if message.served is None else message.served.conversation
    prompts = [
        Prompt(
            role=message.role,
            system=message.system,
            user=message.recalled.before(message.user),
            group=f"{message.role} without a latent",
            seed=0,
            latents=rest,
            conversation=chat,
        )
        for rest in left
    ]
    sampled = model.respond(prompts, Sampling(temperature=0, max_response_tokens=limit))
    given = [(message, Recall(message.recalled, rest)) for rest in (latents, *left)]
    with_all, *without = (float(logps.sum()) for logps in message_logps(model, given))
    return [WithoutLatent(response.text, logp - with_all) for response, logp in zip(sampled, without, strict=True)]


# In words


def spell_token(model: LanguageModel, token: int) -> str:
    """Return a token's text with visible blanks; for a part of a character, the tokenizer's name of the token."""
    text = model.spell([token])
    if not text or "\ufffd" in text:
        text = str(model.tokenizer.convert_ids_to_tokens(token))
    return visible(text).replace(" ", "\u2423")


def visible(text: str) -> str:
    r"""Return the text on one line; characters that are invisible or move their surroundings are escaped as in Python.

    >>> print(visible("a\n\u202eb\\"))
    a\n\u202eb\\
    """
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode("ascii") for c in text)


def format_reading(
    title: str,
    after: Sequence[LatentReading],
    before: Sequence[LatentReading] | None,
    without: Sequence[WithoutLatent],
    response: str,
) -> str:
    """Format the table of one role.

    Args:
        title: the line above the table.
        after: what each of the K latents says now.
        before: what each said before training, if it was trained.
        without: what each latent's absence changes in the response; empty if the role said nothing.
        response: what the role said with all latents.
    """
    cells = reading_cells(after, before)
    if without:
        cells[0].append("without it")
        for row, found in zip(cells[1:], without, strict=True):
            said = "the same" if found.response == response else _quoted(found.response)
            row.append(f"{said} ({found.change:+.2f} nats)")
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    said = f"with all: {_quoted(response)}" if without else "it said nothing in the first turn"
    return "\n".join([title, *lines, said])


def _quoted(text: str) -> str:
    shown = visible(text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}...")
    return '"' + shown.replace('"', '\\"') + '"'
