"""Text out of tokens as they come: whole characters, nothing of a stop text, and the same in the end."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from latentmem.serving.asks import Spoken
from latentmem.serving.reading import BlankFilter, Detokenizer, Reading, StopFilter, TextOf, token_texts
from latentmem.serving.tools import ToolReader
from latentmem.trajectory import Message, Recalled

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Wend"}}</tool_call>'
TEXTS = st.text(alphabet="ab 🙂é\n\u0bb8\u0bc0", max_size=60)


def text_of(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


@settings(deadline=None, derandomize=True)
@given(TEXTS, st.integers(1, 5))
def test_characters_come_whole_and_all_of_them(text: str, size: int) -> None:
    ids = list(text.encode())
    reader = Detokenizer(text_of)
    pieces = [reader.feed(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + reader.close() == text


def test_bytes_that_make_no_character_are_told_in_the_end() -> None:
    reader = Detokenizer(text_of)
    assert reader.feed([65, 0xC3]) == "A"
    assert reader.close() == "\ufffd"
    again = Detokenizer(text_of)
    assert [again.feed([0xFF]), again.feed([65])] == ["", "\ufffdA"]


def test_a_long_response_is_decoded_in_windows() -> None:
    asked: list[int] = []

    def counted(ids: Sequence[int]) -> str:
        asked.append(len(ids))
        return text_of(ids)

    reader = Detokenizer(counted)
    ids = list(("né🙂" * 300).encode())
    assert "".join(reader.feed([each]) for each in ids) == "né🙂" * 300
    assert max(asked) < 40


def test_a_tokenizer_that_writes_blanks_by_their_neighbours_is_read_the_same(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids)))

    text = "What is 12 + 7?  The answer é🙂 is 19.\n\n" * 9
    ids = tokenizer(text)["input_ids"]
    reader = Detokenizer(decode)
    assert "".join(reader.feed([each]) for each in ids) + reader.close() == text == decode(ids)
    assert "".join(token_texts(decode, ids)) == text
    assert len(token_texts(decode, ids)) == len(ids)


def slow_stop(text: str, stop: Sequence[str]) -> str:
    ends = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    return text[: min(ends)[1]] if ends else text


@settings(deadline=None, derandomize=True)
@given(
    st.text(alphabet="ab<", max_size=25),
    st.lists(st.text(alphabet="ab<", min_size=1, max_size=4), max_size=3),
    st.integers(1, 4),
)
def test_nothing_of_a_stop_text_passes(text: str, stop: list[str], size: int) -> None:
    waiting = StopFilter(stop)
    passed = ""
    for i in range(0, len(text), size):
        passed += waiting.feed(text[i : i + size])
        assert slow_stop(text, stop).startswith(passed)
    assert waiting.stopped == (slow_stop(text, stop) != text)
    assert passed + waiting.close() == slow_stop(text, stop)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text(alphabet="a \n", max_size=4), max_size=8))
def test_blanks_at_the_ends_are_left_out(parts: list[str]) -> None:
    blanks = BlankFilter()
    assert "".join(map(blanks.feed, parts)) == "".join(parts).strip()


@settings(
    deadline=None, derandomize=True, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(3, 400), max_size=120), st.integers(1, 7))
def test_tokens_that_make_no_sense_read_the_same_bit_by_bit(random_tokens: TextOf, ids: list[int], size: int) -> None:
    whole = random_tokens(ids)
    reader = Detokenizer(random_tokens)
    pieces = [reader.feed(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) + reader.close() == whole


@pytest.fixture(scope="module")
def random_tokens(tiny_model_dir: Path) -> TextOf:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    return lambda ids: str(tokenizer.decode(list(ids)))


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["a", " ", "<tool_call>", CALL, "stop", "st", "é", "\n"]), max_size=8), st.integers(1, 9)
)
def test_a_response_is_the_same_told_bit_by_bit_or_at_once(parts: list[str], size: int) -> None:
    ids = list("".join(parts).encode())
    cut = next((n for n in range(len(ids)) if bytes(ids[:n]).endswith(b"stop")), None)
    ids = ids[:cut]

    def read(step: int) -> tuple[str, str, list[tuple[str, str]]]:
        reading = Reading(text_of, ["stop"], ToolReader("hermes", ["weather"], new_id=lambda: "id"))
        said = [piece for start in range(0, len(ids), step) for piece in reading.feed(ids[start : start + step])]
        message = Message(
            role="r", system="", user="", response="", token_ids=tuple(ids), logps=(0.0,) * len(ids), temperature=1.0,
            finish="length" if cut is None else "cut", num_prompt_tokens=1, recalled=Recalled(kind="none"),
        )  # fmt: skip
        rest, choice = reading.close(Spoken(message))
        assert "".join(piece for piece in [*said, *rest] if isinstance(piece, str)) == choice.content
        return choice.content, choice.finish, [(call.name, call.arguments) for call in choice.tool_calls]

    assert read(size) == read(10**6)
    assert "stop" not in read(size)[0]


def test_bytes_of_a_server_that_tells_no_tokens_in_the_end_are_all_said() -> None:
    reading = Reading(text_of, [], ToolReader("told", ["weather"]))
    said = reading.feed(list(b"Look. "))
    said += reading.feed(list(f"ü{CALL}".encode())[:1])
    message = Message(
        role="r", system="", user="", response="Look. \ufffd", token_ids=(), logps=(), temperature=1.0, finish="length",
        num_prompt_tokens=1, recalled=Recalled(kind="none"),
    )  # fmt: skip
    rest, choice = reading.close(Spoken(message))
    assert (said, rest) == (["Look."], [" \ufffd"])
    assert (choice.content, choice.finish) == ("Look. \ufffd", "length")
    silent = Reading(text_of, [], ToolReader("told", ["weather"]))
    assert silent.close(Spoken(message.model_copy(update={"response": f"Hi {CALL}"})))[1].finish == "tool_calls"
