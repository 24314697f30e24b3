"""Show how far long work has come: a bar on a terminal, a line every half minute in a log file."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from tqdm import tqdm


class _Lines:
    """Standard error without a terminal: each state of a progress bar becomes a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def on_terminal() -> bool:
    """Return whether standard error is a terminal, so that a person can see a bar."""
    return sys.stderr.isatty()


@contextmanager
def working(what: str, shown: bool = True) -> Iterator[None]:
    """Name work that has no steps while it goes on: on a terminal until it ends, in a log file as a line."""
    live = on_terminal()
    if shown:
        sys.stderr.write(what if live else f"{what}\n")
        sys.stderr.flush()
    try:
        yield
    finally:
        if shown and live:
            sys.stderr.write("\r\x1b[K")  # back to the line's beginning, which is then cleared
            sys.stderr.flush()


@contextmanager
def progress(total: int, name: str, unit: str, initial: int = 0, shown: bool = True) -> Iterator[Any]:
    """Show a bar on standard error, or a line every half minute in a log file. Yields tqdm's bar."""
    live = on_terminal()
    with tqdm(
        total=total,
        desc=name,
        unit=unit,
        initial=initial,
        miniters=1,
        mininterval=0.5 if live else 30.0,
        file=sys.stderr if live else cast(TextIO, _Lines()),
        dynamic_ncols=live,
        disable=not shown,
    ) as bar:
        yield bar
