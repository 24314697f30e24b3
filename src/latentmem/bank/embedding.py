"""Task texts turned into vectors of unit length by any embedding function, whose results are checked."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from latentmem.bank.exact import Vectors
from latentmem.bank.tables import UNIT_TOLERANCE, Meta
from latentmem.bank_place import Place
from latentmem.errors import BankError, DataError

Embed = Callable[[list[str]], npt.NDArray[Any]]
"""A function: n texts -> [n, e], vectors of any length but zero. The bank normalises them and keeps float32."""


def unit_vectors(embed: Embed, texts: list[str], names: list[str]) -> Vectors:
    """Return vectors [n, e] of unit length for n texts; `names` say what each text belongs to, for the errors.

    Raises:
        DataError: a text holds a lone surrogate.
        BankError: the embedder gives another shape, or a zero or non-finite vector.
    """
    for text, name in zip(texts, names, strict=True):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"{name}: the task's text holds a lone surrogate; replace it by valid Unicode")
    distinct = list(dict.fromkeys(texts))  # the rollouts of a group share their text, and must share their vector
    if not distinct:
        return np.empty((0, 0), dtype=np.float32)
    raw = np.asarray(embed(distinct), dtype=np.float64)
    if raw.ndim != 2 or raw.shape[0] != len(distinct) or raw.shape[1] == 0:
        raise BankError(
            f"{names[0]}: the embedder returned shape {list(raw.shape)} for {len(distinct)} texts; "
            f"expected [{len(distinct)}, e]"
        )
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        lengths = np.sqrt(np.square(raw).sum(axis=1))
        units = (raw / lengths[:, None]).astype(np.float32)
    rows = {text: row for row, text in enumerate(distinct)}
    for text, name in zip(texts, names, strict=True):
        row = rows[text]
        if not abs(float(np.linalg.norm(units[row].astype(np.float64))) - 1) <= UNIT_TOLERANCE:  # nan fails too
            raise BankError(f"{name}: the embedder gave a zero or non-finite vector; mend it, or leave this text out")
    vectors: Vectors = units[[rows[text] for text in texts]]
    return vectors


def check_embedder(where: Place, meta: Meta, embedder: str, width: int | None = None) -> None:
    """Check that an embedder, and its vectors of this width, are those of the bank.

    Raises:
        BankError: they are not.
    """
    if meta.embedder is not None and meta.embedder != embedder:
        raise BankError(
            f"{where}: its vectors were made by embedder {meta.embedder!r}, but it was opened with {embedder!r}; "
            f"open it with {meta.embedder!r}, or give it another one with `latentmem bank reembed`"
        )
    if width is not None and meta.width is not None and width != meta.width:
        raise BankError(
            f"{where}: embedder {embedder!r} gives vectors of width {width}, the bank holds width {meta.width}; open "
            "it with the embedder that filled it, or run `latentmem bank reembed`"
        )
