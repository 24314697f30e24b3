"""What a chat template takes, found out by trying it.

A template is a program. Some refuse a system message that is not the first, two messages of one role after another or
the role of tools; others leave them out without a word. So each form is written with texts that can be recognised, and
counts as taken if they all come out, once and in order.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Chat = Sequence[dict[str, Any]]
Write = Callable[[Chat, Sequence[dict[str, Any]]], str]
"""A function: messages and tools -> the chat as text, ending in the generation prompt."""
CALL_MARKS = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
"""What stands around calls of tools; to some tokenizers these are control tokens."""
ToolForm = Literal["hermes", "llama", "mistral", "bare"]


@dataclass(frozen=True)
class ChatForms:
    """The forms that a template takes; what it does not take is told otherwise."""

    system: bool = False
    """A system message that is the first."""
    later_system: bool = False
    repeats: bool = False
    """Messages of one role after another."""
    begins_with_assistant: bool = False
    without_user: bool = False
    names: bool = False
    """It writes the `name` of a message."""
    tools: bool = False
    """Descriptions of tools, calls of them and what they gave."""
    several_calls: bool = False
    """Several calls in one message."""
    arguments_as_text: bool = False
    """It expects the arguments of a call as JSON text instead of an object."""
    short_call_ids: bool = False
    """It insists on ids of nine letters and digits."""
    tool_form: ToolForm = "hermes"
    """How it writes a call, and so how the model writes one."""


_MARK = "q7f3"
"""What the texts begin with that templates are tried with; no template holds it."""
_NAMES = (f"{_MARK}tool", f"{_MARK}key", f"{_MARK}value")
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAMES[0],
        "description": f"{_MARK}told",
        "parameters": {"type": "object", "properties": {_NAMES[1]: {"type": "string", "description": "x"}}},
    },
}


_BEGINNINGS = {
    "hermes": ('<tool_call>\n{"name": "', '", "arguments": '),
    "llama": ('{"name": "', '", "parameters": '),
    "mistral": ('[TOOL_CALLS] [{"name": "', '", "arguments": '),
    "bare": ('{"name": "', '", "arguments": '),
}
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def begun_call(form: str, must_call: str, names: Sequence[str]) -> str:
    """Return how a response begins that has to call a tool, up to where the agent decides; empty if it has not.

    Args:
        form: how the model writes calls; a form that is not here begins nothing.
        must_call: see `Conversation.must_call`.
        names: the tools that there are.
    """
    if not must_call or form not in _BEGINNINGS:
        return ""
    opening, between = _BEGINNINGS[form]
    name = must_call if must_call != "*" else names[0] if len(names) == 1 else ""
    return f"{opening}{name}{between}" if _NAME.fullmatch(name) else opening


def try_out(write: Write) -> ChatForms:
    """Return the forms that a template takes."""
    system = _takes(write, "system", "user")
    first = ["system"] if system else []
    tools = _try_tools(write)
    return ChatForms(
        system=system,
        later_system=_takes(write, *first, "user", "assistant", "system", "user"),
        repeats=_takes(write, *first, "user", "user", "assistant", "assistant", "user"),
        begins_with_assistant=_takes(write, *first, "assistant", "user"),
        without_user=system and _takes(write, "system"),
        names=f"{_MARK}name" in _written(write, [{"role": "user", "content": "x", "name": f"{_MARK}name"}]),
        **tools,
    )


def _takes(write: Write, *roles: str) -> bool:
    """Return whether messages of these roles all come out, once and in order."""
    texts = [f"{_MARK}x{number}y" for number in range(len(roles))]
    text = _written(write, [{"role": role, "content": each} for role, each in zip(roles, texts, strict=True)])
    return re.findall(f"{_MARK}x\\d+y", text) == texts


def _written(write: Write, chat: Chat, tools: Sequence[dict[str, Any]] = ()) -> str:
    try:
        return write(chat, tools)
    except Exception:  # a template is a program, and fails as programs do
        return ""


def _try_tools(write: Write) -> dict[str, Any]:
    """Return what there is to know about tools; nothing unless calls come out in a form that can be read back."""
    asked = {"role": "user", "content": f"{_MARK}asked"}
    shown = _written(write, [asked], [_TOOL])
    if _NAMES[0] not in shown or f"{_MARK}told" not in shown:
        return {}
    for as_text, short in itertools.product((False, True), (False, True)):
        made = "callq7f30" if short else f"call_{_MARK}_0000000"

        def call(number: int, made: str = made, as_text: bool = as_text) -> dict[str, Any]:
            arguments: Any = f'{{"{_NAMES[1]}": "{_NAMES[2]}"}}' if as_text else {_NAMES[1]: _NAMES[2]}
            function = {"name": _NAMES[0], "arguments": arguments}
            return {"id": f"{made[:-1]}{number}", "type": "function", "function": function}

        def gave(number: int, made: str = made) -> dict[str, Any]:
            called = {"tool_call_id": f"{made[:-1]}{number}", "name": _NAMES[0]}
            return {"role": "tool", "content": f"{_MARK}gave{number}", **called}

        one: Chat = [asked, {"role": "assistant", "content": "", "tool_calls": [call(0)]}, gave(0)]
        said = _written(write, one, [_TOOL]).rpartition(f"{_MARK}asked")[2]
        before, _, after = said.partition(_NAMES[0])
        has_arguments = re.search(rf'"{_NAMES[1]}"\s*:\s*"{_NAMES[2]}"', after)
        form = _form(before, after)
        if not has_arguments or f"{_MARK}gave0" not in after or form is None:
            continue
        two: Chat = [asked, {"role": "assistant", "content": "", "tool_calls": [call(0), call(1)]}, gave(0), gave(1)]
        text = _written(write, two, [_TOOL]).rpartition(f"{_MARK}asked")[2]
        several = text.count(_NAMES[2]) == 2 and f"{_MARK}gave0" in text and f"{_MARK}gave1" in text
        return {
            "tools": True,
            "several_calls": several,
            "arguments_as_text": as_text,
            "short_call_ids": short,
            "tool_form": form,
        }
    return {}


def _form(before: str, after: str) -> ToolForm | None:
    """Return how a call is written, from what stands before its name and after it."""
    if "[TOOL_CALLS]" in before:
        return "mistral"
    is_json = re.search(r'"name"\s*:\s*"$', before) is not None
    if is_json and "<tool_call>" in before:
        return "hermes"
    if is_json and ("<|python_tag|>" in before or '"parameters"' in after):
        return "llama"
    return "bare" if is_json and re.search(r'[{\[]\s*"(type|id|name)"', before) else None
