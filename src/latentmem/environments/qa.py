"""Question answering without tools: the reward tells whether the one extracted answer equals an accepted one.

What counts as equal depends on the form of the answer. Short texts are compared after normalisation in the manner of
SQuAD (Rajpurkar et al. 2016), so that "the Beatles." equals "Beatles"; yes or no, and numbers, have their own rules.
Whether the response merely contains an accepted answer is recorded but earns nothing, or listing answers would pay.
"""

import hashlib
import json
import re
import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Literal

from latentmem.config import Rows
from latentmem.environments.answers import (
    bare,
    begun,
    boxed,
    first_sentence,
    last_number,
    stated,
    stated_number,
    tagged,
    untagged,
    without_thoughts,
)
from latentmem.environments.environment import Outcome, Split
from latentmem.environments.rows import Row, Splits, all_strings, split_tasks, typed
from latentmem.errors import BadRowError
from latentmem.trajectory import Task

_ARTICLES = frozenset({"a", "an", "the"})
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212"
_QUOTES = "\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u2032\u2033\u00b4\u02bc\u02bb\u00ab\u00bb\u2039\u203a"
_PUNCTUATION = str.maketrans(
    "", "", string.punctuation + _QUOTES + _DASHES + "\u00b7\u2022\u00ad\u200b\u200c\u200d\u2060\ufeff"
)
_LETTERS = str.maketrans({"\u00f8": "o", "\u0142": "l", "\u0111": "d", "\u00e6": "ae", "\u0153": "oe", "\u0131": "i"})
_AND = re.compile(r"(?<=\s)&(?=\s)")
_RESTATED = re.compile(r"(?:\S+\s+){3,}(?:is|are|was|were)\s+(?P<answer>\S.*)", re.DOTALL)
_POINTED = re.compile(
    r"(?:(?:it|this|that|he|she|they|these|those)\s+(?:is|was|are|were|would be)|(?:it|that|he|she)['\u2019]s)\s+"
    r"(?:called\s+|named\s+)?(?P<answer>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_SUBJECT = re.compile(
    r"(?P<answer>\S.*?)\s+(?:(?:is|are|was|were)\s+(?:the|my)\s+(?:\w+\s+)?answer\b.*"
    r"|(?:wrote|sang|won|did|made|built|drew|led|said|[a-z]+ed)\s+(?:it|this|that|them|these|those|him|her|so))",
    re.DOTALL,
)
_SHORT_SUBJECT = re.compile(r"(?P<answer>\S+(?:\s+\S+)?)\s+(?:is|are|was|were)\s+(?:the|an?)\s+\S.*", re.DOTALL)
_REMARK = re.compile(
    r"\s*(?:\s\([^()]*\)|,?\s+(?:because|since)\s.*|,\s+(?:which|who|where|as)\s.*|\s[-\u2013\u2014]+\s.*)$", re.DOTALL
)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
# "No one knows" is no verdict: after no, true and false a clause has to end. Nor is "yes or no".
_CLAUSE_ENDS = r"(?=[ \t*_\"')\]]*(?:$|\n|[.,;:!?\u2014]|[-\u2013]\s))"
_VERDICT = re.compile(
    r"[\W_]*(?:(?:so|thus|hence|therefore)\b[\W_]*)?"
    rf"(?:(?P<yes>yes\b(?!\s*(?:/|or\b|and\b|no\b))|true\b{_CLAUSE_ENDS})|(?:no|false)\b{_CLAUSE_ENDS})",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Form:
    """How answers of one kind are asked for, found in a response, and compared."""

    instructions: str
    read: Callable[[str], list[str]]
    """Readings of the one answer in a response, the plainest last; empty where there is none."""
    normalise: Callable[[str], str]
    """Two answers are the same if this makes them equal; it returns an empty text for what is no answer."""


def extract(response: str) -> str | None:
    r"""The one answer in a response, or None.

    It is in the last `<answer>...</answer>`; else behind an `<answer>` that never closes; else in the last
    `\boxed{...}`; else after `Final Answer:`, `Answer:` or `answer is`; else the first sentence that says
    something, or the part of it
    that says what the rest only speaks about. A thought that ends in `</think>` is not read.

    >>> extract("Let me think. The answer is **Paris**.")
    'Paris'
    >>> extract("Paris. It lies on the Seine."), extract("The capital of France is Paris."), extract("It is Paris.")
    ('Paris', 'Paris', 'Paris')
    """
    found = readings(response)
    return found[-1] if found else None


def readings(response: str) -> list[str]:
    """Ways to read the one answer in a response, the plainest last; a remark behind it is in the first ones only.

    All are one answer with more or less around it: two candidates are never read out of one response.
    """
    response = without_thoughts(response)
    tag = tagged(response)
    if tag is not None:
        return _inner_readings(tag)
    marked = begun(response) or boxed(response)
    if marked is not None:
        return _inner_readings(marked)
    said = stated(response)
    if said:
        return _readings_of(said[0])
    whole = bare(response)
    rest = untagged(response)
    while rest.strip():
        sentence = first_sentence(rest)
        if bare(sentence):
            found = _readings_of(_told(bare(sentence)))
            return [whole, bare(sentence), *found] if "\n" not in whole else [bare(sentence), *found]
        rest = rest[len(sentence) + 1 :]
    return []


def _inner_readings(text: str) -> list[str]:
    """Readings of what stands in a mark, which may hold another one."""
    inner = boxed(text)
    if inner is not None:
        text = inner
    text = bare(_TEXT_COMMAND.sub(r"\1", text))
    said = stated(text)
    if said and re.match(r"[\W_]*(?:(?:the|my|so|final)\s+)*answer\b", text, re.IGNORECASE):
        return [text, *_readings_of(said[0])]
    pointed = _POINTED.fullmatch(text)
    if pointed:
        return [text, *_readings_of(bare(pointed["answer"]))]
    return _readings_of(text)


def _readings_of(text: str) -> list[str]:
    text = bare(text)
    if not text:
        return []
    first = bare(first_sentence(text))
    plain = bare(_REMARK.sub("", first))
    return list(dict.fromkeys(found for found in (plain, first, text) if found))[::-1]


def _told(sentence: str) -> str:
    """The part of a sentence that is an answer: "X is the answer", "it is X", "the capital of Y is X", "X wrote it"."""
    for form in (_SUBJECT, _RESTATED, _POINTED, _SHORT_SUBJECT):
        match = form.fullmatch(sentence)
        if match and bare(match["answer"]):
            return bare(match["answer"])
    return sentence


def normalise(text: str) -> str:
    """Lower case, without punctuation, accents of Latin letters and the articles a, an, the; single blanks.

    A standing `&` is "and"; dashes and quotes of any kind are punctuation. Names that consist of articles only ("The
    The", "A") keep them, and so does bare punctuation ("!!!").

    >>> normalise(" The  Beatles. "), normalise("The The"), normalise("Caf\u00e9 & Bar")
    ('beatles', 'the the', 'cafe and bar')
    """
    lowered = _without_accents(unicodedata.normalize("NFKC", text).lower())
    words = _AND.sub("and", lowered).translate(_PUNCTUATION).split()
    telling = [word for word in words if word not in _ARTICLES]
    return " ".join(telling or words or lowered.split())


def _without_accents(text: str) -> str:
    """In other scripts than the Latin one such marks tell letters apart."""
    kept: list[str] = []
    is_latin = False
    for letter in unicodedata.normalize("NFD", text):
        if unicodedata.combining(letter):
            if is_latin:
                continue
        else:
            is_latin = unicodedata.name(letter, "").startswith("LATIN")
        kept.append(letter)
    return unicodedata.normalize("NFC", "".join(kept)).translate(_LETTERS)


def yes_or_no(response: str) -> str | None:
    r"""`yes` or `no`, or None: what the first of these that says one begins with.

    The last `<answer>...</answer>`, which binds; an unclosed one; the last `\boxed{...}`; the `answer is ...` and
    `Answer: ...`, the last one first; the last line; the first line. A `so`, `thus`, `hence` or `therefore` may stand
    before it. True is yes, false is no. After no, true and false the clause must end ("no one knows" is no verdict);
    yes may go on, but not with a slash, or, and, no.

    >>> yes_or_no("Yes, since ducks float."), yes_or_no("They float. So the answer is no."), yes_or_no("yes or no")
    ('yes', 'no', None)
    """
    response = without_thoughts(response)
    tag = tagged(response)
    if tag is not None:
        return next((said for text in _inner_readings(tag) if (said := _begins_with_verdict(text))), None)
    lines = [line for line in untagged(response).splitlines() if line.strip()]
    marked = (begun(response) or "", *_inner_readings(boxed(response) or ""))
    for text in (*marked, *stated(response), *lines[-1:], *lines[:1]):
        said = _begins_with_verdict(text)
        if said is not None:
            return said
    return None


def _begins_with_verdict(text: str) -> str | None:
    match = _VERDICT.match(text)
    if match is None:
        return None
    return "yes" if match["yes"] else "no"


def plain_number(text: str) -> str:
    """Return the last number of a text without trailing zeros, so that 2.50 is 2.5; empty if there is none."""
    number = last_number(text)
    return "" if number is None else str(Decimal(number).normalize())


def _listed(answer: str | None) -> list[str]:
    return [] if answer is None else [answer]


SHORT_TEXT = Form(
    "Answer the question with the shortest answer that is complete: a name, a number or a few words. "
    "Write only this answer between <answer> and </answer>.",
    readings,
    normalise,
)
YES_OR_NO = Form(
    "Think about what has to be known to answer the question. You may reason briefly; then write only yes or no "
    "between <answer> and </answer>.",
    lambda response: _listed(yes_or_no(response)),
    normalise,
)
NUMBER = Form(
    "Solve the problem step by step. Then write only the final number between <answer> and </answer>.",
    lambda response: _listed(stated_number(without_thoughts(response))),
    plain_number,
)


@dataclass(frozen=True)
class QAEnvironment:
    """One episode of one step. Reward: 1.0 if the extracted answer, after `form.normalise`, is accepted, else 0.0.

    `info` holds `extracted`, `exact_match` (the reward as a bool) and `contains`: whether an accepted answer occurs,
    as whole words, anywhere in the normalised response.
    """

    answers: tuple[str, ...]
    """Accepted answers, normalised; none is empty."""
    form: Form = SHORT_TEXT

    @property
    def instructions(self) -> str:
        """How an answer has to look."""
        return self.form.instructions

    def step(self, action: str) -> Outcome:
        """Score the team's answer and end the episode."""
        read = self.form.read(action)
        right = next((answer for answer in read if self.form.normalise(answer) in self.answers), None)
        words = f" {normalise(untagged(action))} "
        return Outcome(
            observation="",
            reward=float(right is not None),
            done=True,
            info={
                "extracted": right if right is not None else read[-1] if read else None,
                "exact_match": right is not None,
                "contains": any(f" {normalise(accepted)} " in words for accepted in self.answers),
            },
        )


class QADomain:
    """Questions of PopQA, TriviaQA, StrategyQA or GSM8K, with the field names of their hub data sets.

    Raises:
        DataError: tasks are asked for and a row cannot be used.
    """

    def __init__(
        self,
        *,
        schema: Literal["popqa", "triviaqa", "strategyqa", "gsm8k"],
        train: Rows,
        test: Rows,
        instructions: str | None = None,
    ) -> None:
        self.name: str = schema
        self._train = train
        self._test = test
        form, self._read = _SCHEMAS[schema]
        self._form = form if instructions is None else replace(form, instructions=instructions)

    def tasks(self, split: Split) -> list[Task]:
        """Return all tasks of a split, in the order of the rows; train tasks that also occur in test are left out.

        Raises:
            DataError: the rows do not exist, a row lacks question, id or accepted answer, or an id occurs twice.
        """
        return list(self._splits.tasks.get(split, ()))

    def skipped(self, split: Split) -> dict[str, int]:
        """Count the rows of a split that were left out, by reason."""
        return dict(self._splits.skipped.get(split, {}))

    @cached_property
    def _splits(self) -> Splits:
        return split_tasks(self._train, self._test, self._task)

    def start(self, task: Task) -> QAEnvironment:
        """Make a fresh environment for one episode.

        Raises:
            DataError: the task's data hold no accepted answers.
        """
        where = f"task {task.key}: data field 'answers'"
        answers = all_strings(typed(task.data.get("answers"), list, where), where)
        normal = (self._form.normalise(answer) for answer in answers)
        return QAEnvironment(tuple(dict.fromkeys(normal)), self._form)

    def _task(self, row: Row) -> Task:
        task_id, answers = self._read(row)
        accepted = [answer for answer in dict.fromkeys(answers) if self._form.normalise(answer)]
        if not accepted:
            raise BadRowError("no answer", f"{row.where}: no accepted answer; expected at least one that is not blank")
        return Task(id=task_id, domain=self.name, text=row.text("question").strip(), data={"answers": list(accepted)})


def _popqa(row: Row) -> tuple[str, list[str]]:
    return str(row.field("id", int)), _json_strings(row, "possible_answers") + _json_strings(row, "o_aliases")


def _triviaqa(row: Row) -> tuple[str, list[str]]:
    answer = Row(row.field("answer", dict), f"{row.where}: answer")
    answers = [answer.field("value", str), *answer.strings("aliases"), *answer.strings("normalized_aliases")]
    return row.text("question_id"), answers


def _strategyqa(row: Row) -> tuple[str, list[str]]:
    return row.text("qid"), ["yes" if row.field("answer", bool) else "no"]


def _gsm8k(row: Row) -> tuple[str, list[str]]:
    """Read id and answer; GSM8K has no ids, so a hash of the question serves as one."""
    _, mark, number = row.text("answer").rpartition("####")
    return hashlib.sha256(row.text("question").strip().encode()).hexdigest()[:16], [number] if mark else []


_SCHEMAS: dict[str, tuple[Form, Callable[[Row], tuple[str, list[str]]]]] = {
    "popqa": (SHORT_TEXT, _popqa),
    "triviaqa": (SHORT_TEXT, _triviaqa),
    "strategyqa": (YES_OR_NO, _strategyqa),
    "gsm8k": (NUMBER, _gsm8k),
}
"""For each schema its form, and the function that reads id and accepted answers from a row."""


def _json_strings(row: Row, name: str) -> list[str]:
    where = f"{row.where}: field {name!r}"
    text = row.field(name, str)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRowError(
            "wrong type", f"{where} is {text[:40]!r}; expected a JSON list of strings, written as a string"
        ) from None
    return all_strings(typed(values, list, where), where)
