"""The two ways to run a user's program for one episode: a command that is started anew, or a function in a worker.

A command says its action at the end of what it prints: its last line that is not blank, or the text under `answer` if
that line is a JSON object with such a key, for answers of several lines. A function returns it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import which
from threading import Lock, Timer
from typing import Any, Protocol

from latentmem.config import ProgramSection
from latentmem.errors import ConfigError
from latentmem.outside import one_line
from latentmem.parsing import parse_json
from latentmem.serving.programs import worker
from latentmem.serving.programs.kept import Ended, KeptProgram, pipes
from latentmem.teams.turn import ProgramFailed

START_SECONDS = 300.0
"""Longest time for a worker to import the function's module."""

_NOT_FOUND = 3
"""Exit status of an interpreter that finds no module of the name."""

OnStart = Callable[[Callable[[], None]], None]
"""A function that is given another one, which ends the running program from any thread."""


class Runner(Protocol):
    """A way to run the program."""

    def run(self, task: Mapping[str, Any], variables: Mapping[str, str], on_start: OnStart) -> str:
        """Run it for one episode and return its action.

        Args:
            task: the task as the program sees it.
            variables: what the program's environment has besides this process's own.
            on_start: gets the function that ends the program.

        Raises:
            ProgramFailed: it gave no action in time.
            ConfigError: there is no such program.
        """

    def close(self) -> None:
        """End everything that still runs."""


class Command:
    """A command that is started anew for each episode."""

    def __init__(self, command: Sequence[str], timeout_seconds: float) -> None:
        """Take the command, which no shell reads, and the longest time of an episode."""
        self.command = list(command)
        self.timeout_seconds = timeout_seconds

    def run(self, task: Mapping[str, Any], variables: Mapping[str, str], on_start: OnStart) -> str:
        """Start the command, wait for its end and read its action; see `Runner.run`."""
        variables = {**variables, "LATENTMEM_TASK": json.dumps(task, ensure_ascii=False)}
        program = KeptProgram(self.command, surroundings() | variables)
        on_start(program.end)
        ended = program.outcome(self.timeout_seconds)
        if not ended.could_start:
            raise ConfigError(f"team.command: cannot be started: {one_line(ended.stderr) or self.command[0]}")
        if ended.is_late:
            raise ProgramFailed(f"not over after {self.timeout_seconds:g} seconds{_last_words(ended)}")
        if ended.status:
            raise ProgramFailed(f"exit status {ended.status}{_last_words(ended)}")
        return action_of(ended)

    def close(self) -> None:
        """Do nothing: each run ends its own program."""


class Function:
    """A function that worker processes call; each serves one episode after another."""

    def __init__(self, name: str, timeout_seconds: float, python: str | None = None) -> None:
        """Take the function's name, `module:function`, the longest time of an episode, and the workers' interpreter."""
        self.name = name
        self.python = python or sys.executable
        self.timeout_seconds = timeout_seconds
        self._idle: list[_Worker] = []
        self._lock = Lock()

    def run(self, task: Mapping[str, Any], variables: Mapping[str, str], on_start: OnStart) -> str:
        """Let a worker call the function; a worker that fails to answer is not used again. See `Runner.run`."""
        with self._lock:
            serving = self._idle.pop() if self._idle else None
        serving = serving or _Worker(self.name, self.python)
        on_start(serving.program.end)
        said = serving.call(task, variables, self.timeout_seconds)
        with self._lock:
            self._idle.append(serving)
        if "answer" not in said:
            raise ProgramFailed(one_line(str(said.get("error"))))
        return str(said["answer"])

    def close(self) -> None:
        """End the workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for serving in idle:
            serving.close()


class _Worker:
    """One worker process."""

    def __init__(self, name: str, python: str) -> None:
        theirs_in, theirs_out, self._out, self._in = pipes()
        command = [python, str(Path(worker.__file__)), str(theirs_in), str(theirs_out), name]
        try:
            self.program = KeptProgram(command, surroundings(), (theirs_in, theirs_out), captured=False)
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        said = self._read(START_SECONDS)
        if said is None or "ready" not in said:
            self.close()
            if said is None:
                raise ConfigError(f"team.call: {name}: not imported after {START_SECONDS:g} seconds")
            raise ConfigError(f"team.call: {name}: {one_line(str(said.get('error')))}{_where(said, name, python)}")

    def call(self, task: Mapping[str, Any], variables: Mapping[str, str], seconds: float) -> Mapping[str, Any]:
        """Return what the worker says of an episode: its `answer`, or its `error`.

        Raises:
            ProgramFailed: it says nothing in time; the worker has ended then.
        """
        request = {"task": task, "environment": {**variables, "LATENTMEM_TASK": json.dumps(task, ensure_ascii=False)}}
        late: list[bool] = []
        said: Mapping[str, Any] | None = None
        try:
            self._out.write(json.dumps(request).encode() + b"\n")
            self._out.flush()
            said = self._read(seconds, late)
        except BrokenPipeError:
            pass
        if said is None:
            status = self.close()
            raise ProgramFailed(f"not over after {seconds:g} seconds" if late else f"exit status {status}")
        return said

    def _read(self, seconds: float, late: list[bool] | None = None) -> Mapping[str, Any] | None:
        """Return the worker's next words; None if it ended, or was ended because its time is up."""

        def end() -> None:
            if late is not None:
                late.append(True)
            self.program.end()

        timer = Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            line = self._in.readline()
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            return None
        said: Mapping[str, Any] = parse_json(line)
        return said

    def close(self) -> int:
        """End the worker; return its exit status."""
        status = self.program.close()
        for end in (self._in, self._out):
            try:
                end.close()
            except BrokenPipeError:
                continue
        return status


def check_program(section: ProgramSection) -> None:
    """Look, in a moment, whether what a program needs is there; nothing of it is run.

    Raises:
        ConfigError: there is no such command, script, interpreter or module.
    """
    if section.call is None:
        program, *words = section.command
        if not _is_found(program):
            raise ConfigError(f"team.command: {program!r} is no program that can be found; give its path")
        if (
            words
            and Path(program).name.startswith("python")
            and words[0].endswith(".py")
            and not Path(words[0]).exists()
        ):
            raise ConfigError(f"team.command: {words[0]}: no such file, seen from {Path.cwd()}; give its path")
        return
    python = section.python or sys.executable
    if not _is_found(python):
        raise ConfigError(
            f"team.python: {python}: no such program, or it may not be executed; give the path of a Python interpreter"
        )
    package = section.call.partition(":")[0].partition(".")[0]
    if Path(package).is_dir() or Path(f"{package}.py").is_file():
        return
    search = f"import sys, importlib.util; sys.exit({_NOT_FOUND} * (importlib.util.find_spec({package!r}) is None))"
    done = subprocess.run([python, "-c", search], env=surroundings(), capture_output=True, check=False)  # noqa: S603
    if done.returncode == _NOT_FOUND:
        raise ConfigError(
            f"team.call: {section.call}: ModuleNotFoundError: No module named {package!r}"
            f"{_where({'missing': package}, section.call, python)}"
        )


def _is_found(program: str) -> bool:
    return which(program, path=surroundings()["PATH"]) is not None


def surroundings() -> dict[str, str]:
    """Return this process's environment for a program: its `python` is the one that runs here, and no proxy is asked.

    Requests to this machine's own address must not go through a proxy.
    """
    own = dict(os.environ)
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', os.defpath)}"
    for name in ("NO_PROXY", "no_proxy"):
        own[name] = ",".join(filter(None, (own.get(name), "127.0.0.1")))
    return own


def action_of(ended: Ended) -> str:
    r"""Return the action that a command printed.

    >>> action_of(Ended(0, 'thinking\n{"answer": "a\\nb"}\n\n', "", False))
    'a\nb'

    Raises:
        ProgramFailed: it printed nothing.
    """
    lines = [line for line in ended.stdout.splitlines() if line.strip()]
    if not lines:
        raise ProgramFailed("it printed no answer; expected one in the last line of its standard output")
    last = lines[-1].strip()
    try:
        said = parse_json(last) if last.startswith("{") else None
    except ValueError:
        said = None
    return said["answer"] if isinstance(said, dict) and isinstance(said.get("answer"), str) else last


def _where(said: Mapping[str, Any], name: str, python: str) -> str:
    """Return the end of a message about a module that is missing: where it was looked for, or in what environment."""
    if (missing := said.get("missing")) is None:
        return ""
    own = name.partition(":")[0]
    if missing == own or own.startswith(f"{missing}."):
        return f"; looked for in {os.getcwd()} and among the packages of {python}"
    return f"; the interpreter is {python}; install it there, or name another in team.python"


def _last_words(ended: Ended) -> str:
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    return f": {one_line(lines[-1])}" if lines else ""
