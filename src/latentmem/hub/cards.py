"""The README.md that goes to the hub with a checkpoint or a bank: what it is, how it was made, how to use it."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from latentmem.bank.reports import BankInfo
from latentmem.config import MemorySection
from latentmem.memory.checkpoints import NAMES, Kind
from latentmem.memory.composer import TEMPLATE, composer_words

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN = {
    "base_model": "base model",
    "agents": "agents",
    "num_latents": "latents (K)",
    "slots": "of them slots for words",
    "rank": "LoRA rank",
    "alpha": "LoRA alpha",
    "target_modules": "LoRA on",
    "d_composer": "width of the composer",
    "d_agent": "width of the agents",
    "max_prompt_tokens": "longest text read, tokens",
}


class Origin(NamedTuple):
    """The run that a checkpoint was trained in."""

    phase: str
    step: int
    configuration: Mapping[str, Any]
    """The run's configuration, resolved."""
    results: str | None
    """The run's comparison of memories as Markdown; None if it has none, or none of this checkpoint."""


def checkpoint_card(repo: str, kind: Kind, settings: Mapping[str, Any], origin: Origin | None) -> str:
    """Write the card of a checkpoint."""
    base = settings.get("base_model", settings.get("agents"))
    head: dict[str, Any] = {"library_name": "latentmem", "tags": ["latentmem", "multi-agent", "memory"]}
    if isinstance(base, str) and _HUB_ID.fullmatch(base) and not Path(base).exists():
        head["base_model"] = base
    rows = {"kind": NAMES[kind]}
    rows |= {title: _cell(settings[key]) for key, title in _SHOWN.items() if settings.get(key) is not None}
    if isinstance(template := settings.get("template"), str):
        digest = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        rows["template"] = f"sha256 {digest}, {'built in' if template == TEMPLATE else 'its own, in composer.json'}"
    if origin is not None:
        data = origin.configuration.get("data", {})
        teams = origin.configuration.get("train_teams") or [origin.configuration.get("team")]
        rows |= {
            "trained by": f"{origin.phase}, {origin.step} steps",
            "data": _cell(data.get("kind")),
            "team": _cell([*map(str, teams)]),
            "seed": _cell(origin.configuration.get("seed")),
        }
    name = "latent" if kind == "composer" else "grpo"
    parts = [
        f"# {NAMES[kind].capitalize()} of LatentMem",
        _about(kind),
        _table(rows),
        "## How to use it",
        f"```sh\nlatentmem checkpoint pull {repo} my-checkpoint\n"
        f"latentmem evaluate CONFIG 'evaluate.memories=[none, \"{name}:my-checkpoint\"]'\n```",
        "The configuration has to say:",
        f"```yaml\n{yaml.safe_dump(_configuration(kind, settings), sort_keys=False, allow_unicode=True)}```",
    ]
    if kind == "composer":
        parts.append('From Python: `Composer.from_pretrained("my-checkpoint")`, of `latentmem.memory.composer`.')
    if origin is not None and origin.results is not None:
        named = f"latent:{origin.phase}" if kind == "composer" else origin.phase
        parts += ["## Results", f"In the table this checkpoint is `{named}`.", origin.results.strip()]
    return _page(head, parts)


def bank_card(repo: str, info: BankInfo) -> str:
    """Write the card of a bank: its counts, and no text of a trajectory."""
    rows = {
        "trajectories": str(info.num_trajectories),
        "successes": str(info.num_successes),
        "embedder": _cell(info.embedder),
        "schema": str(info.schema_version),
    }
    for title in ("domains", "teams", "models", "roles"):
        counts: Mapping[str, int] = getattr(info, title)
        rows[title] = ", ".join(f"{_cell(name)} {count}" for name, count in counts.items()) or "none"
    return _page(
        {"tags": ["latentmem", "multi-agent", "trajectories"]},
        [
            "# Experience bank of LatentMem",
            "Trajectories of a team of LLM agents in one SQLite file. They hold prompts and responses as they were.",
            _table(rows),
            "## How to use it",
            f"```sh\nlatentmem bank pull {repo} bank.sqlite\nlatentmem evaluate CONFIG bank.path=bank.sqlite\n```",
        ],
    )


def _about(kind: Kind) -> str:
    if kind == "composer":
        return (
            "It turns the text of retrieved trajectories into latent tokens for each role of a team of LLM agents, "
            "whose own weights stay as they are."
        )
    return "A LoRA of the agents themselves, trained on the team's reward, without memory."


def _configuration(kind: Kind, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration must say to load the checkpoint; template and words only if not the default."""
    values: dict[str, Any] = {"model": {"name": settings.get("agents")}}
    if kind == "agents":
        return values | {"grpo": {key: settings[key] for key in ("rank", "alpha", "target_modules") if key in settings}}
    keys = ("num_latents", "rank", "alpha", "target_modules", "max_prompt_tokens", "slots", "sharpness", "cue")
    composer = {key: settings[key] for key in keys if settings.get(key) is not None}
    if settings.get("base_model") != settings.get("agents"):
        composer = {"model": settings.get("base_model"), **composer}
    if settings.get("template") != TEMPLATE:
        composer["template"] = settings.get("template")
    usual = composer_words(MemorySection())
    words = {key: text for key, text in settings.get("words", usual).items() if text != usual.get(key)}
    return values | {"composer": composer} | ({"memory": words} if words else {})


def _cell(value: Any) -> str:
    texts = [*map(str, value)] if isinstance(value, list) else [str(value)]
    return ", ".join(f"`{' '.join(text.split()).replace('`', '').replace('|', '/')}`" for text in texts)


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {title} | {cell} |" for title, cell in rows.items())])


def _page(head: Mapping[str, Any], parts: list[str]) -> str:
    return f"---\n{yaml.safe_dump(dict(head), sort_keys=False)}---\n\n" + "\n\n".join(parts) + "\n"
