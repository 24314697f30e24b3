"""A memory of your own: the stored episode that shares most words with the task, without any embedding."""

from collections.abc import Sequence

from latentmem import ExperienceBank, Recall, Recalled, Recalls, Role, Task, Trajectory


class KeywordMemory:
    """Tells what was done in the episode whose task has most words in common with the task at hand."""

    kind = "keyword"

    def __init__(self, bank: ExperienceBank, min_words: int = 1) -> None:
        self.bank = bank
        self.min_words = min_words

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> Recalls:
        """Tell all roles the same. Use no episode of the task itself."""
        episodes = list(self.bank)
        return Recalls([self._recall(task, episodes) for task, _ in queries])

    def add(self, trajectory: Trajectory) -> None:
        """Store the episode."""
        self.bank.add(trajectory)

    def _recall(self, task: Task, episodes: list[Trajectory]) -> Recall:
        words = set(task.text.lower().split())
        shared = {t.id: len(words & set(t.task.text.lower().split())) for t in episodes if not t.task.same_as(task)}
        best = max(
            (t for t in episodes if shared.get(t.id, 0) >= self.min_words), key=lambda t: shared[t.id], default=None
        )
        if best is None:
            return Recall(Recalled(kind=self.kind))
        text = f"Before, at the task {best.task.text!r}, the answer was {best.steps[-1].action!r}."
        return Recall(Recalled(kind=self.kind, text=text, sources=(best.id,)))
