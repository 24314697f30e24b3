"""The one loop in which a team plays: team x memory x environment -> trajectories.

Many episodes advance side by side. In each round, every episode's team names the agents that can speak now; all of
them are one batch of the model. A single-turn task is an episode of one step.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from latentmem.environments.environment import Environment, Outcome
from latentmem.errors import LatentMemError
from latentmem.memory.memory import Memory, Recall
from latentmem.models.language_model import AgentModel, Prompt, Sampling, stream_seed
from latentmem.teams.team import Call, Team, Turn
from latentmem.trajectory import Message, Step, Task, Trajectory


@dataclass(frozen=True)
class Seconds:
    """Where the time of a rollout went, in seconds of wall clock."""

    recall: float
    """Searching the bank and writing out what was found."""
    composing: float
    """The memory's own networks."""
    generation: float
    """The agents' responses."""
    environment: float
    """Scoring, such as running code."""


@dataclass(frozen=True)
class Rollouts:
    """Groups of trajectories, one group a task, and what they cost."""

    groups: list[list[Trajectory]]
    seconds: Seconds

    @property
    def trajectories(self) -> list[Trajectory]:
        """All of them, task by task."""
        return [trajectory for group in self.groups for trajectory in group]


@dataclass
class _Episode:
    task: Task
    index: int
    seed: int
    environment: Environment
    steps: list[Step] = field(default_factory=list)
    turn: Turn | None = None
    calls: list[Call] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    action: str | None = None
    reward: float = 0.0
    error: str | None = None
    done: bool = False

    def advance(self, team: Team, responses: list[str] | None) -> None:
        """Let the team name its next calls, or its action."""
        if self.turn is None:
            self.turn = team.turn(self.task.text, self.environment.instructions, self.steps)
        try:
            self.calls = next(self.turn) if responses is None else self.turn.send(responses)
        except StopIteration as stop:
            self.calls, self.action, self.turn = [], stop.value, None

    def act(self) -> Outcome:
        """Give the action to the environment. This is the one place where a failure becomes data."""
        assert self.action is not None
        try:
            return self.environment.step(self.action)
        except LatentMemError:
            raise
        except Exception as error:
            self.error = f"environment: {type(error).__name__}: {error}"
            return Outcome(observation="", reward=0.0, done=True, info={"extracted": None})


def rollout(
    team: Team,
    memory: Memory,
    model: AgentModel,
    tasks: Sequence[Task],
    start: Callable[[Task], Environment],
    *,
    sampling: Sampling,
    group_size: int = 1,
    seed: int = 0,
    max_turns: int = 1,
    workers: int = 2,
) -> Rollouts:
    """Play each task `group_size` times.

    Memory is asked once for each task and role. Each response has a random stream of its own, made from the seed, the
    task, the rollout's number, the turn and the message's number: it does not depend on which episodes share a batch.

    Args:
        team: who plays.
        memory: asked before the first turn; it is not added to.
        model: speaks for all agents.
        tasks: what is played; no task twice.
        start: makes a fresh environment for a task.
        sampling: how responses are drawn.
        group_size: G, episodes of each task.
        seed: of all random streams.
        max_turns: an episode that is not done by then ends with its last reward.
        workers: environments stepped at once.

    Raises:
        ModelError: a prompt exceeds the model's context window.
    """
    began, composed = time.perf_counter(), memory.composing_seconds
    roles = {role.name: role for role in team.roles}
    queries = [(task, role) for task in tasks for role in roles.values()]
    recalls = {(task.key, role.name): r for (task, role), r in zip(queries, memory.recall_many(queries), strict=True)}
    recalled = time.perf_counter() - began
    composing = memory.composing_seconds - composed
    generation = environment = 0.0

    episodes = [
        _Episode(task, i, stream_seed(seed, task.key, i), start(task)) for task in tasks for i in range(group_size)
    ]
    with ThreadPoolExecutor(workers) as pool:
        while playing := [episode for episode in episodes if not episode.done]:
            began = time.perf_counter()
            _speak(playing, team, model, recalls, sampling)
            generation += time.perf_counter() - began
            began = time.perf_counter()
            for episode, outcome in zip(playing, pool.map(_Episode.act, playing), strict=True):
                assert episode.action is not None
                episode.steps.append(
                    Step(
                        messages=tuple(episode.messages),
                        action=episode.action,
                        observation=outcome.observation,
                        info=outcome.info,
                    )
                )
                episode.messages, episode.action = [], None
                episode.done = outcome.done or len(episode.steps) == max_turns
                episode.reward = outcome.reward
            environment += time.perf_counter() - began

    finished = [
        Trajectory(
            task=episode.task,
            team=team.name,
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
    return Rollouts(groups, Seconds(recalled - composing, composing, generation, environment))


def _speak(
    episodes: Sequence[_Episode],
    team: Team,
    model: AgentModel,
    recalls: dict[tuple[str, str], Recall],
    sampling: Sampling,
) -> None:
    """Play one turn of each episode up to its action."""
    for episode in episodes:
        episode.advance(team, None)
    while speaking := [episode for episode in episodes if episode.calls]:
        asked = [(episode, call) for episode in speaking for call in episode.calls]
        pending: list[tuple[_Episode, Call, Recall, Prompt]] = []
        counts: dict[int, int] = {}
        for episode, call in asked:
            number = len(episode.messages) + counts.get(id(episode), 0)
            counts[id(episode)] = counts.get(id(episode), 0) + 1
            recall = recalls[episode.task.key, call.role.name]
            pending.append((episode, call, recall, _prompt(episode, call, recall, number)))
        # Rows of one role and task side by side: they share the beginning of their prompts.
        order = sorted(range(len(pending)), key=lambda i: pending[i][3].group)
        responses = model.respond([pending[i][3] for i in order], sampling)
        by_row = dict(zip(order, responses, strict=True))
        for row, (episode, call, recall, prompt) in enumerate(pending):
            sampled = by_row[row]
            episode.messages.append(
                Message(
                    role=call.role.name,
                    system=call.system,
                    user=call.user,
                    response=sampled.text,
                    token_ids=sampled.token_ids,
                    logps=sampled.logps,
                    finish=sampled.finish,
                    temperature=sampling.temperature,
                    num_prompt_tokens=sampled.num_prompt_tokens,
                    reads=call.reads,
                    recalled=recall.record,
                )
            )
        for episode in speaking:
            episode.advance(team, [m.response for m in episode.messages[-len(episode.calls) :]])


def _prompt(episode: _Episode, call: Call, recall: Recall, number: int) -> Prompt:
    return Prompt(
        role=call.role.name,
        system=call.system,
        user=recall.record.before(call.user),
        group=f"{episode.task.key} / {call.role.name}",
        seed=stream_seed(episode.seed, len(episode.steps), number),
        latents=recall.latents,
    )
