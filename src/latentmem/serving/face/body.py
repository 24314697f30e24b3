"""A request's body, at the door: what is too large, too deep or no JSON is refused before anything else reads it.

Only `application/json` is read. A page in somebody's browser can send other types to this machine without being asked
whether it may.
"""

from typing import Any

from starlette.requests import ClientDisconnect, Request

from latentmem.parsing import parse_json
from latentmem.serving.asks import Refused

MAX_BODY_BYTES = 2 << 20
MAX_MESSAGES = 512


async def read_body(request: Request) -> tuple[dict[str, Any], bytes]:
    """Return the JSON object that a request holds, and its bytes.

    Raises:
        Refused: it is none, or larger than is read.
    """
    if _kind(request) != "application/json":
        raise not_json(request)
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise Refused(413, f"the body is longer than {MAX_BODY_BYTES} bytes; send less")
    except ClientDisconnect:
        raise Refused(499, "the client went away") from None
    raw = bytes(body)
    return parse_body(raw), raw


def not_json(request: Request) -> Refused:
    """Return the refusal of a body of another type."""
    return Refused(415, f"the content type is {_kind(request)[:100]!r}; send the body as application/json")


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_body(raw: bytes) -> dict[str, Any]:
    """Return the JSON object that these bytes are.

    Raises:
        Refused: they are none.
    """
    try:
        values = parse_json(raw)
    except ValueError as error:
        raise Refused(400, f"the body is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise Refused(400, f"the body is a {type(values).__name__}; expected a JSON object")
    for field in ("messages", "input"):
        if isinstance(values.get(field), list) and len(values[field]) > MAX_MESSAGES:
            raise Refused(400, f"{field}: {len(values[field])} entries; at most {MAX_MESSAGES} are read", field)
    return values
