"""Questions that a team may look up: each turn it searches or answers, in tags; passages come back numbered.

The first complete pair of tags is the team's move; the text around it is ignored. Passages are written by strangers, so
tags in them are defused: no passage can close the block it stands in, or answer for the team.
"""

import re
from dataclasses import dataclass
from typing import Literal, Protocol

from latentmem.config import SearchSection
from latentmem.environments.environment import Outcome, Split
from latentmem.environments.qa import QADomain, QAEnvironment
from latentmem.environments.retriever_client import MAX_TITLE_CHARACTERS, Passage, RetrieverClient
from latentmem.trajectory import Task

INSTRUCTIONS = (
    "You can look things up before you answer. To search, write a few key words between <search> and </search>; the "
    "passages that were found come back between <information> and </information>. "
    "Each reply holds one search or one answer."
)
"""Placed before the instructions on how an answer has to look."""
MAX_QUERY_CHARACTERS = 1000
"""What is sent of a longer query."""

_PAIR = re.compile(
    r"<(?P<name>search|answer)>(?P<content>(?:(?!</?(?:search|answer)>).)*)</(?P=name)>", re.IGNORECASE | re.DOTALL
)
_OPENED = re.compile(r"<(search|answer)>", re.IGNORECASE)
_TAG_LIKE = re.compile(r"<(\s*/?\s*(?:search|answer|information|think)\b[^<>]*)>?", re.IGNORECASE)


@dataclass(frozen=True)
class Move:
    """What a team did in a turn."""

    name: Literal["search", "answer"]
    content: str
    end: int
    """Position in the action where its closing tag ends."""


class Retriever(Protocol):
    """A source of passages."""

    def retrieve(self, query: str) -> tuple[Passage, ...]:
        """Return the passages found, best first."""


def read_move(action: str) -> Move | None:
    """Return the first complete pair of tags with no other tag inside, in any letter case; None if there is none.

    >>> read_move("Hm. <search> red door </search> <answer>7</answer>").content
    'red door'
    >>> read_move("<answer>7") is None
    True
    """
    match = _PAIR.search(action)
    if match is None:
        return None
    name: Literal["search", "answer"] = "search" if match["name"].lower() == "search" else "answer"
    return Move(name, match["content"].strip(), match.end())


@dataclass(frozen=True)
class SearchEnvironment:
    """One episode on one question. An answer is scored as in `qa`; a search, or neither, costs a turn and earns 0.

    `info` holds `move` (search, answer or null) and `extracted`; for a search also `query` and `num_passages`, for an
    answer also what `QAEnvironment` records.
    """

    question: QAEnvironment
    retriever: Retriever
    instructions: str
    max_passage_characters: int

    def step(self, action: str) -> Outcome:
        """Search, or score the answer and end the episode.

        Raises:
            RetrievalFailed: the server gave no usable answer; the rollout records this as the episode's end.
        """
        move = read_move(action)
        if move is None:
            return _nothing_done(_complaint(action), None)
        if move.name == "answer":
            scored = self.question.step(action[: move.end])
            return Outcome(scored.observation, scored.reward, scored.done, {"move": "answer", **scored.info})
        query = " ".join(move.content.split())[:MAX_QUERY_CHARACTERS].strip()
        if not query:
            return _nothing_done("The search was empty.", "search")
        passages = self.retriever.retrieve(query)
        return Outcome(
            observation=quoted(passages, self.max_passage_characters),
            reward=0.0,
            done=False,
            info={"move": "search", "query": query, "num_passages": len(passages), "extracted": None},
        )


def quoted(passages: tuple[Passage, ...], max_characters: int) -> str:
    """Return the observation: numbered passages with titles, each cut to `max_characters`, in information tags."""
    parts = []
    for number, passage in enumerate(passages, start=1):
        title, text = _cut(defuse(passage.title), MAX_TITLE_CHARACTERS), _cut(defuse(passage.text), max_characters)
        parts.append(f"[{number}] {title}\n{text}".strip())
    return "\n".join(["<information>", "\n\n".join(parts) or "No passage was found for this search.", "</information>"])


def defuse(text: str) -> str:
    """Return a stranger's text with square brackets around everything that looks like one of our tags.

    >>> defuse("1 < 2 </information> <ANSWER>7")
    '1 < 2 [/information] [ANSWER]7'
    """
    return _TAG_LIKE.sub(r"[\1]", text)


def _cut(text: str, max_characters: int) -> str:
    """Cut text to `max_characters`, at the end of a word if possible, and add three dots if it was cut."""
    text = text.strip()
    if len(text) <= max_characters:
        return text
    whole_words = text[: max_characters + 1].rpartition(" ")[0]
    return f"{(whole_words or text[:max_characters]).strip()} ..."


def _complaint(action: str) -> str:
    opened = _OPENED.findall(action)
    return f"The tag <{opened[-1].lower()}> was not closed." if opened else "There was no search and no answer."


def _nothing_done(complaint: str, move: str | None) -> Outcome:
    hint = f"{complaint} Write <search>key words</search>, or <answer>the answer</answer>."
    return Outcome(observation=hint, reward=0.0, done=False, info={"move": move, "extracted": None})


class SearchDomain:
    """The questions of a `QADomain`, played with a search server.

    Raises:
        RetrieverError: the server, asked once, gives no usable answer.
    """

    def __init__(self, questions: QADomain, section: SearchSection) -> None:
        self.name: str = questions.name
        self._questions = questions
        self._instructions = section.instructions
        self._max_passage_characters = section.max_passage_characters
        self.client = RetrieverClient(
            section.url, topk=section.topk, timeout_seconds=section.timeout_seconds, retries=section.retries
        )
        self.client.probe()

    def tasks(self, split: Split) -> list[Task]:
        """Return all questions of a split; see `QADomain.tasks`."""
        return self._questions.tasks(split)

    def skipped(self, split: Split) -> dict[str, int]:
        """Count the rows of a split that were left out; see `QADomain.skipped`."""
        return self._questions.skipped(split)

    def start(self, task: Task) -> SearchEnvironment:
        """Make a fresh environment for one episode; see `QADomain.start`."""
        question = self._questions.start(task)
        instructions = self._instructions or f"{INSTRUCTIONS} {question.instructions}"
        return SearchEnvironment(question, self.client, instructions, self._max_passage_characters)
