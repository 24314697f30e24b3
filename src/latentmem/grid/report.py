"""The table of a grid for people: Markdown, LaTeX, a figure and a page, all made from grid.json alone.

Cells and sentences come from `latentmem.report`. So a number looks the same everywhere, and one place decides whether a
difference is a finding.
"""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from latentmem.config import team_label
from latentmem.files import read_as, read_json, write_atomic
from latentmem.grid.forms import Table
from latentmem.grid.results import BASELINES, SCHEMA_VERSION
from latentmem.memory_names import MemoryName
from latentmem.report.cells import (
    MISSING,
    accuracy_cell,
    carried_cell,
    errors_cell,
    memory_tokens_cell,
    p_cell,
    per_task_cell,
    points_cell,
    seconds_cell,
    table_cells,
)
from latentmem.report.figures import COLOURS, THEMES, Picture, dress, in_both_themes, label, png
from latentmem.report.page import make_folder, template, to_bytes
from latentmem.report.read import check_schema
from latentmem.report.tables import aligned, escape_markdown, markdown_table
from latentmem.report.values import Row
from latentmem.report.verdict import compared_with, findings

RESULTS = "grid.json"


def write_tables(folder: Path, table: Row) -> str:
    """Write grid.md, grid.tex and grid.png beside grid.json; return the summary and a line that says where they are."""
    write_atomic(folder / "grid.md", to_bytes(format_markdown(table)))
    write_atomic(folder / "grid.tex", to_bytes(format_latex(table)))
    if table["rows"]:
        write_atomic(folder / "grid.png", _picture(table).png["light"])
    written = "grid.json, grid.md, grid.tex, grid.png"
    return f"{format_summary(table)}\n\n{folder}: {written}; as a page: latentmem report {folder}"


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Write report.html and the tables of a grid's folder; return the path of report.html.

    Args:
        folder: the folder that holds grid.json.
        out: folder to write into; `FOLDER/report` if None.

    Raises:
        RunError: grid.json is damaged or newer than this version, or the page cannot be written.
    """
    table = read_json(folder / RESULTS)
    check_schema(folder / RESULTS, table, SCHEMA_VERSION)
    read_as(folder / RESULTS, Table)
    out = out or folder / "report"
    make_folder(out)
    write_tables(out, table)
    page = template("grid.html").render(
        table=table,
        sentences=sentences_of(table),
        overview=overview(table),
        cells=all_cells(table),
        by_seed=_by_seed(table),
        num_names=_num_names(table),
        legend=LEGEND,
        notes=_notes(table),
        picture_of_all=_picture(table) if table["rows"] else None,
        nonce=secrets.token_urlsafe(16),
    )
    write_atomic(out / "report.html", to_bytes(page))
    return out / "report.html"


def sentences_of(table: Row) -> list[str]:
    """Return the sentences that the numbers of grid.json support."""
    grid = table["grid"]
    sentences = [
        f"{table['num_done']} of {table['num_cells']} cells: {_count(grid['benchmarks'], 'benchmark')}, "
        f"{_count(grid['teams'], 'team')}, {_count(grid['memories'], 'memory', 'memories')}, "
        f"{_count(grid['seeds'], 'seed')}{', ' + _count(grid['variants'], 'variant') if grid['variants'] else ''}."
    ]
    if grid["leave_out"] == "benchmark":
        sentences.append(
            "Each benchmark is unseen: composers were trained, and banks filled, on the train tasks of all others."
        )
    elif grid["leave_out"] == "team":
        sentences.append("Each team is unseen: composers were trained, and banks filled, by all other teams.")
    if trained := table.get("train_teams"):
        unseen = [team for team in map(team_label, grid["teams"]) if team not in trained]
        those = f"; unseen: {', '.join(unseen)}" if unseen else ""
        sentences.append(f"Composers were trained, and banks filled, by {', '.join(trained)}{those}.")
    compared = [
        (f"{row['memory']} ({_where(row)})", compared_with(row["memory"], baseline), row[f"vs_{baseline}"])
        for row in _all_rows(table)
        for baseline in BASELINES
        if row.get(f"vs_{baseline}")  # tables of older versions lack some baselines
    ]
    sentences += findings(compared) if compared else ["No memory was compared with none or text."]
    seeds = len(grid["seeds"])
    sentences.append(
        "The intervals cover the choice of tasks, not the luck of training: there is one seed."
        if seeds == 1
        else f"The intervals cover the choice of tasks and the draw of {seeds} seeds, the p-values that of tasks alone."
    )
    for failure in table["failures"]:
        place = _where(failure, failure["memory"], f"seed {failure['seed']}")
        sentences.append(f"Failed: {place}: {failure['line']}")
    return sentences


def overview(table: Row) -> list[list[str]]:
    """Return accuracies in percent, memories by benchmarks and teams; * and ° mark corrected differences from none."""
    rows = table["rows"]
    places = list(dict.fromkeys((row["benchmark"], row["team"]) for row in rows))
    names = list(dict.fromkeys((row["variant"], row["memory"]) for row in rows))
    found = {(row["variant"], row["memory"], row["benchmark"], row["team"]): row for row in rows}
    overall = {(row["variant"], row["memory"]): row for row in table["overall"]}
    header = ["memory", *(f"{benchmark}, {team}" for benchmark, team in places), *(["all"] if overall else [])]
    lines = [header]
    for variant, memory in names:
        label = f"{memory}, {variant}" if variant else memory
        cells = [_marked(found.get((variant, memory, *place))) for place in places]
        lines.append([label, *cells, *([_marked(overall.get((variant, memory)))] if overall else [])])
    return lines


def all_cells(table: Row) -> list[list[str]]:
    """Return header and rows of the whole table; the rows over all benchmarks and teams come last."""
    return table_cells(_all_rows(table), NAMES | COMPARISONS | COSTS)


def format_summary(table: Row) -> str:
    """Format the overview for a terminal, with the verdict in words."""
    return "\n".join(["", *aligned(overview(table)), "", LEGEND, *sentences_of(table)])


def format_markdown(table: Row) -> str:
    """Format the overview, the verdict and the whole table as Markdown."""
    return "\n".join(
        [
            markdown_table(overview(table)),
            "",
            escape_markdown(LEGEND),
            "",
            *(f"- {escape_markdown(sentence)}" for sentence in sentences_of(table)),
            "",
            markdown_table(all_cells(table), _num_names(table)),
            "",
            escape_markdown(_notes(table)),
            "",
        ]
    )


def format_latex(table: Row) -> str:
    """Format overview, comparisons and costs as three LaTeX tables, for a document that loads the package booktabs."""
    rows, num_names = _all_rows(table), _num_names(table)
    return "\n".join(
        [
            "% Needs \\usepackage{booktabs}.",
            _tabular(overview(table), 1),
            f"% {escape_latex(LEGEND)}",
            "",
            _tabular(table_cells(rows, NAMES | COMPARISONS), num_names),
            "",
            _tabular(table_cells(rows, NAMES | COSTS), num_names),
            f"% {escape_latex(_notes(table))}",
            "",
        ]
    )


def escape_latex(text: str) -> str:
    r"""Escape text so that LaTeX prints it as it is, with a true minus sign before a number.

    >>> escape_latex("a_b & -5% \\ {x}")
    'a\\_b \\& $-$5\\% \\textbackslash{} \\{x\\}'
    """
    return re.sub(r"[\\{}$&#^_%~<>±°]|(?<!\w)-(?=\d)", lambda match: _LATEX[match.group()], " ".join(text.split()))


_LATEX = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "-": "$-$",
    "°": r"$^\circ$",
    **{character: f"\\{character}" for character in "{}$&#_%"},
}

LEGEND = "Accuracy in percent; * is better and ° worse than none, at 5% after correction for all comparisons."


def _notes(table: Row) -> str:
    return (
        "Accuracy and differences with 95% intervals, in percent and points; each p is after Holm's correction for all "
        f"{table['num_comparisons']} comparisons of the table. Carried: how much likelier right responses are with the "
        "task's own memory than with another task's; its interval is that of one run, means of several have none. "
        "Tokens and seconds are per task. The rows for all benchmarks and teams are means of the rows above them."
    )


def _tabular(cells: Sequence[Sequence[str]], num_names: int) -> str:
    header, *rows = [[*map(escape_latex, line)] for line in cells]
    columns = "l" * num_names + "r" * (len(header) - num_names)
    lines = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", " & ".join(header) + r" \\", "\\midrule"]
    for i, row in enumerate(rows):
        if num_names > 1 and i and row[: num_names - 1] != rows[i - 1][: num_names - 1]:
            lines.append("\\midrule")
        lines.append(" & ".join(row) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def _marked(row: Row | None) -> str:
    if row is None:
        return MISSING
    against = row["vs_none"]
    mark = "" if not against or against["p_holm"] >= 0.05 else "*" if against["difference"] > 0 else "°"
    return f"{100 * row['accuracy']:.1f}{mark}"


def _where(row: Row, *more: str) -> str:
    parts = [row.get("benchmark", "all"), row.get("team", ""), row["variant"], *more]
    return ", ".join(part for part in parts if part)


def _count(items: Sequence[Any] | Mapping[str, Any], one: str, many: str | None = None) -> str:
    return f"{len(items)} {one if len(items) == 1 else many or one + 's'}"


def _versus(baseline: str, cell: Callable[[Row], str], row: Row) -> str:
    return cell(row[f"vs_{baseline}"]) if row.get(f"vs_{baseline}") else MISSING


def _name(key: str, row: Row) -> str:
    return str(row.get(key, "all")) or MISSING


NAMES: dict[str, Callable[[Row], str]] = {
    "benchmark": partial(_name, "benchmark"),
    "team": partial(_name, "team"),
    "variant": partial(_name, "variant"),
    "memory": partial(_name, "memory"),
}
COMPARISONS: dict[str, Callable[[Row], str]] = {
    "accuracy [95%]": accuracy_cell,
    "vs none, points": partial(_versus, "none", points_cell),
    "p vs none": partial(_versus, "none", lambda found: p_cell(found["p_holm"])),
    "vs text, points": partial(_versus, "text", points_cell),
    "p vs text": partial(_versus, "text", lambda found: p_cell(found["p_holm"])),
    "vs real, points": partial(_versus, "real", points_cell),
    "p vs real": partial(_versus, "real", lambda found: p_cell(found["p_holm"])),
    "carried, nats [95%]": carried_cell,
    "errors": errors_cell,
}
COSTS: dict[str, Callable[[Row], str]] = {
    "prompt tok": partial(per_task_cell, "prompt_tokens", 0),
    "latent tok": partial(per_task_cell, "latent_tokens", 0),
    "new tok": partial(per_task_cell, "generated_tokens", 0),
    "memory tok": memory_tokens_cell,
    "s/task": seconds_cell,
}
"""Title and cell function of each column; columns that are empty in every row are left out."""


def _all_rows(table: Row) -> list[Row]:
    return [*table["rows"], *table["overall"]]


def _num_names(table: Row) -> int:
    return len(table_cells(table["rows"], NAMES)[0]) if table["rows"] else 1


def _by_seed(table: Row) -> list[list[str]]:
    """Return header and rows with each run's accuracy and folder."""
    columns: dict[str, Callable[[Row], str]] = {
        **NAMES,
        "seed": lambda cell: str(cell["seed"]),
        "accuracy [95%]": accuracy_cell,
        "folder": lambda cell: f"cells/{cell['run']}",
    }
    return table_cells(table["cells"], columns)


def _picture(table: Row) -> Picture:
    alt = "Accuracy with 95% intervals, a panel for each benchmark and team. " + "; ".join(
        f"{_where(row)}: {row['memory']} {accuracy_cell(row)}" for row in table["rows"]
    )
    drawn = in_both_themes(partial(_draw, table["rows"]))
    return Picture("grid", "Accuracy with 95% intervals", alt, drawn)


def _draw(rows: Sequence[Row], theme: str) -> bytes:
    """Draw benchmarks from left to right, teams from top to bottom, and memories as bars."""
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    teams = list(dict.fromkeys(row["team"] for row in rows))
    names = list(dict.fromkeys((row["variant"], row["memory"]) for row in rows))
    text = THEMES[theme][0]
    figure = Figure(
        figsize=(1.6 + 2.5 * len(benchmarks), (0.75 + 0.26 * len(names)) * len(teams)), layout="constrained"
    )
    panels = figure.subplots(len(teams), len(benchmarks), sharex=True, sharey=True, squeeze=False)
    for row in rows:
        axes = panels[teams.index(row["team"])][benchmarks.index(row["benchmark"])]
        at = names.index((row["variant"], row["memory"]))
        latent = MemoryName.parse(row["memory"]).is_latent
        axes.barh(at, 100 * row["accuracy"], height=0.65, color=COLOURS[0] if latent else "#8a8a8a")
        ends = [100 * row["accuracy_low"], 100 * row["accuracy_high"]]
        axes.plot(ends, [at, at], color=text, linewidth=1.2, marker="|", ms=6)
    labels = [f"{memory}, {variant}" if variant else memory for variant, memory in names]
    for i, team in enumerate(teams):
        for j, benchmark in enumerate(benchmarks):
            axes = panels[i][j]
            axes.set_title(f"{label(benchmark)}, {label(team)}", color=text, fontsize=8, loc="left")
            axes.title.set_parse_math(False)
            dress(axes, theme)
            axes.grid(visible=False, axis="y")
            if i == len(teams) - 1:
                axes.set_xlabel("accuracy, %", color=text)
    panels[0][0].set_yticks(range(len(names)), [label(name) for name in labels])
    panels[0][0].set_ylim(len(names) - 0.4, -0.6)
    panels[0][0].set_xlim(left=0)
    for line in panels:
        for tick in line[0].get_yticklabels():
            tick.set_parse_math(False)
    return png(figure)
