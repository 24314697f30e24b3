"""How sessions end: an ended session becomes a trajectory in the bank, once, whatever is killed when.

First it is kept that the session has ended, and how; then the trajectory goes to the bank, which knows a trajectory
that it has already; then the session moves to its last state. After a crash the steps that are missing are done again.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from latentmem.serving.sessions.session import Ending, Session, Storing, end
from latentmem.serving.sessions.store import SessionStore
from latentmem.trajectory import Trajectory

logger = logging.getLogger(__name__)

Keep = Callable[[Sequence[Trajectory]], object]
"""A function that puts trajectories into the bank; when it returns they are on stable storage."""


class Endings:
    """Ends sessions of one store; threads may share it."""

    def __init__(self, store: SessionStore, keep: Keep, storing: Storing, idle_seconds: float) -> None:
        """Take the store, the bank and what decides whether an episode is stored.

        Args:
            store: the sessions.
            keep: puts trajectories into the bank.
            storing: what decides whether it does.
            idle_seconds: a session in which nothing happens for so long is ended.
        """
        self.store = store
        self.storing = storing
        self.idle_seconds = idle_seconds
        self._keep = keep
        self._lock = threading.Lock()

    def complete(self, session: Session, ending: Ending) -> Session:
        """End a session and return it as it is then; one that has ended before stays as it was.

        Rewards that were told as events count where the ending names none.
        """
        return self._finish(self.store.end(session, ending).result())

    def end_idle(self, now: float | None = None) -> int:
        """End the sessions in which nothing happened for too long, and return their number."""
        idle = self.store.idle_since((time.time() if now is None else now) - self.idle_seconds)
        return sum(self.complete(session, Ending(cause="idle")).is_over for session in idle)

    def resume(self, before: float | None = None) -> int:
        """Finish what was begun to end before a moment, but could not be stored, and return the number of sessions."""
        half_ended = [session for session in self.store.half_ended() if before is None or session.touched < before]
        for session in half_ended:
            self._finish(session)
        return len(half_ended)

    def _finish(self, session: Session) -> Session:
        if session.ending is None or session.outcome is not None:
            return session
        # No event is taken any more, so whoever finishes it finds the same rewards.
        whole = replace(session, ending=merged(session.ending, self.store.events(session)))
        ended = end(whole, self.store.calls(session), self.storing)
        if ended.trajectory is not None:
            with self._lock:
                self._keep([ended.trajectory])
        return self.store.move(session, ended).result()


def merged(ending: Ending, events: Sequence[Mapping[str, Any]]) -> Ending:
    """Return the ending with the rewards that events told: the last for the team, and the last for each role."""
    reward, rewards = None, {}
    for event in events:
        if event.get("event_type") == "reward":
            data = event["data"]
            if data.get("agent") is None:
                reward = data["value"]
            else:
                rewards[data["agent"]] = data["value"]
    return ending.model_copy(
        update={
            "reward": reward if ending.reward is None else ending.reward,
            "rewards": {**rewards, **ending.rewards},
        }
    )
