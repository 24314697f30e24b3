"""What can be refused before torch is loaded, so that a mistake is told at once and not after a minute.

These are the checks of the recipes themselves, which make them again when it counts.
"""

import os
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from latentmem.config import Config, OpenAIEngineSection, ProgramSection
from latentmem.folders import checkpoints_of, composer_folder, keys_of, trained_checkpoint
from latentmem.memory_names import TRAININGS
from latentmem.models.assets import resolve_config
from latentmem.runs import lock
from latentmem.training.checkpoint_folder import newest_checkpoint


def check_run(config: Config, phase: str) -> None:
    """Check a phase: its run folder is free; programs, models and checkpoints that it begins with are there.

    Raises:
        LatentMemError: something is not so.
    """
    _check_free(Path(config.run))
    programs = [team for team in (config.team, *config.train_teams) if isinstance(team, ProgramSection)]
    if programs:
        from latentmem.serving.programs.runners import check_program

        for program in programs:
            check_program(program)
    _check_model(config)
    _check_checkpoints(config, _begins_with(config, phase))


def check_serving(config: Config) -> None:
    """Check a server: its folder is free, its address is guarded, and its model and checkpoint are there.

    Raises:
        LatentMemError: something is not so.
    """
    from latentmem.serving.operators.keys import Keys, check_reach

    check_stopped(config)
    with closing(Keys(keys_of(config))) as keys:
        check_reach(config.serve.host, keys)
    _check_model(config)
    kind, _, which = config.serve.memory.partition(":")
    _check_checkpoints(config, [which] if kind == "latent" else [])


def check_stopped(config: Config, instead: str = "name another folder") -> None:
    """Check that no server works in the run's folder; `instead` is what may be done if one does.

    Raises:
        RunError: one does.
    """
    _check_free(Path(config.run) / "serve", instead)


def _begins_with(config: Config, phase: str) -> Iterable[str]:
    """Return the trainings and folders of weights that a phase begins with."""
    if phase == "evaluate":
        trained = [name for name in config.evaluate.memories if name.is_trained or name.weights == "grpo"]
        return [name.weights for name in trained]
    if phase in ("sft", "lmpo") and newest_checkpoint(checkpoints_of(config, phase)) is None:
        return [config.sft.initial if phase == "sft" else config.lmpo.initial]
    return []


def _check_checkpoints(config: Config, names: Iterable[str]) -> None:
    for name in names:
        if name in (*TRAININGS, "grpo"):
            trained_checkpoint(config, name)
        elif name != "untrained":
            composer_folder(name)


def _check_model(config: Config) -> None:
    """Look for the agents' model where no network is needed; a server's model is not here."""
    if not isinstance(config.model.engine, OpenAIEngineSection):
        resolve_config(config.model.name)


def _check_free(folder: Path, instead: str = "name another folder") -> None:
    """Take a folder's lock and let it go. Several processes look later, where all end together."""
    if folder.is_dir() and os.environ.get("WORLD_SIZE", "1") == "1":
        lock(folder, instead).close()
