"""Prompts of many threads in one batch: the same responses as alone, each caller by itself, and no thread left over."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from latentmem.config import Sampling
from latentmem.engines.batching import Batcher
from latentmem.errors import BusyError, EngineError, ModelError
from latentmem.memory.composer import Composer
from latentmem.models.agent import Prompt
from latentmem.models.language_model import LanguageModel
from latentmem.models.plain import PlainReader
from latentmem.models.prefilling import Kept
from latentmem.models.running import Row, Running
from tiny_models import save_model, save_tokenizer

WARM = Sampling(temperature=0.8, max_response_tokens=24)
GREEDY = Sampling(temperature=0, max_response_tokens=24)
NARROW = Sampling(temperature=1.3, top_p=0.8, top_k=40, max_response_tokens=17)


@pytest.fixture(params=["fast", "plain"])
def lm(model: LanguageModel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    if request.param == "plain":
        monkeypatch.setattr(model, "_reader", PlainReader(model.model))
    return model


@pytest.fixture
def batcher(model: LanguageModel) -> Iterator[Batcher]:
    made = Batcher(model, max_rows=5)
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batcher"]


def prompts_of(model: LanguageModel, num: int = 9) -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    latents = [None, *(torch.randn(k, model.width, generator=generator) * 0.2 for k in (3, 3, 5))]
    return [
        Prompt("solver", "Be brief." * (i % 3), f"What is {i} + 7?" * (1 + i % 4), f"g{i % 2}", 40 + i, latents[i % 4])
        for i in range(num)
    ]


class Held:
    """Listens to the tokens of one response, and holds the batch up at the first until it is told to go on."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self.tokens: list[int] = []
        self.wanted = True

    def __call__(self, tokens: Sequence[int]) -> bool:
        self.tokens += tokens
        self.began.set()
        assert self.go_on.wait(60)
        return self.wanted


def held_prompt(model: LanguageModel, seed: int = 1) -> tuple[Prompt, Held]:
    held = Held()
    return Prompt("solver", "Be brief.", "Count.", "held", seed, on_tokens=held), held


def started(ask: Callable[[], object], held: Held, pool: ThreadPoolExecutor):  # type: ignore[no-untyped-def]
    asked = pool.submit(ask)
    assert held.began.wait(60)
    return asked


def test_responses_are_those_of_prompts_asked_alone_whoever_joins_and_leaves(lm: LanguageModel) -> None:
    lm.eos_ids, before = frozenset(range(0, 320, 40)), lm.eos_ids
    batcher = Batcher(lm, max_rows=5)
    try:
        asked = [(prompt, sampling) for sampling in (WARM, GREEDY, NARROW) for prompt in prompts_of(lm)]
        alone = [lm.sample([prompt], sampling)[0] for prompt, sampling in asked]
        with ThreadPoolExecutor(len(asked)) as pool:
            together = list(pool.map(lambda pair: batcher.respond([pair[0]], pair[1])[0], asked))
        for one, other in zip(together, alone, strict=True):
            assert (one.text, one.token_ids, one.finish) == (other.text, other.token_ids, other.finish)
            assert one.logps == pytest.approx(other.logps, abs=2e-5)
        assert len({len(one.token_ids) for one in together}) > 5  # rows left at different times
    finally:
        batcher.close()
        lm.eos_ids = before


def test_a_call_of_many_prompts_gets_its_responses_in_their_order(model: LanguageModel, batcher: Batcher) -> None:
    prompts = [prompt for prompt in prompts_of(model, 20) if prompt.latents is None]
    assert [one.token_ids for one in batcher.respond(prompts, WARM)] == [
        one.token_ids for one in model.sample(prompts, WARM)
    ]
    assert batcher.respond([], WARM) == []


def test_prompts_join_while_others_are_sampled_and_each_tells_how_long_it_waited(
    model: LanguageModel, batcher: Batcher
) -> None:
    prompt, held = held_prompt(model)
    late = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = started(lambda: batcher.respond([prompt], WARM)[0], held, pool)
        joined = Prompt("solver", "", "Late.", "late", 2, limit=3, on_tokens=lambda tokens: late.set() or True)
        second = pool.submit(lambda: batcher.respond([joined], WARM)[0])
        while batcher.num_waiting != 1:
            pass
        held.go_on.set()
        assert second.result(60).token_ids == model.sample([joined], WARM)[0].token_ids
        assert len(first.result(60).token_ids) > 3
    assert late.is_set()
    assert all(asked.result().queue_seconds > 0 for asked in (first, second))


def test_a_full_queue_refuses_and_a_large_call_is_taken_when_nobody_waits(model: LanguageModel) -> None:
    batcher = Batcher(model, max_rows=1, max_waiting=2)
    prompt, held = held_prompt(model)
    plain = [Prompt("solver", "", f"{i}", "g", i) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        first = started(lambda: batcher.respond([prompt], WARM), held, pool)
        large = pool.submit(lambda: batcher.respond(plain, WARM))
        while batcher.num_waiting != 3:
            pass
        with pytest.raises(BusyError, match=r"3 prompts wait already, of at most 2; ask again later"):
            batcher.respond(plain[:1], WARM)
        held.go_on.set()
        assert len(first.result(60)) == 1
        assert len(large.result(60)) == 3
    batcher.close()


def test_a_call_of_many_prompts_holds_nobody_up(model: LanguageModel) -> None:
    batcher = Batcher(model, max_rows=1)
    prompt, held = held_prompt(model)
    order: list[str] = []

    def note(name: str) -> Callable[[Sequence[int]], bool]:
        return lambda tokens: order.append(name) or True  # type: ignore[func-returns-value]

    many = [Prompt("solver", "", f"{i}", "g", i, limit=1, on_tokens=note("many")) for i in range(4)]
    one = Prompt("solver", "", "one", "g", 9, limit=1, on_tokens=note("one"))
    with ThreadPoolExecutor(3) as pool:
        first = started(lambda: batcher.respond([prompt], WARM), held, pool)
        large = pool.submit(lambda: batcher.respond(many, WARM))
        while batcher.num_waiting != 4:
            pass
        small = pool.submit(lambda: batcher.respond([one], WARM))
        while batcher.num_waiting != 5:
            pass
        held.go_on.set()
        for asked in (first, large, small):
            asked.result(60)
    assert order == ["many", "one", "many", "many", "many"]
    batcher.close()


def test_a_prompt_that_fails_fails_alone(model: LanguageModel, batcher: Batcher) -> None:
    good = prompts_of(model)
    nan = torch.full((3, model.width), torch.nan)
    wrong = torch.zeros(3, model.width + 1)

    def angry(tokens: Sequence[int]) -> bool:
        raise ZeroDivisionError

    bad = {
        "window": Prompt("solver", "", "7 " * 5000, "g", 1),
        "finite": Prompt("solver", "", "7", "g", 1, latents=nan),
        "width": Prompt("solver", "", "7", "g", 1, latents=wrong),
        "angry": Prompt("solver", "", "7", "g", 1, on_tokens=angry),
    }
    kinds: dict[str, type[Exception]] = {"window": ModelError, "finite": ModelError, "angry": ZeroDivisionError}
    with ThreadPoolExecutor(20) as pool:
        fine = [pool.submit(batcher.respond, [prompt], WARM) for prompt in good]
        failing = {name: pool.submit(batcher.respond, [prompt], WARM) for name, prompt in bad.items()}
        for name, asked in failing.items():
            with pytest.raises(kinds.get(name, RuntimeError)):
                asked.result(60)
        said = [asked.result(60)[0] for asked in fine]
    assert [one.token_ids for one in said] == [model.sample([prompt], WARM)[0].token_ids for prompt in good]


def test_who_waits_for_nothing_leaves_the_batch(model: LanguageModel, batcher: Batcher) -> None:
    prompt, held = held_prompt(model)
    held.wanted = False
    other = Prompt("solver", "", "On.", "g", 4)
    with ThreadPoolExecutor(2) as pool:
        left = started(lambda: batcher.respond([prompt], WARM)[0], held, pool)
        stays = pool.submit(lambda: batcher.respond([other], WARM)[0])
        held.go_on.set()
        assert left.result(60).token_ids == tuple(held.tokens)
        assert len(held.tokens) == 1
        assert stays.result(60).token_ids == model.sample([other], WARM)[0].token_ids


def test_who_leaves_while_others_are_taken_out_of_the_batch_takes_nobody_with_them(
    model: LanguageModel, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, held = held_prompt(model)
    leaving = Prompt("solver", "", "Late.", "late", 2, limit=3)
    drop = Running.drop

    def dropping(running: Running, rows: Sequence[Row]) -> None:
        drop(running, rows)
        for row, place in batcher._running.items():
            if row.prompt is leaving and place.is_wanted:
                place.is_wanted = False
                place.done.set_exception(ZeroDivisionError())

    monkeypatch.setattr(Running, "drop", dropping)
    with ThreadPoolExecutor(2) as pool:
        stays = started(lambda: batcher.respond([prompt], WARM)[0], held, pool)
        left = pool.submit(batcher.respond, [leaving], WARM)
        while batcher.num_waiting != 1:
            pass
        held.go_on.set()
        with pytest.raises(ZeroDivisionError):
            left.result(60)
        assert len(stays.result(60).token_ids) > 3


def test_closing_ends_what_waits_and_what_runs(model: LanguageModel) -> None:
    batcher = Batcher(model, max_rows=1)
    prompt, held = held_prompt(model)
    with ThreadPoolExecutor(3) as pool:
        runs = started(lambda: batcher.respond([prompt], Sampling(max_response_tokens=2000)), held, pool)
        waits = pool.submit(lambda: batcher.respond([Prompt("solver", "", "x", "g", 1)], WARM))
        while batcher.num_waiting != 1:
            pass
        closing = pool.submit(batcher.close)
        while not batcher._is_closed:
            pass
        held.go_on.set()
        closing.result(60)
        for asked in (runs, waits):
            with pytest.raises(EngineError, match="samples no more"):
                asked.result(60)
    with pytest.raises(EngineError, match="samples no more"):
        batcher.respond([Prompt("solver", "", "x", "g", 1)], WARM)


def test_a_composer_reads_between_two_tokens_and_neither_sees_the_other(model: LanguageModel, batcher: Batcher) -> None:
    composer = Composer(model, num_latents=3, rank=2)
    try:
        with torch.no_grad():
            for name, parameter in composer.trainable().items():
                if name.startswith("lora."):
                    parameter.add_(0.3)  # else the adapter would change nothing
            texts = ["What is 3 + 4?", "Plan the steps.", "The capital of the country."]
            composed = [composer.compose([text]) for text in texts]
            prompts = prompts_of(model)
            alone = [model.sample([prompt], WARM)[0].token_ids for prompt in prompts]
            with ThreadPoolExecutor(12) as pool, torch.no_grad():
                asked = [pool.submit(batcher.respond, [prompt], WARM) for prompt in prompts]
                made = [pool.submit(torch.no_grad()(composer.compose), [text]) for text in texts * 4]
                assert [one.result(60)[0].token_ids for one in asked] == alone
                for found, text in zip(made, texts * 4, strict=True):
                    torch.testing.assert_close(found.result(60), composed[texts.index(text)])
    finally:
        composer.detach()


def test_prompts_of_different_adapters_take_turns(model: LanguageModel, batcher: Batcher) -> None:
    adapter = model.adapters.add(rank=2, alpha=4.0, target_modules=("q_proj",), key="x")
    try:
        with torch.no_grad():
            for matrix in adapter.matrices.values():
                matrix.add_(0.3)
        prompts = [
            Prompt("solver", "Be brief.", f"Say {i // 2}.", "g", i, adapter=adapter.name if i % 2 else None)
            for i in range(12)
        ]
        alone = [model.sample([prompt], WARM)[0] for prompt in prompts]
        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(lambda prompt: batcher.respond([prompt], WARM)[0], prompts))
        assert [one.token_ids for one in together] == [one.token_ids for one in alone]
        assert {bool(one.weights) for one in together[::2]} == {True}
        assert {one.weights for one in together[1::2]} == {""}  # a trained adapter has no version here
    finally:
        batcher.close()
        model.adapters.remove(adapter.name)


def test_the_model_asks_it_as_its_engine(model: LanguageModel, batcher: Batcher) -> None:
    prompts = prompts_of(model)
    model.engine = batcher
    try:
        assert model.concurrent
        assert [one.token_ids for one in model.respond(prompts, WARM)] == [
            one.token_ids for prompt in prompts for one in model.sample([prompt], WARM)
        ]
    finally:
        model.engine = None


def test_a_prompt_that_was_kept_is_not_read_again_until_all_are_dropped(model: LanguageModel, batcher: Batcher) -> None:
    prompt = Prompt("solver", "Be brief.", "What is 7 + 7?", "g", 3)

    def asked() -> tuple[int, tuple[int, ...]]:
        (said,) = batcher.respond([prompt], WARM)
        return said.num_kept, said.token_ids

    length = len(model.prompt_ids(prompt))
    (first, tokens), again = asked(), asked()
    assert (first, again) == (0, (length - 1, tokens))
    batcher.drop_kept()
    assert asked() == (0, tokens)
    assert asked() == (length - 1, tokens)


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_a_long_row_that_has_ended_does_not_run_out_of_the_window(tmp_path: Path, path: str) -> None:
    config = GPT2Config(
        vocab_size=save_tokenizer(tmp_path, vocab_size=320),
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    )  # its positions are rows of a table
    save_model(tmp_path, config, seed=1)
    model = LanguageModel.from_pretrained(str(tmp_path), device="cpu", dtype="float32")
    model.eos_ids = frozenset()
    if path == "plain":
        model._reader = PlainReader(model.model)
    long = "x"
    while len(model.encode_prompt("", long)) < 115:
        long += " x"
    prompts = [
        Prompt("solver", "", text, "g", i, limit=limit) for i, (text, limit) in enumerate([(long, 4)] + [("x", 60)] * 6)
    ]
    batcher = Batcher(model)
    said = batcher.respond(prompts, Sampling(max_response_tokens=60))
    batcher.close()
    assert [len(one.token_ids) for one in said] == [4] + [60] * 6
    alone = [model.sample([prompt], Sampling(max_response_tokens=60))[0] for prompt in prompts]
    assert [one.token_ids for one in said] == [one.token_ids for one in alone]


def test_equal_prompts_of_two_owners_are_kept_for_each(model: LanguageModel) -> None:
    kept = Kept()
    batcher = Batcher(model, kept=kept)
    prompts = [Prompt("solver", "Be brief.", "Count.", "g", i, owner=owner, limit=1) for i, owner in enumerate("aab")]
    batcher.respond(prompts, WARM)
    batcher.close()
    ids = model.prompt_ids(prompts[0])
    assert [len(kept.longest(ids, owner)) for owner in "abc"] == [len(ids) - 1, len(ids) - 1, 0]
