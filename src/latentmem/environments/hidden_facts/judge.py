"""Judge what was said: the reward is the share of right words, and a guess that names several words earns nothing."""

import re
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from latentmem.environments.environment import Outcome
from latentmem.environments.hidden_facts.words import RIGHT, WRONG

ANSWERING = ""
"""Stands among the roles for the one whose response is the team's action."""


class HiddenFactsEnvironment:
    """One episode of one step. Reward: the share of right words; over several roles, the mean of their shares.

    `info` holds `extracted`: the words read from the action, or for each judged role the words read from its response;
    None if no answer was found. With `needs` it holds `right.ROLE` for each role. `says_other` tells whether the
    answer is that of the world of `other_facts_seed`; it is absent if both worlds have the same answer.
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
            right: the words that each role must say, in order; the key `ANSWERING` stands for the team's action.
            words: all words that count as an answer.
            told: for an experience, what the observation adds to yes or no; None for a task that is asked.
            other: `right` in the world of `other_facts_seed`, if that world is compared.
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
        """Receive the response of each role."""
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
    """Return the answer in a response, or None: its known words, matched whole and in any case.

    If one word is expected, exactly one known word must occur, once or more often; naming several is no answer. If
    several are expected, they are taken in the order they are said; more words than expected are no answer.

    >>> read("It is Corn. Corn!", frozenset({"corn", "tree"}), 1)
    ['corn']
    >>> read("corn, or tree", frozenset({"corn", "tree"}), 1)
    """
    found = [word for word in re.findall(r"\w+", response.lower()) if word in words]
    if num_expected == 1:
        found = list(dict.fromkeys(found))
    return found if 0 < len(found) <= num_expected else None


def _share(answer: Sequence[str] | None, right: Sequence[str]) -> float:
    # If the answer is too short, its words count for the first positions.
    return sum(a == b for a, b in zip(answer or (), right, strict=False)) / len(right)
