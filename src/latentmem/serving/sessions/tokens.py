"""A session's own token: whoever holds it speaks in that session, and in no other.

A token names its session and is signed, so it needs no table, and a store that was lost opens no session.
"""

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass

_PREFIX = "lms_"
_LONGEST = 4096


@dataclass(frozen=True)
class Opened:
    """What a token tells."""

    tenant: str
    session: str
    key: str
    """Id of the API key that opened the session."""


class Tokens:
    """Makes and reads the tokens of one store."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def make(self, opened: Opened) -> str:
        """Return the token of a session."""
        told = json.dumps([opened.tenant, opened.session, opened.key], separators=(",", ":")).encode()
        return f"{_PREFIX}{_text(told)}.{_text(self._sign(told))}"

    def read(self, token: str) -> Opened | None:
        """Return what a token tells; None: it is none of ours."""
        told, dot, signature = token.removeprefix(_PREFIX).partition(".")
        if not token.startswith(_PREFIX) or not dot or len(token) > _LONGEST:
            return None
        try:
            content, signed = _bytes(told), _bytes(signature)
        except (ValueError, binascii.Error):
            return None
        if not hmac.compare_digest(signed, self._sign(content)):
            return None
        opened = Opened(*json.loads(content))
        return opened if self.make(opened) == token else None  # some bits of the last characters say nothing

    def _sign(self, content: bytes) -> bytes:
        return hmac.digest(self._secret, content, hashlib.sha256)


def _text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text.encode() + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
