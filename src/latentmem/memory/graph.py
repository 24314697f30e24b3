"""G-Memory: a graph of tasks, insights that its nodes support, condensed interactions, and a brief for each role.

After Zhang et al. 2025, "G-Memory" (arXiv 2506.07398), sections 3 and 4. Its three tiers:
- *Query graph.* A node is one episode: its task, whether it was solved, its interactions. A new node is joined to the
  most similar older ones. A recall starts at the nearest nodes and follows edges for some hops.
- *Insight graph.* Insights, each with the nodes that support it. A recall takes those that a reached node supports.
- *Interaction graph.* Who said what after reading whom. A language model condenses it to what mattered. A recall tells
  the condensed form of those reached episodes (by default successes) that are rated most helpful for the task.
For each role a language model then picks what of the insights concerns that role (the paper's projection).

What differs:
- Insights are kept as in `insights`: they are supported by the episodes of the rounds that shaped them, not by later
  queries that they were told for. Edges between them are not stored, since no retrieval follows them.
- An interaction is condensed once, when it is stored, not for each task anew.
- Candidates are rated through logits (see `rating`), and their number is limited.

Before a search, the nodes of the same task are taken out of the graph, together with the insights they support.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, model_validator

from latentmem.bank import ExperienceBank
from latentmem.config import BankSection, GMemorySection, InsightsSection, MemorySection
from latentmem.memory.insights import Insight, InsightForm, mend, numbered, ranked
from latentmem.memory.learned import EPISODE_WORDS, Notes, Scribe, Similarity
from latentmem.memory.memory import Spent
from latentmem.memory.retrieval import Rate, best_rated
from latentmem.parsing import Form
from latentmem.templates import fill
from latentmem.trajectory import Recalled, Role, Task, Trajectory

DEFAULTS = BankSection()

_LEARNED = {"threshold", "max_links", "opening", "reading", "condense", "condense_system"}
"""Keys of the section that affect what is learned."""


class _Node(Form):
    """An episode; its place in the list is its number."""

    id: str
    task: str
    """The task's text."""
    solved: bool
    links: tuple[Annotated[int, Field(ge=0)], ...]
    """The numbers of older nodes."""
    condensed: str


class _Notes(Form):
    nodes: tuple[_Node, ...]
    insights: tuple[InsightForm, ...]

    @model_validator(mode="after")
    def _links_lead_to_older_nodes(self) -> Self:
        for number, node in enumerate(self.nodes):
            if any(link >= number for link in node.links):
                raise ValueError(f"node {number} is linked to one that is not older")
        return self


class Graph:
    """The method of G-Memory."""

    kind = "gmemory"
    form = _Notes

    def __init__(
        self,
        scribe: Scribe,
        similarity: Similarity,
        rate: Rate,
        num_retrieved: int = DEFAULTS.num_retrieved,
        section: GMemorySection = GMemorySection(),  # noqa: B008 - it is frozen
        insights: InsightsSection = InsightsSection(),  # noqa: B008
        words: MemorySection = MemorySection(),  # noqa: B008
        *,
        only_successes: bool = DEFAULTS.only_successes,
    ) -> None:
        """Take the models and settings of the method.

        Args:
            scribe: condenses interactions, and writes insights and briefs.
            similarity: compares task texts.
            rate: rates how helpful an episode is for a task.
            num_retrieved: number of condensed episodes told.
            section: shape of the graph, and prompts.
            insights: how insights are learned and told.
            words: how tasks and outcomes are told.
            only_successes: whether failures are left out of the condensed episodes told.
        """
        self.scribe = scribe
        self.similarity = similarity
        self.rate = rate
        self.num_retrieved = num_retrieved
        self.only_successes = only_successes
        self.section = section
        self.insights = insights
        self.words = words

    @property
    def settings(self) -> Mapping[str, Any]:
        """Model, prompts, shape, limits and how episodes are told; nothing that affects recalls only."""
        return self.scribe.settings | {
            "gmemory": self.section.model_dump(include=_LEARNED),
            "insights": self.insights.model_dump(exclude={"told"}),
            "words": self.words.model_dump(include={*EPISODE_WORDS, "nothing"}),
        }

    @property
    def spent(self) -> Spent:
        """The cost of the scribe's replies and the ratings so far."""
        return self.scribe.spent + self.rate.spent

    def begin(self) -> Notes:
        """Return an empty graph."""
        return {"nodes": [], "insights": []}

    def learn(self, notes: Notes, episodes: Sequence[Trajectory]) -> None:
        """Condense all episodes at once, join each to older nodes, then revise the insights round by round.

        An empty reply is counted, and the interaction stays uncondensed.
        """
        texts = [self.scribe.shorten(self._interaction(episode)) for episode in episodes]
        prompts = [fill(self.section.condense, episode=text) for text in texts]
        replies = self.scribe.ask("condense", self.section.condense_system, prompts)
        nodes = notes["nodes"]
        for episode, text, reply in zip(episodes, texts, replies, strict=True):
            if not reply:
                self.scribe.note_malformed({"empty condensation": 1})
            nodes.append(
                {
                    "id": episode.id,
                    "task": episode.task.text,
                    "solved": episode.success,
                    "links": self._links(episode.task.text, nodes),
                    "condensed": self.scribe.shorten(reply or text),
                }
            )
        told = [(node["id"], self._tell(node)) for node in nodes[len(nodes) - len(episodes) :]]
        mend(notes["insights"], told, self.scribe, self.insights, self.words.nothing)

    def recall(self, notes: Notes, bank: ExperienceBank, queries: Sequence[tuple[Task, Role]]) -> list[Recalled]:
        """Recall condensed episodes, the same for all roles, and a brief for each role."""
        tasks = {task.key: task for task, _ in queries}
        nodes = notes["nodes"]
        own = {key: set(bank.ids_of(task)) for key, task in tasks.items()}
        reached = self._reached(nodes, list(tasks.values()), own)
        candidates = {
            key: bank.get([nodes[i]["id"] for i in found if self._may_tell(nodes[i])][: self.section.max_candidates])
            for key, found in reached.items()
        }
        best = best_rated(self.rate, list(tasks.values()), candidates, self.num_retrieved)
        by_id = {node["id"]: node for node in nodes}
        insights = {
            key: self._supported(notes["insights"], {nodes[i]["id"] for i in found}, own[key])
            for key, found in reached.items()
        }
        briefs = self._briefs(insights, queries)
        records = []
        for (task, _), brief in zip(queries, briefs, strict=True):
            found = best[task.key]
            told = "\n\n".join(self._tell(by_id[trajectory.id]) for trajectory in found)
            parts = [
                fill(self.insights.told, insights=brief) if brief else "",
                fill(self.words.text, memory=told) if found else "",
            ]
            sources = tuple(trajectory.id for trajectory in found)
            records.append(Recalled(kind=self.kind, text="\n\n".join(filter(None, parts)), sources=sources))
        return records

    def _may_tell(self, node: Mapping[str, Any]) -> bool:
        return node["solved"] or not self.only_successes

    def _links(self, text: str, nodes: Sequence[Mapping[str, Any]]) -> list[int]:
        (row,) = self.similarity([text], [node["task"] for node in nodes])
        nearest = np.argsort(-row, kind="stable")[: self.section.max_links]
        return sorted(int(i) for i in nearest if row[i] >= self.section.threshold)

    def _reached(
        self, nodes: Sequence[Mapping[str, Any]], tasks: Sequence[Task], own: Mapping[str, Collection[str]]
    ) -> dict[str, list[int]]:
        """Return the nodes reached for each task, by its key: by hops, then by similarity, then the older first."""
        cosines = self.similarity([task.text for task in tasks], [node["task"] for node in nodes])
        reached = {}
        for task, row in zip(tasks, cosines, strict=True):
            banned = {i for i, node in enumerate(nodes) if node["id"] in own[task.key]}
            seeds = [int(i) for i in np.argsort(-row, kind="stable") if i not in banned][: self.section.nearest]
            hops = expand([node["links"] for node in nodes], seeds, self.section.hops, banned)
            reached[task.key] = sorted(hops, key=lambda i, row=row, hops=hops: (hops[i], -row[i], i))  # type: ignore[misc]
        return reached

    def _supported(self, insights: Sequence[Insight], by: Collection[str], own: Collection[str]) -> list[Insight]:
        found = [insight for insight in ranked(insights, without=own) if not set(by).isdisjoint(insight["sources"])]
        return found[: self.section.num_insights]

    def _briefs(self, insights: Mapping[str, Sequence[Insight]], queries: Sequence[tuple[Task, Role]]) -> list[str]:
        """Write each role's brief of the insights; an empty reply is counted, and that role is told all of them."""
        lists = [numbered(insights[task.key]) for task, _ in queries]
        prompts = {
            i: fill(
                self.section.project,
                task=task.text.strip(),
                role=fill(self.words.member, role=role.name, profile=role.profile.strip()),
                insights=lists[i],
            )
            for i, (task, role) in enumerate(queries)
            if lists[i]
        }
        replies = dict(
            zip(prompts, self.scribe.ask("brief", self.section.project_system, list(prompts.values())), strict=True)
        )
        self.scribe.note_malformed({"empty brief": sum(not reply for reply in replies.values())})
        return [replies.get(i) or told for i, told in enumerate(lists)]

    def _interaction(self, trajectory: Trajectory) -> str:
        """Write who said what after reading whom, turn by turn; messages are numbered within a turn."""
        lines = [fill(self.words.task, task=trajectory.task.text.strip())]
        for step in trajectory.steps:
            for number, message in enumerate(step.messages, 1):
                lines.append(
                    fill(
                        self.section.reading if message.reads else self.section.opening,
                        number=str(number),
                        role=message.role,
                        reads=", ".join(str(i + 1) for i in message.reads),
                        response=message.response.strip(),
                    )
                )
            if step.observation.strip():
                lines.append(fill(self.words.reply, observation=step.observation.strip()))
        lines.append(self.words.solved if trajectory.success else self.words.unsolved)
        return "\n".join(line for line in lines if line)

    def _tell(self, node: Mapping[str, Any]) -> str:
        outcome = self.words.solved if node["solved"] else self.words.unsolved
        lines = [fill(self.words.task, task=node["task"].strip()), node["condensed"], outcome]
        return "\n".join(line for line in lines if line)


def expand(
    links: Sequence[Sequence[int]], seeds: Sequence[int], hops: int, banned: Collection[int] = ()
) -> dict[int, int]:
    """Return the nodes within some hops of the seeds, each with the fewest hops to it; edges go both ways.

    Args:
        links: for each node, the older ones that it is joined to.
        seeds: nodes at 0 hops.
        hops: how far to go.
        banned: nodes to treat as absent.
    """
    neighbours: list[list[int]] = [[] for _ in links]
    for i, older in enumerate(links):
        for j in older:
            if i not in banned and j not in banned:
                neighbours[i].append(j)
                neighbours[j].append(i)
    found = dict.fromkeys(seeds, 0)
    edge = list(seeds)
    for hop in range(1, hops + 1):
        edge = [j for j in dict.fromkeys(j for i in edge for j in neighbours[i]) if j not in found]
        found |= dict.fromkeys(edge, hop)
    return found
