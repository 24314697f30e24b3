"""Passwords in addresses, taken out of whatever is shown or written down.

Errors quote what a user wrote, and runs write down what they were told. Both may be a whole URL, in a place where
nobody takes it for one. So every error of ours, and every setting that is written down, goes through here.
"""

import re
from typing import Any

# In a URL of a database even what stands for a path may be a careless password, so all up to the last @ goes, unless a
# port stands there.
_LOGIN = re.compile(
    r"""\b(postgres(?:ql)?://[^\s'"@:/]*):(?!\d+[/?,])[^\s'"]*@ | \b([a-z][a-z0-9+.-]*://[^\s'"@:/]*):[^\s'"@/]*@""",
    re.IGNORECASE | re.VERBOSE,
)
_PARAMETER = re.compile(r"""([?&](?:ssl)?password=)[^\s&'"]*""", re.IGNORECASE)


def hidden(text: str) -> str:
    """Return a text in which no URL has a password.

    >>> hidden("cannot reach postgresql://me:secret@host/db?sslpassword=x&bank=mine now")
    'cannot reach postgresql://me@host/db?sslpassword=***&bank=mine now'
    """
    if "://" not in text:
        return text
    return _PARAMETER.sub(r"\1***", _LOGIN.sub(lambda match: f"{match[1] or match[2]}@", text))


def hidden_in(value: Any) -> Any:
    """Return plain values, nested as JSON is, without a password in any text or key."""
    if isinstance(value, str):
        return hidden(value)
    if isinstance(value, dict):
        return {hidden_in(key): hidden_in(item) for key, item in value.items()}
    return [hidden_in(item) for item in value] if isinstance(value, list | tuple) else value
