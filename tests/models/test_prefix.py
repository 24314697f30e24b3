from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar, cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from latentmem.errors import ModelError
from latentmem.models.assets import quiet_loading
from latentmem.models.attention import prepare
from latentmem.models.prefilling import Kept, prefill, prefill_kept, read_beginnings
from latentmem.models.prefix import (
    Prefix,
    causal_mask,
    check_window,
    common_length,
    hidden_states,
    next_positions,
    pad,
    response_logps,
)

K = 3
ROOM = 12
"""Columns behind a prompt, enough for K latents and any response here."""
MODELS = ["tiny_model_dir", "other_model_dir"]


def load(folder: Path, dtype: torch.dtype = torch.float32, prepared: bool = True) -> PreTrainedModel:
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    if prepared:
        prepare(model, fused=True)
    return model


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> PreTrainedModel:
    """The same weights under transformers' own attention."""
    return load(folder, prepared=False)


@pytest.fixture(scope="module")
def exact(folder: Path) -> PreTrainedModel:
    return load(folder, torch.float64)


def tokens(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 290, (n,), generator=generator).tolist() for n in lengths]


def make_latents(model: PreTrainedModel, rows: int, seed: int = 5) -> Tensor:
    width = model.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, K, width, generator=generator) * 0.2).to(model.dtype)


def slow_logps(
    model: PreTrainedModel, prompt: list[int], latents: Tensor | None, response: list[int], temperature: float
) -> Tensor:
    """One row, the whole sequence, all logits, no cache, no mask."""
    embed = model.get_input_embeddings()
    parts = [embed(torch.tensor(prompt))]
    if latents is not None:
        parts.append(latents)
    parts.append(embed(torch.tensor(response)))
    sequence = torch.cat(parts)[None]
    logits = model(inputs_embeds=sequence).logits[0]
    start = sequence.shape[1] - len(response) - 1
    rows = (logits[start : start + len(response)] / temperature).log_softmax(1)
    return torch.stack([rows[i, token] for i, token in enumerate(response)])


BEGIN = tokens(11, 9)[0]
TAILS = tokens(12, 4, 1, 7)
CASES = {
    "one group, ragged": ([BEGIN + tail for tail in TAILS], ["a"] * 3),
    "groups of one": (tokens(13, 5, 12, 8), ["a", "b", "c"]),
    "identical prompts": ([BEGIN] * 4, ["a"] * 4),
    "no common beginning": (tokens(14, 6, 9, 3), ["a"] * 3),
    "one prompt begins the other": ([BEGIN, BEGIN + TAILS[0]], ["a", "a"]),
    "one-token prompts": ([[7], [8], [7]], ["a", "a", "b"]),
    "one token beside many": ([[7], BEGIN, [9, 4]], ["a", "b", "b"]),
    "groups interleaved": (
        [BEGIN + TAILS[0], [*TAILS[2], 5, 6], BEGIN + TAILS[2], [*TAILS[2], 8]],
        ["a", "b", "a", "b"],
    ),
    "a single prompt": ([BEGIN], ["a"]),
    "groups that share a beginning": (
        [BEGIN[:4] + TAILS[0], BEGIN[:6] + TAILS[2], BEGIN[:4] + TAILS[1], BEGIN[:6] + TAILS[1], BEGIN[:4] + TAILS[0]],
        ["a", "b", "a", "b", "a"],
    ),
    "groups of one that share a beginning": ([BEGIN + tail for tail in TAILS], ["a", "b", "c"]),
    "a group beside groups of one": (
        [BEGIN[:3] + TAILS[2], BEGIN + TAILS[0], BEGIN[:3] + TAILS[0], BEGIN + TAILS[1]],
        ["a", "b", "c", "b"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_prefill_in_groups_equals_each_prompt_alone(model: PreTrainedModel, plain: PreTrainedModel, case: str) -> None:
    prompts, groups = CASES[case]
    prefix = prefill(model, prompts, groups, room=0)
    alone = torch.stack([plain(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    assert_close(prefix.logits(model), alone, atol=1e-5, rtol=1e-5)
    assert prefix.seen.sum(1).tolist() == [len(prompt) for prompt in prompts]


@pytest.mark.parametrize("case", CASES)
def test_reading_on_after_a_prefix_equals_reading_all_at_once(
    model: PreTrainedModel, plain: PreTrainedModel, case: str
) -> None:
    prompts, groups = CASES[case]
    more = tokens(15, *[5] * len(prompts))
    prefix = prefill(model, prompts, groups, room=5)
    embed = model.get_input_embeddings()
    whole = [plain(torch.tensor([p + m])).logits[0, len(p) :] for p, m in zip(prompts, more, strict=True)]
    for columns in (slice(0, 2), slice(2, 3), slice(3, 5)):
        ids = torch.tensor(more)[:, columns]
        prefix.extend(model, embed(ids), torch.ones_like(ids, dtype=torch.bool))
        want = torch.stack([logits[columns.stop - 1] for logits in whole])
        assert_close(prefix.logits(model), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_beginnings_that_were_kept_are_not_read_again_and_are_the_same(
    model: PreTrainedModel, plain: PreTrainedModel, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, groups = CASES[case]
    kept = Kept()
    read_beginnings(model, prompts, groups, kept)
    order = [i for name in sorted(set(groups), reverse=True) for i, group in enumerate(groups) if group == name]
    prompts, groups = [prompts[i] for i in order], [groups[i] for i in order]
    with monkeypatch.context() as patch:
        patch.setattr(model, "get_input_embeddings", lambda: pytest.fail("the model reads"))
        begun = read_beginnings(model, prompts, groups, kept)
    prefix = prefill(model, prompts, groups, 0, begun)
    alone = torch.stack([plain(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    assert_close(prefix.logits(model), alone, atol=1e-5, rtol=1e-5)
    assert prefix.seen.sum(1).tolist() == [len(prompt) for prompt in prompts]


SHARING = {
    # columns that pass: what all share, once; then the different beginnings, padded to the longest of them
    "groups that share a beginning": (4, 2 * 2),
    "groups of one that share a beginning": (9, 0),
    "a group beside groups of one": (3, 2 * 6),
}


T = TypeVar("T")


def counted(model: PreTrainedModel, work: Callable[[], T]) -> tuple[T, list[int]]:
    """Do some work, and count the columns, with the padding, that pass the model each time."""
    passed: list[int] = []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    try:
        return work(), passed
    finally:
        handle.remove()


@pytest.mark.parametrize("case", SHARING)
def test_what_the_prompts_of_all_groups_begin_with_passes_the_model_once(model: PreTrainedModel, case: str) -> None:
    prompts, groups = CASES[case]
    begun, passed = counted(model, lambda: read_beginnings(model, prompts, groups))
    assert passed == [count for count in SHARING[case] if count]
    assert begun.prefix is not None
    assert begun.prefix.seen.sum(1).tolist()[begun.rows["a"]] == begun.lengths["a"]


def test_beginnings_read_longest_ago_are_forgotten_first(model: PreTrainedModel) -> None:
    kept = Kept(positions=12)
    first, second, third = ([BEGIN[i:] + tail for tail in ([1, 2], [3])] for i in (3, 4, 5))  # 6, 5 and 4 in common
    for prompts in (first, second, first, third):
        read_beginnings(model, prompts, ["a", "a"], kept)
    assert [kept.find([tuple(BEGIN[i:])]) is not None for i in (3, 4, 5)] == [False, True, True]
    assert kept.find([tuple(BEGIN[4:]), ()]) is not None
    assert kept.find([tuple(BEGIN[4:]), (9,)]) is None


@pytest.mark.parametrize("positions", [0, 7, 20, 4096])
def test_whole_prompts_that_are_kept_are_gone_on_from_and_change_nothing(
    model: PreTrainedModel, plain: PreTrainedModel, positions: int
) -> None:
    random = Random(5)
    kept = Kept(positions)
    said: list[list[int]] = [[]]
    for _ in range(40):
        rows = [random.choice(said) + random.choices(range(4), k=random.randint(1, 5)) for _ in range(3)]
        rows = [list(row) for row in dict.fromkeys(map(tuple, rows))]
        owners = [random.choice("ab") for _ in rows] if random.random() < 0.5 else ["a"] * len(rows)
        said += [row for row in rows if len(row) < 30]
        prefix, _ = prefill_kept(model, rows, owners, room=2, kept=kept)
        assert prefix.seen.sum(1).tolist() == list(map(len, rows))
        alone = torch.stack([plain(torch.tensor([row])).logits[0, -1] for row in rows])
        assert_close(prefix.logits(model), alone, atol=1e-5, rtol=1e-5)
        prefix.extend(
            model, model.get_input_embeddings()(torch.tensor([[7]] * len(rows))), torch.ones(len(rows), 1) > 0
        )
        alone = torch.stack([plain(torch.tensor([[*row, 7]])).logits[0, -1] for row in rows])
        assert_close(prefix.logits(model), alone, atol=1e-5, rtol=1e-5)


def test_a_prompt_that_goes_on_from_a_kept_one_passes_the_model_from_there_on(model: PreTrainedModel) -> None:
    kept = Kept()
    asked = [
        (BEGIN, "a", 0),
        ([*BEGIN, 5, 6], "a", len(BEGIN)),
        ([*BEGIN, 5, 6], "a", len(BEGIN) + 1),  # of the same prompt, its last token is read
        ([*BEGIN, 5, 7, 8], "a", len(BEGIN) + 1),
        (BEGIN[:4], "a", 3),
        ([*BEGIN, 5, 6], "b", 0),  # of another owner's, nothing
    ]
    for prompt, owner, num_known in asked:
        (_, num_kept), passed = counted(model, partial(prefill_kept, model, [prompt], [owner], 1, kept))
        assert (num_kept, sum(passed)) == ([num_known], len(prompt) - num_known)


def test_a_prompt_with_which_a_kept_one_begins_is_not_kept_beside_it(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    prefill_kept(model, [[*BEGIN, 5]], ["a"], 1, kept)
    assert kept.holds(tuple(BEGIN), "a")
    assert not kept.holds(tuple(BEGIN), "b")
    monkeypatch.setattr(kept, "add", lambda *row: pytest.fail("it is kept again"))
    prefill_kept(model, [[*BEGIN, 5], BEGIN], ["a", "a"], 1, kept)


def test_what_new_prompts_of_one_owner_share_passes_once(model: PreTrainedModel) -> None:
    rows = [[*BEGIN, i] for i in range(3)]
    (_, num_kept), passed = counted(model, lambda: prefill_kept(model, rows, ["a"] * 3, 1, Kept()))
    assert (num_kept, sum(passed)) == ([0] * 3, len(BEGIN) + 3)  # nothing of them was kept before
    _, passed = counted(model, lambda: prefill_kept(model, rows, ["a", "a", "b"], 1, Kept()))
    assert sum(passed) == 3 * (len(BEGIN) + 1)


def test_prompts_used_longest_ago_are_forgotten_first_and_what_goes_on_replaces_its_beginning() -> None:
    kept = Kept(positions=10)
    row = cast(Prefix, None)
    kept.add((1, 2, 3), row)
    kept.add((4, 5, 6), row)
    assert kept.longest([1, 2, 9, 9]) == (1, 2)
    kept.add((1, 2, 3, 4), row)  # takes the place of its beginning, and is the newest
    kept.add((7, 8, 9), row)
    assert [kept.longest([*begin, 0]) for begin in ((1, 2, 3, 4), (4, 5, 6), (7, 8, 9))] == [
        (1, 2, 3, 4),
        (4, 5, 6),
        (7, 8, 9),
    ]
    kept.longest([4, 5, 0])
    kept.add((3, 3, 3), row)
    assert kept.longest([1, 2, 3, 4, 0]) == ()
    assert kept.longest([4, 5, 6, 0]) == (4, 5, 6)
    kept.add(tuple(range(11)), row)
    assert kept.longest([*range(11), 0]) == ()  # it is longer than all that may be kept, and nothing went for it
    assert kept.longest([3, 3, 3, 0]) == (3, 3, 3)


def test_selected_rows_go_on_as_if_the_others_had_never_been(model: PreTrainedModel) -> None:
    prompts, groups = CASES["groups interleaved"]
    chosen = torch.tensor([3, 0])
    part = prefill(model, prompts, groups, room=2).select(chosen)
    ids = torch.tensor([[4, 5], [6, 7]])
    real = torch.ones_like(ids, dtype=torch.bool)
    fresh = prefill(model, [prompts[3], prompts[0]], ["x", "y"], room=2)
    for column in (slice(0, 1), slice(1, 2)):
        assert_close(part.hidden, fresh.hidden, atol=1e-5, rtol=1e-5)
        for prefix in (part, fresh):
            prefix.extend(model, model.get_input_embeddings()(ids[:, column]), real[:, column])
    assert_close(part.logits(model), fresh.logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_latents", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_response_logps_equal_the_whole_sequence_scored_at_once(
    model: PreTrainedModel, plain: PreTrainedModel, case: str, with_latents: bool
) -> None:
    prompts, groups = CASES[case]
    responses = tokens(16, 6, 1, 3, 6, 2)[: len(prompts)]
    latents = make_latents(model, len(prompts)) if with_latents else None
    ids, mask = pad(responses, model.device)
    got = response_logps(model, prefill(model, prompts, groups, ROOM), latents, ids, mask, temperature=0.7)
    assert got.shape == ids.shape
    assert got.dtype == torch.float32
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        want = slow_logps(plain, prompt, None if latents is None else latents[i], response, 0.7)
        assert_close(got[i, : len(response)], want, atol=1e-5, rtol=1e-5)
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("with_latents", [True, False])
def test_responses_of_one_token_are_scored(model: PreTrainedModel, plain: PreTrainedModel, with_latents: bool) -> None:
    prompts, groups = CASES["one group, ragged"]
    latents = make_latents(model, 3) if with_latents else None
    ids, mask = pad([[4], [5], [6]], model.device)
    got = response_logps(model, prefill(model, prompts, groups, ROOM), latents, ids, mask, temperature=1.3)
    for i, prompt in enumerate(prompts):
        want = slow_logps(plain, prompt, None if latents is None else latents[i], [4 + i], 1.3)
        assert_close(got[i], want, atol=1e-5, rtol=1e-5)


def test_gradient_at_the_latents_equals_that_of_the_whole_sequence(
    exact: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, groups = CASES["groups interleaved"]
    responses = tokens(17, 5, 2, 7, 1)
    weights = torch.randn(4, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    latents = make_latents(exact, 4).requires_grad_()
    ids, mask = pad(responses, exact.device)
    logps = response_logps(exact, prefill(exact, prompts, groups, ROOM), latents, ids, mask, temperature=0.7)
    (got,) = torch.autograd.grad((logps * weights).sum(), latents)

    for kind in (LlamaRMSNorm, Qwen3RMSNorm):  # theirs compute in float32 whatever the model's type
        monkeypatch.setattr(
            kind, "forward", lambda m, x: m.weight * x / (x.square().mean(-1, True) + m.variance_epsilon).sqrt()
        )
    plain = load(folder, torch.float64, prepared=False)
    slow = [slow_logps(plain, prompts[i], latents[i], responses[i], 0.7) for i in range(4)]
    total = sum((row * weights[i, : len(row)]).sum() for i, row in enumerate(slow))
    (want,) = torch.autograd.grad(total, latents)
    assert want.abs().max() > 1e-3
    assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_no_gradient_reaches_the_frozen_model_or_the_prefix(model: PreTrainedModel) -> None:
    prompts, groups = CASES["one group, ragged"]
    prefix = prefill(model, prompts, groups, ROOM)
    before = prefix.logits(model)
    latents = make_latents(model, 3).requires_grad_()
    ids, mask = pad(TAILS, model.device)
    response_logps(model, prefix, latents, ids, mask, 1.0).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not prefix.hidden.requires_grad
    again = response_logps(model, prefix, latents.detach(), ids, mask, 1.0)
    fresh = response_logps(model, prefill(model, prompts, groups, ROOM), latents.detach(), ids, mask, 1.0)
    assert torch.equal(again, fresh), "scoring changed the prefix"
    assert torch.equal(prefix.logits(model), before)


def test_scoring_behind_a_prefix_twice_is_never_a_wrong_gradient(model: PreTrainedModel) -> None:
    """The second one overwrites what the first one's graph needs, and that graph must notice."""
    prompts, groups = CASES["one group, ragged"]
    prefix = prefill(model, prompts, groups, ROOM)
    latents = make_latents(model, 3).requires_grad_()
    ids, mask = pad(TAILS, model.device)
    first = response_logps(model, prefix, latents, ids, mask, 1.0)
    response_logps(model, prefix, latents, ids, mask, 1.0)
    with pytest.raises(RuntimeError, match="modified inplace"):
        first.sum().backward()


def test_padding_moves_neither_logps_nor_gradients(model: PreTrainedModel) -> None:
    prompts, groups = CASES["one group, ragged"]
    responses = tokens(18, 6, 2, 4)
    results = []
    for fill, extra in ((0, 0), (277, 0), (31, 3)):
        ids, mask = pad(responses, model.device, fill=fill)
        ids = torch.nn.functional.pad(ids, (0, extra), value=fill)
        mask = torch.nn.functional.pad(mask, (0, extra), value=False)
        latents = make_latents(model, 3).requires_grad_()
        logps = response_logps(model, prefill(model, prompts, groups, ROOM), latents, ids, mask, 0.7)
        (gradient,) = torch.autograd.grad((logps * torch.where(mask, 1.0, torch.nan)).nansum(), latents)
        results.append((logps[:, :6], gradient))
    for logps, gradient in results[1:]:
        assert_close(logps, results[0][0], atol=1e-5, rtol=1e-5)
        assert_close(gradient, results[0][1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e4])
def test_hidden_states_at_padding_may_be_anything(
    model: PreTrainedModel, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentmem.models import prefix as module

    prompts, groups = CASES["one group, ragged"]
    ids, mask = pad(tokens(19, 6, 2, 4), model.device)

    def scored() -> tuple[Tensor, Tensor]:
        latents = make_latents(model, 3).requires_grad_()
        logps = response_logps(model, prefill(model, prompts, groups, ROOM), latents, ids, mask, 0.7)
        return logps.detach(), torch.autograd.grad(logps.sum(), latents)[0]

    clean = scored()
    original = module.hidden_states

    def poisoned(*args: object) -> Tensor:
        states = original(*args)
        if not states.requires_grad:
            return states
        real = torch.cat([torch.zeros(3, K - 1, dtype=torch.bool), mask], dim=1)  # what predicts a real token
        return torch.where(real[..., None], states, poison)

    monkeypatch.setattr(module, "hidden_states", poisoned)
    assert_close(scored(), clean, atol=0, rtol=0)


def test_causal_mask_by_hand() -> None:
    seen = torch.tensor([[True, False, True]])
    new = torch.tensor([[True, False, True, False]])
    rows = [
        [1, 0, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 1, 0, 0],  # a padding column sees itself beside what it may see
        [1, 0, 1, 1, 0, 1, 0],
        [1, 0, 1, 1, 0, 1, 1],
    ]
    assert causal_mask(seen, new).tolist() == [[[[bool(x) for x in row] for row in rows]]]


def test_positions_count_real_columns_only() -> None:
    seen = torch.tensor([[True, False, True], [False, False, False]])
    new = torch.tensor([[True, False, True, True], [False, True, True, False]])
    assert next_positions(seen, new).tolist() == [[2, 2, 3, 4], [0, 0, 1, 1]]


def test_pad_fills_on_the_right() -> None:
    ids, mask = pad([[5, 6, 7], [8]], torch.device("cpu"), fill=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([[1, 2, 3]], 2),
        ([[1], [1]], 0),
        ([[1, 2], [3, 2]], 0),
        ([[1, 2, 3], [1, 2, 3, 4]], 2),
        ([[1, 2, 9], [1, 2, 8]], 2),
    ],
)
def test_the_last_token_of_a_prompt_is_never_shared(prompts: list[list[int]], length: int) -> None:
    assert common_length(prompts) == length


def test_padding_before_the_kept_columns_is_ignored(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    rows = tokens(20, 7, 4)
    ids, real = pad(rows, model.device)
    queries = make_latents(model, 1)[0]
    embeddings = torch.cat([model.get_input_embeddings()(ids), queries.expand(2, -1, -1)], dim=1)
    real = torch.cat([real, torch.ones(2, K, dtype=torch.bool)], dim=1)
    got = hidden_states(model, embeddings, real[:, :0], real)[:, -K:]
    for i, row in enumerate(rows):
        alone = torch.cat([model.get_input_embeddings()(torch.tensor(row)), queries])[None]
        want = plain.base_model(inputs_embeds=alone).last_hidden_state[0, -K:]
        assert_close(got[i], want, atol=1e-5, rtol=1e-5)


def test_without_a_mask_the_attention_is_causal(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    ids = torch.tensor(tokens(21, 9, 9))
    assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
    padded = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    got, want = (m(ids, attention_mask=padded).logits for m in (model, plain))
    assert_close(got[padded.bool()], want[padded.bool()], atol=1e-5, rtol=1e-5)


def test_a_sequence_beyond_the_window_is_refused_in_one_line(model: PreTrainedModel) -> None:
    check_window(model, 2048, "the prompt of 'assistant'")
    with pytest.raises(ModelError, match=r"the prompt of 'assistant' needs 2049 tokens .* window is 2048; shorten"):
        check_window(model, 2049, "the prompt of 'assistant'")


def test_scoring_in_bfloat16_is_close_to_float32(folder: Path, model: PreTrainedModel) -> None:
    half = load(folder, torch.bfloat16)
    prompts, groups = CASES["groups interleaved"]
    ids, mask = pad(tokens(22, 5, 2, 7, 1), model.device)

    def logps(scorer: PreTrainedModel) -> Tensor:
        prefix: Prefix = prefill(scorer, prompts, groups, ROOM)
        return response_logps(scorer, prefix, make_latents(model, 4), ids, mask, 1.0)

    got = logps(half)
    assert got.dtype == torch.float32
    assert_close(got, logps(model), atol=0.15, rtol=0.05)
