"""Lists of similar rows: what they nominate is decided exactly, and what is promised to be exact owes them nothing."""

import json
import logging
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from latentmem.bank import ExperienceBank
from latentmem.bank import lists as bank_approximate
from latentmem.bank.lists import ApproximateIndex, read_lists
from latentmem.bank.matrix import BankIndex, Label
from latentmem.errors import BankError

GENERATION = "a" * 32


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists from 41 rows on, extended by 16, and searched until 30 rows were met."""
    monkeypatch.setattr(bank_approximate, "_FEW_ROWS", 40)
    monkeypatch.setattr(bank_approximate, "_FEW_ROWS_PER_K", 1)
    monkeypatch.setattr(bank_approximate, "_LONGEST_TAIL", 16)
    monkeypatch.setattr(bank_approximate, "_MET_ROWS", 30)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(num_rows: int, width: int, num_clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and the cluster that each is in."""
    rng = np.random.default_rng(seed)
    clusters = rng.integers(0, num_clusters, num_rows)
    centres = rng.standard_normal((num_clusters, width))
    return unit(centres[clusters] + 0.7 * rng.standard_normal((num_rows, width))), clusters


def filled(path: Path, rows: np.ndarray, labels: list[list[Label]], piece: int = 10**6) -> ApproximateIndex:
    """Lists over an index of these rows with numbers 1, 3, 5 ..., appended in pieces."""
    index = ApproximateIndex(path / "lists", BankIndex(path / "index", GENERATION, rows.shape[1]))
    for start in range(0, len(rows), piece):
        seqs = list(range(2 * start + 1, 2 * min(start + piece, len(rows)) + 1, 2))
        end = start + len(seqs)
        index.exact.append(seqs, rows[start:end], labels[start:end], f"{end:032}")
        index.follow()
    return index


def brute_force(
    rows: np.ndarray, labels: list[list[Label]], query: np.ndarray, k: int, wanted: list[Label], excluded: list[int]
) -> list[tuple[int, float]]:
    exact = (rows.astype(np.float64) @ query.astype(np.float64)).astype(np.float32).tolist()
    may = [i for i in range(len(rows)) if set(wanted) <= set(labels[i]) and 2 * i + 1 not in excluded]
    return [(2 * i + 1, exact[i]) for i in sorted(may, key=lambda i: (-exact[i], i))[:k]]


@pytest.mark.parametrize(("num_rows", "piece"), [(41, 41), (203, 203), (357, 29), (500, 7)])
def test_where_every_list_is_read_the_ranking_is_that_of_brute_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, piece: int
) -> None:
    monkeypatch.setattr(bank_approximate, "_MET_ROWS", 10**6)
    rng = np.random.default_rng(num_rows)
    rows, clusters = clustered(num_rows, 19, 12, seed=num_rows)
    rows[20:40] = rows[3]  # twenty real ties, more than k
    labels: list[list[Label]] = [[("domain", int(c) % 3), ("success", int(rng.integers(2)))] for c in clusters]
    index = filled(tmp_path, rows, labels, piece)
    queries = np.concatenate([rows[3:4], unit(rng.standard_normal((4, 19)))])
    excluded = [[2 * i + 1 for i in rng.choice(num_rows, size, replace=False)] for size in (0, 1, 9, 30, 0)]
    for wanted in ([], [("success", 1)], [("success", 1), ("domain", 0)], [("domain", 7)]):
        found = index.nearest(queries, 5, wanted, excluded)
        assert found == [
            brute_force(rows, labels, query, 5, wanted, left_out)
            for query, left_out in zip(queries, excluded, strict=True)
        ]


def test_a_share_of_clustered_rows_gives_nearly_all_of_the_nearest_with_any_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, clusters = clustered(8200, 32, 50, seed=1)
    rows, queries, query_domains = rows[:8000], rows[8000:], clusters[8000:] % 5
    coin = np.random.default_rng(2).integers(0, 2, 8000).tolist()
    labels: list[list[Label]] = [
        [("domain", domain), ("success", success)]
        for domain, success in zip((clusters[:8000] % 5).tolist(), coin, strict=True)
    ]
    index = filled(tmp_path, rows, labels)
    own, other = queries[query_domains == 0], queries[query_domains != 0]
    cases: list[tuple[np.ndarray, list[Label], int, float]] = [  # one row in so many is met, least recall at 10
        (queries, [], 16, 0.99),
        (queries, [("success", 1)], 16, 0.99),
        (own, [("success", 1), ("domain", 0)], 8, 0.95),
        (other, [("success", 1), ("domain", 0)], 4, 0.9),  # none of what passes is near such a query
    ]
    for asked, wanted, one_in, bound in cases:
        passing = index.exact.passing(wanted)
        monkeypatch.setattr(bank_approximate, "_MET_ROWS", (8000 if passing is None else len(passing)) // one_in)
        exact = index.exact.nearest(asked, 10, wanted, [[]] * len(asked))
        found = index.nearest(asked, 10, wanted, [[]] * len(asked))
        recall = np.mean([len(set(f) & set(e)) / 10 for f, e in zip(found, exact, strict=True)])
        assert recall >= bound, wanted
    assert recall < 1  # else every row was read, and this test would prove nothing


def test_a_filter_that_few_rows_pass_and_a_k_that_wants_many_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_approximate, "_MET_ROWS", 1)
    rows = unit(np.random.default_rng(3).standard_normal((2000, 24)))  # no clusters: lists are at their worst
    labels: list[list[Label]] = [[("team", "rare" if i % 53 == 0 else "usual")] for i in range(2000)]
    index = filled(tmp_path, rows, labels)
    queries = unit(np.random.default_rng(4).standard_normal((20, 24)))

    def right(k: int, wanted: list[Label]) -> list[bool]:
        found = index.nearest(queries, k, wanted, [[]] * 20)
        return [f == brute_force(rows, labels, q, k, wanted, []) for f, q in zip(found, queries, strict=True)]

    assert all(right(5, [("team", "rare")]))
    assert all(right(60, [("team", "rare")]))  # there are 38
    assert not all(right(5, [("team", "usual")]))  # the lists alone are not up to it
    monkeypatch.setattr(bank_approximate, "_FEW_ROWS_PER_K", 400)
    assert all(right(5, [("team", "usual")]))


def test_what_came_since_the_lists_were_extended_is_never_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_approximate, "_MET_ROWS", 1)
    rows = unit(np.random.default_rng(5).standard_normal((400, 24)))
    labels: list[list[Label]] = [[("success", i % 2)] for i in range(420)]
    index = filled(tmp_path, rows, labels[:400])
    for i in range(400, 420):  # past one extension
        new = unit(np.random.default_rng(i).standard_normal((1, 24)))
        index.exact.append([2 * i + 1], new, [labels[i]], f"{i:032}")
        index.follow()
        for wanted in ([], [("success", i % 2)]):
            assert index.nearest(new, 1, wanted, [[]])[0][0][0] == 2 * i + 1


def test_rows_left_out_make_room_for_those_of_other_lists(tmp_path: Path) -> None:
    rows, _ = clustered(600, 16, 10, seed=6)
    index = filled(tmp_path, rows, [[]] * 600)
    order = [seq for seq, _ in brute_force(rows, [[]] * 600, rows[0], 600, [], [])]
    for num_left_out in (100, 500, 595, 600):
        found = index.nearest(rows[:1], 10, [], [order[:num_left_out]])[0]
        assert len(found) == min(10, 600 - num_left_out)
        assert not {seq for seq, _ in found} & set(order[:num_left_out])


def test_a_filter_at_odds_with_the_query_still_fills_k(tmp_path: Path) -> None:
    rows, clusters = clustered(900, 16, 9, seed=7)
    labels: list[list[Label]] = [[("domain", int(c))] for c in clusters]
    index = filled(tmp_path, rows, labels)
    for query, own in zip(rows[:40], clusters[:40].tolist(), strict=True):
        other = (own + 1) % 9
        found = index.nearest(query[None], 10, [("domain", other)], [[]])[0]
        assert len(found) == 10
        assert {int(clusters[seq // 2]) for seq, _ in found} == {other}


def test_lists_are_begun_anew_when_the_bank_is_four_times_as_long(tmp_path: Path) -> None:
    rows, _ = clustered(400, 16, 10, seed=8)
    index = filled(tmp_path, rows, [[]] * 400, piece=20)
    stored = read_lists(tmp_path / "lists", GENERATION)
    assert stored is not None
    assert (stored.num_trained_on, stored.num_rows) == (240, 380)  # saved when a sixteenth had come
    assert stored.last_id == f"{380:032}"
    again = ApproximateIndex(tmp_path / "lists", index.exact, stored)
    again.follow()
    queries = unit(np.random.default_rng(9).standard_normal((9, 16)))
    assert again.nearest(queries, 3, [], [[]] * 9) == index.nearest(queries, 3, [], [[]] * 9)


def test_any_flipped_byte_or_missing_tail_of_the_lists_is_noticed(tmp_path: Path) -> None:
    rows, _ = clustered(41, 3, 2, seed=10)
    filled(tmp_path, rows, [[]] * 41)
    path = tmp_path / "lists"
    content = path.read_bytes()
    for i in range(0, len(content), 7):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(ValueError, match=r"checksum|not a file of lists"):
            read_lists(path, GENERATION)
        path.write_bytes(content[:i])
        with pytest.raises(ValueError, match=r"too few|checksum"):
            read_lists(path, GENERATION)
    path.write_bytes(content)
    assert read_lists(path, "c" * 32) is None
    assert read_lists(tmp_path / "absent", GENERATION) is None


def test_lists_that_cannot_be_saved_go_on_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lists").mkdir()
    rows, _ = clustered(90, 5, 3, seed=11)
    with caplog.at_level(logging.WARNING):
        index = filled(tmp_path, rows, [[]] * 90)
    assert "lists could not be saved" in caplog.text
    assert index.nearest(rows[4:5], 1, [], [[9]])[0] == brute_force(rows, [[]] * 90, rows[4], 1, [], [9])
    assert [file.name for file in tmp_path.iterdir()] == ["lists"]


def test_without_faiss_the_bank_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    path = tmp_path / "bank.sqlite"
    with pytest.raises(BankError) as error:
        ExperienceBank(path, lambda texts: np.ones((len(texts), 2)), index="approximate")
    assert str(error.value) == (
        f"{path}: index 'approximate' needs the library faiss, which is not installed; "
        "run `pip install 'latentmem[ann]'`, or take index 'exact'"
    )
    with pytest.raises(ValueError, match="index is 'fast'"):
        ExperienceBank(path, lambda texts: np.ones((len(texts), 2)), index="fast")  # type: ignore[arg-type]
    assert not path.exists()


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_approximate, "_MET_ROWS", 10**6)
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "bank.py"
    out = tmp_path / "results.json"
    arguments = ["--quick", "--sizes", "1200", "--folder", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    figures = json.loads(out.read_text())["1200"]
    assert figures["insert_at_size"].keys() == {"batches_of_16", "batches_of_256"}
    assert figures["first_search"]["approximate_present"]["seconds"] > 0
    assert {name: figures["search"][name]["recall"]["mean"] for name in ("none", "rare")} == {"none": 1, "rare": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
