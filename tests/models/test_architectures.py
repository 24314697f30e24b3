"""Causal language models of every kind: each is read right, by the fast path or by the plain one, or refused."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from architectures import ALWAYS, FAST, PLAIN, tiny
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from latentmem.config import Sampling
from latentmem.errors import ModelError
from latentmem.models.agent import Prompt
from latentmem.models.branches import grow_rows
from latentmem.models.language_model import LanguageModel
from latentmem.training.scoring import Example, judge, score

USERS = ("12 + 7?", "The capital of the country where the team sits, and why it is the capital?", "Plan.")
K = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def by_hand(
    model: PreTrainedModel, prompt: Sequence[int], latents: Tensor | None, response: Sequence[int], temperature: float
) -> Tensor:
    """One row alone, whole, in the attention that is spelled out, from the model's own logits."""
    embed = model.get_input_embeddings()
    parts = [embed(torch.tensor(prompt)), *([] if latents is None else [latents]), embed(torch.tensor(response))]
    logits = model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0, -len(response) - 1 : -1]
    return (logits / temperature).log_softmax(1).gather(1, torch.tensor(response)[:, None])[:, 0]


def check(kind: str, way: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sampling, scoring, its gradient, judging and whole messages against the model by hand."""
    lm = LanguageModel(tiny(kind, len(tokenizer)), tokenizer, kind, fused=True)
    with lm.as_agent() as reader:
        assert ("fast" if reader.is_fast else "plain") == way
    latents = torch.randn(len(USERS), K, lm.width, generator=torch.Generator().manual_seed(1)) * 0.3
    prompts = [Prompt("r", "You add.", user, "g", i, latents[i]) for i, user in enumerate(USERS)]
    said = lm.respond(prompts, Sampling(temperature=0.8, max_response_tokens=5))
    ids = [tuple(lm.encode_prompt(prompt.system, prompt.user)) for prompt in prompts]
    assert max(map(len, ids)) > 16, "no window is exceeded; the test is void"
    examples = [Example(str(i), ids[i], one.token_ids, 0.8) for i, one in enumerate(said)]

    given = latents.clone().requires_grad_()
    logps, mask = score(lm, examples, given)
    for row, one in enumerate(said):
        assert_close(logps[row][mask[row]], torch.tensor(one.logps), atol=1e-4, rtol=1e-4)
    logps.sum().backward()
    exact = judge(lm, [Example(e.composer_text, e.prompt_ids, e.token_ids, 1.0) for e in examples], latents)[1]
    messages = [(e.prompt_ids, e.token_ids) for e in examples]
    rows = grow_rows(messages, 200)
    with lm.as_agent() as reader:
        whole, among = reader.branch_logps(rows, messages, 0.8)
    order = [message for row in rows for message in row.messages]

    lm = LanguageModel(tiny(kind, len(tokenizer)), tokenizer, kind)  # the same weights once more, left as they are
    lm.model.set_attn_implementation("eager")
    plain = latents.clone().requires_grad_()
    for row, example in enumerate(examples):
        wanted = by_hand(lm.model, example.prompt_ids, plain[row], example.token_ids, 0.8)
        assert_close(logps[row][mask[row]], wanted, atol=1e-4, rtol=1e-4)
        wanted.sum().backward()
        greedy = by_hand(lm.model, example.prompt_ids, latents[row], example.token_ids, 1e-3).exp() > 0.5
        assert torch.equal(exact[row][mask[row]], greedy)
        alone = by_hand(lm.model, example.prompt_ids, None, example.token_ids, 0.8)
        place = order.index(row)
        assert_close(whole[place][among[place]], alone, atol=1e-4, rtol=1e-4)
    assert plain.grad is not None
    assert_close(given.grad, plain.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("kind", "way"), ALWAYS.items())
def test_a_model_is_read_as_its_authors_wrote_it(kind: str, way: str, tokenizer: PreTrainedTokenizerBase) -> None:
    check(kind, way, tokenizer)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", [kind for kind in (*FAST, *PLAIN) if kind not in ALWAYS])
def test_every_architecture_is_read_as_its_authors_wrote_it(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    check(kind, "fast" if kind in FAST else "plain", tokenizer)


def test_what_is_read_the_plain_way_is_told_once(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        LanguageModel(tiny("gemma2", len(tokenizer)), tokenizer, "capped")
        LanguageModel(tiny("llama", len(tokenizer)), tokenizer, "usual")
    told = [record.getMessage() for record in caplog.records if "plain path" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("model capped runs on the plain path")


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("bert", {}, "gives different numbers for a row in a batch than for the row alone"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, "does not accept input embeddings"),
    ],
)
def test_a_model_that_cannot_be_read_right_is_refused_in_one_line(
    kind: str, more: dict[str, int], message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ModelError) as error:
        LanguageModel(tiny(kind, len(tokenizer), **more), tokenizer, "odd")
    assert str(error.value).startswith("model 'odd' ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_the_fast_way_too(dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = LanguageModel(tiny("llama", len(tokenizer)).to(dtype), tokenizer, "other", fused=True)
    with lm.as_agent() as reader:
        assert reader.is_fast


def test_windows_are_as_they_were_after_the_self_test(tokenizer: PreTrainedTokenizerBase) -> None:
    lm = LanguageModel(tiny("mistral", len(tokenizer)), tokenizer, "windowed")
    assert lm.model.config.sliding_window == 16


def test_a_value_that_is_not_finite_is_called_by_its_weights_name(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny("llama", len(tokenizer))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"'x': weight model.layers.1.mlp.down_proj.weight holds values that are not"):
        LanguageModel(model, tokenizer, "x")
