"""Read run folders and write one self-contained page: what was learned, what differs for certain, and what was said.

Files are the whole interface: this reads what a run left behind, finished or not, and notes each part that is missing.
All model text is treated as hostile. It reaches the page only through autoescaping, never inside a script. The page's
content policy forbids every connection, and every script except ours.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from latentmem.errors import RunError
from latentmem.files import write_atomic
from latentmem.report.ablation import Ablation, ablation_cells, differing_keys, draw_ablation, find_ablation
from latentmem.report.cells import comparison_cells, group_cells
from latentmem.report.curves import SHOWN_PHASES, accuracy_bars, learning_curves
from latentmem.report.figures import Picture
from latentmem.report.latent_map import LatentMap, draw_maps, latent_cells, latents_as_json, map_findings, map_latents
from latentmem.report.read import SCHEMA_VERSION, RunRecord, read_run
from latentmem.report.samples import sample_of
from latentmem.report.tables import escape_markdown, format_markdown, markdown_table
from latentmem.report.values import Row, short
from latentmem.report.verdict import verdict


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write report.html with its figures as PNG, report.json and comparison.md; several runs share one page.

    Args:
        runs: run folders, finished or not.
        out: folder to write into; None means `RUN/report` of the first run.

    Returns:
        The path of report.html.

    Raises:
        RunError: a folder is no run folder, a file in it is damaged or newer than this version, or `out` cannot be
            written.
    """
    records = [read_run(Path(folder)) for folder in runs]
    if len({record.name for record in records}) < len(records):
        records = [replace(record, name=str(record.folder)) for record in records]
    out = Path(out) if out is not None else records[0].folder / "report"
    make_folder(out)

    curves, unrecorded = learning_curves(records)
    bars = {record.name: accuracy_bars(record, i) for i, record in enumerate(records, start=1)}
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
        samples={record.name: sample_of(record) for record in records},
        phases={phase: [r for r in records if r.rows(phase)] for phase in SHOWN_PHASES},
        nonce=secrets.token_urlsafe(16),
    )
    write_atomic(out / "report.html", to_bytes(page))
    return out / "report.html"


def _markdown(record: RunRecord, maps: list[LatentMap]) -> str:
    """Format the tables and sentences of one run as Markdown."""
    assert record.results is not None
    text = f"## {escape_markdown(record.name)}\n\n{format_markdown(record.results)}"
    if maps:
        sentences = "\n".join(f"- {escape_markdown(sentence)}" for sentence in map_findings(maps))
        text += f"\n### Latents\n\n{markdown_table(latent_cells(maps))}\n\n{sentences}\n"
    return text


def _maps(maps: list[LatentMap], number: int) -> list[Picture]:
    return [picture for i, m in enumerate(maps, start=1) for picture in draw_maps(m, f"latents_{number}_{i}")]


def _ablation(records: list[RunRecord]) -> tuple[Ablation | None, list[str]]:
    """Return the runs by the one key that they differ in, and the keys they differ in if there are several."""
    evaluated = [record for record in records if record.results and record.config]
    configs = [record.config for record in evaluated]
    found = find_ablation([r.name for r in evaluated], configs, [r.results or {} for r in evaluated])
    differ = sorted(differing_keys(configs)) if len(configs) > 1 else []
    return found, differ if len(differ) > 1 else []


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
                "latents_verdict": map_findings(maps[record.name]),
                "metrics": record.metrics.rows,
                "notes": record.notes,
            }
            for record in records
        ],
    }


# What pages of other kinds use too


def make_folder(out: Path) -> None:
    """Make a report's folder, unless it exists.

    Raises:
        RunError: the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out}: the report's folder cannot be made ({error.strerror}); name another") from None


def template(name: str) -> Any:
    """Load one of the package's pages, for jinja's `render`; everything filled in is escaped."""
    loader = FunctionLoader(lambda name: files("latentmem.report").joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {
        "cells": comparison_cells,
        "group_cells": group_cells,
        "verdict": verdict,
        "map_findings": map_findings,
    }
    environment.globals |= {"latent_cells": latent_cells, "ablation_cells": ablation_cells}
    environment.filters["short"] = short
    return environment.get_template(name)


def to_bytes(text: str) -> bytes:
    """Encode text as UTF-8, with escapes for half surrogate pairs, which model text may hold but UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace")
