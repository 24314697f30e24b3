"""Run folders in, one self-contained page out: what was learned, what differs for certain, and what the agents said.

Files are the whole interface: this reads what a run left behind, finished or not, and a part that is missing is a line
saying so. All model text is hostile. It reaches the page through autoescaping only, never inside a script, and the
page's content policy forbids every script but ours and every connection.

The words about differences are derived from the numbers in one place, `verdict`, for page, terminal and Markdown alike.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from latentmem.ablation import Ablation, ablation_cells, differing_keys, draw_ablation, find_ablation
from latentmem.config import split_control
from latentmem.errors import RunError
from latentmem.figures import COLOURS, STYLES, THEMES, Picture, add_legend, dress, in_both_themes, label, png
from latentmem.kept_latents import SUFFIX, KeptLatents, read_latents
from latentmem.kept_readings import READING_SUFFIX, LatentReading, reading_cells
from latentmem.latent_map import LatentMap, describe, draw_maps, latent_cells, latents_as_json, map_latents
from latentmem.runs import Metrics, read_json, read_metrics, write_atomic
from latentmem.stats import holm

SCHEMA_VERSION = 1
"""Newest results.json that is understood, and the version of report.json."""

MAX_TASKS = 24
"""Tasks per run whose trajectories are shown."""

MAX_CHARACTERS = 8_000
"""Longest text shown of one prompt or response; a page of full ones would not open."""

MUCH_CARRIED = 0.1
"""Nats a response below which a memory is said to carry a trace."""

MISSING = "-"
"""A cell without a value."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """One figure of a phase: a value of each of its metric lines."""

    phase: str
    key: str
    title: str
    value: Callable[[Row], float | None]
    ends: tuple[str, str] | None = None
    """Keys of the ends of the value's interval, where it is logged with one."""


@dataclass(frozen=True)
class RunRecord:
    """What one run folder holds."""

    name: str
    folder: Path
    info: Row
    config: str
    metrics: Metrics
    results: Row | None
    trajectories: dict[str, list[Row]]
    """By memory; those of `evaluate`."""
    latents: dict[str, KeptLatents]
    """By memory; those that were kept."""
    readings: dict[str, list[tuple[str, list[list[str]]]]]
    """By memory, what its latents say: titles and tables, one for each task and role."""
    notes: list[str]
    """What is missing or could not be read."""

    def rows(self, phase: str) -> list[Row]:
        """The metric lines of one phase, in order."""
        return [row for row in self.metrics.rows if row.get("phase") == phase]


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write report.html with its figures as PNG, report.json and comparison.md beside it; several runs share one page.

    Args:
        runs: run folders, finished or not.
        out: folder to write into; that of the first run, `RUN/report`, if None.

    Returns:
        The path of report.html.

    Raises:
        RunError: no run folder there, a file of it is damaged or newer than this version, or `out` cannot be written.
    """
    records = [_read_run(Path(folder)) for folder in runs]
    if len({record.name for record in records}) < len(records):
        records = [replace(record, name=str(record.folder)) for record in records]
    out = Path(out) if out is not None else records[0].folder / "report"
    make_folder(out)

    curves, unrecorded = _learning_curves(records)
    bars = {record.name: _bars(record, i) for i, record in enumerate(records, start=1)}
    maps = {record.name: [map_latents(name, kept) for name, kept in record.latents.items()] for record in records}
    drawn_maps = {name: _maps(found, i) for i, (name, found) in enumerate(maps.items(), start=1)}
    ablation, varied = _ablation(records)
    ablated = draw_ablation(ablation) if ablation else []
    pictures = [*curves, *(bar for bar in bars.values() if bar), *ablated]
    for picture in [*pictures, *(picture for found in drawn_maps.values() for picture in found)]:
        write_atomic(out / f"{picture.name}.png", picture.png["light"])
    write_atomic(out / "report.json", json.dumps(_as_json(records, maps), indent=1, allow_nan=False) + "\n")
    tables = [_markdown(record, maps[record.name]) for record in records if record.results]
    if ablation:
        tables.insert(0, f"## Against {escape_markdown(ablation.key)}\n\n{markdown_table(ablation_cells(ablation))}\n")
    write_atomic(out / "comparison.md", to_bytes("\n".join(tables) or "No run has been evaluated yet.\n"))

    page = template("report.html").render(
        records=records,
        curves=curves,
        unrecorded=unrecorded,
        bars=bars,
        maps=maps,
        drawn_maps=drawn_maps,
        ablation=ablation,
        ablated=ablated,
        varied=varied,
        samples={record.name: _sample(record) for record in records},
        phases={phase: [r for r in records if r.rows(phase)] for phase in SHOWN_PHASES},
        nonce=secrets.token_urlsafe(16),
    )
    write_atomic(out / "report.html", to_bytes(page))
    return out / "report.html"


def verdict(results: Row) -> list[str]:
    """What the numbers of a results.json allow to say, in sentences; p-values are corrected for their number (Holm)."""
    memories = _memories(results)
    num_tasks = results.get("num_tasks", 0)
    sentences = []
    widths = [
        (m["accuracy_high"] - m["accuracy_low"]) / 2 for m in memories if _has(m, "accuracy_low", "accuracy_high")
    ]
    if widths:
        sentences.append(
            f"With {num_tasks} tasks the 95% interval of an accuracy is up to ±{100 * max(widths):.0f} points."
        )
    comparisons = list(_comparisons(memories))
    if not comparisons:
        sentences.append("No memory was compared with none or text, so nothing is said about which is better.")
    else:
        sentences += findings(comparisons)
    for memory in memories:
        sentences += _carries(str(memory["name"]), _dict(memory.get("carried")))
    for memory in memories:
        if memory.get("num_errors"):
            sentences.append(
                f"{memory['name']}: {memory['num_errors']} of {num_tasks} episodes ended in an error, not an answer."
            )
        if (memory.get("no_answer") or 0) >= 0.1:
            sentences.append(f"{memory['name']}: no answer could be read in {memory['no_answer']:.0%} of the episodes.")
        sentences += _expenses(memory)
    if memories:
        seed = f" ({results['seed']})" if "seed" in results else ""
        sentences.append(f"The intervals cover the choice of tasks, not the luck of training: this is one seed{seed}.")
    return sentences


def _carries(name: str, carried: Row) -> list[str]:
    """Whether it matters to the agents what a memory was made from."""
    if not _has(carried, "nats", "low", "high", "num_tasks"):
        return []
    size = f"{carried_cell({'carried': carried})} nats a response"
    over = f"over another task's memory, on {carried['num_tasks']} tasks"
    if carried["low"] > 0:
        what = "what it read" if carried["nats"] >= MUCH_CARRIED else "a trace of what it read"
        return [f"{name} carries {what}: {size} {over}."]
    told = f"as far as {carried['num_tasks']} tasks tell (carried {size})"
    if name.startswith("latent:") and name != "latent:untrained":
        return [f"{name} works as a learned prompt: content does not matter, {told}."]
    return [f"{name} carries nothing that helps, {told}."]


def _expenses(memory: Row) -> list[str]:
    """What a memory that learns took before it was asked, and how much of what it was told could not be used."""
    sentences = []
    learning = _dict(memory.get("learning"))
    if _has(learning, "num_trajectories", "prompt_tokens", "generated_tokens", "seconds"):
        unused = sum(_number(count) or 0 for count in _dict(learning.get("malformed")).values())
        sentences.append(
            f"{memory['name']}: learned from {learning['num_trajectories']} trajectories before; a language model read "
            f"{learning['prompt_tokens']} tokens for it and wrote {learning['generated_tokens']}, in "
            f"{learning['seconds']:.0f} s; {unused} of its replies, or lines of them, could not be used."
        )
    if memory.get("memory_malformed"):
        sentences.append(f"{memory['name']}: {memory['memory_malformed']} replies could not be used while recalling.")
    return sentences


def format_table(results: Row) -> str:
    """The comparison of memories for a terminal: aligned columns, and below them the verdict in words."""
    header, *rows = _cells(results)
    rule = ["-" * max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = aligned([header, rule, *rows])
    if groups := group_cells(results):
        lines += ["", *aligned(groups)]
    return "\n".join([*(line.rstrip() for line in lines), "", *verdict(results)]) + "\n"


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for a terminal: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]


def format_markdown(results: Row) -> str:
    """The comparison of memories as a Markdown table, followed by the verdict in words."""
    tables = [markdown_table(_cells(results)), ""]
    if groups := group_cells(results):
        tables += [markdown_table(groups), ""]
    return "\n".join([*tables, *(f"- {escape_markdown(sentence)}" for sentence in verdict(results))]) + "\n"


def markdown_table(cells: Sequence[Sequence[str]], num_names: int = 1) -> str:
    """A table in Markdown: a header and rows, the first `num_names` columns to the left and the others to the right."""
    header, *rows = [[*map(escape_markdown, row)] for row in cells]
    marks = ["---" if i < num_names else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows])


def table_cells(rows: Sequence[Row], columns: dict[str, Callable[[Row], str]]) -> list[list[str]]:
    """Header and rows of a table; of the columns, those where some row has a value."""
    filled = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    shown = {title: cells for title, cells in filled.items() if any(cell != MISSING for cell in cells)}
    return [list(shown), *map(list, zip(*shown.values(), strict=True))]


# Reading


def check_schema(path: Path, found: Row, newest: int) -> None:
    """Refuse a file of a newer form than `newest`.

    Raises:
        RunError: it is.
    """
    if found.get("schema_version", 0) > newest:
        raise RunError(
            f"{path}: schema_version is {found['schema_version']}, newer than {newest}, the newest this version reads; "
            "upgrade latentmem"
        )


def _read_run(folder: Path) -> RunRecord:
    known = [name for name in ("run.json", "metrics.jsonl", "results.json") if (folder / name).exists()]
    if not known:
        raise RunError(
            f"{folder}: no run folder (it has no run.json, metrics.jsonl or results.json); name a run's folder"
        )
    info = read_json(folder / "run.json") if "run.json" in known else {}
    metrics = read_metrics(folder / "metrics.jsonl")
    results = read_json(folder / "results.json") if "results.json" in known else None
    notes = []
    if metrics.num_torn:
        notes.append("The last line of metrics.jsonl was cut off by a crash and is left out.")
    for row in metrics.rows:
        if row.get("non_finite"):
            notes.append(f"{row.get('phase')} step {row.get('step')}: {', '.join(row['non_finite'])} was not finite.")
    if results is None:
        notes.append("Not evaluated yet: no results.json. Run `latentmem evaluate`.")
    else:
        check_schema(folder / "results.json", results, SCHEMA_VERSION)
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
        # Split on newlines alone: other line breaks may stand inside a JSON string.
        for number, line in enumerate(found[stem].read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows.append(row) if isinstance(row, dict) else damaged.append(number)
            except ValueError:
                damaged.append(number)
        if damaged:
            notes.append(f"{found[stem].name}: {len(damaged)} lines could not be read, the first is line {damaged[0]}.")
        trajectories[names.get(stem, stem)] = rows
    return trajectories


def _stems(results: Row) -> dict[str, str]:
    """What the files of each memory are called, and its name."""
    return {Path(m.get("trajectories") or m["name"].replace(":", "-")).stem: m["name"] for m in _memories(results)}


def _read_latents(folder: Path, results: Row, notes: list[str]) -> dict[str, KeptLatents]:
    """What was kept of each evaluated memory; where nothing was, or it cannot be read, a note says so."""
    latents: dict[str, KeptLatents] = {}
    without = []
    for stem, name in _stems(results).items():
        path = folder / f"{stem}{SUFFIX}"
        if path.exists():
            try:
                latents[name] = read_latents(path)
            except RunError as error:
                notes.append(str(error))
        elif str(name).startswith("latent") and split_control(name)[1] is None:
            without.append(name)
    if without:
        notes.append(
            f"No latents were kept of {', '.join(without)}, so there is no map of them; evaluate in a new run folder."
        )
    return latents


def _read_readings(folder: Path, results: Row, notes: list[str]) -> dict[str, list[tuple[str, list[list[str]]]]]:
    """What each evaluated memory's latents say, as tables; a file that cannot be read is a note."""
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
    """Header and rows of what one role's latents say."""
    after = [LatentReading(**latent) for latent in role["after"]]
    earlier = None if role["before"] is None else [LatentReading(**latent) for latent in role["before"]]
    return reading_cells(after, earlier, ("nearest", f"nearest in {before}"))


def _memories(results: Row) -> list[Row]:
    return [m for m in results.get("memories") or [] if isinstance(m, dict) and "name" in m]


def _has(row: Row, *keys: str) -> bool:
    return all(_number(row.get(key)) is not None for key in keys)


def _number(value: Any) -> float | None:
    """The value if it is a finite number. Files are read as they are, so it may be anything."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) else None


# Words and tables


def _comparisons(memories: list[Row]) -> Iterable[tuple[str, str, Row]]:
    against_none = {m["name"] for m in memories if m.get("vs_none")}
    for memory in memories:
        # Of a control one question is asked: what does the memory itself lose?
        for baseline in ("real",) if memory.get("vs_real") else ("none", "text", "start"):
            found = _dict(memory.get(f"vs_{baseline}"))
            # "none against text" is "text against none" told twice, and would be corrected for twice.
            twice = memory["name"] == "none" and "text" in against_none
            if found and not twice and _has(found, "difference", "p_value"):
                other = memory.get("start") if baseline == "start" else compared_with(memory["name"], baseline)
                yield memory["name"], str(other), found


def compared_with(memory: str, baseline: str) -> str:
    """The memory that a baseline is: of `real`, the one that `memory` is a control of."""
    return split_control(memory)[0] if baseline == "real" else baseline


def findings(comparisons: list[tuple[str, str, Row]]) -> list[str]:
    """What may be said of comparisons, in sentences; their p-values are corrected for their number (Holm).

    Args:
        comparisons: what is compared, with which baseline, and `difference`, `low`, `high` and `p_value`.
    """
    p_values = [found["p_value"] for _, _, found in comparisons]
    adjusted = holm(p_values)
    count = len(comparisons)
    corrected = f" after correction for {count} comparisons" if count > 1 else ""
    sentences = []
    for (name, baseline, found), p in zip(comparisons, adjusted, strict=True):
        if p < 0.05:
            word = "better" if found["difference"] > 0 else "worse"
            sentences.append(
                f"{name} against {baseline}: {points_cell(found)} points, {word}, significant at 5% "
                f"(p {_equals(p)}{corrected})."
            )
    if not sentences:
        which = f"None of the {count} differences is" if count > 1 else "The difference is not"
        sentences.append(f"{which} significant at 5% (smallest p {_equals(min(adjusted))}{corrected}).")
    elif len(sentences) < count:
        rest = count - len(sentences)
        sentences.append(f"The other {rest} differences are not." if rest > 1 else "The other difference is not.")
    alone = [
        f"{name} against {baseline} (p {_equals(p)})"
        for (name, baseline, _), p, q in zip(comparisons, p_values, adjusted, strict=True)
        if p < 0.05 <= q
    ]
    if alone:
        sentences.append(f"Below 5% only before that correction, and so no finding: {', '.join(alone)}.")
    return sentences


def _cells(results: Row) -> list[list[str]]:
    """Header and rows of the comparison table; a column stands only where some memory has a value for it."""
    return table_cells(_memories(results), COLUMNS) if _memories(results) else [["memory"]]


def accuracy_cell(memory: Row) -> str:
    """A share of tasks solved with its interval, in percent."""
    if not _has(memory, "accuracy"):
        return MISSING
    if not _has(memory, "accuracy_low", "accuracy_high"):
        return f"{100 * memory['accuracy']:.1f}%"
    return "{:.1f}% [{:.1f}, {:.1f}]".format(
        *(100 * memory[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
    )


def points_cell(difference: Row) -> str:
    """A difference of two accuracies with its interval."""
    if not _has(difference, "difference"):
        return MISSING
    if not _has(difference, "low", "high"):
        return f"{100 * difference['difference']:+.1f}"
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * difference[key] for key in ("difference", "low", "high")))


def carried_cell(memory: Row) -> str:
    """What a memory carries with its interval, in nats a response."""
    carried = _dict(memory.get("carried"))
    if not _has(carried, "nats"):
        return MISSING
    if not _has(carried, "low", "high"):
        return f"{carried['nats']:+.2f}"
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(carried[key] for key in ("nats", "low", "high")))


def group_cells(results: Row) -> list[list[str]]:
    """Header and rows of accuracies by group of tasks, and given that the answer was recalled; [] without groups."""
    memories = [m for m in _memories(results) if _dict(m.get("groups"))]
    names = list(dict.fromkeys(group for m in memories for group in _dict(m["groups"])))
    rows = []
    for group in names:
        found = [_dict(_dict(m["groups"]).get(group)) for m in memories]
        rows.append([group, *map(_share_cell, found)])
        if any(_dict(part.get("hit")) for part in found):
            rows.append([f"{group}, given a hit", *(_share_cell(_dict(part.get("hit"))) for part in found)])
    return [["accuracy by group [95%], tasks", *(str(m["name"]) for m in memories)], *rows] if rows else []


def _share_cell(share: Row) -> str:
    """An accuracy with its interval, in percent, and the tasks that it is over."""
    if not _has(share, "accuracy", "low", "high", "num_tasks"):
        return MISSING
    percent = "{:.1f}% [{:.1f}, {:.1f}]".format(*(100 * share[key] for key in ("accuracy", "low", "high")))
    return f"{percent}, {share['num_tasks']}"


def p_cell(p: float | None) -> str:
    """A p-value."""
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _equals(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p_cell(p)}"


def _share(key: str, memory: Row) -> str:
    return f"{100 * memory[key]:.0f}%" if _has(memory, key) else MISSING


def _partial_reward(memory: Row) -> str:
    """The mean reward where it says more than the accuracy does."""
    differs = _has(memory, "reward", "accuracy") and abs(memory["reward"] - memory["accuracy"]) > 1e-9
    return f"{memory['reward']:.3f}" if differs else MISSING


def errors_cell(memory: Row) -> str:
    """Episodes that ended in an error, if any did."""
    return str(memory["num_errors"]) if memory.get("num_errors") else MISSING


def per_task_cell(key: str, digits: int, memory: Row) -> str:
    """A number a task."""
    return f"{memory[key]:.{digits}f}" if _has(memory, key) else MISSING


def memory_tokens_cell(memory: Row) -> str:
    """Read and written by language models to recall, the composer among them."""
    if not memory.get("memory_prompt_tokens"):
        return MISSING
    return "+".join(per_task_cell(f"memory_{kind}_tokens", 0, memory) for kind in ("prompt", "generated"))


def seconds_cell(memory: Row) -> str:
    """Seconds a task, all parts together."""
    return per_task_cell("total", 2, _dict(memory.get("seconds")))


COLUMNS: dict[str, Callable[[Row], str]] = {
    "memory": lambda memory: str(memory["name"]),
    "accuracy [95%]": accuracy_cell,
    "reward": _partial_reward,
    "vs none, points": lambda memory: points_cell(_dict(memory.get("vs_none"))),
    "p vs none": lambda memory: p_cell(_number(_dict(memory.get("vs_none")).get("p_value"))),
    "vs text, points": lambda memory: points_cell(_dict(memory.get("vs_text"))),
    "p vs text": lambda memory: p_cell(_number(_dict(memory.get("vs_text")).get("p_value"))),
    "vs its start, points": lambda memory: points_cell(_dict(memory.get("vs_start"))),
    "p vs its start": lambda memory: p_cell(_number(_dict(memory.get("vs_start")).get("p_value"))),
    "vs real, points": lambda memory: points_cell(_dict(memory.get("vs_real"))),
    "p vs real": lambda memory: p_cell(_number(_dict(memory.get("vs_real")).get("p_value"))),
    "carried, nats [95%]": carried_cell,
    "hits": partial(_share, "retrieval_hits"),
    "accuracy given a hit [95%], tasks": lambda memory: _share_cell(_dict(memory.get("accuracy_hit"))),
    "no answer": partial(_share, "no_answer"),
    "errors": errors_cell,
    "prompt tok": partial(per_task_cell, "prompt_tokens", 0),
    "latent tok": partial(per_task_cell, "latent_tokens", 0),
    "new tok": partial(per_task_cell, "generated_tokens", 0),
    "memory tok": memory_tokens_cell,
    "s/task": seconds_cell,
    "peak MB": partial(per_task_cell, "peak_memory_mb", 0),
}
"""Title and cell of each column; tokens and seconds are per task."""


def _markdown(record: RunRecord, maps: list[LatentMap]) -> str:
    """The tables and sentences of one run."""
    assert record.results is not None
    text = f"## {escape_markdown(record.name)}\n\n{format_markdown(record.results)}"
    if maps:
        sentences = "\n".join(f"- {escape_markdown(sentence)}" for sentence in describe(maps))
        text += f"\n### Latents\n\n{markdown_table(latent_cells(maps))}\n\n{sentences}\n"
    return text


def escape_markdown(text: str) -> str:
    """Text that Markdown and the HTML in it leave alone."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", flat)


# Figures


def _signal(row: Row) -> float | None:
    groups = _number(row.get("groups"))
    found = _number(row.get("signal_groups"))
    return found / groups if groups and found is not None else None


def _field(key: str) -> Callable[[Row], float | None]:
    return lambda row: _number(row.get(key))


_CARRIED = "What latents carry on held-out tasks, in nats a response"

CURVES = (
    Curve("lmpo", "carried", _CARRIED, _field("carried"), ("carried_low", "carried_high")),
    *(
        Curve(phase, key, title, value)
        for phase in ("lmpo", "grpo")
        for key, title, value in (
            ("reward", "Mean reward of the rollouts", _field("reward")),
            ("eval_reward", "Mean reward on held-out tasks", _field("eval_reward")),
            ("advantage_std", "Spread of the advantages", _field("advantage_std")),
            ("signal", "Share of groups with signal", _signal),
            ("clip_fraction", "Clip fraction", _field("clip_fraction")),
            ("grad_norm", "Gradient norm", _field("grad_norm")),
            ("loss", "Loss", _field("loss")),
            ("kl", f"KL to the {'initial composer' if phase == 'lmpo' else 'untrained agents'}", _field("kl")),
        )
    ),
    Curve("warmup", "loss", "Loss", _field("loss")),
    Curve("warmup", "eval_loss", "Loss on held-out words", _field("eval_loss")),
    Curve("warmup", "framed", "Share of held-out words said from a slot", _field("framed")),
    Curve("warmup", "copied", "Share of held-out words copied by the composer", _field("copied")),
    Curve("sft", "loss", "Loss", _field("loss")),
    Curve("sft", "eval_loss", "Loss on held-out trajectories", _field("eval_loss")),
    Curve("sft", "carried", _CARRIED, _field("carried"), ("carried_low", "carried_high")),
    Curve("sft", "eval_accuracy", "Share of held-out responses that are said exactly", _field("eval_accuracy")),
)
SHOWN_PHASES = ("collect", "warmup", "sft", "lmpo", "grpo")


def _learning_curves(records: list[RunRecord]) -> tuple[list[Picture], dict[str, list[str]]]:
    """The figures with something to show, and by phase the titles of those that no run recorded."""
    pictures: list[Picture] = []
    unrecorded: dict[str, list[str]] = {}
    labels = _told_apart([r.name for r in records])
    for curve in CURVES:
        series = {r.name: _series(r.rows(curve.phase), curve) for r in records}
        series = {name: points for name, points in series.items() if points}
        if series:
            alt = f"{curve.title} over the steps of {curve.phase.upper()}. " + " ".join(
                f"{name}: {_trend(points)}" for name, points in series.items()
            )
            bands = {r.name: _band(r.rows(curve.phase), curve) for r in records}
            drawn = in_both_themes(partial(_draw_curve, series, bands, labels))
            pictures.append(Picture(f"{curve.phase}_{curve.key}", curve.title, alt, drawn))
        elif any(r.rows(curve.phase) for r in records):
            unrecorded.setdefault(curve.phase, []).append(curve.title)
    return pictures, unrecorded


def _series(rows: list[Row], curve: Curve) -> list[tuple[int, float]]:
    values = [(row.get("step"), curve.value(row)) for row in rows]
    return [(step, value) for step, value in values if isinstance(step, int) and value is not None]


def _band(rows: list[Row], curve: Curve) -> list[tuple[int, float, float]]:
    """Step, low and high end of each interval that was logged."""
    if curve.ends is None:
        return []
    found = [(row.get("step"), *(_number(row.get(key)) for key in curve.ends)) for row in rows]
    return [
        (step, low, high) for step, low, high in found if isinstance(step, int) and low is not None and high is not None
    ]


def _trend(points: list[tuple[int, float]]) -> str:
    values = [value for _, value in points]
    if len(values) < 2:
        return f"{values[0]:.3g} at step {points[0][0]}."
    n = max(1, len(values) // 5)
    first, last = sum(values[:n]) / n, sum(values[-n:]) / n
    over = f" (means of {n} steps)" if n > 1 else ""
    return f"from {first:.3g} to {last:.3g}{over}, between {min(values):.3g} and {max(values):.3g}."


def _told_apart(names: list[str]) -> dict[str, str]:
    """Each run without the folders that all of them lie in."""
    parts = [Path(name).parts for name in names]
    shared = 0
    while all(len(path) > shared + 1 for path in parts) and len({path[shared] for path in parts}) == 1:
        shared += 1
    return {name: str(Path(*path[shared:])) for name, path in zip(names, parts, strict=True)}


def _draw_curve(
    series: dict[str, list[tuple[int, float]]],
    bands: dict[str, list[tuple[int, float, float]]],
    labels: dict[str, str],
    theme: str,
) -> bytes:
    """Each run's curve, with a band if it has one; `labels` are those of all runs, in the order of their colours."""
    figure = Figure(figsize=(3.7, 2.2 + (0.1 + 0.1 * len(labels) if len(labels) > 1 else 0)), layout="constrained")
    axes = figure.add_subplot()
    for name, points in series.items():
        i = list(labels).index(name)
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]
        steps, values = [step for step, _ in points], [value for _, value in points]
        if band := bands[name]:
            at, lows, highs = ([*column] for column in zip(*band, strict=True))
            axes.fill_between(at, lows, highs, color=colour, alpha=0.15, linewidth=0)
        reach = len(values) // 16
        few = len(values) <= 12
        if reach:
            # Single steps are noise of a few groups; the thick line is the mean of those around each.
            axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.8)
            around = [values[max(0, j - reach) : j + reach + 1] for j in range(len(values))]
            values = [sum(near) / len(near) for near in around]
        axes.plot(
            steps,
            values,
            style,
            color=colour,
            linewidth=1.8,
            label=label(labels[name]),
            marker="o" if few else None,
            ms=4,
        )
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(axes, theme)
    if len(labels) > 1:
        add_legend(axes, theme, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    return png(figure)


def _bars(record: RunRecord, number: int) -> Picture | None:
    memories = [m for m in _memories(record.results or {}) if _has(m, "accuracy")]
    if not memories:
        return None
    alt = "Accuracy of each memory with its 95% interval. " + "; ".join(
        f"{m['name']} {accuracy_cell(m)}" for m in memories
    )
    drawn = in_both_themes(partial(_draw_bars, memories))
    return Picture(f"accuracy_{number}", "Accuracy with 95% intervals", alt, drawn)


def _draw_bars(memories: list[Row], theme: str) -> bytes:
    figure = Figure(figsize=(3.7, 0.7 + 0.34 * len(memories)), layout="constrained")
    axes = figure.add_subplot()
    text = THEMES[theme][0]
    for i, m in enumerate(memories):
        accuracy = 100 * m["accuracy"]
        latent = str(m["name"]).startswith("latent")
        axes.barh(i, accuracy, height=0.6, color=COLOURS[0] if latent else "#8a8a8a")
        end = accuracy
        if _has(m, "accuracy_low", "accuracy_high"):
            low, end = 100 * m["accuracy_low"], 100 * m["accuracy_high"]
            axes.plot([low, end], [i, i], color=text, linewidth=1.5, marker="|", ms=8)
        axes.annotate(
            f"{accuracy:.1f}", (end, i), (5, 0), textcoords="offset points", va="center", color=text, fontsize=8
        )
    axes.set_yticks(range(len(memories)), [label(m["name"]) for m in memories])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel("accuracy, %")
    dress(axes, theme)
    axes.grid(visible=False, axis="y")
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
    return png(figure)


def _maps(maps: list[LatentMap], number: int) -> list[Picture]:
    return [picture for i, m in enumerate(maps, start=1) for picture in draw_maps(m, f"latents_{number}_{i}")]


def _ablation(records: list[RunRecord]) -> tuple[Ablation | None, list[str]]:
    """Runs against the one key that they differ in, and what they differ in if that is more."""
    evaluated = [record for record in records if record.results and record.config]
    configs = [record.config for record in evaluated]
    found = find_ablation([r.name for r in evaluated], configs, [r.results or {} for r in evaluated])
    differ = sorted(differing_keys(configs)) if len(configs) > 1 else []
    return found, differ if len(differ) > 1 else []


# Trajectories


def _sample(record: RunRecord) -> dict[str, Any]:
    """Tasks to show, those where the memories disagree first, each with its trajectories side by side."""
    tasks: dict[str, list[tuple[str, Row]]] = {}
    for memory, rows in record.trajectories.items():
        for row in rows:
            tasks.setdefault(_task_key(row), []).append((memory, row))
    disagree = {key for key, played in tasks.items() if len({bool(row.get("success")) for _, row in played}) > 1}
    chosen = sorted(tasks, key=lambda key: key not in disagree)[:MAX_TASKS]
    return {
        "memories": list(record.trajectories),
        "num_tasks": len(tasks),
        "num_disagree": len(disagree),
        "tasks": [_shown_task(tasks[key]) for key in chosen],
    }


def _task_key(row: Row) -> str:
    task = _dict(row.get("task"))
    return f"{task.get('domain')}:{task['id']}" if task.get("id") is not None else f"text:{task.get('text')}"


def _shown_task(played: list[tuple[str, Row]]) -> Row:
    task = _dict(played[0][1].get("task"))
    text = str(task.get("text", ""))
    return {
        "id": str(task.get("id") or ""),
        "title": _clip(" ".join(text.split()), 110),
        "text": _clip(text),
        "columns": [_shown_trajectory(memory, row) for memory, row in played],
    }


def _shown_trajectory(memory: str, row: Row) -> Row:
    return {
        "memory": memory,
        "success": bool(row.get("success")),
        "reward": _short(row.get("reward")),
        "error": row.get("error"),
        "steps": [
            {
                "messages": [_shown_message(_dict(message)) for message in _list(step.get("messages"))],
                "action": _clip(step.get("action", "")),
                "observation": _clip(step.get("observation", "")),
                "info": _clip(json.dumps(step["info"], ensure_ascii=False)) if step.get("info") else "",
            }
            for step in map(_dict, _list(row.get("steps")))
        ],
    }


def _shown_message(message: Row) -> Row:
    recalled = _dict(message.get("recalled"))
    return {
        "role": str(message.get("role", "?")),
        "num_tokens": len(_list(message.get("token_ids"))),
        "cut": message.get("finish") == "length",
        "response": _clip(message.get("response", "")),
        "system": _clip(message.get("system", "")),
        "user": _clip(message.get("user", "")),
        "recalled": {
            "kind": str(recalled.get("kind", "none")),
            "text": _clip(recalled.get("text", "")),
            "num_latents": recalled.get("num_latents") or 0,
            "sources": [str(source) for source in _list(recalled.get("sources"))],
        },
    }


def _clip(text: Any, limit: int = MAX_CHARACTERS) -> str:
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"


def _short(value: Any) -> str:
    return f"{value:.4g}" if _number(value) is not None else str(value)


def _dict(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# Output


def make_folder(out: Path) -> None:
    """Make a report's folder, if it is not there.

    Raises:
        RunError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out}: the report's folder cannot be made ({error.strerror}); name another") from None


def template(name: str) -> Any:
    """One of the package's pages, for jinja's `render`; all that is filled in is escaped."""
    loader = FunctionLoader(lambda name: files("latentmem").joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"cells": _cells, "group_cells": group_cells, "verdict": verdict, "describe": describe}
    environment.globals |= {"latent_cells": latent_cells, "ablation_cells": ablation_cells}
    environment.filters["short"] = _short
    return environment.get_template(name)


def _as_json(records: list[RunRecord], maps: dict[str, list[LatentMap]]) -> Row:
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [
            {
                "name": record.name,
                "folder": str(record.folder),
                "info": record.info,
                "results": record.results,
                "verdict": verdict(record.results) if record.results else [],
                "latents": [latents_as_json(m) for m in maps[record.name]],
                "latents_verdict": describe(maps[record.name]),
                "metrics": record.metrics.rows,
                "notes": record.notes,
            }
            for record in records
        ],
    }


def to_bytes(text: str) -> bytes:
    """Model text may hold half a surrogate pair, which UTF-8 cannot say."""
    return text.encode("utf-8", "backslashreplace")
