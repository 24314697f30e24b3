"""Why a call was answered as it was: what its memory was made of, and how much of that the answer shows.

    carried = log p(response | its memory) - log p(response | no memory), in nats

The response's own tokens are scored, so nothing is sampled and the number is exact for the weights of today; if these
are not those of the call, the answer says so. For each source, and each step of a source, the memory is made again
without it: what the response then loses is what came from there. These shares need not add up, for two sources may tell
the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from latentmem.bank import ExperienceBank
from latentmem.bank.embedding import Embed, unit_vectors
from latentmem.carrying import message_logps
from latentmem.errors import BankError
from latentmem.memory.memory import Recall
from latentmem.models.language_model import LanguageModel
from latentmem.rollout import digest_of
from latentmem.trajectory import Message, Recalled, Role, Task, Trajectory

MAX_VARIANTS = 24
"""Memories that are made again for one answer, each without one source or step; what is beyond is not measured."""


class Remaking(Protocol):
    """Something that makes recalls again, as `Recaller` does."""

    def again(self, record: Recalled, composer: str) -> Recall | None:
        """Return a recall as it was, from its record; None if no memory of its kind is served."""

    def made_of(
        self, kind: str, composer: str, task: Task, role: Role, trajectories: Sequence[Trajectory]
    ) -> Recall | None:
        """Return the recall of a role at a task made of these trajectories; None if no such memory is served."""


@dataclass(frozen=True)
class Share:
    """What came from one step of a source."""

    step: int
    """From 0."""
    nats: float


@dataclass(frozen=True)
class Source:
    """A trajectory that a memory was made of."""

    id: str
    similarity: float | None
    """Cosine of the task texts; None if the trajectory is no longer there."""
    tenant: str | None
    """Whose it is; empty for the common pool."""
    is_judged: bool | None
    task: str | None
    nats: float | None = None
    """What the response loses without it; None: not measured."""
    steps: tuple[Share, ...] = ()
    """The same for each of its steps, if it has several."""


@dataclass(frozen=True)
class Why:
    """Why a call was answered as it was."""

    call: str
    role: str
    memory: str
    """Kind of the memory."""
    composer: str
    num_latents: int
    sources: tuple[Source, ...]
    carried: float | None
    """Nats by which the memory made the response likelier; below 0: less likely. None: not measured."""
    num_tokens: int
    """Tokens of the response."""
    per_token: tuple[float, ...]
    """The same for each token; it adds up to `carried`."""
    is_exact: bool
    """Whether the memory was made again as it was: by the same composer, or to the same latents."""
    unmeasured: str | None = None
    """Why nothing was measured."""


def why(
    message: Message,
    task: Task,
    role: Role,
    bank: ExperienceBank,
    embed: Embed,
    memory: Remaking,
    model: LanguageModel | None,
) -> Why:
    """Measure what a message's memory did.

    Args:
        message: the message, which a program asked for.
        task: the task of its session.
        role: the role that it was sampled for.
        bank: where its sources are, as who asks may see it.
        embed: the bank's embedder.
        memory: makes recalls again.
        model: scores the response; None if there are no weights here.
    """
    served = message.served
    record = message.recalled
    found = _present(bank, record.sources)
    similar = _similarities(embed, task, list(found.values()))
    sources = [_source(id, found.get(id), similar.get(id)) for id in record.sources]
    result = Why(
        call=served.call if served else "",
        role=message.role,
        memory=record.kind,
        composer=served.composer if served else "",
        num_latents=record.num_latents,
        sources=tuple(sources),
        carried=None,
        num_tokens=len(message.token_ids),
        per_token=(),
        is_exact=False,
    )
    if reason := _unmeasurable(message, model):
        return replace(result, unmeasured=reason)
    assert model is not None
    own = memory.again(record, result.composer)
    if own is None:
        return replace(result, unmeasured=f"this server has no memory of kind {record.kind!r} now")
    whole = len(found) == len(record.sources)
    variants = _variants([found[id] for id in record.sources]) if whole else []
    made = [
        (id, step, recall)
        for id, step, left in variants
        if (recall := memory.made_of(record.kind, result.composer, task, role, left)) is not None
    ]
    given = [own, Recall(Recalled(kind="none")), *(recall for _, _, recall in made)]
    logps = message_logps(model, [(message, recall) for recall in given])
    gain = logps[0] - logps[1]
    lost = {(id, step): float((logps[0] - rest).sum()) for (id, step, _), rest in zip(made, logps[2:], strict=True)}
    same_composer = bool(own.composer) and own.composer == result.composer
    return replace(
        result,
        carried=float(gain.sum()),
        per_token=tuple(round(float(value), 6) for value in gain),
        is_exact=own.latents is None or same_composer or digest_of(own.latents) == (served and served.latents),
        sources=tuple(_measured(source, lost) for source in sources),
    )


def _unmeasurable(message: Message, model: LanguageModel | None) -> str | None:
    if not message.recalled.sources:
        return "no memory was given"
    if not message.recalled.text:
        return "what its memory was made of was forgotten"
    if model is None or not message.token_ids:
        return "a server of another model was asked, which scores nothing"
    if message.served is None:
        return "it was not asked for over HTTP"
    return None


def _present(bank: ExperienceBank, ids: Sequence[str]) -> dict[str, Trajectory]:
    present = {}
    for id in ids:
        try:
            (present[id],) = bank.get([id])
        except BankError:  # it was forgotten since, or is not for this tenant any more
            continue
    return present


def _similarities(embed: Embed, task: Task, found: Sequence[Trajectory]) -> dict[str, float]:
    if not found:
        return {}
    names = ["the task", *(f"trajectory {trajectory.id}" for trajectory in found)]
    vectors = unit_vectors(embed, [task.text, *(trajectory.task.text for trajectory in found)], names)
    return {t.id: float(vectors[0] @ vector) for t, vector in zip(found, vectors[1:], strict=True)}


def _source(id: str, trajectory: Trajectory | None, similarity: float | None) -> Source:
    if trajectory is None:
        return Source(id, None, None, None, None)
    origin = trajectory.origin
    return Source(
        id=id,
        similarity=similarity,
        tenant="" if origin is None else origin.tenant,
        is_judged=True if origin is None else origin.is_judged,
        task=trajectory.task.text,
    )


def _variants(found: Sequence[Trajectory]) -> list[tuple[str, int | None, list[Trajectory]]]:
    """Return what is left without each source, and without each step of a source that has several."""
    without: list[tuple[str, int | None, list[Trajectory]]] = [
        (one.id, None, [other for other in found if other is not one]) for one in found
    ]
    for place, one in enumerate(found):
        for step in range(len(one.steps)) if len(one.steps) > 1 else ():
            cut = one.model_copy(update={"steps": (*one.steps[:step], *one.steps[step + 1 :])})
            without.append((one.id, step, [*found[:place], cut, *found[place + 1 :]]))
    return without[:MAX_VARIANTS]


def _measured(source: Source, lost: dict[tuple[str, int | None], float]) -> Source:
    steps = tuple(Share(step, nats) for (id, step), nats in lost.items() if id == source.id and step is not None)
    return replace(source, nats=lost.get((source.id, None)), steps=steps)
