"""The files that rows stand in, in the forms that people keep them in; which one it is, the file's beginning tells.

JSON Lines, plain or compressed, a JSON array and tables of text are read by the standard library; parquet and what
`save_to_disk` wrote by packages that are loaded only then. Anything else is refused by its name.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from latentmem.data_files import ARRAY, BZIP2, GZIP, HEAD_BYTES, MARK, PARQUET, UTF_16, UTF_32, XZ, Form, form_of
from latentmem.errors import BadRowError, DataError, suggest

Values = dict[str, Any]
Found = tuple[str, Values | BadRowError]
"""Where a row stands (`file:line`), and its fields or what is wrong with it."""

MAX_LINE_BYTES = 1 << 28
_UNPACK: dict[Form | None, Callable[[IO[bytes]], Any]] = {
    GZIP: lambda packed: gzip.GzipFile(fileobj=packed),
    BZIP2: bz2.BZ2File,
    XZ: lzma.LZMAFile,
}
_DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
_ENDINGS = (".jsonl", ".ndjson", ".parquet", *_DELIMITERS)
_JSON_NAMES = {str: "a string", int: "an integer", bool: "true or false", list: "a list", dict: "an object"}


class Cell(str):
    """A cell of a table of text, which stands for a value of whatever type its field has."""

    __slots__ = ()

    def as_type(self, kind: type) -> Any:
        """The value that is spelled here; the text itself where none of that type is.

        >>> Cell("True").as_type(bool), Cell("7").as_type(int), Cell("7").as_type(str), Cell("").as_type(int)
        (True, 7, '7', None)
        """
        if kind is str:
            return str(self)
        if not self.strip():
            return None
        try:
            return json.loads(self.lower() if kind is bool else self)
        except (ValueError, RecursionError):
            return str(self)


def read_files(path: Path) -> Iterator[Found]:
    """The rows of a file, of all files of a folder that hold rows, or of a folder that `save_to_disk` wrote.

    Raises:
        DataError: no such file, or one that cannot be read.
    """
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in path.iterdir() if part.is_dir())
        raise DataError(
            f"{path}: holds several splits of a data set ({', '.join(splits)}); name one of them, such as "
            f"{path / splits[0] if splits else path}"
        )
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        yield from _saved(path)
        return
    for file in _files(path):
        try:
            with file.open("rb") as opened:
                yield from _rows(file, opened)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _ending(file) in _ENDINGS and file.is_file())
        if not files:
            raise DataError(f"{path}: the folder holds no .jsonl file, and no .parquet, .csv or .tsv; expected one")
        return files
    if not path.exists():
        if not path.parent.is_dir():
            raise DataError(f"{path}: no such file; its folder {path.parent} does not exist either")
        siblings = [p.name for p in path.parent.iterdir() if _ending(p) in _ENDINGS or p.is_dir()]
        hint = suggest(path.name, siblings) if siblings else "its folder holds no .jsonl file"
        raise DataError(f"{path}: no such file or folder; {hint}")
    return [path]


def _ending(file: Path) -> str:
    """The ending of a name, without that of a compression."""
    name = Path(file.stem) if file.suffix in (".gz", ".bz2", ".xz") else file
    return name.suffix.lower()


def _rows(file: Path, opened: io.BufferedReader) -> Iterator[Found]:
    content: Any = opened
    form = form_of(content.peek(HEAD_BYTES))
    if form in _UNPACK:
        content = _UNPACK[form](content)
        form = form_of(content.peek(HEAD_BYTES))
    if form in (UTF_16, UTF_32):
        text = _as_utf8(content.read(), file)
        content, form = io.BytesIO(text), form_of(text[:HEAD_BYTES])
    if form is PARQUET:
        return _parquet(file, content)
    if form in (None, ARRAY) and _ending(file) in _DELIMITERS:
        return _table(file, content, _DELIMITERS[_ending(file)])
    if form is ARRAY:
        return _array(file, content.read())
    if form is None:
        return _lines(file, content)
    raise DataError(f"{file}: {form.advice(file)}")


def _as_utf8(content: bytes, file: Path) -> bytes:
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding).encode("utf-8")
    except UnicodeError as error:
        raise DataError(f"{file}: not valid {encoding.upper()} ({error}); save the file as UTF-8") from None


def _lines(file: Path, content: IO[bytes]) -> Iterator[Found]:
    # Only a line feed ends a row: a string may hold U+2028, which str.splitlines takes for an end too.
    number = 0
    while line := content.readline(MAX_LINE_BYTES):
        number += 1
        where = f"{file}:{number}"
        if len(line) == MAX_LINE_BYTES:
            raise DataError(f"{where}: the line has {MAX_LINE_BYTES:,} bytes or more; expected one object on each line")
        if number == 1:
            line = line.removeprefix(MARK)
        if line.strip():
            yield _found(where, line)


def _found(where: str, line: bytes) -> Found:
    try:
        return where, parse_object(line, where)
    except BadRowError as error:
        return where, error


def parse_object(line: bytes, where: str) -> Values:
    """One line of JSON Lines.

    Raises:
        BadRowError: not JSON in UTF-8, or no object; the message begins with `where`.
    """
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse)
        if b"\\u" in line:
            check_text(value, where)
    except UnicodeError as error:
        raise BadRowError("not UTF-8", f"{where}: not valid UTF-8 ({error}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadRowError("not JSON", f"{where}: not valid JSON ({error}); expected one object on each line") from None
    if not isinstance(value, dict):
        raise BadRowError("not an object", f"{where}: expected a JSON object, found {json_name(value)}")
    return value


def check_text(value: Any, where: str) -> None:
    """Refuse half a surrogate pair, which JSON can spell and which is no text.

    Raises:
        BadRowError: there is one in a string, or in one within a list or an object.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise BadRowError("not UTF-8", f"{where}: not valid UTF-8 ({error}); save the file as UTF-8") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _array(file: Path, content: bytes) -> Iterator[Found]:
    try:
        entries = json.loads(content.removeprefix(MARK).decode("utf-8"), parse_constant=_refuse)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise DataError(f"{file}: begins as a JSON array, but is not valid JSON ({error}); mend it") from None
        yield from _lines(file, io.BytesIO(content))  # each line may be a row, if no good one
        return
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: begins as a JSON array, but is not valid JSON ({error}); mend it") from None
    for number, value in enumerate(entries, start=1):
        where = f"{file}, entry {number}"
        if not isinstance(value, dict):
            problem = f"{where}: expected a JSON object, found {json_name(value)}"
            yield where, BadRowError("not an object", problem)
            continue
        try:
            check_text(value, where)
        except BadRowError as error:
            yield where, error
        else:
            yield where, value


def _table(file: Path, content: IO[bytes], delimiters: str) -> Iterator[Found]:
    """A table of text; the first line names the fields, and tells what stands between them."""
    csv.field_size_limit(MAX_LINE_BYTES)
    number = 0
    try:
        with io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
            first = text.readline(MAX_LINE_BYTES)
            delimiter = max(delimiters, key=first.count)
            names = next(csv.reader([first], delimiter=delimiter, strict=True), [])
            if len(set(names)) < len(names):
                raise DataError(f"{file}:1: two columns have one name; expected the names of the fields ({names})")
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            for cells in reader:
                where = f"{file}:{number + 2}"
                number = reader.line_num
                if len(cells) == len(names):
                    yield where, dict(zip(names, map(Cell, cells), strict=True))
                elif cells:
                    problem = f"{where}: {len(cells)} cells, but the first line names {len(names)} fields"
                    yield where, BadRowError("wrong number of cells", problem)
    except UnicodeError as error:
        raise DataError(f"{file}: not valid UTF-8 ({error}); save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{file}:{number + 2}: not valid CSV ({error})") from None


def _parquet(file: Path, content: IO[bytes]) -> Iterator[Found]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{file}: is parquet, which needs the package pyarrow; pip install 'latentmem[hub]', or write JSON Lines"
        ) from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(content).iter_batches():
            for values in batch.to_pylist():
                yield f"{file}, row {number}", values
                number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: the parquet file cannot be read ({reason}); copy or download it again") from None


def _saved(folder: Path) -> Iterator[Found]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{folder}: written by save_to_disk, which needs the package datasets; pip install 'latentmem[hub]'"
        ) from None
    try:
        table = datasets.load_from_disk(str(folder))
        rows = enumerate(iter(table))
        while (row := next(rows, None)) is not None:
            yield f"{folder}, row {row[0]}", dict(row[1])
    except DataError:
        raise
    except Exception as error:  # whatever a library meets in a damaged folder
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{folder}: written by save_to_disk, but it cannot be read ({reason}); save it again") from None


def json_name(value: Any) -> str:
    """A value in words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"the number {value}"
    return _JSON_NAMES.get(type(value), f"a {type(value).__name__}")
