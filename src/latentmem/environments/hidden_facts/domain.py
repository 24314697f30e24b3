"""A world of invented places whose facts are told only in past episodes, so that nothing but memory helps.

"The Crimson Mill" has a password, drawn by lot, so no model can know it. An experience, played to fill the bank,
guesses the password and is told it; a task then asks for it in other words. So a right answer shows what a memory has
carried, and the settings decide which feat of memory that takes. RULER (Hsieh et al. 2024, arXiv 2404.06654) calls some
of these feats multi-key (similar names), multi-value (several facts) and variable tracking (facts that change); facts
that follow from two episodes are the multi-hop edits of MQuAKE (Zhong et al. 2023, arXiv 2305.14795).

Two seeds make a world: `seed` draws all texts, and `facts_seed` the value of each fact. Worlds that differ only in
`facts_seed` ask the same questions under the same ids. So the experience of one can serve the tasks of the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from pydantic import JsonValue

from latentmem.environments.environment import Split
from latentmem.environments.hidden_facts import texts
from latentmem.environments.hidden_facts.judge import ANSWERING, HiddenFactsEnvironment
from latentmem.environments.hidden_facts.words import ASKED, NAMES, UNKNOWN, VALUES
from latentmem.environments.hidden_facts.world import SPECIAL, Entity, Episode, Facts, Kind, World, counts, random_for
from latentmem.errors import ConfigError, DataError, suggest
from latentmem.trajectory import Task


class HiddenFactsDomain:
    """Invented entities, their experiences and the questions about them; equal arguments give equal tasks.

    The arguments are the keys of `HiddenFactsSection`, which explains them.

    Raises:
        ConfigError: the settings contradict each other, or need more names or values than there are.
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
        self._attributes = tuple(ASKED)[:attributes]
        self._questions = questions
        self._phrasings = phrasings
        self._needs = {role: tuple(names) for role, names in needs.items()}
        self._at_once = bool(needs) or (asks == "all" and attributes > 1)
        self._facts_seed = facts_seed
        self._other_facts_seed = other_facts_seed
        sizes: dict[Split, int] = {"test": test_entities, "dev": dev_entities, "train": train_entities}
        shares = dict(zip(SPECIAL, (revised, withdrawn, untold, joined), strict=True))
        occurring = {name: weight for name, weight in outcomes.items() if weight}
        self._check(values, held_out_values, sizes, shares, occurring)
        drawn = random_for(seed, "values").sample(VALUES, values + held_out_values)
        self._world = World(
            seed=seed,
            sizes=sizes,
            attributes=self._attributes,
            experiences=experiences,
            outcomes=occurring,
            distractors=distractors,
            shares=shares,
            pools={False: tuple(drawn[:values]), True: tuple(drawn[values:])},
            at_once=self._at_once,
            arrival=bool(needs),
        )
        self._words = frozenset([*drawn, UNKNOWN])
        self._grouped = bool(held_out_values or any(shares.values()) or "wrong" in occurring)
        self._instructions = instructions or texts.instructions(
            needs=bool(needs), at_once=self._at_once, unknowable=bool(withdrawn or untold or "wrong" in occurring)
        )

    def skipped(self, split: Split) -> dict[str, int]:
        """Return no counts: the tasks are generated, so no row is skipped."""
        return {}

    def tasks(self, split: Split) -> list[Task]:
        """Return the tasks of a split; experiences are in the order of their days, if they have days."""
        return list(self._tasks[split])

    def start(self, task: Task) -> HiddenFactsEnvironment:
        """Make a fresh environment for one episode.

        Raises:
            DataError: the task is not of this domain.
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
        """Return the right response of each judged role, its bare words; the empty name stands for the answering role.

        Raises:
            DataError: the task is not of this domain.
        """
        return {role: " ".join(words) for role, words in _right_of(task).items()}

    def _check(
        self,
        values: int,
        held_out_values: int,
        sizes: Mapping[Split, int],
        shares: Mapping[Kind, float],
        outcomes: Mapping[str, float],
    ) -> None:
        for role, names in self._needs.items():
            for name in names:
                if name not in self._attributes:
                    raise ConfigError(
                        f"data.needs.{role} names {name!r}, which is not one of the {len(self._attributes)} "
                        f"attributes; {suggest(name, self._attributes)}; raise data.attributes to have more"
                    )
        if values + held_out_values > len(VALUES):
            raise ConfigError(
                f"data.values and data.held_out_values add up to {values + held_out_values}, "
                f"but there are only {len(VALUES)} words; lower them"
            )
        if held_out_values == 1:
            raise ConfigError("data.held_out_values is 1, which a guess would always hit; expected 0, or 2 or more")
        if not outcomes:
            raise ConfigError(
                "data.outcomes gives no outcome a weight above 0; give one to corrected, success or wrong"
            )
        total = sum(shares.values())
        if total > 1 + 1e-9:
            raise ConfigError(
                f"data: revised, withdrawn, untold and joined add up to {total:g}; lower them to at most 1"
            )
        if total > shares["untold"] and set(outcomes) == {"wrong"}:
            raise ConfigError(
                "data.outcomes has only wrong, and a wrong episode tells no fact; facts that are revised, withdrawn or "
                "joined must be told, so add corrected or success"
            )
        ways = self._phrasings * (1 if self._at_once else len(self._attributes))
        if self._questions > ways:
            raise ConfigError(
                f"data.questions is {self._questions}, but there are {ways} different ones about an entity; "
                "lower it, or raise phrasings or attributes"
            )
        sisters = sum(counts(shares, size)["joined"] for size in sizes.values())
        wanted = sum(sizes.values()) + sisters
        if wanted > len(NAMES):
            raise ConfigError(
                f"data: {wanted} entities are asked for (train {sizes['train']}, dev {sizes['dev']}, "
                f"test {sizes['test']}, sisters {sisters}), but there are {len(NAMES)} names; ask for fewer"
            )

    # What is true

    def _told(self, entity: Entity, episode: Episode, facts: Facts) -> str:
        return " ".join(self._sentence(entity, attribute, episode.phase, facts) for attribute in episode.attributes)

    def _sentence(self, entity: Entity, attribute: str, phase: int, facts: Facts) -> str:
        if entity.sister:
            return texts.joins(attribute, entity.name, entity.sister.name)
        if entity.kind == "withdrawn" and phase == 1:
            return texts.withdraws(attribute, entity.name)
        return texts.tells(attribute, entity.name, facts[entity.key, attribute, phase])

    def _right(self, entity: Entity, attributes: Sequence[str], phase: int, facts: Facts) -> dict[str, list[str]]:
        asked: Mapping[str, Sequence[str]] = self._needs or {ANSWERING: attributes}
        return {
            role: [self._world.truth(entity, name, phase, facts) for name in names] for role, names in asked.items()
        }

    # What is asked

    @cached_property
    def _tasks(self) -> dict[Split, list[Task]]:
        return self._all_tasks(self._world.facts(self._facts_seed))

    @cached_property
    def _other_rights(self) -> dict[str, dict[str, list[str]]]:
        """The right answers in the world of `other_facts_seed`, by the task's id."""
        if self._other_facts_seed is None:
            return {}
        tasks = self._all_tasks(self._world.facts(self._other_facts_seed))
        return {task.id or "": _right_of(task) for split in tasks.values() for task in split}

    def _all_tasks(self, facts: Facts) -> dict[Split, list[Task]]:
        tasks: dict[Split, list[Task]] = {split: [] for split in self._world.sizes}
        for entity in self._world.entities:
            tasks[entity.split] += self._asked(entity, facts)
        return {"experience": self._experience(facts), **tasks}

    def _experience(self, facts: Facts) -> list[Task]:
        asked = self._world.entities
        everybody = [e for entity in asked for e in (entity, entity.sister, *entity.near) if e is not None]
        pairs = [(entity, episode) for entity in everybody for episode in entity.episodes]
        self._world.random("order").shuffle(pairs)
        pairs.sort(key=lambda pair: pair[1].day or 0)
        return [self._episode_task(entity, episode, facts) for entity, episode in pairs]

    def _episode_task(self, entity: Entity, episode: Episode, facts: Facts) -> Task:
        told = self._told(entity, episode, facts)
        noted = episode.outcome == "success"
        return Task(
            id=episode.id,
            domain=self.name,
            text=texts.noted(episode.question, told) if noted else episode.question,
            data={
                "right": _json(self._right(entity, episode.asked, episode.phase, facts)),
                "entity": entity.name,
                "told": told if episode.tells else "",
            },
        )

    def _asked(self, entity: Entity, facts: Facts) -> Iterator[Task]:
        random = self._world.random("questions", entity.key)
        first = random.randrange(self._phrasings)
        num = self._questions if entity.split == "train" else 1
        for i in range(num):
            # Entities at odd positions may have held-out values, so the attribute must not depend on odd or even.
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
            text = texts.arrived(phrasing, entity.title)
        elif self._at_once:
            text = texts.asked_all(attributes, phrasing, entity.title)
        else:
            text = texts.asked_one(attributes[0], phrasing, entity.title)
        return Task(id=id, domain=self.name, text=text, data=data)

    def _answered_by(self, entity: Entity, attributes: Sequence[str]) -> list[str]:
        """Return the ids of the newest episodes that told each fact; for a joined entity, its sister's as well."""
        needed = [name for names in self._needs.values() for name in names] if self._needs else attributes
        found = [e.telling(name) for name in needed for e in (entity, entity.sister) if e is not None]
        return list(dict.fromkeys(episode.id for episode in found if episode is not None))


def _group(entity: Entity, right: Mapping[str, Sequence[str]]) -> str:
    if entity.kind in SPECIAL:
        return entity.kind
    if any(UNKNOWN in words for words in right.values()):
        return "untold"
    return "held-out" if entity.held_out else "trained"


def _json(right: Mapping[str, Sequence[str]]) -> JsonValue:
    return {role: list(words) for role, words in right.items()}


def _right_of(task: Task) -> dict[str, list[str]]:
    right: Any = task.data.get("right")
    if task.domain != HiddenFactsDomain.name or not isinstance(right, dict):
        raise DataError(f"task {task.key}: its data hold no right words; expected a task of kind hidden_facts")
    return {str(role): [str(word) for word in words] for role, words in right.items()}
