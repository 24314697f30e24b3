"""A server of OpenAI's form as the agents' model: what is sent, what comes back, and what a bad server does."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml

from chat_standin import ChatStandIn, chat_stand_in
from latentmem.bank import ExperienceBank
from latentmem.cli import main
from latentmem.config import Sampling
from latentmem.engines.upstream import UpstreamEngine
from latentmem.errors import EngineError, ModelError
from latentmem.models.agent import Prompt
from latentmem.trajectory import Conversation

BARE = Prompt("solver", "Be brief.", "What is 2 + 3?", "g", 5)
CHAT = Conversation(
    messages=(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look it up.", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
    ),
    tools=({"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}},),
)
HOW = Sampling(temperature=0.3, top_p=0.9, max_response_tokens=20)


def five(asked: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": " It is 5, é 🎈. "}


@pytest.fixture
def server() -> Iterator[ChatStandIn]:
    with chat_stand_in(five) as running:
        yield running


def engine_of(server: ChatStandIn, **settings: Any) -> UpstreamEngine:
    return UpstreamEngine("big", server.url, **{"key": "sk-hush", "retries": 2, "backoff_seconds": 0.01} | settings)


class Heard:
    def __init__(self, most: int = 1000) -> None:
        self.tokens: list[int] = []
        self.most = most

    def __call__(self, tokens: Sequence[int]) -> bool:
        self.tokens += tokens
        return len(self.tokens) < self.most


def test_a_prompt_goes_out_as_messages_and_text_comes_back_without_tokens(server: ChatStandIn) -> None:
    (said,) = engine_of(server).respond([BARE], HOW)
    assert (said.text, said.token_ids, said.logps, said.finish) == ("It is 5, é 🎈.", (), (), "stop")
    assert (said.num_prompt_tokens, said.weights) == (11, "big-1 fp_7")
    assert server.requests == [
        {
            "path": "/v1/chat/completions",
            "model": "big",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}],
            "temperature": 0.3,
            "top_p": 0.9,
            "max_completion_tokens": 20,
            "seed": 5,
        }
    ]
    assert server.headers[0]["Authorization"] == "Bearer sk-hush"


def test_a_chat_its_tools_stop_texts_and_limit_go_out_as_they_are(server: ChatStandIn) -> None:
    engine = engine_of(server, key=None, limit_key="max_tokens")
    engine.respond([replace(BARE, conversation=CHAT, limit=7, stop=("\n\n", ""))], HOW.model_copy(update={"top_k": 4}))
    (asked,) = server.requests
    assert asked["messages"] == list(CHAT.messages)
    assert asked["tools"] == list(CHAT.tools)
    assert (asked["max_tokens"], asked["stop"], asked["top_k"]) == (7, ["\n\n"], 4)
    assert "Authorization" not in server.headers[0]


def test_a_tool_that_has_to_be_called_is_asked_for(server: ChatStandIn) -> None:
    engine = engine_of(server)
    named = {"type": "function", "function": {"name": "look"}}
    for must_call, told in (("*", "required"), ("look", named), ("", None)):
        engine.respond([replace(BARE, conversation=CHAT.model_copy(update={"must_call": must_call}))], HOW)
        assert server.requests[-1].get("tool_choice") == told


@pytest.mark.parametrize("streamed", [True, False])
def test_calls_of_tools_come_back_in_the_form_that_endpoints_read(server: ChatStandIn, streamed: bool) -> None:
    calls = [
        {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}},
        {"id": "b", "type": "function", "function": {"name": "wait", "arguments": "not JSON"}},
    ]
    server.reply = lambda asked: {"role": "assistant", "content": "Let me see.", "tool_calls": calls}
    server.finish = "tool_calls"
    heard = Heard()
    (said,) = engine_of(server).respond([replace(BARE, on_tokens=heard if streamed else None)], HOW)
    assert said.text == (
        'Let me see.\n<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "wait", "arguments": "not JSON"}\n</tool_call>'
    )
    assert said.finish == "stop"
    if streamed:
        assert engine_of(server).said(heard.tokens) == said.text


def test_a_streamed_response_is_told_as_bytes_and_ends_when_nobody_waits(server: ChatStandIn) -> None:
    heard = Heard()
    engine = engine_of(server)
    (said,) = engine.respond([replace(BARE, on_tokens=heard)], HOW)
    assert said == engine.respond([BARE], HOW)[0]
    assert engine.said(heard.tokens) == " It is 5, é 🎈. "
    assert server.requests[0]["stream"]
    server.gate.clear()
    little = Heard(most=1)
    (said,) = engine.respond([replace(BARE, on_tokens=little)], HOW)
    assert len(little.tokens) == 1
    assert said.finish == "length"
    server.gate.set()


@pytest.mark.parametrize("misdeed", ["429", "500", "503", "garbage", "drop", "break", "fail"])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_bad_answer_is_asked_again_and_nothing_is_told_twice(
    server: ChatStandIn, misdeed: str, streamed: bool
) -> None:
    if misdeed in ("break", "fail") and not streamed:
        pytest.skip("only of streams")
    server.misdeeds = [misdeed]
    heard = Heard()
    (said,) = engine_of(server).respond([replace(BARE, on_tokens=heard if streamed else None)], HOW)
    assert said.text == "It is 5, é 🎈."
    assert len(server.requests) == 2
    if streamed:
        assert bytes(heard.tokens).decode() == " It is 5, é 🎈. "


def test_a_second_attempt_that_says_something_else_ends_the_request(server: ChatStandIn) -> None:
    replies = iter(["abcdef", "aXcdef"])
    server.reply = lambda asked: {"role": "assistant", "content": next(replies)}
    server.misdeeds = ["break"]
    with pytest.raises(EngineError, match="ended in mid-stream and then said something else"):
        engine_of(server).respond([replace(BARE, on_tokens=Heard())], HOW)


def test_a_key_is_never_shown(server: ChatStandIn, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(server)
    server.misdeeds = ["500", "401"]
    with caplog.at_level(logging.DEBUG), pytest.raises(EngineError, match="refuses the request: status 401") as caught:
        engine.respond([BARE], HOW)
    assert caplog.records
    assert "hush" not in caplog.text + str(caught.value) + repr(engine) + repr(vars(engine))


def test_latents_and_adapters_are_refused_before_anything_is_sent(server: ChatStandIn) -> None:
    for change in ({"latents": torch.zeros(2, 4)}, {"adapter": "x"}):
        with pytest.raises(ModelError, match="takes neither: take the memory text"):
            engine_of(server).respond([replace(BARE, **change)], HOW)
    assert not server.requests


BAD = [
    b"[]",
    b"{}",
    b'{"choices": []}',
    b'{"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]}',
    b'{"choices": [{"message": null, "finish_reason": "stop"}]}',
    b'{"choices": [{"message": {"content": "a"}, "finish_reason": "new"}]}',
    b'{"choices": [{"message": {"tool_calls": [3]}, "finish_reason": "stop"}]}',
    b"[" * 5000,
]


@pytest.mark.parametrize("body", BAD)
def test_what_is_no_answer_is_named(server: ChatStandIn, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    engine = engine_of(server, retries=0)
    monkeypatch.setattr(engine._servers, "once", lambda *_: body)
    with pytest.raises(EngineError, match="no usable answer after 1 attempts"):
        engine.respond([BARE], HOW)


CONFIG = """
team: solo
model: {name: big, engine: {kind: openai, url: URL, key_variable: BIG_KEY, retries: 0}}
data: {kind: hidden_facts, train_entities: 6, dev_entities: 2, test_entities: 3, values: 2, phrasings: 1}
bank: {num_retrieved: 1, only_successes: false, embedder: hashing}
collect: {num_tasks: 4}
evaluate: {memories: [none, text], num_bootstraps: 20}
"""


def test_a_run_collects_and_evaluates_without_weights_and_refuses_what_needs_them(
    server, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("BIG_KEY", "sk-hush\n")
    monkeypatch.setattr("latentmem.recipes.parts.load_model", lambda *_: pytest.fail("weights are loaded"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(CONFIG.replace("URL", server.url)) | {"run": str(tmp_path / "run")}))
    assert main(["collect", str(path)]) == 0
    with ExperienceBank(tmp_path / "run" / "bank.sqlite") as bank:
        stored = list(bank)
    assert len(stored) == 4
    assert {message.token_ids for one in stored for message in one.messages} == {()}
    assert {message.response for one in stored for message in one.messages} == {"It is 5, é 🎈."}
    num_before = len(server.requests)
    assert main(["evaluate", str(path)]) == 0
    asked = server.requests[num_before:]
    assert sum("similar tasks before" in json.dumps(one["messages"]) for one in asked) == len(asked) / 2
    assert server.headers[-1]["Authorization"] == "Bearer sk-hush"
    capsys.readouterr()
    for words in (
        ["evaluate", str(path), "evaluate.memories=[latent:untrained]"],
        ["train", "lmpo", str(path), "lmpo.initial=untrained"],
    ):
        assert main(words) == 2
        assert "model.engine is openai, so the weights of the agents are not here" in capsys.readouterr().err
    for value, told in (("", "is not set"), ("a b", "holds what no key is"), ("é", "holds what no key is")):
        monkeypatch.setenv("BIG_KEY", value)
        assert main(["collect", str(path), f"run={tmp_path / 'other'}"]) == 2
        assert f"the environment variable BIG_KEY {told}" in capsys.readouterr().err
    assert "hush" not in "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())
