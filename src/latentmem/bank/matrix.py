"""The bank's search matrix: derived from the records, thrown away at any doubt, and exact.

Only rows that bear the labels asked for are scored, and all of them: filtering after an approximate search loses right
answers. A fast float32 product only nominates candidates; their similarity is computed again by a sum that sees one
row at a time. So neither the number of rows nor their blocking nor the other tasks of a batch move a similarity, and
equal vectors truly tie. The file holds a prefix of the records; the rows since then are kept in memory.

Reading the matrix once is what a search costs, so nothing else of its length is made for a query: a row that cannot be
among the best is dropped block by block, and which rows a filter lets pass is remembered.
"""

import json
import logging
import os
import struct
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from latentmem.runs import hold, remove_leftovers

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
Label = tuple[str, str | int]
"""One fact that a search can filter on, such as ("domain", "qa"), ("role", "coder") or ("success", 1)."""
Positions = npt.NDArray[np.int32]
"""Rows of the matrix, ascending; a record's number (`seq`) is found by its row."""
Estimate = Callable[[Vectors, Vectors], Vectors]
"""Queries [B, e] and rows [n, e] -> dot products [B, n], summed in float32 in any order."""

# Magic, crc32 of the rest, generation, id of the last record, rows, width, bytes of the label table; then, so that rows
# begin at a cache line, nothing up to _ROWS_BEGIN.
_HEADER = struct.Struct("<8sI32s32sQQQ")
_MAGIC = b"LMEMIDX2"
_CRC_END = 12
_ROWS_BEGIN = 128
_TASKS_PER_BLOCK = 64
_ROWS_PER_BLOCK = 8192
_GATHERED_PER_BLOCK = 1024
_SPARSE = 3
"""Reading rows one after the other is about three times as fast as picking them."""
_FEW_TASKS = 4
"""Up to here a sum for each task is faster than a matrix product."""
_CANDIDATES_PER_BLOCK = 4096
_SHORT_TAIL = 4096
_FILTERS_REMEMBERED = 8


@dataclass(frozen=True)
class StoredMatrix:
    """What an index file holds."""

    last_id: str
    """Trajectory id of the last row, which tells whether the file belongs to these records."""
    seqs: npt.NDArray[np.int64]
    """[N], ascending."""
    vectors: Vectors
    """[N, e], memory-mapped."""
    postings: dict[Label, Positions]
    """The rows that bear a label, memory-mapped."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, aside, that takes the place of `path` at once when the block ends without an error.

    What a killed process was writing to take the place of the same file is removed.
    """
    remove_leftovers(path, f"{path.name}.")
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with aside.open("xb") as file:
            hold(file)
            yield file
            file.flush()
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_matrix(path: Path, generation: str) -> StoredMatrix | None:
    """The matrix in a file, or None where there is none of this generation.

    Raises:
        ValueError: the file is torn or damaged.
    """
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except FileNotFoundError:
        return None
    if content.size < _ROWS_BEGIN:
        raise ValueError(f"{content.size} bytes are too few for a header")
    header = _HEADER.unpack(content[: _HEADER.size].tobytes())
    magic, crc, found_generation, last_id, num_rows, width, num_table_bytes = header
    if magic != _MAGIC:
        raise ValueError("not an index file of this version")
    seqs_begin = _ROWS_BEGIN + 4 * num_rows * width
    postings_begin = seqs_begin + 8 * num_rows
    table_begin = content.size - num_table_bytes
    if table_begin < postings_begin:
        raise ValueError(f"{content.size} bytes do not hold {num_rows} rows of width {width}")
    if zlib.crc32(content[_CRC_END:].data) != crc:
        raise ValueError("checksum does not match")
    if found_generation.decode("ascii") != generation:
        return None
    postings: dict[Label, Positions] = {}
    begin = postings_begin
    for name, value, count in json.loads(content[table_begin:].tobytes()):
        postings[name, value] = content[begin : begin + 4 * count].view("<i4")
        begin += 4 * count
    return StoredMatrix(
        last_id=last_id.decode("ascii"),
        seqs=np.array(content[seqs_begin:postings_begin]).view("<i8"),
        vectors=content[_ROWS_BEGIN:seqs_begin].view("<f4").reshape(num_rows, width),
        postings=postings,
    )


class _Growing:
    """A one-dimensional array that grows at its end, without a copy of it all each time."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._room, self._size = values, len(values)

    @property
    def values(self) -> npt.NDArray[Any]:
        return self._room[: self._size]

    def extend(self, new: npt.NDArray[Any]) -> None:
        size = self._size + len(new)
        if size > len(self._room):
            room = np.empty(size + size // 2, dtype=self._room.dtype)
            room[: self._size] = self.values
            self._room = room
        self._room[self._size : size] = new
        self._size = size


@dataclass
class _Passing:
    """What a filter lets pass, as far as it was looked at."""

    rows: _Growing
    reached: int
    """Number of rows that were looked at."""


class BankIndex:
    """Vectors and filter labels of all records up to `reached`. Knows no SQL; the bank feeds it."""

    def __init__(
        self,
        path: Path,
        generation: str,
        width: int,
        stored: StoredMatrix | None = None,
        estimate: Estimate | None = None,
    ) -> None:
        """Begin empty, or with what the file at `path` was found to hold.

        `estimate` is the product that nominates; None is numpy's.
        """
        self.generation = generation
        self._estimate = estimate or _estimates
        self.last_id = stored.last_id if stored else ""
        """Trajectory id of the last row."""
        self._path = path
        self._seqs = _Growing(stored.seqs if stored else np.empty(0, dtype=np.int64))  # [N]
        # The rows, in pieces of which the first is in the file; the rest came since.
        self._pieces: list[Vectors] = [stored.vectors if stored else np.empty((0, width), dtype=np.float32)]
        self._postings = {label: _Growing(rows) for label, rows in stored.postings.items()} if stored else {}
        self._passing: dict[frozenset[Label], _Passing] = {}

    def __len__(self) -> int:
        return len(self.seqs)

    @property
    def seqs(self) -> npt.NDArray[np.int64]:
        """[N], the record number of each row, ascending."""
        return self._seqs.values

    @property
    def width(self) -> int:
        """e, of the vectors."""
        return int(self._pieces[0].shape[1])

    @property
    def reached(self) -> int:
        """The record number up to which this index goes; 0 when empty."""
        return int(self.seqs[-1]) if len(self) else 0

    # Growing

    def append(self, seqs: Sequence[int], vectors: Vectors, labels: Iterable[Iterable[Label]], last_id: str) -> None:
        """Take the records that follow `reached`.

        seqs: n ascending record numbers; vectors: [n, e] float32 of unit length; labels: one collection for each row.
        """
        positions: dict[Label, list[int]] = {}
        for position, row in enumerate(labels, start=len(self)):
            for label in row:
                positions.setdefault(label, []).append(position)
        for label, new in positions.items():
            self._postings.setdefault(label, _Growing(np.empty(0, dtype=np.int32))).extend(np.array(new, np.int32))
        self._seqs.extend(np.asarray(seqs, dtype=np.int64))
        if len(self._pieces) > 1 and len(self._pieces[-1]) < _SHORT_TAIL:
            self._pieces[-1] = np.concatenate([self._pieces[-1], vectors])
        else:
            self._pieces.append(vectors)
        self.last_id = last_id

    def save_if_due(self) -> None:
        """Replace the file, atomically, once a quarter of what it holds has come since.

        Nothing waits for the disk: a file torn by a power cut fails its checksum.
        """
        num_stored = len(self._pieces[0])
        if 4 * (len(self) - num_stored) <= num_stored:
            return
        postings = {label: rows.values for label, rows in self._postings.items()}
        table = json.dumps([(*label, len(rows)) for label, rows in postings.items()]).encode("ascii")
        shape = (len(self), self.width)
        fields = (self.generation.encode("ascii"), self.last_id.encode("ascii"), *shape, len(table))
        header = _HEADER.pack(_MAGIC, 0, *fields).ljust(_ROWS_BEGIN, b"\0")
        little_endian = [piece.astype("<f4", copy=False) for piece in self._pieces]
        little_endian += [self.seqs.astype("<i8", copy=False)]
        little_endian += [rows.astype("<i4", copy=False) for rows in postings.values()]
        arrays = [array.reshape(-1).view(np.uint8).data for array in little_endian]
        content: list[bytes | memoryview] = [header, *arrays, table]
        crc = zlib.crc32(header[_CRC_END:])
        for part in content[1:]:
            crc = zlib.crc32(part, crc)
        content[0] = _HEADER.pack(_MAGIC, crc, *fields).ljust(_ROWS_BEGIN, b"\0")
        try:
            with replacing(self._path) as file:
                file.writelines(content)
                file.flush()
                mapped = np.memmap(file.name, dtype="<f4", mode="r", offset=_ROWS_BEGIN, shape=shape)
        except OSError as error:
            logger.warning("%s: the index could not be saved (%s); it stays in memory", self._path, error)
            return
        self._pieces = [mapped.view(np.ndarray)]  # the mapping may replace the copy in memory

    # Reading

    def rows(self, start: int) -> Iterator[Vectors]:
        """The rows from number `start` on, in order, as arrays [n, e]."""
        for begin, piece in self._based_pieces():
            if begin + len(piece) > start:
                yield piece[max(0, start - begin) :]

    def vectors_at(self, positions: Positions) -> Vectors:
        """The rows [n, e] at n ascending positions."""
        return np.concatenate([piece.take(part - begin, axis=0) for begin, piece, part in self._split(positions)])

    def positions_of(self, seqs: Sequence[int]) -> Positions:
        """The rows of records that are in the index, ascending."""
        return np.unique(np.searchsorted(self.seqs, seqs)).astype(np.int32)

    def postings(self) -> dict[Label, Positions]:
        """The rows that bear each label."""
        return {label: rows.values for label, rows in self._postings.items()}

    def passing(self, labels: Iterable[Label]) -> Positions | None:
        """The rows that bear all the labels; None, where there are no labels, stands for every row."""
        key = frozenset(labels)
        if not key:
            return None
        known = self._passing.pop(key, None) or _Passing(_Growing(np.empty(0, dtype=np.int32)), reached=0)
        if known.reached < len(self):
            known.rows.extend(self._bearing(key, known.reached))
            known.reached = len(self)
        self._passing[key] = known
        if len(self._passing) > _FILTERS_REMEMBERED:
            del self._passing[next(iter(self._passing))]  # what was asked for longest ago
        return known.rows.values

    def _bearing(self, labels: Iterable[Label], start: int) -> Positions:
        """The rows from number `start` on that bear all the labels."""
        none = _Growing(np.empty(0, dtype=np.int32))
        each = [self._postings.get(label, none).values for label in labels]
        rows, *others = sorted(
            (rows[np.searchsorted(rows, np.int32(start)) :] - np.int32(start) for rows in each), key=len
        )
        for other in others:
            bears = np.zeros(len(self) - start, dtype=bool)
            bears[other] = True
            rows = rows[bears[rows]]
        return rows + np.int32(start)

    def nearest(
        self, queries: Vectors, k: int, labels: Iterable[Label], excluded: Sequence[Sequence[int]]
    ) -> list[list[tuple[int, float]]]:
        """For each query the record numbers and similarities of its k nearest rows that bear all the labels.

        queries: [B, e] float32 of unit length; excluded: for each query the record numbers that may not be returned.
        Most similar first, equal ones by record number.
        """
        passing = self.passing(labels)
        left_out = [self.positions_of(seqs) for seqs in excluded]
        found = []
        for start in range(0, len(queries), _TASKS_PER_BLOCK):
            end = start + _TASKS_PER_BLOCK
            nominated = self.nominate(queries[start:end], k, passing, left_out[start:end])
            found += [self.rank(*pair, k) for pair in zip(queries[start:end], nominated, strict=True)]
        return found

    def nominate(
        self, queries: Vectors, k: int, passing: Positions | None, left_out: Sequence[Positions], start: int = 0
    ) -> list[Positions]:
        """For each query [e] rows, ascending, among which are its k nearest, of those passing from number `start` on.

        left_out: for each query the rows, ascending, that may not be among them.
        """
        # A float32 sum of products of unit vectors is off by at most e * 2^-24, in whatever order it is summed; a row
        # of the true best k can therefore fall behind the estimated k-th by twice that, and by a little more for
        # rounding the exact value to float32.
        margin = (queries.shape[1] + 4) * 2.0**-23
        nominees = [_Nominees(k, margin, rows) for rows in left_out]
        for rows, vectors, within in self._blocks(passing, start):
            estimates = self._estimate(queries, vectors)
            for each, row in zip(nominees, estimates if within is None else estimates[:, within], strict=True):
                each.offer(rows, row)
        return [each.rows() for each in nominees]

    def rank(self, query: Vectors, nominated: Positions, k: int) -> list[tuple[int, float]]:
        """The k best of rows in ascending order, by record number, with their similarities."""
        similarities = np.concatenate(
            [
                _similarities(query, self.vectors_at(nominated[i : i + _CANDIDATES_PER_BLOCK]))
                for i in range(0, len(nominated), _CANDIDATES_PER_BLOCK)
            ]
            or [np.empty(0, dtype=np.float32)]
        )
        best = np.lexsort((nominated, -similarities))[:k]
        return [(int(self.seqs[nominated[i]]), float(similarities[i])) for i in best]

    def _based_pieces(self) -> Iterator[tuple[int, Vectors]]:
        """Each piece, after the number of its first row."""
        begin = 0
        for piece in self._pieces:
            yield begin, piece
            begin += len(piece)

    def _split(self, rows: Positions, start: int = 0) -> Iterator[tuple[int, Vectors, Positions]]:
        """The number of a piece's first row, the piece, and those of the ascending rows from `start` on that it has."""
        for begin, piece in self._based_pieces():
            # Of the rows' own type, or they would be converted, all of them.
            ends = np.array([max(begin, start), max(begin + len(piece), start)], dtype=rows.dtype)
            first, last = np.searchsorted(rows, ends)
            if first < last:
                yield begin, piece, rows[first:last]

    def _blocks(
        self, passing: Positions | None, start: int
    ) -> Iterator[tuple[Positions, Vectors, npt.NDArray[np.integer[Any]] | None]]:
        """Rows [n], vectors [m, e], and which n of the m vectors are those of the rows; None where all are."""
        if passing is None:
            for begin, piece in self._based_pieces():
                for i in range(max(0, start - begin), len(piece), _ROWS_PER_BLOCK):
                    vectors = piece[i : i + _ROWS_PER_BLOCK]
                    yield np.arange(begin + i, begin + i + len(vectors), dtype=np.int32), vectors, None
            return
        for begin, piece, part in self._split(passing, start):
            for i in range(0, len(part), _ROWS_PER_BLOCK):
                rows = part[i : i + _ROWS_PER_BLOCK]
                first, end = rows[0] - begin, rows[-1] - begin + 1
                if end - first <= _SPARSE * len(rows):
                    yield rows, piece[first:end], rows - rows[0]
                    continue
                for j in range(0, len(rows), _GATHERED_PER_BLOCK):
                    picked = rows[j : j + _GATHERED_PER_BLOCK]
                    yield picked, piece.take(picked - begin, axis=0), None


class _Nominees:
    """Rows that may be among the k nearest of one query, while blocks of rows go by."""

    def __init__(self, k: int, margin: float, left_out: Positions) -> None:
        self._k, self._margin, self._left_out = k, margin, left_out
        self._rows: list[Positions] = []
        self._estimates: list[npt.NDArray[np.floating[Any]]] = []
        self._count = 0
        self._room = 2 * k
        self._least: float = -np.inf
        """Rows estimated below this are not among the k nearest."""

    def offer(self, rows: Positions, estimates: npt.NDArray[np.floating[Any]]) -> None:
        """Take what may be among the nearest of further rows [n] with their estimated similarities [n]."""
        hits = np.flatnonzero(estimates >= self._least)
        if len(hits) and len(self._left_out):
            hits = hits[~np.isin(rows[hits], self._left_out)]
        if len(hits):
            self._rows.append(rows[hits])
            self._estimates.append(estimates[hits])
            self._count += len(hits)
            if self._count > self._room:
                self._prune()

    def rows(self) -> Positions:
        """What was nominated, ascending."""
        self._prune()
        return self._rows[0]

    def _prune(self) -> None:
        rows = np.concatenate([*self._rows, np.empty(0, dtype=np.int32)])
        estimates = np.concatenate([*self._estimates, np.empty(0, dtype=np.float32)])
        if len(rows) > self._k:
            kth = np.partition(estimates, len(estimates) - self._k)[len(estimates) - self._k]
            self._least = float(kth) - self._margin
            rows, estimates = rows[estimates >= self._least], estimates[estimates >= self._least]
        self._rows, self._estimates, self._count = [rows], [estimates], len(rows)
        self._room = 2 * max(self._k, len(rows))


def _estimates(queries: Vectors, vectors: Vectors) -> Vectors:
    """Dot products [B, n] of queries [B, e] and rows [n, e], rounded however the machine likes."""
    if len(queries) > _FEW_TASKS:
        return queries @ vectors.T
    return np.stack([np.einsum("ij,j->i", vectors, query) for query in queries])


def _similarities(query: Vectors, vectors: Vectors) -> Vectors:
    """Dot products [n] of one query [e] with rows [n, e], each the same whatever the other rows are.

    The products are exact in float64 and each contiguous row is summed by itself; rounding to float32 drops the
    digits that carry no meaning.
    """
    products = vectors.astype(np.float64) * query.astype(np.float64)
    similarities: Vectors = products.sum(axis=1).astype(np.float32)
    return similarities
