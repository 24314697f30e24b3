"""What a memory carries, as a number: how much likelier right responses are under their own task's memory.

    carried = CE(response | memory of another task) - CE(response | its own memory)

in nats a response, on successes that nothing was learned from, paired over tasks. A memory that is a learned prompt and
nothing more gives 0: it serves any task as well. The number needs no playing, exists for every memory and benchmark,
and moves long before accuracy does. It is a difference of surprises, not bits: it can exceed the entropy of a fact.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import isfinite, nan
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from latentmem.memory.controls import Another, another_of, of_other_tasks
from latentmem.memory.memory import Memory, Recall
from latentmem.models.language_model import LanguageModel
from latentmem.models.prefix import check_window, pad
from latentmem.processes import Processes
from latentmem.stats import PairedResult, paired_mean
from latentmem.teams.turn import Team
from latentmem.trajectory import Message, Role, Trajectory

POSITIONS = 8192
"""Of prompts, latents and responses that pass the model at once: 375 MB of keys and values for SmolLM2-135M."""

_TOGETHER = 16
"""Trajectories that are recalled for and scored together, by one process."""

RolesOf = Callable[[Trajectory], Mapping[str, Role]]
"""The members of the team that played a trajectory, by name; messages of others are not scored."""


@dataclass(frozen=True)
class TaskCarried:
    """One task's part; all in nats a response."""

    task: str
    """Its key."""
    own: float
    """Cross-entropy of the responses under the task's own memory."""
    other: float
    """Under the memory of another task."""
    differing: float
    """`other` - `own` over those tokens alone in which the other task's responses differ."""


@dataclass(frozen=True)
class Carried:
    """What a memory carries, over tasks; in nats a response."""

    tasks: tuple[TaskCarried, ...]
    total: PairedResult
    """Mean of `other` - `own`, its interval and p-value."""
    differing: PairedResult
    """Of the tokens that differ between tasks."""

    def as_json(self) -> dict[str, Any]:
        """As it stands in results.json."""
        return {
            "nats": self.total.difference,
            "low": self.total.low,
            "high": self.total.high,
            "p_value": self.total.p_value,
            "differing": {
                "nats": self.differing.difference,
                "low": self.differing.low,
                "high": self.differing.high,
            },
            "own": fmean(task.own for task in self.tasks),
            "other": fmean(task.other for task in self.tasks),
            "num_tasks": len(self.tasks),
        }

    def metrics(self) -> dict[str, float]:
        """As training logs it."""
        return {"carried": self.total.difference, "carried_low": self.total.low, "carried_high": self.total.high}


def roles_of_teams(teams: Sequence[Team]) -> RolesOf:
    """The roles of the team whose name a trajectory bears; of one team, whatever the name."""
    by_team = {team.name: {role.name: role for role in team.roles} for team in teams}
    if len(by_team) == 1:
        (only,) = by_team.values()
        return lambda trajectory: only
    return lambda trajectory: by_team.get(trajectory.team, {})


def scorable(trajectories: Sequence[Trajectory], model: LanguageModel, roles_of: RolesOf) -> list[Trajectory]:
    """Those that can be scored: successes of this very model in which some role of the team said something."""
    return [t for t in trajectories if t.success and t.model == model.name and _said(t, roles_of)]


def measure_carried(
    memory: Memory,
    model: LanguageModel,
    trajectories: Sequence[Trajectory],
    roles_of: RolesOf,
    *,
    seed: int = 0,
    control: Callable[[Memory, Another], Memory] = of_other_tasks,
    positions: int = POSITIONS,
    processes: Processes | None = None,
) -> Carried | None:
    """Score the responses of successes under their own task's memory and under another's.

    Messages keep the token ids that were sampled; their prompts are encoded with what the memory gives now, and scored
    at temperature 1. Where both recalls are the same the difference is exactly 0. Several successes of one task count
    as one, by their mean.

    Args:
        memory: of latents, text, weights, or none.
        model: the agents.
        trajectories: those that are not `scorable` are left out. Nothing of their tasks may have been learned from.
        roles_of: the team of a trajectory.
        seed: draws the other task of each, one of the same domain if there is one.
        control: makes the memory that is compared with, given what draws the other task.
        positions: passed through the model at once, at most, but for a single longer message.
        processes: those that share the work; None is those that were launched. All call this alike.

    Returns:
        None where fewer than two tasks have such a trajectory: there is no other one then, and no interval. Numbers are
        nan where the model's values are not finite.

    Raises:
        ModelError: a message does not fit the model's window.
    """
    usable = scorable(trajectories, model, roles_of)
    first: dict[str, Trajectory] = {}
    for trajectory in usable:
        first.setdefault(trajectory.task.key, trajectory)
    tasks = [trajectory.task for trajectory in first.values()]
    if all(task.same_as(tasks[0]) for task in tasks):
        return None
    another = another_of(tasks, seed)
    others = {task.key: first[another(task).key] for task in tasks}
    work = partial(_score, memory, control(memory, another), model, roles_of, others, positions)
    chunks = [usable[i : i + _TOGETHER] for i in range(0, len(usable), _TOGETHER)]
    by_task: dict[str, list[TaskCarried]] = defaultdict(list)
    for part in (processes or Processes()).map(work, chunks):
        for scored in part:
            by_task[scored.task].append(scored)
    found = tuple(_mean(key, scored) for key, scored in by_task.items())
    return Carried(found, _paired([t.other - t.own for t in found]), _paired([t.differing for t in found]))


def _paired(differences: Sequence[float]) -> PairedResult:
    return paired_mean(differences) if all(map(isfinite, differences)) else PairedResult(nan, nan, nan, 1.0)


def _mean(key: str, scored: Sequence[TaskCarried]) -> TaskCarried:
    return TaskCarried(
        key, fmean(s.own for s in scored), fmean(s.other for s in scored), fmean(s.differing for s in scored)
    )


def _said(trajectory: Trajectory, roles_of: RolesOf) -> list[Message]:
    roles = roles_of(trajectory)
    return [message for message in trajectory.messages if message.role in roles and message.token_ids]


@dataclass(frozen=True)
class _Given:
    """A response to score behind one prompt and what was recalled."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    latents: Tensor | None
    adapter: str | None

    @property
    def num_latents(self) -> int:
        return 0 if self.latents is None else len(self.latents)

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + self.num_latents + len(self.token_ids)


def _score(
    memory: Memory,
    other_memory: Memory,
    model: LanguageModel,
    roles_of: RolesOf,
    others: Mapping[str, Trajectory],
    positions: int,
    trajectories: Sequence[Trajectory],
) -> list[TaskCarried]:
    """What each of these trajectories contributes."""
    said = [(trajectory, message) for trajectory in trajectories for message in _said(trajectory, roles_of)]
    queries = {(t.team, t.task.key, m.role): (t.task, roles_of(t)[m.role]) for t, m in said}
    own = dict(zip(queries, memory.recall_many([*queries.values()]), strict=True))
    theirs = dict(zip(queries, other_memory.recall_many([*queries.values()]), strict=True))
    given: list[tuple[Message, Recall]] = []
    pairs: list[tuple[int, int]] = []
    for trajectory, message in said:
        key = (trajectory.team, trajectory.task.key, message.role)
        recalls = [own[key]] if _same(own[key], theirs[key]) else [own[key], theirs[key]]
        pairs.append((len(given), len(given) + len(recalls) - 1))
        given += [(message, recall) for recall in recalls]
    logps = message_logps(model, given, positions)
    scored, following = [], iter(pairs)
    for trajectory in trajectories:
        messages = _said(trajectory, roles_of)
        gains = [(logps[i], logps[j]) for i, j in (next(following) for _ in messages)]
        differ = _differing(messages, _said(others[trajectory.task.key], roles_of))
        scored.append(
            TaskCarried(
                trajectory.task.key,
                own=-sum(float(mine.sum()) for mine, _ in gains) / len(messages),
                other=-sum(float(other.sum()) for _, other in gains) / len(messages),
                differing=sum(
                    float((mine - other)[mask].sum()) for (mine, other), mask in zip(gains, differ, strict=True)
                )
                / len(messages),
            )
        )
    return scored


def _same(ours: Recall, theirs: Recall) -> bool:
    """Whether the agents are given the very same; the composer's text, which they do not read, may differ."""
    if (ours.latents is None) != (theirs.latents is None) or ours.adapter != theirs.adapter:
        return False
    if ours.latents is not None and theirs.latents is not None and not torch.equal(ours.latents, theirs.latents):
        return False
    return ours.record.before("") == theirs.record.before("")


def _given(model: LanguageModel, message: Message, recall: Recall) -> _Given:
    prompt_ids = model.encode_prompt(message.system, recall.record.before(message.user))
    return _Given(tuple(prompt_ids), message.token_ids, recall.latents, recall.adapter)


def _differing(messages: Sequence[Message], others: Sequence[Message]) -> list[Tensor]:
    """For each message the mask [T] of tokens that are not those of the same role's message of the other task.

    A role's first message is held against its first one there, and so on; what has no counterpart differs.
    """
    theirs: dict[tuple[str, int], tuple[int, ...]] = {}
    numbers: dict[str, Iterator[int]] = defaultdict(count)
    for message in others:
        theirs[message.role, next(numbers[message.role])] = message.token_ids
    numbers = defaultdict(count)
    masks = []
    for message in messages:
        tokens = theirs.get((message.role, next(numbers[message.role])), ())
        same = [i < len(tokens) and tokens[i] == token for i, token in enumerate(message.token_ids)]
        masks.append(~torch.tensor(same))
    return masks


@torch.no_grad()
def message_logps(
    model: LanguageModel, given: Sequence[tuple[Message, Recall]], positions: int = POSITIONS
) -> list[Tensor]:
    """How likely each message's tokens are under what is recalled for it: [T] float64 each, at temperature 1.

    Args:
        model: the agents.
        given: messages, each with a recall in the place of what it was given when it was sampled.
        positions: passed through the model at once, at most, but for a single longer message.

    Raises:
        ModelError: a message does not fit the model's window.
    """
    rows = [_given(model, message, recall) for message, recall in given]
    check_window(model.model, max(row.length for row in rows), "a stored message")
    result: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in _batches(rows, positions):
        chosen = [rows[i] for i in batch]
        ids, mask = pad([row.token_ids for row in chosen], model.device)
        present = [row.latents for row in chosen if row.latents is not None]
        latents = torch.stack(present).to(model.device) if present else None
        groups = [str(hash(row.prompt_ids)) for row in chosen]
        room = chosen[0].num_latents + ids.shape[1] - 1
        with model.as_agent(chosen[0].adapter) as agent:
            prefix = agent.prefill([row.prompt_ids for row in chosen], groups, room)
            logps = agent.response_logps(prefix, latents, ids, mask, 1.0)
        for i, row, values in zip(batch, chosen, logps.double().cpu(), strict=True):
            result[i] = values[: len(row.token_ids)]
    return result


def _batches(rows: Sequence[_Given], positions: int) -> list[list[int]]:
    """Rows that pass the model together: of one adapter and number of latents, those of like length."""
    kinds: dict[tuple[str | None, int], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        kinds[row.adapter, row.num_latents].append(i)
    batches: list[list[int]] = []
    for members in kinds.values():
        batch: list[int] = []
        for i in sorted(members, key=lambda i: rows[i].length):
            if batch and (len(batch) + 1) * rows[i].length > positions:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    return batches
