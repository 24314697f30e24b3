"""Who speaks, about what: each fact is taken from the first place that tells it.

The places, in this order: headers, the body's object `latentmem`, its `metadata`, the URL, the session's own bearer
token, and for the role the system message. The tenant comes from the API key alone.
"""

import hashlib
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from latentmem.outside import one_line
from latentmem.serving.asks import Refused, Speaker, Who
from latentmem.trajectory import SYSTEM_ROLES, Conversation, Role

FACTS = ("session", "role", "task", "domain")
MEMORY_HEADER = "x-latentmem-memory"
_HEADERS = {
    "session": ("x-latentmem-session-id", "x-latentmem-session", "x-session-id"),
    "role": ("x-latentmem-role", "x-latentmem-agent"),
    "task": ("x-latentmem-task",),
    "domain": ("x-latentmem-domain",),
    "memory": (MEMORY_HEADER,),
}
_KEYS = {
    "session": ("session", "session_id"),
    "role": ("role", "agent"),
    "task": ("task",),
    "domain": ("domain",),
    "memory": ("memory",),
}
MAX_CHARACTERS = 200
_UNSEEN = r"\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
NAME = rf"^[^\s{_UNSEEN}][^{_UNSEEN}]{{0,{MAX_CHARACTERS - 1}}}$"
"""A name begins with no blank, and holds no character that cannot be seen, or that turns the direction of others."""
_NEAR = 0.75
"""From here on a role's name is almost another, by `difflib`: `scuot` and `scout` are at .8."""
_MOST_WARNINGS = 100
"""Names that are warned about in the log, since clients choose them; answers go on telling."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnownRole:
    """A role of the configuration, and how its system message is recognised."""

    role: Role
    pattern: re.Pattern[str] | None = None
    """Found anywhere in the system message; None: the role's profile is the very message."""

    def speaks_in(self, system: str) -> bool:
        """Return whether this is the role's system message."""
        return self.role.profile.strip() == system.strip() or bool(self.pattern and self.pattern.search(system))


def who_speaks(
    caller: Who, headers: Mapping[str, str], body: Mapping[str, Any], url: Mapping[str, str]
) -> tuple[Who, str | None]:
    """Return who speaks and about what, and the memory that is asked for.

    Args:
        caller: what the API key or the session's token tells; a token's session admits no other.
        headers: the request's headers, by names in small letters.
        body: the request's JSON object.
        url: `sid` and `agent` of the URL, where it has them.

    Raises:
        Refused: a name cannot be used, or the token is another session's.
    """
    own, metadata = body.get("latentmem"), body.get("metadata")
    found: dict[str, str | None] = {}
    for fact in (*FACTS, "memory"):
        places = [
            *((name, _utf8(headers[name])) for name in _HEADERS[fact] if name in headers),
            *_told(own, "latentmem", _KEYS[fact]),
            *(_told(metadata, "metadata", (fact,)) if fact != "memory" else ()),
            *((f"/{key}/", url[key]) for key in _URL.get(fact, ()) if key in url),
        ]
        found[fact] = _name(*places[0]) if places else None
    memory = found.pop("memory")
    session, role, task, domain = (found[fact] for fact in FACTS)
    if caller.session is not None and session not in (None, caller.session):
        raise Refused(403, "the token belongs to another session than the one that is named", "session")
    return replace(caller, session=session or caller.session, role=role, task=task, domain=domain), memory


_URL = {"session": ("sid",), "role": ("agent",)}


def role_of(name: str | None, conversation: Conversation, known: Sequence[KnownRole]) -> Role:
    """Return the role that a request speaks for.

    A role that is named and known has the profile it is known by. Otherwise the system message decides: it is that of a
    known role, or becomes the profile of a new one.
    """
    system = conversation.system
    if name is not None:
        named = next((each.role for each in known if each.role.name == name), None)
        return named or Role(name=name, profile=system)
    role = next((each.role for each in known if each.speaks_in(system)), None)
    return role or Role(name=_own_name(conversation) or f"agent-{digest_of_text(system)}", profile=system)


class Roles:
    """The roles of a configuration; a name that is almost one of theirs is served, and warned about."""

    def __init__(self, known: Sequence[KnownRole] = ()) -> None:
        """Take the roles."""
        self._known = known
        self._roles = {each.role.name: each.role for each in known}
        self.names = frozenset(self._roles)
        """Of the roles of the configuration."""
        self._warned: set[str] = set()
        """Names that were warned about in the log: a program that has one wrong says it in each request."""

    def speaker(self, name: str | None, conversation: Conversation) -> Speaker:
        """Return who speaks; see `role_of`."""
        role = role_of(name, conversation, self._known)
        near = None if name is None else near_role(name, self._roles)
        warning = None
        if name is not None and near is not None:
            new = f"role {one_line(repr(name), 60)} is not in the configuration and is taken for a new one"
            warning = f"{new}; did you mean {near!r}?"
            if name not in self._warned and len(self._warned) < _MOST_WARNINGS:
                self._warned.add(name)
                logger.warning("%s", warning)
        return Speaker(role, self._roles.get(role.name) == role if self._roles else None, warning)


def near_role(name: str, known: Collection[str]) -> str | None:
    """Return the known name that a name is almost; None if it is known itself, or like none."""
    if name in known:
        return None
    folded = {each.casefold(): each for each in known}
    near = get_close_matches(name.casefold(), folded, n=1, cutoff=_NEAR)
    return folded[near[0]] if near else None


def digest_of_text(text: str) -> str:
    """Return a short name of a text, equal for texts that differ in blanks alone."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "replace")).hexdigest()[:10]


def _own_name(conversation: Conversation) -> str | None:
    """Return the name that the system message bears."""
    names = (m.get("name") for m in conversation.messages if m.get("role") in SYSTEM_ROLES)
    name = next((each for each in names if isinstance(each, str)), "").strip()
    return name if is_name(name) else None


def _told(values: Any, where: str, keys: Sequence[str]) -> list[tuple[str, Any]]:
    if not isinstance(values, dict):
        return []
    return [(f"{where}.{key}", values[key]) for key in keys if values.get(key) is not None]


def _utf8(value: str) -> str:
    """Return a header's text: HTTP reads bytes as Latin-1, and clients send UTF-8."""
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return value


def _name(where: str, value: Any) -> str:
    if isinstance(value, str) and is_name(value):
        return value
    raise Refused(
        400, f"{where}: {one_line(repr(value), 60)} is no name; send 1 to {MAX_CHARACTERS} visible characters", where
    )


def is_name(text: str) -> bool:
    """Return whether a text can name a session, a role or a task."""
    return re.fullmatch(NAME, text) is not None
