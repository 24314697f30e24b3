"""OAgents' memory: a short numbered list of insights, which a language model revises as episodes come in.

Comparisons call it OAgents (Zhu et al. 2025, arXiv 2506.15741, its long-term memory). The operations on the list and
their scores are those of ExpeL (Zhao et al. 2023, arXiv 2308.10144, section 4.2): a new insight starts at 2, agreeing
and editing add 1, removing subtracts 1, and at 0 the insight is dropped. Like ExpeL's agents, ours are told the
insights and the nearest successes. What differs:
- ExpeL has one prompt for a failure and a success on one task, and another for several successes. Here one prompt
  serves for the episodes that were stored next to each other; with several rollouts of a task, these are failures and
  successes on one task.
- A full list drops the insight with the lowest score; in ExpeL's full list, removals weigh more.

An insight remembers the episodes of every round that added, edited, agreed with or disputed it. It is never told for a
task that one of them was played on. One influence is not recorded: the insights that the model had merely read when it
wrote another.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from latentmem.bank import ExperienceBank
from latentmem.config import BankSection, InsightsSection, MemorySection
from latentmem.memory.learned import EPISODE_WORDS, Notes, Scribe
from latentmem.memory.memory import Spent, describe, tell
from latentmem.parsing import Form
from latentmem.templates import fill
from latentmem.trajectory import Recalled, Role, Task, Trajectory

DEFAULTS = BankSection()

FIRST_SCORE = 2
MAX_OPERATIONS = 4
"""The most operations taken from one reply."""

MAX_CHARACTERS = 300
"""The most characters kept of an insight; a model that rambles would fill every later prompt."""

Insight = dict[str, Any]
"""As `InsightForm` says."""


class InsightForm(Form):
    """One insight in the notes."""

    text: str
    """One line."""
    score: Annotated[int, Field(ge=1)]
    sources: tuple[str, ...]
    """Ids of the trajectories that had a part in it."""


class _Notes(Form):
    insights: tuple[InsightForm, ...]


_BULLET = r"[\s>*#-]*(?:[0-9]{1,3}[.)]\s*)?\**"
_OPERATION = re.compile(_BULLET + r"(ADD|EDIT|AGREE|REMOVE)\b\**\s*#?([0-9]{0,4})[\s*]*(:?)\s*(.*)")


class Insights:
    """The method of insights and nearest episodes, by default successes; notes: {"insights": a list of `Insight`}."""

    kind = "oagents"
    form = _Notes

    def __init__(
        self,
        scribe: Scribe,
        num_retrieved: int = DEFAULTS.num_retrieved,
        section: InsightsSection = InsightsSection(),  # noqa: B008 - it is frozen
        words: MemorySection = MemorySection(),  # noqa: B008
        *,
        only_successes: bool = DEFAULTS.only_successes,
    ) -> None:
        self.scribe = scribe
        self.num_retrieved = num_retrieved
        self.success = True if only_successes else None
        self.section = section
        self.words = words

    @property
    def settings(self) -> Mapping[str, Any]:
        """Model, prompts, limits, and how episodes are told."""
        words = self.words.model_dump(include={*EPISODE_WORDS, "nothing"})
        return self.scribe.settings | {"insights": self.section.model_dump(exclude={"told"}), "words": words}

    @property
    def spent(self) -> Spent:
        """The cost of the scribe's replies so far."""
        return self.scribe.spent

    def begin(self) -> Notes:
        """Return an empty list."""
        return {"insights": []}

    def learn(self, notes: Notes, episodes: Sequence[Trajectory]) -> None:
        """Revise the list, round by round."""
        told = [(episode.id, self.scribe.shorten(describe(episode, self.words))) for episode in episodes]
        mend(notes["insights"], told, self.scribe, self.section, self.words.nothing)

    def recall(self, notes: Notes, bank: ExperienceBank, queries: Sequence[tuple[Task, Role]]) -> list[Recalled]:
        """Recall all insights, the best first, and the nearest episodes; all roles are told the same."""
        tasks = list({task.key: task for task, _ in queries}.values())
        hits = bank.search_many(tasks, k=self.num_retrieved, success=self.success)
        told = {}
        for task, found in zip(tasks, hits, strict=True):
            episodes = [hit.trajectory for hit in found]
            insights = numbered(ranked(notes["insights"], without=bank.ids_of(task)))
            parts = [fill(self.section.told, insights=insights) if insights else "", tell(episodes, self.words)]
            sources = tuple(trajectory.id for trajectory in episodes)
            told[task.key] = Recalled(kind=self.kind, text="\n\n".join(filter(None, parts)), sources=sources)
        return [told[task.key] for task, _ in queries]


def mend(
    insights: list[Insight], episodes: Sequence[tuple[str, str]], scribe: Scribe, section: InsightsSection, nothing: str
) -> None:
    """Let a language model revise the list in place.

    Args:
        insights: the list.
        episodes: ids and texts, in the order of storing; shown a few at a time.
        scribe: asked once per round.
        section: prompts and limits.
        nothing: text shown for an empty list.
    """
    for start in range(0, len(episodes), section.episodes_per_round):
        shown = episodes[start : start + section.episodes_per_round]
        prompt = fill(
            section.revise,
            insights=numbered(insights) or nothing,
            episodes="\n\n".join(text for _, text in shown),
            max_insights=str(section.max_insights),
        )
        (reply,) = scribe.ask("insights", section.system, [prompt])
        scribe.note_malformed(apply(insights, reply, [id_ for id_, _ in shown], section.max_insights))


def apply(insights: list[Insight], reply: str, sources: Sequence[str], max_insights: int) -> Counter[str]:
    """Change the list in place as a reply says, as far as the reply can be understood.

    Each line holds one operation: `ADD: text`, `EDIT 2: text`, `AGREE 2`, `REMOVE 2`. The numbers are those of the list
    as it was shown. Bullets and stars around them are ignored, and so is what follows AGREE and REMOVE. An ADD of an
    insight that is already on the list agrees with it.

    Returns:
        Counts of what could not be used, by reason.
    """
    malformed: Counter[str] = Counter()
    shown = list(insights)
    named: set[int] = set()
    num_done = 0
    lines = [line for line in reply.splitlines() if line.strip()]
    found = [_OPERATION.match(line) for line in lines]
    if not any(found):
        return Counter({"reply without an operation": 1})
    for match in found:
        if match is None:
            malformed["line without an operation"] += 1
            continue
        if num_done == MAX_OPERATIONS:
            malformed["operation beyond the limit"] += 1
            continue
        word, digits, colon, rest = match.groups()
        text = " ".join(rest.split())[:MAX_CHARACTERS].strip() if colon else ""
        if word in ("ADD", "EDIT") and not text:
            malformed["operation without a text"] += 1
            continue
        if word == "ADD":
            same = next((insight for insight in insights if insight["text"] == text), None)
            if same is None:
                same = {"text": text, "score": FIRST_SCORE - 1, "sources": []}
                insights.append(same)
            _score(same, 1, sources)
        elif not digits or not 1 <= int(digits) <= len(shown):
            malformed["no insight of that number"] += 1
            continue
        elif int(digits) in named:
            malformed["second operation on one insight"] += 1
            continue
        else:
            named.add(int(digits))
            insight = shown[int(digits) - 1]
            if word == "EDIT":
                insight["text"] = text
            _score(insight, -1 if word == "REMOVE" else 1, sources)
        num_done += 1
    insights[:] = [insight for insight in insights if insight["score"] > 0]
    for _ in range(len(insights) - max_insights):
        insights.remove(min(insights, key=lambda insight: insight["score"]))
    return malformed


def ranked(insights: Sequence[Insight], without: Collection[str] = ()) -> list[Insight]:
    """Sort by score, the older first on ties; leave out insights that an episode of `without` had a part in."""
    banned = set(without)
    kept = [insight for insight in insights if banned.isdisjoint(insight["sources"])]
    return sorted(kept, key=lambda insight: -insight["score"])


def numbered(insights: Sequence[Insight]) -> str:
    """Write one line per insight, numbered from 1; return an empty text if there are none."""
    return "\n".join(f"{number}. {insight['text']}" for number, insight in enumerate(insights, 1))


def _score(insight: Insight, change: int, sources: Sequence[str]) -> None:
    insight["score"] += change
    insight["sources"] = list(dict.fromkeys([*insight["sources"], *sources]))
