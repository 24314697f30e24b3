"""Where a bank's records are kept: a SQLite file, or a PostgreSQL server. This is the one place that chooses."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from latentmem.bank.sqlite import SqliteRecords
from latentmem.bank.transaction import Transaction


class Records(Protocol):
    """The open records. Threads take turns; a forked child must open its own."""

    def read(self) -> AbstractContextManager[Transaction]:
        """Open a snapshot: it does not see what others write meanwhile, and they need not wait for it."""

    def write(self) -> AbstractContextManager[Transaction]:
        """The one writer: on stable storage when the block ends, undone if it raises."""

    def close(self) -> None:
        """Close the connection to them."""

    def files(self) -> list[Path]:
        """The files of this host that hold them."""

    def num_bytes(self) -> int:
        """Bytes on disk."""

    def copy_to(self, target: Path) -> None:
        """Copy them, as they are at one moment, to a bank in a SQLite file."""


def open_records(path: Path, create: bool) -> Records:
    """Open the records of a bank; with `create`, begin a bank if there is none.

    Raises:
        BankError: there is no bank and `create` is False; or it is none, was written by a newer version, or cannot be
            opened.
    """
    return SqliteRecords(path, create)
