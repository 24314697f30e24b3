"""Log-probabilities with gradients from stored messages, fast and within bounded memory.

Equal composer texts are composed once, however many messages use the result. Equal messages of a micro-batch are scored
once, because rollouts of one task often say the same. The graph is cut at the latents: scoring runs in micro-batches
whose gradients add up there, and then one backward pass goes through the composer's own graph. No graph outlives its
micro-batch, and the result is that of one big backward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentmem.memory.composer import Composer
from latentmem.models.language_model import LanguageModel
from latentmem.models.prefilling import Beginnings, Kept
from latentmem.models.prefix import check_window, pad
from latentmem.models.reader import Reader
from latentmem.trajectory import Message


@dataclass(frozen=True)
class Example:
    """One message to score: the text it was composed from, the prompt and the sampled tokens."""

    composer_text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    temperature: float

    @classmethod
    def of(cls, message: Message, model: LanguageModel, composer_text: str, temperature: float) -> "Example":
        """Make the example of a stored message.

        Its prompt is encoded as a rollout with latent memory encodes it: text that another memory had put into the
        prompt is left out.
        """
        served = message.served
        if served is None:
            prompt_ids = model.encode_prompt(message.system, message.user)
        elif message.recalled.text and not message.recalled.num_latents:  # the memory's text is in the stored prompt
            prompt_ids = model.chat.encode_conversation(served.conversation)
        else:
            prompt_ids = list(served.prompt_ids)
        return cls(composer_text, tuple(prompt_ids), message.token_ids, temperature)


def blocks(composer: Composer, examples: Sequence[Example], budget: int) -> Iterator[list[list[int]]]:
    """Yield positions of examples: blocks of composer texts to compose together, each a list of micro-batches.

    A block holds as many texts, padded to the longest, as fit `budget` positions; a micro-batch as many messages; each
    holds at least one. Messages of one text stay together, because their prompts share a beginning. Messages of similar
    length are neighbours, because they are padded to the longest of their micro-batch.
    """
    by_text: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        by_text.setdefault(example.composer_text, []).append(i)
    block: list[int] = []
    num_texts = longest = 0
    for text, rows in by_text.items():
        length = len(composer.backbone.encode(text)) + composer.num_latents
        if block and (num_texts + 1) * max(longest, length) > budget:
            yield _micro_batches(examples, block, composer.num_latents, budget)
            block, num_texts, longest = [], 0, 0
        block += sorted(rows, key=lambda row: len(examples[row].token_ids))
        num_texts, longest = num_texts + 1, max(longest, length)
    if block:
        yield _micro_batches(examples, block, composer.num_latents, budget)


def _micro_batches(examples: Sequence[Example], rows: Sequence[int], num_latents: int, budget: int) -> list[list[int]]:
    return even_batches(rows, {row: num_latents + len(examples[row].token_ids) for row in rows}, budget)


def even_batches(items: Sequence[int], lengths: Mapping[int, int], budget: int) -> list[list[int]]:
    """Return as few micro-batches as `budget` allows, as even as possible: by the smallest budget that gives no more.

    Each item is padded to the longest of its micro-batch; items stay in their order. If seven fit, eight become four
    and four, because a pass with one would cost nearly as much as a pass with four.
    """
    fewest = _fill_up(items, lengths, budget)
    low, high = 0, budget
    while high - low > 1:
        middle = (low + high) // 2
        if len(tried := _fill_up(items, lengths, middle)) == len(fewest):
            high, fewest = middle, tried
        else:
            low = middle
    return fewest


def _fill_up(rows: Sequence[int], lengths: Mapping[int, int], budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        if not batches or (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
            longest = lengths[row]
        batches[-1].append(row)
    return batches


def micro_batches_of(composer: Composer, examples: Sequence[Example], budget: int) -> list[list[int]]:
    """Return all micro-batches of a pass, in order."""
    return [batch for block in blocks(composer, examples, budget) for batch in block]


def read_prompts(model: LanguageModel, examples: Sequence[Example], kept: Kept | None = None) -> Beginnings:
    """Read the common beginnings of the examples' prompts, text by text; `score` then uses them part after part.

    Beginnings that are in `kept` from sampling are not read again.
    """
    with model.as_agent() as agent:
        groups = [example.composer_text for example in examples]
        return agent.read_beginnings([example.prompt_ids for example in examples], groups, kept)


def score(
    model: LanguageModel, examples: Sequence[Example], latents: Tensor, begun: Beginnings | None = None
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the examples' responses under the frozen agents.

    Args:
        model: the agents' LM; its adapters are off during the call.
        examples: B messages of one temperature.
        latents: [B, K, d_agent], one latent memory per message.
        begun: the result of `read_prompts` for these examples and perhaps more.

    Returns:
        logps [B, T] float32, differentiable in the latents, and the mask [B, T] bool, True on response tokens.
    """
    (temperature,) = {example.temperature for example in examples}
    ids, mask = _padded(model, examples, latents)
    with model.as_agent() as agent:
        prefix = _read(agent, examples, latents, ids, begun)
        return agent.response_logps(prefix, latents, ids, mask, temperature), mask


def judge(
    model: LanguageModel, examples: Sequence[Example], latents: Tensor, begun: Beginnings | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Score at temperature 1, without gradients, and say which tokens the frozen agents would pick greedily.

    Returns:
        logps [B, T], exact [B, T] bool (True where a token is the greedy one, and on padding), and the mask [B, T].
    """
    ids, mask = _padded(model, examples, latents)
    with model.as_agent() as agent:
        prefix = _read(agent, examples, latents, ids, begun)
        return *agent.judge_responses(prefix, latents, ids, mask), mask


def _padded(model: LanguageModel, examples: Sequence[Example], latents: Tensor) -> tuple[Tensor, Tensor]:
    longest = max(len(e.prompt_ids) + len(e.token_ids) for e in examples) + latents.shape[1]
    check_window(model.model, longest, "a stored message")
    return pad([example.token_ids for example in examples], model.device)


def _read(agent: Reader, examples: Sequence[Example], latents: Tensor, ids: Tensor, begun: Beginnings | None) -> Any:
    groups = [example.composer_text for example in examples]
    room = latents.shape[1] + ids.shape[1] - 1
    return agent.prefill([example.prompt_ids for example in examples], groups, room, begun)


def accumulate(
    composer: Composer,
    model: LanguageModel,
    examples: Sequence[Example],
    loss_of: Callable[[list[int], Tensor, Tensor], Tensor],
    budget: int,
    composed: Mapping[str, Tensor] | None = None,
    kept: Kept | None = None,
) -> float:
    """Add the gradient of a sum of micro-batch losses to the composer's parameters.

    Args:
        composer: what is trained.
        model: the frozen agents.
        examples: all messages of this pass.
        loss_of: from the rows of a micro-batch (positions in `examples`), logps [B, T] and mask [B, T] to its loss,
            already divided by the divisor of the whole pass.
        budget: positions with gradients in one forward pass.
        composed: latents [K, d_agent] by text, if the composer in its present state has made them already, as in a
            rollout. The composer then runs after the scoring, not before, and its graph is not held meanwhile.
        kept: common beginnings of prompts, as the agents read them in that rollout.

    Returns:
        The summed loss.
    """
    total = torch.zeros((), device=model.device)
    for block in blocks(composer, examples, budget):
        texts, latents = _composed(composer, examples, block, composed)
        leaf = latents.detach().requires_grad_()  # [U, K, d_agent]
        for rows, chosen, again, given, begun in _parts(model, examples, block, texts, leaf, kept):
            logps, mask = score(model, chosen, given, begun)
            loss = loss_of(rows, logps[again], mask[again])
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        (composer.compose(texts) if composed else latents).backward(leaf.grad)  # type: ignore[no-untyped-call]
    return float(total)


@torch.no_grad()
def score_all(
    composer: Composer,
    model: LanguageModel,
    examples: Sequence[Example],
    budget: int,
    composed: Mapping[str, Tensor] | None = None,
    kept: Kept | None = None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield rows, logps [B, T] and mask [B, T] of each micro-batch, without gradients; arguments as of `accumulate`."""
    for block in blocks(composer, examples, budget):
        texts, latents = _composed(composer, examples, block, composed)
        for rows, chosen, again, given, begun in _parts(model, examples, block, texts, latents, kept):
            logps, mask = score(model, chosen, given, begun)
            yield rows, logps[again], mask[again]


@torch.no_grad()
def judge_all(
    composer: Composer, model: LanguageModel, examples: Sequence[Example], budget: int
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Yield the rows of each micro-batch and the result of `judge` for them."""
    for block in blocks(composer, examples, budget):
        texts, latents = _composed(composer, examples, block, None)
        for rows, chosen, again, given, begun in _parts(model, examples, block, texts, latents, None):
            logps, exact, mask = judge(model, chosen, given, begun)
            yield rows, logps[again], exact[again], mask[again]


def _composed(
    composer: Composer, examples: Sequence[Example], block: list[list[int]], composed: Mapping[str, Tensor] | None
) -> tuple[list[str], Tensor]:
    """Return the U different texts of a block and their latents [U, K, d_agent]."""
    texts = list(dict.fromkeys(examples[row].composer_text for batch in block for row in batch))
    return texts, torch.stack([composed[text] for text in texts]) if composed else composer.compose(texts)


def _parts(
    model: LanguageModel,
    examples: Sequence[Example],
    block: list[list[int]],
    texts: Sequence[str],
    latents: Tensor,
    kept: Kept | None,
) -> Iterator[tuple[list[int], list[Example], Tensor, Tensor, Beginnings]]:
    """Yield for each micro-batch of a block: its B rows, their D different examples, the place [B] of each row among
    these, the latents [D, K, d_agent] of these, and the common beginnings of the block's prompts.
    """
    place = {text: i for i, text in enumerate(texts)}
    begun = read_prompts(model, [examples[row] for batch in block for row in batch], kept)
    for rows in block:
        chosen, again = _different([examples[row] for row in rows], model.device)
        index = torch.tensor([place[example.composer_text] for example in chosen], device=latents.device)
        yield rows, chosen, again, latents[index].to(model.device), begun


def _different(examples: Sequence[Example], device: torch.device) -> tuple[list[Example], Tensor]:
    """Return the examples without repetitions, and the place of each given example among them, [B] long."""
    places = {example: i for i, example in enumerate(dict.fromkeys(examples))}
    return list(places), torch.tensor([places[example] for example in examples], device=device)
