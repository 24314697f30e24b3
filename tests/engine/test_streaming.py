"""Streamed responses of servers: they end where those of the model here end, and who breaks is asked again."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from standin import StandIn, stand_in
from test_vllm import WARM, prompts_of

from latentmem.config import Sampling
from latentmem.engines.events import Events
from latentmem.engines.vllm import VLLMEngine
from latentmem.errors import EngineError
from latentmem.models.language_model import LanguageModel

GREEDY = Sampling(temperature=0, max_response_tokens=16)


@pytest.fixture
def second(model: LanguageModel) -> Iterator[StandIn]:
    with stand_in(model.model, model.name) as running:
        yield running


@pytest.fixture
def engine_of(model: LanguageModel) -> Callable[..., VLLMEngine]:
    def make(*servers: StandIn, retries: int = 2) -> VLLMEngine:
        return VLLMEngine(model, [server.url for server in servers], 8, 20.0, retries, backoff_seconds=0.01)

    return make


class Heard:
    """Listens, as long as it wants to."""

    def __init__(self, most: int = 1000) -> None:
        self.tokens: list[int] = []
        self.most = most

    def __call__(self, tokens: Sequence[int]) -> bool:
        self.tokens += tokens
        return len(self.tokens) < self.most


@pytest.mark.parametrize("with_latents", [True, False])
def test_a_streamed_response_is_the_one_that_is_not(model, server, engine_of, with_latents):
    prompts = prompts_of(model, with_latents=with_latents)
    heard = [Heard() for _ in prompts]
    streamed = engine_of(server).respond(
        [replace(prompt, on_tokens=listener) for prompt, listener in zip(prompts, heard, strict=True)], WARM
    )
    assert streamed == engine_of(server).respond(prompts, WARM)
    assert [tuple(listener.tokens) for listener in heard] == [one.token_ids for one in streamed]
    assert [asked.get("stream", False) for asked in server.requests] == [True] * 6 + [False] * 6
    assert streamed[0].weights == model.weights


def test_stop_texts_and_limits_end_it_as_in_the_model_here(model, server, engine_of):
    (bare,) = prompts_of(model, num=1)
    (free,) = model.sample([bare], GREEDY)
    stop = model.decode(free.token_ids[4:6])
    for change in (
        {"stop": (stop, "never said")},
        {"limit": 3},
        {"limit": 7, "stop": ("never said",)},
        {"stop": ("",)},
    ):
        prompt = replace(bare, **change)
        (ours,), (theirs,) = model.sample([prompt], GREEDY), engine_of(server).respond([prompt], GREEDY)
        assert (theirs.text, theirs.token_ids, theirs.finish) == (ours.text, ours.token_ids, ours.finish)
        assert theirs.logps == pytest.approx(ours.logps, abs=1e-4)
    assert [asked["max_tokens"] for asked in server.requests] == [16, 3, 7, 16]
    assert [asked.get("stream", False) for asked in server.requests] == [True, False, True, False]


def test_the_server_is_told_when_nobody_waits_any_more(model, server, engine_of):
    server.misdeeds = ["wait"]
    (bare,) = prompts_of(model, num=1)
    heard = Heard(most=2)
    (said,) = engine_of(server).respond([replace(bare, on_tokens=heard)], WARM)
    assert (len(said.token_ids), said.finish, len(heard.tokens)) == (2, "length", 2)
    server.gate.set()
    assert server.gone.wait(20)


@pytest.mark.parametrize("misdeed", ["break", "fail", "short", "500", "garbage", "drop", "nan"])
def test_a_stream_that_breaks_is_asked_again_and_nothing_is_told_twice(model, server, second, engine_of, misdeed):
    (bare,) = prompts_of(model, num=1)
    heard = Heard()
    (expected,) = engine_of(server).respond([bare], WARM)
    num_before = len(server.requests)
    for one in (server, second):
        one.misdeeds = [misdeed]
    (said,) = engine_of(server, second).respond([replace(bare, on_tokens=heard)], WARM)
    assert said == expected
    assert tuple(heard.tokens) == said.token_ids
    assert len(server.requests) - num_before + len(second.requests) == 3


def test_a_second_attempt_that_says_something_else_ends_the_request(model, server, engine_of):
    server.repeats_seeds = False
    (bare,) = prompts_of(model, num=1)
    hot = Sampling(temperature=5.0, max_response_tokens=30)
    server.misdeeds = ["break"]
    with pytest.raises(EngineError, match=r"ended in mid-stream, and the next one said something else from token \d"):
        engine_of(server).respond([replace(bare, on_tokens=Heard())], hot)


def test_a_stream_that_never_comes_to_its_end_is_named(model, server, engine_of):
    (bare,) = prompts_of(model, num=1)
    server.misdeeds = ["short"] * 3
    with pytest.raises(EngineError, match=r"no usable answer after 3 attempts .the stream ends after 3 tokens"):
        engine_of(server).respond([replace(bare, on_tokens=Heard())], WARM)


def test_a_listener_that_fails_ends_its_call(model, server, engine_of):
    (bare,) = prompts_of(model, num=1)

    def angry(tokens: Sequence[int]) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine_of(server).respond([replace(bare, on_tokens=angry)], WARM)
    assert len(server.requests) == 1


def test_each_response_tells_how_long_it_waited_for_its_turn(model, server):
    engine = VLLMEngine(model, [server.url], parallel=1)
    server.misdeeds = ["wait"]
    first, second = prompts_of(model, num=2)
    opening = threading.Event()

    def open_gate(tokens: Sequence[int]) -> bool:
        opening.set()
        server.gate.set()
        return True

    said = engine.respond([replace(first, on_tokens=open_gate), second], WARM)
    assert opening.is_set()
    assert said[1].queue_seconds > said[0].queue_seconds >= 0


def test_events_are_read_whatever_pieces_they_come_in():
    data = [b"[1]", b"", b"a\nb", json.dumps("é").encode()]
    lines = (
        b": keep-alive\n\ndata: [1]\r\n\r\ndata\nevent: x\ndata:\n\nid: 3\ndata: a\ndata:b\n\ndata: "
        + data[3]
        + b"\n\ndata: x"
    )
    for size in (1, 2, 3, 7, 1000):
        events = Events()
        pieces = [lines[i : i + size] for i in range(0, len(lines), size)]
        assert [found for piece in pieces for found in events.feed(piece)] == data
