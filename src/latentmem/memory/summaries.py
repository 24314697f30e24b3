"""Voyager's memory: each episode is stored under a language model's description of its use, and found by that.

After Wang et al. 2023, "Voyager" (arXiv 2305.16291), section 2.2, the skill library: a verified program is the value,
and the embedding of a generated description is its key. Here an episode, by default a successful one, takes the
program's place. Voyager's model writes a plan, and the plan is the query; here the query is the task's own text, as in
the comparisons of G-Memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentmem.bank import ExperienceBank
from latentmem.config import BankSection, MemorySection, VoyagerSection
from latentmem.memory.learned import EPISODE_WORDS, Notes, Scribe, Similarity, failures_too
from latentmem.memory.memory import Spent, describe, tell
from latentmem.parsing import Form
from latentmem.templates import fill
from latentmem.trajectory import Recalled, Role, Task, Trajectory

DEFAULTS = BankSection()


class _Notes(Form):
    summaries: dict[str, str]
    """A description of each episode, by the trajectory's id."""


class Summaries:
    """The method of Voyager: a description for each episode."""

    kind = "voyager"
    form = _Notes

    def __init__(
        self,
        scribe: Scribe,
        similarity: Similarity,
        num_retrieved: int = DEFAULTS.num_retrieved,
        section: VoyagerSection = VoyagerSection(),  # noqa: B008 - it is frozen
        words: MemorySection = MemorySection(),  # noqa: B008
        *,
        only_successes: bool = DEFAULTS.only_successes,
    ) -> None:
        self.scribe = scribe
        self.similarity = similarity
        self.num_retrieved = num_retrieved
        self.success = True if only_successes else None
        self.section = section
        self.words = words

    @property
    def settings(self) -> Mapping[str, Any]:
        """Model, prompt, and how episodes are told."""
        return {
            **self.scribe.settings,
            "voyager": self.section.model_dump(),
            "words": self.words.model_dump(include=EPISODE_WORDS),
            **failures_too(self.success),
        }

    @property
    def spent(self) -> Spent:
        """The cost of the scribe's replies so far."""
        return self.scribe.spent

    def begin(self) -> Notes:
        """Return notes without a description."""
        return {"summaries": {}}

    def learn(self, notes: Notes, episodes: Sequence[Trajectory]) -> None:
        """Summarise the episodes that may be told, all at once; count an empty reply, and keep the task's text."""
        kept = [episode for episode in episodes if episode.success or not self.success]
        texts = [self.scribe.shorten(describe(episode, self.words)) for episode in kept]
        prompts = [fill(self.section.summary, episode=text) for text in texts]
        replies = self.scribe.ask("summary", self.section.system, prompts)
        for episode, reply in zip(kept, replies, strict=True):
            if not reply:
                self.scribe.note_malformed({"empty summary": 1})
            notes["summaries"][episode.id] = reply or episode.task.text

    def recall(self, notes: Notes, bank: ExperienceBank, queries: Sequence[tuple[Task, Role]]) -> list[Recalled]:
        """Recall the episodes whose keys are nearest to the task, the older on ties; all roles are told the same."""
        tasks = list({task.key: task for task, _ in queries}.values())
        ids = list(notes["summaries"])
        cosines = self.similarity([task.text for task in tasks], list(notes["summaries"].values()))
        told = {}
        for task, row in zip(tasks, cosines, strict=True):
            own = set(bank.ids_of(task))
            ranked = [ids[i] for i in np.argsort(-row, kind="stable") if ids[i] not in own]
            found = bank.get(ranked[: self.num_retrieved])
            sources = tuple(trajectory.id for trajectory in found)
            told[task.key] = Recalled(kind=self.kind, text=tell(found, self.words), sources=sources)
        return [told[task.key] for task, _ in queries]
