"""Compare memories on the same tasks, with the same seeds and prompts: what each one brings and what it costs.

Tasks are played in fixed batches. A batch counts once its trajectories and its cost are on disk, so an interrupted
evaluation continues with the next batch and ends with the same numbers. Several processes share whole batches. Each
batch is the same computation whichever process plays it, so the numbers do not depend on the number of processes.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import FiniteFloat

from latentmem.bank import ExperienceBank
from latentmem.carrying import measure_carried, roles_of_teams
from latentmem.config import EvaluateSection, Sampling
from latentmem.environments.environment import Domain
from latentmem.errors import ConfigError, RunError
from latentmem.evaluation.batches import commit, kept_tasks, play, read_costs, resume
from latentmem.evaluation.results import Results
from latentmem.evaluation.rows import Played, retrieval, row_of, tasks_of_sources
from latentmem.files import read_json, write_atomic
from latentmem.memory.memory import Memory
from latentmem.memory_names import MemoryName
from latentmem.models.agent import AgentModel
from latentmem.models.language_model import LanguageModel
from latentmem.parsing import Form, checked
from latentmem.processes import Processes
from latentmem.progress import on_terminal, progress
from latentmem.teams.turn import Player
from latentmem.trajectory import Task, Trajectory

logger = logging.getLogger(__name__)

RESULTS_VERSION = 1
DEFAULTS = EvaluateSection()
GREEDY = Sampling(temperature=DEFAULTS.temperature)
_BAR = "evaluate"

OnProgress = Callable[[str, int, float], None]
"""Function that receives the memory's name, the number of tasks done, and the mean reward so far."""
OnWork = Callable[[str], None]
"""Function that receives the name of work that begins when all tasks are played."""


def evaluate(
    team: Player,
    model: AgentModel,
    memories: Mapping[str, Memory | Callable[[], Memory]],
    domain: Domain,
    *,
    tasks: Sequence[Task] | None = None,
    folder: str | Path | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch_size: int = DEFAULTS.batch_size,
    max_turns: int = 1,
    online: bool = DEFAULTS.online,
    num_bootstraps: int = DEFAULTS.num_bootstraps,
    on_progress: OnProgress | None = None,
    on_work: OnWork = lambda _: None,
    processes: Processes | None = None,
    bank: ExperienceBank | None = None,
    held_out: Sequence[Trajectory] | None = None,
    starts: Mapping[str, str] = MappingProxyType({}),
) -> Results:
    """Play the tasks once under each memory and compare the results; then measure what each memory carries.

    Where several processes were launched, all of them must call this alike: they share the batches, the first one
    writes, and each returns the table.

    Args:
        team: who plays.
        model: the agents.
        memories: by name, in the order of the table: memories, or functions that make one when its turn comes.
        domain: makes the environments, and the tasks if none are given.
        tasks: the held-out tasks; None means the test split.
        folder: where the trajectories and costs of each memory are kept, so that a later call can continue; None keeps
            nothing.
        sampling: how agents sample, under all memories.
        seed: seed of all sampling.
        batch_size: number of tasks played side by side.
        max_turns: most turns of an episode.
        online: let each memory store what it played, batch by batch; its bank must be its own copy.
        num_bootstraps: resamples for intervals and paired differences.
        on_progress: receives the memory, tasks done, and the mean reward so far; None shows a bar on a terminal.
        on_work: with `on_progress`, receives the name of what is computed after that, when it begins.
        processes: those that share the batches; None means those that were launched.
        bank: the bank that the memories recall from, if any. It tells which task a recalled trajectory belongs to, and
            must not change meanwhile, unless `online`.
        held_out: successes on tasks that nothing was learned from; their responses are scored for `carried`. None
            takes, for each task, the episode of the first memory that solved it.
        starts: for a memory that was trained from another one, the name of that one; the two are compared.

    Returns:
        The table; its values are described in docs/evaluation.md.

    Raises:
        BankError: the bank changed during the evaluation.
        RunError: the folder holds trajectories of other tasks, or cannot be written, as on a full disk; what was played
            before is kept.
        ConfigError: `online` with several processes, or there are no tasks.
    """
    processes = processes or Processes()
    check_online(online, processes)
    tasks = domain.tasks("test") if tasks is None else tasks
    if not tasks:
        raise ConfigError("there is no task to evaluate on; give some, or a domain with a test split")
    made = {name: _maker(memory) for name, memory in memories.items()}
    names = {name: MemoryName.parse(name) for name in memories}
    with (
        _folder(folder) as place,
        _listeners(len(tasks), [*made], on_progress, on_work, processes) as (shown, doing),
        nullcontext() if bank is None or online else bank.frozen("an evaluation"),
    ):
        played = {}
        for name, make in made.items():
            path = place / f"{names[name].file_stem}.jsonl"
            # The latents of a control tell nothing about its composer.
            kept = kept_tasks(tasks) if names[name].control is None else frozenset[str]()
            trajectories, costs = processes.from_first(partial(resume, path, tasks))
            if trajectories:
                shown(name, len(trajectories), _mean_reward(trajectories))
            if len(trajectories) < len(tasks):
                memory = make()
                if online:
                    _learn(memory, trajectories)
                play_batch = partial(play, team, memory, model, domain.start, sampling, seed, max_turns, kept)
                per_round = batch_size * processes.size
                for i in range(len(trajectories), len(tasks), per_round):
                    batches = [tasks[j : j + batch_size] for j in range(i, min(i + per_round, len(tasks)), batch_size)]
                    for batch, cost, latents in processes.map(play_batch, batches):
                        if processes.is_first:
                            commit(path, batch, cost, latents)
                        trajectories += batch
                        costs.append(cost)
                        if online:
                            _learn(memory, batch)
                    shown(name, len(trajectories), _mean_reward(trajectories))
            played[name] = (trajectories, costs)
        scored = _first_successes(tasks, played) if held_out is None else held_out
        carried: dict[str, dict[str, Any] | None] = dict.fromkeys(memories)
        # Scripted agents cannot score responses; an online memory has learned from the tasks it would be scored on.
        if isinstance(model, LanguageModel) and not online:
            carry = partial(_carried, team, model, scored, seed, place, processes, doing)
            carried |= {name: carry(names[name], make) for name, make in made.items() if names[name].may_carry}
        doing("comparing")
        answers = tasks_of_sources(bank, played)
        rows = [
            row_of(names[name], *played[name], played, seed, num_bootstraps, starts.get(name))
            | {"carried": carried[name]}
            | retrieval(played[name][0], answers)
            for name in memories
        ]
    return Results(
        {
            "schema_version": RESULTS_VERSION,
            "seed": seed,
            "num_tasks": len(tasks),
            "domain": ", ".join(sorted({task.domain for task in tasks})),
            "team": team.name,
            "model": model.name,
            "temperature": sampling.temperature,
            "task_ids": [task.key for task in tasks],
            "memories": rows,
        }
    )


def _maker(memory: Memory | Callable[[], Memory]) -> Callable[[], Memory]:
    if callable(memory):
        return memory
    return lambda: memory


@contextmanager
def _folder(given: str | Path | None) -> Iterator[Path]:
    """Yield the folder to keep files in; a temporary one if none is given."""
    if given is not None:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given)
        return
    with TemporaryDirectory(prefix="latentmem-evaluate-") as made:
        yield Path(made)


@contextmanager
def _listeners(
    num_tasks: int, memories: Sequence[str], on_progress: OnProgress | None, on_work: OnWork, processes: Processes
) -> Iterator[tuple[OnProgress, OnWork]]:
    """Yield the functions that receive progress: the ones given, or those of a bar on a terminal."""
    if on_progress is not None:
        yield on_progress, on_work
        return
    with task_bar(num_tasks, memories, visible=processes.is_first and on_terminal()) as bar:
        yield bar.show, bar.doing


class TaskBar:
    """A bar over the tasks of all memories, in the given order; then it says what else is done."""

    def __init__(self, bar: Any, num_tasks: int, memories: Sequence[str]) -> None:
        self.bar = bar
        self.num_tasks = num_tasks
        self.order = memories

    def show(self, name: str, done: int, reward: float) -> None:
        """Move the bar; as `OnProgress`."""
        self.bar.set_postfix(memory=name, reward=f"{reward:.3f}", refresh=False)
        self.bar.update(self.order.index(name) * self.num_tasks + done - self.bar.n)

    def doing(self, what: str) -> None:
        """Show at once what goes on; as `OnWork`."""
        self.bar.set_description_str(f"{_BAR}, {what}")


@contextmanager
def task_bar(num_tasks: int, memories: Sequence[str], visible: bool) -> Iterator[TaskBar]:
    """Yield the bar of an evaluation."""
    with progress(num_tasks * len(memories), _BAR, "task", shown=visible) as bar:
        yield TaskBar(bar, num_tasks, memories)
        bar.set_description_str(_BAR, refresh=False)


def check_online(online: bool, processes: Processes) -> None:
    """Refuse to share an evaluation among processes if each batch learns from the one before.

    Raises:
        ConfigError: `online` with several processes.
    """
    if online and processes.size > 1:
        raise ConfigError(
            f"evaluate.online is true: each batch learns from the one before it, in one process, but {processes.size} "
            "were launched; start it without torchrun, or set it to false"
        )


class _CarriedNumbers(Form):
    nats: FiniteFloat
    low: float | None
    high: float | None
    num_tasks: int


class _KeptCarried(Form):
    """What is relied on in the file of what a memory carries."""

    carried: _CarriedNumbers | None


def num_played(folder: Path, name: MemoryName) -> int:
    """Return how many tasks a memory has played, by the costs that are kept in a folder."""
    _, costs = read_costs(folder / f"{name.file_stem}.jsonl")
    return sum(cost.num_tasks for cost in costs)


def forget(folder: Path, name: MemoryName) -> None:
    """Remove the files of a memory, so that it is played again from the first task."""
    for path in folder.glob(f"{name.file_stem}.*"):
        path.unlink()


def _first_successes(tasks: Sequence[Task], played: Played) -> list[Trajectory]:
    """For each task that some memory solved, return the first such episode: the same responses serve all memories."""
    solved = ([t for episodes, _ in played.values() if (t := episodes[i]).success] for i in range(len(tasks)))
    return [episodes[0] for episodes in solved if episodes]


def _carried(
    team: Player,
    model: LanguageModel,
    trajectories: Sequence[Trajectory],
    seed: int,
    folder: Path,
    processes: Processes,
    doing: OnWork,
    name: MemoryName,
    make: Callable[[], Memory],
) -> dict[str, Any] | None:
    """Measure what a memory carries once for these trajectories, and keep it in a file beside the memory's own."""
    path = folder / f"{name.file_stem}.carried.json"
    of = hashlib.sha256(json.dumps([seed, model.name, [t.id for t in trajectories]]).encode()).hexdigest()
    kept = processes.from_first(lambda: read_json(path) if path.exists() else {})
    if kept.get("of") == of:
        try:
            checked(kept, _KeptCarried)
        except ValueError as error:
            raise RunError(f"{path}: damaged ({error}); remove it, and it is measured again") from None
        known: dict[str, Any] | None = kept["carried"]
        return known
    doing(f"measuring what {name} carries")
    measured = measure_carried(make(), model, trajectories, roles_of_teams([team]), seed=seed, processes=processes)
    found = None if measured is None else measured.as_json()
    if measured is not None and not math.isfinite(measured.total.difference):
        logger.warning("evaluate: %s gives values that are not finite; carried cannot be measured", name)
        found = None
    if processes.is_first:
        write_atomic(path, json.dumps({"of": of, "carried": found}, indent=1, allow_nan=False) + "\n")
    return found


def _mean_reward(trajectories: Sequence[Trajectory]) -> float:
    return float(np.mean([trajectory.reward for trajectory in trajectories]))


def _learn(memory: Memory, trajectories: Sequence[Trajectory]) -> None:
    for trajectory in trajectories:
        memory.add(trajectory)
