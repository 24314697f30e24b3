"""Measure what a memory carries: how much likelier it makes the right responses than another task's memory does.

    carried = CE(response | memory of another task) - CE(response | its own memory)

The unit is nats per response. The responses are those of successes that nothing was learned from; the differences are
paired over tasks. A memory that is only a learned prompt gives 0, because it serves every task equally well. The number
needs no new episodes, exists for every memory and benchmark, and moves long before accuracy does. It is a difference of
surprises, not a count of bits: it can exceed the entropy of a fact.
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
from latentmem.teams.turn import Player, Program
from latentmem.trajectory import Message, Role, Trajectory

POSITIONS = 8192
"""Positions (prompts, latents, responses) that pass the model at once: 375 MB of keys and values for SmolLM2-135M."""

_TOGETHER = 16
"""Trajectories that one process recalls for and scores together."""

RolesOf = Callable[[Trajectory], Mapping[str, Role]]
"""From a trajectory to the members of the team that played it, by name; messages of other roles are not scored."""


@dataclass(frozen=True)
class TaskCarried:
    """One task's contribution; all numbers in nats per response."""

    task: str
    """The task's key."""
    own: float
    """Cross-entropy of the responses under the task's own memory."""
    other: float
    """Cross-entropy of the same responses under the memory of another task."""
    differing: float
    """`other` - `own`, summed only over the tokens that differ from the other task's responses."""


@dataclass(frozen=True)
class Carried:
    """What a memory carries, over all tasks, in nats per response."""

    tasks: tuple[TaskCarried, ...]
    total: PairedResult
    """Mean of `other` - `own`, its interval and p-value."""
    differing: PairedResult
    """The same for the tokens that differ between tasks."""

    def as_json(self) -> dict[str, Any]:
        """Return the values that results.json holds."""
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
        """Return the values that training logs."""
        return {"carried": self.total.difference, "carried_low": self.total.low, "carried_high": self.total.high}


def roles_of_teams(teams: Sequence[Player]) -> RolesOf:
    """Map a trajectory to the roles of the team that it names; with a single team, to that team's roles always.

    A program's roles are those that it lists, and those that spoke.
    """
    by_team = {team.name: team for team in teams}
    known = {team.name: {role.name: role for role in team.roles} for team in teams}
    only = next(iter(by_team)) if len(by_team) == 1 else None

    def roles_of(trajectory: Trajectory) -> Mapping[str, Role]:
        name = only or trajectory.team
        if isinstance(by_team.get(name), Program):
            return roles_found([trajectory]) | known[name]
        return known.get(name, {})

    return roles_of


def roles_found(trajectories: Sequence[Trajectory]) -> dict[str, Role]:
    """Return the roles that spoke, by name. The profile of a role is the system message that it was first given."""
    found: dict[str, Role] = {}
    for message in (message for trajectory in trajectories for message in trajectory.messages):
        told = message.system if message.served is None else message.served.conversation.system
        found.setdefault(message.role, Role(name=message.role, profile=told))
    return found


def scorable(trajectories: Sequence[Trajectory], model: LanguageModel, roles_of: RolesOf) -> list[Trajectory]:
    """Return those that can be scored: successes of this model in which a role of the team said something."""
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
    """Score the responses of successes under the memory of their own task and under that of another task.

    Messages keep the token ids that were sampled. Their prompts are encoded anew, with what the memory gives now, and
    scored at temperature 1. Where both recalls are the same, the difference is exactly 0. Several successes on one task
    count as one, by their mean.

    Args:
        memory: any kind: latents, text, weights, or none.
        model: the agents.
        trajectories: candidates; those that are not `scorable` are left out. Nothing may have been learned from their
            tasks.
        roles_of: gives the roles of the team that played a trajectory.
        seed: draws the other task for each task, from the same domain if it has another one.
        control: makes the memory to compare with, from the memory and the function that draws the other task.
        positions: most positions that pass the model at once; a single longer message passes alone.
        processes: those that share the work; None means those that were launched. All of them must call this alike.

    Returns:
        The result, or None where fewer than two tasks have a scorable trajectory: then there is no other task and no
        interval. Its numbers are nan where the model's values are not finite.

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
    """A response to score, with the prompt and the recall that stand before it."""

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
    """Return what each of these trajectories contributes."""
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
    """Return whether both recalls give the agents the same input; the text that only the composer reads may differ."""
    if (ours.latents is None) != (theirs.latents is None) or ours.adapter != theirs.adapter:
        return False
    if ours.latents is not None and theirs.latents is not None and not torch.equal(ours.latents, theirs.latents):
        return False
    return ours.record.before("") == theirs.record.before("")


def _given(model: LanguageModel, message: Message, recall: Recall) -> _Given:
    if message.served is None:
        prompt_ids = model.encode_prompt(message.system, recall.record.before(message.user))
    else:
        memory = "" if recall.record.num_latents else recall.record.text
        prompt_ids = model.chat.encode_conversation(message.served.conversation.before(memory))
    return _Given(tuple(prompt_ids), message.token_ids, recall.latents, recall.adapter)


def _differing(messages: Sequence[Message], others: Sequence[Message]) -> list[Tensor]:
    """For each message return the mask [T] that is True where its tokens differ from the other task's message.

    A role's first message is compared with that role's first message there, and so on. Tokens without a counterpart
    count as different.
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
    """Return the log-probability of each message's tokens under its recall: [T] float64 each, at temperature 1.

    Args:
        model: the agents.
        given: messages, each with the recall that replaces what it was given when it was sampled.
        positions: most positions that pass the model at once; a single longer message passes alone.

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
    """Group rows that pass the model together: same adapter, same number of latents, similar length."""
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
