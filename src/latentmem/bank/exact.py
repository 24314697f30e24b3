"""Exact search among unit vectors, for the bank and for the server's passages; results depend on nothing but the rows.

A fast float32 product only nominates candidates; their similarity is computed again by a sum over one row at a time.
So a similarity does not depend on the number of rows, on their blocks, or on the other queries of a batch, and equal
vectors truly tie. Reading the rows once is what takes the time of a search. So a query makes no other array of their
length: rows that cannot be among the best are dropped block by block.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int32]
"""Row numbers, ascending."""
Estimate = Callable[[Vectors, Vectors], Vectors]
"""A function: queries [B, e] and rows [n, e] -> dot products [B, n], summed in float32 in any order."""

_QUERIES_PER_BLOCK = 64
_ROWS_PER_BLOCK = 8192
_GATHERED_PER_BLOCK = 1024
_SPARSE = 3
"""Reading rows in sequence is about this many times as fast as picking them one by one."""
_FEW_QUERIES = 4
"""Up to this many queries, one sum per query is faster than a matrix product."""
_CANDIDATES_PER_BLOCK = 4096
_SHORT_TAIL = 4096


class Rows:
    """Unit vectors, numbered from 0, to which more can be appended; they may lie in a mapped file and in memory."""

    def __init__(self, vectors: Vectors, estimate: Estimate | None = None) -> None:
        """Begin with vectors [n, e]. `estimate` computes the products that nominate rows; None takes numpy's."""
        self.pieces: list[Vectors] = [vectors]
        """All rows, in order; the first piece holds the vectors that this began with."""
        self._estimate = estimate or _estimates

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    @property
    def width(self) -> int:
        """e, the number of dimensions of a vector."""
        return int(self.pieces[0].shape[1])

    def append(self, vectors: Vectors) -> None:
        """Append rows [n, e] float32 of unit length."""
        if len(self.pieces) > 1 and len(self.pieces[-1]) < _SHORT_TAIL:
            self.pieces[-1] = np.concatenate([self.pieces[-1], vectors])
        else:
            self.pieces.append(vectors)

    def since(self, start: int) -> Iterator[Vectors]:
        """Yield the rows from number `start` on, in order, as arrays [n, e]."""
        for begin, piece in self._based_pieces():
            if begin + len(piece) > start:
                yield piece[max(0, start - begin) :]

    def vectors_at(self, positions: Positions) -> Vectors:
        """Return the rows [n, e] at n ascending positions."""
        return np.concatenate([piece.take(part - begin, axis=0) for begin, piece, part in self._split(positions)])

    def nearest(
        self,
        queries: Vectors,
        k: int,
        passing: Positions | None = None,
        left_out: Sequence[Positions] | None = None,
    ) -> list[list[tuple[int, float]]]:
        """Return for each query the numbers and similarities of its k nearest rows: most similar first, ties by number.

        queries: [B, e] float32 of unit length; passing: the rows that may be returned, None for every row; left_out:
        for each query, the rows that may not be returned.
        """
        excluded = left_out if left_out is not None else [np.empty(0, dtype=np.int32)] * len(queries)
        found = []
        for start in range(0, len(queries), _QUERIES_PER_BLOCK):
            end = start + _QUERIES_PER_BLOCK
            nominated = self.nominate(queries[start:end], k, passing, excluded[start:end])
            found += [self.rank(*pair, k) for pair in zip(queries[start:end], nominated, strict=True)]
        return found

    def nominate(
        self, queries: Vectors, k: int, passing: Positions | None, left_out: Sequence[Positions], start: int = 0
    ) -> list[Positions]:
        """Nominate rows, ascending, for each query [e]; its k nearest passing rows from `start` on are among them.

        left_out: for each query the rows, ascending, that may not be nominated.
        """
        # A float32 sum of products of unit vectors is off by at most e * 2^-24, in any order of summing. So a row of
        # the true best k can fall behind the estimated k-th by twice that, and by a little more, because the exact
        # value is rounded to float32.
        margin = (queries.shape[1] + 4) * 2.0**-23
        nominees = [_Nominees(k, margin, rows) for rows in left_out]
        for rows, vectors, within in self._blocks(passing, start):
            estimates = self._estimate(queries, vectors)
            for each, row in zip(nominees, estimates if within is None else estimates[:, within], strict=True):
                each.offer(rows, row)
        return [each.rows() for each in nominees]

    def rank(self, query: Vectors, nominated: Positions, k: int) -> list[tuple[int, float]]:
        """Return the k best of the nominated rows (ascending), with their similarities; ties by row."""
        similarities = np.concatenate(
            [
                _similarities(query, self.vectors_at(nominated[i : i + _CANDIDATES_PER_BLOCK]))
                for i in range(0, len(nominated), _CANDIDATES_PER_BLOCK)
            ]
            or [np.empty(0, dtype=np.float32)]
        )
        best = np.lexsort((nominated, -similarities))[:k]
        return [(int(nominated[i]), float(similarities[i])) for i in best]

    def _based_pieces(self) -> Iterator[tuple[int, Vectors]]:
        """Yield the number of each piece's first row, and the piece."""
        begin = 0
        for piece in self.pieces:
            yield begin, piece
            begin += len(piece)

    def _split(self, rows: Positions, start: int = 0) -> Iterator[tuple[int, Vectors, Positions]]:
        """Yield for each piece its first row's number, the piece, and which of `rows` from `start` on it holds."""
        for begin, piece in self._based_pieces():
            # Of the rows' own type, or numpy would convert all rows.
            ends = np.array([max(begin, start), max(begin + len(piece), start)], dtype=rows.dtype)
            first, last = np.searchsorted(rows, ends)
            if first < last:
                yield begin, piece, rows[first:last]

    def _blocks(
        self, passing: Positions | None, start: int
    ) -> Iterator[tuple[Positions, Vectors, npt.NDArray[np.integer[Any]] | None]]:
        """Yield row numbers [n], vectors [m, e], and the places of the n rows among the m vectors; None for all m."""
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
    """Rows that may be among the k nearest of one query, collected block by block."""

    def __init__(self, k: int, margin: float, left_out: Positions) -> None:
        self._k, self._margin, self._left_out = k, margin, left_out
        self._rows: list[Positions] = []
        self._estimates: list[npt.NDArray[np.floating[Any]]] = []
        self._count = 0
        self._room = 2 * k
        self._least: float = -np.inf
        """A row with an estimate below this is not among the k nearest."""

    def offer(self, rows: Positions, estimates: npt.NDArray[np.floating[Any]]) -> None:
        """Take those of n further rows, with their estimated similarities [n], that may be among the nearest."""
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
        """Return the nominated rows, ascending."""
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
    """Return dot products [B, n] of queries [B, e] and rows [n, e], with whatever rounding the machine has."""
    if len(queries) > _FEW_QUERIES:
        return queries @ vectors.T
    return np.stack([np.einsum("ij,j->i", vectors, query) for query in queries])


def _similarities(query: Vectors, vectors: Vectors) -> Vectors:
    """Return dot products [n] of one query [e] with rows [n, e]; each is the same whatever the other rows are.

    The products are exact in float64, and each contiguous row is summed by itself. Rounding to float32 drops the
    digits that carry no meaning.
    """
    products = vectors.astype(np.float64) * query.astype(np.float64)
    similarities: Vectors = products.sum(axis=1).astype(np.float32)
    return similarities
