"""G-Memory: edges and hops against brute force; what is condensed, learned and told, against numbers made by hand."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_composer import trajectory

from latentmem.bank import ExperienceBank
from latentmem.config import GMemorySection, InsightsSection, MemorySection
from latentmem.memory.graph import Graph, expand
from latentmem.memory.learned import Scribe, Similarity
from latentmem.memory.memory import Spent
from latentmem.models.agent import ScriptedModel
from latentmem.trajectory import Message, Role, Step, Task, Trajectory

ROLES = [Role(name="assistant", profile="Solves."), Role(name="critic", profile="Checks.")]
PLANE = {"like a": 0, "a": 0, "b": 20, "c": 40, "d": 90, "e": 100, "f": 110}
"""Tasks as directions in the plane, in degrees: a-b, b-c, d-e, e-f are 20 or 10 apart, a-c 40, and so on."""


def in_the_plane(texts: list[str]) -> np.ndarray:
    angles = np.radians([PLANE[text] for text in texts])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def shortest_paths(links: Sequence[Sequence[int]], banned: set[int]) -> dict[tuple[int, int], int]:
    """Floyd and Warshall's, as loops."""
    nodes = [i for i in range(len(links)) if i not in banned]
    far = 10**6
    length = {(i, j): 0 if i == j else far for i in nodes for j in nodes}
    for i in nodes:
        for j in links[i]:
            if j in nodes:
                length[i, j] = length[j, i] = min(length[i, j], 1) if i != j else 0
    for k in nodes:
        for i in nodes:
            for j in nodes:
                length[i, j] = min(length[i, j], length[i, k] + length[k, j])
    return {pair: hops for pair, hops in length.items() if hops < far}


@pytest.mark.parametrize("seed", range(20))
def test_expansion_reaches_what_shortest_paths_do(seed: int) -> None:
    draw = random.Random(seed)
    size = draw.randint(1, 12)
    links = [sorted(draw.sample(range(i), draw.randint(0, min(i, 2)))) for i in range(size)]
    banned = set(draw.sample(range(size), size // 4))
    free = [i for i in range(size) if i not in banned]
    seeds = draw.sample(free, min(len(free), 2))
    length = shortest_paths(links, banned)
    for hops in range(4):
        nearest = {i: min(length.get((s, i), 99) for s in seeds) for i in free} if seeds else {}
        assert expand(links, seeds, hops, banned) == {i: n for i, n in nearest.items() if n <= hops}


def test_the_brute_force_is_no_copy_of_a_trivial_graph() -> None:
    assert expand([[], [0], [1], [2]], [3], 2) == {3: 0, 2: 1, 1: 2}
    assert expand([[], [0], [1], [2]], [3], 9, banned={1}) == {3: 0, 2: 1}


class RateByText:
    spent = Spent()

    def __init__(self, wanted: dict[str, float]) -> None:
        self.wanted = wanted

    def __call__(self, pairs: Any) -> list[float]:
        return [self.wanted[episode.task.text] for _, episode in pairs]


@pytest.fixture
def make() -> Callable[..., tuple[Graph, ScriptedModel]]:
    def build(replies: dict[str, list[str]], rated: dict[str, float] | None = None, **keys: Any) -> Any:
        model = ScriptedModel({"condense": ["short"], "insights": ["AGREE 1"], "brief": ["mind {task}"]} | replies)
        section = GMemorySection(**{"threshold": 0.9, "nearest": 1, "hops": 1} | keys)
        words = MemorySection(text="Past:\n{memory}", task="T {task}", solved="+", unsolved="-")
        insights = InsightsSection(told="Know:\n{insights}", revise="{insights}|{episodes}|{max_insights}")
        method = Graph(Scribe(model), Similarity(in_the_plane), RateByText(rated or {}), 2, section, insights, words)
        return method, model

    return build


def episodes(names: str) -> list[Trajectory]:
    """One of each task; a capital letter is a failure."""
    return [trajectory(name.lower(), {"assistant": f"says {name}"}, success=name.islower()) for name in names]


# Learning


def test_nodes_are_joined_to_the_most_similar_older_ones_above_the_threshold(make: Callable) -> None:
    method, _ = make({}, max_links=1)
    notes = method.begin()
    method.learn(notes, episodes("abc"))
    method.learn(notes, episodes("deF"))
    # cos 20 = 0.94 and cos 10 = 0.98 are above 0.9, cos 40 and more are not; f is nearer to e than to d (20).
    assert [node["links"] for node in notes["nodes"]] == [[], [0], [1], [], [3], [4]]
    assert [node["solved"] for node in notes["nodes"]] == [True] * 5 + [False]
    method, _ = make({}, max_links=5)
    notes = method.begin()
    method.learn(notes, episodes("abcdef"))
    assert [node["links"] for node in notes["nodes"]] == [[], [0], [1], [], [3], [3, 4]]


def test_the_interaction_is_condensed_with_who_read_whom(make: Callable) -> None:
    first, second = episodes("ab")
    (message,) = second.messages
    more = [message, message.model_copy(update={"role": "critic", "response": " no\n", "reads": (0,)})]
    step = Step(
        messages=tuple(Message.model_validate(m.model_dump()) for m in more), action="x", observation=" went on "
    )
    second = second.model_copy(update={"steps": (step, step), "reward": 0.0, "success": False})
    method, model = make({"condense": ["first", "  "]}, condense="<{episode}>", condense_system="S")
    notes = method.begin()
    method.learn(notes, [first, second])
    whole = "T b\n[1] assistant: says b\n[2] critic, having read 1: no\nFeedback: went on\n"
    whole += "[1] assistant: says b\n[2] critic, having read 1: no\nFeedback: went on\n-"
    asked = [prompt for prompt in model.prompts if prompt.role == "condense"]
    assert [(prompt.system, prompt.user) for prompt in asked] == [
        ("S", "<T a\n[1] assistant: says a\n+>"),
        ("S", f"<{whole}>"),
    ]
    # An empty reply is counted and the interaction itself is kept.
    assert [node["condensed"] for node in notes["nodes"]] == ["first", whole]
    assert method.scribe.spent.malformed["empty condensation"] == 1


def test_insights_are_learned_from_what_was_condensed(make: Callable) -> None:
    method, model = make({"condense": ["A!", "B!"], "insights": ["ADD: look"]})
    notes, learned = method.begin(), episodes("aB")
    method.learn(notes, learned)
    (asked,) = [prompt.user for prompt in model.prompts if prompt.role == "insights"]
    assert asked == "(none so far)|T a\nA!\n+\n\nT b\nB!\n-|20"
    assert notes["insights"] == [{"text": "look", "score": 2, "sources": [e.id for e in learned]}]


# Recalling


@pytest.fixture
def world(tmp_path: Path, make: Callable) -> Any:
    """The six tasks in a bank; which node supports which insight."""

    def build(names: str = "abcdef", **options: Any) -> Any:
        method, model = make(options.pop("replies", {}), **options)
        bank = ExperienceBank(tmp_path / f"{names}.sqlite", in_the_plane, embedder="plane")
        stored = episodes(names)
        bank.add(stored)
        notes = method.begin()
        method.learn(notes, stored)
        ids = {episode.task.text: episode.id for episode in stored}
        notes["insights"] = [
            {"text": f"of {name}", "score": score, "sources": [ids[name]]}
            for name, score in zip("abcde", (1, 5, 2, 9, 1), strict=True)
            if name in ids
        ]
        model.prompts.clear()
        return method, model, bank, notes

    return build


def told(records: Any) -> list[str]:
    return [record.text for record in records]


def test_hops_bring_candidates_and_ratings_choose_among_their_successes(world: Callable) -> None:
    asked = Task(id="1", domain="d", text="like a")
    rated = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 9.0}
    names = {0: "a", 1: "ba", 2: "bc"}  # nodes reached: a; a and b; a, b and c. Two are told, the best rated first.
    for hops, expected in names.items():
        method, model, bank, notes = world(rated=rated, hops=hops)
        with bank:
            (record,) = method.recall(notes, bank, [(asked, ROLES[0])])
        by_id = {node["id"]: node["task"] for node in notes["nodes"]}
        assert "".join(by_id[source] for source in record.sources) == expected
        past = "\n\n".join(f"T {name}\nshort\n+" for name in expected)
        assert record.text == f"Know:\nmind {{task}}\n\nPast:\n{past}"
        # the insights that reached nodes support, by score: b 5, c 2, a 1
        of = {0: "1. of a", 1: "1. of b\n2. of a", 2: "1. of b\n2. of c\n3. of a"}[hops]
        (brief,) = [prompt.user for prompt in model.prompts if prompt.role == "brief"]
        assert f"learned so far:\n{of}\n\n" in brief


def test_failures_are_walked_through_but_not_told(world: Callable) -> None:
    method, _, bank, notes = world("aBc", rated={"a": 1.0, "c": 2.0}, hops=2, num_insights=1)
    with bank:
        (record,) = method.recall(notes, bank, [(Task(id="1", domain="d", text="like a"), ROLES[0])])
    assert "T c\n" in record.text
    assert "T a\n" in record.text
    assert "T b\n" not in record.text


def test_candidates_are_limited_to_those_fewest_hops_away(world: Callable) -> None:
    method, _, bank, notes = world(rated={"a": 1.0, "b": 9.0}, hops=2, max_candidates=1)
    with bank:
        (record,) = method.recall(notes, bank, [(Task(id="1", domain="d", text="like a"), ROLES[0])])
    assert record.sources == (notes["nodes"][0]["id"],)


def test_each_role_gets_its_own_brief_and_an_empty_one_is_counted(world: Callable) -> None:
    method, model, bank, notes = world(
        replies={"brief": ["for one", " "]}, rated={"a": 1.0, "b": 1.0}, project="{role}|{task}|{insights}"
    )
    with bank:
        first, second = method.recall(notes, bank, [(Task(id="1", domain="d", text="like a"), role) for role in ROLES])
    assert [prompt.user for prompt in model.prompts] == [
        "assistant: Solves.|like a|1. of b\n2. of a",
        "critic: Checks.|like a|1. of b\n2. of a",
    ]
    assert first.text.startswith("Know:\nfor one\n\nPast:\n")
    assert second.text.startswith("Know:\n1. of b\n2. of a\n\nPast:\n")
    assert first.sources == second.sources
    assert method.scribe.spent.malformed["empty brief"] == 1


def test_the_very_task_is_taken_out_of_the_graph_with_its_edges_and_its_insights(world: Callable) -> None:
    rated = dict.fromkeys("abcdef", 1.0)
    # Node b is the only way from a to c.
    method, model, bank, notes = world(rated=rated, hops=2)
    with bank:
        own = Task(id=None, domain="sums", text="b")
        near = Task(id="1", domain="d", text="like a")
        alone, free = method.recall(notes, bank, [(own, ROLES[0]), (near, ROLES[0])])
    by_id = {node["id"]: node["task"] for node in notes["nodes"]}
    assert [by_id[source] for source in alone.sources] == ["a"]
    assert [by_id[source] for source in free.sources] == ["a", "b"]
    briefs = [prompt.user for prompt in model.prompts]
    assert "of b" not in briefs[0]
    assert "of c" not in briefs[0]
    assert "of b" in briefs[1]


def test_an_empty_graph_tells_nothing_and_asks_nobody(tmp_path: Path, make: Callable) -> None:
    method, model = make({})
    with ExperienceBank(tmp_path / "bank.sqlite", in_the_plane, embedder="plane") as bank:
        (record,) = method.recall(method.begin(), bank, [(Task(id="1", domain="d", text="like a"), ROLES[0])])
    assert (record.text, record.sources, model.prompts) == ("", (), [])
