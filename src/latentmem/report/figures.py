"""The look of every figure of a report: drawn for light and for dark pages, transparent, with a text beside it."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; styles and markers repeat the distinction."""

STYLES = ("-", "--", "-.", ":")

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One more than there are colours, so that a pair of colour and marker repeats only after 42."""

THEMES = {"light": ("#222222", "#d0d0d0"), "dark": ("#e4e4e4", "#4a4a4a")}
"""Colours of text and grid, by theme, on transparent figures."""


@dataclass(frozen=True)
class Picture:
    """A figure in both themes, with a text that tells what it shows."""

    name: str
    title: str
    alt: str
    png: dict[str, bytes]

    def uri(self, theme: str) -> str:
        """Return the figure as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png[theme]).decode()


def in_both_themes(draw: Callable[[str], bytes]) -> dict[str, bytes]:
    """Return the PNG of each theme; `draw` receives the theme's name."""
    return {theme: draw(theme) for theme in THEMES}


def dress(axes: Any, theme: str) -> None:
    """Style axes quietly: a grid behind the data, small labels, no frame."""
    text, grid = THEMES[theme]
    axes.set_facecolor("none")
    axes.grid(color=grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=text, labelsize=8, length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=text, fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def add_legend(axes: Any, theme: str, **options: Any) -> None:
    """Add a legend in the theme's colours; names are shown as plain text, never as mathematics."""
    legend = axes.legend(fontsize=8, frameon=False, labelcolor=THEMES[theme][0], **options)
    for text in legend.get_texts():
        text.set_parse_math(False)


def png(figure: Figure) -> bytes:
    """Render the figure as a transparent PNG."""
    FigureCanvasAgg(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=160, transparent=True)
    return buffer.getvalue()


def label(name: Any) -> str:
    """Return a name as a figure can show it: in ASCII, shortened, without leading underscores, which would hide it."""
    text = ascii(str(name))[1:-1].lstrip("_")
    return text if len(text) <= 28 else f"{text[:13]}..{text[-13:]}"
