"""Run model-written code in a separate process and a fresh folder, under the machine's strongest confinement.

There are three levels: `bubblewrap` (namespaces), else `landlock` (Landlock, seccomp and a separate user), else an
error; `none` is used only if the configuration says so. A level counts as available only after a probe has tried to
break out of it, not because of a version number. What comes back is text of bounded size, and JSON of bounded size and
depth. `launcher.py`, a process between this one and the program, does the confining.
"""

import json
import logging
import marshal
import math
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import JsonValue

from latentmem.config import SandboxSection
from latentmem.errors import SandboxError

MAX_JSON_DEPTH = 64

_log = logging.getLogger(__name__)

_READABLE = (
    *("/usr", "/bin", "/lib", "/lib32", "/lib64"),
    *("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/mime.types"),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"
_START_LAUNCHER = "import sys; sys.path.append(sys.argv[1]); import sandbox.launcher; sandbox.launcher.main()"
_BREAK_OUT = """
import _socket, os, sys
try:
    open(sys.argv[1])
    sys.exit("it could read a file outside its folder")
except OSError:
    pass
try:
    open(sys.argv[1] + ".new", "w").close()  # in a temporary folder of its own, perhaps: the caller looks
except OSError:
    pass
try:
    _socket.socket()
    sys.exit("it could open a socket")
except OSError:
    pass
open("written", "w").close()
"""

Status = Literal["exited", "timeout", "killed", "output_limit", "failed"]
Level = Literal["bubblewrap", "landlock", "none"]


@dataclass(frozen=True)
class SandboxResult:
    """What became of one program."""

    status: Status
    """`exited`: ended by itself, with `exit_code`. `timeout`: ran too long. `killed`: ended by a signal, or because it
    exceeded the limit of memory, processes or files. `output_limit`: printed too much. `failed`: did not start."""
    exit_code: int | None
    """None unless `exited`."""
    stdout: str
    """The first `max_output_kb` of output; bytes that are not UTF-8 are replaced."""
    stderr: str
    result: JsonValue | None
    """What the program wrote to the result file; None if that is absent, too big, too deep or not strict JSON."""
    level: str
    """The level that contained it: bubblewrap, landlock or none."""
    seconds: float
    """Wall-clock time from the start to the end of its last process."""
    cause: str = ""
    """The reason, in words, why the status is not `exited`."""


class Sandbox:
    """Runs programs under limits. It holds no state between runs, so any number of threads may share it.

    Raises:
        SandboxError: the machine offers neither bubblewrap nor Landlock, and the level is not `none`.
    """

    def __init__(self, limits: SandboxSection, *, probed_level: Level | None = None) -> None:
        """Choose the level; only the probe, which tests whether a level contains anything, gives `probed_level`."""
        self._limits = limits
        self._bubblewrap = shutil.which("bwrap")
        if probed_level is not None:
            self.level: Level = probed_level
        else:
            self.level = "none" if limits.level == "none" else _strongest_level(self._bubblewrap)

    def run(
        self,
        files: dict[str, str],
        argv: list[str],
        stdin: str = "",
        result_file: str | None = None,
        passed: tuple[int, ...] = (),
    ) -> SandboxResult:
        """Run a program in a fresh folder; afterwards delete the folder and end every process the program left behind.

        Args:
            files: relative paths and texts, written to the working folder first.
            argv: the command; `python` is the interpreter this runs in, with its installed packages readable.
            stdin: its standard input, then end of file.
            result_file: name of a file in the working folder to read as JSON when all is over.
            passed: open descriptors that the program gets under the same numbers; they are closed here.
        """
        assert result_file is None or "/" not in result_file
        folder = os.path.realpath(tempfile.mkdtemp(prefix="latentmem_sandbox_"))
        try:
            working_folder = os.path.join(folder, "work")
            os.mkdir(working_folder)
            os.mkdir(os.path.join(folder, "tmp"))
            os.mkdir(os.path.join(folder, "shm"))
            for name, text in files.items():
                relative = PurePosixPath(name)
                assert not relative.is_absolute(), name
                assert ".." not in relative.parts, name
                path = Path(working_folder, relative)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text.encode("utf-8", "surrogatepass"))
            # Held open, since the program may put something else in the folder's place.
            directory = os.open(working_folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                answer = self._launch(folder, working_folder, argv, stdin, passed)
                result = None
                if result_file is not None and answer["status"] != "failed":
                    result = _read_result(directory, result_file, self._limits.max_output_kb * 1024)
            finally:
                os.close(directory)
        finally:
            _delete(folder)
        if answer["status"] == "failed":
            _log.warning("sandbox %s: %s could not be run: %s", self.level, argv[0], answer["cause"])
        return SandboxResult(**answer, result=result, level=self.level)

    def _launch(
        self, folder: str, working_folder: str, argv: list[str], stdin: str, passed: tuple[int, ...]
    ) -> dict[str, Any]:
        """The fields of SandboxResult but for `result` and `level`."""
        started = time.monotonic()
        answer: dict[str, Any] = {"exit_code": None, "stdout": "", "stderr": "", "seconds": 0.0}
        program = sys.executable if argv[0] == "python" else shutil.which(argv[0], path=_SEARCH_PATH)
        if program is None:
            return {**answer, "status": "failed", "cause": f"no program {argv[0]!r} in {_SEARCH_PATH}"}
        limits = self._limits
        readable = [*_READABLE, *sorted({sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix})]
        places = {
            place: os.path.join(folder, name)
            for place, name in (("/tmp", "tmp"), ("/dev/shm", "shm"))  # noqa: S108
            if os.path.isdir(place)
        }
        request = {
            "level": self.level,
            "bubblewrap": self._bubblewrap,
            "folder": folder,
            "working_folder": working_folder,
            "argv": [program, *argv[1:]],
            "environment": _environment(folder),
            "stdin": stdin,
            "passed": passed,
            "readable": readable,
            "places": places,
            "devices": list(_DEVICES),
            "timeout_seconds": limits.timeout_seconds,
            "max_memory": limits.max_memory_mb << 20,
            "max_processes": limits.max_processes,
            "max_file": limits.max_file_mb << 20,
            "max_output": limits.max_output_kb << 10,
        }
        command = [sys.executable, "-I", "-S", "-c", _START_LAUNCHER, str(Path(__file__).parents[1])]
        launcher = subprocess.Popen(  # noqa: S603 - our own launcher; what it starts is what this file is about
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env={},
            start_new_session=True,
            pass_fds=passed,
        )
        for descriptor in passed:
            os.close(descriptor)
        # Leaving the block closes the launcher's standard input, upon which it ends the program: on Ctrl-C, too.
        with launcher:
            assert launcher.stdin is not None
            assert launcher.stdout is not None
            assert launcher.stderr is not None
            try:
                message = marshal.dumps(request)
                launcher.stdin.write(b"%d\n" % len(message) + message)
                launcher.stdin.flush()
            except BrokenPipeError:
                pass  # it ended early; its standard error says why
            said = launcher.stdout.read()
            complaint = launcher.stderr.read()
        if launcher.returncode != 0:
            cause = complaint.decode("utf-8", "replace").strip() or f"the launcher ended with {launcher.returncode}"
            return {**answer, "status": "failed", "cause": cause, "seconds": time.monotonic() - started}
        return _read_answer(said)


def _read_answer(said: bytes) -> dict[str, Any]:
    line, _, rest = said.partition(b"\n")
    status, exit_code, seconds, num_cause, num_stdout, num_stderr = line.decode().split(",")
    texts = []
    for length in (int(num_cause), int(num_stdout), int(num_stderr)):
        texts.append(rest[:length].decode("utf-8", "replace"))
        rest = rest[length:]
    cause, stdout, stderr = texts
    code = int(exit_code) if exit_code else None
    return {
        "status": status,
        "exit_code": code,
        "seconds": float(seconds),
        "cause": cause,
        "stdout": stdout,
        "stderr": stderr,
    }


def _environment(folder: str) -> dict[str, str]:
    """Return all variables a program sees; the first three are needed, the others keep runs small and repeatable."""
    return {
        # What a program starts as `python` is what it runs in itself.
        "PATH": f"{os.path.dirname(sys.executable)}:{_SEARCH_PATH}",
        "HOME": os.path.join(folder, "work"),
        "TMPDIR": os.path.join(folder, "tmp"),
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        # Each BLAS thread reserves address space, which the memory limit counts.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def _strongest_level(bubblewrap: str | None) -> Level:
    no_bubblewrap = "bwrap is not on PATH" if bubblewrap is None else _why_not("bubblewrap", bubblewrap)
    if not no_bubblewrap:
        return "bubblewrap"
    no_landlock = _why_not("landlock", None)
    if not no_landlock:
        _log.info("sandbox: landlock, since bubblewrap is not available (%s)", no_bubblewrap)
        return "landlock"
    raise SandboxError(
        f"model-written code cannot be contained here: bubblewrap: {no_bubblewrap}; Landlock: {no_landlock}. "
        "Install bubblewrap where user namespaces are allowed, use Linux 6.2 or newer, or set sandbox.level to none "
        "to run it unprotected"
    )


@cache
def _why_not(level: Level, bubblewrap: str | None) -> str:
    """Return why a level cannot be used, found by a program that tries to break out; empty if it can be used.

    The argument `bubblewrap` only serves the cache: another path needs another probe.
    """
    sandbox = Sandbox(SandboxSection(), probed_level=level)
    with tempfile.NamedTemporaryFile(prefix="latentmem-probe-") as outside:
        probe = sandbox.run({}, ["python", "-I", "-S", "-c", _BREAK_OUT, outside.name])
        if os.path.exists(outside.name + ".new"):
            os.unlink(outside.name + ".new")
            return "it could write outside its folder"
    if probe.status == "exited" and probe.exit_code == 0:
        return ""
    lines = (probe.cause or probe.stderr).strip().splitlines()
    return lines[-1] if lines else f"the probe {probe.status}"


def _read_result(directory: int, name: str, max_bytes: int) -> JsonValue | None:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:  # absent, a symbolic link, closed to us: in each case the program left no result
        return None
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or state.st_size > max_bytes:
            return None
        return parse_result(os.read(descriptor, max_bytes))
    finally:
        os.close(descriptor)


def parse_result(content: bytes) -> JsonValue | None:
    """Return strict JSON as a value, or None: no NaN or infinity, no lone surrogates, at most `MAX_JSON_DEPTH` levels.

    >>> parse_result(b'{"passed": [true, 0.5]}')
    {'passed': [True, 0.5]}
    >>> parse_result(b'{"passed": NaN}') is None
    True
    """

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(text)
        return number

    try:
        value: JsonValue = json.loads(content.decode(), parse_float=finite, parse_constant=finite)
        json.dumps(value, ensure_ascii=False).encode()  # raises on lone surrogates, which \u escapes can spell
    except (ValueError, RecursionError):
        return None
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for parent in level for child in _children(parent)]
    return None if level else value


def _children(value: JsonValue) -> list[JsonValue]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _delete(folder: str) -> None:
    """Delete a folder whatever a program made of it; all its processes are gone.

    `shutil.rmtree` fails on a thousand levels and on closed folders. This goes down and up one level at a time, holding
    one folder open, so no name is ever joined to a path, and none is given.
    """
    try:
        os.chmod(folder, stat.S_IRWXU)
        here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        way: list[str] = []
        try:
            while True:
                inner = _empty(here)
                if inner is not None:
                    way.append(inner)
                    if os.stat(inner, dir_fd=here, follow_symlinks=False).st_mode & stat.S_IRWXU != stat.S_IRWXU:
                        os.chmod(inner, stat.S_IRWXU, dir_fd=here)
                elif not way:
                    break
                below = here
                here = os.open(inner or "..", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=below)
                os.close(below)
                if inner is None:
                    os.rmdir(way.pop(), dir_fd=here)
        finally:
            os.close(here)
        os.rmdir(folder)
    except OSError as error:
        _log.warning("sandbox: %s could not be deleted: %s", folder, error)


def _empty(descriptor: int) -> str | None:
    """Delete the files of an open folder up to its first folder, whose name this is."""
    while True:
        with os.scandir(descriptor) as entries:
            found = False
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    return entry.name
                os.unlink(entry.name, dir_fd=descriptor)
                found = True
        if not found:  # a listing may miss some while others are deleted
            return None
