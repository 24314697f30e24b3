"""A run is one folder. It survives a kill at any moment, and each phase goes on only with the settings it began with.

    RUN/  config.yaml   the resolved configuration of the last command
          run.json      versions, platform, commit, skipped rows, seed and time of its start
          metrics.jsonl one line per step of any phase
          results.json, results-dev.json, bank.sqlite, report/
          collect/ warmup/ sft/ lmpo/ grpo/ evaluate/ evaluate-dev/
                        each with the config.yaml it began with, state.json, checkpoints;
                        sft/dev.jsonl one line per evaluated step and held-out task
          tensorboard/, wandb/  what the trackers in `report_to` write
          .lock         held by the one process that works in the folder; the kernel frees it, however the process ends

With several processes only rank 0 opens the run; the others use a `SilentRun`. Loads no torch.
"""

import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import yaml

from latentmem.errors import RunError
from latentmem.files import append, keep_rows, read_as, read_json, read_rows, remedy, take, write_atomic
from latentmem.parsing import Form, PlainDumper, parse_yaml
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
"""Packages whose versions are written into run.json."""


class Metrics(NamedTuple):
    """The lines of a metrics file."""

    rows: list[dict[str, Any]]
    num_torn: int
    """1 if the last line was cut off by a crash and left out, else 0."""


class Run:
    """One phase of a run, open for writing by this process alone. A context manager that frees the folder."""

    def __init__(self, folder: Path, phase: str, lock: IO[bytes], tracking: Tracking) -> None:
        self.folder = folder
        self.phase = phase
        self.phase_folder = folder / phase
        """The folder where this phase keeps its state and checkpoints."""
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
        """Create the run, or continue it.

        Args:
            folder: the run's folder; created if it does not exist.
            config_yaml: the whole resolved configuration; replaces RUN/config.yaml.
            phase: one of `PHASES`.
            phase_config: the sections that matter to this phase, as plain JSON values. A phase continues only with the
                sections it was started with.
            skipped_rows: for each split with unusable rows, their number by reason.
            free: dotted keys of `phase_config` that may change when the phase continues.
            complete: adds to the sections that a phase was started with the keys that did not exist then, at their
                defaults; a key that has its default now then counts as unchanged.
            report_to: trackers that also receive what is logged.

        Raises:
            RunError: the folder cannot be written, another process works in it, or the phase was started with other
                settings.
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
            seed = (parse_yaml(config_yaml) or {}).get("seed")
            started = _record_surroundings(folder / "run.json", phase, seed, skipped_rows or {})
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
        """Release the folder for the next phase or process."""
        self._tracking.close()
        self._lock.close()

    @property
    def state(self) -> dict[str, Any]:
        """How far this phase has come, as last assigned; empty before the first time. Assigning replaces all of it.

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

        `metrics` has an integer `step`. JSON knows neither nan nor inf, so such a number is written as null and its
        key is listed under `non_finite`.

        Raises:
            RunError: the line cannot be written; the file is then as it was before.
        """
        row = {"phase": self.phase, **metrics}
        append_rows(self._metrics_path, [row])
        self._tracking.log(row, self.logged)

    def logged(self) -> list[dict[str, Any]]:
        """Return all lines of this phase.

        Raises:
            RunError: a line before the last is not a JSON object.
        """
        return [row for row in read_metrics(self._metrics_path).rows if row.get("phase") == self.phase]

    def show_results(self, cells: Sequence[Sequence[str]], markdown: str, results: Mapping[str, Any]) -> None:
        """Show the comparison of memories in the trackers: its table as cells and as Markdown, and its numbers."""
        self._tracking.show(cells, markdown, results)

    def log_details(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, each with an integer `step`, to a file in this phase's folder, in the way `log` does.

        `read_metrics` reads the file back.

        Raises:
            RunError: the rows cannot be written; the file is then as it was before.
        """
        append_rows(self.phase_folder / name, rows)

    def rewind_metrics(self, phase: str, step: int) -> None:
        """Drop a cut-off last line and the lines of a phase after `step`, which the resumed phase writes again.

        All other lines stay as they are, byte for byte.

        Raises:
            RunError: a line is not a JSON object, or the file cannot be written.
        """
        self._tracking.close()  # the next line starts the trackers anew, with only the lines that are kept
        keep_rows(self._metrics_path, lambda row: row.get("phase") != phase or row.get("step", 0) <= step)

    def rewind_details(self, name: str, step: int) -> None:
        """Drop the lines after `step` from a file that `log_details` wrote, and a cut-off last line.

        Raises:
            RunError: a line is not a JSON object, or the file cannot be written.
        """
        keep_rows(self.phase_folder / name, lambda row: row.get("step", 0) <= step)


class SilentRun:
    """The run for processes that do not write it; it drops everything it receives."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Drop the line."""

    def logged(self) -> list[dict[str, Any]]:
        """Return nothing: the first process alone reads what it wrote."""
        return []

    def log_details(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Drop the rows."""

    def show_results(self, cells: Sequence[Sequence[str]], markdown: str, results: Mapping[str, Any]) -> None:
        """Drop the comparison."""

    def rewind_metrics(self, phase: str, step: int) -> None:
        """Leave the file to the first process."""

    def rewind_details(self, name: str, step: int) -> None:
        """Leave the file to the first process."""


def read_metrics(path: Path) -> Metrics:
    """Read the lines of a metrics.jsonl; there are none if the file does not exist yet.

    Raises:
        RunError: a line before the last is not a JSON object.
    """
    return Metrics(*read_rows(path))


def _line(values: Mapping[str, Any]) -> bytes:
    if type(values.get("step")) is not int:
        raise ValueError(f"metrics need an integer step, found {values.get('step')!r}")
    row = dict(values)
    non_finite = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if non_finite:
        row |= {**dict.fromkeys(non_finite), "non_finite": non_finite}
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows, each with an integer `step`, in the way `Run.log` does.

    Raises:
        RunError: the rows cannot be written; the file is then as it was before.
    """
    append(path, b"".join(map(_line, rows)))


def lock(folder: Path, instead: str = "name another folder") -> IO[bytes]:
    """Lock a run's folder against other processes, until the returned file is closed.

    Args:
        folder: the folder.
        instead: what may be done while another process works in it, but wait.

    Raises:
        RunError: another process works in the folder, or its file system has no locks.
    """
    path = folder / ".lock"
    try:
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise RunError(f"{path}: cannot be opened ({error.strerror}); name another folder with run=FOLDER") from None
    try:
        free = take(file)
    except OSError as error:
        file.close()
        raise RunError(
            f"{path}: this file system cannot lock files ({error.strerror}); put the run folder on a local disk"
        ) from None
    if not free:
        file.seek(0)
        holder = file.read(20).decode("ascii", "replace").strip() or "unknown"
        file.close()
        raise RunError(f"{folder}: process {holder} is working in this run folder; wait until it ends, or {instead}")
    try:
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
    except OSError as error:
        file.close()
        raise RunError(f"{path}: cannot be written ({error.strerror}). {remedy(error)}") from None
    return file


def _hold_to_start(
    path: Path,
    phase_config: Mapping[str, Any],
    free: Collection[str],
    complete: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Record the settings that a phase is started with; when it continues, refuse any others."""
    new = json.loads(json.dumps(phase_config))
    if not path.exists():
        write_atomic(path, yaml.dump(new, Dumper=PlainDumper, sort_keys=False, allow_unicode=True))
        return
    try:
        old = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); use a new run folder") from None
    before, now = _flat(complete(old) if isinstance(old, dict) else old), _flat(new)
    for key in [key for key in [*now, *before] if key not in free]:
        if key not in before or key not in now or before[key] != now[key]:
            was, wants = (repr(flat[key]) if key in flat else "absent" for flat in (before, now))
            raise RunError(
                f"{path}: {key} was {was} when this phase was started and is {wants} now; "
                "set it back, or name a new run folder with run=FOLDER"
            )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings under dotted keys; lists and empty mappings are leaves too."""
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


class _Surroundings(Form):
    """What run.json has to hold for a run to go on."""

    started: str
    continued: tuple[dict[str, Any], ...] = ()


def _record_surroundings(path: Path, phase: str, seed: Any, skipped_rows: Mapping[str, Mapping[str, int]]) -> str:
    """Write run.json once and return when the run started.

    A command that continues in a changed environment adds it under `continued`.
    """
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
        before = read_as(path, _Surroundings)
        last = (before.continued or [record])[-1]
        if all(last.get(key) == value for key, value in now.items()):
            return before.started
        record["continued"] = [*before.continued, {"phase": phase, "started": started, **now}]
    write_atomic(path, json.dumps(record, indent=1) + "\n")
    return str(record["started"])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of LatentMem's own sources, marked if they changed since; None outside a checkout of them."""
    git = shutil.which("git")
    if git is None:
        return None
    here = Path(__file__)
    # If we are installed inside someone else's repository, its commit says nothing about our sources.
    tracked = ["ls-files", "--error-unmatch", here.name]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    for arguments in (tracked, describe):
        done = subprocess.run([git, *arguments], cwd=here.parent, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            return None
    return done.stdout.strip()
