"""How every figure of a report looks: drawn twice, for light and dark pages, transparent, with words beside it."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's palette, told apart by colour-blind readers; line styles and markers tell the same again."""

STYLES = ("-", "--", "-.", ":")

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One more than there are colours, so that a pair of both comes back only after 42."""

THEMES = {"light": ("#222222", "#d0d0d0"), "dark": ("#e4e4e4", "#4a4a4a")}
"""Colours of text and grid on transparent figures."""


@dataclass(frozen=True)
class Picture:
    """A figure in both themes, with what it shows in words."""

    name: str
    title: str
    alt: str
    png: dict[str, bytes]

    def uri(self, theme: str) -> str:
        """The figure itself as an address."""
        return "data:image/png;base64," + base64.b64encode(self.png[theme]).decode()


def in_both_themes(draw: Callable[[str], bytes]) -> dict[str, bytes]:
    """The PNG of each theme; `draw` is given its name."""
    return {theme: draw(theme) for theme in THEMES}


def dress(axes: Any, theme: str) -> None:
    """Quiet axes: a grid behind the data, small labels, no frame."""
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
    """A legend in the theme's colours; names are text, whatever they hold."""
    legend = axes.legend(fontsize=8, frameon=False, labelcolor=THEMES[theme][0], **options)
    for text in legend.get_texts():
        text.set_parse_math(False)


def png(figure: Figure) -> bytes:
    """The figure as a transparent PNG."""
    FigureCanvasAgg(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=160, transparent=True)
    return buffer.getvalue()


def label(name: Any) -> str:
    """A name as a figure can show it: glyphs its font lacks as escapes, no leading underscore (which hides it)."""
    text = ascii(str(name))[1:-1].lstrip("_")
    return text if len(text) <= 28 else f"{text[:13]}..{text[-13:]}"
