"""Where a run's folder keeps what each phase makes, and how many steps of a training are done. Loads no torch."""

from pathlib import Path

from latentmem.config import Config
from latentmem.errors import CheckpointError, suggest
from latentmem.memory_names import TRAININGS
from latentmem.training.checkpoint_folder import newest_checkpoint, selected_checkpoint, step_of

EVALUATIONS = {"test": "evaluate", "dev": "evaluate-dev"}
"""The phase, and so the folder, of each split's evaluation; the settings of one do not bind the other."""
RESULTS = {"test": "results.json", "dev": "results-dev.json"}
"""The results file of each split."""
DEV_ROWS = "dev.jsonl"
"""File in a phase's folder: how each task that was set aside did at each evaluated step."""


def checkpoints_of(config: Config, phase: str) -> Path:
    """Return the folder of a training's checkpoints."""
    return Path(config.run) / phase / "checkpoints"


def trained_checkpoint(config: Config, phase: str) -> Path:
    """Return the checkpoint that a training of this run selected.

    Raises:
        CheckpointError: there is none.
    """
    found = selected_checkpoint(checkpoints_of(config, phase))
    if found is None:
        raise CheckpointError(
            f"{config.run}: no checkpoint of {phase} here; run `latentmem train {phase}` with this configuration first"
        )
    return found


def composer_folder(name: str) -> Path:
    """Return the folder of a composer that this run did not train.

    Raises:
        CheckpointError: there is no such folder; the name may be a misspelt one of a training.
    """
    folder = Path(name)
    if not folder.is_dir():
        raise CheckpointError(
            f"{name}: no composer here, there is no such folder; name one that holds a composer, or untrained, or a "
            f"training of this run; {suggest(name, ('untrained', *TRAININGS))}"
        )
    return folder


def keys_of(config: Config) -> Path:
    """Return the file of a server's API keys."""
    return Path(config.serve.keys or Path(config.run) / "serve" / "keys.sqlite")


def audit_of(config: Config) -> Path:
    """Return a server's audit log."""
    return Path(config.serve.audit or Path(config.run) / "serve" / "audit.jsonl")


def steps_done(folder: Path) -> int:
    """Return the steps of the newest checkpoint in a folder; 0 if there is none."""
    newest = newest_checkpoint(folder)
    return step_of(newest) if newest else 0


def warmup_steps_done(folder: Path, frame_steps: int) -> int:
    """Return the steps done as the warm-up counts them: the copy's first row has step `frame_steps + 1`."""
    if newest_checkpoint(folder) is None:
        return steps_done(folder / "frame")
    return frame_steps + 1 + steps_done(folder)
