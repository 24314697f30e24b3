"""The bank's search matrix: derived from the records, thrown away at any doubt, and exact.

Every score is computed, then filtered, then ranked: filtering after an approximate search loses right answers. A
fast float32 product only nominates candidates; their similarity is computed again by a sum that sees one row at a
time. So neither the number of rows nor their blocking nor the other tasks of a batch move a similarity, and equal
vectors truly tie. The file holds a prefix of the records; the rows since then are kept in memory.
"""

import logging
import os
import struct
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from latentmem.runs import hold, remove_leftovers

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
Label = tuple[str, str | int]
"""One fact that a search can filter on, such as ("domain", "qa"), ("role", "coder") or ("success", 1)."""

_HEADER = struct.Struct("<8sI32s32sQQ")  # magic, crc32 of the rest, generation, id of the last record, rows, width
_MAGIC = b"LMEMIDX1"
_CRC_END = 12
_TASKS_PER_BLOCK = 64
_CANDIDATES_PER_BLOCK = 4096


@dataclass(frozen=True)
class StoredMatrix:
    """What an index file holds."""

    last_id: str
    """Trajectory id of the last row, which tells whether the file belongs to these records."""
    seqs: npt.NDArray[np.int64]
    """[N], ascending."""
    vectors: Vectors
    """[N, e], memory-mapped."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file at, aside, that takes the place of `path` at once when the block ends without an error."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_matrix(path: Path, generation: str) -> StoredMatrix | None:
    """The matrix in a file, or None where there is none of this generation.

    Raises:
        ValueError: the file is torn or damaged.
    """
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        return None
    if content.size < _HEADER.size:
        raise ValueError(f"{content.size} bytes are too few for a header")
    magic, crc, found_generation, last_id, num_rows, width = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if magic != _MAGIC:
        raise ValueError("not an index file")
    if content.size != _HEADER.size + num_rows * (8 + 4 * width):
        raise ValueError(f"{content.size} bytes do not hold {num_rows} rows of width {width}")
    if zlib.crc32(content[_CRC_END:].data) != crc:
        raise ValueError("checksum does not match")
    if found_generation.decode("ascii") != generation:
        return None
    seqs_end = _HEADER.size + 8 * num_rows
    return StoredMatrix(
        last_id=last_id.decode("ascii"),
        seqs=np.array(content[_HEADER.size : seqs_end]).view("<i8"),
        vectors=np.asarray(content[seqs_end:]).view("<f4").reshape(num_rows, width),
    )


class BankIndex:
    """Vectors and filter labels of all records up to `reached`. Knows no SQL; the bank feeds it."""

    def __init__(self, path: Path, generation: str, width: int) -> None:
        self.generation = generation
        self._path = path
        self._seqs = np.empty(0, dtype=np.int64)  # [N]
        self._stored = np.empty((0, width), dtype=np.float32)  # rows that are in the file
        self._tail = np.empty((0, width), dtype=np.float32)  # rows that came since
        self._postings: dict[Label, npt.NDArray[np.int64]] = {}  # positions of the rows that bear a label

    @classmethod
    def from_stored(
        cls, path: Path, generation: str, stored: StoredMatrix, labels: Iterable[Iterable[Label]]
    ) -> "BankIndex":
        """Begin with a file's rows; `labels` are theirs, in order."""
        index = cls(path, generation, stored.vectors.shape[1])
        index._add_labels(labels)
        index._seqs, index._stored = stored.seqs, stored.vectors
        return index

    def __len__(self) -> int:
        return len(self._seqs)

    @property
    def reached(self) -> int:
        """The record number up to which this index goes; 0 when empty."""
        return int(self._seqs[-1]) if len(self) else 0

    def append(self, seqs: Sequence[int], vectors: Vectors, labels: Iterable[Iterable[Label]], last_id: str) -> None:
        """Take the records that follow `reached`, and rewrite the file once it lags behind by a quarter.

        seqs: n ascending record numbers; vectors: [n, e] float32 of unit length; labels: one collection for each row.
        """
        self._add_labels(labels)
        longer = np.concatenate([self._seqs, np.asarray(seqs, dtype=np.int64)])
        self._seqs, self._tail = longer, np.concatenate([self._tail, vectors])
        if 4 * len(self._tail) > len(self._stored):
            self._save(last_id)

    def _add_labels(self, labels: Iterable[Iterable[Label]]) -> None:
        positions: dict[Label, list[int]] = {}
        for position, row in enumerate(labels, start=len(self)):
            for label in row:
                positions.setdefault(label, []).append(position)
        for label, new in positions.items():
            old = self._postings.get(label, np.empty(0, dtype=np.int64))
            self._postings[label] = np.concatenate([old, np.asarray(new, dtype=np.int64)])

    def _save(self, last_id: str) -> None:
        """Replace the file atomically. Nothing waits for the disk: a file torn by a power cut fails its checksum."""
        self._stored = np.concatenate([self._stored, self._tail])
        self._tail = self._tail[:0]
        num_rows, width = self._stored.shape
        fields = (self.generation.encode("ascii"), last_id.encode("ascii"), num_rows, width)
        seqs, vectors = self._seqs.astype("<i8").data.cast("B"), self._stored.astype("<f4", copy=False).data.cast("B")
        crc = zlib.crc32(_HEADER.pack(_MAGIC, 0, *fields)[_CRC_END:])
        crc = zlib.crc32(vectors, zlib.crc32(seqs, crc))
        try:
            remove_leftovers(self._path, f"{self._path.name}.")
            with replacing(self._path) as aside, aside.open("xb") as file:
                hold(file)
                file.writelines([_HEADER.pack(_MAGIC, crc, *fields), seqs, vectors])
                file.flush()
                offset = _HEADER.size + len(seqs)
                mapped = np.memmap(aside, dtype="<f4", mode="r", offset=offset, shape=(num_rows, width))
        except OSError as error:
            logger.warning("%s: the index could not be saved (%s); it stays in memory", self._path, error)
            return
        self._stored = np.asarray(mapped)  # the mapping may replace the copy in memory

    def nearest(
        self, queries: Vectors, k: int, labels: Iterable[Label], excluded: Sequence[Sequence[int]]
    ) -> list[list[tuple[int, float]]]:
        """For each query the record numbers and similarities of its k nearest rows that bear all the labels.

        queries: [B, e] float32 of unit length; excluded: for each query the record numbers that may not be returned.
        Most similar first, equal ones by record number.
        """
        eligible = np.ones(len(self), dtype=bool)
        for label in labels:
            bearing = np.zeros(len(self), dtype=bool)
            bearing[self._postings.get(label, [])] = True
            eligible &= bearing
        found = []
        for start in range(0, len(queries), _TASKS_PER_BLOCK):
            block = queries[start : start + _TASKS_PER_BLOCK]
            estimates = np.concatenate([block @ self._stored.T, block @ self._tail.T], axis=1)  # [B, N]
            for row, query in enumerate(block):
                allowed = eligible.copy()
                allowed[np.searchsorted(self._seqs, excluded[start + row])] = False
                found.append(self._rank(query, np.where(allowed, estimates[row], -np.inf), min(k, int(allowed.sum()))))
        return found

    def _rank(self, query: Vectors, estimates: npt.NDArray[np.floating], k: int) -> list[tuple[int, float]]:
        """The k best of the rows whose estimate is finite; there are at least k."""
        if k == 0:
            return []
        # A float32 dot product of unit vectors is off by at most e * 2^-24; a row of the true best k can therefore
        # fall behind the estimated k-th by twice that, and by a little more for rounding the exact value to float32.
        margin = (len(query) + 4) * 2.0**-23
        kth = np.partition(estimates, len(estimates) - k)[len(estimates) - k]
        candidates = np.flatnonzero(estimates >= kth - margin)
        similarities = np.concatenate(
            [
                _similarities(query, self._vectors_at(candidates[i : i + _CANDIDATES_PER_BLOCK]))
                for i in range(0, len(candidates), _CANDIDATES_PER_BLOCK)
            ]
        )
        best = np.lexsort((candidates, -similarities))[:k]
        return [(int(self._seqs[candidates[i]]), float(similarities[i])) for i in best]

    def _vectors_at(self, positions: npt.NDArray[np.intp]) -> Vectors:
        in_tail = positions >= len(self._stored)
        stored = self._stored[positions[~in_tail]]
        return np.concatenate([stored, self._tail[positions[in_tail] - len(self._stored)]])  # positions ascend


def _similarities(query: Vectors, vectors: Vectors) -> Vectors:
    """Dot products [n] of one query [e] with rows [n, e], each the same whatever the other rows are.

    The products are exact in float64 and each contiguous row is summed by itself; rounding to float32 drops the
    digits that carry no meaning.
    """
    products = vectors.astype(np.float64) * query.astype(np.float64)
    similarities: Vectors = products.sum(axis=1).astype(np.float32)
    return similarities
