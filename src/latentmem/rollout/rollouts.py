"""Play tasks: team x memory x environment -> trajectories. Every episode of this package is played from here.

A single-turn task is an episode of one step. Teams that play in turns advance together (`turns`); programs run by
themselves, each episode in a thread (`programs`). A model that many threads may ask at once makes its batches itself;
then no episode waits for another, and a slow environment holds up its own episode only.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import TypeVar

from torch import Tensor

from latentmem.config import Sampling
from latentmem.environments.environment import Environment
from latentmem.memory.memory import Memory, Recall, Spent
from latentmem.models.agent import AgentModel, Prompt, Sampled
from latentmem.rollout.concurrent import asked_by_many
from latentmem.rollout.episodes import Episode
from latentmem.rollout.programs import ProgramEpisode, warn_of_waste
from latentmem.rollout.recalls import SharedRecalls
from latentmem.rollout.turns import Ask, TurnEpisode, play_in_step
from latentmem.seeds import stream_seed
from latentmem.teams.turn import Player, Players, Program, Teams
from latentmem.trajectory import Role, Task, Trajectory

EPISODES_AT_ONCE = 256
"""How many episodes of a model with `concurrent` are played at the same time, each in a thread."""

STOP_AGAIN_SECONDS = 1.0
"""How long episodes have to end before they are told again."""

AnyEpisode = TypeVar("AnyEpisode", bound=Episode)


@dataclass(frozen=True)
class Seconds:
    """Where the time of a rollout went, in seconds of wall clock.

    Where episodes do not wait for each other, generation and environment are sums over the episodes, so they may be
    far more than the time that passed.
    """

    recall: float
    """Searching the bank, calling a language model for the memory, and writing out what was found."""
    composing: float
    """Running the memory's own networks."""
    generation: float
    """Sampling the agents' responses."""
    environment: float
    """Starting environments, and scoring actions, such as running code."""


@dataclass(frozen=True)
class Rollouts:
    """Groups of trajectories, one group for each task, and what they cost."""

    groups: list[list[Trajectory]]
    seconds: Seconds
    spent: Spent
    """What recalling took, such as the tokens that language models read and wrote for the memory."""
    recalls: dict[tuple[str, str], Recall]
    """What was recalled, by the task's key and the role's name."""

    @property
    def composed(self) -> dict[str, Tensor]:
        """The recalled latents [K, d_agent], by the text that they were composed from."""
        return {r.record.text: r.latents for r in self.recalls.values() if r.latents is not None}

    @property
    def trajectories(self) -> list[Trajectory]:
        """All trajectories, task by task."""
        return [trajectory for group in self.groups for trajectory in group]


def rollout(
    team: Players,
    memory: Memory,
    model: AgentModel,
    tasks: Sequence[Task],
    start: Callable[[Task], Environment],
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 - it is frozen
    group_size: int = 1,
    seed: int = 0,
    max_turns: int = 1,
    workers: int | None = None,
) -> Rollouts:
    """Play each task `group_size` times.

    The memory is asked once for each task and role. Each response has its own random stream, made from the seed, the
    task, the rollout's number, the turn and the message's number (of a program: the role, the conversation and the
    number in it); so it does not depend on which episodes share a batch. An environment that raises, or a program that
    fails, ends its own episode, with reward 0 and the cause in `Trajectory.error`.

    Args:
        team: who plays; a `Teams` shares the tasks among several teams.
        memory: asked before the first turn, and for a role that is found while playing; nothing is added to it.
        model: speaks for all agents.
        tasks: what is played; no task may occur twice.
        start: makes a fresh environment for a task.
        sampling: how responses are drawn.
        group_size: G, the number of episodes for each task.
        seed: seed of all random streams.
        max_turns: number of steps after which an episode ends with its last reward; a program's has one.
        workers: environments stepped at once, each in a thread; None means one for each CPU. For a model with
            `concurrent`: episodes played at once; None means `EPISODES_AT_ONCE`. Then `start` is called in these
            threads too. Of a program: episodes played at once; None means its `parallel`.

    Raises:
        ConfigError: a team lets a role speak that is not among its `roles`.
        LatentMemError: any such error of a part passes through, as when a prompt exceeds the model's window. Where
            episodes do not wait for each other, the first error ends the others at their next message.
    """
    recalls = SharedRecalls(memory)
    recalls.ask(queries_of(team, tasks))
    episodes = [
        episode_of(player_of(team, task), task, stream_seed(seed, task.key, i))
        for task in tasks
        for i in range(group_size)
    ]
    in_turns = [episode for episode in episodes if isinstance(episode, TurnEpisode)]
    programs = [episode for episode in episodes if isinstance(episode, ProgramEpisode)]
    generation, environment = 0.0, 0.0
    if in_turns:
        play = partial(
            play_in_step, start=start, recalls=recalls.found, temperature=sampling.temperature, max_turns=max_turns
        )
        ask = partial(model.respond, sampling=sampling)
        if model.concurrent:
            spent = _apart(in_turns, lambda episode, ask: play([episode], ask, map), ask, workers or EPISODES_AT_ONCE)
        else:
            with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
                spent = play(in_turns, ask, pool.map)
        generation, environment = spent
    if programs:
        spent = _run_programs(programs, recalls, model, start, sampling, workers)
        generation, environment = generation + spent[0], environment + spent[1]

    finished = [episode.trajectory(model.name) for episode in episodes]
    groups = [finished[i : i + group_size] for i in range(0, len(finished), group_size)]
    seconds = Seconds(recalls.searching, recalls.spent.composing_seconds, generation, environment)
    return Rollouts(groups, seconds, recalls.spent, recalls.found)


def queries_of(team: Players, tasks: Sequence[Task]) -> list[tuple[Task, Role]]:
    """Return what a rollout asks its memory beforehand: each task with each known role of the team that plays it."""
    return [(task, role) for task in tasks for role in player_of(team, task).roles]


def player_of(players: Players, task: Task) -> Player:
    """Return the team that plays a task."""
    return players.of(task) if isinstance(players, Teams) else players


def episode_of(player: Player, task: Task, seed: int) -> TurnEpisode | ProgramEpisode:
    """Return a new episode of a team."""
    if isinstance(player, Program):
        return ProgramEpisode(task, player, seed)
    return TurnEpisode(task, player, seed)


def _run_programs(
    episodes: Sequence[ProgramEpisode],
    recalls: SharedRecalls,
    model: AgentModel,
    start: Callable[[Task], Environment],
    sampling: Sampling,
    workers: int | None,
) -> tuple[float, float]:
    """Play the episodes of each program; return the seconds of generation and of environment, summed."""
    generation, environment = 0.0, 0.0
    with asked_by_many(model, sampling) as (ask, alone):
        recalls.alone = alone
        for player in {id(episode.team): episode.team for episode in episodes}.values():
            its = [episode for episode in episodes if episode.team is player]
            spent = _apart(
                its,
                lambda episode, ask: episode.play(start, recalls, ask, sampling.temperature),
                ask,
                workers or player.parallel,
                player.stop,
            )
            warn_of_waste(its)
            generation, environment = generation + spent[0], environment + spent[1]
    return generation, environment


def _apart(
    episodes: Sequence[AnyEpisode],
    play: Callable[[AnyEpisode, Ask], tuple[float, float]],
    ask: Ask,
    num_threads: int,
    stop: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Play each episode in a thread of its own; return their seconds of generation and environment, summed.

    When one fails, or on Ctrl-C, those that wait are dropped, `stop` is called, and the others end at their next
    message. This returns when all threads have ended.
    """
    stopped = Event()

    def ask_unless_stopped(prompts: Sequence[Prompt]) -> list[Sampled]:
        if stopped.is_set():
            raise CancelledError
        return ask(prompts)

    playing: list[Future[tuple[float, float]]] = []
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            playing += [pool.submit(play, episode, ask_unless_stopped) for episode in episodes]
            seconds = [done.result() for done in as_completed(playing)]
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            begun = [done for done in playing if not done.cancelled()]
            while wait(begun, STOP_AGAIN_SECONDS).not_done:
                stop()  # an episode may have begun meanwhile
            raise
    return sum(generation for generation, _ in seconds), sum(environment for _, environment in seconds)
