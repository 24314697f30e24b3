"""Memory as text in the prompt: the nearest trajectories, the same for every role.

This is the plain rival that latent memory is compared with. Without rating it is also what MetaGPT (arXiv 2308.00352)
stands for where memories of teams are compared (G-Memory, arXiv 2506.07398; LatentMem): its pool of shared messages
made to last beyond one task, by giving the next team the nearest trajectories as examples. The memory called
`metagpt` is therefore this class, without a rater.
"""

from collections.abc import Mapping, Sequence

from latentmem.bank import ExperienceBank
from latentmem.config import MemorySection
from latentmem.memory.memory import Ledger, Recall, charge, tell
from latentmem.memory.retrieval import Rate, retrieve
from latentmem.trajectory import Recalled, Role, Task, Trajectory


class TextMemory:
    """The nearest episodes of a bank, by default successes, placed as text before each agent's prompt."""

    kind = "text"
    composing_seconds = 0.0

    def __init__(
        self,
        bank: ExperienceBank,
        num_retrieved: int = 3,
        only_successes: bool = True,
        rate: Rate | None = None,
        words: MemorySection = MemorySection(),  # noqa: B008 - it is frozen
        ledger: Ledger | None = None,
    ) -> None:
        """Take a bank and say what of it is told.

        Args:
            bank: searched.
            num_retrieved: trajectories told.
            only_successes: whether failures are left out.
            rate: chooses among twice as many.
            words: how episodes are told.
            ledger: where `rate` writes down what it spends; None if nothing does.
        """
        self.bank = bank
        self.words = words
        self.num_retrieved = num_retrieved
        self.success = True if only_successes else None
        self.rate = rate
        self.ledger = ledger or Ledger()

    def recall(self, task: Task, role: Role) -> Recall:
        """The nearest trajectories as text; no text where there is none."""
        return self.recall_many([(task, role)])[0]

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> list[Recall]:
        """Searches once, for each task; all roles are told the same."""
        before = self.ledger.spent()
        recalls = self.recall_from(queries, self.retrieved([task for task, _ in queries]))
        return charge(recalls, self.ledger.spent(since=before))

    def retrieved(self, tasks: Sequence[Task]) -> dict[str, list[Trajectory]]:
        """What is told for each task, best first, by the task's key; never a trajectory of the task itself."""
        return retrieve(self.bank, tasks, self.num_retrieved, self.success, self.rate)

    def recall_from(
        self, queries: Sequence[tuple[Task, Role]], found: Mapping[str, Sequence[Trajectory]]
    ) -> list[Recall]:
        """These trajectories of each query's task as text, by the task's key."""
        recalls = {}
        for key in {task.key for task, _ in queries}:
            sources = tuple(trajectory.id for trajectory in found[key])
            recalls[key] = Recall(Recalled(kind=self.kind, text=tell(found[key], self.words), sources=sources))
        return [recalls[task.key] for task, _ in queries]

    def add(self, trajectory: Trajectory) -> None:
        """Store the trajectory in the bank."""
        self.bank.add(trajectory)
