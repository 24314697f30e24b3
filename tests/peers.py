"""Several processes as threads of one, for tests without a launcher; what they tell each other is pickled too."""

import pickle
import threading
from collections.abc import Callable
from typing import Any

from latentmem.errors import LatentMemError
from latentmem.processes import Processes


class Peer(Processes):
    """One of `size` threads that work as processes do."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: dict[int, bytes]) -> None:
        self.rank, self.size = rank, size
        self.barrier, self.table = barrier, table

    def _gather(self, part: Any) -> list[Any]:
        self.table[self.rank] = pickle.dumps(part)
        self.barrier.wait(timeout=120)
        parts = [pickle.loads(self.table[rank]) for rank in range(self.size)]
        self.barrier.wait(timeout=120)
        return parts


def together(size: int, action: Callable[[Peer], Any]) -> list[Any]:
    """What `action` returns, or raises, in each of `size` peers. One that dies takes those who wait for it along."""
    barrier, table = threading.Barrier(size), {}
    outcomes: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            outcomes[rank] = action(Peer(rank, size, barrier, table))
        except BaseException as error:
            outcomes[rank] = error
            if not isinstance(error, LatentMemError | SystemExit):
                barrier.abort()  # as a launcher ends the others

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
