"""DyLAN (Liu et al. 2024, arXiv 2310.02170): rounds of agents that read each other's answers, until most agree.

In round 1 every agent answers. In later rounds every agent reads all answers of the round before, its own included,
rates them and answers anew. Before some rounds a ranker names those who stay. The ranker is a member like the others:
its response decides who is heard, so it has a memory of its own and is trained on the same reward. Prompts and numbers
come from the team's file. This module fixes who speaks when, and how ratings become importance scores.
"""

import ast
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from latentmem.environments.answers import bare, boxed, last_line, last_number, stated, tagged
from latentmem.environments.code.extraction import extract_code
from latentmem.environments.reasoning import extract
from latentmem.errors import ConfigError
from latentmem.teams.turn import PAST, PAST_FIELDS, Action, Call, Turn, describe_history, render
from latentmem.templates import check_template, fields_in, fill
from latentmem.trajectory import Role, Step

SYSTEM_FIELDS = ("task", "instructions", "history")
FIELDS = (*SYSTEM_FIELDS, "messages", "count", "mark")
RANKER_FIELDS = (*FIELDS, "stay")

_LIST = re.compile(r"[\s*\[(]*\d+(?:(?:\s*[,;>]\s*|\s+)(?:and\s+)?\d+)*")
"""Numbers as models write them: `4, 2, 5`, `[[1, 3]]`, `2 > 1`, `1 and 3`."""
_WHOLE_LIST = re.compile(_LIST.pattern + r"[\s*\])]*\.?\s*")
_RESTATED = re.compile(r".*(?:=|\b(?:is|are|was|were)\b)(?=\s*[^\s.])", re.DOTALL | re.IGNORECASE)
_EQUATION = re.compile(r".*=(?=\s*\S)", re.DOTALL)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class MemberFile(_Part):
    """A member who answers."""

    role: str
    profile: str
    system: str


class RatingsFile(_Part):
    """How readers rate the answers."""

    mark: Annotated[str, Field(min_length=1)]
    """The text before the ratings, on their line."""
    highest: Annotated[int, Field(gt=0)]
    """The highest rating; a higher number counts as this."""


class RankerFile(_Part):
    """The member who decides who stays."""

    role: str
    profile: str
    system: str
    user: str
    mark: Annotated[str, Field(min_length=1)]
    """The text before the numbers of those who stay, best first, on their line."""
    stay: dict[int, int]
    """The number of agents that stay, by the round for which they stay."""


class ConsensusFile(_Part):
    """When the team counts as agreed."""

    share: str | float
    """More than this share of a round has to give the same answer; a number, or a fraction such as 2/3."""
    judged_by: Literal["answer", "number"] = "answer"
    """How an answer is read: by `read_answer`, or as the number that a numeric task would read."""

    @field_validator("share")
    @classmethod
    def _is_share(cls, value: str | float) -> str | float:
        try:
            inside = 0 <= Fraction(str(value)) <= 1
        except (ValueError, ZeroDivisionError):
            inside = False
        if not inside:
            raise ValueError(f"is {value!r}; expected a number from 0 to 1, or a fraction such as 2/3")
        return value


class DylanFile(_Part):
    """The content of a file of a DyLAN team."""

    kind: Literal["dylan"]
    name: str
    description: str = ""
    rounds: Annotated[int, Field(gt=0)]
    consensus: ConsensusFile
    ratings: RatingsFile
    agents: list[MemberFile]
    first: str
    """The user prompt of round 1."""
    later: str
    """The user prompt of all later rounds."""
    message: str
    """How an answer is quoted."""
    turn: str = PAST
    ranker: RankerFile | None = None


@dataclass(frozen=True)
class _Said:
    """One answer of a round."""

    role: str
    text: str
    """The response without its ratings."""
    answer: str | None
    position: int
    """The response's number among all responses of the turn."""

    def agrees_with(self, other: "_Said") -> bool:
        return self.answer is not None and self.answer == other.answer


class DylanTeam:
    """A team that plays what a `DylanFile` says."""

    def __init__(self, file: DylanFile, read: Callable[[str], str | None] | None = None) -> None:
        """Check the file.

        Args:
            file: roles, prompts and numbers.
            read: returns the answer in a response, in one form for answers that agree, or None if there is none. None
                takes the rule that the file names.

        Raises:
            ConfigError: two members have the same role, a template field is unknown, or a ranker could never act.
        """
        self.file = file
        self.name = file.name
        self.share = Fraction(str(file.consensus.share))
        self.read = read or READERS[file.consensus.judged_by]
        self.agents = tuple((Role(name=a.role, profile=a.profile), a.system) for a in file.agents)
        self.ranker = Role(name=file.ranker.role, profile=file.ranker.profile) if file.ranker else None
        names = [role.name for role in self.roles]
        if len(set(names)) < len(names):
            raise ConfigError(f"team {file.name}: two members have the same role")
        templates: list[tuple[str, str, tuple[str, ...]]] = [
            *((f"system prompt of {role.name}", system, SYSTEM_FIELDS) for role, system in self.agents),
            ("first", file.first, SYSTEM_FIELDS),
            ("later", file.later, FIELDS),
            ("message", file.message, ("number", "response")),
            ("turn", file.turn, PAST_FIELDS),
        ]
        if file.ranker:
            prompts = (("system", file.ranker.system), ("user", file.ranker.user))
            templates += [(f"{part} prompt of {file.ranker.role}", text, RANKER_FIELDS) for part, text in prompts]
        for where, template, fields in templates:
            check_template(template, fields, f"team {file.name}: {where}")
        present = len(file.agents)
        for number, stay in sorted(file.ranker.stay.items()) if file.ranker else ():
            if not (2 <= number <= file.rounds and 1 <= stay < present):
                raise ConfigError(
                    f"team {file.name}: ranker.stay keeps {stay} before round {number}; expected a round from 2 to "
                    f"{file.rounds}, and 1 to {present - 1} of the {present} that are there by then"
                )
            present = stay

    @property
    def roles(self) -> tuple[Role, ...]:
        """The members who answer, and the ranker."""
        return (*(role for role, _ in self.agents), *([self.ranker] if self.ranker else []))

    @property
    def shown(self) -> frozenset[str]:
        """Names of the fields that some answering member is shown; the ranker sees their answers."""
        return fields_in(self.file.first, self.file.later, *(system for _, system in self.agents))

    def turn(self, task: str, instructions: str, history: Sequence[Step]) -> Turn:
        """Play rounds until more than the required share give the same answer; see `Team.turn`.

        The action is the first response, in the order of the round, that gives the round's most frequent answer. The
        record is described in docs/teams.md.
        """
        file = self.file
        shared = {
            "task": task.strip(),
            "instructions": instructions.strip(),
            "history": describe_history(history, file.turn.rstrip("\n")),
        }
        stay = file.ranker.stay if file.ranker else {}
        present = list(self.agents)
        said: list[_Said] = []
        dropped: list[JsonValue] = []
        weights: list[dict[str, dict[str, float]]] = []
        num_asked = 0
        count = {"rankings": 0, "rankings_incomplete": 0, "ratings": 0, "ratings_unread": 0}
        for number in range(1, file.rounds + 1):
            fields = shared | {"messages": self._quote(said), "count": str(len(said)), "mark": file.ratings.mark}
            reads = tuple(one.position for one in said)
            if file.ranker and self.ranker and number in stay:
                ranking = fields | {"stay": str(stay[number]), "mark": file.ranker.mark}
                (response,) = yield [
                    Call(self.ranker, render(file.ranker.system, ranking), render(file.ranker.user, ranking), reads)
                ]
                num_asked += 1
                named = _named(response, file.ranker.mark, len(said))
                count["rankings"] += 1
                count["rankings_incomplete"] += len(named) < stay[number]
                kept = (named + [i for i in _by_support(said) if i not in named])[: stay[number]]
                dropped += [role.name for i, (role, _) in enumerate(present) if i not in kept]
                present = [present[i] for i in kept]
            user = render(file.later if said else file.first, fields)
            responses = yield [Call(role, render(system, shared), user, reads) for role, system in present]
            texts, given = list(responses), {}
            if said:
                for i, (role, _) in enumerate(present):
                    texts[i], rated = _ratings(texts[i], file.ratings.mark, file.ratings.highest, len(said))
                    count["ratings"] += 1
                    count["ratings_unread"] += rated is None
                    given[role.name] = _shares([one.role for one in said], rated or ())
                weights.append(given)
            said = [
                _Said(role.name, text, self.read(text), num_asked + i)
                for i, ((role, _), text) in enumerate(zip(present, texts, strict=True))
            ]
            num_asked += len(said)
            chosen = said[_by_support(said)[0]]
            agreeing = [one for one in said if one is chosen or one.agrees_with(chosen)]
            consensus = len(agreeing) > self.share * len(said)
            if consensus:
                break
        final = {one.role: 1 / len(agreeing) for one in agreeing}
        scores = importance(weights, final)
        record: dict[str, JsonValue] = {
            "rounds": number,
            "consensus": consensus,
            "agreement": len(agreeing) / len(said),
            "dropped": dropped,
            **count,
            "importance": {role.name: scores.get(role.name, 0.0) for role, _ in self.agents},
        }
        return Action(chosen.text, record)

    def _quote(self, said: Sequence[_Said]) -> str:
        template = self.file.message.rstrip("\n")
        return "\n\n".join(fill(template, number=str(i), response=one.text) for i, one in enumerate(said, 1))


def importance(weights: Sequence[Mapping[str, Mapping[str, float]]], final: Mapping[str, float]) -> dict[str, float]:
    """Compute agent importance scores: what each agent's answers added to the last round, as shares that sum to 1.

    I[T, i] is the share of agent i in the final answer; before that I[t, i] = sum over j of w[t, i, j] * I[t + 1, j],
    and an agent's score is the mean of I[t, i] over the T rounds (arXiv 2310.02170 sums them, which ranks alike; the
    mean can be compared between episodes of different length).

    Args:
        weights: for rounds 2 to T, w of the round before: {reader j: {author i: share}}, summing to 1 for each j.
        final: the shares of the last round.

    >>> importance([{"a": {"a": 0.75, "b": 0.25}, "b": {"a": 0.5, "b": 0.5}}], {"b": 1.0})
    {'b': 0.75, 'a': 0.25}
    """
    current: Mapping[str, float] = final
    total = dict(final)
    for given in reversed(weights):
        before: dict[str, float] = defaultdict(float)
        for reader, shares in given.items():
            for author, share in shares.items():
                before[author] += share * current.get(reader, 0.0)
        for author, value in before.items():
            total[author] = total.get(author, 0.0) + value
        current = before
    return {author: value / (len(weights) + 1) for author, value in total.items()}


def _shares(authors: Sequence[str], ratings: Sequence[int]) -> dict[str, float]:
    """Turn ratings into shares; the shares are equal if nothing was rated."""
    total = sum(ratings)
    if not total:
        return dict.fromkeys(authors, 1 / len(authors))
    return {author: rating / total for author, rating in zip(authors, ratings, strict=True)}


def _by_support(said: Sequence[_Said]) -> list[int]:
    """Order the positions of a round by how many answers agree with each; on ties, keep the order of the round."""
    support = [sum(other is one or other.agrees_with(one) for other in said) for one in said]
    return sorted(range(len(said)), key=lambda i: -support[i])


def _named(response: str, mark: str, count: int) -> list[int]:
    """Return the positions that a ranker names, best first: after its mark, or in a response that is only a list."""
    _, found, rest = _last_mark(response, mark)
    if not found and not _WHOLE_LIST.fullmatch(response):
        return []
    numbers = [number - 1 for number in _numbers(rest if found else response)]
    return list(dict.fromkeys(number for number in numbers if 0 <= number < count))


def _ratings(response: str, mark: str, highest: int, count: int) -> tuple[str, tuple[int, ...] | None]:
    """Return the response without its ratings, and the ratings; None unless they are `count` numbers."""
    text, found, rest = _last_mark(response, mark)
    if not found:
        return response.strip(), None
    numbers = _numbers(rest)
    rated = tuple(min(number, highest) for number in numbers) if len(numbers) == count else None
    return text.strip(), rated


def _last_mark(response: str, mark: str) -> tuple[str, bool, str]:
    """Return the response without its last mark and the rest of that line, whether there was a mark, and that rest."""
    places = list(re.finditer(re.escape(mark), response, re.IGNORECASE))
    if not places:
        return response, False, ""
    rest = re.compile(r"\s*[^\n]*").match(response, places[-1].end())
    assert rest is not None
    return response[: places[-1].start()] + response[rest.end() :], True, rest.group()


def _numbers(text: str) -> list[int]:
    found = _LIST.match(text)
    # Longer numbers are neither positions nor ratings, and Python refuses to read the longest.
    return [int(digits[:9]) for digits in re.findall(r"\d+", found.group())] if found else []


def read_answer(response: str) -> str | None:
    r"""Return the answer in a response, in one form for answers that agree; None if there is none.

    A fenced program of several lines becomes what Python parses it to: layout and comments do not matter, names do. Of
    other text, the first of these that exists is read: `<answer>...</answer>`, `\boxed{...}`, `answer is ...`, the last
    line. Of that, what follows the last `=` is kept, or in a last line what follows the last `is`. A lone number is
    written plainly, other text in lower case.

    >>> read_answer("The sum of 3 and 4 is 7."), read_answer("3 + 4 = 7.0"), read_answer("<answer>The  Seine.</answer>")
    ('7', '7', 'the seine')
    """
    if "```" in response and (code := extract_code(response)) is not None:
        if "\n" in code.strip():
            return _program(code)
        response = code  # models put numbers into a fence, too
    explicit = [found for found in (tagged(response), boxed(response)) if found is not None] + stated(response)
    text = _EQUATION.sub("", explicit[0]) if explicit else _RESTATED.sub("", last_line(response) or "")
    text = bare(text)
    number = last_number(text)
    if number is not None and not re.search(r"[^\W\d_]", text) and len(re.findall(r"\d[\d.,]*", text)) == 1:
        return number
    return " ".join(text.casefold().split()) or None


def _program(code: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning about "\d" in a model's program is of no use
        try:
            return ast.dump(ast.parse(code))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return code.strip()


READERS: dict[str, Callable[[str], str | None]] = {"answer": read_answer, "number": partial(extract, numeric=True)}
"""The readers of answers, by the values of `consensus.judged_by`."""
