"""A chat of any form becomes one that its model's template takes; nothing that was said is left out.

What the template has no place for is told in the words of a place that it has: a system message that comes late as a
user's, a tool's result between two tags, the tools themselves at the end of the system message.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import JsonValue

from latentmem.models.chat_forms import ChatForms
from latentmem.parsing import parse_json
from latentmem.trajectory import SYSTEM_ROLES, Conversation, text_of

Messages = list[dict[str, Any]]

ROLES = ("system", "user", "assistant", "tool")
GO_ON = "Go on."
"""Said by the user where a template wants one to have spoken."""
TOOLS = """You have tools. Each line describes one:
{tools}
To use a tool, write a call in this form, with the name of the tool and values for its parameters:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>
Several calls may follow each other. What a tool gives stands between <tool_response> and </tool_response>."""
"""How tools are told where the template does not know any."""


def fold(conversation: Conversation, forms: ChatForms) -> tuple[Messages, list[dict[str, Any]]]:
    """Return messages and tools that a template of these forms takes."""
    messages = [_plain(message) for message in conversation.messages]
    if not forms.names:
        _tell_names(messages)
    tools = list(conversation.tools)
    if forms.tools:
        messages = [_callable(message, forms) for message in messages]
        messages = messages if forms.several_calls else _one_call_each(messages)
    else:
        messages = _calls_told(messages)
    messages = _systems_first(messages)
    if tools and not forms.tools:
        messages[:0] = [] if messages and messages[0]["role"] == "system" else [{"role": "system", "content": ""}]
        messages[0]["content"] = f"{messages[0]['content']}\n\n{tools_told(tools)}".strip()
        tools = []
    return _fitted(messages, forms), tools


def as_two(messages: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Return a chat as a system message and what a user says: the only other message, or all with their roles."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    others = messages[first:]
    user = others[0]["content"] if len(others) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in others)
    return messages[0]["content"] if first else "", user


def marked(value: Any, mark: Callable[[str], str], mark_key: Callable[[str], str]) -> Any:
    """Return a value of JSON with each text in it passed through a function, and each key through another."""
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, list):
        return [marked(part, mark, mark_key) for part in value]
    if isinstance(value, dict):
        return {mark_key(key): marked(part, mark, mark_key) for key, part in value.items()}
    return value


def names_of(tools: Sequence[dict[str, JsonValue]]) -> list[str]:
    """Return the names of tools."""
    functions = [tool.get("function") for tool in tools]
    return [str(function.get("name")) for function in functions if isinstance(function, dict)]


def tools_told(tools: Sequence[dict[str, JsonValue]]) -> str:
    """Return a description of tools for a model whose template does not know any."""
    lines = [json.dumps(tool.get("function"), ensure_ascii=False) for tool in tools]
    return TOOLS.format(tools="\n".join(lines))


def call_told(name: str, arguments: str) -> str:
    """Return a call of a tool as text."""
    return f'<tool_call>\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}\n</tool_call>'


def _plain(message: dict[str, JsonValue]) -> dict[str, Any]:
    """Return a message with its content as one text."""
    role = "system" if message.get("role") in SYSTEM_ROLES else message.get("role")
    plain = {"role": role if role in ROLES else "user", "content": text_of(message)}
    kept = {key: value for key in ("name", "tool_call_id") if isinstance(value := message.get(key), str) and value}
    calls = message.get("tool_calls")
    called = [call for call in calls if _is_call(call)] if isinstance(calls, list) and role == "assistant" else []
    return plain | kept | ({"tool_calls": called} if called else {})


def _is_call(call: JsonValue) -> bool:
    """Return whether this is a call as endpoints admit it; files of anybody may hold others."""
    function = call.get("function") if isinstance(call, dict) else None
    return (
        isinstance(call, dict)
        and isinstance(function, dict)
        and all(isinstance(part, str) for part in (call.get("id"), function.get("name"), function.get("arguments")))
    )


def _tell_names(messages: Messages) -> None:
    """Put the names of those who speak as users before what they say, if there are several."""
    if len({message.get("name") for message in messages if message["role"] == "user"}) > 1:
        for message in messages:
            if message["role"] == "user" and "name" in message:
                message["content"] = f"{message['name']}: {message['content']}"


def _callable(message: dict[str, Any], forms: ChatForms) -> dict[str, Any]:
    """Return a message whose calls, or whose call's id, are as the template wants them."""
    plain = dict(message)
    if forms.short_call_ids and "tool_call_id" in plain:
        plain["tool_call_id"] = _short(plain["tool_call_id"])
    if "tool_calls" not in plain:
        return plain
    plain["tool_calls"] = calls = []
    for call in message["tool_calls"]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        given: Any = arguments if forms.arguments_as_text else _object(arguments)
        made = _short(call["id"]) if forms.short_call_ids else call["id"]
        calls.append({"id": made, "type": "function", "function": {"name": name, "arguments": given}})
    return plain


def _object(arguments: str) -> Any:
    try:
        return parse_json(arguments)
    except ValueError:
        return arguments


def _short(made: str) -> str:
    return hashlib.sha256(made.encode("utf-8", "replace")).hexdigest()[:9]


def _one_call_each(messages: Messages) -> Messages:
    """Return messages that call one tool each, followed by what it gave."""
    apart: Messages = []
    gave = {message.get("tool_call_id"): message for message in messages if message["role"] == "tool"}
    moved: set[int] = set()
    for message in messages:
        if id(message) in moved:
            continue
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            apart.append(message)
            continue
        for number, call in enumerate(calls):
            apart.append({**message, "content": "" if number else message["content"], "tool_calls": [call]})
            if call["id"] in gave and id(gave[call["id"]]) not in moved:
                apart.append(gave[call["id"]])
                moved.add(id(gave[call["id"]]))
    return apart


def _calls_told(messages: Messages) -> Messages:
    """Return messages in which calls and what they gave are text."""
    told: Messages = []
    for message in messages:
        calls = [call_told(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
        content = "\n".join(part for part in (message["content"], *calls) if part)
        if message["role"] == "tool":
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            if told and told[-1].get("is_result"):
                told[-1]["content"] += f"\n{content}"
                continue
            told.append({"role": "user", "content": content, "is_result": True})
        else:
            told.append({"role": message["role"], "content": content} | _name_of(message))
    return [{key: value for key, value in message.items() if key != "is_result"} for message in told]


def _systems_first(messages: Messages) -> Messages:
    """Return the chat with its first system messages in one."""
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if first < 2:
        return messages
    return [{"role": "system", "content": "\n\n".join(m["content"] for m in messages[:first])}, *messages[first:]]


def _fitted(messages: Messages, forms: ChatForms) -> Messages:
    """Return the chat in an order of roles that the template takes."""
    if not forms.later_system:
        messages = [*messages[:1], *(m | {"role": "user"} if m["role"] == "system" else m for m in messages[1:])]
    system = ""
    if messages and messages[0]["role"] == "system" and not forms.system:
        system, messages = messages[0]["content"], messages[1:]
    start = 1 if messages and messages[0]["role"] == "system" else 0
    no_user = not any(message["role"] == "user" for message in messages)
    others_first = bool(messages[start:]) and messages[start]["role"] != "user"
    if (no_user and not forms.without_user) or (others_first and not forms.begins_with_assistant):
        messages = [*messages[:start], {"role": "user", "content": system or GO_ON}, *messages[start:]]
        system = ""
    if system:
        at = next(i for i, message in enumerate(messages) if message["role"] == "user")
        messages = [*messages]
        messages[at] = messages[at] | {"content": f"{system}\n\n{messages[at]['content']}"}
    return messages if forms.repeats else _joined(messages)


def _joined(messages: Messages) -> Messages:
    """Return the chat with messages of one role after another in one."""
    joined: Messages = []
    for message in messages:
        last = joined[-1] if joined else None
        if last is None or last["role"] != message["role"] or message["role"] == "tool":
            joined.append(dict(message))
            continue
        last["content"] = "\n\n".join(part for part in (last["content"], message["content"]) if part)
        if "tool_calls" in message:
            last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
    return joined


def _name_of(message: dict[str, Any]) -> dict[str, Any]:
    return {"name": message["name"]} if "name" in message else {}
