"""What is recalled in a rollout: the memory is asked once for each task and role, whoever finds the role first."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock

from latentmem.memory.memory import Memory, Recall, Spent
from latentmem.trajectory import Role, Task

Query = tuple[Task, Role]


class SharedRecalls:
    """The recalls of all episodes of a rollout; several threads may ask."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.alone: AbstractContextManager[object] = nullcontext()
        """Held while the memory is asked, so that nobody else uses its model then."""
        self.found: dict[tuple[str, str], Recall] = {}
        """By the task's key and the role's name."""
        self.spent = Spent()
        self.searching = 0.0
        """Seconds of recalling, without those of the memory's own networks."""
        self._asking = Lock()
        self._noting = Lock()
        self._missing: dict[tuple[str, str], Query] = {}

    def ask(self, queries: Sequence[Query]) -> list[Recall]:
        """Return the recalls for the queries. What several threads miss at the same time is asked in one batch."""
        keys = [_key(query) for query in queries]
        with self._noting:
            self._missing |= {key: query for key, query in zip(keys, queries, strict=True) if key not in self.found}
        if any(key not in self.found for key in keys):
            with self._asking:
                with self._noting:
                    missing, self._missing = self._missing, {}
                # What another thread took along and failed to get is asked again.
                missing |= dict(zip(keys, queries, strict=True))
                self._recall([query for key, query in missing.items() if key not in self.found])
        return [self.found[key] for key in keys]

    def _recall(self, queries: list[Query]) -> None:
        if not queries:
            return
        began = time.perf_counter()
        with self.alone:
            found = self.memory.recall_many(queries)
        self.searching += time.perf_counter() - began - found.spent.composing_seconds
        self.spent += found.spent
        self.found |= {_key(query): recall for query, recall in zip(queries, found, strict=True)}


def _key(query: Query) -> tuple[str, str]:
    task, role = query
    return task.key, role.name
