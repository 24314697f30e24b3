"""API keys: who may ask for what, on whose behalf, and how much; one SQLite file.

A secret holds 256 random bits and is shown once. The file keeps its SHA-256: nobody can try 2^256 secrets, so a slow
hash, which protects words that people choose, would only slow the server down. A key is looked up by its id, which is
no secret, and its digest is compared in constant time. Each request asks the file anew, so a revoked key is refused
from its next request on.
"""

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from latentmem.errors import KeysError, ServingError, suggest
from latentmem.listening import is_this_machine

SCOPES = ("infer", "read", "write", "admin")
"""What a key may allow: asking for responses; reading sessions; opening, rewarding and closing them; forgetting, and
for the operator's keys the metrics."""
SECRET = re.compile(r"lm_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
"""Form of a secret; the first part is the key's id."""
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID = re.compile(r"[0-9a-f]{12}")
_NOBODY = hashlib.sha256(secrets.token_bytes(32)).digest()
"""Compared with where there is no such key, so that this takes as long."""
_WAIT_SECONDS = 5.0
_VERSION = 1
_FORM = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, digest BLOB NOT NULL, tenant TEXT NOT NULL, scopes TEXT NOT NULL, created REAL NOT NULL,
    expires REAL, revoked REAL, requests_per_minute INTEGER, tokens_per_minute INTEGER, parallel INTEGER,
    shares INTEGER NOT NULL
) WITHOUT ROWID
"""
_COLUMNS = "id, tenant, scopes, created, expires, revoked, requests_per_minute, tokens_per_minute, parallel, shares"


@dataclass(frozen=True)
class Key:
    """A key without its secret."""

    id: str
    tenant: str
    """Whose key it is; empty for the operator's own."""
    scopes: frozenset[str]
    """Some of `SCOPES`."""
    created: float
    """Seconds since 1970."""
    expires: float | None = None
    revoked: float | None = None
    requests_per_minute: int | None = None
    """None: as many as the server takes."""
    tokens_per_minute: int | None = None
    """Tokens of prompts, latents and responses together."""
    parallel: int | None = None
    """Requests at the same time."""
    shares: bool = False
    """Whether the tenant's judged episodes go to the pool that every tenant recalls."""

    def is_valid(self, now: float) -> bool:
        """Return whether it is neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)

    def state(self, now: float) -> str:
        """Return `valid`, `expired` or `revoked`."""
        return "revoked" if self.revoked is not None else "valid" if self.is_valid(now) else "expired"


class Keys:
    """The keys of one server. Threads may share an object, and processes a file."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Take the place of the file, which need not exist: then there are no keys yet."""
        self.path = path
        self._clock = clock
        self._lock = Lock()
        self._db: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        self._were_there = False

    def create(
        self,
        tenant: str,
        scopes: Collection[str],
        *,
        days: float | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        parallel: int | None = None,
        shares: bool = False,
    ) -> tuple[Key, str]:
        """Make a key; return it and its secret, which is kept nowhere.

        Args:
            tenant: whose key it is; empty for the operator's own.
            scopes: some of `SCOPES`, at least one.
            days: after how many days it expires; None: never.
            requests_per_minute: see `Key`.
            tokens_per_minute: see `Key`.
            parallel: see `Key`.
            shares: see `Key`.

        Raises:
            KeysError: the tenant's name or a scope is wrong, or the file cannot be written.
        """
        check_tenant(tenant)
        for scope in scopes:
            if scope not in SCOPES:
                raise KeysError(f"scope {scope!r} is unknown; {suggest(scope, SCOPES)}")
        if not scopes:
            raise KeysError(f"a key without scopes may do nothing; name some of {', '.join(SCOPES)}")
        now = self._clock()
        id, drawn = secrets.token_hex(6), secrets.token_urlsafe(32)
        secret = f"lm_{id}_{drawn}"
        expires = None if days is None else now + days * 86400
        limits = (requests_per_minute, tokens_per_minute, parallel)
        key = Key(id, tenant, frozenset(scopes), now, expires, None, *limits, shares)
        with self._writing() as db:
            db.execute(
                f"INSERT INTO keys ({_COLUMNS}, digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                (id, tenant, " ".join(sorted(scopes)), now, expires, None, *limits, int(shares), _digest(secret)),
            )
        return key, secret

    def revoke(self, id: str) -> Key:
        """End a key at once, for running servers too; one that was revoked before stays as it is.

        Raises:
            KeysError: there is no such key, or the file cannot be written.
        """
        if SECRET.fullmatch(id):
            raise KeysError("that is a whole secret, which is in the shell's history now; give the key's id alone")
        if not _ID.fullmatch(id) or not self.path.exists():
            raise KeysError(f"{self.path}: no key has the id {id[:40]!r}; `latentmem keys list` shows their ids")
        with self._writing() as db:
            db.execute("UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (self._clock(), id))
            row = db.execute(f"SELECT {_COLUMNS} FROM keys WHERE id = ?", (id,)).fetchone()  # noqa: S608
        if row is None:
            raise KeysError(f"{self.path}: no key has the id {id!r}; `latentmem keys list` shows their ids")
        return _key(row)

    def all(self) -> list[Key]:
        """Return all keys, the oldest first.

        Raises:
            KeysError: the file cannot be read.
        """
        with self._reading() as db:
            rows = [] if db is None else db.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY created, id").fetchall()  # noqa: S608
        return [_key(row) for row in rows]

    def exist(self) -> bool:
        """Return whether a key was ever made; then requests need one, also when all of them were revoked.

        A file that vanishes or is emptied while a server runs opens nothing.

        Raises:
            KeysError: the file cannot be read.
        """
        with self._reading() as db:
            found = db is not None and db.execute("SELECT 1 FROM keys LIMIT 1").fetchone() is not None
        self._were_there = self._were_there or found
        return self._were_there

    def find(self, secret: str) -> Key | None:
        """Return the valid key of a secret, or None.

        Raises:
            KeysError: the file cannot be read.
        """
        match = SECRET.fullmatch(secret)
        with self._reading() as db:
            row = None
            if db is not None:
                id = match[1] if match else "no such id"
                row = db.execute(f"SELECT {_COLUMNS}, digest FROM keys WHERE id = ?", (id,)).fetchone()  # noqa: S608
        is_it = hmac.compare_digest(_digest(secret), row[-1] if row else _NOBODY)
        key = _key(row[:-1]) if row and is_it else None
        return key if key is not None and key.is_valid(self._clock()) else None

    def valid(self, id: str) -> Key | None:
        """Return the valid key of an id, or None; for what was asked for with that key earlier.

        Raises:
            KeysError: the file cannot be read.
        """
        with self._reading() as db:
            row = None if db is None else db.execute(f"SELECT {_COLUMNS} FROM keys WHERE id = ?", (id,)).fetchone()  # noqa: S608
        key = _key(row) if row else None
        return key if key is not None and key.is_valid(self._clock()) else None

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
        self._db = self._opened = None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """Yield the file as it is now, or None where there is none."""
        with self._lock, self._explained():
            self._follow()
            yield self._db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Yield the file in one transaction, made if there is none; at the end it is on stable storage."""
        with self._lock, self._explained():
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Nobody else may read it from its first byte on.
                os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
            self._follow()
            assert self._db is not None
            db = self._db
            db.execute("BEGIN IMMEDIATE")
            try:
                db.execute(_FORM)
                db.execute(f"PRAGMA user_version = {_VERSION}")
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def _follow(self) -> None:
        """Open the file that stands at the path now."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._close()
            return
        place = status.st_dev, status.st_ino
        if place == self._opened:
            return
        self._close()
        if status.st_size == 0:
            db = self._connect()
            db.execute(_FORM)
        else:
            db = self._connect()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            db.close()
            raise KeysError(f"{self.path}: form {version} is newer than {_VERSION}; upgrade latentmem")
        self._db, self._opened = db, place

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA synchronous = EXTRA")
        return db

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            with suppress(sqlite3.Error):
                self._close()
            raise KeysError(
                f"{self.path}: the keys cannot be read or written ({error}); it has to be the SQLite file of "
                "`latentmem keys`, in a folder that this user may write to"
            ) from None


def check_tenant(name: str) -> None:
    """Check the name of a tenant; the empty one is the operator.

    Raises:
        KeysError: it is longer than 64 characters, or has others than ASCII letters, digits, dots, dashes and
            underscores: two names that look alike would be two tenants.
    """
    if name and not _TENANT.fullmatch(name):
        raise KeysError(
            f"tenant {name[:80]!a} is no name; expected up to 64 ASCII letters, digits, dots, dashes and underscores, "
            "the first a letter or digit"
        )


def shown(key: Key, now: float) -> str:
    """Return one line about a key, for a list."""
    limits = [
        f"{value} {words}"
        for value, words in (
            (key.requests_per_minute, "requests a minute"),
            (key.tokens_per_minute, "tokens a minute"),
            (key.parallel, "at once"),
        )
        if value is not None
    ]
    until = [] if key.expires is None else [f"until {_day(key.expires)}"]
    parts = [
        key.id,
        key.state(now),
        key.tenant or "(operator)",
        ",".join(sorted(key.scopes, key=SCOPES.index)),
        f"made {_day(key.created)}",
        *until,
        *limits,
        *(["shares"] if key.shares else []),
    ]
    return "  ".join(parts)


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _key(row: tuple[Any, ...]) -> Key:
    id, tenant, scopes, created, expires, revoked, requests, tokens, parallel, shares = row
    return Key(
        id, tenant, frozenset(scopes.split()), created, expires, revoked, requests, tokens, parallel, bool(shares)
    )


def check_reach(host: str, keys: Keys) -> None:
    """Refuse to serve others without keys.

    Raises:
        ServingError: others can reach the address, and there are no keys; or it is no address.
    """
    if not is_this_machine(host) and not keys.exist():
        raise ServingError(
            f"serve.host is {host!r}, which others can reach, and there are no API keys; make one with "
            "`latentmem keys create CONFIG`, or serve on 127.0.0.1"
        )
