"""Calls of tools out of what models of several families say, at once and bit by bit."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmem.serving.asks import ToolCall
from latentmem.serving.tools import FORMS, Piece, ToolReader

NAMES = ("weather", "add")


def read(form: str, parts: Sequence[str], names: Sequence[str] = NAMES, parallel: bool = True) -> list[Piece]:
    """What the parts say, text in one piece wherever it can be."""
    reader = ToolReader(form, names, parallel, new_id=lambda: "id")
    pieces = [piece for part in parts for piece in reader.feed(part)] + reader.close()
    joined: list[Piece] = []
    for piece in pieces:
        if joined and isinstance(piece, str) and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def call(name: str = "weather", **arguments: object) -> ToolCall:
    return ToolCall("id", name, json.dumps(arguments or {"city": "Wend"}, ensure_ascii=False))


WEND = '{"name": "weather", "arguments": {"city": "Wend"}}'
ADD = '{"name": "add", "arguments": {"a": 1, "b": [2, "]"]}}'
SAID: dict[str, tuple[str, str, list[Piece]]] = {
    "hermes": ("hermes", f"Look.\n<tool_call>\n{WEND}\n</tool_call>", ["Look.\n", call()]),
    "hermes twice": (
        "hermes", f"<tool_call>{WEND}</tool_call> and <tool_call>{ADD}</tool_call>.",
        [call(), " and ", call("add", a=1, b=[2, "]"]), "."],
    ),
    "hermes list": ("hermes", f"<tool_call>[{WEND}, {ADD}]</tool_call>", [call(), call("add", a=1, b=[2, "]"])]),
    "hermes not closed": ("hermes", f"<tool_call>{WEND}", [call()]),
    "hermes with its end in a text": (
        "hermes", '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>"}}</tool_call>!',
        [call(city="</tool_call>"), "!"],
    ),
    "hermes broken, then whole": (
        "hermes", f"<tool_call>{{no}}</tool_call><tool_call>{WEND}</tool_call>",
        ["<tool_call>{no}</tool_call>", call()],
    ),
    "hermes of no tool": (
        "hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        ['<tool_call>{"name": "rm", "arguments": {}}</tool_call>'],
    ),
    "hermes cut": ("hermes", '<tool_call>{"name": "wea', ['<tool_call>{"name": "wea']),
    "hermes arguments as text": (
        "hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Wend\\"}"}</tool_call>', [call()]
    ),
    "hermes arguments as list": (
        "hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        ['<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'],
    ),
    "hermes without arguments": ("hermes", '<tool_call>{"name": "add"}</tool_call>', [ToolCall("id", "add", "{}")]),
    "json alone is no call to hermes": ("hermes", WEND, [WEND]),
    "llama": ("llama", '{"name": "weather", "parameters": {"city": "Wend"}}', [call()]),
    "llama tag": ("llama", '<|python_tag|>{"name": "weather", "parameters": {"city": "Wend"}}', [call()]),
    "llama twice": (
        "llama", '{"name": "weather", "parameters": {"city": "Wend"}}; {"name": "add", "parameters": {"a": 1}}',
        [call(), call("add", a=1)],
    ),
    "llama code": ("llama", "<|python_tag|>print(1)", ["<|python_tag|>print(1)"]),
    "llama text": ("llama", "The {set} is empty.", ["The {set} is empty."]),
    "mistral": ("mistral", f"[TOOL_CALLS] [{WEND}]", [call()]),
    "mistral after text": (
        "mistral", f"Look. [TOOL_CALLS][{WEND}, {ADD}]", ["Look. ", call(), call("add", a=1, b=[2, "]"])]
    ),
    "mistral named": ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Wend"}', [call()]),
    "mistral named, with ids": (
        "mistral", '[TOOL_CALLS]weather[CALL_ID]abc123def[ARGS]{"city": "Wend"}[TOOL_CALLS]add{"a": 1}',
        [call(), call("add", a=1)],
    ),
    "bare": ("bare", f"  {WEND}", [call()]),
    "bare list": ("bare", f"[{WEND}]", [call()]),
    "bare other json": ("bare", '{"answer": 4}', ['{"answer": 4}']),
    "bare after text": ("bare", f"So: {WEND}", [f"So: {WEND}"]),
    "key twice": (
        "hermes", '<tool_call>{"name": "rm", "name": "weather"}</tool_call>',
        ['<tool_call>{"name": "rm", "name": "weather"}</tool_call>'],
    ),
    "no number": (
        "hermes", '<tool_call>{"name": "weather", "arguments": {"a": NaN}}</tool_call>',
        ['<tool_call>{"name": "weather", "arguments": {"a": NaN}}</tool_call>'],
    ),
    "deep": ("hermes", "<tool_call>" + "[" * 3000 + "</tool_call>", ["<tool_call>" + "[" * 3000 + "</tool_call>"]),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 7, 10**6])
@pytest.mark.parametrize("case", SAID)
def test_calls_are_read_in_the_form_of_the_family(case: str, size: int) -> None:
    form, text, expected = SAID[case]
    assert read(form, [text[i : i + size] for i in range(0, len(text), size)]) == expected


def test_without_tools_all_is_text() -> None:
    assert read("hermes", [f"<tool_call>{WEND}</tool_call>"], names=()) == [f"<tool_call>{WEND}</tool_call>"]


def test_one_call_is_all_where_calls_may_not_be_parallel() -> None:
    parts = [f"Look. <tool_call>{WEND}", "</tool_call>", f"<tool_call>{ADD}</tool_call> done"]
    assert read("hermes", parts, parallel=False) == ["Look. ", call()]


def test_text_is_told_as_soon_as_it_is_no_call() -> None:
    reader = ToolReader("hermes", NAMES)
    assert reader.feed("a <tool") == ["a "]
    assert reader.feed("box>") == ["<toolbox>"]
    assert reader.feed("<tool_call>{") == []
    assert reader.feed('"x"}</tool_call>') == ['<tool_call>{"x"}</tool_call>']
    bare = ToolReader("bare", NAMES)
    assert bare.feed("Four") == ["Four"]


PARTS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    WEND,
    ADD,
    "{",
    "}",
    '"',
    "[",
    "a ",
    "\n",
    "<",
    ";",
]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(FORMS)), st.lists(st.sampled_from(PARTS), max_size=8), st.integers(1, 9))
def test_nothing_is_lost_and_bits_make_no_difference(form: str, parts: list[str], size: int) -> None:
    text = "".join(parts)
    pieces = read(form, [text])
    assert read(form, [text[i : i + size] for i in range(0, len(text), size)]) == pieces
    if not any(isinstance(piece, ToolCall) for piece in pieces):
        assert "".join(piece for piece in pieces if isinstance(piece, str)) == text
