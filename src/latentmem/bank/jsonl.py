"""Trajectories as lines of canonical JSON: the format in which a bank is exported, and imported batch by batch."""

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

from latentmem.data_files import HEAD_BYTES, MARK, form_of
from latentmem.errors import BankError, DataError
from latentmem.files import replacing
from latentmem.trajectory import Trajectory


def write_stream(lines: Iterable[bytes], stream: TextIO) -> int:
    """Write lines, given without their newlines, to a stream, and return their number."""
    num_written = 0
    for line in lines:
        stream.write((line + b"\n").decode("utf-8"))
        num_written += 1
    return num_written


def write_file(lines: Iterable[bytes], path: Path, *, not_over: Collection[Path]) -> int:
    """Replace a file by lines, atomically, and return the number of lines.

    Raises:
        BankError: the file cannot be written, or is one of `not_over`, the bank's own files.
    """
    path = path.resolve()
    if path in [file.resolve() for file in not_over]:
        raise BankError(f"{path}: cannot export a bank over itself; give another path")
    num_written = 0
    try:
        with replacing(path) as file:
            for line in lines:
                file.write(line + b"\n")
                num_written += 1
    except OSError as error:
        raise BankError(f"{path}: the export cannot be written ({error.strerror})") from None
    return num_written


def read_batches(path: Path, size: int) -> Iterator[list[Trajectory]]:
    r"""Yield the trajectories of a file, up to `size` at once; lines end at b"\n" only.

    Raises:
        DataError: the file cannot be read, or a line is not a trajectory. The message says which line, and that the
            lines of earlier batches are stored.
    """
    lines = _lines(path)
    num_done = 0
    while batch := list(islice(lines, size)):
        try:
            trajectories = [
                Trajectory.from_json(line, f"{path}:{number}") for number, line in enumerate(batch, num_done + 1)
            ]
        except DataError as error:
            stored = f"lines 1 to {num_done} are stored" if num_done else "nothing is stored"
            raise DataError(f"{error}; {stored}, mend the file and import it again") from None
        yield trajectories
        num_done += len(trajectories)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            form = form_of(file.peek(HEAD_BYTES))
            if form is not None:
                raise DataError(f"{path}: {form.advice(path)}")
            for number, line in enumerate(file):
                yield line if number else line.removeprefix(MARK)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
