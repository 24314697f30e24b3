"""Whether what was derived from records, the matrix and the lists, still is of these records."""

from pathlib import Path

import numpy as np

from latentmem.bank.lists import StoredLists
from latentmem.bank.matrix import BankIndex, StoredMatrix
from latentmem.bank.records import Transaction

PAGE_SIZE = 4096
"""Records read at once for the index."""


def same_records(transaction: Transaction, stored: StoredMatrix) -> bool:
    """Whether a matrix was made of these records; not so after an older copy of the bank was put in place, say."""
    last = int(stored.seqs[-1])
    tally = (len(stored.seqs), int(stored.seqs.sum()))
    return transaction.tally(until=last) == tally and transaction.seq_of(stored.last_id) == last


def same_rows(transaction: Transaction, lists: StoredLists) -> bool:
    """Whether lists are of these records."""
    last = transaction.seq_of(lists.last_id)
    return last is not None and transaction.tally(until=last)[0] == lists.num_rows


def holds(transaction: Transaction, stored: StoredMatrix, with_labels: bool) -> bool:
    """Whether a matrix has the vectors of its records and, if asked, their labels; all are read again."""
    if not same_records(transaction, stored):
        return False
    num_rows, width = stored.vectors.shape
    again = BankIndex(Path(), "", 0)  # labels, and rows of no width
    while len(again) < num_rows:
        size = min(PAGE_SIZE, num_rows - len(again))
        seqs, vectors, last_id = transaction.vectors(again.reached, size, width)
        if not np.array_equal(stored.vectors[len(again) : len(again) + size], vectors):
            return False
        again.append(seqs, vectors[:, :0], transaction.labels(again.reached, seqs[-1]), last_id)
    found, expected = stored.postings, again.postings()
    same = found.keys() == expected.keys() and all(np.array_equal(found[label], expected[label]) for label in found)
    return same or not with_labels
