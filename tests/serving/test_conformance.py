"""The official client of OpenAI against the endpoints, over a real socket, with a desk that follows a script."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from starlette.applications import Starlette

from latentmem.serving.asks import Ask, Refused
from latentmem.serving.face.routes import openai_routes
from latentmem.serving.face.speaking import Speaking
from scripted_desk import ScriptedDesk, running, serving, session_of_token

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Wend"}}\n</tool_call>'
ASKED: Any = [{"role": "system", "content": "You count."}, {"role": "user", "content": "1?"}]
OURS = {"latentmem", "latent_tokens"}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[ScriptedDesk, str]]:
    desk = ScriptedDesk(say)
    with serving(desk, session_of_token) as address:
        yield desk, address


@pytest.fixture
def desk(served: tuple[ScriptedDesk, str]) -> ScriptedDesk:
    served[0].begin_anew(say)
    return served[0]


@pytest.fixture
def url(served: tuple[ScriptedDesk, str], desk: ScriptedDesk) -> str:
    return served[1]


def say(ask: Ask, choice: int) -> str:
    return "Grün 🙂, said the canal."


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def strictly(form: Any, value: dict[str, Any]) -> Any:
    """The value as an object of the published schema: no field of another type, none unknown but ours."""
    read = adapter(form).validate_json(json.dumps(value), strict=True)
    unknown = _unknown(read)
    assert unknown <= OURS, unknown - OURS
    return read


@cache
def adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)


def _unknown(read: Any) -> set[str]:
    if isinstance(read, list):
        return set().union(*map(_unknown, read))
    if not hasattr(read, "model_fields_set"):
        return set()
    extra = set(read.model_extra or {})
    return extra.union(*(_unknown(getattr(read, name)) for name in type(read).model_fields))


def post(url: str, path: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, headers=headers)


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_a_chat_is_answered(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    answer = client.chat.completions.create(model="tiny", messages=ASKED, temperature=0.5, seed=3, max_tokens=99)
    assert answer.choices[0].message.content == "Grün 🙂, said the canal."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 28, 39)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 7
    (turn,) = desk.turns
    assert (turn.ask.temperature, turn.ask.seed, turn.ask.max_tokens, turn.ask.n) == (0.5, 3, 99, 1)
    assert turn.ask.conversation.messages == tuple(ASKED)
    assert turn.answer is not None
    assert turn.answer.id == answer.id == turn.ask.call
    assert turn.lost_because is None


def test_the_answer_tells_where_its_memory_came_from(url: str) -> None:
    answer = post(url, "/v1/chat/completions", {"model": "tiny", "messages": ASKED})
    own = answer.json()["latentmem"]
    assert (own["session"], own["memory"], own["sources"], own["latent_tokens"]) == (
        "made",
        "latent:x",
        ["s1", "s2"],
        4,
    )
    assert own["timings"] == {"recall": 0.25, "composing": 0.0, "queue": 0.0, "generation": 1.5}
    assert answer.json()["usage"]["latent_tokens"] == 4
    assert answer.headers["x-latentmem-session-id"] == "made"
    assert answer.headers["x-latentmem-sources"] == "s1,s2"
    assert "recall=0.250000" in answer.headers["x-latentmem-timings"]
    assert answer.headers["x-request-id"] == answer.json()["id"]
    assert "token_ids" not in answer.text


def test_token_ids_are_told_to_who_asks(url: str) -> None:
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 2, "latentmem": {"tokens": True}}
    own = post(url, "/v1/chat/completions", body).json()["latentmem"]
    assert own["prompt_token_ids"] == [7, 8]
    assert own["choices"] == [{"token_ids": [71, 114], "logprobs": [-0.5, -0.5]}]


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_stream_says_the_same_without_half_characters(client: openai.OpenAI, desk: ScriptedDesk, step: int) -> None:
    desk.step = step
    stream = client.chat.completions.create(
        model="tiny", messages=ASKED, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == "Grün 🙂, said the canal."
    assert not any("\ufffd" in text for text in texts)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 28
    assert len(texts) > 10 or step > 1
    assert len({c.id for c in chunks}) == 1


def test_a_stream_is_ended_after_its_answer_is_kept(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    seen: list[ChatCompletionChunk] = []
    may_end = threading.Event()
    desk.on_answered = lambda answer: may_end.wait(30) and None
    for chunk in client.chat.completions.create(model="tiny", messages=ASKED, stream=True):
        if chunk.choices[0].delta.content and chunk.choices[0].delta.content.endswith("."):
            assert desk.turns[0].answer is None
            may_end.set()
        if chunk.choices[0].finish_reason:
            assert desk.turns[0].answer is not None
        seen.append(chunk)
    assert seen[-1].choices[0].finish_reason == "stop"


def test_several_choices_are_told_apart(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    desk.script = lambda ask, choice: f"number {choice}"
    answer = client.chat.completions.create(model="tiny", messages=ASKED, n=8)
    assert [c.message.content for c in answer.choices] == [f"number {i}" for i in range(8)]
    texts = [""] * 3
    for chunk in client.chat.completions.create(model="tiny", messages=ASKED, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["number 0", "number 1", "number 2"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8 * 9


@pytest.mark.parametrize("stop", ["canal", ["xyz", "the canal", "canal."], "d the c"])
def test_nothing_of_a_stop_text_is_said(client: openai.OpenAI, stop: Any) -> None:
    expected = "Grün 🙂, sai" if stop == "d the c" else "Grün 🙂, said the" if stop == "canal" else "Grün 🙂, said"
    whole = client.chat.completions.create(model="tiny", messages=ASKED, stop=stop)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model="tiny", messages=ASKED, stop=stop, stream=True)
    texts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(texts) == expected


def test_a_response_that_the_limit_cut_says_so(client: openai.OpenAI) -> None:
    for limit in ({"max_tokens": 4}, {"max_completion_tokens": 4}):
        answer = client.chat.completions.create(model="tiny", messages=ASKED, **limit)  # type: ignore[call-overload]
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.content == "Gr\u00fc"


def test_log_probabilities_are_those_of_the_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=ASKED, logprobs=True)
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert "".join(e.token for e in entries) == "Grün 🙂, said the canal."
    assert len(entries) == 27
    assert {e.logprob for e in entries} == {-0.5}
    assert [e.token for e in entries[:5]] == ["G", "r", "", "ü", "n"]
    stream = client.chat.completions.create(model="tiny", messages=ASKED, logprobs=True, stream=True)
    told = [e for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert told == entries


def test_a_tool_is_called_and_its_result_goes_on(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    desk.script = lambda ask, choice: f"Let me look. {CALL}"
    answer = client.chat.completions.create(model="tiny", messages=ASKED, tools=[WEATHER])
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content == "Let me look."
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Wend"})
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    back: Any = message.model_dump(exclude_none=True)
    client.chat.completions.create(model="tiny", messages=[*ASKED, back, result], tools=[WEATHER])
    sent = desk.turns[1].ask.conversation
    assert sent.messages[2] == desk.turns[0].answer.choices[0].as_sent_back  # type: ignore[union-attr]
    assert sent.messages[3] == result
    assert sent.tools == (WEATHER,)


@pytest.mark.parametrize("step", [1, 7])
def test_a_tool_is_called_in_a_stream(client: openai.OpenAI, desk: ScriptedDesk, step: int) -> None:
    desk.script, desk.step = lambda ask, choice: f"Let me look. {CALL}\n{CALL}", step
    with client.chat.completions.stream(model="tiny", messages=ASKED, tools=[WEATHER]) as stream:
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert message.content == "Let me look."
    assert [c.function.name for c in message.tool_calls or []] == ["weather", "weather"]
    assert [json.loads(c.function.arguments) for c in message.tool_calls or []] == [{"city": "Wend"}] * 2
    assert final.choices[0].finish_reason == "tool_calls"


def test_without_tools_or_with_none_chosen_a_call_stays_text(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    desk.script = lambda ask, choice: CALL
    more: list[Any] = [{}, {"tools": [WEATHER], "tool_choice": "none"}]
    for each in more:
        answer = client.chat.completions.create(model="tiny", messages=ASKED, **each)
        assert answer.choices[0].message.content == CALL
        assert answer.choices[0].finish_reason == "stop"
    assert desk.turns[1].ask.conversation.tools == ()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_that_has_to_be_called_is_begun_for_the_model(
    client: openai.OpenAI, desk: ScriptedDesk, choice: Any, stream: bool
) -> None:
    rain = {"type": "function", "function": {"name": "rain"}}
    tools = [WEATHER, rain] if choice != "required" else [WEATHER]
    desk.script = lambda ask, number: '{"city": "Wend"}}\n</tool_call>'
    answer = client.chat.completions.create(
        model="tiny", messages=ASKED, tools=tools, tool_choice=choice, stream=stream
    )
    if stream:
        calls = [call for chunk in answer for call in chunk.choices[0].delta.tool_calls or []]
        said = [(calls[0].function.name, "".join(call.function.arguments for call in calls))]
    else:
        said = [(call.function.name, call.function.arguments) for call in answer.choices[0].message.tool_calls]
    assert said == [("weather", '{"city": "Wend"}')]
    sent = desk.turns[0].ask.conversation
    assert sent.must_call == ("*" if choice == "required" else "weather")
    assert sent.tools == (WEATHER,)


def test_a_server_that_tells_whole_calls_begins_none(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    desk.form, desk.script = "told", lambda ask, number: CALL
    answer = client.chat.completions.create(model="tiny", messages=ASKED, tools=[WEATHER], tool_choice="required")
    assert len(answer.choices[0].message.tool_calls or []) == 1
    assert answer.choices[0].message.content is None


def test_a_single_call_is_all_where_calls_may_not_be_parallel(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    desk.script = lambda ask, choice: CALL + CALL
    answer = client.chat.completions.create(model="tiny", messages=ASKED, tools=[WEATHER], parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls or []) == 1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 9}, "n"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logit_bias": {"50": 1}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": -0.5}, "presence_penalty"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.type"),
    ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"stop": ""}, "stop"),
    ({"seed": 1.5}, "seed"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x"}] * 513}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
    ),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ({"latentmem": {"sesion": "x"}}, "latentmem.sesion"),
    ({"latentmem": {"session": "a\nb"}}, "latentmem.session"),
    ({"metadata": {"session": "\u202e"}}, "metadata.session"),
]


@pytest.mark.parametrize(("more", "field"), BAD, ids=[field + str(i) for i, (_, field) in enumerate(BAD)])
def test_what_is_not_served_is_refused_and_named(
    client: openai.OpenAI, desk: ScriptedDesk, more: dict[str, Any], field: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", **({"messages": ASKED, "extra_body": more}))
    assert error.value.param == field
    assert field in error.value.message
    assert error.value.type == "invalid_request_error"
    assert "\n" not in error.value.message
    assert desk.turns == []


def test_a_seed_is_a_number_of_64_bits(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    for seed, kept in ((7, 7), (-7, -7), (2**63 - 1, 2**63 - 1), (9_223_372_036_854_776_000, -(2**63) + 192)):
        client.chat.completions.create(model="tiny", messages=ASKED, seed=seed)
        assert desk.turns[-1].ask.seed == kept


def test_what_states_the_default_or_is_unknown_is_accepted(url: str) -> None:
    body = {
        "model": "tiny", "messages": [*ASKED, {"role": "assistant", "content": None, "tool_calls": []}],
        "stream": False, "n": 1, "stop": None, "logit_bias": {}, "top_logprobs": 0, "frequency_penalty": 0.0,
        "presence_penalty": 0, "response_format": {"type": "text"}, "audio": None, "tools": None, "store": True,
        "modalities": ["text"], "service_tier": "auto", "user": "", "functions": None, "parallel_tool_calls": True,
        "anything": {"else": [1]}, "tool_choice": "auto", "logprobs": None, "stream_options": None, "seed": None,
    }  # fmt: skip
    answer = post(url, "/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text


ASKS_NOTHING: list[dict[str, Any]] = [
    {"response_format": {"type": "text"}},
    *({name: value} for name in ("frequency_penalty", "presence_penalty") for value in (0, 0.0, -0.0, None)),
    *({"top_logprobs": value} for value in (0, 0.0, None)),
    {"logprobs": True, "top_logprobs": 0},
    {"logprobs": False, "top_logprobs": 0},
    {"response_format": None},
]
"""Of what is refused otherwise."""


@pytest.mark.parametrize("more", ASKS_NOTHING, ids=[str(i) for i in range(len(ASKS_NOTHING))])
def test_what_asks_for_nothing_is_accepted(client: openai.OpenAI, url: str, more: dict[str, Any]) -> None:
    plain = post(url, "/v1/chat/completions", {"model": "tiny", "messages": ASKED})
    answer = post(url, "/v1/chat/completions", {"model": "tiny", "messages": ASKED, **more})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"] == plain.json()["choices"][0]["message"]
    if "top_logprobs" in more:
        said = post(url, "/v1/responses", {"model": "tiny", "input": "1?", "top_logprobs": more["top_logprobs"]})
        assert said.status_code == 200, said.text


def test_a_full_server_says_when_to_come_back_and_the_client_does(url: str, desk: ScriptedDesk) -> None:
    desk.refusal = Refused(429, "all places are taken", retry_after=0.2)
    answer = post(url, "/v1/chat/completions", {"model": "tiny", "messages": ASKED})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"] == {
        "message": "all places are taken", "type": "rate_limit_error", "param": None, "code": None,
    }  # fmt: skip
    desk.refusal = Refused(429, "all places are taken", retry_after=0)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2) as patient:
        said = patient.chat.completions.create(model="tiny", messages=ASKED)
    assert said.choices[0].message.content
    assert [t.ask.sent_again for t in desk.turns] == [True]


def test_a_request_sent_again_gets_the_answer_it_had(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    said = iter(f"answer {i}" for i in range(9))
    desk.script = lambda ask, choice: next(said)

    def ask(stream: bool = False, **headers: str) -> tuple[str, str]:
        create: Any = client.chat.completions.create
        if not stream:
            answer = create(model="tiny", messages=ASKED, extra_headers=headers)
            return answer.id, answer.choices[0].message.content
        chunks = list(create(model="tiny", messages=ASKED, extra_headers=headers, stream=True))
        return chunks[0].id, "".join(c.choices[0].delta.content or "" for c in chunks)

    key = {"Idempotency-Key": "k1"}
    first = ask(**key)
    assert ask(**key) == first == ask(stream=True, **key)
    other = ask()
    assert other != first
    assert ask(**{"x-stainless-retry-count": "1"}) == other
    assert ask() != other


def test_errors_of_the_engine_are_told_once_and_lose_the_turn(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    desk.script = lambda ask, choice: Refused(503, "the engine is away", retry_after=2)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="the engine is away") as error:
            client.chat.completions.create(model="tiny", messages=ASKED, stream=stream)  # type: ignore[call-overload]
        assert error.value.response.headers["retry-after"] == "2"
        assert desk.turns[-1].ended.wait(10)
        assert "the engine is away" in str(desk.turns[-1].lost_because)


def test_when_one_choice_fails_the_others_are_told_to_stop(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    failed = threading.Event()

    def script(ask: Ask, choice: int) -> str | Exception:
        failed.wait(30) if choice == 0 else None
        return Refused(503, "the engine is away") if choice == 0 else "word " * 200

    def between(start: int) -> None:
        failed.set()
        if start > 100:
            gave_up.wait(30)

    gave_up = threading.Event()
    desk.script, desk.between = script, between
    told = Speaking.give_up

    def give_up(self: Speaking, reason: str) -> None:
        told(self, reason)
        gave_up.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Speaking, "give_up", give_up)
        with pytest.raises(openai.InternalServerError, match="the engine is away"):
            client.chat.completions.create(model="tiny", messages=ASKED, n=2)
        (turn,) = desk.turns
        assert turn.ended.wait(10)
    assert turn.heard[-1] is False
    assert turn.lost_because is not None


def test_a_server_that_ends_loses_no_turn_silently(desk: ScriptedDesk) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with running(Starlette(routes=openai_routes(desk, pool))) as url:
        answer = post(url, "/v1/chat/completions", {"model": "tiny", "messages": ASKED})
    assert answer.status_code == 503
    assert desk.turns[0].lost_because == "the server ends"


@pytest.mark.parametrize("bug", [ZeroDivisionError("the secret"), StopIteration("the secret")])
def test_a_bug_is_a_500_without_its_text(client: openai.OpenAI, desk: ScriptedDesk, bug: Exception) -> None:
    desk.script = lambda ask, choice: bug
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="tiny", messages=ASKED)
    assert "secret" not in str(error.value)
    assert desk.turns[0].ended.wait(10)


def test_an_answer_that_cannot_be_kept_is_an_error_for_the_client(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    def full(answer: Any) -> None:
        raise Refused(507, "the disk is full")

    desk.on_answered = full
    with pytest.raises(openai.InternalServerError, match="the disk is full"):
        client.chat.completions.create(model="tiny", messages=ASKED)
    assert desk.turns[0].ended.wait(10)
    assert desk.turns[0].lost_because
    with pytest.raises(openai.APIError, match="the disk is full"):
        list(client.chat.completions.create(model="tiny", messages=ASKED, stream=True))
    last = list(client.responses.create(model="tiny", input="hello", stream=True))[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.message == "the disk is full"


def test_an_error_in_the_middle_ends_the_stream(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    def fail(start: int) -> None:
        if start > 12:
            raise Refused(503, "the engine died")

    desk.between = fail
    texts: list[str] = []
    stream = client.chat.completions.create(model="tiny", messages=ASKED, stream=True)
    with pytest.raises(openai.APIError, match="the engine died"):
        texts.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "".join(texts) == "Grün 🙂, s"
    assert desk.turns[0].ended.wait(10)
    assert desk.turns[0].lost_because


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(url: str, desk: ScriptedDesk, stream: bool) -> None:
    begun, gone = threading.Event(), threading.Event()

    def wait(start: int) -> None:
        begun.set()
        if start >= 5:
            gone.wait(30)

    desk.between = wait
    body = {"model": "tiny", "messages": ASKED, "stream": stream}

    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            asking = asyncio.ensure_future(client.post(f"{url}/v1/chat/completions", json=body))
            await asyncio.to_thread(begun.wait, 30)
            asking.cancel()

    asyncio.run(leave())
    turn = desk.turns[0]
    for _ in range(2000):  # the server learns of it in a moment of its own
        gone.clear() if turn.heard and turn.heard[-1] else None
        if turn.ended.wait(0.005):
            break
        gone.set()
    assert turn.ended.wait(10)
    assert turn.lost_because is not None
    assert turn.answer is None


def test_a_client_that_goes_away_while_it_waits_takes_no_place(url: str, desk: ScriptedDesk) -> None:
    waits, left = threading.Event(), threading.Event()

    async def admit(who: Any, ask: Ask) -> Any:
        waits.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    desk.admit = admit  # type: ignore[method-assign]

    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            asking = asyncio.ensure_future(
                client.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": ASKED})
            )
            await asyncio.to_thread(waits.wait, 30)
            asking.cancel()

    try:
        asyncio.run(leave())
        assert left.wait(30)
    finally:
        del desk.admit  # type: ignore[misc]


def test_identity_comes_from_headers_body_metadata_url_or_token(url: str, desk: ScriptedDesk) -> None:
    full = {"latentmem": {"session": "b", "role": "rb"}, "metadata": {"session": "m", "role": "rm", "task": "tm"}}
    body = {"model": "tiny", "messages": ASKED}
    path = "/sessions/u/agents/ru/v1/chat/completions"
    post(url, path, body | full, **{"X-LatentMem-Session-ID": "h"})
    post(url, path, body | full)
    post(url, path, body | {"metadata": full["metadata"]})
    post(url, path, body)
    post(url, "/sessions/u%20%C3%A9/v1/chat/completions", body)
    post(url, "/agents/ru/v1/chat/completions", body)
    post(url, "/v1/chat/completions", body, authorization="Bearer session-t")
    post(url, "/v1/chat/completions", body)
    found = [(t.who.session, t.who.role, t.who.task) for t in desk.turns]
    assert found == [
        ("h", "rb", "tm"), ("b", "rb", "tm"), ("m", "rm", "tm"), ("u", "ru", None), ("u é", None, None),
        (None, "ru", None), ("t", None, None), (None, None, None),
    ]  # fmt: skip


def test_a_token_of_one_session_opens_no_other(url: str, desk: ScriptedDesk) -> None:
    body = {"model": "tiny", "messages": ASKED}
    answer = post(url, "/sessions/u/v1/chat/completions", body, authorization="Bearer session-t")
    assert answer.status_code == 403
    assert answer.json()["error"]["param"] == "session"
    assert desk.turns == []


def test_only_json_of_a_bearable_size_is_read(url: str) -> None:
    where = f"{url}/v1/chat/completions"
    json_type = {"content-type": "application/json"}
    assert httpx.post(where, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.post(where, content=b" " * (2 << 20) + b"{}", headers=json_type).status_code == 413
    for content in (
        b"",
        b"[]",
        b"{",
        b'{"a": NaN}',
        b"[" * 5000,
        b'{"a":' * 300 + b"1" + b"}" * 300,
        b'{"a": "\\ud800"}',
    ):
        answer = httpx.post(where, content=content, headers=json_type)
        assert answer.status_code == 400, content[:20]
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")


def test_the_asynchronous_client_is_served_many_at_once(url: str, desk: ScriptedDesk) -> None:
    desk.script = lambda ask, choice: ask.conversation.user

    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def ask(number: int) -> str | None:
                asked: Any = [{"role": "user", "content": f"n{number}"}]
                if number % 2:
                    stream = await client.chat.completions.create(model="tiny", messages=asked, stream=True)
                    return "".join([c.choices[0].delta.content or "" async for c in stream])
                return (await client.chat.completions.create(model="tiny", messages=asked)).choices[0].message.content

            return await asyncio.gather(*map(ask, range(60)))

    assert asyncio.run(ask_all()) == [f"n{i}" for i in range(60)]


def test_every_answer_is_of_the_published_schema(url: str, desk: ScriptedDesk) -> None:
    texts: list[Callable[[Ask, int], Any]] = [
        lambda ask, choice: "Grün 🙂.",
        lambda ask, choice: f"Look. {CALL}{CALL}",
        lambda ask, choice: "",
    ]
    for desk.script in texts:
        for more in ({}, {"logprobs": True, "n": 2}, {"max_tokens": 3}, {"stop": "ü"}, {"latentmem": {"tokens": True}}):
            body = {"model": "tiny", "messages": ASKED, "tools": [WEATHER], "metadata": {"a": "b"}, **more}
            strictly(ChatCompletion, post(url, "/v1/chat/completions", body).json())
            stream = post(
                url, "/v1/chat/completions", body | {"stream": True, "stream_options": {"include_usage": True}}
            )
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert stream.text.endswith("data: [DONE]\n\n")
            for chunk in events_of(stream.text):
                strictly(ChatCompletionChunk, chunk)
        tool = {"type": "function", **WEATHER["function"]}
        some: list[dict[str, Any]] = [
            {},
            {"tools": [tool]},
            {"include": ["message.output_text.logprobs"]},
            {"max_output_tokens": 3},
        ]
        for more in some:
            body = {"model": "tiny", "input": "hello", "instructions": "You count.", "metadata": {"a": "b"}, **more}
            strictly(Response, post(url, "/v1/responses", body).json())
            for event in events_of(post(url, "/v1/responses", body | {"stream": True}).text):
                strictly(ResponseStreamEvent, event)
