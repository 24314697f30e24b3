"""Make each memory from its name in the configuration, and tell what it is made of."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentmem import own
from latentmem.bank import ExperienceBank
from latentmem.files import write_atomic
from latentmem.memory.checkpoints import kind_of, weights_file
from latentmem.memory.controls import (
    ControlMemory,
    Replace,
    another_of,
    corrupted,
    empty,
    filler,
    irrelevant,
    other_role,
    random_latents,
    shuffled,
    zero_latents,
)
from latentmem.memory.graph import Graph
from latentmem.memory.insights import Insights
from latentmem.memory.latent import LatentMemory
from latentmem.memory.learned import LearnedMemory, Method, Scribe, Similarity
from latentmem.memory.memory import Memory, NoMemory
from latentmem.memory.rating import Rater
from latentmem.memory.stream import Stream
from latentmem.memory.summaries import Summaries
from latentmem.memory.text import TextMemory
from latentmem.memory_names import MemoryName
from latentmem.processes import Processes
from latentmem.progress import progress
from latentmem.recipes.parts import Parts
from latentmem.seeds import stream_seed
from latentmem.trajectory import Trajectory

logger = logging.getLogger(__name__)

_LOOKED_AT = 64
"""Failures of a bank that are checked for feedback."""


def memory_of(parts: Parts, name: MemoryName, copies: Path | None = None) -> Memory:
    """Make a memory by its name; with `copies`, over a copy of the bank in that folder."""
    if name.kind == "none":
        return NoMemory()
    if name.kind == "grpo":
        parametric = parts.parametric_memory()
        parametric.load_weights(parts.checkpoint(name.checkpoint or "grpo"))
        return parametric
    if name.control is not None:
        replace = _replace(parts, name.control)  # reports a mistake in it before a model is loaded
    bank = parts.bank if copies is None else parts.bank_copy(copies / f"{name.file_stem}.sqlite")
    if name.is_own:
        return own_memory(parts, name, bank)()
    if name.learns:
        return learned(parts, name.kind, recalling(parts, bank), copies)
    latent = name.is_latent
    memory = latent_memory(parts, parts.initial(name.checkpoint), bank) if latent else _text(parts, bank, name.kind)
    return memory if name.control is None else ControlMemory(memory, replace)


def own_memory(parts: Parts, name: MemoryName, bank: ExperienceBank | None = None) -> Callable[[], Memory]:
    """Return a function that makes a memory of a user's own class; check its name and parameters now.

    The class may ask for `bank`, `model` (the agents), `embedder`, `num_retrieved`, `only_successes` and `words`.
    """
    section = parts.config.bank
    offered: dict[str, Callable[[], Any]] = {
        "bank": lambda: parts.bank if bank is None else bank,
        "model": lambda: parts.model,
        "embedder": lambda: parts.embedder,
        "num_retrieved": lambda: section.num_retrieved,
        "only_successes": lambda: section.only_successes,
        "words": lambda: parts.config.memory,
    }
    parameters = parts.config.own.get(str(name), {})
    return own.bind(str(name), parameters, f"own.{name}", ("kind", "recall_many", "add"), offered)


def _text(parts: Parts, bank: ExperienceBank, kind: str) -> TextMemory:
    section = parts.config.bank
    rate = rater_of(parts) if kind == "text" else None
    return TextMemory(recalling(parts, bank), section.num_retrieved, section.only_successes, rate, parts.config.memory)


def _replace(parts: Parts, control: str) -> Replace:
    seed = stream_seed(parts.config.seed, control)
    controls: Mapping[str, Callable[[], Replace]] = {
        "empty": empty,
        "shuffle": lambda: shuffled(seed),
        "irrelevant": lambda: irrelevant(another_of(parts.asked_tasks, seed)),
        "corrupt": lambda: corrupted(seed),
        "filler": filler,
        "other-role": lambda: other_role(parts.known_roles("the control other-role")),
        "random": lambda: random_latents(seed),
        "zero": zero_latents,
    }
    return controls[control]()


def latent_memory(parts: Parts, weights: Path | None = None, bank: ExperienceBank | None = None) -> LatentMemory:
    """Make a latent memory with a new composer, untrained or with the weights in a folder."""
    section = parts.config.bank
    memory = LatentMemory(
        recalling(parts, bank or parts.bank),
        parts.composer(),
        section.num_retrieved,
        section.only_successes,
        rate=rater_of(parts),
    )
    if weights is not None:
        memory.composer.load_weights(weights)
    return memory


# Memories that learn


def methods(parts: Parts) -> Mapping[str, Callable[[], Method]]:
    """Return the methods of the memories that learn with a language model's help, by name."""
    section, words = parts.config.rivals, parts.config.memory
    k, only = parts.config.bank.num_retrieved, parts.config.bank.only_successes

    def scribe() -> Scribe:
        return Scribe(parts.model, section.max_response_tokens, section.max_episode_characters)

    def stream() -> Method:
        prompt, system = section.generative.importance, section.generative.importance_system
        limit = parts.config.bank.rating_max_tokens
        importance = Rater(parts.model, prompt, limit, system=system, words=words, needed=["episode"])
        raters = {"model": parts.model.name, "rating_max_tokens": limit}
        return Stream(_relevance(parts), importance, k, section.generative, words, raters, only_successes=only)

    return {
        "voyager": lambda: Summaries(
            scribe(), Similarity(parts.embedder), k, section.voyager, words, only_successes=only
        ),
        "generative": stream,
        "oagents": lambda: Insights(scribe(), k, section.insights, words, only_successes=only),
        "gmemory": lambda: Graph(
            scribe(),
            Similarity(parts.embedder),
            _relevance(parts),
            k,
            section.gmemory,
            section.insights,
            words,
            only_successes=only,
        ),
    }


def notes_path(parts: Parts, kind: str) -> Path:
    """Return the file where a memory that learns keeps its notes on the bank."""
    return Path(parts.config.run) / "memories" / f"{kind}.json"


def learning(parts: Parts, name: MemoryName, copies: Path | None = None) -> dict[str, Any] | None:
    """Return what a memory spent on learning, and from how many trajectories; None for memories that do not learn."""
    if not name.learns:
        return None
    memory = learned(parts, name.kind, parts.bank, copies)
    return {"num_trajectories": len(memory.learned), **memory.costs}


def learned(parts: Parts, kind: str, bank: ExperienceBank, copies: Path | None = None) -> LearnedMemory:
    """Make a memory that learns, with its notes; with `copies`, it uses a copy of the notes in that folder."""
    path = notes_path(parts, kind)
    if copies is not None:
        copy = copies / path.name
        if path.exists() and not copy.exists():
            write_atomic(copy, path.read_bytes())
        path = copy
    return LearnedMemory(bank, methods(parts)[kind](), path, parts.config.rivals.batch_size)


def learn(memory: Memory, processes: Processes, shown: bool = False) -> None:
    """Let a memory that learns catch up with the bank: the first process learns, the others then read its notes."""
    if processes.is_first and isinstance(memory, LearnedMemory):
        catch_up(memory, shown)
    processes.wait()
    if not processes.is_first and isinstance(memory, LearnedMemory):
        memory.learn()


def catch_up(memory: LearnedMemory, shown: bool = True) -> None:
    """Let a memory learn the trajectories of the bank that its notes lack."""
    num_all, known = len(memory.bank), len(memory.learned)
    with progress(num_all, f"{memory.kind} learns", "episode", known, shown and known < num_all) as bar:
        memory.learn(lambda num: bar.update(num - bar.n))


# What they share


def rater_of(parts: Parts) -> Rater | None:
    """Return the rater of candidates for a recall; None if they are not rated."""
    return None if parts.config.bank.rating == "none" else _relevance(parts)


def _relevance(parts: Parts) -> Rater:
    """Make a rater for one memory: a rater keeps its ratings, and each compared memory must pay for its own."""
    section = parts.config.bank
    return Rater(
        parts.model,
        section.rating_template,
        section.rating_max_tokens,
        system=section.rating_system,
        words=parts.config.memory,
    )


def made_of(parts: Parts, name: MemoryName) -> str:
    """Describe what a memory depends on: the size of the bank, the notes learned from it, the trained weights."""
    if name.kind == "none":
        return ""
    if name.kind == "grpo":
        return f"weights {_digest(parts.checkpoint(name.checkpoint or 'grpo'))}"
    bank = f"bank of {len(parts.bank)}"
    if name.learns:
        return f"{bank}, notes {learned(parts, name.kind, parts.bank).digest}"
    if not name.is_trained:
        return bank
    return f"{bank}, weights {_digest(parts.checkpoint(name.checkpoint))}"


def _digest(checkpoint: Path) -> str:
    return hashlib.sha256(weights_file(checkpoint, kind_of(checkpoint)).read_bytes()).hexdigest()


def recalling(parts: Parts, bank: ExperienceBank) -> ExperienceBank:
    """Return the bank; warn once if recalling only its successes leaves out what matters."""
    if parts.has_warned or not parts.config.bank.only_successes:
        return bank
    info = bank.info()
    num_failures = info.num_trajectories - info.num_successes
    if num_failures and not info.num_successes:
        logger.warning(
            "%s: all %d stored episodes are failures, so nothing is ever recalled; set bank.only_successes to "
            "false to recall failures too",
            bank.path,
            num_failures,
        )
        parts.has_warned = True
    elif num_failures > info.num_successes and _any_feedback(bank.newest(_LOOKED_AT, success=False)):
        logger.warning(
            "%s: %d of %d stored episodes are failures and never recalled, nor is the feedback in them; set "
            "bank.only_successes to false to recall them too",
            bank.path,
            num_failures,
            info.num_trajectories,
        )
        parts.has_warned = True
    return bank


def _any_feedback(trajectories: Sequence[Trajectory]) -> bool:
    return any(step.observation for trajectory in trajectories for step in trajectory.steps)
