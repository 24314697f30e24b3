"""What latents say: written while memories are evaluated, and shown for one task."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from latentmem.config import Config, Sampling
from latentmem.environments.environment import Split
from latentmem.errors import BankError, ConfigError, RunError
from latentmem.files import write_atomic
from latentmem.folders import checkpoints_of
from latentmem.kept_latents import SUFFIX, read_latents
from latentmem.kept_readings import READING_SUFFIX, LatentReading, readings_as_json
from latentmem.latent_reading import format_reading, leave_out_each, read_out
from latentmem.memory.latent import LatentMemory
from latentmem.memory_names import TRAININGS, MemoryName
from latentmem.recipes.domains import task_to_show
from latentmem.recipes.memories import memory_of
from latentmem.recipes.parts import Parts
from latentmem.recipes.phase import initials, say
from latentmem.rollout import rollout
from latentmem.training.checkpoint_folder import selected_checkpoint
from latentmem.trajectory import Recalled, Task, Trajectory

logger = logging.getLogger(__name__)

_READ_TASKS = 3
"""Tasks of an evaluation whose latents are read."""


def is_to_read(name: MemoryName, folder: Path) -> bool:
    """Return whether a memory's latents were kept, and not read yet."""
    path, kept_path = _files(name, folder)
    return kept_path.exists() and not path.exists()


def _files(name: MemoryName, folder: Path) -> tuple[Path, Path]:
    """Return the file of what a memory's latents say, and that of the latents."""
    return folder / f"{name.file_stem}{READING_SUFFIX}", folder / f"{name.file_stem}{SUFFIX}"


def write_reading(parts: Parts, name: MemoryName, folder: Path, tasks: Sequence[Task]) -> None:
    """Write what a memory's latents say for the first tasks whose latents were kept, to a file beside the latents.

    The latents after training are read from what was kept; those before training are composed again from the episodes'
    texts. Roles that said nothing are left out.
    """
    path, kept_path = _files(name, folder)
    try:
        kept = read_latents(kept_path)
    except RunError as error:  # the report shows it too, and the results are not affected
        logger.warning("%s", error)
        return
    lines = (folder / f"{name.file_stem}.jsonl").read_bytes().split(b"\n")
    place = {task.key: i for i, task in enumerate(tasks)}
    after: dict[str, dict[str, list[LatentReading]]] = {}
    texts: dict[tuple[str, str], str] = {}
    memory = memory_of(parts, name)
    assert isinstance(memory, LatentMemory)
    for row, key in enumerate(kept.tasks[:_READ_TASKS]):
        episode = Trajectory.from_json(lines[place[key]], f"{kept_path}")
        spoke = {message.role: message.recalled.text for message in episode.messages}
        texts |= {(key, role): text for role, text in spoke.items()}
        after[key] = {
            role: read_out(memory.composer, parts.model, torch.from_numpy(kept.latents[row, column]))
            for column, role in enumerate(kept.roles)
            if role in spoke
        }
    before = _before(parts.config, name)
    said = {} if before is None else _read_texts(parts, before, list(texts.values()))
    read = {key: {role: (found, said.get(texts[key, role])) for role, found in after[key].items()} for key in after}
    content = readings_as_json(str(name), None if before is None else str(before), read)
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _read_texts(parts: Parts, name: MemoryName, texts: Sequence[str]) -> dict[str, list[LatentReading]]:
    """Read the latents that a memory composes from each text. The composer then holds that memory's weights."""
    memory = memory_of(parts, name)
    assert isinstance(memory, LatentMemory)
    records = [Recalled(kind=memory.kind, text=text) for text in texts]
    found = {recall.record.text: recall.latents for recall in memory.compose(records)}
    return {
        text: read_out(memory.composer, parts.model, latents) for text, latents in found.items() if latents is not None
    }


def _before(config: Config, name: MemoryName) -> MemoryName | None:
    """Return the memory from which a trained latent memory started (warmed up, untrained, or a folder), else None."""
    if not name.is_trained:
        return None
    began, checkpoint = initials(config), name.checkpoint
    if checkpoint not in began:
        return MemoryName.parse("latent:untrained")
    while checkpoint in began:
        checkpoint = began[checkpoint]
    return MemoryName.parse(f"latent:{checkpoint}")


def show_latents(config: Config, split: Split = "train", number: int = 1, memory: str | None = None) -> None:
    """Play one turn of a task; print what each latent says, said before training, and changes. Nothing is stored.

    Args:
        config: the experiment.
        split: the split of the task.
        number: the task's number in its split, from 1.
        memory: name of a latent memory, as in `evaluate.memories`; None means the one of this run that was trained
            last.

    Raises:
        ConfigError: the memory is not a latent one, or the split has fewer tasks, or none.
        BankError: there is no bank.
        CheckpointError: the memory is not trained yet.
    """
    name = _trained_last(config) if memory is None else MemoryName.parse(memory)
    if not name.is_latent or name.control is not None:
        raise ConfigError(
            f"show latents: memory {name} has no latents of its own; name a latent one without a control, such as "
            "latent:untrained"
        )
    parts = Parts(config)
    task, which = task_to_show(parts.tasks, split, number)
    if not parts.has_bank:
        raise BankError(
            f"{parts.bank_place}: memory {name} needs a bank, and there is none yet; run `latentmem collect` with this "
            "configuration first"
        )
    before = _before(config, name)
    chosen = memory_of(parts, name)  # reports a missing checkpoint before anything is composed
    assert isinstance(chosen, LatentMemory)
    texts = [record.text for record in chosen.records([(task, role) for role in parts.known_roles("show latents")])]
    earlier = {} if before is None else _read_texts(parts, before, texts)
    chosen = memory_of(parts, name)  # again, because the one composer holds the earlier memory's weights
    assert isinstance(chosen, LatentMemory)
    limit = parts.sampling.max_response_tokens
    greedy = Sampling(temperature=0, max_response_tokens=limit)
    played = rollout(parts.team, chosen, parts.model, [task], parts.domain.start, sampling=greedy)
    said = {message.role: message for message in reversed(played.trajectories[0].messages)}
    tables = []
    for role in parts.team.roles:
        recall = played.recalls[task.key, role.name]
        assert recall.latents is not None
        message = said.get(role.name)
        tables.append(
            format_reading(
                f"{role.name}  (memory {name}{f', before: {before}' if before else ''})",
                read_out(chosen.composer, parts.model, recall.latents),
                earlier.get(recall.record.text),
                leave_out_each(parts.model, message, recall.latents, limit) if message else [],
                message.response if message else "",
            )
        )
    say(
        f"{which}\n"
        f"memory {name}, of {len(parts.bank)} trajectories in {parts.bank_place}\n"
        f"The responses are real: {parts.model.name}, greedy, at most {limit} tokens each, each role's first one.\n\n"
        + "\n\n".join(tables)
    )


def _trained_last(config: Config) -> MemoryName:
    """Return the name of the run's latent memory that is trained furthest."""
    done = [phase for phase in reversed(TRAININGS) if selected_checkpoint(checkpoints_of(config, phase))]
    return MemoryName.parse(f"latent:{done[0] if done else 'untrained'}")
