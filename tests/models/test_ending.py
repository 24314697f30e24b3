"""Where responses end: stop texts, limits and listeners, by hand and against a slow reader of every text anew."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from latentmem.config import Sampling
from latentmem.models.agent import Prompt, ScriptedModel
from latentmem.models.ending import Ending
from latentmem.models.language_model import LanguageModel

WARM = Sampling(temperature=1.0, max_response_tokens=40)
WORDS = ["a", "b", "ab", "ba", "aab", " ", "\n", "é", "b a", ""]


def decode(tokens: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in tokens if token < len(WORDS))


def slowly(tokens: Sequence[int], limit: int, stop: Sequence[str]) -> tuple[int, str, str]:
    """The number of tokens, the text and what ended it: every beginning of the text is looked at, text by text."""
    for n in range(1, len(tokens) + 1):
        text = decode(tokens[:n])
        if tokens[n - 1] == 99:
            return n, text, "stop"
        for end in range(len(text) + 1):
            begins = [text[:end].index(s) for s in stop if text[:end].endswith(s)]
            if begins:
                return n, text[: min(begins)], "cut"
        if n == limit:
            return n, text, "length"
    raise AssertionError


def test_random_tokens_end_where_a_slow_reader_ends_them() -> None:
    rng = random.Random(5)
    seen = set()
    for _ in range(3000):
        stop = ["".join(rng.choices(["a", "b", " ", "\n", "é"], k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        limit = rng.randint(1, 40)
        tokens = [*rng.choices([*range(len(WORDS)), 98], k=60), 99]
        if rng.random() < 0.3:
            tokens[rng.randint(0, 20)] = 99
        ending = Ending(limit, {99}, decode, stop)
        num = next(i for i, token in enumerate(tokens, 1) if ending.add(token))
        assert (num, ending.text, ending.finish) == slowly(tokens, limit, stop)
        seen.add((ending.finish, num > 12))
    assert seen == {(finish, late) for finish in ("stop", "cut", "length") for late in (False, True)}


def test_the_first_stop_text_that_completes_counts_and_of_two_the_longer() -> None:
    for stop, text in ((("bc", "abcd"), "xa"), (("c", "bc"), "xa"), (("abcd", "cde"), "x"), (("",), "xabcde")):
        ending = Ending(1, {99}, lambda tokens: "xabcde", stop)
        assert ending.add(0)
        assert ending.text == text


@pytest.mark.parametrize("latents", [False, True])
def test_a_watched_response_is_the_beginning_of_the_unwatched_one(tiny_model_dir, latents) -> None:  # type: ignore[no-untyped-def]
    lm = LanguageModel.from_pretrained(str(tiny_model_dir))
    lm.eos_ids = frozenset({7})
    latent = torch.randn(3, lm.width, generator=torch.Generator().manual_seed(1)) if latents else None
    bare = [Prompt("a", "Be brief.", f"Say {i}", "g", i, latent) for i in range(7)]
    free = lm.sample(bare, WARM)
    heard: list[list[int]] = [[] for _ in bare]
    changes = [
        {"limit": 5},
        {"stop": (lm.decode(free[1].token_ids[6:8]),)},
        {"on_tokens": lambda tokens: heard[2].extend(tokens) or len(heard[2]) < 9},
        {"on_tokens": lambda tokens: heard[3].extend(tokens) or True},
        {"limit": 1000},
        {"stop": ("no such text",)},
        {},
    ]
    watched = lm.sample([replace(prompt, **change) for prompt, change in zip(bare, changes, strict=True)], WARM)
    for one, other in zip(watched, free, strict=True):
        num = len(one.token_ids)
        assert one.token_ids == other.token_ids[:num]
        assert one.logps == pytest.approx(other.logps[:num], abs=1e-5)
    assert [len(one.token_ids) for one in watched] == [5, 8, 9, *(len(one.token_ids) for one in free[3:])]
    assert [one.finish for one in watched] == ["length", "cut", "length", *(one.finish for one in free[3:])]
    text = lm.decode(free[1].token_ids)
    assert watched[1].text == text[: text.index(changes[1]["stop"][0])].strip()
    assert heard[2] == list(free[2].token_ids[:9])
    assert heard[3] == list(free[3].token_ids)


def test_a_response_that_fits_the_window_with_its_own_limit_only_is_sampled(tiny_model_dir) -> None:  # type: ignore[no-untyped-def]
    lm = LanguageModel.from_pretrained(str(tiny_model_dir))
    long = Sampling(max_response_tokens=2047)
    (said,) = lm.sample([Prompt("a", "Be brief.", "Say it.", "g", 1, limit=4)], long)
    assert len(said.token_ids) <= 4


def test_the_weights_have_a_version_that_tells_models_apart(tiny_model_dir, other_model_dir) -> None:  # type: ignore[no-untyped-def]
    first, again, other = (
        LanguageModel.from_pretrained(str(p)) for p in (tiny_model_dir, tiny_model_dir, other_model_dir)
    )
    assert first.weights == again.weights != other.weights
    (said,) = first.sample([Prompt("a", "", "b", "g", 1)], WARM)
    assert said.weights == first.weights


def test_a_scripted_model_ends_as_others_do() -> None:
    heard: list[int] = []
    model = ScriptedModel({"a": ["one, two; é three"]})

    def ask(**change):  # type: ignore[no-untyped-def]
        (said,) = model.respond([replace(Prompt("a", "s", "u", "g", 1), **change)], Sampling())
        return said.text, bytes(said.token_ids[:-1] if said.finish == "stop" else said.token_ids).decode(), said.finish

    assert ask() == ("one, two; é three", "one, two; é three", "stop")
    assert ask(stop=("; ", "three")) == ("one, two", "one, two; ", "cut")
    assert ask(limit=4) == ("one,", "one,", "length")
    assert ask(on_tokens=lambda tokens: heard.extend(tokens) or len(heard) < 3) == ("one", "one", "length")
    assert bytes(heard) == b"one"
