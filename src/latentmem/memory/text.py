"""Memory as text in the prompt: the nearest trajectories, the same for every role.

This is the plain rival that latent memory is compared with.
"""

from collections.abc import Sequence

from latentmem.bank import ExperienceBank
from latentmem.config import MemorySection
from latentmem.memory.memory import Recall, describe
from latentmem.memory.retrieval import Rate, retrieve
from latentmem.templates import fill
from latentmem.trajectory import Recalled, Role, Task, Trajectory


class TextMemory:
    """The nearest successes of a bank, placed as text before each agent's prompt."""

    kind = "text"
    composing_seconds = 0.0

    def __init__(
        self,
        bank: ExperienceBank,
        num_retrieved: int = 3,
        only_successes: bool = True,
        rate: Rate | None = None,
        words: MemorySection = MemorySection(),  # noqa: B008 - it is frozen
    ) -> None:
        self.bank = bank
        self.words = words
        self.num_retrieved = num_retrieved
        self.success = True if only_successes else None
        self.rate = rate

    def recall(self, task: Task, role: Role) -> Recall:
        """The nearest trajectories as text; no text where there is none."""
        return self.recall_many([(task, role)])[0]

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> list[Recall]:
        """Searches once, for each task; all roles are told the same."""
        tasks = [task for task, _ in queries]
        recalls = {}
        for key, found in retrieve(self.bank, tasks, self.num_retrieved, self.success, self.rate).items():
            episodes = "\n\n".join(describe(trajectory, self.words) for trajectory in found)
            text = fill(self.words.text, memory=episodes) if found else ""
            sources = tuple(trajectory.id for trajectory in found)
            recalls[key] = Recall(Recalled(kind=self.kind, text=text, sources=sources))
        return [recalls[task.key] for task, _ in queries]

    def add(self, trajectory: Trajectory) -> None:
        """Store the trajectory in the bank."""
        self.bank.add(trajectory)
