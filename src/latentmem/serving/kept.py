"""What was composed lately, up to a number of bytes; the least recently used goes first."""

import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable

from latentmem.memory.memory import Recall


class KeptRecalls:
    """Recalls by key; many threads may use it."""

    def __init__(self, num_bytes: int) -> None:
        self._room = num_bytes
        self._recalls: OrderedDict[Hashable, Recall] = OrderedDict()
        self._used = 0
        self._state = ""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._recalls)

    @property
    def num_bytes(self) -> int:
        """Size of the latents that are kept."""
        return self._used

    def at(self, state: str) -> None:
        """Say what the kept recalls are made from now; if that has changed, all of them go."""
        with self._lock:
            if state != self._state:
                self._recalls.clear()
                self._used, self._state = 0, state

    def num_made_of(self, sources: Collection[str]) -> int:
        """Return how many recalls are kept that were made of any of these trajectories."""
        wanted = frozenset(sources)
        with self._lock:
            return sum(bool(wanted.intersection(recall.record.sources)) for recall in self._recalls.values())

    def get(self, key: Hashable) -> Recall | None:
        """Return a recall, if it is kept."""
        with self._lock:
            if key in self._recalls:
                self._recalls.move_to_end(key)
            return self._recalls.get(key)

    def put(self, key: Hashable, recall: Recall, state: str) -> None:
        """Keep a recall that was made in a state; one made in an earlier state is not kept."""
        size = _size(recall)
        with self._lock:
            if state != self._state or key in self._recalls or size > self._room:
                return
            self._recalls[key] = recall
            self._used += size
            while self._used > self._room:
                _, oldest = self._recalls.popitem(last=False)
                self._used -= _size(oldest)


def _size(recall: Recall) -> int:
    latents = 0 if recall.latents is None else recall.latents.numel() * recall.latents.element_size()
    return latents + 2 * len(recall.record.text)
