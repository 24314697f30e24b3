"""Where a bank is: the path of a SQLite file, or the URL of a PostgreSQL server. A password is never shown.

A URL is libpq's, such as postgresql://USER@HOST/DATABASE, with one parameter of our own: bank=NAME, the schema of the
database that holds the bank.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from latentmem.errors import BankError

DEFAULT_NAME = "latentmem"
"""The schema that holds a bank unless its URL names another."""

_SCHEMES = ("postgresql://", "postgres://")
_SECRET = ("password", "sslpassword")


@dataclass(frozen=True)
class Server:
    """A bank on a PostgreSQL server; as text it is the URL without passwords."""

    url: str = field(repr=False)
    """What libpq is given; it may hold a password."""
    name: str
    """The schema that holds the bank."""
    shown: str

    def __str__(self) -> str:
        return self.shown


Place = Path | Server
"""Where a bank is."""


def bank_place(text: str | Path | Server) -> Place:
    """Take a path or a URL for what it is.

    Raises:
        BankError: it is a URL with a mistake.
    """
    if isinstance(text, Server):
        return text
    if isinstance(text, Path) and str(text).startswith(("postgresql:/", "postgres:/")):
        raise BankError(f"{text.parts[0]}: a bank's URL was given as a path, which loses a slash; give it as text")
    if not is_url(str(text)):
        return Path(text)
    try:
        return read_url(str(text))
    except ValueError as error:
        raise BankError(f"the bank's URL {error}") from None


def is_url(text: str) -> bool:
    """Whether a text is the URL of a PostgreSQL server."""
    return text.startswith(_SCHEMES)


def read_url(url: str) -> Server:
    """Take a URL apart.

    Raises:
        ValueError: it has a mistake. The message shows nothing of the URL that may be a password.
    """
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    authority, slash, database = rest.partition("/")
    login, at, hosts = authority.rpartition("@")
    if "@" in login or "@" in database or "#" in rest:
        raise ValueError("has a stray @ or #; write %40 for @, %2F for / and %23 for # in a user, password or database")
    if "\0" in unquote(url):
        raise ValueError("holds a NUL")
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    if any(not equals for _, equals, _ in pairs):
        raise ValueError("has a parameter without =; write %3F for ? and %26 for & in a user or password")
    names = [unquote(value) for key, _, value in pairs if key == "bank"] or [DEFAULT_NAME]
    if len(names) > 1 or not re.fullmatch("(?!pg_)[a-z_][a-z0-9_]{0,62}", names[0]):
        raise ValueError(
            "needs one bank=NAME of small letters, digits and _, at most 63 of them, which begins with none of the "
            "digits and not with pg_"
        )
    shown_login = login.partition(":")[0] + at if login.partition(":")[0] else ""
    shown = [f"{key}={value}" for key, _, value in pairs if unquote(key) not in _SECRET]
    given = [f"{key}={value}" for key, _, value in pairs if key != "bank"]
    return Server(
        url=f"{scheme}://{rest}" + ("?" + "&".join(given) if given else ""),
        name=names[0],
        shown=f"{scheme}://{shown_login}{hosts}{slash}{database}" + ("?" + "&".join(shown) if shown else ""),
    )


def without_password(text: str) -> str:
    """Return a path as it is, and a URL without passwords; the server's client then looks for one elsewhere."""
    return read_url(text).shown if is_url(text) else text
