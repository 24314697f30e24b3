"""Teams that play in turns: in each round they name the agents that can speak, and these form one batch.

Episodes of a local model advance in step, and the agents of all of them are one batch. A model that many threads may
ask at once makes its batches itself; then each episode is played apart. Both ways are the same loop.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from latentmem.environments.environment import Environment, Outcome
from latentmem.errors import ConfigError, suggest
from latentmem.memory.memory import Recall
from latentmem.models.agent import Prompt, Sampled
from latentmem.rollout.episodes import Episode
from latentmem.rollout.prompts import group_of, message_of, prompt_of
from latentmem.seeds import stream_seed
from latentmem.teams.turn import Action, Call, Team, Turn
from latentmem.trajectory import Task

Ask = Callable[[Sequence[Prompt]], list[Sampled]]
"""A function: prompts -> one response each, in their order."""


@dataclass
class TurnEpisode(Episode):
    """An episode of a team that plays in turns."""

    team: Team
    turn: Turn | None = None
    calls: list[Call] = field(default_factory=list)

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


def play_in_step(
    episodes: Sequence[TurnEpisode],
    ask: Ask,
    each: Callable[[Callable[[TurnEpisode], Outcome], Sequence[TurnEpisode]], Iterable[Outcome]],
    *,
    start: Callable[[Task], Environment],
    recalls: Mapping[tuple[str, str], Recall],
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
        for episode, outcome in zip(playing, each(TurnEpisode.act, playing), strict=True):
            episode.end_step(outcome, len(episode.steps) + 1 == max_turns)
        environment += time.perf_counter() - began
    return generation, environment


def _speak(
    episodes: Sequence[TurnEpisode],
    ask: Ask,
    recalls: Mapping[tuple[str, str], Recall],
    temperature: float,
) -> None:
    """Play one turn of each episode up to its action."""
    for episode in episodes:
        episode.advance(None)
    while speaking := [episode for episode in episodes if episode.calls]:
        pending: list[tuple[TurnEpisode, Call, Recall, Prompt]] = []
        for episode in speaking:
            for number, call in enumerate(episode.calls, len(episode.messages)):
                if (episode.task.key, call.role.name) not in recalls:
                    known = [role.name for role in episode.team.roles]
                    raise ConfigError(
                        f"team {episode.team.name}: {call.role.name!r} speaks but is not among its roles; "
                        f"{suggest(call.role.name, known)}"
                    )
                recall = recalls[episode.task.key, call.role.name]
                seed = stream_seed(episode.seed, len(episode.steps), number)
                prompt = prompt_of(call, recall, group_of(episode.task, call.role.name), seed)
                pending.append((episode, call, recall, prompt))
        # Rows of one role and task stand side by side, because their prompts begin alike.
        order = sorted(range(len(pending)), key=lambda i: pending[i][3].group)
        responses = ask([pending[i][3] for i in order])
        by_row = dict(zip(order, responses, strict=True))
        for row, (episode, call, recall, _) in enumerate(pending):
            sampled = by_row[row]
            episode.messages.append(message_of(call, sampled, recall, temperature))
        for episode in speaking:
            episode.advance([m.response for m in episode.messages[-len(episode.calls) :]])
