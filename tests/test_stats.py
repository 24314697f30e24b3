"""Numbers worked out by hand or by plain enumeration, and coverage by simulation."""

from itertools import product
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binomtest

from latentmem import stats
from latentmem.stats import (
    PairedResult,
    crossed_comparison,
    crossed_interval,
    holm,
    mean_interval,
    paired_bootstrap,
    paired_mean,
    wilson_interval,
)


def test_wilson_interval_solves_its_defining_equation() -> None:
    # The ends are the shares p from which the observed one is z standard errors away: (8/10 - p)^2 = z^2 p(1-p)/10.
    z = 1.959963984540054
    for end in wilson_interval(8, 10):
        assert (0.8 - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / 10, rel=1e-9)
    low, high = wilson_interval(8, 10)
    assert low < 0.8 < high


def test_wilson_interval_by_hand_at_the_edges() -> None:
    # Without a success the upper end is z^2 / (n + z^2): 3.8415 / 13.8415.
    assert wilson_interval(0, 10) == (0.0, pytest.approx(3.841459 / 13.841459, abs=1e-6))
    assert wilson_interval(10, 10) == (pytest.approx(10 / 13.841459, abs=1e-6), 1.0)
    assert wilson_interval(0, 1) == (0.0, pytest.approx(3.841459 / 4.841459, abs=1e-6))
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95, 0.99])
def test_wilson_interval_is_that_of_its_closed_form(confidence: float) -> None:
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    for total in (1, 2, 3, 5, 10, 24, 40, 100, 480, 1000, 100_000):
        for successes in {0, 1, total // 3, total // 2, total - 1, total}:
            share = successes / total
            centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
            half = z * sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
            low, high = wilson_interval(successes, total, confidence)
            assert low == pytest.approx(0 if successes == 0 else centre - half, abs=1e-12)
            assert high == pytest.approx(1 if successes == total else centre + half, abs=1e-12)
            assert (low == 0, high == 1) == (successes == 0, successes == total)


def test_wilson_interval_grows_with_confidence() -> None:
    assert wilson_interval(5, 10, 0.9)[0] > wilson_interval(5, 10, 0.99)[0]


def test_wilson_interval_covers_the_true_share() -> None:
    for total, share in [(40, 0.3), (16, 0.5), (100, 0.05)]:
        chance = [comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(total + 1)]
        ends = [wilson_interval(k, total) for k in range(total + 1)]
        covered = sum(p for p, (low, high) in zip(chance, ends, strict=True) if low <= share <= high)
        assert 0.92 < covered < 0.985


def test_impossible_counts_are_refused() -> None:
    for successes, total in [(-1, 3), (4, 3), (1, 0)]:
        with pytest.raises(ValueError, match="successes of"):
            wilson_interval(successes, total)


def test_mean_interval_is_that_of_all_possible_resamples() -> None:
    values = [0.0, 0.5, 0.25, 1.0]
    means = [np.mean(drawn) for drawn in product([*values, 0.0, 1.0], repeat=6)]
    low, high = mean_interval(values, seed=0, num_bootstraps=200_000)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.01)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.01)


@pytest.mark.parametrize(
    ("num_values", "first", "second"), [(40, 0.3, 0.7), (16, 0.2, 0.1), (10, 0.1, 0.9), (64, 0.05, 1.0)]
)
def test_mean_interval_covers_the_true_mean(num_values: int, first: float, second: float) -> None:
    rng = np.random.default_rng(5)
    true = first / (first + second)
    ends = [mean_interval(rng.beta(first, second, num_values), seed, 400) for seed in range(300)]
    assert 0.91 < np.mean([low <= true <= high for low, high in ends]) <= 1


def test_mean_interval_never_claims_certainty() -> None:
    assert mean_interval([], 0, 1000) == (0.0, 1.0)
    assert mean_interval([0.5], 0, 1000)[0] < 0.2
    low, high = mean_interval([1.0] * 40, 0, 1000)
    assert 0.85 < low < 0.98
    assert high == 1.0


def test_results_depend_on_the_seed_alone() -> None:
    values = [0.1, 0.9, 0.4, 0.3]
    assert mean_interval(values, 3, 500) == mean_interval(values, 3, 500)
    assert mean_interval(values, 3, 500) != mean_interval(values, 4, 500)
    a, b = [0.3, 0.9, 0.8, 1.0, 0.2], [0.1, 0.5, 0.9, 0.4, 0.6]
    assert paired_bootstrap(a, b, 500, 3) == paired_bootstrap(a, b, 500, 3)
    assert paired_bootstrap(a, b, 500, 3) != paired_bootstrap(a, b, 500, 4)


def test_memory_of_a_bootstrap_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "CHUNK", 100)
    widest = 0

    class Watched:
        def __init__(self, seed: int) -> None:
            self.rng = np.random.Generator(np.random.PCG64(seed))

        def integers(self, low: int, high: int, shape: tuple[int, int]) -> np.ndarray:
            nonlocal widest
            widest = max(widest, shape[0] * shape[1])
            return self.rng.integers(low, high, shape)

    monkeypatch.setattr(stats.np.random, "default_rng", Watched)
    mean_interval([0.0, 1.0, 0.5] * 9, 0, 1001)
    assert 29 < widest <= 100


def test_sign_flip_p_value_is_the_share_of_sign_patterns_as_extreme() -> None:
    a, b = [0.9, 0.8, 0.7, 0.1, 0.6, 1.0], [0.1, 0.4, 0.8, 0.1, 0.2, 0.3]
    differences = np.subtract(a, b)
    sums = [abs(np.dot(signs, differences)) for signs in product([-1, 1], repeat=6)]
    exact = np.mean([total >= abs(differences.sum()) - 1e-9 for total in sums])
    found = paired_bootstrap(a, b, 40_000, 0)
    assert found.p_value == pytest.approx(exact, abs=0.01)
    assert found.difference == pytest.approx(2.2 / 6)
    assert found.low < found.difference < found.high


def test_paired_bootstrap_of_successes_agrees_with_mcnemars_exact_test() -> None:
    a, b = [1] * 12 + [0] * 4 + [1] * 9 + [0] * 15, [0] * 12 + [1] * 4 + [1] * 9 + [0] * 15
    exact = binomtest(12, 12 + 4, 0.5).pvalue  # of the tasks that one of the two solved
    assert paired_bootstrap(a, b, 40_000, 1).p_value == pytest.approx(exact, abs=0.01)


def test_paired_bootstrap_is_antisymmetric_in_difference() -> None:
    a, b = [1, 1, 0, 1, 0, 1], [0, 1, 0, 0, 1, 0]
    forth, back = paired_bootstrap(a, b, 2000, 0), paired_bootstrap(b, a, 2000, 0)
    assert forth.difference == -back.difference == pytest.approx(2 / 6)
    assert forth.p_value == back.p_value


def test_a_single_task_proves_nothing() -> None:
    assert paired_bootstrap([1.0], [0.0], 1000, 0) == PairedResult(1.0, -1.0, 1.0, 1.0)
    assert paired_bootstrap([], [], 1000, 0) == PairedResult(0.0, -1.0, 1.0, 1.0)


def test_equal_results_give_p_one_and_an_interval_around_zero() -> None:
    same = paired_bootstrap([1, 0, 1, 1] * 10, [1, 0, 1, 1] * 10, 1000, 0)
    assert (same.difference, same.p_value) == (0.0, 1.0)
    assert -0.15 < same.low < 0 < same.high < 0.15


@pytest.mark.parametrize(("wins", "losses"), [(0.05, 0.05), (0.3, 0.1), (0.0, 0.08)])
def test_paired_interval_covers_and_p_value_holds_its_level(wins: float, losses: float) -> None:
    rng = np.random.default_rng(2)
    covered = rejected = 0
    for seed in range(300):
        u = rng.random(40)
        found = paired_bootstrap(u < wins, (u >= wins) & (u < wins + losses), 400, seed)
        covered += found.low - 1e-9 <= wins - losses <= found.high + 1e-9
        rejected += found.p_value < 0.05
    assert covered > 0.91 * 300
    if wins == losses:
        assert rejected < 0.08 * 300


def test_crossed_interval_is_that_of_all_resamples_of_seeds_and_tasks() -> None:
    table = np.array([[0.0, 1.0, 0.25], [1.0, 1.0, 0.5]])
    padded = np.hstack([table, [[0.0, 1.0], [0.0, 1.0]]])
    means = [
        padded[np.ix_(seeds, tasks)].mean()
        for seeds in product(range(2), repeat=2)
        for tasks in product(range(5), repeat=5)
    ]
    low, high = crossed_interval([table], ["abc"], (0.0, 1.0), 0, 100_000)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.01)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.01)


def test_crossed_interval_of_one_seed_is_that_of_the_mean() -> None:
    values = [0.0, 0.5, 0.25, 1.0, 1.0, 0.0]
    found = crossed_interval([[values]], ["abcdef"], (0.0, 1.0), 0, 100_000)
    assert found == pytest.approx(mean_interval(values, 1, 100_000), abs=0.01)


def test_tables_of_the_same_tasks_are_resampled_together_and_others_apart() -> None:
    table = np.array([[1.0, 0.0, 1.0, 0.0, 1.0, 0.0]])
    together = crossed_interval([table, 1 - table], ["abcdef"] * 2, (0.5, 0.5), 0, 2000)
    assert together == pytest.approx((0.5, 0.5))
    low, high = crossed_interval([table, 1 - table], ["abcdef", "ghijkl"], (0.5, 0.5), 0, 2000)
    assert low < 0.4 < 0.6 < high


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_crossed_interval_covers_the_true_mean_where_seeds_differ(spread: float) -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        hardness, luck = rng.random(40), rng.normal(0, spread, (4, 1))
        table = rng.random((4, 40)) < np.clip(0.2 + 0.6 * hardness + luck, 0, 1)
        low, high = crossed_interval([table], [[str(i) for i in range(40)]], (0.0, 1.0), seed, 400)
        covered += low <= 0.5 <= high
    assert covered >= 0.91 * 200


def test_crossed_comparison_of_one_table_and_seed_is_the_paired_one() -> None:
    a, b = [1, 1, 0, 1, 0, 1, 1, 1], [0, 1, 0, 0, 1, 0, 0, 1]
    plain, crossed = paired_bootstrap(a, b, 20_000, 0), crossed_comparison([[a]], [[b]], ["abcdefgh"], 20_000, 0)
    assert crossed.difference == pytest.approx(plain.difference)
    assert crossed.p_value == plain.p_value
    assert (crossed.low, crossed.high) == pytest.approx((plain.low, plain.high), abs=0.02)


def test_the_same_answers_of_many_seeds_or_teams_are_no_more_evidence_than_once() -> None:
    a, b = [1, 1, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1, 0]
    once = crossed_comparison([[a]], [[b]], ["abcdefgh"], 20_000, 0)
    seeds = crossed_comparison([[a] * 5], [[b] * 5], ["abcdefgh"], 20_000, 0)
    teams = crossed_comparison([[a]] * 5, [[b]] * 5, ["abcdefgh"] * 5, 20_000, 0)
    assert once.p_value == seeds.p_value == teams.p_value > 0.05
    others = crossed_comparison([[a]] * 2, [[b]] * 2, ["abcdefgh", "ijklmnop"], 20_000, 0)
    assert others.p_value < 0.01


def test_crossed_p_value_is_the_share_of_sign_patterns_over_tasks() -> None:
    # Tables of other sizes and seeds; task d is in both. What counts is the mean over tables of each one's mean.
    a = [np.array([[1, 1, 1, 0], [1, 0, 1, 1.0]]), np.array([[0, 1, 1.0]])]
    b = [np.array([[0, 1, 0, 0], [0, 1, 0, 0.0]]), np.array([[0, 0, 0.5]])]
    by_task = {
        "a": 2 / 2 / 4 / 2,
        "b": -1 / 2 / 4 / 2,
        "c": 2 / 2 / 4 / 2,
        "d": 1 / 2 / 4 / 2 + 1 / 3 / 2,
        "e": 0.5 / 6,
    }
    shares = np.array(list(by_task.values()))
    sums = [abs(np.dot(signs, shares)) for signs in product([-1, 1], repeat=5)]
    exact = np.mean([total >= shares.sum() - 1e-9 for total in sums])
    found = crossed_comparison(a, b, ["abcd", "xde"], 40_000, 0)
    assert found.difference == pytest.approx(shares.sum())
    assert found.p_value == pytest.approx(exact, abs=0.01)


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 gives 0.02, 0.03, 0.06, 0.04; the last is lifted to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_unusable_values_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 values"):
        paired_bootstrap([0.0, 1.0], [1.0], 10, 0)
    with pytest.raises(ValueError, match=r"rewards in \[0, 1\]"):
        mean_interval([float("nan")], 0, 10)
    with pytest.raises(ValueError, match=r"shape \[n\], found \[1, 1\]"):
        mean_interval([[0.5]], 0, 10)
    with pytest.raises(ValueError, match=r"shape \[seeds, 3\], found \[1, 2\]"):
        crossed_interval([[[0.5, 1.0]]], ["abc"], (0, 1), 0, 10)
    with pytest.raises(ValueError, match="values from 0 to 1"):
        crossed_comparison([[[0.5]]], [[[-0.5]]], ["a"], 10, 0)


# Differences without bounds


def test_the_mean_of_unbounded_differences_has_students_interval_and_a_sign_flip_p():
    values = [4.1, 5.2, 3.9, 4.6, 5.0, 4.4]
    found = paired_mean(values, seed=1, num_flips=20_000)
    # By hand: mean 4.5333, s 0.50465, t(5) 2.5706.
    assert (found.difference, found.low, found.high) == pytest.approx((4.5333, 4.0037, 5.0629), abs=2e-4)
    assert found.p_value == pytest.approx(2 / 64, abs=0.006)  # only the two patterns of equal signs are as far
    assert paired_mean([0.0, 0.0, 0.0]) == PairedResult(0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")], [[1.0, 2.0]]])
def test_fewer_than_two_differences_or_such_as_are_not_finite_are_refused(values):
    with pytest.raises(ValueError, match="expected at least 2 finite differences"):
        paired_mean(values)


def test_students_interval_covers_the_mean_of_normal_differences_in_19_of_20():
    rng = np.random.default_rng(4)
    found = [paired_mean(rng.normal(1.0, 2.0, 8), num_flips=1) for _ in range(1500)]
    assert 0.93 < np.mean([r.low <= 1 <= r.high for r in found]) < 0.97
