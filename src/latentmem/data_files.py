"""What a data file is, told by how it begins; what is not read is called by its name, with what converts it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 64
"""Bytes from the beginning of a file that tell what it is."""

_PANDAS = "python -c \"import pandas; pandas.read_{0}('{{file}}').to_json('rows.jsonl', orient='records', lines=True)\""


@dataclass(frozen=True)
class Form:
    """A form of files that is not JSON Lines in UTF-8."""

    name: str
    command: str
    """What makes JSON Lines, or something nearer to it, of `{file}`."""

    def advice(self, file: Path) -> str:
        """Say what the file is and how to convert it.

        >>> Form("gzip", "gunzip -k {file}").advice(Path("a.gz"))
        'is gzip, not JSON Lines; convert it: gunzip -k a.gz'
        """
        return f"is {self.name}, not JSON Lines; convert it: {self.command.format(file=file)}"


GZIP = Form("gzip", "gunzip -k {file}")
BZIP2 = Form("bzip2", "bunzip2 -k {file}")
XZ = Form("xz", "unxz -k {file}")
PARQUET = Form("parquet", _PANDAS.format("parquet"))
ARRAY = Form("a JSON array", "jq -c '.[]' {file} > rows.jsonl")
LINES = Form("JSON over several lines", "jq -c . {file} > rows.jsonl")
UTF_16 = Form("UTF-16", "iconv -f UTF-16 -t UTF-8 {file} > rows.jsonl")
UTF_32 = Form("UTF-32", "iconv -f UTF-32 -t UTF-8 {file} > rows.jsonl")

_BEGINNINGS = {
    b"\x1f\x8b": GZIP,
    b"BZh": BZIP2,
    b"\xfd7zXZ\x00": XZ,
    b"PAR1": PARQUET,
    b"\x28\xb5\x2f\xfd": Form("Zstandard", "unzstd {file}"),
    b"PK\x03\x04": Form("a zip archive or an Excel workbook", "unzip {file}, or save the workbook as CSV in UTF-8"),
    b"ARROW1": Form("an Arrow file", _PANDAS.format("feather")),
    b"\xff\xff\xff\xff": Form("an Arrow stream", "name the folder that save_to_disk wrote in place of {file}"),
    b"\x89HDF": Form("HDF5", _PANDAS.format("hdf")),
    b"\x93NUMPY": Form("a NumPy array", "write what {file} holds with json.dumps, an object a line"),
    b"SQLite format 3\x00": Form("an SQLite database", "latentmem bank export {file} rows.jsonl, if it is a bank"),
    b"version https://git-lfs": Form("a pointer of Git LFS in the place of the file", "git lfs pull --include {file}"),
    b"%PDF": Form("a PDF", "take the data set that {file} describes"),
    b"\x80": Form("a Python pickle", "write what {file} holds with json.dumps; reading a pickle may run anything"),
    b"<": Form("a web page or XML", "download the file itself in place of {file}"),
}
_BROKEN = re.compile(rb'\{[ \t\r]*\n\s*"')
MARK = b"\xef\xbb\xbf"
"""What UTF-8 may begin with; it belongs to no row."""


def form_of(head: bytes) -> Form | None:
    """Tell what a file is by its first bytes; None for what may be JSON Lines in UTF-8, or plain text.

    >>> form_of(b"PAR1...").name, form_of(b'  [{"a": 1}').name, form_of(b'{"a": 1}')
    ('parquet', 'a JSON array', None)
    """
    for beginning, form in _BEGINNINGS.items():
        if head.startswith(beginning):
            return form
    encoding = json.detect_encoding(head)
    if not encoding.startswith("utf-8"):
        return UTF_16 if encoding.startswith("utf-16") else UTF_32
    text = head.removeprefix(MARK).lstrip()
    if text.startswith(b"["):
        return ARRAY
    return LINES if _BROKEN.match(text) else None
