"""Whether records agree with themselves, and what was derived from them, the matrix and the lists, with them.

A check is for what is damaged: whatever it meets in a file is a problem to tell, and nothing to die of.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentmem.bank.lists import StoredLists
from latentmem.bank.matrix import BankIndex, StoredMatrix
from latentmem.bank.stored_form import decode, decompress
from latentmem.bank.tables import COLUMNS, UNIT_TOLERANCE, Problem, columns_of, roles_of
from latentmem.bank.transaction import Transaction
from latentmem.bank_place import Place
from latentmem.errors import BankError, DataError

PAGE_SIZE = 4096
"""Number of records read at once for the index."""


def check_records(transaction: Transaction, path: Place) -> tuple[int, list[Problem]]:
    """How many records were looked at, and what does not agree, the database's own structure first."""
    problems: list[Problem] = []
    num_checked = 0
    faults: tuple[type[Exception], ...] = (*transaction.faults, BankError)
    try:
        problems += [Problem(transaction.kind, str(path), " ".join(line.split())) for line in transaction.broken()]
        for seq in transaction.stray_roles():
            problems.append(Problem("roles", f"{path}: record {seq}", "has roles, but no trajectory"))
        width = transaction.meta().width
        for seq, vector, stored_form, columns, roles in transaction.everything():
            where = f"{path}: record {seq}"
            problems += _vector_problems(where, vector, width)
            problems += _content_problems(where, stored_form, columns, roles)
            num_checked += 1
    except faults as error:
        found = " ".join(str(error).split()).removeprefix(f"{path}: ")
        problems.append(Problem(transaction.kind, str(path), f"{found}; checked {num_checked} records up to there"))
    return num_checked, problems


def _vector_problems(where: str, vector: Any, width: int | None) -> Iterator[Problem]:
    if not isinstance(vector, bytes):
        yield Problem("vector", where, f"is of type {type(vector).__name__}, expected bytes")
        return
    if width is None or len(vector) != 4 * width:
        yield Problem("vector", where, f"{len(vector)} bytes, but the width is {width}")
        return
    with np.errstate(all="ignore"):
        length = float(np.linalg.norm(np.frombuffer(vector, dtype="<f4").astype(np.float64)))
    if not abs(length - 1) <= UNIT_TOLERANCE:  # nan fails too
        yield Problem("vector", where, f"length {length:.6g}, expected 1")


def _content_problems(where: str, stored_form: Any, columns: Sequence[Any], roles: list[Any]) -> Iterator[Problem]:
    try:
        content = decompress(stored_form, where)
        trajectory = decode(stored_form, where)
        canonical = trajectory.to_json().encode("utf-8")
    except (DataError, ValueError, RecursionError) as error:
        yield Problem("json", where, str(error).removeprefix(f"{where}: "))
        return
    if canonical != content:
        yield Problem("json", where, "not in canonical form")
    for name, found, expected in zip(COLUMNS, columns, columns_of(trajectory), strict=True):
        if found != expected:
            kind: Literal["id", "columns"] = "id" if name == "id" else "columns"
            yield Problem(kind, where, f"{name} is {found!r}, but the JSON says {expected!r}")
    if roles != roles_of(trajectory):
        yield Problem("roles", where, f"roles are {roles}, but the JSON says {roles_of(trajectory)}")


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
