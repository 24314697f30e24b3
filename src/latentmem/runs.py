"""A run is one folder that survives a kill at any moment: whole files are replaced, lines are appended and synced.

    RUN/  config.yaml   the resolved configuration of the last command
          run.json      versions, platform, commit, skipped rows, seed and time of its start
          metrics.jsonl one line per step of any phase
          results.json, results-dev.json, bank.sqlite, report/
          collect/ warmup/ sft/ lmpo/ grpo/ evaluate/ evaluate-dev/
                        each with the config.yaml it began with, state.json, checkpoints;
                        sft/dev.jsonl one line per evaluated step and held-out task
          tensorboard/, wandb/  what the trackers of `report_to` write
          .lock         held by the one process that works in the folder; the kernel frees it, however that process ends

With several processes only rank 0 opens the run; the others have a `SilentRun`. Loads no torch.
"""

import errno
import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import yaml

from latentmem.errors import RunError
from latentmem.tracking import Tracked, Tracking

PHASES = ("collect", "warmup", "sft", "lmpo", "grpo", "evaluate", "evaluate-dev")

PACKAGES = (
    "latentmem",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "reasoning-gym",
    "sentence-transformers",
)
"""Whose versions are written into run.json."""


class Metrics(NamedTuple):
    """The lines of a metrics file."""

    rows: list[dict[str, Any]]
    num_torn: int
    """1 if the last line was cut off by a crash and left out, else 0."""


class Run:
    """One phase of a run, open for writing by this process alone; a context manager that frees the folder."""

    def __init__(self, folder: Path, phase: str, lock: IO[bytes], tracking: Tracking) -> None:
        self.folder = folder
        self.phase = phase
        self.phase_folder = folder / phase
        """Where this phase keeps its state and checkpoints."""
        self._lock = lock
        self._tracking = tracking
        self._metrics_path = folder / "metrics.jsonl"

    @classmethod
    def open(
        cls,
        folder: Path | str,
        config_yaml: str,
        phase: str,
        phase_config: Mapping[str, Any],
        skipped_rows: Mapping[str, Mapping[str, int]] | None = None,
        free: Collection[str] = (),
        complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda sections: sections,
        report_to: Sequence[str] = (),
    ) -> Self:
        """Create the run, or go on with it.

        Args:
            folder: the run's folder; made where there is none.
            config_yaml: the whole resolved configuration; replaces RUN/config.yaml.
            phase: one of `PHASES`.
            phase_config: the sections that matter to this phase, as plain JSON values. A phase goes on only with the
                sections it was started with.
            skipped_rows: for each split with rows that could not be used, how many for which reason.
            free: dotted keys of `phase_config` that may be others when the phase goes on.
            complete: gives the sections that a phase was started with the keys that were not known then, at their
                defaults: what has its default now is no change.
            report_to: trackers that are told what is logged.

        Raises:
            RunError: the folder cannot be written, another process works in it, or the phase was started otherwise.
        """
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}; expected one of {', '.join(PHASES)}")
        folder = Path(folder)
        try:
            (folder / phase).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{folder}: the run's folder cannot be made ({error.strerror}); name another with run=FOLDER"
            ) from None
        held = lock(folder)
        try:
            _hold_to_start(folder / phase / "config.yaml", phase_config, free, complete)
            _write_if_new(folder / "config.yaml", config_yaml)
            seed = (yaml.safe_load(config_yaml) or {}).get("seed")
            _record_surroundings(folder / "run.json", phase, seed, skipped_rows or {})
            started = read_json(folder / "run.json")["started"]
            run = cls(folder, phase, held, Tracking(report_to, Tracked(folder, phase, started, config_yaml)))
            keep_rows(run._metrics_path, lambda _: True)
        except BaseException:
            held.close()
            raise
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the folder for the next phase or process."""
        self._tracking.close()
        self._lock.close()

    @property
    def state(self) -> dict[str, Any]:
        """How far this phase has come, as last assigned; empty before the first time. Assigning replaces it whole.

        Raises:
            RunError: state.json is damaged, or cannot be written.
        """
        path = self.phase_folder / "state.json"
        return read_json(path) if path.exists() else {}

    @state.setter
    def state(self, values: Mapping[str, Any]) -> None:
        write_atomic(self.phase_folder / "state.json", json.dumps(dict(values), indent=1, allow_nan=False) + "\n")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line of this phase to metrics.jsonl; when this returns, the line is on stable storage.

        `metrics` has an integer `step`. A number that is not finite is written as null and its key listed under
        `non_finite`, for JSON knows neither nan nor inf.

        Raises:
            RunError: the line cannot be written; the file then is as it was before.
        """
        row = {"phase": self.phase, **metrics}
        append_rows(self._metrics_path, [row])
        self._tracking.log(row, self._logged)

    def _logged(self) -> list[dict[str, Any]]:
        """All lines of this phase."""
        return [row for row in read_metrics(self._metrics_path).rows if row.get("phase") == self.phase]

    def show_results(self, cells: Sequence[Sequence[str]], markdown: str, results: Mapping[str, Any]) -> None:
        """Show the comparison of memories in the trackers: a header and rows, the same as Markdown, its numbers."""
        self._tracking.show(cells, markdown, results)

    def log_details(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, each with an integer `step`, to a file of this phase's folder; otherwise as `log` does.

        `read_metrics` reads the file back.

        Raises:
            RunError: they cannot be written; the file then is as it was before.
        """
        append_rows(self.phase_folder / name, rows)

    def rewind_metrics(self, phase: str, step: int) -> None:
        """Drop the lines of a phase beyond `step`, which a resumed phase writes again, and a torn last line.

        All other lines stay as they are, byte for byte.

        Raises:
            RunError: a line is no JSON, or the file cannot be written.
        """
        self._tracking.close()  # it is told what is kept, and what follows, by the next line
        keep_rows(self._metrics_path, lambda row: row.get("phase") != phase or row.get("step", 0) <= step)

    def rewind_details(self, name: str, step: int) -> None:
        """Drop the lines beyond `step` of a file that `log_details` wrote, and a torn last line.

        Raises:
            RunError: a line is no JSON, or the file cannot be written.
        """
        keep_rows(self.phase_folder / name, lambda row: row.get("step", 0) <= step)


class SilentRun:
    """The run in the processes that do not write it: what it is told is dropped."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Drop the line."""

    def log_details(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Drop the rows."""

    def show_results(self, cells: Sequence[Sequence[str]], markdown: str, results: Mapping[str, Any]) -> None:
        """Drop the comparison."""

    def rewind_metrics(self, phase: str, step: int) -> None:
        """Leave the file to the first process."""

    def rewind_details(self, name: str, step: int) -> None:
        """Leave the file to the first process."""


def read_metrics(path: Path) -> Metrics:
    """The lines of a metrics.jsonl; none where there is no file yet.

    Raises:
        RunError: a line before the last is not a JSON object.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [row for _, row in _rows(lines, path)]
    return Metrics(rows, len(lines) - len(rows))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the run.

    Raises:
        RunError: the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_bytes(), parse_constant=lambda _: None)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RunError(f"{path}: not valid JSON ({error}); restore it or use a new run folder") from None
    if not isinstance(values, dict):
        raise RunError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace a file as a whole: whoever reads it, and whatever crashes, sees the old content or the new one.

    What a killed process was writing to take the place of the same file is removed.

    Raises:
        RunError: it cannot be written, as on a full disk; the old file is kept.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        remove_leftovers(path, f".{path.name}.")
        with temporary.open("wb") as file:
            hold(file)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        kept = "; the file that was there is kept" if path.exists() else ""
        raise RunError(f"{path}: cannot be written ({error.strerror}){kept}. {_remedy(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def hold(file: IO[bytes]) -> None:
    """Mark a file as being written, until it is closed or this process dies; a file system without locks does not."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_leftovers(path: Path, prefix: str) -> None:
    """Remove the files PREFIX*.tmp beside `path` that nobody holds: a process died while it wrote them."""
    for leftover in path.parent.iterdir():
        if leftover.name.startswith(prefix) and leftover.suffix == ".tmp":
            with suppress(OSError), leftover.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()


def append(path: Path, lines: bytes) -> None:
    """Add to the end of a file, made where there is none; when this returns, all of it is on stable storage.

    Raises:
        RunError: it cannot be written, as on a full disk; the file then is as it was before.
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
            _sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"{path}: cannot be added to ({error.strerror}). {_remedy(error)}") from None


def _line(values: Mapping[str, Any]) -> bytes:
    if type(values.get("step")) is not int:
        raise ValueError(f"metrics need an integer step, found {values.get('step')!r}")
    row = dict(values)
    non_finite = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if non_finite:
        row |= {**dict.fromkeys(non_finite), "non_finite": non_finite}
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows, each with an integer `step`, as `Run.log` does.

    Raises:
        RunError: they cannot be written; the file then is as it was before.
    """
    append(path, b"".join(map(_line, rows)))


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows that are not to be kept, and a torn last line; the others stay as they are, byte for byte.

    Raises:
        RunError: a line is no JSON, or the file cannot be written.
    """
    if not path.exists():
        return
    old = path.read_bytes()
    new = b"".join(line for line, row in _rows(old.splitlines(keepends=True), path) if keep(row))
    if new != old:
        write_atomic(path, new)


def _remedy(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "Free some space and run the same command again" if full else "Mend that and run the same command again"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rows(lines: list[bytes], path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line with its object. A last line without its newline was never acknowledged, and is left out."""
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunError(f"{path}: line {number} is not valid JSON ({error}); remove that line") from None
        if not isinstance(row, dict):
            raise RunError(f"{path}: line {number} is no JSON object but {type(row).__name__}; remove that line")
        rows.append((line, row))
    return rows


def lock(folder: Path) -> IO[bytes]:
    """Keep other processes out of a run's folder until the file that is returned is closed.

    Raises:
        RunError: another process works there, or nothing can be locked.
    """
    path = folder / ".lock"
    try:
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise RunError(f"{path}: cannot be opened ({error.strerror}); name another folder with run=FOLDER") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().decode().strip() or "unknown"
        file.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise RunError(
                f"{folder}: process {holder} is working in this run folder; wait until it ends, or name another folder"
            ) from None
        raise RunError(
            f"{path}: this file system cannot lock files ({error.strerror}); put the run folder on a local disk"
        ) from None
    try:
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
    except OSError as error:
        file.close()
        raise RunError(f"{path}: cannot be written ({error.strerror}). {_remedy(error)}") from None
    return file


def _hold_to_start(
    path: Path,
    phase_config: Mapping[str, Any],
    free: Collection[str],
    complete: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Write down what a phase is started with; when it goes on, refuse anything else."""
    new = json.loads(json.dumps(phase_config))
    if not path.exists():
        write_atomic(path, yaml.safe_dump(new, sort_keys=False, allow_unicode=True))
        return
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: cannot be read ({' '.join(str(error).split())}); use a new run folder") from None
    before, now = _flat(complete(old) if isinstance(old, dict) else old), _flat(new)
    for key in [key for key in [*now, *before] if key not in free]:
        if key not in before or key not in now or before[key] != now[key]:
            was, wants = (repr(flat[key]) if key in flat else "absent" for flat in (before, now))
            raise RunError(
                f"{path}: {key} was {was} when this phase was started and is {wants} now; "
                "set it back, or name a new run folder with run=FOLDER"
            )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings under dotted keys; an empty mapping is a leaf, a list too."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        key: leaf
        for name, value in values.items()
        for key, leaf in _flat(value, f"{prefix}.{name}".lstrip(".")).items()
    }


def _write_if_new(path: Path, text: str) -> None:
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomic(path, text)


def _record_surroundings(path: Path, phase: str, seed: Any, skipped_rows: Mapping[str, Mapping[str, int]]) -> None:
    """Write run.json once; a command that goes on in other surroundings adds them under `continued`."""
    now = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "git_commit": _git_commit(),
        "skipped_rows": {split: dict(reasons) for split, reasons in skipped_rows.items()},
    }
    started = datetime.now(UTC).isoformat(timespec="seconds")
    if not path.exists():
        record = {"seed": seed, "started": started, **now, "continued": []}
    else:
        record = read_json(path)
        last = (record.get("continued") or [record])[-1]
        if all(last.get(key) == value for key, value in now.items()):
            return
        record["continued"] = [*record.get("continued", []), {"phase": phase, "started": started, **now}]
    write_atomic(path, json.dumps(record, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of our own sources, marked where they were changed since; None outside a checkout of them."""
    git = shutil.which("git")
    if git is None:
        return None
    here = Path(__file__)
    # Installed inside someone else's repository we are not tracked there, and its commit says nothing of us.
    tracked = ["ls-files", "--error-unmatch", here.name]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    for arguments in (tracked, describe):
        done = subprocess.run([git, *arguments], cwd=here.parent, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            return None
    return done.stdout.strip()
