"""Copies of a bank, made by SQLite itself: a copy is the bank at one moment, whoever writes to it meanwhile."""

import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from latentmem.bank.sqlite_file import BUSY_SECONDS, open_database
from latentmem.errors import BankError


def copy_bank(source: Path, target: Path) -> None:
    """Copy the bank at `source` to `target`; when this returns, the copy is on stable storage.

    An existing target is replaced in one transaction: others who have it open see the old bank or the new one.

    Raises:
        BankError: one of the two is not an SQLite file or cannot be used, or the disk is full; an older `target` stays.
    """
    new = not target.exists()
    with _explained(source), closing(open_database(source, create=False)) as old:
        old.execute("SELECT count(*) FROM sqlite_master").fetchone()
        try:
            with _explained(target), closing(_connect(target, "rwc")) as copy:
                old.backup(copy)
        except BankError:
            if new:
                target.unlink(missing_ok=True)
            raise


def new_generation(path: Path) -> None:
    """Give a bank a new generation, which voids every index of it.

    A bank that is to replace another needs this: the other's indices, some of them in memory, may look like its own.

    Raises:
        BankError: the bank cannot be written.
    """
    with _explained(path), closing(_connect(path, "rw")) as db, db:
        db.execute("UPDATE meta SET value = ? WHERE key = 'generation'", (uuid.uuid4().hex,))


def check_tables_only(path: Path) -> None:
    """Refuse a bank from outside that contains views, triggers or virtual tables, which run when it is used.

    Raises:
        BankError: it contains one of these, or is not an SQLite file.
    """
    with _explained(path), closing(_connect(path, "rw")) as db:
        db.execute("PRAGMA trusted_schema = OFF")
        kinds = {"table", "index"}
        rows = db.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    for kind, name, sql in rows:
        if kind not in kinds or (sql or "").upper().split()[:2] == ["CREATE", "VIRTUAL"]:
            raise BankError(f"{path}: holds the {kind} {name!r}, which no bank has; it is refused")


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode={mode}", timeout=BUSY_SECONDS, uri=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise BankError(f"{path}: cannot be copied ({error}); check the file, its folder and the disk") from None
