"""A connection to a PostgreSQL server: how long it waits, and what the server's complaints are in one line."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from latentmem.bank_place import Server
from latentmem.errors import BankError

BUSY_SECONDS = 60.0
"""How long a writer waits for another one."""

_OLDEST = 120000
"""The oldest server that has what is asked of it: PostgreSQL 12."""
_WAITING = {
    "connect_timeout": 10,  # seconds, for each host of the URL
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds
    "fallback_application_name": "latentmem",
}
"""A network that is cut is noticed after half a minute; libpq alone would wait for hours. A URL may say otherwise."""
_SERVER_WAITING = """
    SELECT set_config('tcp_keepalives_idle', '10', false), set_config('tcp_keepalives_interval', '5', false),
    set_config('tcp_keepalives_count', '3', false), set_config('tcp_user_timeout', '30s', false)
"""  # the server too gives up a client that vanished, and with it the writers' lock
_ADVICE = {
    "25006": "this server can only be read; give the one that it follows",
    "42501": "this user lacks a right; grant it the rights on the schema and its tables",
    "42703": "not an experience bank; name another schema with ?bank=NAME",
    "42P01": "not an experience bank, or damaged; name another schema with ?bank=NAME, or restore it from an export",
    "53100": "the server's disk is full, nothing of this was stored; free some space there and repeat",
    "55P03": f"locked by another process for {BUSY_SECONDS:g} s; end that one or try again",
    "57014": "stopped at the server, nothing of this was stored; repeat",
    "XX001": "damaged at the server; restore the database, or the bank from an export",
    "XX002": "an index is damaged at the server; REINDEX it there",
}
"""What to do about an SQLSTATE."""


def connect(server: Server) -> psycopg.Connection[Any]:
    """Open a connection, each of whose statements is a transaction unless one is begun.

    Raises:
        BankError: the URL has a mistake; or the server does not answer, refuses, is too old, or holds no UTF-8.
    """
    try:
        settings: dict[str, Any] = {**_WAITING, **conninfo_to_dict(server.url), "client_encoding": "utf8"}
    except psycopg.Error:  # whose message quotes the URL
        raise BankError(f"{server}: is no URL that libpq understands; see its connection URIs") from None
    try:
        connection: psycopg.Connection[Any] = psycopg.connect(
            **settings, autocommit=True, prepare_threshold=None, row_factory=_row_factory
        )
    except psycopg.Error as error:
        raise BankError(
            f"{server}: cannot be connected to; check the URL, the server, the network and the password, which is best "
            f"kept in PGPASSWORD or ~/.pgpass ({line(server, error)})"
        ) from None
    try:
        encoding = connection.info.parameter_status("server_encoding")
        if connection.info.server_version < _OLDEST or encoding != "UTF8":
            raise BankError(
                f"{server}: PostgreSQL {connection.info.server_version // 10000} with encoding {encoding}; a bank "
                "needs version 12 or newer and a database made with ENCODING 'UTF8'"
            )
        connection.execute(_SERVER_WAITING)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def explained(server: Server) -> Iterator[None]:
    """Turn what the server, or the network, complains of into one line."""
    try:
        yield
    except psycopg.Error as error:
        raise BankError(f"{server}: {_advice(error)} ({line(server, error)})") from None
    except UnicodeEncodeError as error:
        raise BankError(f"{server}: a filter is {error.object[:80]!a}, which is not valid Unicode") from None


def line(server: Server, error: Exception) -> str:
    """Return an error's message on one line, without the URL's password should it quote that."""
    text = " ".join(str(error).split())
    password = conninfo_to_dict(server.url).get("password")
    return text.replace(str(password), "***") if password else text


def _advice(error: psycopg.Error) -> str:
    advice = _ADVICE.get(error.sqlstate or "")
    if advice is not None:
        return advice
    if isinstance(error, psycopg.OperationalError):
        return "the server does not answer, nothing of this was stored; check it and the network, then repeat"
    return "refused by the server, nothing of this was stored; `latentmem bank verify` may say more"


# PostgreSQL's text cannot hold NUL, which a task may. The pair \1\1 stands for it, and \1\2 for \1, so nothing is lost
# and the order of texts stays.


def escaped(text: str) -> str:
    r"""Return the text as it is stored.

    >>> escaped("a\0b")
    'a\x01\x01b'
    """
    return text.replace("\1", "\1\2").replace("\0", "\1\1") if "\0" in text or "\1" in text else text


def restored(text: str) -> str:
    r"""Return the text that was stored.

    >>> restored("a\1\1b")
    'a\x00b'
    """
    return text.replace("\1\1", "\0").replace("\1\2", "\1") if "\1" in text else text


def _row_factory(cursor: Any) -> Any:
    def row(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(restored(value) if isinstance(value, str) else value for value in values)

    return row


def plain(value: str) -> Any:
    """Return a value of the meta table, which is JSON; what is none stays text."""
    try:
        return json.loads(value)
    except ValueError:
        return value
