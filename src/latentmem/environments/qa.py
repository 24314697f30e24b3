"""Closed-book question answering: the reward is whether the one extracted answer is an accepted one, exactly.

Exactly means after normalisation in the manner of SQuAD (Rajpurkar et al. 2016), so that "the Beatles." is "Beatles".
That the response merely contains an accepted answer is recorded beside it and pays nothing, or listing would pay.
"""

import json
import re
import string
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from latentmem.config import Rows
from latentmem.environments.answers import bare, stated, tagged, untagged
from latentmem.environments.environment import Outcome, Split
from latentmem.environments.rows import Row, all_strings, read_rows, split_tasks, typed
from latentmem.errors import DataError
from latentmem.trajectory import Task

_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = str.maketrans("", "", string.punctuation + "\u2018\u2019\u201c\u201d\u00b4")
_SENTENCE = re.compile(r".+?(?:[.!?](?=\s)|$)", re.MULTILINE)
_RESTATED = re.compile(r"(?:\S+\s+){3,}(?:is|are|was|were)\s+(?P<answer>\S.*)", re.DOTALL)

INSTRUCTIONS = (
    "Answer the question with the shortest answer that is complete: a name, a number or a few words. "
    "Write only this answer between <answer> and </answer>."
)


@dataclass(frozen=True)
class QAEnvironment:
    """One episode of one step. Reward: 1.0 if the extracted answer is an accepted one after `normalise`, else 0.0.

    `info` holds `extracted`, `exact_match` (the reward as a bool) and `contains`: whether an accepted answer occurs,
    as whole words, anywhere in the normalised response.
    """

    answers: tuple[str, ...]
    """Accepted answers, normalised, none empty."""

    @property
    def instructions(self) -> str:
        """How an answer has to look."""
        return INSTRUCTIONS

    def step(self, action: str) -> Outcome:
        """Score the team's answer and end the episode."""
        answer = extract(action)
        exact_match = answer is not None and normalise(answer) in self.answers
        words = f" {normalise(untagged(action))} "
        return Outcome(
            observation="",
            reward=float(exact_match),
            done=True,
            info={
                "extracted": answer,
                "exact_match": exact_match,
                "contains": any(f" {accepted} " in words for accepted in self.answers),
            },
        )


def extract(response: str) -> str | None:
    """The one answer in a response, or None: the last `<answer>...</answer>`, else the last `answer is ...` or
    `Answer: ...`, else the first sentence that says something. Of a sentence that restates the question, three words or
    more before its last is, are, was or were, only what follows counts: SmolLM2-135M answers so, and never with tags.

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
    """Lower case, without punctuation and the articles a, an, the, single blanks between words.

    Names that consist of such words only ("The The", "A") keep them, and so does bare punctuation ("!!!").

    >>> normalise(" The  Beatles. "), normalise("The The")
    ('beatles', 'the the')
    """
    lowered = unicodedata.normalize("NFKC", text).lower()
    words = lowered.translate(_PUNCTUATION).split()
    telling = [word for word in words if word not in _ARTICLES]
    return " ".join(telling or words or lowered.split())


class QADomain:
    """Questions of PopQA (`popqa`) or TriviaQA (`triviaqa`), in the field names of their hub data sets.

    Raises:
        DataError: when tasks are asked for and a row cannot be used.
    """

    def __init__(self, *, schema: Literal["popqa", "triviaqa"], train: Rows, test: Rows) -> None:
        self.name: str = schema
        self._train = train
        self._test = test

    def tasks(self, split: Split) -> list[Task]:
        """All tasks of a split, in the order of the rows; what also occurs in test is left out of train.

        Raises:
            DataError: no such rows, a row without question, id or accepted answer, or an id that occurs twice.
        """
        return list(self._tasks[split])

    @cached_property
    def _tasks(self) -> dict[Split, list[Task]]:
        return split_tasks(read_rows(self._train), read_rows(self._test), self._task)

    def start(self, task: Task) -> QAEnvironment:
        """A fresh environment for one episode.

        Raises:
            DataError: the task's data hold no accepted answers.
        """
        where = f"task {task.key}: data field 'answers'"
        answers = all_strings(typed(task.data.get("answers"), list, where), where)
        return QAEnvironment(answers=tuple(dict.fromkeys(normalise(answer) for answer in answers)))

    def _task(self, row: Row) -> Task:
        if self.name == "popqa":
            task_id = str(row.field("id", int))
            answers = _json_strings(row, "possible_answers") + _json_strings(row, "o_aliases")
        else:
            task_id = row.text("question_id")
            answer = Row(row.field("answer", dict), f"{row.where}: answer")
            answers = [answer.field("value", str), *answer.strings("aliases"), *answer.strings("normalized_aliases")]
        answers = [accepted for accepted in dict.fromkeys(answers) if normalise(accepted)]
        if not answers:
            raise DataError(f"{row.where}: no accepted answer; expected at least one that is not blank")
        return Task(id=task_id, domain=self.name, text=row.text("question").strip(), data={"answers": list(answers)})


def _json_strings(row: Row, name: str) -> list[str]:
    where = f"{row.where}: field {name!r}"
    text = row.field(name, str)
    try:
        values = json.loads(text)
    except ValueError:
        raise DataError(f"{where} is {text[:40]!r}; expected a JSON list of strings, written as a string") from None
    return all_strings(typed(values, list, where), where)
