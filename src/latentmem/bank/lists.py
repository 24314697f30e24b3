"""Approximate search in banks of millions: a library's index nominates rows, and the exact search (`matrix`) decides.

Rows are grouped into lists of similar ones (an inverted file of faiss, one byte per number). A search reads the lists
nearest to its query until it has met enough rows that it may return. Filters and left-out rows act inside the lists,
and lists without a permitted row are skipped, so a search loses nothing when only rows far from the query pass. The
nominated rows are scored again exactly. Three searches are exact altogether, because that is cheaper: few rows pass, k
asks for many, or the bank is small. Rows added since the lists were last extended are searched exactly too.

Like the matrix, the lists are derived from the records, saved beside them, and dropped at any doubt.
"""

import logging
import math
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from latentmem.bank.exact import Positions, Vectors
from latentmem.bank.matrix import BankIndex, Filter, Label, filter_of
from latentmem.errors import BankError
from latentmem.files import open_ordinary, replacing

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<8sI32s32sQQ")  # magic, crc32 of the rest, generation, id of the last row, rows, trained on
_MAGIC = b"LMEMLST1"
_CRC_END = 12
_FEW_ROWS = 20_000
"""If no more rows than this pass a filter, all of them are scored: that takes as long as a search of the lists."""
_FEW_ROWS_PER_K = 100
_MET_ROWS = 32_768
"""A search goes on until it has met this many rows that pass, or one in _MET_SHARE; recall and time depend on it."""
_MET_SHARE = 128
_LISTS_PER_ROOT = 2
"""Number of lists, as a multiple of the square root of the number of rows."""
_SAMPLE_PER_LIST = 32
_NUM_ROUNDS = 8
"""Rounds of k-means, over _SAMPLE_PER_LIST rows for each list."""
_LONGEST_TAIL = 8192
"""The most rows that are searched exactly before the lists take them."""
_SAVE_SHARE = 16
"""The file is replaced once it lacks more than one row in this many."""
_FILTERS_REMEMBERED = 8


@dataclass(frozen=True)
class StoredLists:
    """The content of a file of lists."""

    last_id: str
    """Trajectory id of the last row in the lists."""
    num_rows: int
    num_trained_on: int
    """Number of rows when the centres of the lists were chosen."""
    content: npt.NDArray[np.uint8]
    """The lists as faiss serialises them."""


@dataclass(frozen=True)
class _Listed:
    """Rows in the lists that pass a filter."""

    bits: npt.NDArray[np.uint8]
    """One bit per row, the lowest bit first."""
    counts: npt.NDArray[np.int64]
    """Number of passing rows in each list."""


def load_faiss(where: object) -> Any:
    """Import faiss and return it.

    Raises:
        BankError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise BankError(
            f"{where}: index 'approximate' needs the library faiss, which is not installed; "
            "run `pip install 'latentmem[ann]'`, or take index 'exact'"
        ) from None
    return faiss


def read_lists(path: Path, generation: str) -> StoredLists | None:
    """Return the lists in a file; None if there is no file, or its lists are of another generation.

    Raises:
        OSError: it cannot be read, or is not an ordinary file.
        ValueError: the file is torn or damaged.
    """
    try:
        with open_ordinary(path) as file:
            content = np.frombuffer(file.read(), dtype=np.uint8)
    except FileNotFoundError:
        return None
    if content.size < _HEADER.size:
        raise ValueError(f"{content.size} bytes are too few for a header")
    header = _HEADER.unpack(content[: _HEADER.size].tobytes())
    magic, crc, found_generation, last_id, num_rows, num_trained_on = header
    if magic != _MAGIC:
        raise ValueError("not a file of lists of this version")
    if zlib.crc32(content[_CRC_END:].data) != crc:
        raise ValueError("checksum does not match")
    if found_generation.decode("ascii") != generation:
        return None
    return StoredLists(last_id.decode("ascii"), num_rows, num_trained_on, content[_HEADER.size :])


class ApproximateIndex:
    """Lists over the rows of an exact index; the bank keeps that index up to date with the records."""

    def __init__(self, path: Path, exact: BankIndex, stored: StoredLists | None = None) -> None:
        """Begin without lists, or with those read from the file at `path`.

        Raises:
            ValueError: faiss cannot read the stored lists.
            BankError: faiss is not installed.
        """
        self._faiss = load_faiss(path)
        self._path = path
        self._exact = exact
        self._ivf: Any = None
        self._num_listed = self._num_saved = self._num_trained_on = 0
        if stored is not None:
            try:
                self._ivf = self._faiss.deserialize_index(stored.content)
            except RuntimeError as error:
                raise ValueError(f"faiss cannot read it: {str(error).splitlines()[0]}") from None
            self._num_listed, self._num_trained_on = stored.num_rows, stored.num_trained_on
            self._num_saved = self._num_listed
            self._look_at_lists()

    @property
    def exact(self) -> BankIndex:
        """The index whose rows are in the lists."""
        return self._exact

    # Growing

    def follow(self) -> None:
        """Update the lists: make them anew once the exact index has grown fourfold, else extend them now and then."""
        num_rows = len(self._exact)
        if num_rows <= _FEW_ROWS:
            return
        if self._ivf is None or num_rows >= 4 * self._num_trained_on:
            self._train()
        elif num_rows - self._num_listed <= _LONGEST_TAIL:
            return
        for rows in self._exact.rows.since(self._num_listed):
            for i in range(0, len(rows), _LONGEST_TAIL):
                self._ivf.add(rows[i : i + _LONGEST_TAIL])
        self._num_listed = num_rows
        self._look_at_lists()
        if _SAVE_SHARE * (num_rows - self._num_saved) > num_rows:
            self._save()

    def _train(self) -> None:
        """Choose the centres of the lists from a sample; the caller adds the rows."""
        num_rows, width = len(self._exact), self._exact.rows.width
        num_lists = max(1, round(_LISTS_PER_ROOT * math.sqrt(num_rows)))
        logger.info("%s: building %d lists over %d rows, once", self._path, num_lists, num_rows)
        chosen = np.random.default_rng(0).choice(num_rows, min(num_rows, _SAMPLE_PER_LIST * num_lists), replace=False)
        faiss = self._faiss
        ivf = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(width), width, num_lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        )
        ivf.cp.niter, ivf.cp.spherical = _NUM_ROUNDS, True
        ivf.cp.min_points_per_centroid, ivf.cp.max_points_per_centroid = 1, _SAMPLE_PER_LIST
        ivf.train(self._exact.rows.vectors_at(np.sort(chosen).astype(np.int32)))
        self._ivf, self._num_listed, self._num_saved, self._num_trained_on = ivf, 0, 0, num_rows

    def _look_at_lists(self) -> None:
        """Note which list each row is in, and the centres of the lists."""
        faiss, ivf = self._faiss, self._ivf
        self._centres: Vectors = ivf.quantizer.reconstruct_n(0, ivf.nlist)  # [L, e]
        self._list_of = np.empty(self._num_listed, dtype=np.int32)
        for number in range(ivf.nlist):
            size = ivf.invlists.list_size(number)
            if size:
                self._list_of[faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size)] = number
        self._listed: dict[Filter, _Listed] = {}

    def _save(self) -> None:
        content = self._faiss.serialize_index(self._ivf)
        identity = (self._exact.generation.encode("ascii"), self._exact.last_id.encode("ascii"))
        fields = (*identity, self._num_listed, self._num_trained_on)
        crc = zlib.crc32(content.data, zlib.crc32(_HEADER.pack(_MAGIC, 0, *fields)[_CRC_END:]))
        try:
            with replacing(self._path, durable=False) as file:
                file.writelines([_HEADER.pack(_MAGIC, crc, *fields), content.data])
        except OSError as error:
            logger.warning("%s: the lists could not be saved (%s); they stay in memory", self._path, error)
            return
        self._num_saved = self._num_listed

    # Reading

    def nearest(
        self,
        queries: Vectors,
        k: int,
        labels: Iterable[Label],
        excluded: Sequence[Sequence[int]],
        tenants: Collection[str] | None = None,
    ) -> list[list[tuple[int, float]]]:
        """Return what the exact index does, but if many rows pass, some of the nearest may be missed."""
        labels, tenants = wanted = filter_of(labels, tenants)
        passing = self._exact.passing(*wanted)
        few = max(_FEW_ROWS, _FEW_ROWS_PER_K * k)
        if self._ivf is None or (len(self._exact) if passing is None else len(passing)) <= few:
            return self._exact.nearest(queries, k, labels, excluded, tenants)
        listed = self._listed_of(wanted, passing)
        found = []
        for query, seqs in zip(queries, excluded, strict=True):
            left_out = self._exact.positions_of(seqs)
            may_return = self._without(listed, left_out)
            if may_return.counts.sum() <= few:
                found += self._exact.nearest(query[None], k, labels, [seqs], tenants)
                continue
            nominated = self._nominate(query, k, may_return)
            (recent,) = self._exact.rows.nominate(query[None], k, passing, [left_out], start=self._num_listed)
            ranked = self._exact.rows.rank(query, np.concatenate([nominated, recent]), k)
            found.append(self._exact.by_record(ranked))
        return found

    def _listed_of(self, wanted: Filter, passing: Positions | None) -> _Listed:
        """Return the rows in the lists that pass a filter; remember them as long as the lists do not change."""
        known = self._listed.pop(wanted, None)
        if known is None:
            passes = np.ones(self._num_listed, dtype=bool)
            if passing is not None:
                passes[:] = False
                passes[passing[passing < self._num_listed]] = True
            counts = np.bincount(self._list_of[passes], minlength=self._ivf.nlist)
            known = _Listed(np.packbits(passes, bitorder="little"), counts)
        self._listed[wanted] = known
        if len(self._listed) > _FILTERS_REMEMBERED:
            del self._listed[next(iter(self._listed))]  # the filter that was asked for longest ago
        return known

    def _without(self, listed: _Listed, rows: Positions) -> _Listed:
        bits, counts = listed.bits.copy(), listed.counts.copy()
        for row in rows[rows < self._num_listed].tolist():
            byte, bit = row >> 3, 1 << (row & 7)
            counts[self._list_of[row]] -= bool(bits[byte] & bit)
            bits[byte] &= 255 - bit
        return _Listed(bits, counts)

    def _nominate(self, query: Vectors, k: int, may_return: _Listed) -> Positions:
        """Return rows, ascending, that probably include the k nearest to a query [e]."""
        faiss, counts = self._faiss, may_return.counts
        nearest_first = np.argsort(-np.einsum("ij,j->i", self._centres, query))
        met = np.cumsum(counts[nearest_first][counts[nearest_first] > 0])
        num_nominated = 4 * k + 64  # one byte per number blurs the order of near rows
        enough = max(_MET_ROWS, int(met[-1]) // _MET_SHARE, num_nominated)
        useful = np.packbits(counts > 0, bitorder="little")
        parameters = faiss.SearchParametersIVF(
            sel=faiss.IDSelectorBitmap(may_return.bits),
            nprobe=min(len(met), int(np.searchsorted(met, enough)) + 1),
            quantizer_params=faiss.SearchParameters(sel=faiss.IDSelectorBitmap(useful)),
        )
        with _one_thread(faiss):
            _, rows = self._ivf.search(query[None], num_nominated, params=parameters)
        return np.sort(rows[rows >= 0]).astype(np.int32)


@contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    """Let faiss use one thread only: a query is so little work that waiting for other threads takes longer."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
