"""A bank's indices, brought up to its records before each search, and looked over by a check."""

import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from latentmem.bank.check import PAGE_SIZE, holds, same_records, same_rows
from latentmem.bank.lists import ApproximateIndex, StoredLists, read_lists
from latentmem.bank.matrix import BankIndex, StoredMatrix, read_matrix
from latentmem.bank.tables import Problem
from latentmem.bank.transaction import Transaction
from latentmem.files import remove_with_leftovers

logger = logging.getLogger(__name__)


class Indices:
    """The exact index and, if asked, the lists over it; each is kept in memory and in a file."""

    def __init__(self, path: Path, is_approximate: bool) -> None:
        """Begin without any; the files are PATH.index and PATH.lists."""
        self._index_path = path.with_name(f"{path.name}.index")
        self._lists_path = path.with_name(f"{path.name}.lists")
        self._is_approximate = is_approximate
        self._index: BankIndex | None = None
        self._lists: ApproximateIndex | None = None

    @property
    def files(self) -> list[Path]:
        """The files, those that are not there too."""
        return [self._index_path, self._lists_path]

    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.files if file.exists())

    def current(self, transaction: Transaction, generation: str, width: int) -> BankIndex | ApproximateIndex:
        """Return the index of all records that the transaction sees.

        Raises:
            BankError: a record's vector has another width.
        """
        if self._index is None or self._index.generation != generation or not self._index.is_intact:
            self._index = self._load_index(transaction, generation, width)
        index = self._index
        while True:
            seqs, vectors, last_id = transaction.vectors(index.reached, PAGE_SIZE, width)
            if not seqs:
                break
            index.append(seqs, vectors, transaction.labels(index.reached, seqs[-1]), last_id)
        index.save_if_due()
        if not self._is_approximate:
            return index
        if self._lists is None or self._lists.exact is not index:
            self._lists = self._load_lists(transaction, index)
        self._lists.follow()
        return self._lists

    def drop(self) -> None:
        """Forget everything, in memory and in the files; the next search makes it anew from the records."""
        self._index = self._lists = None
        for file in self.files:
            try:
                remove_with_leftovers(file)
            except OSError as error:
                logger.warning("%s: cannot be removed (%s); delete it", file, error)

    def leftovers(self, transaction: Transaction, ids: Collection[str]) -> Iterator[Problem]:
        """Yield the files that may hold something of records that are no longer there, of which these are ids."""
        generation = transaction.meta().generation
        there = transaction.numbers()
        readers: list[tuple[Path, Callable[[Path, str], StoredMatrix | StoredLists | None]]] = [
            (self._index_path, read_matrix),
            (self._lists_path, read_lists),
        ]
        for file, read in readers:
            try:
                stored = read(file, generation)
            except (OSError, ValueError) as error:
                yield Problem("index", str(file), f"{error}; delete it")
                continue
            if stored is None:
                if file.exists():
                    yield Problem("index", str(file), "was made before the last deletion; delete it")
            elif stored.last_id in ids or (isinstance(stored, StoredMatrix) and not there.issuperset(stored.seqs)):
                yield Problem("index", str(file), "holds records that are not there; delete it")

    def _load_index(self, transaction: Transaction, generation: str, width: int) -> BankIndex:
        try:
            stored = read_matrix(self._index_path, generation)
            if stored is not None and not same_records(transaction, stored):
                raise ValueError("it was made from other records")
        except (OSError, ValueError) as error:
            logger.warning("%s: rebuilt from the records (%s)", self._index_path, error)
            stored = None
        return BankIndex(self._index_path, generation, width, stored)

    def _load_lists(self, transaction: Transaction, index: BankIndex) -> ApproximateIndex:
        try:
            stored = read_lists(self._lists_path, index.generation)
            if stored is not None and not same_rows(transaction, stored):
                raise ValueError("it was made from other records")
            return ApproximateIndex(self._lists_path, index, stored)
        except (OSError, ValueError) as error:
            logger.warning("%s: rebuilt from the records (%s)", self._lists_path, error)
            return ApproximateIndex(self._lists_path, index)

    def problems(self, transaction: Transaction, with_labels: bool) -> Iterator[Problem]:
        """Yield what does not agree between the files and the records; labels are compared if asked."""
        generation = transaction.meta().generation
        foreign = "is not of these records; delete it, the next search rebuilds it"
        try:
            stored = read_matrix(self._index_path, generation)
        except (OSError, ValueError) as error:
            yield Problem("index", str(self._index_path), f"{error}; the next search rebuilds it")
        else:
            if stored is not None and not holds(transaction, stored, with_labels):
                yield Problem("index", str(self._index_path), foreign)
        try:
            lists = read_lists(self._lists_path, generation)
        except (OSError, ValueError) as error:
            yield Problem("index", str(self._lists_path), f"{error}; the next approximate search rebuilds it")
        else:
            if lists is not None and not same_rows(transaction, lists):
                yield Problem("index", str(self._lists_path), foreign)
