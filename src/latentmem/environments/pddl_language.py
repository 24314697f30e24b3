"""The four worlds in plain English: sentences tell the state, and short commands say what to do.

A world's rules, sentences, commands and our own PDDL domain are one YAML file in `worlds/`. A command may leave out
parameters that follow from the state, such as the hand that holds a glass. This module also decides which words of a
response are the action, from the text alone, so that a response always names at most one action.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from latentmem.environments.answers import bare
from latentmem.environments.pddl_world import Action, Fact, State, World
from latentmem.errors import DataError, suggest
from latentmem.parsing import parse_yaml

WORLDS = ("gripper", "blockworld", "barman", "tyreworld")
"""The worlds, by AgentBoard's names."""

CHECK = "check valid actions"
LOOK = "look around"

MAX_CHARACTERS = 10_000
"""Length of the part of a response that is read."""

_MARK = re.compile(r"\b(?:action|answer)(?:\s+\d+)?[\s*_`]*(?::|\bis\b)[\s*_`:]*", re.IGNORECASE)
_LIST_MARK = re.compile(r"^[\s>*\-#]*(?:\d+[.):]\s+)?")
_END = re.compile(r"[.!?;,:](?=\s|$)|[<(\[{]")
_FIELD = re.compile(r"\{(\w+)\}")
_LEAD_INS = frozenset(
    {"i", "we", "you", "will", "should", "must", "can", "i'll", "we'll", "let", "let's", "us"}
    | {"first", "next", "now", "then", "to", "please"}
)


@dataclass(frozen=True)
class Command:
    """The wording of one action."""

    action: str
    say: str
    """Text with a field for each object that it names."""
    arguments: tuple[str | None, ...]
    """For each parameter of the action, its field; None if its object follows from the state."""

    @property
    def form(self) -> str:
        """The command with its fields in capitals, as the rules show it."""
        return _FIELD.sub(lambda match: match.group(1).upper(), self.say)

    def of(self, action: Action) -> str:
        """Return the command for an action."""
        named = {field: name for field, name in zip(self.arguments, action.objects, strict=True) if field}
        return _FIELD.sub(lambda match: named[match.group(1)], self.say)

    def match(self, words: Sequence[str]) -> dict[str, str] | None:
        """Return the word at each field, or None if the words are not this command."""
        pattern = _words(self.say)
        if len(pattern) != len(words):
            return None
        fields = {}
        for expected, word in zip(pattern, words, strict=True):
            field = _FIELD.fullmatch(expected)
            if field:
                fields[field.group(1)] = word
            elif expected != word:
                return None
        return fields


@dataclass(frozen=True)
class Language:
    """The words for one world."""

    name: str
    rules: str
    example: str
    """A command as a team may give it; small models copy a form that is shown, but invent one that is described."""
    tells_all: bool
    """Whether each observation tells the whole changing state, or only the facts that became true."""
    commands: dict[str, Command]
    facts: dict[str, str]
    """The sentence of each predicate, in the order in which they are told."""
    unspoken: frozenset[str]
    """Predicates that occur only in reasons."""
    domain: str
    """Our own PDDL definition of the world."""

    @property
    def instructions(self) -> str:
        """The rules, the commands, and how an action has to look."""
        forms = "\n".join(f"- {form}" for form in [*(c.form for c in self.commands.values()), CHECK, LOOK])
        return (
            f"{self.rules}\nOne action is done in each turn. The actions are:\n{forms}\n"
            f"'{CHECK}' lists what can be done now, '{LOOK}' tells the state; both cost a turn.\n"
            "Put the names of things in place of the words in capitals. "
            f"Reply with one line and nothing else, such as\nAction: {self.example}"
        )

    def sentences(self, facts: Iterable[Fact]) -> str:
        """Return sentences for the facts, without unspoken ones, in a fixed order."""
        rank = {predicate: i for i, predicate in enumerate(self.facts)}
        spoken = (fact for fact in facts if fact[0] not in self.unspoken)
        return " ".join(self.sentence(fact) for fact in sorted(spoken, key=lambda f: (rank[f[0]], _natural(f[1:]))))

    def sentence(self, fact: Fact) -> str:
        """Return the sentence for one fact."""
        return self.facts[fact[0]].format(*fact[1:])

    def task(self, initial: Iterable[Fact], goal: Iterable[Fact]) -> str:
        """Return what a team is told at the start."""
        return (
            f"{self.rules.partition('. ')[0]}.\nGoal: {self.sentences(goal)}\nAt the start: {self.sentences(initial)}"
        )

    def check(self, world: World, where: str) -> None:
        """Refuse a domain that has other predicates or actions than those with a wording here.

        Raises:
            DataError: a name or its number of objects differs; the message names it and the domain file.
        """
        known = {name: len(command.arguments) for name, command in self.commands.items()}
        for kind, found, expected in (
            ("action", {name: len(p) for name, p in world.parameters.items()}, known),
            ("predicate", world.predicates, {name: _arity(said) for name, said in self.facts.items()}),
        ):
            for name, arity in found.items():
                if name not in expected:
                    raise DataError(f"{where}: {kind} {name!r} is unknown in {self.name}; {suggest(name, expected)}")
                if arity != expected[name]:
                    raise DataError(
                        f"{where}: {kind} {name!r} takes {arity} objects; in {self.name} it takes {expected[name]}"
                    )

    def read(self, text: str) -> list[tuple[Command, dict[str, str]]]:
        """Return the commands that a text may be, with the words at their fields; several if worlds reuse a phrase."""
        words = _words(text)
        found = ((command, command.match(words)) for command in self.commands.values())
        return [(command, fields) for command, fields in found if fields is not None]

    def extract(self, response: str) -> str | None:
        """Return the words of a response that are taken as the action, or None if it says nothing.

        The candidates are, in this order: what follows each `Action:`, `Answer:` or `action is`, up to the end of its
        clause (or on the next line, if nothing follows); then each line, up to the end of its first clause. The first
        candidate with the form of a command counts, whatever its objects; without one, the first candidate.
        """
        candidates = _candidates(response[:MAX_CHARACTERS])
        commands = (c for c in candidates if is_check(c) or is_look(c) or self.read(c))
        return next(commands, candidates[0] if candidates else None)

    def valid(self, world: World, state: State) -> list[str]:
        """Return the commands that would change the state, each once, in the order of the rules."""
        changing = (a for a in world.applicable(state) if world.apply(state, a) != state)
        order = {name: i for i, name in enumerate(self.commands)}
        by_rank = sorted(changing, key=lambda a: (order[a.name], _natural(a.objects)))
        return list(dict.fromkeys(self.commands[a.name].of(a) for a in by_rank))


@cache
def language(name: str) -> Language:
    """Load the words for a world of `WORLDS`."""
    text = (files("latentmem") / "environments" / "worlds" / f"{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = parse_yaml(text)
    commands = {
        action: Command(action, command["say"], tuple(command["arguments"]))
        for action, command in values["commands"].items()
    }
    return Language(
        name=name,
        rules=values["rules"],
        example=values["example"],
        tells_all=values["observation"] == "state",
        commands=commands,
        facts=values["facts"] | values["unspoken"],
        unspoken=frozenset(values["unspoken"]),
        domain=values["domain"],
    )


def is_check(text: str) -> bool:
    """Return whether the words ask for the valid actions."""
    return _words(text) in (["check", "valid", "actions"], ["check", "valid", "action"])


def is_look(text: str) -> bool:
    """Return whether the words ask for the state."""
    return _words(text) == ["look", "around"]


def _candidates(response: str) -> list[str]:
    lines = [line for line in response.splitlines() if line.strip()]
    marked, plain = [], []
    for i, line in enumerate(lines):
        for mark in _MARK.finditer(line):
            rest = line[mark.end() :]
            marked.append(_clause(rest if bare(rest) or i + 1 == len(lines) else lines[i + 1]))
        plain.append(_clause(line))
    return [candidate for candidate in [*marked, *plain] if _words(candidate)]


def _clause(text: str) -> str:
    text = bare(_LIST_MARK.sub("", text))
    end = _END.search(text)
    return bare(text[: end.start()] if end else text)


def _words(text: str) -> list[str]:
    """Split text into lower-case words, without `the` (`a` may be a block), a command's lead-in, and marks on words."""
    words = [
        word.strip("\"'`*_.,;:!?\u2018\u2019\u201c\u201d") for word in text.replace("\u2019", "'").casefold().split()
    ]
    telling = [word for word in words if word and word != "the"]
    start = next((i for i, word in enumerate(telling) if word not in _LEAD_INS), len(telling))
    return telling[start:]


def _natural(names: Iterable[str]) -> list[list[tuple[int, str]]]:
    """Return a sort key that puts ball2 before ball10."""
    return [[(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"(\d+)", name)] for name in names]


def _arity(sentence: str) -> int:
    return len(set(re.findall(r"\{\d\}", sentence)))
