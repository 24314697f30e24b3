"""The bank's exact search matrix, derived from the records and thrown away at any doubt.

Only rows with the requested labels are scored, and all of them are: a filter after an approximate search would lose
right answers. The rows that pass a filter are remembered, since finding them costs as much as a search. The file holds
the records up to some point; the rows since then are kept in memory.
"""

import json
import logging
import struct
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from latentmem.bank.exact import Positions, Rows, Vectors
from latentmem.files import Unchanged, replacing

logger = logging.getLogger(__name__)

Label = tuple[str, str | int]
"""One fact that a search can filter on, such as ("domain", "qa"), ("role", "coder") or ("success", 1)."""

Filter = tuple[frozenset[Label], frozenset[str] | None]
"""The labels that a row must have, all of them, and the tenants of which it must have one; None takes every tenant."""


def filter_of(labels: Iterable[Label], tenants: Collection[str] | None) -> Filter:
    """Return the filter that stands for these labels and tenants."""
    return frozenset(labels), None if tenants is None else frozenset(tenants)


# Magic, crc32 of the rest, generation, id of the last record, rows, width, bytes of the label table; then zeros up to
# _ROWS_BEGIN, so that rows begin at a cache line.
_HEADER = struct.Struct("<8sI32s32sQQQ")
_MAGIC = b"LMEMIDX4"
_OLD_MAGIC = b"LMEMIDX2"
"""Of a file without labels for tenants."""
_CRC_END = 12
_ROWS_BEGIN = 128
_FILTERS_REMEMBERED = 8


@dataclass(frozen=True)
class StoredMatrix:
    """The content of an index file."""

    last_id: str
    """Trajectory id of the last row, which tells whether the file belongs to these records."""
    seqs: npt.NDArray[np.int64]
    """Record numbers [N], ascending."""
    vectors: Vectors
    """The rows [N, e], memory-mapped."""
    postings: dict[Label, Positions]
    """The rows that bear a label, memory-mapped."""
    file: Unchanged
    """What is mapped."""


def read_matrix(path: Path, generation: str) -> StoredMatrix | None:
    """Return the matrix in a file; None if there is no file, or its matrix is of another generation or older form.

    Raises:
        OSError: it cannot be read, or is not an ordinary file.
        ValueError: the file is torn or damaged.
    """
    try:
        file = Unchanged(path)
    except FileNotFoundError:
        return None
    content = np.frombuffer(file.mapped(), dtype=np.uint8)
    if content.size < _ROWS_BEGIN:
        raise ValueError(f"{content.size} bytes are too few for a header")
    header = _HEADER.unpack(content[: _HEADER.size].tobytes())
    magic, crc, found_generation, last_id, num_rows, width, num_table_bytes = header
    if magic == _OLD_MAGIC:
        return None
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
        file=file,
    )


class _Growing:
    """A one-dimensional array that grows at its end without being copied each time."""

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
    """The rows that pass a filter, among those checked so far."""

    rows: _Growing
    reached: int
    """Number of rows checked so far."""


class BankIndex:
    """Vectors and filter labels of all records up to `reached`. The bank supplies them; this class knows no SQL."""

    def __init__(
        self,
        path: Path,
        generation: str,
        width: int,
        stored: StoredMatrix | None = None,
    ) -> None:
        """Begin empty, or with what was read from the file at `path`."""
        self.generation = generation
        self.last_id = stored.last_id if stored else ""
        """Trajectory id of the last row."""
        self._path = path
        self._seqs = _Growing(stored.seqs if stored else np.empty(0, dtype=np.int64))  # [N]
        self.rows = Rows(stored.vectors if stored else np.empty((0, width), dtype=np.float32))
        """The vectors; the first piece is in the file, the rest came since."""
        self._file = stored.file if stored else None
        self._postings = {label: _Growing(rows) for label, rows in stored.postings.items()} if stored else {}
        self._passing: dict[Filter, _Passing] = {}

    def __len__(self) -> int:
        return len(self.seqs)

    @property
    def seqs(self) -> npt.NDArray[np.int64]:
        """The record number of each row, [N], ascending."""
        return self._seqs.values

    @property
    def reached(self) -> int:
        """The number of the last record in this index; 0 when empty."""
        return int(self.seqs[-1]) if len(self) else 0

    @property
    def is_intact(self) -> bool:
        """Whether the file that holds some of the rows is as it was; they must not be read otherwise."""
        return self._file is None or bool(self._file)

    # Growing

    def append(self, seqs: Sequence[int], vectors: Vectors, labels: Iterable[Iterable[Label]], last_id: str) -> None:
        """Append the records that follow `reached`.

        seqs: n ascending record numbers; vectors: [n, e] float32 of unit length; labels: one collection per row;
        last_id: trajectory id of the last row.
        """
        positions: dict[Label, list[int]] = {}
        for position, row in enumerate(labels, start=len(self)):
            for label in row:
                positions.setdefault(label, []).append(position)
        for label, new in positions.items():
            self._postings.setdefault(label, _Growing(np.empty(0, dtype=np.int32))).extend(np.array(new, np.int32))
        self._seqs.extend(np.asarray(seqs, dtype=np.int64))
        self.rows.append(vectors)
        self.last_id = last_id

    def save_if_due(self) -> None:
        """Replace the file, atomically, once the rows added since exceed a quarter of those it holds.

        The write is not synced: a file torn by a power cut fails its checksum.
        """
        num_stored = len(self.rows.pieces[0])
        if 4 * (len(self) - num_stored) <= num_stored:
            return
        postings = {label: rows.values for label, rows in self._postings.items()}
        table = json.dumps([(*label, len(rows)) for label, rows in postings.items()]).encode("ascii")
        shape = (len(self), self.rows.width)
        fields = (self.generation.encode("ascii"), self.last_id.encode("ascii"), *shape, len(table))
        header = _HEADER.pack(_MAGIC, 0, *fields).ljust(_ROWS_BEGIN, b"\0")
        little_endian = [piece.astype("<f4", copy=False) for piece in self.rows.pieces]
        little_endian += [self.seqs.astype("<i8", copy=False)]
        little_endian += [rows.astype("<i4", copy=False) for rows in postings.values()]
        arrays = [array.reshape(-1).view(np.uint8).data for array in little_endian]
        content: list[bytes | memoryview] = [header, *arrays, table]
        crc = zlib.crc32(header[_CRC_END:])
        for part in content[1:]:
            crc = zlib.crc32(part, crc)
        content[0] = _HEADER.pack(_MAGIC, crc, *fields).ljust(_ROWS_BEGIN, b"\0")
        try:
            with replacing(self._path, durable=False) as file:
                file.writelines(content)
                file.flush()
                written = Unchanged(Path(file.name))
        except OSError as error:
            logger.warning("%s: the index could not be saved (%s); it stays in memory", self._path, error)
            return
        count = len(self) * self.rows.width
        mapped = np.frombuffer(written.mapped(), dtype="<f4", count=count, offset=_ROWS_BEGIN)
        self.rows.pieces, self._file = [mapped.reshape(shape)], written  # the mapping may replace the copy in memory

    # Reading

    def positions_of(self, seqs: Sequence[int]) -> Positions:
        """Return the rows of records that are in the index, ascending."""
        return np.unique(np.searchsorted(self.seqs, seqs)).astype(np.int32)

    def postings(self) -> dict[Label, Positions]:
        """Return the rows that have each label."""
        return {label: rows.values for label, rows in self._postings.items()}

    def passing(self, labels: Iterable[Label], tenants: Collection[str] | None = None) -> Positions | None:
        """Return the rows that have all the labels and one of the tenants; None stands for every row."""
        wanted = filter_of(labels, tenants)
        if wanted == (frozenset(), None):
            return None
        known = self._passing.pop(wanted, None) or _Passing(_Growing(np.empty(0, dtype=np.int32)), reached=0)
        if known.reached < len(self):
            known.rows.extend(self._bearing(*wanted, known.reached))
            known.reached = len(self)
        self._passing[wanted] = known
        if len(self._passing) > _FILTERS_REMEMBERED:
            del self._passing[next(iter(self._passing))]  # the filter that was asked for longest ago
        # To read every row is faster than to pick every row; a bank without tenants is one of the common pool alone.
        return None if len(known.rows.values) == len(self) else known.rows.values

    def _bearing(self, labels: Iterable[Label], tenants: Iterable[str] | None, start: int) -> Positions:
        """Return the rows from number `start` on, less `start`, that have all the labels and one of the tenants."""
        none = _Growing(np.empty(0, dtype=np.int32))

        def since(label: Label) -> Positions:
            rows: Positions = self._postings.get(label, none).values
            return rows[np.searchsorted(rows, np.int32(start)) :] - np.int32(start)

        each = [since(label) for label in labels]
        if tenants is not None:  # a row has one tenant, so no row is there twice
            each.append(np.sort(np.concatenate([none.values, *(since(("tenant", tenant)) for tenant in tenants)])))
        rows, *others = sorted(each, key=len)
        for other in others:
            bears = np.zeros(len(self) - start, dtype=bool)
            bears[other] = True
            rows = rows[bears[rows]]
        return rows + np.int32(start)

    def nearest(
        self,
        queries: Vectors,
        k: int,
        labels: Iterable[Label],
        excluded: Sequence[Sequence[int]],
        tenants: Collection[str] | None = None,
    ) -> list[list[tuple[int, float]]]:
        """Return for each query the record numbers and similarities of its k nearest rows that have all the labels.

        queries: [B, e] float32 of unit length; excluded: for each query the record numbers that may not be returned;
        tenants: a row belongs to one of them; None takes the rows of all.
        The most similar comes first; ties are in the order of record numbers.
        """
        left_out = [self.positions_of(seqs) for seqs in excluded]
        found = self.rows.nearest(queries, k, self.passing(labels, tenants), left_out)
        return [self.by_record(row) for row in found]

    def by_record(self, found: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
        """Replace row numbers by record numbers."""
        return [(int(self.seqs[row]), similarity) for row, similarity in found]
