"""Checks that data derived from records, the matrix and the lists, still belong to these records."""

from pathlib import Path

import numpy as np

from latentmem.bank.lists import StoredLists
from latentmem.bank.matrix import BankIndex, StoredMatrix
from latentmem.bank.records import Transaction

PAGE_SIZE = 4096
"""Number of records read at once for the index."""


def same_records(transaction: Transaction, stored: StoredMatrix) -> bool:
    """Return whether a matrix was made of these records; it was not if an older copy of the bank was put in place."""
    last = int(stored.seqs[-1])
    tally = (len(stored.seqs), int(stored.seqs.sum()))
    return transaction.tally(until=last) == tally and transaction.seq_of(stored.last_id) == last


def same_rows(transaction: Transaction, lists: StoredLists) -> bool:
    """Return whether lists were made of these records."""
    last = transaction.seq_of(lists.last_id)
    return last is not None and transaction.tally(until=last)[0] == lists.num_rows


def holds(transaction: Transaction, stored: StoredMatrix, with_labels: bool) -> bool:
    """Return whether a matrix has the vectors of its records and, if asked, their labels; read all of them again."""
    if not same_records(transaction, stored):
        return False
    num_rows, width = stored.vectors.shape
    again = BankIndex(Path(), "", 0)  # collects the labels; its rows have width 0
    while len(again) < num_rows:
        size = min(PAGE_SIZE, num_rows - len(again))
        seqs, vectors, last_id = transaction.vectors(again.reached, size, width)
        if not np.array_equal(stored.vectors[len(again) : len(again) + size], vectors):
            return False
        again.append(seqs, vectors[:, :0], transaction.labels(again.reached, seqs[-1]), last_id)
    found, expected = stored.postings, again.postings()
    same = found.keys() == expected.keys() and all(np.array_equal(found[label], expected[label]) for label in found)
    return same or not with_labels
