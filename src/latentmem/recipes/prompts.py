"""Show what each agent reads for one task, and where the words come from."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from latentmem.config import (
    Config,
    MemorySection,
    MixSection,
    OwnDataSection,
    ProgramSection,
    QASection,
    RivalsSection,
    Sampling,
)
from latentmem.environments.environment import Split
from latentmem.errors import BankError
from latentmem.memory.composer import Composer
from latentmem.memory.controls import ControlMemory
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import Memory
from latentmem.memory_names import MemoryName
from latentmem.own import is_own
from latentmem.prompts import format_prompts
from latentmem.recipes.domains import task_to_show
from latentmem.recipes.memories import catch_up, learned, memory_of, notes_path, recalling
from latentmem.recipes.parts import Parts
from latentmem.recipes.phase import say
from latentmem.rollout import rollout
from latentmem.teams.team import shown_by, team_file
from latentmem.teams.turn import Player


def show_prompts(config: Config, split: Split = "train", number: int = 1, memory: str | None = None) -> None:
    """Play one task and print exactly what each agent reads, and where the words come from; nothing is stored.

    Args:
        config: the experiment.
        split: the split of the task.
        number: the task's number in its split, from 1.
        memory: a name as in `evaluate.memories`; None means latent:untrained if the run has a bank, else none.

    Raises:
        ConfigError: the split has fewer tasks, or none.
        BankError: the memory needs a bank, and there is none.
    """
    parts = Parts(config)
    task, which = task_to_show(parts.tasks, split, number)
    has_bank = parts.has_bank
    name = MemoryName.parse(memory or ("latent:untrained" if has_bank else "none"))
    if name.needs_bank and not has_bank:
        raise BankError(
            f"{parts.bank_place}: memory {name} needs a bank, and there is none yet; run `latentmem collect` with this "
            "configuration first, or show memory none"
        )
    num_turns = min(config.max_turns, 2)
    limit = parts.sampling.max_response_tokens
    with TemporaryDirectory() as scratch:
        chosen, source = _shown_memory(parts, name, Path(scratch))
        rollouts = rollout(
            parts.team,
            chosen,
            parts.model,
            [task],
            parts.domain.start,
            sampling=Sampling(temperature=0, max_response_tokens=limit),
            max_turns=num_turns,
        )
    bank = f", of {len(parts.bank)} trajectories in {parts.bank_place}{source}" if name.needs_bank else ""
    latent = chosen.memory if isinstance(chosen, ControlMemory) else chosen
    composer = latent.composer if isinstance(latent, LatentMemory) else None
    spent = rollouts.spent
    asked = (
        f"To recall it, language models read {spent.prompt_tokens} tokens and wrote {spent.generated_tokens}.\n"
        if spent.prompt_tokens
        else ""
    )
    say(
        f"{which}\n"
        f"memory {name}{bank}\n{asked}"
        f"The responses that others read are real: {parts.model.name}, greedy, at most {limit} tokens each; "
        f"{num_turns} of at most {config.max_turns} turns.\n\n"
        f"{format_prompts(parts.model, rollouts.trajectories[0], composer)}\n\n"
        f"{_origins(config, parts.team, name)}{_templates(config, composer)}{_rivals_words(config, name)}"
    )


def _shown_memory(parts: Parts, name: MemoryName, scratch: Path) -> tuple[Memory, str]:
    """Return a memory to show, and where its notes come from; what it has yet to learn it learns for this page only."""
    if not name.learns:
        return memory_of(parts, name), ""
    memory = learned(parts, name.kind, recalling(parts, parts.bank), scratch)
    path, known, num_all = notes_path(parts, name.kind), len(memory.learned), len(parts.bank)
    if known == num_all:
        return memory, f", as learned in {path}"
    catch_up(memory)
    return memory, f"; {num_all - known} of them, which {path} lacks, were learned for this page and not kept"


def _written_in(config: Config) -> str:
    """Return where a team's prompts are written."""
    if isinstance(config.team, ProgramSection):
        return config.team.shown
    return config.team if is_own(config.team) else str(team_file(config.team))


def _origins(config: Config, team: Player, memory: MemoryName) -> str:
    """Tell where the words of a prompt come from, and which key replaces them."""

    def origin(value: str | None) -> str:
        return "built in" if value is None else "set in the configuration"

    own = "each part's own"
    how_to_answer = own if isinstance(config.data, MixSection | OwnDataSection) else origin(config.data.instructions)
    if "instructions" not in shown_by(team):
        how_to_answer = f"not shown: no prompt of team {team.name} has {{instructions}}"
    search = config.data.search if isinstance(config.data, QASection) else None
    how_to_search = [("and to search", "data.search.instructions", origin(search.instructions))] if search else []
    changed = [f"memory.{key}" for key, value in config.memory if value != getattr(MemorySection(), key)]
    rows = [
        ("the team's prompts", "team", _written_in(config)),
        ("how to answer", "data.instructions", how_to_answer),
        *how_to_search,
        ("form of the chat", "model.name", f"the tokenizer of {config.model.name}"),
    ]
    if memory.needs_bank:
        words = "set in the configuration: " + ", ".join(changed) if changed else "built in"
        rows.append(("words of the memory", "memory", words))
    rated = memory.kind in ("generative", "gmemory") or (
        memory.kind in ("text", "latent") and config.bank.rating != "none"
    )
    if rated:
        rows.append(("how ratings are asked", "bank.rating_template", origin(config.bank.rating_template)))
        rows.append(("and its system prompt", "bank.rating_system", origin(config.bank.rating_system)))
    for section in _RIVALS_SECTIONS.get(memory.kind, ()):
        same = getattr(config.rivals, section) == getattr(RivalsSection(), section)
        rows.append((f"what {memory} asks and tells", f"rivals.{section}", origin(None if same else "")))
    if memory.is_latent:
        rows.append(("the composer's text", "composer.template", origin(config.composer.template)))
    table = [("what", "key that replaces it", "where it comes from now"), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(2)]
    lines = [f"{what:{widths[0]}}  {key:{widths[1]}}  {where}" for what, key, where in table]
    return "\n".join(["==== where these words come from", *lines])


def _templates(config: Config, composer: Composer | None) -> str:
    """Return the words around what the composer reads, ready to be copied into a configuration."""
    if composer is None:
        return ""
    words = "\n".join(f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in config.memory)
    return f"\n\n==== the keys of memory\nmemory:\n{words}\n==== composer.template\n{composer.template}"


_RIVALS_SECTIONS = {
    "voyager": ["voyager"],
    "generative": ["generative"],
    "oagents": ["insights"],
    "gmemory": ["gmemory", "insights"],
}
"""The sections of `rivals` that each memory reads."""


def _rivals_words(config: Config, memory: MemoryName) -> str:
    """Return the prompts of a memory that learns, ready to be copied into a configuration."""
    sections = {name: getattr(config.rivals, name).model_dump() for name in _RIVALS_SECTIONS.get(memory.kind, ())}
    if not sections:
        return ""
    lines = [
        f"  {name}:\n" + "\n".join(f"    {key}: {json.dumps(v, ensure_ascii=False)}" for key, v in values.items())
        for name, values in sections.items()
    ]
    return "\n\n==== the keys of rivals\nrivals:\n" + "\n".join(lines)
