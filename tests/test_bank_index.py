"""The search matrix by itself: similarities that depend on two vectors only, and a file that is believed or dropped."""

import fcntl
import itertools
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from latentmem.bank import exact
from latentmem.bank.matrix import BankIndex, Label, read_matrix

GENERATION = "a" * 32
LAST_ID = "b" * 32


def unit_rows(num_rows: int, width: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((num_rows, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def filled(path: Path, rows: np.ndarray, pieces: list[int]) -> BankIndex:
    """An index of these rows with numbers 1, 3, 5 ..., appended in pieces of the given sizes."""
    index = BankIndex(path, GENERATION, rows.shape[1])
    start = 0
    for size in pieces:
        seqs = list(range(2 * start + 1, 2 * (start + size) + 1, 2))
        index.append(seqs, rows[start : start + size], [[("domain", "d")]] * size, LAST_ID)
        index.save_if_due()
        start += size
    assert start == len(rows)
    return index


def slow_ranking(rows: np.ndarray, query: np.ndarray, k: int) -> list[tuple[int, float]]:
    scores = [
        float(np.float32(math.fsum(float(a) * float(b) for a, b in zip(row, query, strict=True)))) for row in rows
    ]
    order = sorted(range(len(rows)), key=lambda i: (-scores[i], i))[:k]
    return [(2 * i + 1, scores[i]) for i in order]


@pytest.mark.parametrize(("tasks_per_block", "candidates_per_block"), [(1, 1), (3, 7), (64, 4096)])
@pytest.mark.parametrize("pieces", [[211], [1, 13, 97, 100], [7] * 30 + [1]])
def test_every_blocking_gives_the_ranking_of_slow_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[int], tasks_per_block: int, candidates_per_block: int
) -> None:
    monkeypatch.setattr(exact, "_QUERIES_PER_BLOCK", tasks_per_block)
    monkeypatch.setattr(exact, "_CANDIDATES_PER_BLOCK", candidates_per_block)
    rows = unit_rows(211, 19, seed=1)
    rows[50:90] = rows[3]  # forty real ties, more than k
    queries = np.concatenate([rows[3:4], unit_rows(6, 19, seed=2)])
    index = filled(tmp_path / "index", rows, pieces)
    found = index.nearest(queries, 10, [], [[]] * len(queries))
    assert found == [slow_ranking(rows, query, 10) for query in queries]


def test_a_similarity_does_not_depend_on_the_other_rows(tmp_path: Path) -> None:
    rows, query = unit_rows(400, 384, seed=3), unit_rows(1, 384, seed=4)
    together = dict(filled(tmp_path / "all", rows, [400]).nearest(query, 400, [], [[]])[0])
    for i in range(0, 400, 37):
        alone = filled(tmp_path / f"one{i}", rows[i : i + 1], [1]).nearest(query, 1, [], [[]])[0]
        assert alone == [(1, together[2 * i + 1])]


def test_near_ties_below_the_noise_of_a_float32_product_are_ranked_by_their_exact_values(tmp_path: Path) -> None:
    base, *queries = unit_rows(13, 384, seed=5)
    rows = (base + 1e-8 * np.random.default_rng(6).standard_normal((100, 384))).astype(np.float32)
    exact = [slow_ranking(rows, query, 7) for query in queries]
    estimates = np.stack(queries) @ rows.T  # the product that nominates candidates, noise and all
    noisy = [{2 * i + 1 for i in np.argsort(-row, kind="stable")[:7].tolist()} for row in estimates]
    assert noisy != [{seq for seq, _ in ranking} for ranking in exact]  # else this test would prove nothing
    index = filled(tmp_path / "index", rows, [100])
    assert index.nearest(np.stack(queries), 7, [], [[]] * len(queries)) == exact


@pytest.mark.parametrize("num_queries", [1, 9])
@pytest.mark.parametrize(("rows_per_block", "gathered_per_block"), [(8192, 1024), (50, 3), (7, 1)])
def test_filters_that_pass_few_many_or_neighbouring_rows_give_the_ranking_of_slow_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_block: int, gathered_per_block: int, num_queries: int
) -> None:
    monkeypatch.setattr(exact, "_ROWS_PER_BLOCK", rows_per_block)
    monkeypatch.setattr(exact, "_GATHERED_PER_BLOCK", gathered_per_block)
    monkeypatch.setattr(exact, "_SHORT_TAIL", 20)
    rng = np.random.default_rng(12)
    rows = unit_rows(307, 13, seed=13)
    rows[100:130] = rows[5]
    labels: list[list[Label]] = [
        [("success", int(rng.random() < 0.6)), ("domain", f"d{i // 80}"), ("team", "rare" if i % 61 == 0 else "usual")]
        for i in range(307)
    ]
    queries = np.concatenate([rows[5:6], unit_rows(num_queries - 1, 13, seed=14)])
    excluded = [[2 * i + 1 for i in rng.choice(307, 9 * n, replace=False)] for n in range(num_queries)]
    wanted: list[list[Label]] = [
        [],
        [("success", 1)],
        [("domain", "d1")],
        [("domain", "d1"), ("success", 0)],
        [("team", "rare"), ("success", 1)],
        [("domain", "absent")],
    ]
    index = BankIndex(tmp_path / "index", GENERATION, 13)
    for start, end in itertools.pairwise([0, 150, 170, 171, 215, 307]):
        seqs = list(range(2 * start + 1, 2 * end, 2))
        index.append(seqs, rows[start:end], labels[start:end], LAST_ID)
        if start < 170:
            index.save_if_due()
        for filter_ in wanted:  # asked for again each time: what passes is remembered, and has to grow
            for query, left_out, found in zip(
                queries, excluded, index.nearest(queries, 4, filter_, excluded_in(excluded, end)), strict=True
            ):
                may = [i for i in range(end) if set(filter_) <= set(labels[i]) and 2 * i + 1 not in left_out]
                expected = [(2 * may[seq // 2] + 1, score) for seq, score in slow_ranking(rows[may], query, 4)]
                assert found == expected
    stored = read_matrix(tmp_path / "index", GENERATION)
    assert stored is not None
    again = BankIndex(tmp_path / "index", GENERATION, 13, stored)
    rest = len(again)
    again.append(list(range(2 * rest + 1, 615, 2)), rows[rest:], labels[rest:], LAST_ID)
    for filter_ in wanted:
        assert again.nearest(queries, 4, filter_, excluded) == index.nearest(queries, 4, filter_, excluded)


def excluded_in(excluded: list[list[int]], num_rows: int) -> list[list[int]]:
    return [[seq for seq in seqs if seq < 2 * num_rows] for seqs in excluded]


def test_the_file_is_rewritten_only_when_a_quarter_is_new(tmp_path: Path) -> None:
    path = tmp_path / "index"
    index = filled(path, unit_rows(40, 5, seed=6), [40])
    index.append([101], unit_rows(1, 5, seed=7), [[]], LAST_ID)
    index.save_if_due()
    stored = read_matrix(path, GENERATION)
    assert stored is not None
    assert len(stored.seqs) == 40
    index.append(list(range(103, 123, 2)), unit_rows(10, 5, seed=8), [[]] * 10, LAST_ID)
    index.save_if_due()
    stored = read_matrix(path, GENERATION)
    assert stored is not None
    assert len(stored.seqs) == 51
    assert [file.name for file in tmp_path.iterdir()] == ["index"]


def test_saving_removes_what_a_killed_process_left_and_not_what_a_living_one_writes(tmp_path: Path) -> None:
    dead, alive, other = (tmp_path / name for name in (".index.aa.tmp", ".index.bb.tmp", ".other.index.cc.tmp"))
    for path in (dead, alive, other):
        path.write_bytes(b"half")
    with alive.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        filled(tmp_path / "index", unit_rows(9, 5, seed=9), [9])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".index.bb.tmp", ".other.index.cc.tmp", "index"]


def test_what_was_written_is_read_back_and_another_generation_is_not(tmp_path: Path) -> None:
    path, rows = tmp_path / "index", unit_rows(9, 5, seed=9)
    filled(path, rows, [9])
    stored = read_matrix(path, GENERATION)
    assert stored is not None
    assert stored.last_id == LAST_ID
    assert stored.seqs.tolist() == list(range(1, 19, 2))
    np.testing.assert_array_equal(stored.vectors, rows)
    assert read_matrix(path, "c" * 32) is None
    assert read_matrix(tmp_path / "absent", GENERATION) is None


def test_any_flipped_byte_or_missing_tail_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "index"
    filled(path, unit_rows(3, 5, seed=10), [3])
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(ValueError, match=r"checksum|not an index|do not hold"):
            read_matrix(path, GENERATION)
        path.write_bytes(content[:i])
        with pytest.raises(ValueError, match=r"empty file|too few|do not hold|checksum"):
            read_matrix(path, GENERATION)


def test_an_index_that_cannot_be_saved_goes_on_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "index"
    path.mkdir()
    rows = unit_rows(30, 5, seed=11)
    with caplog.at_level(logging.WARNING):
        index = filled(path, rows, [10, 20])
    assert "could not be saved" in caplog.text
    assert index.nearest(rows[4:5], 3, [], [[]])[0] == slow_ranking(rows, rows[4], 3)
    assert [file.name for file in tmp_path.iterdir()] == ["index"]
