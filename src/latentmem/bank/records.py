"""Where a bank's records are kept: a SQLite file, or a PostgreSQL server. This is the one place that chooses."""

from contextlib import AbstractContextManager, closing
from pathlib import Path
from types import ModuleType
from typing import Protocol

from latentmem.bank.sqlite import SqliteRecords
from latentmem.bank.transaction import Transaction
from latentmem.bank_place import Place
from latentmem.errors import BankError


class Records(Protocol):
    """The open records. Threads take turns; a forked child must open its own."""

    @property
    def beside(self) -> Path:
        """What is derived from them is kept in files of this host: this path, with an ending added."""

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

    def erase(self) -> bool:
        """Remove from the files what was deleted; return whether nothing of it is left there."""

    def copy_to(self, target: Path) -> None:
        """Copy them, as they are at one moment, to a bank in a new SQLite file."""


def open_records(place: Place, create: bool) -> Records:
    """Open the records of a bank; with `create`, begin a bank if there is none.

    Raises:
        BankError: there is no bank and `create` is False; or it is none, was written by a newer version, or cannot be
            opened; or the library that speaks to the server is not installed.
    """
    if isinstance(place, Path):
        return SqliteRecords(place, create)
    records: Records = _postgres(place).PostgresRecords(place, create)
    return records


def bank_exists(place: Place) -> bool:
    """Return whether there is a bank; a file that is none counts as one, and opening it tells.

    Raises:
        BankError: the server does not answer, or the schema holds something else.
    """
    return place.exists() if isinstance(place, Path) else _postgres(place).exists(place)


def _postgres(place: Place) -> ModuleType:
    try:
        from latentmem.bank import postgres
    except ImportError as error:
        raise BankError(
            f"{place}: a bank on PostgreSQL needs the library psycopg, which is not installed ({error}); "
            "run `pip install 'latentmem[postgres]'`"
        ) from None
    return postgres


def copy_records(source: Place, target: Place) -> tuple[int, int]:
    """Add the records of one bank to another, as they are stored; begin the other if there is none.

    Each batch is one transaction, so an interrupted copy can be repeated.

    Returns:
        The numbers of records added, and of those that were there already.

    Raises:
        BankError: there is no source; the two have vectors of different embedders; or one of them cannot be used.
    """
    num_added = num_seen = 0
    with closing(open_records(source, create=False)) as old, old.read() as snapshot:
        meta = snapshot.meta()
        with closing(open_records(target, create=True)) as new:
            for records in snapshot.pages():
                with new.write() as transaction:
                    found = transaction.meta()
                    if found.embedder is None:
                        transaction.set_embedder(str(meta.embedder), int(meta.width or 0))
                    elif (found.embedder, found.width) != (meta.embedder, meta.width):
                        raise BankError(
                            f"{target}: its vectors were made by embedder {found.embedder!r} of width {found.width}, "
                            f"those of {source} by {meta.embedder!r} of width {meta.width}; export {source} and "
                            "import the file instead"
                        )
                    num_added += transaction.insert(records)
                num_seen += len(records)
    return num_added, num_seen - num_added
