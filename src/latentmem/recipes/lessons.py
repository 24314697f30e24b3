"""What is learned from, and what is held out for measuring: demonstrations and stored episodes."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import get_args

from latentmem.carrying import measure_carried, roles_of_teams, scorable
from latentmem.config import OpenAIEngineSection
from latentmem.environments.environment import Demonstrator, Split
from latentmem.errors import DataError, TrainingError
from latentmem.files import write_atomic
from latentmem.memory.latent import LatentMemory
from latentmem.processes import Processes
from latentmem.progress import progress
from latentmem.recipes.parts import Parts
from latentmem.rollout import player_of
from latentmem.seeds import stream_seed
from latentmem.teams.turn import Players, Program, teams_of
from latentmem.training.demonstrations import Demonstration, demonstrate, read_demonstrations
from latentmem.trajectory import Task, Trajectory

logger = logging.getLogger(__name__)


def lessons(parts: Parts, aside: list[Task]) -> tuple[list[Trajectory], list[Trajectory]]:
    """Return the trajectories that SFT learns from, and those held out to measure it.

    Whole tasks are held out, so that no episode of theirs is learned from.
    """
    keys = {task.key for task in aside}
    shown = demonstrated(parts, [*parts.train_tasks, *aside])
    if shown is None:
        experience = {task.key for task in parts.tasks["experience"]}
        stored = [t for t in parts.bank if t.task.key not in experience]
        if not stored:
            raise TrainingError(
                f"{parts.bank.path} holds only episodes of experience tasks, which are recalled but not trained on; "
                "set sft.demonstrations to what to learn from"
            )
        return [t for t in stored if t.task.key not in keys], [t for t in stored if t.task.key in keys]
    train = [one for one in shown if one.task.key not in keys]
    if not train:
        raise TrainingError(
            f"sft.demonstrations is {parts.config.sft.demonstrations}: none of its {len(shown)} "
            "demonstrations is of a task that is left to train on; add some, or lower sft.eval_tasks"
        )
    return act_out(parts, train), act_out(parts, [one for one in shown if one.task.key in keys])


def demonstrated(parts: Parts, tasks: Sequence[Task]) -> list[Demonstration] | None:
    """Return demonstrations of some tasks, as `sft.demonstrations` says; None if SFT learns the bank's successes.

    Raises:
        DataError: a row cannot be used.
    """
    source = parts.config.sft.demonstrations
    if source == "bank":
        return None
    if source == "domain":
        assert isinstance(parts.domain, Demonstrator)
        return _told_by(parts.domain, tasks)
    keys = {task.key for task in tasks}
    known = [task for split in get_args(Split) for task in parts.domain.tasks(split)]
    roles = {role.name for team in (*parts.train_teams, parts.team) for role in team.roles}
    return [one for one in read_demonstrations(Path(source), known, roles) if one.task.key in keys]


def right_responses(
    parts: Parts, tasks: Sequence[Task], players: Players, kept: Path | None = None
) -> list[Trajectory] | None:
    """Return the right responses to some tasks; None if the data lack those of a role that speaks, or nothing here can
    score them.

    A program whose roles are not known beforehand is run with the responses that there are; a task in which another
    role speaks is left out. What programs did is written to the file `kept`, and read from there the next time.
    """
    if not isinstance(parts.domain, Demonstrator) or isinstance(parts.config.model.engine, OpenAIEngineSection):
        return None
    shown = _told_by(parts.domain, tasks)
    roles = {role.name for team in teams_of(players) for role in team.roles}
    if roles and any("" not in one.said and not roles <= one.said.keys() for one in shown):
        return None
    act = partial(act_out, parts, shown, players, only_fitting=not roles)
    plays = any(isinstance(team, Program) for team in teams_of(players))
    return act() if kept is None or not plays else _kept(kept, shown, act)


def _kept(path: Path, shown: Sequence[Demonstration], act: Callable[[], list[Trajectory]]) -> list[Trajectory]:
    """Return what a file holds if it is of these demonstrations; else act them out, and write the file."""
    of = hashlib.sha256(json.dumps([[one.task.key, dict(one.said)] for one in shown]).encode()).hexdigest()
    lines = path.read_bytes().splitlines() if path.exists() else []
    if lines and lines[0] == of.encode():
        return [Trajectory.from_json(line, f"{path}:{i}") for i, line in enumerate(lines[1:], 2)]
    acted = act()
    if Processes().is_first:
        text = "".join(f"{line}\n" for line in (of, *(one.to_json() for one in acted)))
        write_atomic(path, text.encode("utf-8", "surrogatepass"))
    return acted


def act_out(
    parts: Parts, shown: Sequence[Demonstration], players: Players | None = None, only_fitting: bool = False
) -> list[Trajectory]:
    """Turn demonstrations into trajectories, by default of the teams that train.

    Args:
        parts: what the run is made of.
        shown: the demonstrations.
        players: who plays; None means the teams that train.
        only_fitting: leave out what cannot be acted out.

    Raises:
        DataError: a role that speaks has no response, or a program failed.
    """
    players = players or parts.players

    def act(one: Demonstration) -> Trajectory | None:
        team = player_of(players, one.task)
        try:
            return demonstrate(
                team, one.task, parts.domain.start(one.task).instructions, one.said, parts.model, one.where
            )
        except DataError:
            if only_fitting:
                return None
            raise

    programs = [team for team in teams_of(players) if isinstance(team, Program)]
    at_once = max((team.parallel for team in programs), default=1)
    with (
        ThreadPoolExecutor(at_once) as pool,  # programs take their time to start
        progress(len(shown), "right responses", "task", shown=bool(programs and shown) and Processes().is_first) as bar,
    ):
        found = []
        for acted in pool.map(act, shown):
            found.append(acted)
            bar.update()
        return [acted for acted in found if acted is not None]


def carried_by(
    parts: Parts, memory: LatentMemory, held_out: Sequence[Trajectory], phase: str, processes: Processes
) -> Callable[[], Mapping[str, float]] | None:
    """Return a function that measures what a memory carries; None if too few tasks have successes."""
    roles_of = roles_of_teams(parts.train_teams)
    solved = scorable(held_out, parts.model, roles_of)
    if len({trajectory.task.key for trajectory in solved}) < 2:
        if held_out:
            logger.warning("%s: the held-out tasks have too few successes to measure what latents carry", phase)
        return None

    def measure() -> Mapping[str, float]:
        with parts.bank.frozen("training"):
            found = measure_carried(
                memory,
                parts.model,
                solved,
                roles_of,
                seed=stream_seed(parts.config.seed, "carried"),
                processes=processes,
            )
        return {} if found is None else found.metrics()

    return measure


def _told_by(domain: Demonstrator, tasks: Sequence[Task]) -> list[Demonstration]:
    """Return what a domain demonstrates for some tasks, each task once."""
    different = {task.key: task for task in tasks}
    return [Demonstration(task, domain.demonstrations(task), key) for key, task in different.items()]
