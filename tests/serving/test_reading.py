"""Text out of tokens as they come: whole characters, nothing of a stop text, and the same in the end."""

from collections.abc import Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from latentmem.serving.reading import BlankFilter, Detokenizer, StopFilter, token_texts

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
