"""Rollouts of the next step, played while this step updates.

What is recalled for them is recalled before the update, so latents come from the parameters of that moment, and only
sampling overlaps with the update.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

from latentmem.config import Sampling
from latentmem.errors import ConfigError
from latentmem.memory.memory import Memory, Recalls
from latentmem.models.agent import AgentModel, Prompt, Sampled
from latentmem.rollout import Rollouts
from latentmem.trajectory import Role, Task, Trajectory


class Ahead:
    """A thread that plays at most one step's rollouts."""

    def __init__(self, memory: Memory, model: AgentModel) -> None:
        """Take what the team plays with; several threads may ask the model."""
        self.memory = memory
        self.model = model
        self._pending: Future[Rollouts] | None = None
        self._stopped = Event()

    def begin(self, queries: Sequence[tuple[Task, Role]], play: Callable[[Memory, AgentModel], Rollouts]) -> None:
        """Recall now what the queries ask for, and call `play` in a thread, with a memory that holds this."""
        assert self._pending is None
        found = _Found(list(queries), self.memory.recall_many(queries))
        self._stopped = Event()
        pool = ThreadPoolExecutor(1)
        self._pending = pool.submit(play, found, _Stoppable(self.model, self._stopped))
        pool.shutdown(wait=False)

    def take(self) -> Rollouts | None:
        """Return what was played, once, after it has ended; None if nothing was begun.

        Raises:
            LatentMemError: any such error of a part; see `rollout`.
        """
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def stop(self) -> None:
        """Drop what is being played; returns when its thread has ended."""
        self._stopped.set()
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.exception()


@dataclass(frozen=True)
class _Found:
    """A memory that has recalled already."""

    queries: list[tuple[Task, Role]]
    found: Recalls
    kind: str = "found"

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> Recalls:
        if list(queries) == self.queries:
            return self.found
        found = queries[0][1].name
        raise ConfigError(
            f"lmpo.max_staleness is 1, so all is recalled before a step is played, but role {found!r} was found while "
            "playing; list it in team.roles, or set max_staleness to 0"
        )

    def add(self, trajectory: Trajectory) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class _Stoppable:
    """A model that answers until it is told to stop."""

    model: AgentModel
    stopped: Event

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def concurrent(self) -> bool:
        return self.model.concurrent

    def respond(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sampled]:
        if self.stopped.is_set():
            raise CancelledError
        return self.model.respond(prompts, sampling)
