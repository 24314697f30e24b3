"""A corpus file as numbered passages: checked as a whole before use, then read row by row.

Only the place where each row begins stays in memory, so a corpus may be larger than memory. The file is kept open and
must not change: what an index says about row 7 holds for the bytes that were there when the index was made.
"""

import hashlib
import os
import stat
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latentmem.data_files import HEAD_BYTES, MARK, form_of
from latentmem.environments.row_files import parse_object
from latentmem.environments.rows import Row
from latentmem.errors import BadRowError, DataError, suggest
from latentmem.progress import progress

_NAMED = 3
"""Number of bad rows that a message describes; the others are only counted."""


@dataclass(frozen=True)
class Passage:
    """The content of one row."""

    id: str | int
    contents: str
    """The title in the first line, the text below it; one line alone is text."""


class Corpus:
    """The passages of a JSON Lines file, each `{"id", "contents"}` or `{"id", "title", "text"}`, by position from 0.

    `_id`, as in BEIR, and `docid` stand for `id`; a title may be missing, null or blank.
    """

    def __init__(self, path: Path, on_bad_row: Literal["error", "skip"] = "error") -> None:
        """Read the file once, check every row and remember where it begins.

        Raises:
            DataError: there is no such file, no passage in it, or a row that is not a passage (`skip` leaves it out).
        """
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise DataError(f"{path}: is not a file; {_hint(path)}")
            self._file = path.open("rb")
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; {_hint(path)}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give a JSON Lines file") from None
        try:
            form = form_of(os.pread(self._file.fileno(), HEAD_BYTES, 0))
            if form is not None:
                raise DataError(f"{path}: {form.advice(path)}")
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
                if number == 1 and line.startswith(MARK):
                    start, line = len(MARK), line.removeprefix(MARK)
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


def _hint(path: Path) -> str:
    folder, wanted = (path, "corpus.jsonl") if path.is_dir() else (path.parent, path.name)
    names = [p.name for p in folder.glob("*.jsonl")] if folder.is_dir() else []
    return suggest(wanted, names) if names else "its folder holds no .jsonl file"


def _passage(row: Row) -> Passage:
    identifier = next((row.values[name] for name in ("id", "_id", "docid") if name in row.values), None)
    if not isinstance(identifier, str | int) or isinstance(identifier, bool):
        raise DataError(
            f"{row.where}: field 'id' is missing, or neither text nor a whole number; _id or docid may take its place"
        )
    if "contents" in row.values or "text" not in row.values:
        return Passage(identifier, row.text("contents"))
    title = " ".join(row.field("title", str).split()) if row.values.get("title") is not None else ""
    text = row.field("text", str)
    if not text.strip():
        if not title:
            raise BadRowError("blank", f"{row.where}: field 'text' is blank, and there is no title; expected text")
        return Passage(identifier, title)
    if title:
        return Passage(identifier, f'"{title}"\n{text}')
    # With an empty line for the title, or the first of several lines would be taken for it.
    return Passage(identifier, f"\n{text}" if "\n" in text.strip() else text)
