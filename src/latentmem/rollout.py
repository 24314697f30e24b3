"""The one loop in which a team plays: team x memory x environment -> trajectories.

A single-turn task is an episode of one step. Episodes of a local model advance in step: in each round, every episode's
team names the agents that can speak now, and together they form one batch. A model that many threads may ask at once
makes its batches itself. Then no episode waits for another, and a slow environment holds up its own episode only. Both
ways are the same loop, and they give the same trajectories.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Event

from torch import Tensor

from latentmem.config import Sampling
from latentmem.environments.environment import Environment, Listener, Outcome
from latentmem.errors import ConfigError, LatentMemError, suggest
from latentmem.memory.memory import Memory, Recall, Spent
from latentmem.models.agent import AgentModel, Prompt, Sampled
from latentmem.outside import well_formed
from latentmem.seeds import stream_seed
from latentmem.teams.turn import Action, Call, ServedCall, Team, Teams, Turn
from latentmem.trajectory import Message, Role, Served, Step, Task, Trajectory

Ask = Callable[[Sequence[Prompt]], list[Sampled]]
"""A function: prompts -> one response each, in their order."""

EPISODES_AT_ONCE = 256
"""How many episodes of a model with `concurrent` are played at the same time, each in a thread."""


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


@dataclass
class _Episode:
    task: Task
    team: Team
    seed: int
    environment: Environment | None = None
    instructions: str = ""
    steps: list[Step] = field(default_factory=list)
    turn: Turn | None = None
    calls: list[Call] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    action: Action | None = None
    reward: float = 0.0
    error: str | None = None
    done: bool = False

    def begin(self, start: Callable[[Task], Environment]) -> None:
        """Make the environment."""
        with self._failure_is_data():
            self.environment = start(self.task)
            self.instructions = well_formed(self.environment.instructions)

    def advance(self, responses: list[str] | None) -> None:
        """Let the team name its next calls or its action."""
        if self.turn is None:
            self.turn = self.team.turn(self.task.text, self.instructions, self.steps)
        try:
            self.calls = next(self.turn) if responses is None else self.turn.send(responses)
            while not self.calls:  # a team that decides as it goes may name nobody to speak
                self.calls = self.turn.send([])
        except StopIteration as stop:
            action = stop.value if isinstance(stop.value, Action) else Action(stop.value)
            self.calls, self.action, self.turn = [], action, None

    def act(self) -> Outcome:
        """Give the action to the environment and return the outcome; an environment that fails gives reward 0."""
        assert self.environment is not None
        assert self.action is not None
        with self._failure_is_data():
            if isinstance(self.environment, Listener):
                self.environment.hear({message.role: message.response for message in self.messages})
            outcome = self.environment.step(self.action.text)
            if not 0 <= outcome.reward <= 1:
                raise ValueError(f"the reward is {outcome.reward}; expected a number from 0 to 1")
            # Before it is kept: what has no JSON form, or is no text, could not be stored.
            json.dumps(outcome.info, ensure_ascii=False, allow_nan=False).encode("utf-8")
            return Outcome(well_formed(outcome.observation), outcome.reward, outcome.done, outcome.info)
        return Outcome(observation="", reward=0.0, done=True, info={"extracted": None})

    @contextmanager
    def _failure_is_data(self) -> Iterator[None]:
        """Turn an exception of the environment into the end of its episode; the one place that does so."""
        try:
            yield
        except LatentMemError:
            raise
        except Exception as error:
            self.error = well_formed(f"environment: {type(error).__name__}: {error}")
            self.done = True


def rollout(
    team: Team | Teams,
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
    task, the rollout's number, the turn and the message's number; so it does not depend on which episodes share a
    batch. An environment that raises ends its own episode, with reward 0 and the cause in `Trajectory.error`.

    Args:
        team: who plays; a `Teams` shares the tasks among several teams.
        memory: asked before the first turn; nothing is added to it.
        model: speaks for all agents.
        tasks: what is played; no task may occur twice.
        start: makes a fresh environment for a task.
        sampling: how responses are drawn.
        group_size: G, the number of episodes for each task.
        seed: seed of all random streams.
        max_turns: number of steps after which an episode ends with its last reward.
        workers: environments stepped at once, each in a thread; None means one for each CPU. For a model with
            `concurrent`: episodes played at once; None means `EPISODES_AT_ONCE`. Then `start` is called in these
            threads too.

    Raises:
        ConfigError: a team lets a role speak that is not among its `roles`.
        LatentMemError: any such error of a part passes through, as when a prompt exceeds the model's window. Where
            episodes do not wait for each other, the first error ends the others at their next message.
    """
    began = time.perf_counter()
    queries = queries_of(team, tasks)
    found = memory.recall_many(queries)
    recalls = {(task.key, role.name): recall for (task, role), recall in zip(queries, found, strict=True)}
    searching = time.perf_counter() - began - found.spent.composing_seconds

    episodes = [
        _Episode(task, _player(team, task), stream_seed(seed, task.key, i)) for task in tasks for i in range(group_size)
    ]
    play = partial(_play, start=start, recalls=recalls, temperature=sampling.temperature, max_turns=max_turns)
    ask = partial(model.respond, sampling=sampling)
    if model.concurrent:
        generation, environment = _play_apart(episodes, play, ask, workers or EPISODES_AT_ONCE)
    else:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            generation, environment = play(episodes, ask, pool.map)

    finished = [
        Trajectory(
            task=episode.task,
            team=episode.team.name,
            model=model.name,
            steps=tuple(episode.steps),
            reward=episode.reward,
            success=episode.reward == 1,
            error=episode.error,
            seed=episode.seed,
        )
        for episode in episodes
    ]
    groups = [finished[i : i + group_size] for i in range(0, len(finished), group_size)]
    seconds = Seconds(searching, found.spent.composing_seconds, generation, environment)
    return Rollouts(groups, seconds, found.spent, recalls)


def queries_of(team: Team | Teams, tasks: Sequence[Task]) -> list[tuple[Task, Role]]:
    """Return what a rollout asks its memory: each task with each role of the team that plays it."""
    return [(task, role) for task in tasks for role in _player(team, task).roles]


def _player(team: Team | Teams, task: Task) -> Team:
    return team.of(task) if isinstance(team, Teams) else team


def _play_apart(
    episodes: Sequence[_Episode], play: Callable[..., tuple[float, float]], ask: Ask, num_threads: int
) -> tuple[float, float]:
    """Play each episode in a thread of its own; return their seconds of generation and environment, summed.

    When one fails, or on Ctrl-C, those that wait are dropped and the others end at their next message. This returns
    when all threads have ended.
    """
    stopped = Event()

    def ask_unless_stopped(prompts: Sequence[Prompt]) -> list[Sampled]:
        if stopped.is_set():
            raise CancelledError
        return ask(prompts)

    with ThreadPoolExecutor(num_threads) as pool:
        try:
            playing = [pool.submit(play, [episode], ask_unless_stopped, map) for episode in episodes]
            seconds = [done.result() for done in as_completed(playing)]
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sum(generation for generation, _ in seconds), sum(environment for _, environment in seconds)


def _play(
    episodes: Sequence[_Episode],
    ask: Ask,
    each: Callable[[Callable[[_Episode], Outcome], Sequence[_Episode]], Iterable[Outcome]],
    *,
    start: Callable[[Task], Environment],
    recalls: dict[tuple[str, str], Recall],
    temperature: float,
    max_turns: int,
) -> tuple[float, float]:
    """Play episodes to their ends, in step with each other; return the seconds of generation and of environment.

    Args:
        episodes: what is played.
        ask: gets the prompts of all episodes that can speak at the same time.
        each: lets several environments act, as `map` does.
        start: makes a fresh environment for a task.
        recalls: what was recalled, by the task's key and the role's name.
        temperature: written into the messages.
        max_turns: number of steps after which an episode ends.
    """
    generation = 0.0
    began = time.perf_counter()
    for episode in episodes:
        episode.begin(start)
    environment = time.perf_counter() - began
    while playing := [episode for episode in episodes if not episode.done]:
        began = time.perf_counter()
        _speak(playing, ask, recalls, temperature)
        generation += time.perf_counter() - began
        began = time.perf_counter()
        for episode, outcome in zip(playing, each(_Episode.act, playing), strict=True):
            assert episode.action is not None
            episode.steps.append(
                Step(
                    messages=tuple(episode.messages),
                    action=episode.action.text,
                    observation=outcome.observation,
                    info=outcome.info | ({"team": dict(episode.action.record)} if episode.action.record else {}),
                )
            )
            episode.messages, episode.action = [], None
            episode.done = episode.done or outcome.done or len(episode.steps) == max_turns
            episode.reward = outcome.reward
        environment += time.perf_counter() - began
    return generation, environment


def _speak(
    episodes: Sequence[_Episode],
    ask: Ask,
    recalls: dict[tuple[str, str], Recall],
    temperature: float,
) -> None:
    """Play one turn of each episode up to its action."""
    for episode in episodes:
        episode.advance(None)
    while speaking := [episode for episode in episodes if episode.calls]:
        pending: list[tuple[_Episode, Call, Recall, Prompt]] = []
        for episode in speaking:
            for number, call in enumerate(episode.calls, len(episode.messages)):
                if (episode.task.key, call.role.name) not in recalls:
                    known = [role.name for role in episode.team.roles]
                    raise ConfigError(
                        f"team {episode.team.name}: {call.role.name!r} speaks but is not among its roles; "
                        f"{suggest(call.role.name, known)}"
                    )
                recall = recalls[episode.task.key, call.role.name]
                pending.append((episode, call, recall, _prompt(episode, call, recall, number)))
        # Rows of one role and task stand side by side, because their prompts begin alike.
        order = sorted(range(len(pending)), key=lambda i: pending[i][3].group)
        responses = ask([pending[i][3] for i in order])
        by_row = dict(zip(order, responses, strict=True))
        for row, (episode, call, recall, _) in enumerate(pending):
            sampled = by_row[row]
            episode.messages.append(message_of(call, sampled, recall, temperature))
        for episode in speaking:
            episode.advance([m.response for m in episode.messages[-len(episode.calls) :]])


def _prompt(episode: _Episode, call: Call, recall: Recall, number: int) -> Prompt:
    group = f"task {_label(episode.task)}, {call.role.name}"
    return prompt_of(call, recall, group, stream_seed(episode.seed, len(episode.steps), number))


def prompt_of(call: Call, recall: Recall, group: str, seed: int) -> Prompt:
    """Return the prompt of a call, with the memory in it."""
    served = call.served
    memory = "" if recall.record.num_latents else recall.record.text
    return Prompt(
        role=call.role.name,
        system=call.system,
        user=recall.record.before(call.user),
        group=group,
        seed=seed,
        latents=recall.latents,
        adapter=recall.adapter,
        conversation=None if served is None else served.conversation.before(memory),
        limit=None if served is None else served.limit,
        stop=() if served is None else served.stop,
        on_tokens=None if served is None else served.on_tokens,
    )


def message_of(call: Call, sampled: Sampled, recall: Recall, temperature: float) -> Message:
    """Return the message that answers a call."""
    served = call.served
    return Message(
        role=call.role.name,
        system=call.system,
        user=call.user,
        response=sampled.text,
        token_ids=sampled.token_ids,
        logps=sampled.logps,
        finish=sampled.finish,
        temperature=temperature,
        num_prompt_tokens=sampled.num_prompt_tokens,
        reads=call.reads,
        recalled=recall.record,
        served=None if served is None else _served(served, sampled, recall),
    )


def _served(asked: ServedCall, sampled: Sampled, recall: Recall) -> Served:
    return Served(
        call=asked.call,
        conversation=asked.conversation,
        prompt_ids=sampled.prompt_ids,
        lineage=asked.lineage,
        weights=sampled.weights,
        composer=recall.composer,
        latents="" if recall.latents is None else digest_of(recall.latents),
    )


def digest_of(latents: Tensor) -> str:
    """Return a hash of latents [K, d_agent]."""
    return hashlib.sha256(latents.float().cpu().numpy().tobytes()).hexdigest()[:32]


def _label(task: Task) -> str:
    """Describe the task in a few words, for errors; a task without an id by the beginning of its text."""
    text = " ".join(task.text.split())
    return task.key if task.id is not None else repr(text if len(text) <= 60 else f"{text[:60]}...")
