"""The comparison of memories as text: aligned for a terminal, or as Markdown, with the verdict below."""

import re
from collections.abc import Sequence

from latentmem.report.cells import comparison_cells, group_cells
from latentmem.report.values import Row
from latentmem.report.verdict import verdict


def format_table(results: Row) -> str:
    """Format the comparison of memories for a terminal: aligned columns, with the verdict in words below."""
    header, *rows = comparison_cells(results)
    rule = ["-" * max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = aligned([header, rule, *rows])
    if groups := group_cells(results):
        lines += ["", *aligned(groups)]
    return "\n".join([*(line.rstrip() for line in lines), "", *verdict(results)]) + "\n"


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table for a terminal: the first column aligned left, the others right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]


def format_markdown(results: Row) -> str:
    """Format the comparison of memories as a Markdown table, followed by the verdict in words."""
    tables = [markdown_table(comparison_cells(results)), ""]
    if groups := group_cells(results):
        tables += [markdown_table(groups), ""]
    return "\n".join([*tables, *(f"- {escape_markdown(sentence)}" for sentence in verdict(results))]) + "\n"


def markdown_table(cells: Sequence[Sequence[str]], num_names: int = 1) -> str:
    """Format header and rows as a Markdown table: the first `num_names` columns aligned left, the others right."""
    header, *rows = [[*map(escape_markdown, row)] for row in cells]
    marks = ["---" if i < num_names else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows])


def escape_markdown(text: str) -> str:
    """Escape text so that Markdown, and HTML within it, show it unchanged."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", flat)
