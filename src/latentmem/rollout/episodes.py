"""What every episode has, whichever way its team plays: the world, the steps so far, the reward, and how it failed."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from latentmem.environments.environment import Environment, Listener, Outcome
from latentmem.errors import LatentMemError
from latentmem.outside import well_formed
from latentmem.teams.turn import Action, Player
from latentmem.trajectory import Message, Step, Task, Trajectory


@dataclass
class Episode:
    """One episode in progress."""

    task: Task
    team: Player
    seed: int
    environment: Environment | None = None
    instructions: str = ""
    steps: list[Step] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    """The messages of the step in progress."""
    action: Action | None = None
    reward: float = 0.0
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Rewards of single roles, by name."""
    error: str | None = None
    done: bool = False

    def begin(self, start: Callable[[Task], Environment]) -> None:
        """Make the environment."""
        with self._failure_is_data():
            self.environment = start(self.task)
            self.instructions = well_formed(self.environment.instructions)

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

    def end_step(self, outcome: Outcome, is_last: bool) -> None:
        """Keep the messages, the action and its outcome as a step."""
        assert self.action is not None
        self.steps.append(
            Step(
                messages=tuple(self.messages),
                action=self.action.text,
                observation=outcome.observation,
                info=outcome.info | ({"team": dict(self.action.record)} if self.action.record else {}),
            )
        )
        self.messages, self.action = [], None
        self.done = self.done or outcome.done or is_last
        self.reward = outcome.reward

    def trajectory(self, model: str) -> Trajectory:
        """Return the finished episode; `model` is the name of the agents' model."""
        return Trajectory(
            task=self.task,
            team=self.team.name,
            model=model,
            steps=tuple(self.steps),
            reward=self.reward,
            success=self.reward == 1,
            error=self.error,
            seed=self.seed,
            rewards=dict(self.rewards),
        )

    @contextmanager
    def _failure_is_data(self) -> Iterator[None]:
        """Turn an exception of the environment into the end of its episode."""
        try:
            yield
        except LatentMemError:
            raise
        except Exception as error:
            self.error = well_formed(f"environment: {type(error).__name__}: {error}")
            self.done = True
