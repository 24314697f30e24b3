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
from latentmem.environments.answers import bare, last_number, stated, stated_number, tagged, untagged
from latentmem.environments.environment import Outcome, Split
from latentmem.environments.rows import Row, Splits, all_strings, split_tasks, typed
from latentmem.errors import BadRowError
from latentmem.trajectory import Task

_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = str.maketrans("", "", string.punctuation + "\u2018\u2019\u201c\u201d\u00b4")
_SENTENCE = re.compile(r".+?(?:[.!?](?=\s)|$)", re.MULTILINE)
_RESTATED = re.compile(r"(?:\S+\s+){3,}(?:is|are|was|were)\s+(?P<answer>\S.*)", re.DOTALL)
# "No one knows" is no verdict, so a clause must end after no, true and false. "Yes or no" is no verdict either.
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
    extract: Callable[[str], str | None]
    """Finds the one answer in a response, or None."""
    normalise: Callable[[str], str]
    """Two answers are the same if this makes them equal; it returns an empty text for what is no answer."""


def extract(response: str) -> str | None:
    """Return the one answer in a response, or None.

    It is the last `<answer>...</answer>`, else the last `answer is ...` or `Answer: ...`, else the first sentence with
    content. A sentence may restate the question, with three words or more before its last is, are, was or were; then
    only what follows counts. SmolLM2-135M answers so, and never with tags.

    >>> extract("Let me think. The answer is **Paris**.")
    'Paris'
    >>> extract("Paris. It lies on the Seine."), extract("The capital of France is Paris.")
    ('Paris', 'Paris')
    """
    tag = tagged(response)
    if tag is not None:
        return bare(tag) or None
    marked = stated(response)
    if marked:
        return marked[0]
    sentences = (bare(sentence) for sentence in _SENTENCE.findall(response))
    first = next((sentence for sentence in sentences if sentence), None)
    restated = _RESTATED.match(first) if first else None
    return bare(restated["answer"]) or None if restated else first


def normalise(text: str) -> str:
    """Return the text in lower case, with single blanks, without punctuation and the articles a, an, the.

    A name made of articles only ("The The", "A") keeps them, and bare punctuation ("!!!") stays too.

    >>> normalise(" The  Beatles. "), normalise("The The")
    ('beatles', 'the the')
    """
    lowered = unicodedata.normalize("NFKC", text).lower()
    words = lowered.translate(_PUNCTUATION).split()
    telling = [word for word in words if word not in _ARTICLES]
    return " ".join(telling or words or lowered.split())


def yes_or_no(response: str) -> str | None:
    """Return `yes` or `no`, or None, from the first of these places that begins with a verdict.

    The places are: the last `<answer>...</answer>`, and only it if there is one; each `answer is ...` or `Answer: ...`,
    the last one first; the last line; the first line. `so`, `thus`, `hence` or `therefore` may come before the verdict.
    True means yes, false means no. After no, true and false the clause must end ("no one knows" is no verdict). Yes may
    go on, but not with a slash, or, and, no.

    >>> yes_or_no("Yes, since ducks float."), yes_or_no("They float. So the answer is no."), yes_or_no("yes or no")
    ('yes', 'no', None)
    """
    tag = tagged(response)
    if tag is not None:
        return _begins_with_verdict(tag)
    lines = [line for line in untagged(response).splitlines() if line.strip()]
    for text in (*stated(response), *lines[-1:], *lines[:1]):
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


SHORT_TEXT = Form(
    "Answer the question with the shortest answer that is complete: a name, a number or a few words. "
    "Write only this answer between <answer> and </answer>.",
    extract,
    normalise,
)
YES_OR_NO = Form(
    "Think about what has to be known to answer the question. You may reason briefly; then write only yes or no "
    "between <answer> and </answer>.",
    yes_or_no,
    normalise,
)
NUMBER = Form(
    "Solve the problem step by step. Then write only the final number between <answer> and </answer>.",
    stated_number,
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
        answer = self.form.extract(action)
        exact_match = answer is not None and self.form.normalise(answer) in self.answers
        words = f" {normalise(untagged(action))} "
        return Outcome(
            observation="",
            reward=float(exact_match),
            done=True,
            info={
                "extracted": answer,
                "exact_match": exact_match,
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
