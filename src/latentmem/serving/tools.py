"""Calls of tools in what a model says: its text becomes content and calls, all at once or as the text grows.

Models write calls in the form that their chat template showed them. What looks like a call but names no tool that the
agent has, or is no JSON, stays text: programs then see what the model said, and no call is made up.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from latentmem.parsing import parse_json
from latentmem.serving.asks import ToolCall

Piece = str | ToolCall


@dataclass(frozen=True)
class _Form:
    """How a family of models writes calls."""

    opening: str
    """What stands before a call; empty: a response is a call if it begins as JSON does."""
    closing: str = ""
    """What stands after it; empty: calls go on to the response's end."""


FORMS = {
    "hermes": (_Form("<tool_call>", "</tool_call>"),),
    "llama": (_Form("<|python_tag|>"), _Form("")),
    "mistral": (_Form("[TOOL_CALLS]"),),
    "bare": (_Form(""),),
    "told": (_Form("<tool_call>", "</tool_call>"),),
}
"""The forms by name: those of Hermes and Qwen, Llama 3, Mistral, and JSON that stands by itself. `told` is that of
Hermes, where calls were made elsewhere and are told as text."""
DEFAULT_FORM = "hermes"


def new_call_id() -> str:
    """Return a fresh id of a call."""
    return f"call_{secrets.token_hex(12)}"


@dataclass
class ToolReader:
    """Reads a response as it grows."""

    form: str
    """One of `FORMS`."""
    names: Collection[str]
    """The tools that the agent has; of an agent without tools all is text."""
    parallel: bool = True
    """Whether there may be several calls; otherwise what follows the first is left out."""
    new_id: Callable[[], str] = new_call_id
    _held: str = ""
    """Text of which it is not known yet what it is."""
    _open: _Form | None = None
    """The form of the call that the held text may be, its opening included."""
    _searched: int = 0
    """How much of the held text holds no end of the open call."""
    _begun: bool = field(default=False)
    """Whether anything but blanks was said, so that bare JSON is no call any more."""
    _called: bool = False

    def feed(self, text: str) -> list[Piece]:
        """Take more of the response; return what is certain now."""
        if not self.names:
            return [text] if text else []
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return self._allowed(pieces)

    def close(self) -> list[Piece]:
        """Return the rest: the response has ended."""
        pieces: list[Piece] = []
        while self._held:
            if self._open is None:
                pieces.append(self._held)
                self._held = ""
                continue
            inside = self._held[len(self._open.opening) :]
            calls = self._read(inside)
            if calls is None and self._open.closing:
                calls = self._read(inside.partition(self._open.closing)[0])
            self._resolve(calls, self._held, "", pieces)
        return self._allowed(pieces)

    def _step(self, pieces: list[Piece]) -> bool:
        """Decide about the beginning of the held text; return whether there may be more to decide."""
        if not self._held:
            return False
        if self._open is None:
            return self._look_for_opening(pieces)
        if not self._open.closing:
            return False  # it goes on to the end
        at = self._held.find(self._open.closing, max(len(self._open.opening), self._searched))
        if at < 0:
            self._searched = max(0, len(self._held) - len(self._open.closing) + 1)
            return False
        end = at + len(self._open.closing)
        inside = self._held[len(self._open.opening) : at]
        calls = self._read(inside)
        if calls is None and _ends_in_text(inside):
            self._searched = end  # the closing is written inside the call's own text
            return True
        self._resolve(calls, self._held[:end], self._held[end:], pieces)
        return True

    def _look_for_opening(self, pieces: list[Piece]) -> bool:
        forms = FORMS[self.form]
        if not self._begun and any(not form.opening for form in forms):
            blank = len(self._held) - len(self._held.lstrip())
            if blank == len(self._held):
                return False
            if self._held[blank] in "{[" and not self._held.startswith("[TOOL_CALLS]", blank):
                self._open = _Form("")
                return True
        found = [(at, form) for form in forms if form.opening and (at := self._held.find(form.opening)) >= 0]
        if found:
            at, self._open = min(found, key=lambda each: each[0])
            self._say(self._held[:at], pieces)
            self._held, self._searched = self._held[at:], 0
            return True
        kept = max((_overlap(self._held, form.opening) for form in forms), default=0)
        self._say(self._held[: len(self._held) - kept], pieces)
        self._held = self._held[len(self._held) - kept :]
        return False

    def _resolve(self, calls: list[ToolCall] | None, whole: str, rest: str, pieces: list[Piece]) -> None:
        if calls is None:
            self._say(whole, pieces)
        else:
            pieces += calls
            self._begun = True
        self._held, self._open, self._searched = rest, None, 0

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(text)
            self._begun = self._begun or bool(text.strip())

    def _allowed(self, pieces: list[Piece]) -> list[Piece]:
        allowed: list[Piece] = []
        for piece in pieces:
            if self._called and not self.parallel:
                break
            allowed.append(piece)
            self._called = self._called or isinstance(piece, ToolCall)
        return allowed

    def _read(self, text: str) -> list[ToolCall] | None:
        """Return the calls that a text is, or None if it is something else."""
        calls = [self._call(value) for value in _values(text)]
        return [call for call in calls if call is not None] if calls and None not in calls else None

    def _call(self, value: Any) -> ToolCall | None:
        """Return the call that a JSON value is."""
        if not isinstance(value, dict) or value.get("name") not in self.names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments)
            except ValueError:
                return None
        if not isinstance(arguments, dict):
            return None
        return ToolCall(self.new_id(), value["name"], json.dumps(arguments, ensure_ascii=False))


_NAMED = re.compile(r"\s*([a-zA-Z0-9_-]+)\s*(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)
_MISTRAL_ID = re.compile(r"\[CALL_ID\][a-zA-Z0-9]*")


def _values(text: str) -> list[Any]:
    """Return the JSON objects that a text is a row of: one, a list, several after another, or names with arguments."""
    found: list[Any] = []
    for part in _MISTRAL_ID.sub("", text).split("[TOOL_CALLS]"):
        named = _NAMED.match(part)
        rest = named[2] if named else part.strip()
        one_after_another: list[Any] = []
        while rest:
            try:
                value, end = _DECODER.raw_decode(rest)
                parse_json(rest[:end])  # the same, but strict: no key twice, no depth that hurts
            except (ValueError, RecursionError):
                return []
            one_after_another += value if isinstance(value, list) else [value]
            rest = rest[end:].lstrip(" \t\r\n;,")
        if named:
            if len(one_after_another) != 1:
                return []
            one_after_another = [{"name": named[1], "arguments": one_after_another[0]}]
        found += one_after_another
    return found


_DECODER = json.JSONDecoder()


def _ends_in_text(text: str) -> bool:
    """Return whether JSON breaks off inside a text, so that what follows belongs to it."""
    try:
        _DECODER.raw_decode(text.strip())
    except json.JSONDecodeError as error:
        return error.msg.startswith(("Unterminated string", "Invalid control character")) and '"' in text
    except RecursionError:
        return False
    return False


def _overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
