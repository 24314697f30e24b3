"""Memory as text in the prompt: the nearest trajectories, the same for every role.

Latent memory is compared with this plain baseline. Without a rater it is also what comparisons of team memories
(G-Memory, arXiv 2506.07398; LatentMem) call MetaGPT (arXiv 2308.00352): MetaGPT's pool of shared messages, extended
beyond one task by giving the next team the nearest trajectories as examples. So the memory named `metagpt` is this
class, without a rater.
"""

from collections.abc import Mapping, Sequence

from latentmem.bank import ExperienceBank
from latentmem.config import BankSection, MemorySection
from latentmem.memory.memory import Recall, Recalls, Spent, tell
from latentmem.memory.retrieval import Rate, retrieve
from latentmem.trajectory import Recalled, Role, Task, Trajectory

DEFAULTS = BankSection()


class TextMemory:
    """The nearest episodes of a bank, by default successes, placed as text before each agent's prompt."""

    kind = "text"

    def __init__(
        self,
        bank: ExperienceBank,
        num_retrieved: int = DEFAULTS.num_retrieved,
        only_successes: bool = DEFAULTS.only_successes,
        rate: Rate | None = None,
        words: MemorySection = MemorySection(),  # noqa: B008 - it is frozen
    ) -> None:
        """Take a bank and the settings of what is told.

        Args:
            bank: the bank to search.
            num_retrieved: number of trajectories told.
            only_successes: whether failures are left out.
            rate: chooses among twice as many candidates.
            words: how episodes are told.
        """
        self.bank = bank
        self.words = words
        self.num_retrieved = num_retrieved
        self.success = True if only_successes else None
        self.rate = rate

    @property
    def spent(self) -> Spent:
        """The cost of recalling so far."""
        return Spent() if self.rate is None else self.rate.spent

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> Recalls:
        """Search once; return the nearest trajectories as text, the same for all roles, or no text if none exist."""
        before = self.spent
        recalls = self.recall_from(queries, self.retrieved([task for task, _ in queries]))
        return Recalls(recalls, self.spent - before)

    def retrieved(self, tasks: Sequence[Task]) -> dict[str, list[Trajectory]]:
        """Return the trajectories told for each task, best first, by the task's key; never one of the task itself."""
        return retrieve(self.bank, tasks, self.num_retrieved, self.success, self.rate)

    def recall_from(
        self, queries: Sequence[tuple[Task, Role]], found: Mapping[str, Sequence[Trajectory]]
    ) -> list[Recall]:
        """Return the given trajectories of each query's task, by the task's key, as text."""
        recalls = {}
        for key in {task.key for task, _ in queries}:
            sources = tuple(trajectory.id for trajectory in found[key])
            recalls[key] = Recall(Recalled(kind=self.kind, text=tell(found[key], self.words), sources=sources))
        return [recalls[task.key] for task, _ in queries]

    def add(self, trajectory: Trajectory) -> None:
        """Store the trajectory in the bank."""
        self.bank.add(trajectory)
