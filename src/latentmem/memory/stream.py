"""The memory stream of generative agents: past episodes scored by recency, importance and relevance together.

After Park et al. 2023, "Generative Agents" (arXiv 2304.03442), section 4.1: each of the three is scaled to [0, 1] over
the candidates, and they are added up, all with weight 1. What differs here:
- Relevance is a language model's rating for the task at hand, as in comparisons of team memories, not a cosine. The
  cosine chooses the candidates, twice as many as are told.
- A rating is the expected value of an answer from 1 to 10 (see `rating`), not a number parsed from a reply.
- Recency decays by 0.995 with each rated episode stored later, because a bank has no hours. The paper counts from the
  last recall; then what one batch is told would depend on which batches were played before it, and by whom.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import FiniteFloat

from latentmem.bank import ExperienceBank
from latentmem.config import BankSection, GenerativeSection, MemorySection
from latentmem.memory.learned import EPISODE_WORDS, Notes, failures_too
from latentmem.memory.memory import Spent, tell
from latentmem.memory.retrieval import Rate
from latentmem.parsing import Form
from latentmem.trajectory import Recalled, Role, Task, Trajectory

DEFAULTS = BankSection()


class _Notes(Form):
    importance: dict[str, FiniteFloat]
    """The rating of each episode, from 1 to 10, by the trajectory's id, in the order of storing."""


class Stream:
    """The method of generative agents: a rating of each episode."""

    kind = "generative"
    form = _Notes

    def __init__(
        self,
        relevance: Rate,
        importance: Rate,
        num_retrieved: int = DEFAULTS.num_retrieved,
        section: GenerativeSection = GenerativeSection(),  # noqa: B008 - it is frozen
        words: MemorySection = MemorySection(),  # noqa: B008
        raters: Mapping[str, Any] | None = None,
        *,
        only_successes: bool = DEFAULTS.only_successes,
    ) -> None:
        """Take the raters and the settings of the method.

        Args:
            relevance: rates candidates for a task.
            importance: rates episodes by themselves; each is given with its own task.
            num_retrieved: number of episodes told.
            section: weights, decay and prompt.
            words: how episodes are told.
            raters: what else the ratings of importance depend on.
            only_successes: whether failures are left out.
        """
        self.relevance = relevance
        self.importance = importance
        self.num_retrieved = num_retrieved
        self.success = True if only_successes else None
        self.section = section
        self.words = words
        self.raters = dict(raters or {})

    @property
    def settings(self) -> Mapping[str, Any]:
        """The prompt, and how episodes are told; not the weights, which do not affect importance."""
        prompts = {"importance": self.section.importance, "importance_system": self.section.importance_system}
        words = {"words": self.words.model_dump(include=EPISODE_WORDS)}
        return self.raters | prompts | words | failures_too(self.success)

    @property
    def spent(self) -> Spent:
        """The cost of both kinds of ratings so far."""
        return self.relevance.spent + self.importance.spent

    def begin(self) -> Notes:
        """Return notes without a rating."""
        return {"importance": {}}

    def learn(self, notes: Notes, episodes: Sequence[Trajectory]) -> None:
        """Rate the episodes that may be told, all at once."""
        kept = [episode for episode in episodes if episode.success or not self.success]
        ratings = self.importance([(episode.task, episode) for episode in kept])
        notes["importance"] |= {episode.id: rating for episode, rating in zip(kept, ratings, strict=True)}

    def recall(self, notes: Notes, bank: ExperienceBank, queries: Sequence[tuple[Task, Role]]) -> list[Recalled]:
        """Recall the candidates with the highest scores, the nearer on ties; all roles are told the same."""
        tasks = list({task.key: task for task, _ in queries}.values())
        hits = bank.search_many(tasks, k=2 * self.num_retrieved, success=self.success)
        importance: dict[str, float] = notes["importance"]
        ages = {id_: age for age, id_ in enumerate(reversed(importance))}
        candidates = [[hit.trajectory for hit in found if hit.trajectory.id in ages] for found in hits]
        pairs = [(task, trajectory) for task, found in zip(tasks, candidates, strict=True) for trajectory in found]
        ratings = iter(self.relevance(pairs))
        told = {}
        for task, found in zip(tasks, candidates, strict=True):
            parts = (
                (self.section.recency_weight, [self.section.recency_decay ** ages[t.id] for t in found]),
                (self.section.importance_weight, [importance[t.id] for t in found]),
                (self.section.relevance_weight, [next(ratings) for _ in found]),
            )
            scores = [sum(values) for values in zip(*([w * x for x in scaled(xs)] for w, xs in parts), strict=True)]
            best = [found[i] for i in sorted(range(len(found)), key=lambda i: -scores[i])[: self.num_retrieved]]
            sources = tuple(trajectory.id for trajectory in best)
            told[task.key] = Recalled(kind=self.kind, text=tell(best, self.words), sources=sources)
        return [told[task.key] for task, _ in queries]


def scaled(values: Sequence[float]) -> list[float]:
    """Shift and scale the values to reach from 0 to 1; if all are equal, they say nothing and become 0.

    >>> scaled([2.0, 4.0, 3.0]), scaled([5.0, 5.0])
    ([0.0, 1.0, 0.5], [0.0, 0.0])
    """
    low, high = min(values, default=0.0), max(values, default=0.0)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]
