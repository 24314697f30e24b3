"""Intervals and tests for small evaluations. Each one stays honest even with only a few dozen tasks.

All are plain functions of numbers. Results are rewards, so they lie in [0, 1]. That bound gives an interval even where
all values are equal; a plain bootstrap sees no spread there and would claim certainty. Differences of log-likelihoods
have no bound, so they have their own function, `paired_mean`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, t

Array = NDArray[np.float64]

CHUNK = 1 << 20
"""Numbers drawn at once while resampling: 8 MB, whatever the number of values and resamples."""


@dataclass(frozen=True)
class PairedResult:
    """How two memories differ on the same tasks."""

    difference: float
    """mean(a) - mean(b)."""
    low: float
    high: float
    """Ends of the difference's interval."""
    p_value: float
    """Two-sided; the null hypothesis is that a and b are interchangeable on every task."""


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share (1927). It lies in [0, 1] and has a width; (0, 1) for `total` 0.

    >>> [round(end, 3) for end in wilson_interval(0, 10)]
    [0.0, 0.278]
    """
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total}; expected a number from 0 to the total")
    if total == 0:
        return 0.0, 1.0
    interval = binomtest(successes, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: ArrayLike, seed: int, num_bootstraps: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of the mean of rewards that may lie between 0 and 1; values: [n], each in [0, 1].

    This is the percentile bootstrap (Efron & Tibshirani 1993, chapter 13) over the values and two made-up ones, one at
    each bound, as Agresti & Caffo (2000) add one success and one failure. Without them the bootstrap claims certainty
    when all or nearly all values are equal. With them, 95% intervals covered the truth in at least 94% of simulations
    from n = 8 on; without them coverage fell to 77%, and with BCa to 89%. No values give (0, 1).
    """
    return _interval(_checked(values), (0.0, 1.0), seed, num_bootstraps, confidence)


def paired_bootstrap(a: ArrayLike, b: ArrayLike, num_bootstraps: int, seed: int) -> PairedResult:
    """Compare rewards of the same tasks under a and under b; a, b: [n], aligned, each value in [0, 1].

    The 95% interval is the bootstrap of `mean_interval` over the tasks' differences, with bounds -1 and 1. The p-value
    flips the sign of each task's difference at random, `num_bootstraps` times (a paired permutation test; Efron &
    Tibshirani 1993, chapter 15). This holds at any n, and for successes is McNemar's exact test; the share of resamples
    beyond zero would claim certainty after a single task. n = 0 gives difference 0, interval (-1, 1) and p = 1.
    """
    first, second = _checked(a), _checked(b)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} and {second.size} values; a pair needs both, for the same tasks in one order")
    differences = first - second
    low, high = _interval(differences, (-1.0, 1.0), seed, num_bootstraps, 0.95)
    difference = float(differences.mean()) if differences.size else 0.0
    return PairedResult(difference, low, high, _sign_flip_p_value(differences, seed, num_bootstraps))


def paired_mean(
    differences: ArrayLike, seed: int = 0, num_flips: int = 10_000, confidence: float = 0.95
) -> PairedResult:
    """Compare two conditions by their differences on each task, which have no bound (such as nats); differences: [n].

    The interval of the mean is Student's t over tasks. The p-value flips the sign of each difference at random, as in
    `paired_bootstrap`. Differences that are all equal give an interval of zero width.

    Raises:
        ValueError: fewer than two differences, or one that is not finite.

    >>> found = paired_mean([1.0, 2.0, 3.0])
    >>> round(found.difference, 3), round(found.low, 3), round(found.high, 3)
    (2.0, -0.484, 4.484)
    """
    array = np.asarray(differences, dtype=np.float64)
    if array.ndim != 1 or array.size < 2 or not np.isfinite(array).all():
        raise ValueError(f"expected at least 2 finite differences of shape [n], found {array.tolist()}")
    mean = float(array.mean())
    half = float(t.ppf((1 + confidence) / 2, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size))
    return PairedResult(mean, mean - half, mean + half, _sign_flip_p_value(array, seed, num_flips))


def crossed_interval(
    tables: Sequence[ArrayLike],
    tasks: Sequence[Sequence[str]],
    bounds: tuple[float, float],
    seed: int,
    num_bootstraps: int,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the interval of the mean over tables of each table's mean, where several seeds played the same tasks.

    Tasks and seeds are resampled independently (the pigeonhole bootstrap; Owen 2007, "The pigeonhole bootstrap", Annals
    of Applied Statistics 1), with one made-up task at each bound as in `mean_interval`. Tables with equal tasks, such
    as those of two teams on one benchmark, share one draw of tasks; seeds are drawn for each table separately. With
    only two or three seeds, resampling shows little of how much seeds differ; if they differ a lot, the interval is
    too short.

    Args:
        tables: [S, n] each, values within `bounds`; row s holds one seed's values. S and n may differ between tables.
        tasks: for each table the n keys of its tasks, in the order of its columns.
        bounds: smallest and largest possible value.
        seed: seed of the resampling.
        num_bootstraps: number of resamples.
        confidence: the interval's confidence level.
    """
    arrays = [_table(table, keys) for table, keys in zip(tables, tasks, strict=True)]
    padded = [np.hstack([array, np.tile(bounds, (len(array), 1))]) for array in arrays]  # [S, n + 2]
    rng = np.random.default_rng(seed)
    means = []
    for rows in _chunks(sum(array.size for array in padded), num_bootstraps):
        drawn: dict[tuple[str, ...], Array] = {}
        total = np.zeros(rows)
        for array, keys in zip(padded, tasks, strict=True):
            num_seeds, num_tasks = array.shape
            if tuple(keys) not in drawn:
                drawn[tuple(keys)] = rng.multinomial(num_tasks, [1 / num_tasks] * num_tasks, rows) / num_tasks
            seeds = rng.multinomial(num_seeds, [1 / num_seeds] * num_seeds, rows) / num_seeds  # [rows, S]
            total += (seeds @ array * drawn[tuple(keys)]).sum(axis=1)
        means.append(total / len(padded))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def crossed_comparison(
    a: Sequence[ArrayLike], b: Sequence[ArrayLike], tasks: Sequence[Sequence[str]], num_bootstraps: int, seed: int
) -> PairedResult:
    """Compare a and b over several tables, each with the same seeds and tasks under both, by the mean over tables.

    The interval is that of `crossed_interval`. The p-value flips the sign of each task's difference at random, with one
    sign for all seeds and all tables that have the task, because their outcomes on one task are not independent. With
    one table of one seed this is `paired_bootstrap`. The p-value covers the choice of tasks; it takes the trained
    composers as given.

    Args:
        a: [S, n] each, values in [0, 1].
        b: the same shapes.
        tasks: for each table the n keys of its tasks; a key that occurs in several tables is the same task in all.
        num_bootstraps: number of resamples, and of random sign patterns.
        seed: seed of both.
    """
    differences = [_table(x, keys, (0, 1)) - _table(y, keys, (0, 1)) for x, y, keys in zip(a, b, tasks, strict=True)]
    low, high = crossed_interval(differences, tasks, (-1.0, 1.0), seed, num_bootstraps)
    shares: dict[str, float] = {}
    for difference, keys in zip(differences, tasks, strict=True):
        for key, value in zip(keys, difference.mean(axis=0) / (len(keys) * len(differences)), strict=True):
            shares[key] = shares.get(key, 0.0) + float(value)
    by_task = np.array(list(shares.values()))
    by_task[np.abs(by_task) < 1e-12] = 0.0  # rounding left what cancels out over seeds and tables
    return PairedResult(float(by_task.sum()), low, high, _sign_flip_p_value(by_task, seed, num_bootstraps))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values, in the given order; one below 0.05 survives as one of that many tests (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _checked(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"expected values of shape [n], found {list(array.shape)}")
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError("expected rewards in [0, 1], found others (or nan)")
    return array


def _table(values: ArrayLike, keys: Sequence[str], bounds: tuple[float, float] = (-1, 1)) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size or array.shape[1] != len(keys):
        raise ValueError(f"expected values of shape [seeds, {len(keys)}], found {list(array.shape)}")
    if not ((array >= bounds[0]) & (array <= bounds[1])).all():
        raise ValueError(f"expected values from {bounds[0]} to {bounds[1]}, found others (or nan)")
    return array


def _interval(
    values: Array, bounds: tuple[float, float], seed: int, num_bootstraps: int, confidence: float
) -> tuple[float, float]:
    """Return the percentile bootstrap of the mean over the values and one more value at each bound."""
    values = np.append(values, bounds)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, values.size, (rows, values.size)) for rows in _chunks(values.size, num_bootstraps))
    means = np.concatenate([values[rows].mean(axis=1) for rows in draws])  # [num_bootstraps]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _sign_flip_p_value(differences: Array, seed: int, num_flips: int) -> float:
    """Return the share of random sign patterns whose sum is as far from zero as the observed one, which counts too."""
    moved = differences[differences != 0]
    if moved.size == 0:
        return 1.0
    rng = np.random.default_rng(seed)
    extreme = 1
    for rows in _chunks(moved.size, num_flips):
        sums = rng.choice([-1.0, 1.0], (rows, moved.size)) @ moved
        extreme += int((np.abs(sums) >= abs(moved.sum()) - 1e-9).sum())
    return extreme / (num_flips + 1)


def _chunks(width: int, total: int) -> Iterator[int]:
    """Yield row counts that add up to `total`, each for at most CHUNK numbers (or one row)."""
    rows = max(1, CHUNK // width)
    for start in range(0, total, rows):
        yield min(rows, total - start)
