"""A model is accepted if it is right: when it is loaded, a few small rows are read in every way that will be used.

The reference is the model as its authors wrote it: each row alone and whole, in the attention that is spelled out
(`eager`). A way is taken only if it gives the same numbers with rows of different length side by side.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latentmem.errors import ModelError
from latentmem.models.attention import may_be_fast, prepare
from latentmem.models.branches import grow_rows
from latentmem.models.fused import unfuse
from latentmem.models.plain import PlainReader
from latentmem.models.prefix import pad
from latentmem.models.reader import FastReader, Reader

logger = logging.getLogger(__name__)

_WINDOWS = ("sliding_window", "attention_chunk_size")
_SHORT = 4


@dataclass(frozen=True)
class _Row:
    """What is read: a prompt, latents behind it, and a response behind those."""

    prompt: list[int]
    latents: Tensor
    """[K, d]; K is 0 in rows without."""
    response: list[int]


def choose_reader(model: PreTrainedModel, name: str, fused: bool) -> Reader:
    """Find the fastest way to read a model that gives the model's own numbers, and prepare the model for it.

    Args:
        model: the causal LM, frozen and in evaluation mode.
        name: its name, for errors.
        fused: whether fast operations may stand in for its own small ones.

    Raises:
        ModelError: a weight or a result is not finite, or the model cannot be read from input embeddings.
    """
    rows = _sample(model)
    loaded_with = model.config._attn_implementation
    with _short_windows(model):
        model.set_attn_implementation("eager")
        wanted = [_reference(model, name, row) for row in rows]
        if may_be_fast(model):
            for with_fused in (True, False) if fused else (False,):
                prepare(model, with_fused)
                fast = FastReader(model)
                if _agrees(fast, rows, wanted):
                    return fast
                unfuse(model)
    logger.warning(
        "model %s runs on the plain path, which reads the whole sequence at each step: the results are the same, but "
        "slower. The fast path does not handle its layers or its logits",
        name,
    )
    with _short_windows(model):
        for attention in dict.fromkeys((loaded_with, "eager")):
            model.set_attn_implementation(attention)
            plain = PlainReader(model)
            if _agrees(plain, rows, wanted):
                return plain
    raise ModelError(
        f"model {name!r} gives different numbers for a row in a batch than for the row alone, so neither sampling nor "
        "training would be right; take another model"
    )


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Let layers that see a window of columns see a short one meanwhile, so that short rows go beyond it."""
    config = model.config.get_text_config()
    windows = {key: value for key in _WINDOWS if isinstance(value := getattr(config, key, None), int) and value > 0}
    for key in windows:
        setattr(config, key, _SHORT)
    try:
        yield
    finally:
        for key, value in windows.items():
            setattr(config, key, value)


def _sample(model: PreTrainedModel) -> list[_Row]:
    """Draw rows from a generator of their own, over the whole vocabulary; two without latents begin alike."""
    random = torch.Generator().manual_seed(0)
    table = model.get_input_embeddings().weight
    spread = table.float().std()

    def tokens(length: int) -> list[int]:
        drawn: list[int] = torch.randint(len(table), (length,), generator=random).tolist()
        return drawn

    def latents(number: int) -> Tensor:
        noise = torch.randn(number, table.shape[1], generator=random)
        return (noise.to(table.device) * spread).to(table.dtype)  # type: ignore[no-any-return]

    trunk = tokens(5)
    shapes = [([], 3, 2, 2), ([], 11, 2, 1), (trunk, 2, 0, 2), (trunk, 4, 0, 1)]
    return [_Row([*begin, *tokens(own)], latents(k), tokens(length)) for begin, own, k, length in shapes]


@torch.no_grad()
def _reference(model: PreTrainedModel, name: str, row: _Row) -> Tensor:
    """Return the log-probabilities [T, V] from which each of a row's T response tokens is predicted."""
    embed = model.get_input_embeddings()
    before = embed(torch.tensor(row.prompt, device=model.device))
    after = embed(torch.tensor(row.response[:-1], dtype=torch.long, device=model.device))
    try:
        logits = model(inputs_embeds=torch.cat([before, row.latents, after])[None], use_cache=False).logits[0]
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model {name!r} does not accept input embeddings ({reason}), and latents are such; take another model"
        ) from None
    logps = logits[-len(row.response) :].double().log_softmax(-1)
    if not bool(logps.isfinite().all()):
        raise ModelError(f"model {name!r}: {_first_not_finite(model)}; take undamaged weights")
    return logps  # type: ignore[no-any-return]


def _first_not_finite(model: PreTrainedModel) -> str:
    for name, tensor in model.named_parameters():
        if not bool(tensor.isfinite().all()):
            return f"weight {name} holds values that are not finite"
    return "its weights are finite, but what it makes of them is not"


@torch.no_grad()
def _agrees(reader: Reader, rows: list[_Row], wanted: list[Tensor]) -> bool:
    """Whether a reader gives the wanted numbers, by sampling step by step and by scoring at once."""
    tolerance = 1e-4 if torch.finfo(reader.model.dtype).eps < 1e-6 else 3e-2
    try:
        return all(
            torch.allclose(found.double(), right, rtol=tolerance, atol=tolerance)
            for found, right in _found(reader, rows, wanted)
        )
    except Exception as error:  # a model's code raises all sorts of things where it meets what it was not written for
        logger.info("%s cannot read this model: %s: %s", type(reader).__name__, type(error).__name__, error)
        return False


def _found(reader: Reader, rows: list[_Row], wanted: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield numbers that a reader gives, each with what it should be."""
    model = reader.model
    with_latents = [i for i, row in enumerate(rows) if len(row.latents)]
    prompts = [rows[i].prompt for i in with_latents]
    latents = torch.stack([rows[i].latents for i in with_latents])
    ids, mask = pad([rows[i].response for i in with_latents], model.device)
    groups = [str(i) for i in with_latents]
    room = latents.shape[1] + ids.shape[1]

    begun = reader.prefill(prompts, groups, room)
    prefix = begun.select(torch.arange(len(prompts), device=model.device))
    scored = reader.response_logps(prefix, latents, ids, mask, 1.0)
    for place, i in enumerate(with_latents):
        yield scored[place][mask[place]], _said(wanted[i], rows[i])

    embed = model.get_input_embeddings()
    for step, further in enumerate((latents, *embed(ids[:, :-1]).split(1, dim=1))):
        begun.extend(model, further, torch.ones(further.shape[:2], dtype=torch.bool, device=model.device))
        logps = begun.logits(model).double().log_softmax(-1)
        for place, i in enumerate(with_latents):
            if step < len(wanted[i]):
                yield logps[place], wanted[i][step]

    without = [i for i, row in enumerate(rows) if not len(row.latents)]
    messages = [(rows[i].prompt, rows[i].response) for i in without]
    branched = grow_rows(messages, limit=64)
    scored, mask = reader.branch_logps(branched, messages, 1.0)
    order = [without[message] for row in branched for message in row.messages]
    for place, i in enumerate(order):
        yield scored[place][mask[place]], _said(wanted[i], rows[i])


def _said(logps: Tensor, row: _Row) -> Tensor:
    """The log-probabilities [T] of a row's response, of those [T, V] of all tokens."""
    return logps.gather(1, torch.tensor(row.response, device=logps.device)[:, None])[:, 0]
