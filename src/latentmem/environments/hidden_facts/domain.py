"""A world of invented places whose facts only past episodes tell, so that nothing but memory helps.

"The Crimson Mill" has a password, drawn by lot: no model can know it. An experience, which is played into the bank,
guesses it and is told; a task asks for it in other words. The right answer is then what a memory has carried, and the
settings say which feat of memory that takes. RULER (Hsieh et al. 2024, arXiv 2404.06654) calls some of them multi-key
(near names), multi-value (several facts) and variable tracking (facts that change); facts that follow from two
episodes are the multi-hop edits of MQuAKE (Zhong et al. 2023, arXiv 2305.14795).

Two seeds make a world: `seed` draws all texts, `facts_seed` which value each fact has. Worlds that differ in the second
alone ask the same questions under the same ids, so that the experience of one can be put under the tasks of the other.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, Literal

from pydantic import JsonValue

from latentmem.environments.environment import Outcome, Split
from latentmem.environments.hidden_facts.words import (
    ARRIVED,
    ASKED,
    ASKED_ALL,
    DAY,
    EXPERIENCED,
    EXPERIENCED_ALL,
    EXPERIENCED_ARRIVAL,
    IF_UNKNOWN,
    JOINED,
    NAMES,
    NEAR,
    NOTE,
    ONE_WORD,
    OWN_WORDS,
    RIGHT,
    SEVERAL_WORDS,
    SISTERS,
    TOLD,
    UNKNOWN,
    VALUES,
    WITHDRAWN,
    WRONG,
)
from latentmem.errors import ConfigError, DataError, suggest
from latentmem.templates import fill
from latentmem.trajectory import Task

Facts = Mapping[tuple[str, str, int], str]
"""The value of a fact, by the entity's key, the attribute and the phase."""
Kind = Literal["plain", "revised", "withdrawn", "untold", "joined", "near", "sister"]
SPECIAL: tuple[Kind, ...] = ("revised", "withdrawn", "untold", "joined")
"""The kinds of asked entities that have a share of their own."""
ANSWERING = ""
"""Stands among roles for the one whose response is the team's action."""
NUM_DAYS = 30


@dataclass(frozen=True)
class Episode:
    """One experience of an entity."""

    id: str
    day: int | None
    """Told where facts may change or are told in parts."""
    phase: int
    """0, or 1 after the facts have changed."""
    attributes: tuple[str, ...]
    """Whose facts it tells."""
    asked: tuple[str, ...]
    """The attributes among them that the team is asked for."""
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
    """Unique in the world, such as `test-012`, and `test-012-near-1` for a distractor of that one."""
    name: str
    split: Split
    """The split in which it, or the entity that it belongs to, is asked about."""
    position: int
    """Of that entity in its split, from 0."""
    kind: Kind
    held_out: bool
    """Whether its values are held-out ones."""
    episodes: tuple[Episode, ...]
    sister: "Entity | None" = None
    """Whose facts are those of a joined entity."""
    near: tuple["Entity", ...] = ()
    """Its distractors."""

    @property
    def title(self) -> str:
        """The name as tasks have it."""
        return fill(SISTERS, entity=self.name, sister=self.sister.name) if self.sister else self.name

    def telling(self, attribute: str) -> Episode | None:
        """The last of its episodes that told this fact."""
        episodes = [e for e in self.episodes if e.tells and attribute in e.attributes]
        return episodes[-1] if episodes else None


class HiddenFactsEnvironment:
    """One episode of one step. Reward: the share of words that are right; over several roles, the mean of theirs.

    `info` holds `extracted`: the words read from the action, or for each judged role the words read from its response;
    None where no answer was found. With `needs` it holds `right.ROLE` for each role. `says_other` tells whether the
    answer is that of the world of `other_facts_seed`; it is absent where both worlds have the same one.
    """

    def __init__(
        self,
        right: Mapping[str, Sequence[str]],
        words: frozenset[str],
        *,
        told: str | None,
        other: Mapping[str, Sequence[str]] | None,
        instructions: str,
    ) -> None:
        """Prepare the judge.

        Args:
            right: the words that each role has to say, in order; `ANSWERING` stands for the team's action.
            words: all words that count as an answer.
            told: of an experience, what the observation adds to yes or no; None for a task that is asked.
            other: `right` in the world of `other_facts_seed`, if that is compared.
            instructions: how an answer has to look.
        """
        self._right = right
        self._words = words
        self._told = told
        self._other = other
        self._instructions = instructions
        self._said: Mapping[str, str] = {}

    @property
    def instructions(self) -> str:
        """How an answer has to look."""
        return self._instructions

    def hear(self, said: Mapping[str, str]) -> None:
        """Take the response of each role."""
        self._said = dict(said)

    def step(self, action: str) -> Outcome:
        """Judge what was said and end the episode."""
        said = {ANSWERING: action, **self._said}
        answers = {role: read(said.get(role, ""), self._words, len(right)) for role, right in self._right.items()}
        shares = {role: _share(answers[role], right) for role, right in self._right.items()}
        reward = sum(shares.values()) / len(shares)
        texts = {role: None if answer is None else " ".join(answer) for role, answer in answers.items()}
        info: dict[str, JsonValue] = {}
        if ANSWERING in self._right:
            info["extracted"] = texts[ANSWERING]
        else:
            info["extracted"] = dict(texts) if any(texts.values()) else None
            info |= {f"right.{role}": share == 1 for role, share in shares.items()}
        if self._other is not None and self._other != self._right:
            info["says_other"] = answers == self._other
        return Outcome(observation=self._reply(reward == 1), reward=reward, done=True, info=info)

    def _reply(self, right: bool) -> str:
        if self._told is None:
            return ""
        return f"{RIGHT if right else WRONG} {self._told}".strip()


def read(response: str, words: frozenset[str], num_expected: int) -> list[str] | None:
    """The answer in a response, or None: known words in it, whole and in any case, with what stands between left out.

    Where one word is expected, exactly one known word has to occur, once or often: naming several is no answer. Where
    several are expected, they are taken in the order they are said, and more than expected are no answer.

    >>> read("It is Corn. Corn!", frozenset({"corn", "tree"}), 1)
    ['corn']
    >>> read("corn, or tree", frozenset({"corn", "tree"}), 1)
    """
    found = [word for word in re.findall(r"\w+", response.lower()) if word in words]
    if num_expected == 1:
        found = list(dict.fromkeys(found))
    return found if 0 < len(found) <= num_expected else None


def _share(answer: Sequence[str] | None, right: Sequence[str]) -> float:
    # A short answer has its words at the first positions.
    return sum(a == b for a, b in zip(answer or (), right, strict=False)) / len(right)


class HiddenFactsDomain:
    """Invented entities, their experiences and the questions about them; the same for the same arguments.

    The arguments are the keys of `HiddenFactsSection`, which tells their meaning.

    Raises:
        ConfigError: the settings contradict each other, or ask for more names or values than there are.
    """

    name = "hidden_facts"

    def __init__(
        self,
        *,
        train_entities: int,
        dev_entities: int,
        test_entities: int,
        values: int,
        held_out_values: int,
        attributes: int,
        asks: Literal["one", "all"],
        questions: int,
        experiences: int,
        outcomes: Mapping[str, float],
        distractors: int,
        revised: float,
        withdrawn: float,
        untold: float,
        joined: float,
        phrasings: int,
        needs: Mapping[str, Sequence[str]],
        seed: int,
        facts_seed: int,
        other_facts_seed: int | None = None,
        instructions: str | None = None,
    ) -> None:
        self._sizes: dict[Split, int] = {"test": test_entities, "dev": dev_entities, "train": train_entities}
        self._attributes = tuple(ASKED)[:attributes]
        self._questions = questions
        self._experiences = experiences
        self._outcomes = {name: weight for name, weight in outcomes.items() if weight}
        self._distractors = distractors
        self._shares = dict(zip(SPECIAL, (revised, withdrawn, untold, joined), strict=True))
        self._phrasings = phrasings
        self._needs = {role: tuple(names) for role, names in needs.items()}
        self._at_once = bool(needs) or (asks == "all" and attributes > 1)
        self._seed = seed
        self._facts_seed = facts_seed
        self._other_facts_seed = other_facts_seed
        self._dated = bool(revised or withdrawn) or experiences > 1
        self._check(values, held_out_values)
        drawn = self._random("values").sample(VALUES, values + held_out_values)
        self._pools = {False: tuple(drawn[:values]), True: tuple(drawn[values:])}
        self._words = frozenset([*drawn, UNKNOWN])
        self._grouped = bool(held_out_values or any(self._shares.values()) or "wrong" in self._outcomes)
        self._instructions = instructions or self._built_in_instructions()

    def skipped(self, split: Split) -> dict[str, int]:
        """Nothing: the tasks are made, not read."""
        return {}

    def tasks(self, split: Split) -> list[Task]:
        """The tasks of a split; experiences are in the order of their days, where they have days."""
        return list(self._tasks[split])

    def start(self, task: Task) -> HiddenFactsEnvironment:
        """A fresh environment for one episode.

        Raises:
            DataError: the task is not one of this domain.
        """
        told = task.data.get("told")
        return HiddenFactsEnvironment(
            _right_of(task),
            self._words,
            told=told if isinstance(told, str) else None,
            other=self._other_rights.get(task.id or ""),
            instructions=self._instructions,
        )

    def demonstrations(self, task: Task) -> dict[str, str]:
        """The right response of each judged role: its bare words. The empty name stands for the answering role.

        Raises:
            DataError: the task is not one of this domain.
        """
        return {role: " ".join(words) for role, words in _right_of(task).items()}

    def _check(self, values: int, held_out_values: int) -> None:
        for role, names in self._needs.items():
            for name in names:
                if name not in self._attributes:
                    raise ConfigError(
                        f"data.needs.{role} names {name!r}, which is none of the {len(self._attributes)} attributes; "
                        f"{suggest(name, self._attributes)}; data.attributes gives entities more of them"
                    )
        if values + held_out_values > len(VALUES):
            raise ConfigError(
                f"data.values and data.held_out_values are {values + held_out_values} together; "
                f"there are {len(VALUES)} words, lower them"
            )
        if held_out_values == 1:
            raise ConfigError("data.held_out_values is 1, which a guess would always hit; expected 0, or 2 or more")
        if not self._outcomes:
            raise ConfigError(
                "data.outcomes gives no outcome a weight above 0; give one to corrected, success or wrong"
            )
        total = sum(self._shares.values())
        if total > 1 + 1e-9:
            raise ConfigError(f"data: revised, withdrawn, untold and joined add up to {total:g}; they may reach 1")
        if total > self._shares["untold"] and set(self._outcomes) == {"wrong"}:
            raise ConfigError(
                "data.outcomes has wrong alone, which tells nothing; facts that are revised, withdrawn or joined have "
                "to be told, add corrected or success"
            )
        ways = self._phrasings * (1 if self._at_once else len(self._attributes))
        if self._questions > ways:
            raise ConfigError(
                f"data.questions is {self._questions}, but there are {ways} different ones about an entity; "
                "lower it, or raise phrasings or attributes"
            )
        sisters = sum(_counts(self._shares, size)["joined"] for size in self._sizes.values())
        wanted = sum(self._sizes.values()) + sisters
        if wanted > len(NAMES):
            raise ConfigError(
                f"data: {wanted} entities are asked for (train {self._sizes['train']}, dev {self._sizes['dev']}, "
                f"test {self._sizes['test']}, sisters {sisters}), but there are {len(NAMES)} names; ask for fewer"
            )

    def _random(self, *parts: object) -> Random:
        return Random(" ".join(map(str, ("hidden_facts", self._seed, *parts))))  # noqa: S311 - a world, not a secret

    def _built_in_instructions(self) -> str:
        how = OWN_WORDS if self._needs else SEVERAL_WORDS if self._at_once else ONE_WORD
        unknowable = self._shares["withdrawn"] or self._shares["untold"] or "wrong" in self._outcomes
        return f"{how} {IF_UNKNOWN}" if unknowable else how

    # Who there is

    @cached_property
    def _entities(self) -> list[Entity]:
        """All asked entities; test comes first, so that more train entities leave it as it is."""
        names = self._random("names").sample(NAMES, len(NAMES))
        return [
            self._entity(split, position, kind, names)
            for split, size in self._sizes.items()
            for position, kind in enumerate(self._kinds(split, size))
        ]

    def _kinds(self, split: Split, size: int) -> list[Kind]:
        counts = _counts(self._shares, size)
        kinds = [kind for kind, count in counts.items() for _ in range(count)]
        kinds += ["plain"] * (size - len(kinds))
        self._random("kinds", split).shuffle(kinds)
        return kinds

    def _entity(self, split: Split, position: int, kind: Kind, names: list[str]) -> Entity:
        key, name = f"{split}-{position:03d}", names.pop(0)
        held_out = split != "train" and position % 2 == 1 and bool(self._pools[True])
        sister = None
        if kind == "joined":
            sister_key, sister_name = f"{key}-sister", names.pop()
            episodes = self._episodes(sister_key, sister_name, "sister")
            sister = Entity(sister_key, sister_name, split, position, "sister", held_out, episodes)
        near = []
        for number, template in enumerate(NEAR[: self._distractors], 1):
            near_key, near_name = f"{key}-near-{number}", fill(template, words=name.removeprefix("the "))
            episodes = self._episodes(near_key, near_name, "near")
            near.append(Entity(near_key, near_name, split, position, "near", held_out, episodes))
        title = fill(SISTERS, entity=name, sister=sister.name) if sister else name
        episodes = self._episodes(key, title, kind)
        return Entity(key, name, split, position, kind, held_out, episodes, sister, tuple(near))

    def _episodes(self, key: str, title: str, kind: Kind) -> tuple[Episode, ...]:
        random = self._random("episodes", key)
        num_phases = 2 if kind in ("revised", "withdrawn") else 1
        num = num_phases * self._experiences
        days = sorted(random.sample(range(1, max(NUM_DAYS, num) + 1), num))
        episodes = []
        for i in range(num):
            phase, number = divmod(i, self._experiences)
            attributes = self._dealt(number)
            # Where an episode tells more than is asked for, what is asked for is left to chance.
            asked = attributes if self._at_once else (random.choice(attributes),)
            question = self._experienced(title, asked, random)
            day = days[i] if self._dated else None
            outcome = self._outcome(kind, random)
            text = question if day is None else fill(DAY, day=str(day), text=question)
            episodes.append(Episode(f"experience-{key}-{i + 1}", day, phase, attributes, asked, outcome, text))
        return tuple(episodes)

    def _dealt(self, number: int) -> tuple[str, ...]:
        """The attributes that the episode of this number tells: all are told, and no episode tells none."""
        num = len(self._attributes)
        if self._experiences <= num:
            return self._attributes[number :: self._experiences]
        return (self._attributes[number % num],)

    def _outcome(self, kind: Kind, random: Random) -> str:
        known: tuple[Kind, ...] = ("plain", "near")
        weights = {o: weight for o, weight in self._outcomes.items() if kind in known or o != "wrong"}
        return "wrong" if kind == "untold" else random.choices(list(weights), list(weights.values()))[0]

    def _experienced(self, title: str, attributes: Sequence[str], random: Random) -> str:
        if self._needs:
            return fill(random.choice(EXPERIENCED_ARRIVAL), entity=title)
        if len(attributes) > 1:
            return fill(random.choice(EXPERIENCED_ALL), entity=title, attributes=_listed(attributes))
        return fill(random.choice(EXPERIENCED[attributes[0]]), entity=title)

    # What is true

    def _facts(self, facts_seed: int) -> Facts:
        """The value of every fact; each value of a pool is dealt equally often, so that guessing pays 1 / values."""
        facts: dict[tuple[str, str, int], str] = {}
        for attribute in self._attributes:
            for split in self._sizes:
                for held_out, pool in self._pools.items():
                    asked = [e for e in self._entities if e.split == split and e.held_out == held_out]
                    random = self._random("facts", facts_seed, attribute, split, held_out)
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

    def _truth(self, entity: Entity, attribute: str, phase: int, facts: Facts) -> str:
        if entity.sister:
            return self._truth(entity.sister, attribute, 0, facts)
        if not entity.telling(attribute) or (entity.kind == "withdrawn" and phase == 1):
            return UNKNOWN
        return facts[entity.key, attribute, phase]

    def _told(self, entity: Entity, episode: Episode, facts: Facts) -> str:
        return " ".join(self._sentence(entity, attribute, episode.phase, facts) for attribute in episode.attributes)

    def _sentence(self, entity: Entity, attribute: str, phase: int, facts: Facts) -> str:
        if entity.sister:
            return fill(JOINED, attribute=attribute, entity=entity.name, sister=entity.sister.name)
        if entity.kind == "withdrawn" and phase == 1:
            return fill(WITHDRAWN, attribute=attribute, entity=entity.name)
        return fill(TOLD, attribute=attribute, entity=entity.name, value=facts[entity.key, attribute, phase])

    def _right(self, entity: Entity, attributes: Sequence[str], phase: int, facts: Facts) -> dict[str, list[str]]:
        asked: Mapping[str, Sequence[str]] = self._needs or {ANSWERING: attributes}
        return {role: [self._truth(entity, name, phase, facts) for name in names] for role, names in asked.items()}

    # What is asked

    @cached_property
    def _tasks(self) -> dict[Split, list[Task]]:
        return self._all_tasks(self._facts(self._facts_seed))

    @cached_property
    def _other_rights(self) -> dict[str, dict[str, list[str]]]:
        """The right answers in the other world, by the task's id."""
        if self._other_facts_seed is None:
            return {}
        tasks = self._all_tasks(self._facts(self._other_facts_seed))
        return {task.id or "": _right_of(task) for split in tasks.values() for task in split}

    def _all_tasks(self, facts: Facts) -> dict[Split, list[Task]]:
        tasks: dict[Split, list[Task]] = {split: [] for split in self._sizes}
        for entity in self._entities:
            tasks[entity.split] += self._asked(entity, facts)
        return {"experience": self._experience(facts), **tasks}

    def _experience(self, facts: Facts) -> list[Task]:
        asked = self._entities
        everybody = [e for entity in asked for e in (entity, entity.sister, *entity.near) if e is not None]
        pairs = [(entity, episode) for entity in everybody for episode in entity.episodes]
        self._random("order").shuffle(pairs)
        pairs.sort(key=lambda pair: pair[1].day or 0)
        return [self._episode_task(entity, episode, facts) for entity, episode in pairs]

    def _episode_task(self, entity: Entity, episode: Episode, facts: Facts) -> Task:
        told = self._told(entity, episode, facts)
        noted = episode.outcome == "success"
        return Task(
            id=episode.id,
            domain=self.name,
            text=fill(NOTE, text=episode.question, told=told) if noted else episode.question,
            data={
                "right": _json(self._right(entity, episode.asked, episode.phase, facts)),
                "entity": entity.name,
                "told": told if episode.tells else "",
            },
        )

    def _asked(self, entity: Entity, facts: Facts) -> Iterator[Task]:
        random = self._random("questions", entity.key)
        first = random.randrange(self._phrasings)
        num = self._questions if entity.split == "train" else 1
        for i in range(num):
            # Entities of odd positions may have held-out values, which must not be those of every second attribute.
            turns, turn = divmod(i, len(self._attributes))
            attribute = self._attributes[(entity.position // 2 + i) % len(self._attributes)]
            attributes = self._attributes if self._at_once else (attribute,)
            phrasing = (first + (i if self._at_once else turns + turn)) % self._phrasings
            label = "arrival" if self._needs else "all" if self._at_once else attribute
            number = f"-{i + 1}" if num > 1 else ""
            yield self._question(entity, attributes, phrasing, f"{entity.key}-{label}{number}", facts)

    def _question(self, entity: Entity, attributes: Sequence[str], phrasing: int, id: str, facts: Facts) -> Task:
        phase = entity.episodes[-1].phase
        right = self._right(entity, attributes, phase, facts)
        data: dict[str, JsonValue] = {
            "right": _json(right),
            "answered_by": list(self._answered_by(entity, attributes)),
            "entity": entity.name,
        }
        if self._grouped:
            data["group"] = _group(entity, right)
        if self._needs:
            text = fill(ARRIVED[phrasing], entity=entity.title)
        elif self._at_once:
            text = fill(ASKED_ALL[phrasing], entity=entity.title, attributes=_listed(attributes))
        else:
            text = fill(ASKED[attributes[0]][phrasing], entity=entity.title)
        return Task(id=id, domain=self.name, text=text, data=data)

    def _answered_by(self, entity: Entity, attributes: Sequence[str]) -> list[str]:
        """The newest episode that told each fact, and for a joined entity that of its sister."""
        needed = [name for names in self._needs.values() for name in names] if self._needs else attributes
        found = [e.telling(name) for name in needed for e in (entity, entity.sister) if e is not None]
        return list(dict.fromkeys(episode.id for episode in found if episode is not None))


def _counts(shares: Mapping[Kind, float], size: int) -> dict[Kind, int]:
    """How many of so many entities are of each kind; rounded so that they never are more than there are."""
    counts: dict[Kind, int] = {}
    reached = 0.0
    for kind, share in shares.items():
        counts[kind] = min(round((reached + share) * size), size) - round(reached * size)
        reached += share
    return counts


def _deal(pool: Sequence[str], num: int, random: Random) -> list[str]:
    """Values from a pool, each as often as any other, or once more."""
    dealt: list[str] = []
    while len(dealt) < num:
        dealt += random.sample(pool, len(pool))
    return dealt[:num]


def _group(entity: Entity, right: Mapping[str, Sequence[str]]) -> str:
    if entity.kind in SPECIAL:
        return entity.kind
    if any(UNKNOWN in words for words in right.values()):
        return "untold"
    return "held-out" if entity.held_out else "trained"


def _listed(attributes: Sequence[str]) -> str:
    *others, last = attributes
    return f"{', '.join(others)} and {last}"


def _json(right: Mapping[str, Sequence[str]]) -> JsonValue:
    return {role: list(words) for role, words in right.items()}


def _right_of(task: Task) -> dict[str, list[str]]:
    right: Any = task.data.get("right")
    if task.domain != HiddenFactsDomain.name or not isinstance(right, dict):
        raise DataError(f"task {task.key}: its data hold no right words; expected a task of kind hidden_facts")
    return {str(role): [str(word) for word in words] for role, words in right.items()}
