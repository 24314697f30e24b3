"""A corpus file as numbered passages: checked as a whole before use, then read row by row.

Only the place where each row begins stays in memory, so a corpus may be larger than memory. The file is kept open and
must not change: what an index says about row 7 holds for the bytes that were there when the index was made.
"""

import hashlib
import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latentmem.environments.rows import Row, parse_object
from latentmem.errors import DataError, suggest
from latentmem.progress import progress

_NAMED = 3
"""Number of bad rows that a message describes; the others are only counted."""


@dataclass(frozen=True)
class Passage:
    """The content of one row."""

    id: str | int
    contents: str
    """The title in the first line, if there is one, and the text below it."""


class Corpus:
    """The passages of a JSON Lines file, each `{"id", "contents"}` or `{"id", "title", "text"}`, by position from 0."""

    def __init__(self, path: Path, on_bad_row: Literal["error", "skip"] = "error") -> None:
        """Read the file once, check every row and remember where it begins.

        Raises:
            DataError: there is no such file, no passage in it, or a row that is not a passage (`skip` leaves it out).
        """
        self.path = path
        try:
            self._file = path.open("rb")
        except FileNotFoundError:
            siblings = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
            hint = suggest(path.name, siblings) if siblings else "its folder holds no .jsonl file"
            raise DataError(f"{path}: no such file; {hint}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give a JSON Lines file") from None
        try:
            self._seen_as = self._state()
            self._check(on_bad_row)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, position: int) -> Passage:
        """Return the passage of a row.

        Raises:
            DataError: the file has been changed since it was checked.
        """
        if not 0 <= position < len(self):
            raise IndexError(position)
        line = os.pread(self._file.fileno(), self._lengths[position], self._starts[position])
        if self._state() != self._seen_as:
            raise DataError(f"{self.path}: was changed after it was read; start the retriever again")
        return _passage(Row(parse_object(line, str(self.path)), str(self.path)))

    @property
    def identity(self) -> dict[str, str | int]:
        """What distinguishes this corpus from any other, even from an edited copy."""
        return {"corpus_bytes": self._seen_as[0], "corpus_sha256": self._sha256, "num_passages": len(self)}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _check(self, on_bad_row: Literal["error", "skip"]) -> None:
        bad = self._scan()
        self.num_bad = len(bad)
        """Number of rows that are not passages and were left out."""
        self.bad_rows = "; ".join(bad[:_NAMED]) + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
        """What is wrong with the first of these rows, by line."""
        if bad and on_bad_row == "error":
            raise DataError(
                f"{self.path}: {len(bad)} of {len(bad) + len(self)} rows are no passages ({self.bad_rows}); mend them, "
                "or leave them out with --on-bad-row skip"
            )
        if not len(self):
            raise DataError(f"{self.path}: holds no passage; expected at least one row with id and contents")

    def _scan(self) -> list[str]:
        """Remember where the passages are; return what is wrong with the rows that are not passages."""
        self._starts, self._lengths = array("q"), array("q")
        content, bad, start = hashlib.sha256(), [], 0
        with progress(self._seen_as[0], "corpus", "B") as bar:
            for number, line in enumerate(self._file, start=1):  # in binary only a line feed ends a line
                content.update(line)
                if line.strip():
                    try:
                        _passage(Row(parse_object(line, f"line {number}"), f"line {number}"))
                    except DataError as error:
                        bad.append(str(error))
                    else:
                        self._starts.append(start)
                        self._lengths.append(len(line))
                start += len(line)
                bar.update(len(line))
        self._sha256 = content.hexdigest()
        return bad


def _passage(row: Row) -> Passage:
    identifier = row.values.get("id")
    if not isinstance(identifier, str | int) or isinstance(identifier, bool):
        raise DataError(f"{row.where}: field 'id' is missing, or neither text nor a whole number")
    if "contents" in row.values or "text" not in row.values:
        return Passage(identifier, row.text("contents"))
    return Passage(identifier, f'"{row.field("title", str)}"\n{row.text("text")}')
