"""A session's calls again, greedily, with the memory that each had and without any: what did the memory change?

Each call has the conversation that its program sent then, earlier responses included. So this tells what memory does to
each response alone; a program that got other responses would have gone on otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from latentmem.config import Sampling
from latentmem.memory.memory import Recall
from latentmem.models.agent import AgentModel, Sampled
from latentmem.rollout import prompt_of
from latentmem.serving.rights.why import Remaking
from latentmem.teams.turn import Call, ServedCall
from latentmem.trajectory import Message, Recalled, Role

MAX_CALLS = 64
"""Calls of a session that are sampled again; twice each."""


@dataclass(frozen=True)
class Said:
    """One greedy response."""

    text: str
    num_tokens: int
    finish: str


@dataclass(frozen=True)
class Part:
    """A run of words in the two responses."""

    where: str
    """`both`, `with memory` or `without memory`."""
    text: str


@dataclass(frozen=True)
class Replayed:
    """One call with and without its memory."""

    call: str
    role: str
    memory: str
    sources: tuple[str, ...]
    recorded: str
    """What was answered then, sampled as the program asked."""
    with_memory: Said
    without_memory: Said
    first_difference: int | None
    """The first token that differs, from 0; None: the responses are the same."""
    difference: tuple[Part, ...]


def replay(
    messages: Sequence[Message], model: AgentModel, memory: Remaking, limit: int, *, tenant: str
) -> list[Replayed]:
    """Sample responses again.

    Args:
        messages: what was answered; left out are those that no program asked for over HTTP, that had no memory or one
            that is not served now or was forgotten, and those beyond `MAX_CALLS`.
        model: samples.
        memory: makes recalls again.
        limit: longest response, in tokens.
        tenant: whose messages they are.
    """
    asked = [message for message in messages if had_memory(message)][:MAX_CALLS]
    made = [(message, memory.again(message.recalled, _composer(message))) for message in asked]
    chosen = [message for message, recall in made if recall is not None]
    recalls = [recall for _, recall in made if recall is not None]
    if not chosen:
        return []
    none = [Recall(Recalled(kind="none")) for _ in chosen]
    # Two calls: rows with and without latents are batches of their own.
    own, other = (
        model.respond(
            [
                prompt_of(_call(message), recall, f"replay, {message.role}", 0, tenant)
                for message, recall in zip(chosen, each, strict=True)
            ],
            Sampling(temperature=0.0, max_response_tokens=limit),
        )
        for each in (recalls, none)
    )
    return [_replayed(*each) for each in zip(chosen, own, other, strict=True)]


def left_out(messages: Sequence[Message]) -> str | None:
    """Return in words why some responses, or all, cannot be sampled again; None: nobody forgot anything.

    >>> left_out([])
    'no call of this session had a memory; nothing to replay'
    """
    gone = sum(m.served is not None and bool(m.recalled.sources) and not m.recalled.text for m in messages)
    said = f"the memory of {gone} call{'' if gone == 1 else 's'} was forgotten"
    if any(map(had_memory, messages)):
        return said if gone else None
    return f"{said if gone else 'no call of this session had a memory'}; nothing to replay"


def had_memory(message: Message) -> bool:
    """Return whether a program asked for it and there was a memory; one that was forgotten since has no text."""
    return message.served is not None and bool(message.recalled.sources) and bool(message.recalled.text)


def _composer(message: Message) -> str:
    return message.served.composer if message.served is not None else ""


def _call(message: Message) -> Call:
    served = message.served
    assert served is not None
    return Call(
        Role(name=message.role, profile=""),
        message.system,
        message.user,
        served=ServedCall(served.call, served.conversation, served.lineage),
    )


def _replayed(message: Message, own: Sampled, other: Sampled) -> Replayed:
    assert message.served is not None
    return Replayed(
        call=message.served.call,
        role=message.role,
        memory=message.recalled.kind,
        sources=message.recalled.sources,
        recorded=message.response,
        with_memory=Said(own.text, len(own.token_ids), own.finish),
        without_memory=Said(other.text, len(other.token_ids), other.finish),
        first_difference=_first_difference(own, other),
        difference=difference(own.text, other.text),
    )


def _first_difference(own: Sampled, other: Sampled) -> int | None:
    a: Sequence[object] = own.token_ids or own.text
    b: Sequence[object] = other.token_ids or other.text
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def difference(own: str, other: str) -> tuple[Part, ...]:
    """Return the words of two texts as runs that both have, or only one.

    >>> [part.where + ": " + part.text for part in difference("it is 4 now", "it is 5 now")]
    ['both: it is', 'with memory: 4', 'without memory: 5', 'both: now']
    """
    a, b = own.split(), other.split()
    parts: list[Part] = []
    for kind, i, j, k, m in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(Part("both", " ".join(a[i:j])))
            continue
        parts += [Part("with memory", " ".join(a[i:j]))] if i < j else []
        parts += [Part("without memory", " ".join(b[k:m]))] if k < m else []
    return tuple(parts)
