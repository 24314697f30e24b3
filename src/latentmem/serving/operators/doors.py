"""Which scope each route needs: one table, in which a route that is missing is for the operator alone."""

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Door:
    """A route as the gate knows it."""

    method: str
    name: str
    """The route's template; bounded, so it may be a label of metrics."""
    scope: str
    """The scope that it needs, or `none`, `any`, or `operator`: admin without a tenant."""
    is_of_session: bool = False
    """Whether a session's own token opens it, for that session."""

    @property
    def is_open(self) -> bool:
        """Whether it needs no key."""
        return self.scope == "none"

    @property
    def is_for_operator(self) -> bool:
        """Whether it is for the operator alone."""
        return self.scope == "operator"

    def opens_for(self, scopes: Collection[str]) -> bool:
        """Return whether these scopes suffice."""
        return self.scope in scopes or self.scope == "any" or (self.is_for_operator and "admin" in scopes)

    def session_of(self, path: str) -> str | None:
        """Return the session that a path names."""
        match = _SESSION.match(path)
        return match[1] if match else None


_SESSION = re.compile(r"/sessions/([^/]*)")
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
_SPOKEN = ("POST /chat/completions", "POST /responses")
DOORS = {
    "GET /healthz": "none",
    "GET /metrics": "operator",
    "GET /openapi.json": "any",
    "POST /forget": "admin",
    "GET /sessions": "read",
    "POST /sessions": "write",
    "GET /sessions/{sid}": "read",
    "POST /sessions/{sid}/events": "write",
    "POST /sessions/{sid}/complete": "write",
    "GET /sessions/{sid}/traces": "read",
    "GET /sessions/{sid}/calls/{call}/why": "read",
    "POST /sessions/{sid}/replay": "read",
    **{
        f"{method} {place}/v1{path}": "infer"
        for place in ("", "/agents/{agent}", "/sessions/{sid}", "/sessions/{sid}/agents/{agent}")
        for method, path in (spoken.split(" ") for spoken in ("GET /models", "GET /models/{model}", *_SPOKEN))
    },
}
"""The scope that each route needs, or `none`, `any`, `operator`."""
TENANTS_DOORS = tuple(words for words, scope in DOORS.items() if scope != "operator")
"""Those that are not for the operator alone."""
_OF_KEYS_ALONE = (
    "GET /metrics",
    "POST /forget",
    "GET /sessions",
    "POST /sessions",
    "POST /sessions/{sid}/replay",
)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile("".join(_PARTS.get(part, re.escape(part)) for part in re.split(r"(\{\w+\})", template)))


_PARTS = {"{sid}": "[^/]+", "{call}": "[^/]+", "{agent}": "[^/]+", "{model}": ".+"}
"""What may stand in a template's place; a model's name may have slashes."""


def _made(words: str, scope: str) -> tuple[str, re.Pattern[str], Door]:
    method, template = words.split(" ")
    is_of_session = words not in _OF_KEYS_ALONE
    return method, _pattern(template), Door(method, template, scope, is_of_session)


_TABLE = [_made(words, scope) for words, scope in DOORS.items()]


def door_of(method: str, path: str) -> Door:
    """Return the route of a request."""
    for known, pattern, door in _TABLE:
        if method == known and pattern.fullmatch(path):
            return door
    return Door(method if method in _METHODS else "other", "unknown", "operator")
