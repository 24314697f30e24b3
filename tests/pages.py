"""The pages of the documentation as blocks: what stands in their fences, and the commands in it as bash reads them."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]

_RECORD = r"""
record() { printf '%s\0' "$PWD" "$#" "$@" >> "$RECORDED"; }
command_not_found_handle() { record "$@"; }
source() { record source "$@"; }
.ci/run() { record .ci/run "$@"; }
.venv/bin/python() { record .venv/bin/python "$@"; }
PATH=/nowhere
"""
"""No program is found, so bash hands over each one's words, with variables and quotes worked out."""


@dataclass(frozen=True)
class Block:
    """A fence, or an indented block."""

    page: str
    line: int
    language: str
    """As the fence names it; of an indented block "indented"."""
    text: str

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One program that a block starts."""

    words: tuple[str, ...]
    folder: Path
    told: tuple[str, ...] = ()
    """What the page shows below it; none where the block is commands alone."""


def blocks(page: str) -> list[Block]:
    """All blocks of a page, from the top."""
    tokens = MarkdownIt("commonmark").parse((ROOT / page).read_text(encoding="utf-8"))
    return [
        Block(page, token.map[0] + 1, token.info if token.type == "fence" else "indented", token.content)
        for token in tokens
        if token.type in ("fence", "code_block") and token.map
    ]


def commands(block: Block, folder: Path) -> list[Command]:
    """What a block of commands starts, in order; in `console` after a dollar sign, with what they print."""
    if block.language != "console":
        return _recorded(block.text, folder)
    found: list[Command] = []
    typed: list[str] = []
    for line in block.text.splitlines():
        if line.startswith("$ ") or (typed and typed[-1].endswith("\\")):
            typed.append(line.removeprefix("$ "))
            if not line.endswith("\\"):
                found += _recorded("\n".join(typed), folder)
                typed = []
        elif line:
            last = found.pop()
            found.append(Command(last.words, last.folder, (*last.told, line)))
    return found


def _recorded(script: str, folder: Path) -> list[Command]:
    recorded = folder / ".commands"
    recorded.write_bytes(b"")
    subprocess.run(
        ["bash", "--norc", "-euc", _RECORD + script],
        cwd=folder,
        env={"RECORDED": str(recorded)},
        check=True,
        timeout=60,
    )
    fields = recorded.read_text(encoding="utf-8").split("\0")[:-1]
    recorded.unlink()
    found = []
    while fields:
        where, count = fields[0], int(fields[1])
        found.append(Command(tuple(fields[2 : 2 + count]), Path(where)))
        fields = fields[2 + count :]
    return found
