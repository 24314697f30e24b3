"""Where in its folder a run keeps what a phase makes, and how far a training has come by what is there."""

from pathlib import Path

from latentmem.config import Config
from latentmem.training.checkpoint_folder import newest_checkpoint

EVALUATIONS = {"test": "evaluate", "dev": "evaluate-dev"}
"""The phase, and so the folder, of an evaluation of each split: neither is held to how the other was started."""
RESULTS = {"test": "results.json", "dev": "results-dev.json"}
"""The file of the results of each split."""
DEV_ROWS = "dev.jsonl"
"""In a phase's folder, how each task that was set aside did at each evaluated step."""


def checkpoints_of(config: Config, phase: str) -> Path:
    """The folder of a training's checkpoints."""
    return Path(config.run) / phase / "checkpoints"


def steps_done(folder: Path) -> int:
    """Steps that the newest checkpoint of a folder has; 0 where there is none."""
    newest = newest_checkpoint(folder)
    return int(newest.name.removeprefix("step-")) if newest else 0


def warmup_steps_done(folder: Path, frame_steps: int) -> int:
    """As the warm-up counts them: the copy's first row is that of step `frame_steps + 1`."""
    if newest_checkpoint(folder) is None:
        return steps_done(folder / "frame")
    return frame_steps + 1 + steps_done(folder)
