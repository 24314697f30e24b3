"""Read a run's folder as it was left, finished or not; a note tells of each part that is missing or damaged."""

from dataclasses import dataclass
from pathlib import Path

from latentmem.errors import RunError
from latentmem.files import read_as, read_json
from latentmem.kept_latents import SUFFIX, KeptLatents, read_latents
from latentmem.kept_readings import READING_SUFFIX, LatentReading, reading_cells
from latentmem.memory_names import MemoryName
from latentmem.parsing import parse_json
from latentmem.report.forms import ResultsForm
from latentmem.report.values import Row, as_list, memories_in
from latentmem.runs import Metrics, read_metrics

SCHEMA_VERSION = 1
"""Newest version of results.json that can be read, and the version of report.json."""


@dataclass(frozen=True)
class RunRecord:
    """The content of one run folder."""

    name: str
    folder: Path
    info: Row
    config: str
    metrics: Metrics
    results: Row | None
    trajectories: dict[str, list[Row]]
    """By memory, the trajectories in `evaluate`."""
    latents: dict[str, KeptLatents]
    """By memory, the latents that were kept."""
    readings: dict[str, list[tuple[str, list[list[str]]]]]
    """By memory, what its latents say: titles and tables, one for each task and role."""
    notes: list[str]
    """What is missing or could not be read."""

    def rows(self, phase: str) -> list[Row]:
        """Return the metric lines of one phase, in order."""
        return [row for row in self.metrics.rows if row.get("phase") == phase]


def read_results(path: Path) -> Row:
    """Read a results.json.

    Raises:
        RunError: it cannot be read, is damaged, or is newer than this version understands.
    """
    results = read_json(path)
    check_schema(path, results, SCHEMA_VERSION)
    read_as(path, ResultsForm)
    return results


def check_schema(path: Path, found: Row, newest: int) -> None:
    """Refuse a file whose schema version is newer than `newest`.

    Raises:
        RunError: the version is newer.
    """
    version = found.get("schema_version", 0)
    if type(version) is not int:
        raise RunError(f"{path}: schema_version is {version!r}, expected a whole number; restore the file")
    if version > newest:
        raise RunError(
            f"{path}: schema_version is {version}, newer than {newest}, the newest this version reads; "
            "upgrade latentmem"
        )


def read_run(folder: Path) -> RunRecord:
    """Read the content of a run's folder.

    Raises:
        RunError: the folder is no run folder, or a file is newer than this version, or damaged beyond use.
    """
    known = [name for name in ("run.json", "metrics.jsonl", "results.json") if (folder / name).exists()]
    if not known:
        raise RunError(
            f"{folder}: no run folder (it has no run.json, metrics.jsonl or results.json); name a run's folder"
        )
    info = read_json(folder / "run.json") if "run.json" in known else {}
    metrics = read_metrics(folder / "metrics.jsonl")
    results = read_results(folder / "results.json") if "results.json" in known else None
    notes = []
    if metrics.num_torn:
        notes.append("The last line of metrics.jsonl was cut off by a crash and is left out.")
    for row in metrics.rows:
        if row.get("non_finite"):
            keys = ", ".join(map(str, as_list(row["non_finite"])))
            notes.append(f"{row.get('phase')} step {row.get('step')}: {keys} was not finite.")
    if results is None:
        notes.append("Not evaluated yet: no results.json. Run `latentmem evaluate`.")
    trajectories = _read_trajectories(folder / "evaluate", results or {}, notes)
    latents = _read_latents(folder / "evaluate", results or {}, notes)
    readings = _read_readings(folder / "evaluate", results or {}, notes)
    if not trajectories:
        notes.append("No trajectories to show: evaluate/ holds none.")
    config = folder / "config.yaml"
    return RunRecord(
        name=str((results or {}).get("run") or folder.resolve().name),
        folder=folder,
        info=info,
        config=config.read_text(encoding="utf-8", errors="backslashreplace") if config.exists() else "",
        metrics=metrics,
        results=results,
        trajectories=trajectories,
        latents=latents,
        readings=readings,
        notes=notes,
    )


def _read_trajectories(folder: Path, results: Row, notes: list[str]) -> dict[str, list[Row]]:
    names = _stems(results)
    order = list(names)
    found = {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.jsonl"))}
    trajectories: dict[str, list[Row]] = {}
    for stem in sorted(found, key=lambda stem: (order.index(stem) if stem in order else len(order), stem)):
        rows, damaged = [], []
        # Split at newlines alone, because other line breaks may occur inside a JSON string.
        for number, line in enumerate(found[stem].read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
                rows.append(row) if isinstance(row, dict) else damaged.append(number)
            except ValueError:
                damaged.append(number)
        if damaged:
            notes.append(f"{found[stem].name}: {len(damaged)} lines could not be read, the first is line {damaged[0]}.")
        trajectories[names.get(stem, stem)] = rows
    return trajectories


def _stems(results: Row) -> dict[str, str]:
    """Map the stem of each memory's files to the memory's name."""
    return {Path(m.get("trajectories") or m["name"].replace(":", "-")).stem: m["name"] for m in memories_in(results)}


def _read_latents(folder: Path, results: Row, notes: list[str]) -> dict[str, KeptLatents]:
    """Read the kept latents of each evaluated memory; add a note where they are missing or cannot be read."""
    latents: dict[str, KeptLatents] = {}
    without = []
    for stem, name in _stems(results).items():
        path = folder / f"{stem}{SUFFIX}"
        if path.exists():
            try:
                latents[name] = read_latents(path)
            except RunError as error:
                notes.append(str(error))
        elif (parsed := MemoryName.parse(str(name))).is_latent and parsed.control is None:
            without.append(name)
    if without:
        notes.append(
            f"No latents were kept of {', '.join(without)}, so there is no map of them; evaluate in a new run folder."
        )
    return latents


def _read_readings(folder: Path, results: Row, notes: list[str]) -> dict[str, list[tuple[str, list[list[str]]]]]:
    """Read what each evaluated memory's latents say, as tables; add a note for a file that cannot be read."""
    readings = {}
    for stem, name in _stems(results).items():
        path = folder / f"{stem}{READING_SUFFIX}"
        if path.exists():
            try:
                found = read_json(path)
                readings[name] = [
                    (f"{task['task']}, {role['role']}", _reading_cells(role, found["before"]))
                    for task in found["tasks"]
                    for role in task["roles"]
                ]
            except (RunError, LookupError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split())
                notes.append(f"{path}: damaged ({reason}); remove it and run `latentmem evaluate` again.")
    return readings


def _reading_cells(role: Row, before: str | None) -> list[list[str]]:
    """Return header and rows of what one role's latents say."""
    after = [LatentReading(**latent) for latent in role["after"]]
    earlier = None if role["before"] is None else [LatentReading(**latent) for latent in role["before"]]
    return reading_cells(after, earlier, ("nearest", f"nearest in {before}"))
