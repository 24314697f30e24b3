"""The names of memories in configurations and results; this module alone takes them apart.

none   text   metagpt   voyager   generative   oagents   gmemory
latent:CHECKPOINT    untrained, a training of this run (warmup, sft, lmpo), or a composer's folder
grpo   grpo:FOLDER   the agents that this run trained, or that were trained elsewhere
MODULE:NAME          a class of the user's own
NAME:CONTROL         a control of the memory NAME: replaces part of what it recalls (docs/analysis.md)
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from latentmem.errors import suggest
from latentmem.own import is_own

TEXT_CONTROLS = ("empty", "shuffle", "irrelevant", "corrupt", "filler")
"""Controls that change what a memory is made from."""

LATENT_CONTROLS = ("other-role", "random", "zero")
"""Controls that replace latents, or what only latents depend on; they exist for latent memories alone."""

CONTROLS = (*TEXT_CONTROLS, *LATENT_CONTROLS)

_OLDER_CONTROLS = {"other-task": "irrelevant"}
"""Control names of older configurations and results, with their present names."""

TRAININGS = ("warmup", "sft", "lmpo")
"""Phases of a run that leave a composer."""


@dataclass(frozen=True)
class Kind:
    """Properties that all memories of a kind share."""

    needs_bank: bool = True
    learns: bool = False
    """Whether a language model takes notes on the bank before the memory is used."""
    controls: tuple[str, ...] = ()
    """Controls that may follow the name."""


KINDS: Mapping[str, Kind] = {
    "none": Kind(needs_bank=False),
    "text": Kind(controls=TEXT_CONTROLS),
    "latent": Kind(controls=CONTROLS),
    "grpo": Kind(needs_bank=False),
    "metagpt": Kind(controls=TEXT_CONTROLS),
    "voyager": Kind(learns=True),
    "generative": Kind(learns=True),
    "oagents": Kind(learns=True),
    "gmemory": Kind(learns=True),
}

_WITH_CHECKPOINT = ("latent", "grpo")


def _kind(name: str) -> Kind:
    return KINDS.get(name, Kind())


@dataclass(frozen=True)
class MemoryName:
    """A memory's name, taken apart; `str()` returns it as it was written."""

    kind: str
    checkpoint: str = ""
    """For `latent` and `grpo`: a phase of this run, or a folder; empty where `grpo` stands alone."""
    control: str | None = None
    written: str = field(default="", compare=False)

    @classmethod
    def parse(cls, text: str) -> "MemoryName":
        """Take any text apart, without checking that such a memory exists. Folders may contain colons.

        >>> name = MemoryName.parse("latent:runs/a:b:random")
        >>> name.kind, name.checkpoint, name.control, str(name)
        ('latent', 'runs/a:b', 'random', 'latent:runs/a:b:random')
        >>> MemoryName.parse("text:other-task").control, MemoryName.parse("text:random").control
        ('irrelevant', None)
        """
        before, _, last = text.rpartition(":")
        control = _OLDER_CONTROLS.get(last, last)
        kind, _, rest = before.partition(":")
        # A latent memory names its checkpoint first: in `latent:random`, `random` is a folder of that name.
        if (bool(rest) == (kind == "latent")) and control in _kind(kind).controls:
            return cls(kind, rest, control, text)
        kind, _, rest = text.partition(":")
        return cls(kind, rest, None, text)

    def __str__(self) -> str:
        return self.written

    @property
    def real(self) -> "MemoryName":
        """The memory that this control belongs to; the name itself if it is not a control."""
        if self.control is None:
            return self
        return replace(self, control=None, written=self.written.rpartition(":")[0])

    @property
    def is_own(self) -> bool:
        """Whether the name is a user's class, `module:Name`."""
        return self.kind not in KINDS and is_own(self.written)

    @property
    def is_latent(self) -> bool:
        """Whether it is a latent memory, or a control of one."""
        return self.kind == "latent"

    @property
    def is_trained(self) -> bool:
        """Whether it is a latent memory that was trained, or a control of one."""
        return self.is_latent and self.checkpoint != "untrained"

    @property
    def weights(self) -> str:
        """The training or folder that the memory's weights come from; for others the kind, which is no training."""
        return self.checkpoint or self.kind

    @property
    def needs_bank(self) -> bool:
        """Whether the memory recalls from a bank."""
        return _kind(self.kind).needs_bank

    @property
    def learns(self) -> bool:
        """Whether a language model takes notes on the bank for the memory."""
        return _kind(self.kind).learns

    @property
    def may_carry(self) -> bool:
        """Whether to measure what the memory carries. Controls are not measured: others are measured against them."""
        return self.needs_bank and self.control is None

    @property
    def file_stem(self) -> str:
        """The stem of the memory's files: its name where that makes a plain file name, else a part and a hash.

        >>> MemoryName.parse("latent:lmpo").file_stem, MemoryName.parse("latent:../a run/best").file_stem
        ('latent-lmpo', 'latent-.._a_run_best-6eb40009')
        """
        text = self.written
        if re.fullmatch(rf"[a-z]{{1,20}}(:[a-z]{{1,20}})?(:({'|'.join([*CONTROLS, *_OLDER_CONTROLS])}))?", text):
            return text.replace(":", "-")
        readable = re.sub(r"[^\w.]+", "_", text.partition(":")[2] or text)[-40:].strip("_")
        return f"{text.partition(':')[0]}-{readable}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


DEFAULT_MEMORIES = tuple(map(MemoryName.parse, ("none", "text", "latent:untrained", "latent:sft", "latent:lmpo")))


def known_memory(text: str) -> MemoryName:
    """Parse a name that a user gives, and check it.

    Raises:
        ValueError: there is no such memory; the message suggests one.
    """
    name = MemoryName.parse(text)
    last = text.rpartition(":")[2]
    if name.is_own:
        return name
    if name.kind in ("text", "metagpt") and name.checkpoint in LATENT_CONTROLS:
        raise ValueError(
            f"names {text!r}, but {last} is a control for latents, and {name.kind} has none; take one of "
            f"{', '.join(TEXT_CONTROLS)}, or a latent memory"
        )
    if name.kind in ("text", "metagpt") and name.checkpoint:
        known = [f"{name.kind}:{control}" for control in TEXT_CONTROLS]
        raise ValueError(f"names {text!r}, which is not a memory; {suggest(text, known)}")
    has_what_it_needs = bool(name.checkpoint) or (str(name.real) == name.kind and not name.is_latent)
    if name.kind not in KINDS or not has_what_it_needs or (name.checkpoint and name.kind not in _WITH_CHECKPOINT):
        rivals = [kind for kind in KINDS if kind not in ("none", "text", "latent", "grpo")]
        known = [*map(str, DEFAULT_MEMORIES), "latent:warmup", "latent:FOLDER", *rivals, "grpo", "grpo:FOLDER"]
        raise ValueError(f"names {text!r}, which is not a memory; {suggest(text, known)}")
    of_run = re.fullmatch(rf"(untrained|{'|'.join(TRAININGS)}):.*", name.checkpoint)
    if name.is_latent and of_run:
        known = [f"latent:{of_run[1]}:{control}" for control in CONTROLS]
        raise ValueError(f"names {text!r}, which is not a memory; {suggest(text, known)}")
    return name
