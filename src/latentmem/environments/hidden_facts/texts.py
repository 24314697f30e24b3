"""Texts about a place, put together from `words`: episodes, what they tell, questions and instructions."""

from collections.abc import Sequence
from random import Random

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
    NOTE,
    ONE_WORD,
    OWN_WORDS,
    SEVERAL_WORDS,
    SISTERS,
    TOLD,
    WITHDRAWN,
)
from latentmem.templates import fill


def instructions(*, needs: bool, at_once: bool, unknowable: bool) -> str:
    """Return how an answer has to look, for settings without their own instructions."""
    how = OWN_WORDS if needs else SEVERAL_WORDS if at_once else ONE_WORD
    return f"{how} {IF_UNKNOWN}" if unknowable else how


def joined_name(name: str, sister: str) -> str:
    """Return the name of a place together with its sister's."""
    return fill(SISTERS, entity=name, sister=sister)


# An experience


def experienced(title: str, attributes: Sequence[str], random: Random, *, arrival: bool) -> str:
    """Return what an experience asks about a place. `arrival`: the team only arrives; each role knows what it needs."""
    if arrival:
        return fill(random.choice(EXPERIENCED_ARRIVAL), entity=title)
    if len(attributes) > 1:
        return fill(random.choice(EXPERIENCED_ALL), entity=title, attributes=_listed(attributes))
    return fill(random.choice(EXPERIENCED[attributes[0]]), entity=title)


def dated(text: str, day: int) -> str:
    """Return the text with its day."""
    return fill(DAY, day=str(day), text=text)


def noted(text: str, told: str) -> str:
    """Return the text with a note of what is told."""
    return fill(NOTE, text=text, told=told)


def tells(attribute: str, name: str, value: str) -> str:
    """Return the sentence that tells a fact."""
    return fill(TOLD, attribute=attribute, entity=name, value=value)


def joins(attribute: str, name: str, sister: str) -> str:
    """Return the sentence that a fact is the same as the sister's."""
    return fill(JOINED, attribute=attribute, entity=name, sister=sister)


def withdraws(attribute: str, name: str) -> str:
    """Return the sentence that takes a fact back."""
    return fill(WITHDRAWN, attribute=attribute, entity=name)


# A task


def asked_one(attribute: str, phrasing: int, title: str) -> str:
    """Return a question for one fact of a place."""
    return fill(ASKED[attribute][phrasing], entity=title)


def asked_all(attributes: Sequence[str], phrasing: int, title: str) -> str:
    """Return a question for several facts at once."""
    return fill(ASKED_ALL[phrasing], entity=title, attributes=_listed(attributes))


def arrived(phrasing: int, title: str) -> str:
    """Return a task in which the team arrives at a place; each role knows what it needs."""
    return fill(ARRIVED[phrasing], entity=title)


def _listed(attributes: Sequence[str]) -> str:
    *others, last = attributes
    return f"{', '.join(others)} and {last}"
