"""Write files that must survive a kill or a full disk: replace whole files or append lines, and sync both.

A reader sees the old content or the new one, whatever crashes. What a function here has written is on stable storage
when it returns. Locks are the kernel's, which frees them however the process ends. Loads no torch.
"""

import errno
import fcntl
import mmap
import os
import shutil
import stat
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from latentmem.errors import RunError
from latentmem.parsing import checked, parse_json

T = TypeVar("T")

# Whole files


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file of the run holds.

    Raises:
        RunError: the file cannot be read, or holds something else.
    """
    try:
        values = parse_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RunError(f"{path}: not valid JSON ({error}); restore it or use a new run folder") from None
    if not isinstance(values, dict):
        raise RunError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_as(path: Path, form: type[T]) -> T:
    """Return what is relied on of a JSON object in a file of the run.

    Raises:
        RunError: the file cannot be read, or a value in it is missing or is of another type.
    """
    try:
        return checked(read_json(path), form)
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error}); restore it or use a new run folder") from None


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace a file as a whole; when this returns, it is on stable storage.

    Raises:
        RunError: the file cannot be written, as on a full disk; the old file is kept.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        kept = "; the file that was there is kept" if path.exists() else ""
        raise RunError(f"{path}: cannot be written ({error.strerror}){kept}. {remedy(error)}") from None


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` in one step when the block ends without an error.

    Temporary files for the same `path` that a killed process left behind are removed.

    Args:
        path: the file to replace; its folder exists.
        durable: whether to wait for the disk. Needless for content that is checked when read and can be made again.

    Raises:
        OSError: the file cannot be written; the old file is kept.
    """
    _remove_leftovers(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with aside.open("xb") as file:
            # The lock marks a file that is being written; on a file system without locks it stays unmarked.
            with suppress(OSError):
                take(file)
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            aside.replace(path)
        if durable:
            sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def remove_with_leftovers(path: Path) -> None:
    """Remove a file, if it is there, and the temporary files for it that no process holds.

    Raises:
        OSError: it cannot be removed.
    """
    if path.parent.is_dir():
        _remove_leftovers(path)
    path.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files for `path` that no process holds: their writers died."""
    for leftover in path.parent.iterdir():
        if leftover.name.startswith(f".{path.name}.") and leftover.suffix == ".tmp":
            with suppress(OSError), open_ordinary(leftover) as file:
                if take(file):
                    leftover.unlink()


# Lines


def append(path: Path, lines: bytes) -> None:
    """Append to a file, creating it if needed; when this returns, everything is on stable storage.

    Raises:
        RunError: the lines cannot be written, as on a full disk; the file is then as it was before.
    """
    new = not path.exists()
    try:
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                # An unbuffered write may stop half-way on a full disk without an error.
                if file.write(lines) != len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        if new:
            sync(path.parent)
    except OSError as error:
        raise RunError(f"{path}: cannot be added to ({error.strerror}). {remedy(error)}") from None


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the JSON objects of a file of lines, and whether its last line was cut off (1 or 0).

    A missing file has no lines. A last line without its newline was never acknowledged, so it is left out.

    Raises:
        RunError: a line before the last is not a JSON object with a step.
    """
    content = path.read_bytes() if path.exists() else b""
    return [row for _, row in _rows(content, path)], int(bool(content) and not content.endswith(b"\n"))


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop a cut-off last line, and the lines whose object `keep` rejects; all others stay, byte for byte.

    Raises:
        RunError: a line is not a JSON object with a step, or the file cannot be written.
    """
    if not path.exists():
        return
    old = path.read_bytes()
    new = b"".join(line for line, row in _rows(old, path) if keep(row))
    if new != old:
        write_atomic(path, new)


def _rows(content: bytes, path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise RunError(f"{path}: line {number} is not valid JSON ({error}); remove that line") from None
        if not isinstance(row, dict):
            raise RunError(f"{path}: line {number} is a {type(row).__name__}, not a JSON object; remove that line")
        if type(row.get("step")) is not int:
            raise RunError(f"{path}: line {number} has no whole number as its step; remove that line")
        rows.append((line + b"\n", row))
    return rows


# Folders


def put_folder(aside: Path, folder: Path) -> None:
    """Replace `folder` by `aside`, a folder that was filled beforehand, with everything in it on stable storage.

    A kill leaves the old folder, no folder, or the whole new one.

    Raises:
        OSError: the folder cannot be written.
    """
    for path in (*aside.iterdir(), aside):
        sync(path)
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Put a file's bytes, or a folder's names, on stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What may be anything


def open_ordinary(path: Path) -> IO[bytes]:
    """Open a file to read it; what is none, such as a FIFO, is an error and never waited for.

    Raises:
        OSError: there is no file, or it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))
    return os.fdopen(descriptor, "rb")


class Unchanged:
    """A file that is kept open and has to stay as it is, so that it may be mapped.

    Who reads what is mapped of a file that was shortened is killed by the kernel. One that is put in its place does
    not matter.
    """

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            OSError: there is no file, or it cannot be read.
        """
        with open_ordinary(path) as file:
            self._descriptor = os.dup(file.fileno())
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._seen = self._state()

    def __bool__(self) -> bool:
        return self._state() == self._seen

    def mapped(self, access: int = mmap.ACCESS_READ) -> mmap.mmap:
        """Its bytes; look whether it is unchanged before they are read.

        Raises:
            ValueError: it is empty.
        """
        return mmap.mmap(self._descriptor, 0, access=access)

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


# Locks


def take(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file until it is closed or this process ends. Return False if another holds it, unless `wait`.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def remedy(error: OSError) -> str:
    """Return what the user should do about a file that could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "Free some space and run the same command again" if full else "Mend that and run the same command again"


def cache_folder() -> Path:
    """Return the folder of everything that can be made again."""
    if own := os.environ.get("LATENTMEM_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "latentmem"
    return Path.home() / ".cache" / "latentmem"
