"""Which requests of a session are one conversation: each belongs to the longest earlier one that it continues.

Sub-agents, and agents whose context was compacted, begin conversations of their own. Messages are compared as programs
send them back, which is seldom byte for byte: null for empty content, parts for text, other ids of tools, other blanks
around a response or within the arguments of a call.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from latentmem.trajectory import SYSTEM_ROLES, text_of


@dataclass
class Lineages:
    """The conversations of one session. It keeps hashes alone: two for each call."""

    _said: dict[bytes, str] = field(default_factory=dict)
    """Lineages by the hash of a chat that ends in an answer; of equal ones, the last."""
    _asked: dict[bytes, str] = field(default_factory=dict)
    """Lineages by the hash of a chat that was sent."""
    _count: int = 0

    def of(self, messages: Sequence[Mapping[str, JsonValue]]) -> str:
        """Return the lineage of a request, and remember it.

        A request that continues an answer belongs to that answer's lineage. One that continues only what was asked,
        because the program changed the answer, belongs there too. The same request again begins anew.
        """
        hashes = chain(messages)
        lineage = next((self._said[h] for h in reversed(hashes) if h in self._said), None)
        if lineage is None:
            lineage = next((self._asked[h] for h in reversed(hashes[:-1]) if h in self._asked), None)
        if lineage is None:
            lineage = str(self._count)
            self._count += 1
        self._asked[hashes[-1]] = lineage
        return lineage

    def heard(self, lineage: str, messages: Sequence[Mapping[str, JsonValue]], answer: Mapping[str, JsonValue]) -> None:
        """Remember an answer: `Choice.as_sent_back`. A request with several answers has several ends."""
        self._said[chain([*messages, answer])[-1]] = lineage


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
