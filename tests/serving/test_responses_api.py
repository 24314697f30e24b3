"""The Responses API with the official client: plain, streamed, with tools, and gone on with from an earlier answer."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from latentmem.serving.asks import Ask
from scripted_desk import ScriptedDesk, serving

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Wend"}}\n</tool_call>'
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[ScriptedDesk, str]]:
    desk = ScriptedDesk(say)
    with serving(desk) as address:
        yield desk, address


@pytest.fixture
def desk(served: tuple[ScriptedDesk, str]) -> ScriptedDesk:
    served[0].begin_anew(say)
    return served[0]


@pytest.fixture
def client(served: tuple[ScriptedDesk, str], desk: ScriptedDesk) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served[1]}/sessions/s/v1", api_key="none", max_retries=0) as made:
        yield made


def say(ask: Ask, choice: int) -> str:
    return "Grün 🙂."


def test_a_response_is_given(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    answer = client.responses.create(
        model="tiny", instructions="You count.", input="1?", temperature=0.5, max_output_tokens=50, store=False
    )
    assert answer.output_text == "Grün 🙂."
    assert answer.status == "completed"
    assert answer.id.startswith("resp_")
    assert answer.instructions == "You count."
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (11, 12)
    ask = desk.turns[0].ask
    assert (ask.temperature, ask.max_tokens) == (0.5, 50)
    assert ask.conversation.messages == (
        {"role": "system", "content": "You count."},
        {"role": "user", "content": "1?"},
    )


def test_a_response_that_was_cut_is_incomplete(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="1?", max_output_tokens=2)
    assert (answer.status, answer.output_text) == ("incomplete", "Gr")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_a_stream_has_its_events_in_their_order(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    desk.step = 3
    events = list(client.responses.create(model="tiny", input="1?", stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert deltas == 3  # one of four triples of bytes completes no character
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Grün 🙂."
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "Grün 🙂."


@pytest.mark.parametrize(("said", "kinds"), [
    (f"Look. {CALL}", ["message", "function_call"]), (CALL + CALL, ["function_call"] * 2),
    (f"{CALL} and then", ["function_call", "message"]), ("", ["message"]),
])  # fmt: skip
def test_the_stream_helper_builds_what_the_plain_answer_holds(
    client: openai.OpenAI, desk: ScriptedDesk, said: str, kinds: list[str]
) -> None:
    desk.script = lambda ask, choice: said
    with client.responses.stream(model="tiny", input="1?", tools=[WEATHER]) as stream:
        list(stream)
        streamed = stream.get_final_response()
    plain = client.responses.create(model="tiny", input="1?", tools=[WEATHER])
    assert sorted(item.type for item in streamed.output) == sorted(item.type for item in plain.output)
    assert sorted(item.type for item in plain.output) == sorted(kinds)
    assert streamed.output_text == plain.output_text


def test_the_result_of_a_tool_goes_on(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    desk.script = lambda ask, choice: f"Look. {CALL}"
    first = client.responses.create(model="tiny", input="weather?", tools=[WEATHER])
    call = first.output[-1]
    assert call.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    asked: Any = [{"role": "user", "content": [{"type": "input_text", "text": "weather?"}]}]
    back: Any = [item.model_dump(exclude_none=True) for item in first.output]
    client.responses.create(model="tiny", input=[*asked, *back, result], tools=[WEATHER])
    sent = desk.turns[1].ask.conversation
    answer = desk.turns[0].answer
    assert answer is not None
    assert sent.messages == (
        {"role": "user", "content": "weather?"},
        answer.choices[0].as_sent_back,
        {"role": "tool", "tool_call_id": call.call_id, "content": "rain"},
    )
    assert sent.tools[0]["function"]["name"] == "weather"  # type: ignore[index,call-overload]
    assert json.loads(call.arguments) == {"city": "Wend"}


def test_an_earlier_response_is_gone_on_from(client: openai.OpenAI, desk: ScriptedDesk) -> None:
    first = client.responses.create(model="tiny", instructions="You count.", input="1?")
    client.responses.create(model="tiny", instructions="You sing.", input="2?", previous_response_id=first.id)
    assert desk.turns[1].ask.conversation.messages == (
        {"role": "system", "content": "You sing."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "Grün 🙂."},
        {"role": "user", "content": "2?"},
    )
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="tiny", input="2?", previous_response_id="resp_x")
    assert (error.value.param, error.value.code) == ("previous_response_id", "previous_response_not_found")


@pytest.mark.parametrize(("more", "field"), [
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
    ({"input": []}, "input"), ({"background": True}, "background"), ({"conversation": "c"}, "conversation"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"), ({"truncation": "auto"}, "truncation"),
    ({"text": {"format": {"type": "json_object"}}}, "text.format.type"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
])  # fmt: skip
def test_what_is_not_served_is_refused_and_named(
    client: openai.OpenAI, desk: ScriptedDesk, more: dict[str, Any], field: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(**{"model": "tiny", "input": "1?", "extra_body": more})
    assert error.value.param == field
    assert desk.turns == []
