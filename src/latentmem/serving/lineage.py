"""Which chats are one: the hashes by which a request finds the longest earlier conversation that it continues.

Sub-agents, and agents whose context was compacted, begin conversations of their own. Messages are compared as programs
send them back, which is seldom byte for byte: null for empty content, parts for text, other ids of tools, other blanks
around a response or within the arguments of a call.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from latentmem.trajectory import SYSTEM_ROLES, text_of


def chain(messages: Sequence[Mapping[str, JsonValue]]) -> list[bytes]:
    """Return the hash of each beginning of a chat, the empty one left out.

    A request whose chat begins with an earlier one, its answer (`Choice.as_sent_back`) included, continues that one.
    """
    hashes: list[bytes] = []
    last, ids = b"", dict[str, int]()
    for message in messages:
        content = json.dumps(_comparable(message, ids), ensure_ascii=False, separators=(",", ":"))
        last = hashlib.sha256(last + content.encode("utf-8", "surrogatepass")).digest()
        hashes.append(last)
    return hashes


def _comparable(message: Mapping[str, JsonValue], ids: dict[str, int]) -> list[JsonValue]:
    """Return what of a message counts. `ids` numbers the calls so far: programs give them ids of their own."""
    role = message.get("role")
    calls: list[JsonValue] = []
    for call in _list(message.get("tool_calls")):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(call, dict) and isinstance(function, dict):
            ids.setdefault(str(call.get("id")), len(ids))
            calls.append([function.get("name"), _arguments(function.get("arguments"))])
    answers: JsonValue = ids.get(str(message.get("tool_call_id"))) if role == "tool" else None
    shown = "system" if role in SYSTEM_ROLES else role
    return [shown, text_of(message).strip(), calls, answers]


def _arguments(text: JsonValue) -> JsonValue:
    """Return the arguments of a call in one spelling."""
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except (ValueError, RecursionError):
            return text
    try:
        return json.dumps(text, sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return str(text)


def _list(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else []
