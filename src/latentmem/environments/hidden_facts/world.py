"""The places of a world and their facts, drawn by lot; equal settings give equal worlds.

Two seeds make a world: `seed` draws all places and texts, and `facts_seed` the value of each fact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Literal

from latentmem.environments.environment import Split
from latentmem.environments.hidden_facts.texts import dated, experienced, joined_name
from latentmem.environments.hidden_facts.words import NAMES, NEAR, UNKNOWN
from latentmem.templates import fill

Facts = Mapping[tuple[str, str, int], str]
"""The value of each fact, by the entity's key, the attribute and the phase."""
Kind = Literal["plain", "revised", "withdrawn", "untold", "joined", "near", "sister"]
SPECIAL: tuple[Kind, ...] = ("revised", "withdrawn", "untold", "joined")
"""The kinds of asked entities whose share can be set."""
NUM_DAYS = 30


@dataclass(frozen=True)
class Episode:
    """One experience of an entity."""

    id: str
    day: int | None
    """The day, told if facts may change or are told in parts."""
    phase: int
    """0, or 1 after the facts changed."""
    attributes: tuple[str, ...]
    """The attributes whose facts it tells."""
    asked: tuple[str, ...]
    """Those of `attributes` that the team is asked for."""
    outcome: str
    question: str

    @property
    def tells(self) -> bool:
        """Whether its observation tells the facts."""
        return self.outcome != "wrong"


@dataclass(frozen=True)
class Entity:
    """An invented place."""

    key: str
    """Unique in the world, such as `test-012`, or `test-012-near-1` for a distractor of that entity."""
    name: str
    split: Split
    """The split in which this entity, or the one it belongs to, is asked about."""
    position: int
    """Position of that entity in its split, from 0."""
    kind: Kind
    held_out: bool
    """Whether its values are held out from training."""
    episodes: tuple[Episode, ...]
    sister: "Entity | None" = None
    """The sister, whose facts a joined entity shares."""
    near: tuple["Entity", ...] = ()
    """The entity's distractors."""

    @property
    def title(self) -> str:
        """The name as it stands in tasks."""
        return joined_name(self.name, self.sister.name) if self.sister else self.name

    def telling(self, attribute: str) -> Episode | None:
        """Return the last of its episodes that told this fact, if any."""
        episodes = [e for e in self.episodes if e.tells and attribute in e.attributes]
        return episodes[-1] if episodes else None


@dataclass(frozen=True)
class World:
    """The settings that determine all places."""

    seed: int
    sizes: Mapping[Split, int]
    """Number of places asked about in each split."""
    attributes: tuple[str, ...]
    experiences: int
    """Episodes of a place, both before and after its facts change."""
    outcomes: Mapping[str, float]
    """Weights of the outcomes that occur."""
    distractors: int
    shares: Mapping[Kind, float]
    pools: Mapping[bool, tuple[str, ...]]
    """The values: those for training under False, the held-out ones under True."""
    at_once: bool
    """Whether an episode asks for everything that it tells."""
    arrival: bool
    """Whether texts name no attribute, because each role knows what it needs."""

    @property
    def has_days(self) -> bool:
        """Whether episodes tell their day."""
        return bool(self.shares["revised"] or self.shares["withdrawn"]) or self.experiences > 1

    def random(self, *parts: object) -> Random:
        """Return a random generator for one purpose, so that draws for one purpose do not change another's."""
        return random_for(self.seed, *parts)

    @cached_property
    def entities(self) -> list[Entity]:
        """All asked entities; test comes first, so that adding train entities does not change it."""
        names = self.random("names").sample(NAMES, len(NAMES))
        return [
            self._entity(split, position, kind, names)
            for split, size in self.sizes.items()
            for position, kind in enumerate(self._kinds(split, size))
        ]

    def _kinds(self, split: Split, size: int) -> list[Kind]:
        kinds = [kind for kind, count in counts(self.shares, size).items() for _ in range(count)]
        kinds += ["plain"] * (size - len(kinds))
        self.random("kinds", split).shuffle(kinds)
        return kinds

    def _entity(self, split: Split, position: int, kind: Kind, names: list[str]) -> Entity:
        key, name = f"{split}-{position:03d}", names.pop(0)
        held_out = split != "train" and position % 2 == 1 and bool(self.pools[True])
        sister = None
        if kind == "joined":
            sister_key, sister_name = f"{key}-sister", names.pop()
            episodes = self._episodes(sister_key, sister_name, "sister")
            sister = Entity(sister_key, sister_name, split, position, "sister", held_out, episodes)
        near = []
        for number, template in enumerate(NEAR[: self.distractors], 1):
            near_key, near_name = f"{key}-near-{number}", fill(template, words=name.removeprefix("the "))
            episodes = self._episodes(near_key, near_name, "near")
            near.append(Entity(near_key, near_name, split, position, "near", held_out, episodes))
        title = joined_name(name, sister.name) if sister else name
        episodes = self._episodes(key, title, kind)
        return Entity(key, name, split, position, kind, held_out, episodes, sister, tuple(near))

    def _episodes(self, key: str, title: str, kind: Kind) -> tuple[Episode, ...]:
        random = self.random("episodes", key)
        num_phases = 2 if kind in ("revised", "withdrawn") else 1
        num = num_phases * self.experiences
        days = sorted(random.sample(range(1, max(NUM_DAYS, num) + 1), num))
        episodes = []
        for i in range(num):
            phase, number = divmod(i, self.experiences)
            attributes = self._dealt(number)
            # If an episode tells more than it asks for, chance decides what it asks for.
            asked = attributes if self.at_once else (random.choice(attributes),)
            question = experienced(title, asked, random, arrival=self.arrival)
            day = days[i] if self.has_days else None
            outcome = self._outcome(kind, random)
            text = question if day is None else dated(question, day)
            episodes.append(Episode(f"experience-{key}-{i + 1}", day, phase, attributes, asked, outcome, text))
        return tuple(episodes)

    def _dealt(self, number: int) -> tuple[str, ...]:
        """Return the attributes that episode `number` tells: all get told, and each episode tells at least one."""
        num = len(self.attributes)
        if self.experiences <= num:
            return self.attributes[number :: self.experiences]
        return (self.attributes[number % num],)

    def _outcome(self, kind: Kind, random: Random) -> str:
        known: tuple[Kind, ...] = ("plain", "near")
        weights = {o: weight for o, weight in self.outcomes.items() if kind in known or o != "wrong"}
        return "wrong" if kind == "untold" else random.choices(list(weights), list(weights.values()))[0]

    def facts(self, facts_seed: int) -> Facts:
        """Draw the value of every fact; a pool's values are used equally often, so that guessing earns 1 / values."""
        facts: dict[tuple[str, str, int], str] = {}
        for attribute in self.attributes:
            for split in self.sizes:
                for held_out, pool in self.pools.items():
                    asked = [e for e in self.entities if e.split == split and e.held_out == held_out]
                    random = self.random("facts", facts_seed, attribute, split, held_out)
                    for entity, value in zip(asked, _deal(pool, len(asked), random), strict=True):
                        others = [word for word in pool if word != value]
                        facts[entity.key, attribute, 0] = value
                        if entity.kind == "revised":
                            facts[entity.key, attribute, 0] = random.choice(others)
                            facts[entity.key, attribute, 1] = value
                        if entity.sister:
                            facts[entity.sister.key, attribute, 0] = value
                        for near in entity.near:
                            facts[near.key, attribute, 0] = random.choice(others)
        return facts

    def truth(self, entity: Entity, attribute: str, phase: int, facts: Facts) -> str:
        """Return the right word for a fact, or the word for what nobody can know."""
        if entity.sister:
            return self.truth(entity.sister, attribute, 0, facts)
        if not entity.telling(attribute) or (entity.kind == "withdrawn" and phase == 1):
            return UNKNOWN
        return facts[entity.key, attribute, phase]


def random_for(seed: int, *parts: object) -> Random:
    """Return a random generator for one purpose in the worlds of a seed."""
    return Random(" ".join(map(str, ("hidden_facts", seed, *parts))))  # noqa: S311 - a world, not a secret


def counts(shares: Mapping[Kind, float], size: int) -> dict[Kind, int]:
    """Return how many of `size` entities are of each kind, rounded so that the sum does not exceed `size`."""
    found: dict[Kind, int] = {}
    reached = 0.0
    for kind, share in shares.items():
        found[kind] = min(round((reached + share) * size), size) - round(reached * size)
        reached += share
    return found


def _deal(pool: Sequence[str], num: int, random: Random) -> list[str]:
    """Deal values from a pool so that their counts differ by at most one."""
    dealt: list[str] = []
    while len(dealt) < num:
        dealt += random.sample(pool, len(pool))
    return dealt[:num]
