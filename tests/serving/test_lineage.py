"""Conversations of one session told apart, as programs send them."""

from typing import Any

import pytest

from latentmem.serving.lineage import Lineages, chain


def one(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def called(made: str, arguments: str = '{"city": "Wend", "n": 1}', content: Any = None) -> dict[str, Any]:
    call = {"id": made, "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return one("assistant", content, tool_calls=[call])


RESULT = one("tool", "x", tool_call_id="a")
ASKED = [one("system", "You count."), one("user", "1?")]


def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    return chain(left) == chain(right)


@pytest.mark.parametrize(("left", "right"), [
    (one("assistant", "two"), one("assistant", " two\n")),
    (one("assistant", None), one("assistant", "")),
    (one("user", "ab"), one("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
    (one("system", "x"), one("developer", "x")),
    (one("user", "x", name="ann"), one("user", "x")),
    (called("k1"), called("other", '{"n":1,"city":"Wend"}', "")),
    (one("assistant", "x", tool_calls=[]), one("assistant", "x")),
])  # fmt: skip
def test_messages_compare_as_programs_send_them_back(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert same([*ASKED, left], [*ASKED, right])


@pytest.mark.parametrize(("left", "right"), [
    ([one("assistant", "two")], [one("user", "two")]),
    ([one("assistant", "two")], [one("assistant", "tw o")]),
    ([called("k1")], [called("k1", '{"city": "Moss"}')]),
    ([called("k1")], [called("k1", "no json")]),
    ([called("a"), called("b"), RESULT], [called("a"), called("b"), RESULT | {"tool_call_id": "b"}]),
    ([one("user", "a"), one("user", "b")], [one("user", "ab")]),
])  # fmt: skip
def test_messages_that_say_something_else_differ(left: list[Any], right: list[Any]) -> None:
    assert not same([*ASKED, *left], [*ASKED, *right])


def test_results_follow_the_ids_that_a_program_gave(tmp_path: Any) -> None:
    mine = [called("a"), one("tool", "x", tool_call_id="a")]
    theirs = [called("call_9"), one("tool", "x", tool_call_id="call_9")]
    assert same([*ASKED, *mine], [*ASKED, *theirs])


def test_the_longest_chat_that_is_read_takes_no_time_to_speak_of() -> None:
    messages = [one("user", "x" * 4000) for _ in range(512)]
    hashes = chain(messages)
    assert len(set(hashes)) == 512
    assert chain(messages[:100]) == hashes[:100]
    hostile = [called(f"k{i}", "[" * 5000) for i in range(20)]
    assert len(chain(hostile)) == 20


def test_a_request_belongs_to_the_longest_conversation_that_it_continues() -> None:
    lineages = Lineages()

    def ask(messages: list[dict[str, Any]], answer: str) -> str:
        lineage = lineages.of(messages)
        lineages.heard(lineage, messages, one("assistant", answer))
        return lineage

    first = ask(ASKED, "two")
    again = ask(ASKED, "three")
    assert first != again, "the same request again is a conversation of its own"
    on = [*ASKED, one("assistant", "two"), one("user", "more")]
    other = [*ASKED, one("assistant", " three"), one("user", "more")]
    assert ask(on, "x") == first
    assert ask(other, "y") == again
    assert ask([*on, one("assistant", "x"), one("user", "?")], "z") == first
    changed = [*ASKED, one("assistant", "summed up"), one("user", "more")]
    assert ask(changed, "z") == again, "an answer that was changed: the last that was asked so"
    compacted = [one("system", "You count."), one("user", "So far: two. 1?")]
    child = [one("system", "You help."), one("user", "1?")]
    assert len({first, again, ask(compacted, "a"), ask(child, "b")}) == 4
