"""Measure how far latents differ by role, domain and task: shares of their squared length, and permutation tests.

Every role of a team receives latents at every task, so the data are a complete two-way table whose sum of squares
splits exactly into parts. Roles are compared within each task, and the permutations swap roles only within a task. So
what a task does to all its latents cannot look like a difference of roles. All are plain functions of numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.intp]

NEGLIGIBLE = 1e-9
"""Share of the squared length below which a difference is only float32 rounding, and no finding."""

CHUNK = 1 << 21
"""Numbers held at once while permuting: 16 MB."""


@dataclass(frozen=True)
class Shares:
    """How the squared length of latents is shared out; all but `varying` are shares of the varying part, with sum 1."""

    varying: float
    """Share of the mean squared length that differs between tasks and roles."""
    role: float
    """Share between roles, the same in all tasks."""
    domain: float
    """Share between domains, the same for all roles."""
    task: float
    """Share between tasks of one domain, the same for all roles."""
    rest: float
    """Remaining share: a role's own response to a task."""


@dataclass(frozen=True)
class Separation:
    """How well labels separate latents."""

    score: float
    """Share of the squared distances that lies between labels, from 0 (none) to 1 (all)."""
    chance: float
    """Mean score with permuted labels."""
    p_value: float
    """Share of permutations that score as high, with the observed one included."""


def shares(latents: Array, domains: Sequence[str]) -> Shares:
    """Decompose the variance of a two-way table, with tasks nested in domains (Scheffe 1959, chapters 4 and 5).

    Args:
        latents: [T, R, D], a row for every task and role.
        domains: the domain of each task, [T].
    """
    num_tasks, num_roles, _ = latents.shape
    mean = latents.mean((0, 1))
    total = _squares(latents - mean)
    length = _squares(latents)
    if total <= NEGLIGIBLE * length:
        return Shares(0.0, 0.0, 0.0, 0.0, 0.0)
    by_task = latents.mean(1) - mean  # [T, D]
    role = num_tasks * _squares(latents.mean(0) - mean)
    task = num_roles * _squares(by_task)
    domain = num_roles * sum(len(rows) * _squares(by_task[rows].mean(0)) for rows in _groups(domains))
    rest = max(0.0, total - role - task)
    return Shares(total / length, role / total, domain / total, (task - domain) / total, rest / total)


def separation_by_role(latents: Array, num_permutations: int, seed: int) -> Separation | None:
    """Measure how far roles differ at the same task; latents: [T, R, D]. None with fewer than two roles.

    The score is the role's partial eta squared: the share of the squared distances from each task's mean that the
    roles' means account for.
    """
    num_tasks, num_roles, _ = latents.shape
    if num_roles < 2:
        return None
    within = latents - latents.mean(1, keepdims=True)
    if _squares(within) <= NEGLIGIBLE * _squares(latents):
        return Separation(0.0, 0.0, 1.0)
    rows = within.reshape(num_tasks * num_roles, -1)
    order = np.tile(np.arange(num_roles), (num_tasks, 1))  # the label of each row, [T, R]
    rng = np.random.default_rng(seed)

    def permuted(count: int) -> Labels:
        return rng.permuted(np.tile(order, (count, 1, 1)), axis=2).reshape(count, -1)

    return _separation(rows, order.reshape(-1), permuted, num_permutations)


def separation_by_domain(latents: Array, domains: Sequence[str], num_permutations: int, seed: int) -> Separation | None:
    """Measure how far tasks of different domains differ, in their means over roles; None with fewer than two domains.

    Args:
        latents: [T, R, D].
        domains: the domain of each task, [T]; permuted over whole tasks.
        num_permutations: number of permutations.
        seed: seed of the permutations.
    """
    known = sorted(set(domains))
    if len(known) < 2:
        return None
    rows = latents.mean(1)
    rows = rows - rows.mean(0)
    if _squares(rows) * latents.shape[1] <= NEGLIGIBLE * _squares(latents):
        return Separation(0.0, 0.0, 1.0)
    labels = np.array([known.index(domain) for domain in domains])
    rng = np.random.default_rng(seed)

    def permuted(count: int) -> Labels:
        return rng.permuted(np.tile(labels, (count, 1)), axis=1)

    return _separation(rows, labels, permuted, num_permutations)


def principal_axes(rows: Array, num_axes: int = 2) -> tuple[Array, Array]:
    """Compute exact principal components by singular values; rows: [n, D].

    Returns:
        Coordinates [n, num_axes] on the axes along which the rows vary most, and each axis's share of the variance,
        [num_axes]. Axes that do not exist are zeros. The sign is chosen so that the farthest row is positive.
    """
    centred = rows - rows.mean(0)
    coordinates, explained = np.zeros((len(rows), num_axes)), np.zeros(num_axes)
    if _squares(centred) <= NEGLIGIBLE * _squares(rows):
        return coordinates, explained
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    found = min(num_axes, len(values))
    coordinates[:, :found] = left[:, :found] * values[:found]
    explained[:found] = values[:found] ** 2 / (values**2).sum()
    farthest = np.abs(coordinates).argmax(0)
    signs = np.where(coordinates[farthest, np.arange(num_axes)] < 0, -1.0, 1.0)
    return coordinates * signs, explained


def _separation(rows: Array, labels: Labels, permuted: Callable[[int], Labels], num_permutations: int) -> Separation:
    """Score and test centred rows [n, D]; `permuted(count)` draws labels [count, n]."""
    gram = rows @ rows.T  # [n, n]: so a permutation costs n * n, whatever the width D
    total = float(np.trace(gram))
    sizes = np.bincount(labels)
    score = float(_between(gram, labels[None], sizes)[0]) / total
    chunk = max(1, CHUNK // labels.size)
    counts = [min(chunk, num_permutations - start) for start in range(0, num_permutations, chunk)]
    scores = np.concatenate([_between(gram, permuted(count), sizes) / total for count in counts])
    extreme = int((scores >= score - 1e-9).sum())
    return Separation(score, float(scores.mean()), (1 + extreme) / (1 + num_permutations))


def _between(gram: Array, labels: Labels, sizes: Labels) -> Array:
    """Return the sum of squares between labels, [count]: for each label |sum of its rows|^2 / its size, summed.

    labels: [count, n]; sizes: the size of each label, the same in all permutations.
    """
    found = np.zeros(len(labels))
    for label, size in enumerate(sizes):
        chosen = (labels == label).astype(np.float64)
        found += ((chosen @ gram) * chosen).sum(1) / size
    return found


def _squares(rows: Array) -> float:
    return float(np.square(rows).sum())


def _groups(labels: Sequence[str]) -> list[list[int]]:
    return [[i for i, found in enumerate(labels) if found == label] for label in sorted(set(labels))]
