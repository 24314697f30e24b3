"""Shares and separation against loops over every distance, all permutations one by one, and data made to be known."""

from itertools import permutations, product

import numpy as np
import pytest

from latentmem.report.separation import (
    Separation,
    Shares,
    principal_axes,
    separation_by_domain,
    separation_by_role,
    shares,
)


def table(seed: int, num_tasks: int = 4, num_roles: int = 3, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_tasks, num_roles, width)) + 1.0


def between_over_total(rows: list[np.ndarray], labels: list) -> float:
    """Share of the squared pairwise distances that lies between labels, by the formula with all pairs."""
    n = len(rows)
    total = sum(((a - b) ** 2).sum() for a in rows for b in rows) / (2 * n)
    within = 0.0
    for label in set(labels):
        group = [row for row, found in zip(rows, labels, strict=True) if found == label]
        within += sum(((a - b) ** 2).sum() for a in group for b in group) / (2 * len(group))
    return (total - within) / total


def test_shares_worked_out_by_hand() -> None:
    # One number each. Roles add -1 and 1, domain b adds 4, the second task of a adds 2; nothing else.
    latents = np.array([[[-1.0], [1.0]], [[1.0], [3.0]], [[3.0], [5.0]], [[3.0], [5.0]]])
    found = shares(latents, ["a", "a", "b", "b"])
    # Mean 2.5; squares about it: 12.25 2.25 2.25 .25 .25 6.25 .25 6.25 = 30; length 80.
    # Roles: 4 tasks x (1 + 1) = 8. Task means 0 2 4 4, domain means 1 4: 2 roles x 2 x (2.25 + 2.25) = 18; tasks 4.
    assert (found.varying, found.role, found.domain, found.task) == pytest.approx((30 / 80, 8 / 30, 18 / 30, 4 / 30))
    assert found.rest == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_shares_add_up_and_the_role_is_that_of_all_pairs(seed: int) -> None:
    latents = table(seed)
    found = shares(latents, ["a", "b", "a", "a"])
    assert found.role + found.domain + found.task + found.rest == pytest.approx(1)
    rows = [latents[t, r] for t in range(4) for r in range(3)]
    assert found.role == pytest.approx(between_over_total(rows, [r for _ in range(4) for r in range(3)]))
    domains = [d for d in "abaa" for _ in range(3)]
    assert found.domain == pytest.approx(between_over_total(rows, domains))
    assert found.task + found.domain == pytest.approx(between_over_total(rows, [t for t in range(4) for _ in range(3)]))


def test_the_role_score_and_p_value_are_those_of_all_permutations_inside_tasks() -> None:
    latents = table(5, num_tasks=3, num_roles=3) + np.array([[0.0], [0.7], [1.4]])
    within = latents - latents.mean(1, keepdims=True)

    def score(order) -> float:
        rows = [within[t, r] for t in range(3) for r in range(3)]
        return between_over_total(rows, [label for swapped in order for label in swapped])

    scores = [score(order) for order in product(permutations(range(3)), repeat=3)]
    observed = score([(0, 1, 2)] * 3)
    found = separation_by_role(latents, 4000, seed=1)
    assert found is not None
    assert found.score == pytest.approx(observed)
    assert found.p_value == pytest.approx(np.mean([s >= observed - 1e-9 for s in scores]), abs=0.03)
    assert found.chance == pytest.approx(np.mean(scores), abs=0.02)


def test_the_domain_score_and_p_value_are_those_of_all_permutations_of_tasks() -> None:
    domains = ["a", "b", "a", "b", "c"]
    latents = table(2, num_tasks=5, num_roles=2)
    latents[[1, 3]] += 0.8
    rows = list(latents.mean(1))
    scores = [between_over_total(rows, list(order)) for order in permutations(domains)]
    observed = between_over_total(rows, domains)
    found = separation_by_domain(latents, domains, 4000, seed=1)
    assert found is not None
    assert found.score == pytest.approx(observed)
    assert found.p_value == pytest.approx(np.mean([s >= observed - 1e-9 for s in scores]), abs=0.03)
    assert found.chance == pytest.approx(np.mean(scores), abs=0.02)


def test_full_separation_scores_one() -> None:
    offsets = np.array([[0.0, 1.0], [1.0, 0.0], [5.0, 5.0]])
    latents = offsets + 10 * table(3, num_tasks=8, num_roles=1, width=2)  # tasks differ far more than roles do
    found = separation_by_role(latents, 500, seed=0)
    assert found is not None
    assert found.score == pytest.approx(1)
    assert found.p_value == 1 / 501
    parts = shares(latents, ["a"] * 8)
    assert parts.rest == pytest.approx(0, abs=1e-9)
    assert parts.role < parts.task


def test_without_separation_p_is_small_as_often_as_it_says() -> None:
    p_role, p_domain = [], []
    for seed in range(200):
        # Every task has an offset of its own, shared by its roles: no finding about roles.
        latents = table(seed, num_tasks=6, num_roles=2, width=4) + 3 * table(
            seed + 1000, num_tasks=6, num_roles=1, width=4
        )
        by_role, by_domain = (
            separation_by_role(latents, 199, seed), separation_by_domain(latents, ["a", "b"] * 3, 199, seed)
        )  # fmt: skip
        assert by_role is not None
        assert by_domain is not None
        p_role.append(by_role.p_value)
        p_domain.append(by_domain.p_value)
    for p_values in (p_role, p_domain):
        assert np.mean(np.array(p_values) <= 0.2) <= 0.2 + 0.09  # three standard errors of 200
        assert 0.4 < np.mean(p_values) < 0.7  # ties count, so a little above a half


def test_a_role_that_answers_each_task_in_its_own_way_is_the_rest_and_no_separation() -> None:
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    latents = 9 + signs[:, None, None] * np.array([[1.0], [-1.0]])
    assert shares(latents, ["a"] * 4) == pytest.approx(Shares(1 / 82, 0, 0, 0, 1))
    found = separation_by_role(latents, 200, seed=0)
    assert found is not None
    assert (found.score, found.p_value) == (pytest.approx(0, abs=1e-12), 1.0)


def test_the_same_latents_everywhere_are_told_as_such_whatever_float32_rounds() -> None:
    rng = np.random.default_rng(0)
    latents = (np.full((5, 2, 7), 0.3) * (1 + 1e-7 * rng.standard_normal((5, 2, 7)))).astype(np.float32).astype(float)
    assert shares(latents, ["a", "b", "a", "b", "a"]).varying == 0
    assert separation_by_role(latents, 50, 0) == Separation(0, 0, 1)
    assert separation_by_domain(latents, ["a", "b", "a", "b", "a"], 50, 0) == Separation(0, 0, 1)
    coordinates, explained = principal_axes(latents.reshape(10, 7))
    assert not coordinates.any()
    assert not explained.any()


def test_one_role_one_domain_and_one_task_are_no_comparison() -> None:
    latents = table(0)
    assert separation_by_role(latents[:, :1], 50, 0) is None
    assert separation_by_domain(latents, ["a"] * 4, 50, 0) is None
    single = separation_by_role(latents[:1], 50, 0)
    assert single is not None
    assert single.p_value == 1  # any labels fit a single task perfectly


def test_axes_keep_all_distances_of_points_in_a_plane_and_their_share_of_the_variance() -> None:
    rng = np.random.default_rng(1)
    plane = rng.standard_normal((9, 2)) * (5, 1)
    basis, _ = np.linalg.qr(rng.standard_normal((20, 2)))
    coordinates, explained = principal_axes(plane @ basis.T + 7)

    def distances(points: np.ndarray) -> np.ndarray:
        return np.linalg.norm(points[:, None] - points[None], axis=2)

    np.testing.assert_allclose(distances(coordinates), distances(plane), atol=1e-9)
    variance = np.linalg.eigvalsh(np.cov(plane.T))[::-1]
    np.testing.assert_allclose(explained, variance / variance.sum())
    assert (coordinates[np.abs(coordinates).argmax(0), (0, 1)] > 0).all()


def test_two_points_have_one_axis() -> None:
    coordinates, explained = principal_axes(np.array([[0.0, 0.0], [3.0, 4.0]]))
    np.testing.assert_allclose(np.abs(coordinates), [[2.5, 0], [2.5, 0]], atol=1e-12)
    np.testing.assert_allclose(explained, [1, 0], atol=1e-12)
