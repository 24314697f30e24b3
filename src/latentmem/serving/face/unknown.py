"""What is answered where there is no route: where OpenAI's API is, and the route that was probably meant.

A `base_url` without `/v1`, or with a letter missing, comes here. Clients make "there is no such model" of a bare 404.
"""

from collections.abc import Collection, Iterator, Sequence
from difflib import SequenceMatcher

from starlette.requests import Request

from latentmem.outside import one_line
from latentmem.serving.asks import Refused

_NEAR = 0.75
"""From here on a part of a path is almost another, by `difflib`; what a client named itself does not count."""
_MOST_PARTS = 12
"""Paths of more parts are not compared."""


def no_route(request: Request, routes: Collection[str], status: int = 404) -> Refused:
    """Return what a request is told for which there is no route.

    Args:
        request: the request; nothing of its body is read.
        routes: those there are, each as `POST /sessions/{sid}/events`.
        status: 405 if there are other methods of this path.
    """
    method, path = request.method, request.url.path
    near = nearest(method, path, routes)
    parts = [f"there is no route {one_line(f'{method} {path}')}"]
    if near is None and path.startswith("/v1/"):
        parts.append("of OpenAI's API there are /v1/chat/completions, /v1/responses and /v1/models")
    else:
        parts.append(f"OpenAI's API is at /v1 (base_url {one_line(str(request.base_url))}v1)")
    if near is not None:
        parts.append(f"did you mean {one_line(near)}?")
    return Refused(status, "; ".join(parts), code="no_such_route")


def nearest(method: str, path: str, routes: Collection[str]) -> str | None:
    """Return the route that a request is almost one of, with the request's own names in it.

    >>> nearest("POST", "/session/x/v1/responses", ["POST /sessions/{sid}/v1/responses", "GET /sessions/{sid}"])
    'POST /sessions/x/v1/responses'
    >>> nearest("GET", "/elsewhere", ["GET /sessions/{sid}"]) is None
    True
    """
    parts = path.split("/")[1:]
    if len(parts) > _MOST_PARTS:
        return None
    best, found = _NEAR, None
    for route in routes:
        known, _, template = route.partition(" ")
        for filled, likeness in _fits(parts, template.replace(":path}", "}").split("/")[1:]):
            if known != method and likeness < 1:
                continue  # two mistakes at once are not almost right
            if likeness > best:
                best, found = likeness, f"{known} /{'/'.join(filled)}"
    return found


def _fits(parts: Sequence[str], template: Sequence[str]) -> Iterator[tuple[list[str], float]]:
    """Yield a template filled with the names of a path, and how like they are, for each way in which one fits."""
    given, ways = list(parts), [list(parts)]
    if len(parts) == len(template) + 1:  # `/v1/v1/responses`, or `//v1/responses`
        ways = [given[:i] + given[i + 1 :] for i, part in enumerate(given) if part in ("", "v1")]
    if len(parts) == len(template) - 1:
        ways = [[*given[:i], part, *given[i:]] for i, part in enumerate(template) if part == "v1"]
    for way in ways:
        if len(way) == len(template) and all(said for said, part in zip(way, template, strict=True) if _is_name(part)):
            likenesses = [
                SequenceMatcher(None, said, part, autojunk=False).ratio()
                for said, part in zip(way, template, strict=True)
                if not _is_name(part)
            ]
            filled = [said if _is_name(part) else part for said, part in zip(way, template, strict=True)]
            yield filled, min(likenesses)


def _is_name(part: str) -> bool:
    return part.startswith("{")
