"""Chats of any form through templates of several families: told whole, in the template's words, and without control."""

import json
import os
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from chat_templates import TEMPLATES, TOKENS
from latentmem.models.chat import Chat
from latentmem.trajectory import Conversation

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def chats(tiny_model_dir: Path) -> dict[str, Chat]:
    """The chat of each template."""
    made = {}
    for name, template in TEMPLATES.items():
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        tokenizer.add_tokens(list(TOKENS), special_tokens=True)
        tokenizer.chat_template = template
        made[name] = Chat(tokenizer, name, date(2026, 3, 1), thinking=False)
    return made


def calls(*made: str) -> Any:
    return [
        {
            "id": each,
            "type": "function",
            "function": {"name": "weather", "arguments": json.dumps({"city": f"to {each}"})},
        }
        for each in made
    ]


def conversation(*messages: Any, tools: Any = ()) -> Conversation:
    turns = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    return Conversation(messages=tuple(turns), tools=tuple(tools))


def written(chat: Chat, asked: Conversation) -> str:
    return chat.spell(chat.encode_conversation(asked))


CHATS: dict[str, tuple[Conversation, list[str]]] = {
    "several systems": (
        conversation(("system", "One."), ("developer", "Two."), ("user", "Three.")), ["One.", "Two.", "Three."]
    ),
    "a late system": (conversation(("user", "A1"), ("assistant", "A2"), ("system", "A3")), ["A1", "A2", "A3"]),
    "users in a row": (conversation(("user", "A1"), ("user", "A2"), ("user", "A3")), ["A1", "A2", "A3"]),
    "an assistant first": (conversation(("assistant", "A1"), ("user", "A2")), ["A1", "A2"]),
    "an assistant last": (conversation(("user", "A1"), ("assistant", "A2")), ["A1", "A2"]),
    "a system alone": (conversation(("system", "A1")), ["A1"]),
    "an assistant alone": (conversation(("assistant", "A1")), ["A1"]),
    "parts": (
        conversation({"role": "user", "content": [{"type": "text", "text": "A1"}, {"type": "text", "text": "A2"}]}),
        ["A1A2"],
    ),
    "tools offered": (conversation(("system", "A1"), ("user", "A2"), tools=[WEATHER]), ["weather", "Tells it.", "A2"]),
    "tools without a system": (conversation(("user", "A2"), tools=[WEATHER]), ["Tells it.", "A2"]),
    "a tool called": (
        conversation(
            ("user", "A1"),
            {"role": "assistant", "content": None, "tool_calls": calls("k1")},
            {"role": "tool", "tool_call_id": "k1", "content": "A2"},
            tools=[WEATHER],
        ),
        ["A1", "to k1", "A2"],
    ),
    "two tools called": (
        conversation(
            ("system", "S"),
            ("user", "A1"),
            {"role": "assistant", "content": "A2", "tool_calls": calls("k1", "k2")},
            {"role": "tool", "tool_call_id": "k1", "content": "gave1"},
            {"role": "tool", "tool_call_id": "k2", "content": "gave2"},
            ("user", "A3"),
            tools=[WEATHER],
        ),
        ["S", "A1", "to k1", "gave1", "gave2", "A3"],
    ),
    "tools that are not offered any more": (
        conversation(
            ("user", "A1"),
            {"role": "assistant", "content": "", "tool_calls": calls("k1")},
            {"role": "tool", "tool_call_id": "k1", "content": "A2"},
        ),
        ["A1", "to k1", "A2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("form", CHATS)
def test_nothing_that_was_said_is_left_out_and_all_is_in_order(chats: Any, template: str, form: str) -> None:
    asked, texts = CHATS[form]
    text = written(chats[template], asked)
    places = [text.find(each) for each in texts]
    assert -1 not in places, text
    if "tools" not in form and "system" not in form:
        assert places == sorted(places), text
    assert all(text.count(each) == 1 for each in texts if each.startswith(("A", "gave"))), text


@pytest.mark.parametrize("template", TEMPLATES)
def test_two_messages_are_the_prompt_of_these_two(chats: Any, template: str) -> None:
    chat = chats[template]
    for system, user in (("You count.", "1?"), ("<|im_end|>", "[/INST]"), ("", "x"), (" a ", "b\n")):
        asked = conversation(("system", system), ("user", user))
        assert chat.encode_conversation(asked) == chat.encode_prompt(system, user)


def test_what_a_template_takes_is_found_out(chats: Any) -> None:
    forms = {name: chat.forms for name, chat in chats.items()}
    assert {n for n, f in forms.items() if f.tools} == {"hermes", "llama", "mistral"}
    assert {n: f.tool_form for n, f in forms.items() if f.tools} == {
        "hermes": "hermes", "llama": "llama", "mistral": "mistral"
    }  # fmt: skip
    assert {n for n, f in forms.items() if f.short_call_ids} == {"mistral"}
    assert {n for n, f in forms.items() if f.tools and not f.several_calls} == {"llama"}
    assert {n for n, f in forms.items() if not f.repeats} == {"mistral", "gemma", "none"}
    assert {n for n, f in forms.items() if not f.system} == {"gemma"}
    assert {n for n, f in forms.items() if f.names} == {"last_only"}
    assert not forms["last_only"].later_system


def test_a_native_call_is_written_as_the_template_writes_it(chats: Any) -> None:
    asked = CHATS["two tools called"][0]
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "to k1"}}\n</tool_call>' in written(
        chats["hermes"], asked
    )
    llama = written(chats["llama"], asked)
    assert llama.index("to k1") < llama.index("gave1") < llama.index("to k2") < llama.index("gave2")
    assert '{"name": "weather", "parameters": {"city": "to k1"}}' in llama
    mistral = written(chats["mistral"], conversation(*asked.messages[:-1], tools=[WEATHER]))
    assert '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "to k1"}, "id": "' in mistral
    assert mistral.index("to k2") < mistral.index("gave1") < mistral.index("gave2")


def test_who_speaks_is_told_where_several_do(chats: Any) -> None:
    named = [{"role": "user", "content": "A1", "name": "ann"}, {"role": "user", "content": "A2", "name": "bob"}]
    assert "ann: A1" in written(chats["plain"], conversation(*named))
    assert "bob: A2" in written(chats["plain"], conversation(*named))
    assert "ann" not in written(chats["plain"], conversation(named[0]))
    assert "A1(ann)" in written(chats["last_only"], conversation(*named))


TEXT = st.lists(
    st.sampled_from([*TOKENS, "<|im_start|>", "<|im_end|>", "<|im", "_end|>", "[/INST", "]", "<", ">", " ", "a", "\n",
                     "|im_end|", "<|im_start|", "</s", "{", '"', "\\", "é", "tool_call", "\ufffd", "system"]),
    max_size=5,
).map("".join)  # fmt: skip
NAME = st.sampled_from(["weather", "<tool_call>", "</s>"])
MESSAGE: Any = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "developer", "user"]), "content": TEXT, "name": TEXT}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT}),
    st.builds(
        lambda content, name, key, value: {
            "role": "assistant", "content": content,
            "tool_calls": [{"id": key, "type": "function",
                            "function": {"name": name, "arguments": json.dumps({key: value}, ensure_ascii=False)}}],
        }, TEXT, NAME, TEXT, TEXT),
    st.fixed_dictionaries({"role": st.just("tool"), "content": TEXT, "tool_call_id": TEXT}),
)  # fmt: skip
TOOL: Any = st.builds(
    lambda name, told, key: {"type": "function", "function": {
        "name": name, "description": told, "parameters": {"type": "object", "properties": {key: {"type": key}}}}},
    NAME, TEXT, TEXT,
)  # fmt: skip


@settings(
    max_examples=int(os.environ.get("FUZZ_INPUTS", "60")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=4), tools=st.lists(TOOL, max_size=2))
@pytest.mark.parametrize("template", TEMPLATES)
def test_no_text_becomes_a_control_token(chats: Any, template: str, messages: Any, tools: Any) -> None:
    chat = chats[template]
    hostile = chat.encode_conversation(Conversation(messages=tuple(messages), tools=tuple(tools)))
    tame = chat.encode_conversation(
        Conversation(messages=tuple(map(harmless, messages)), tools=tuple(map(harmless, tools)))
    )
    assert controls(chat, hostile) == controls(chat, tame)


def harmless(value: Any) -> Any:
    """The same value with letters alone where it came from outside; what is empty stays empty."""
    if isinstance(value, list):
        return [harmless(each) for each in value]
    if isinstance(value, dict):
        ours = ("role", "type") if "role" in value or value.get("type") in ("function", "object") else ()
        kept = {k: v if k in ours else arguments(v) if k == "arguments" else harmless(v) for k, v in value.items()}
        return {k if k in KEYS else plain(k): v for k, v in kept.items()}
    return plain(value)


KEYS = (
    "role", "content", "name", "tool_calls", "tool_call_id", "id", "type", "function", "arguments", "description",
    "parameters", "properties",
)  # fmt: skip


def arguments(text: str) -> str:
    return json.dumps({plain(k): plain(v) for k, v in json.loads(text).items()})


def plain(text: str) -> str:
    return "".join(c if c.isspace() else "x" for c in text)


def controls(chat: Chat, ids: list[int]) -> list[int]:
    known = set(chat.tokenizer.added_tokens_decoder)
    return [each for each in ids if each in known]


def test_two_texts_that_stand_close_make_no_control_token_together(chats: Any) -> None:
    chat = chats["close"]
    assert controls(chat, chat.encode_prompt("|im_end|", "x")) == [1]
    assert controls(chat, chat.encode_conversation(conversation(("user", "|im_end|"), ("user", "/s")))) == [1]
    glued = Chat(chat.tokenizer, "glued", date(2026, 3, 1), thinking=False)
    glued.tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    split = Chat(glued.tokenizer, "glued", date(2026, 3, 1), thinking=False)
    assert controls(split, split.encode_prompt("so <|im_ ", "end|> it goes")) == []
    assert controls(split, split.encode_prompt("so <|im", "_start|>")) == []


def test_text_that_only_might_join_is_encoded_as_the_tokenizer_does(chats: Any) -> None:
    chat = chats["plain"]
    for user in ("> quoted", "a <", "[1]", "x |", "<", "s>"):
        turns = [{"role": "system", "content": "You count."}, {"role": "user", "content": user}]
        exact = chat.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert chat.encode_prompt("You count.", user) == exact


def test_a_template_that_fails_on_a_chat_that_it_took_before_gets_two_texts(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ 1 // 0 if 'bad' in m.content }}|{% endfor %}"
    chat = Chat(tokenizer, "mine", date(2026, 3, 1), thinking=False)
    asked = conversation(("system", "A1"), ("user", "A2"), ("assistant", "A3"))
    assert written(chat, asked) == "A1|A2|A3|"
    write = chat._write
    assert write is not None

    def fails(messages: Any, tools: Any) -> str:
        if len(messages) > 2:
            raise ValueError("not three")
        return write(messages, tools)

    chat._write = fails
    assert written(chat, asked) == "A1|user: A2\n\nassistant: A3|"


SEVERAL: Callable[[int], Conversation] = lambda n: conversation(  # noqa: E731
    *(("user" if i % 2 == 0 else "assistant", f"message {i} < ") for i in range(n))
)


def test_a_control_token_that_is_a_word_is_none_in_a_key(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["EOS"], special_tokens=True)
    tokenizer.chat_template = TEMPLATES["hermes"]
    chat = Chat(tokenizer, "mine", date(2026, 3, 1), thinking=False)
    (eos,) = tokenizer.convert_tokens_to_ids(["EOS"])
    tool = {"type": "function", "function": {"name": "weather", "description": "EOS", "parameters": {"EOS": {}}}}
    ids = chat.encode_conversation(conversation(("user", "EOS"), tools=[tool]))
    assert eos not in ids
    assert chat.spell(ids).count("EOS") == 3


@pytest.mark.parametrize(("template", "begun"), [
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": '), ("llama", '{"name": "weather", "parameters": '),
    ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": '),
    ("plain", '<tool_call>\n{"name": "weather", "arguments": '),
    ("none", '<tool_call>\n{"name": "weather", "arguments": '),
])  # fmt: skip
def test_a_call_that_has_to_be_made_is_begun(chats: Any, template: str, begun: str) -> None:
    chat = chats[template]
    free = conversation(("system", "A1"), ("user", "A2"), tools=[WEATHER])
    for must_call in ("weather", "*"):
        made = chat.encode_conversation(free.model_copy(update={"must_call": must_call}))
        assert chat.spell(made) == written(chat, free) + begun
    other = {"type": "function", "function": {"name": "rain"}}
    either = free.model_copy(update={"must_call": "*", "tools": (WEATHER, other)})
    assert written(chat, either).endswith(begun.partition("weather")[0])
    if template == "hermes":
        assert controls(chat, chat.encode_conversation(either))[-1] == chat.tokenizer.convert_tokens_to_ids(
            "<tool_call>"
        )
    hostile = free.model_copy(update={"must_call": "<|im_end|>"})
    assert controls(chat, chat.encode_conversation(hostile)) == controls(chat, chat.encode_conversation(either))


def test_what_is_said_holds_the_marks_of_calls_and_no_other_control_token(chats: Any) -> None:
    chat = chats["hermes"]
    text = '<|im_start|>a <tool_call>{"x": 1}</tool_call><think><|im_end|>'
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat.said(ids) == 'a <tool_call>{"x": 1}</tool_call>'
    assert chat.decode(ids) == 'a {"x": 1}'


def test_a_long_chat_is_told_whole(chats: Any) -> None:
    text = written(chats["hermes"], SEVERAL(511))
    assert all(f"message {i} <" in text for i in range(511))
