"""The experience bank against brute force, kill -9, other processes, full disks and tampered files."""

import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import postgres_server
from latentmem.bank import AddReport, ExperienceBank, Found, bank_exists, exact, reembedding, sqlite_file
from latentmem.bank import bank as bank_module
from latentmem.bank import lists as bank_approximate
from latentmem.bank import matrix as bank_index
from latentmem.bank_place import bank_place
from latentmem.errors import BankError, DataError
from latentmem.trajectory import Message, Origin, Recalled, Step, Task, Trajectory

WIDTH = 6


def embed(texts: list[str]) -> np.ndarray:
    """Small whole numbers, so that different texts often have the very same direction."""
    rows = [[byte % 3 - 1 for byte in hashlib.sha256(text.encode()).digest()[: WIDTH - 1]] for text in texts]
    return np.array([[1, *row] for row in rows], dtype=np.float32)


def make(
    text: str = "text",
    *,
    id_: str | None = None,
    response: str = "said",
    success: bool = True,
    domain: str = "sums",
    roles: tuple[str, ...] = ("solver",),
    team: str = "pair",
    data: dict[str, Any] | None = None,
    observation: str = "",
    version: int = 2,
    origin: Origin | None = None,
) -> Trajectory:
    messages = tuple(
        Message(
            role=role,
            system="be brief",
            user=text,
            response=response,
            token_ids=(5, 2),
            logps=(-0.25, -1e-7),
            finish="stop",
            temperature=0.7,
            num_prompt_tokens=9,
            recalled=Recalled(kind="none"),
        )
        for role in roles
    )
    return Trajectory(
        schema_version=version,
        task=Task(id=id_, domain=domain, text=text, data=data or {}),
        team=team,
        model="tiny",
        steps=(Step(messages=messages, action=response, observation=observation),),
        reward=1.0 if success else 0.25,
        success=success,
        seed=3,
        origin=origin,
    )


def brute_force(stored: list[Trajectory], task: Task, k: int, **filters: Any) -> list[Found]:
    """Loops over everything, exactly rounded sums, one sort."""

    def unit(text: str) -> list[float]:
        row = embed([text])[0].astype(np.float64)
        return [float(np.float32(x)) for x in row / math.sqrt(math.fsum(x * x for x in row))]

    query = unit(task.text)
    found = []
    for seq, t in enumerate(stored):
        wanted = (
            filters.get("success") in (None, t.success)
            and filters.get("domain") in (None, t.task.domain)
            and filters.get("team") in (None, t.team)
            and (filters.get("role") is None or filters["role"] in {m.role for m in t.messages})
        )
        if wanted and not t.task.same_as(task):
            dot = math.fsum(a * b for a, b in zip(unit(t.task.text), query, strict=True))
            found.append((-float(np.float32(dot)), seq, t))
    return [Found(t, -score) for score, _, t in sorted(found, key=lambda row: row[:2])[:k]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bank.sqlite"


Store = Path | str
"""Where a bank is; a text is the URL of one on the tests' own PostgreSQL server."""


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A place for a new bank, in each of the two kinds of store."""
    monkeypatch.setenv("LATENTMEM_CACHE", str(tmp_path / "cache"))
    if request.param == "sqlite":
        return tmp_path / "bank.sqlite"
    return str(request.getfixturevalue("postgres_server").new_bank())


SLOW_STORES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)]


@pytest.fixture(params=["exact", "approximate"])
def index(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both ways of searching; the approximate one with lists from six rows on, all of which are read."""
    monkeypatch.setattr(bank_approximate, "_FEW_ROWS", 5)
    monkeypatch.setattr(bank_approximate, "_FEW_ROWS_PER_K", 0)
    monkeypatch.setattr(bank_approximate, "_LONGEST_TAIL", 4)
    return request.param


def sql(store: Store, statement: str, *values: Any) -> list[Any]:
    if isinstance(store, str):
        return postgres_server.sql(store, statement.replace("?", "%s"), *values)
    db = sqlite3.connect(store)
    try:
        with db:
            return db.execute(statement, values).fetchall()
    finally:
        db.close()


# Search

TEXTS = ["add one", "add two", "take one", "n:1", "é", "nul\0", "nul", "x", "y", "z"]
task_strategy = st.builds(
    Task,
    id=st.sampled_from([None, None, "1", "2", "b:1"]),
    domain=st.sampled_from(["a", "a:b", "c"]),
    text=st.sampled_from(TEXTS),
)
trajectory_strategy = st.builds(
    lambda task, response, success, roles, team: make(
        task.text, id_=task.id, domain=task.domain, response=response, success=success, roles=tuple(roles), team=team
    ),
    task_strategy,
    st.sampled_from("pqrstuv"),
    st.booleans(),
    st.lists(st.sampled_from(["solver", "critic", "judge"]), max_size=3),
    st.sampled_from(["pair", "trio"]),
)
filters_strategy = st.fixed_dictionaries(
    {
        "success": st.sampled_from([None, None, True, False]),
        "domain": st.sampled_from([None, None, "a", "c", "nowhere"]),
        "role": st.sampled_from([None, None, "solver", "judge"]),
        "team": st.sampled_from([None, None, "pair"]),
    }
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(trajectory_strategy, max_size=9), max_size=5),
    st.lists(task_strategy, min_size=1, max_size=4),
    filters_strategy,
    st.integers(1, 8),
    st.booleans(),
)
def test_search_is_brute_force_and_never_returns_the_asked_task(
    batches: list[list[Trajectory]], tasks: list[Task], filters: dict[str, Any], k: int, delete: bool
) -> None:
    stored: dict[str, Trajectory] = {}
    with tempfile.TemporaryDirectory() as folder, ExperienceBank(Path(folder) / "bank", embed) as bank:
        for batch in batches:
            bank.add(batch)
            for trajectory in batch:
                stored.setdefault(trajectory.id, trajectory)
            assert bank.search(tasks[0], k=k) == brute_force(list(stored.values()), tasks[0], k)
        if delete:
            num_failures = sum(not t.success for t in stored.values())
            assert bank.delete(success=False).count == num_failures
            stored = {id_: t for id_, t in stored.items() if t.success}
        found = bank.search_many(tasks, k=k, **filters)
        assert found == [brute_force(list(stored.values()), task, k, **filters) for task in tasks]
        assert not any(f.trajectory.task.same_as(task) for task, row in zip(tasks, found, strict=True) for f in row)
        assert list(bank) == list(stored.values())
        assert bank.verify().ok


@pytest.mark.parametrize(
    ("store", "batch_size"), [*(("sqlite", size) for size in (3, 7, 64, 300)), ("postgresql", 64)], indirect=["store"]
)
def test_search_with_all_filters_is_brute_force_whatever_the_batches(
    store: Store, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr(exact, "_QUERIES_PER_BLOCK", 2)
    rng = random.Random(batch_size)
    everything = [
        make(
            f"{i % 90} plus {i % 7}",
            id_=str(i % 120),
            response=str(i),
            success=rng.random() < 0.6,
            domain=rng.choice("abc"),
            roles=tuple(rng.sample(["solver", "critic", "judge"], rng.randint(1, 3))),
            team=rng.choice(["pair", "trio"]),
        )
        for i in range(300)
    ]
    tasks = [t.task for t in everything[::41]] + [Task(id=None, domain="a", text="3 plus 3")]
    with ExperienceBank(store, embed) as bank:
        for start in range(0, 300, batch_size):
            bank.add(everything[start : start + batch_size])
            if start % 5 == 0:
                bank.search(tasks[0], k=1)
        ways = [(None, True, False), (None, "a"), (None, "judge"), (None, "trio")]
        for success, domain, role, team in itertools.product(*ways):
            filters = {"success": success, "domain": domain, "role": role, "team": team}
            expected = [brute_force(everything, task, 5, **filters) for task in tasks[:3]]
            assert bank.search_many(tasks[:3], k=5, **filters) == expected
        assert [bank.search(task, k=400) for task in tasks] == [brute_force(everything, task, 400) for task in tasks]


def test_the_asked_task_is_excluded_by_id_in_its_domain_and_by_text_where_an_id_is_missing(store: Store) -> None:
    cases = {
        "same id, other text": make("other", id_="7"),
        "same text, other id": make("asked", id_="8"),
        "same id, other domain": make("asked", id_="7", domain="words"),
        "same text, no id": make("asked"),
        "other text, no id": make("other"),
    }
    with ExperienceBank(store, embed) as bank:
        bank.add(list(cases.values()))

        def found(task: Task) -> set[str]:
            ids = {f.trajectory.id for f in bank.search(task, k=9)}
            return {name for name, t in cases.items() if t.id in ids}

        with_id = found(Task(id="7", domain="sums", text="asked"))
        assert with_id == {"same text, other id", "same id, other domain", "other text, no id"}
        assert found(Task(id=None, domain="sums", text="asked")) == {"same id, other text", "other text, no id"}
        # Its key, "text:other", is also the key of a task without id whose text is "other".
        assert found(Task(id="other", domain="text", text="new")) == set(cases)


def test_equal_similarities_come_in_the_order_of_storing(store: Store) -> None:
    batch = [make("same text", id_=str(i), response=str(i)) for i in range(20)]
    with ExperienceBank(store, embed) as bank:
        for trajectory in batch:
            bank.add(trajectory)
        found = bank.search(Task(id="new", domain="sums", text="other text"), k=20)
    assert [f.trajectory for f in found] == batch
    assert len({f.similarity for f in found}) == 1


def test_search_embeds_many_tasks_in_one_call(path: Path) -> None:
    calls: list[list[str]] = []

    def counting(texts: list[str]) -> np.ndarray:
        calls.append(texts)
        return embed(texts)

    with ExperienceBank(path, counting) as bank:
        bank.add([make("x", response="1"), make("x", response="2"), make("y")])
        bank.search_many([Task(id=None, domain="d", text=text) for text in "xyzx"], k=1)
    assert calls == [["x", "y"], ["x", "y", "z"]]


def test_k_below_one_is_refused(path: Path) -> None:
    with ExperienceBank(path, embed) as bank, pytest.raises(ValueError, match="k is 0"):
        bank.search(make().task, k=0)


def test_an_empty_bank_finds_nothing(store: Store) -> None:
    with ExperienceBank(store, embed) as bank:
        assert bank.search(make().task, k=3) == []
        assert bank.search_many([], k=3) == []
        assert (len(bank), list(bank), bank.info().mean_reward) == (0, [], None)


SEARCHER = """
with ExperienceBank(sys.argv[1], embed) as bank:
    for found in bank.search_many([Task(id=None, domain="d", text=text) for text in "xyz"], k=40):
        print([(f.trajectory.id, f.similarity.hex()) for f in found])
"""


CHILD_IMPORTS = """
import hashlib, resource, sys, time
from typing import Any
import numpy as np
from latentmem.bank import ExperienceBank
from latentmem.errors import BankError
from latentmem.trajectory import Message, Origin, Recalled, Step, Task, Trajectory
"""


def child(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A process with `embed` and `make`, handed over as source: importing this file takes a second more."""
    constants = f"WIDTH = {WIDTH}\n"
    source = "\n".join([CHILD_IMPORTS, constants, inspect.getsource(embed), inspect.getsource(make), code])
    return subprocess.Popen(
        [sys.executable, "-c", source, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_search_is_the_same_in_other_processes_and_with_or_without_an_index_file(path: Path) -> None:
    with ExperienceBank(path, embed) as bank:
        bank.add([make(f"text {i % 9}", response=str(i)) for i in range(40)])
    outputs = set()
    for seed in "01":  # the first process writes the index, the second reads it
        process = child(SEARCHER, path, PYTHONHASHSEED=seed)
        outputs.add(process.communicate()[0])
        assert process.returncode == 0
        assert path.with_name("bank.sqlite.index").exists()
    assert len(outputs) == 1


# The index follows the records


def test_what_another_writer_adds_or_deletes_is_seen_by_the_next_search(store: Store, index: Any) -> None:
    batch = [make(f"text {i}", success=i % 2 == 0) for i in range(30)]
    asked = Task(id=None, domain="sums", text="asked")
    with ExperienceBank(store, embed, index=index) as reader, ExperienceBank(store, embed) as writer:
        for i in range(0, 30, 3):
            writer.add(batch[i : i + 3])
            assert reader.search(asked, k=50) == brute_force(batch[: i + 3], asked, 50)
        assert writer.delete(success=True).count == 15
        assert reader.search(asked, k=50) == brute_force(batch[1::2], asked, 50)
        writer.add(batch[:2])
        assert reader.search(asked, k=50) == brute_force([*batch[1::2], batch[0]], asked, 50)


@pytest.mark.parametrize("damage", ["torn", "flipped", "emptied", "foreign", "deleted"])
def test_a_damaged_index_is_rebuilt(
    path: Path, caplog: pytest.LogCaptureFixture, index: Literal["exact", "approximate"], damage: str
) -> None:
    batch = [make(f"text {i}") for i in range(30)]
    asked = Task(id=None, domain="sums", text="asked")
    file = path.with_name("bank.sqlite.index" if index == "exact" else "bank.sqlite.lists")
    with ExperienceBank(path, embed, index=index) as bank:
        bank.add(batch)
        bank.search(asked, k=1)
    content = file.read_bytes()
    damaged = {
        "torn": content[: len(content) // 2],
        "flipped": content[:-9] + bytes([content[-9] ^ 64]) + content[-8:],
        "emptied": b"",
        "foreign": b"not an index at all " * 20,
    }
    file.unlink()
    if damage in damaged:
        file.write_bytes(damaged[damage])
        with ExperienceBank(path) as bank:
            assert bank.verify().counts == {"index": 1}
    with caplog.at_level(logging.WARNING), ExperienceBank(path, embed, index=index) as bank:
        assert bank.search(asked, k=50) == brute_force(batch, asked, 50)
        assert bank.verify().ok
    assert ("rebuilt" in caplog.text) == (damage != "deleted")
    assert file.read_bytes() == content


def test_an_older_copy_of_the_records_does_not_trust_the_newer_index(path: Path, index: Any) -> None:
    asked = Task(id=None, domain="sums", text="asked")
    old, lost, new = ([make(f"{name} {i}") for i in range(10)] for name in ("old", "lost", "new"))
    with ExperienceBank(path, embed) as bank:
        bank.add(old)
    shutil.copy(path, path.with_name("copy"))
    with ExperienceBank(path, embed, index=index) as bank:
        bank.add(lost)
        bank.search(asked, k=1)
    shutil.copy(path.with_name("copy"), path)
    with ExperienceBank(path, embed, index=index) as bank:
        bank.add(new)
        assert bank.verify().counts == {"index": 1 if index == "exact" else 2}
        assert bank.search(asked, k=50) == brute_force(old + new, asked, 50)


def test_an_index_of_other_labels_than_the_columns_is_a_problem(path: Path) -> None:
    with ExperienceBank(path, embed) as bank:
        bank.add([make("1"), make("2", success=False), make("3")])
        bank.search(make("asked").task, k=1)
        assert bank.verify().ok
        file = path.with_name("bank.sqlite.index")
        stored = bank_index.read_matrix(file, sql(path, "SELECT value FROM meta WHERE key = 'generation'")[0][0])
        assert stored is not None
        assert stored.postings["success", 0].tolist() == [1]
        swapped = bank_index.BankIndex(file, sql(path, "SELECT value FROM meta WHERE key = 'generation'")[0][0], WIDTH)
        labels = [[("success", 0)], [("success", 1)], [("success", 1)]]
        swapped.append(stored.seqs.tolist(), np.array(stored.vectors), labels, stored.last_id)
        swapped.save_if_due()
        assert bank.verify().counts == {"index": 1}


def test_several_banks_on_one_path_add_and_search_at_once(store: Store, index: Any) -> None:
    asked = Task(id=None, domain="sums", text="asked")
    ExperienceBank(store, embed).close()

    def work(tag: int) -> None:
        with ExperienceBank(store, embed, index=index) as own:
            for i in range(0, 24, 3):
                own.add([make(f"{tag} {j}", success=j % 2 == 0) for j in range(i, i + 3)])
                stored = [hit.trajectory.task.text for hit in own.search(asked, k=999)]
                assert {f"{tag} {j}" for j in range(i + 3)} <= set(stored)  # its own at least

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(work, tag) for tag in range(3)]:
            future.result()
    with ExperienceBank(store, embed, index=index) as bank:
        everything = list(bank)
        assert len(everything) == 72
        for filters in ({}, {"success": True}):
            assert bank.search(asked, k=20, **filters) == brute_force(everything, asked, 20, **filters)
        assert bank.verify().ok


# Storing


def test_duplicates_are_stored_once_and_the_first_is_kept(store: Store) -> None:
    first = make("a", success=True)
    again = make("a", success=False)  # same task and messages, another reward
    with ExperienceBank(store, embed) as bank:
        assert first.id == again.id
        assert bank.add([first, again, make("b")]) == AddReport(2, 1)
        assert bank.add(again) == AddReport(0, 1)
        assert bank.add([]) == AddReport(0, 0)
        assert bank.get([first.id]) == [first]
        assert len(bank) == 2


def test_the_same_answer_with_other_feedback_is_another_experience(store: Store) -> None:
    told = [make("a", success=False, observation=text) for text in ("", "No.", "No. It is corn.")]
    with ExperienceBank(store, embed) as bank:
        assert bank.add(told) == AddReport(3, 0)
        assert bank.add(told) == AddReport(0, 3)
        assert [found.trajectory for found in bank.search(Task(id=None, domain="sums", text="b"), k=9)] == told


def test_what_was_stored_before_observations_counted_keeps_its_id(store: Store, tmp_path: Path) -> None:
    def id_then(text: str) -> str:
        said = f'["text:{text}",[[["solver","be brief","{text}","said"]]]]'
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    texts = ["a", "b"]
    then = [make("a", observation="No. It is corn.", version=1), make("b", version=1)]
    with ExperienceBank(store, embed) as bank:
        bank.add(then)
    assert sql(store, "SELECT id FROM trajectories ORDER BY seq") == [(id_then(text),) for text in texts]
    with ExperienceBank(store, embed) as bank:
        assert bank.verify().ok
        assert bank.get(map(id_then, texts)) == then
        hits = bank.search_many([Task(id=None, domain="sums", text="c")], k=9)[0]
        assert {hit.trajectory.id for hit in hits} == set(bank.ids())
        bank.export(tmp_path / "then.jsonl")
        assert bank.import_jsonl(tmp_path / "then.jsonl") == AddReport(0, 2)
        now = [make("a", observation="No. It is wheat."), make("b")]  # the second says nothing new
        assert bank.add(now) == AddReport(1, 1)
        assert bank.verify().ok
    with ExperienceBank(tmp_path / "fresh.sqlite", embed) as fresh:
        assert fresh.import_jsonl(tmp_path / "then.jsonl") == AddReport(2, 0)
        assert fresh.ids() == [id_then(text) for text in texts]


def test_get_contains_and_iteration(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "_BATCH_SIZE", 3)
    batch = [make(str(i)) for i in range(10)]
    with ExperienceBank(store, embed) as bank:
        bank.add(batch)
        assert list(bank) == batch
        assert bank.get([batch[7].id, batch[2].id, batch[7].id]) == [batch[7], batch[2], batch[7]]
        assert batch[4].id in bank
        assert "0" * 32 not in bank
        with pytest.raises(BankError, match=r": no trajectory '0000"):
            bank.get([batch[0].id, "0" * 32])


def test_delete_meets_all_filters_and_needs_one(store: Store) -> None:
    batch = [make(str(i), domain="ab"[i % 2], roles=("solver", "judge")[: 1 + i % 3 // 2]) for i in range(12)]
    with ExperienceBank(store, embed) as bank:
        bank.add(batch)
        for arguments in ({}, {"everything": True, "domain": "a"}):
            with pytest.raises(ValueError, match="at least one filter"):
                bank.delete(**arguments)  # type: ignore[arg-type]
        assert bank.delete(domain="a", role="judge").count == 2
        assert [t.task.text for t in bank] == ["0", "1", "3", "4", "5", "6", "7", "9", "10", "11"]
        assert bank.info().roles == {"judge": 2, "solver": 10}
        assert bank.delete(domain="nowhere").count == 0
        assert bank.delete(everything=True).count == 10
        assert sql(store, "SELECT count(*) FROM roles") == [(0,)]
        bank.add(batch[0])
        assert sql(store, "SELECT seq FROM trajectories") == [(13,)]  # numbers are never used twice


def test_info_counts_what_is_there(store: Store) -> None:
    with ExperienceBank(store, embed, embedder="tiny") as bank:
        bank.add([make("1"), make("2", success=False), make("3", domain="b", team="trio", roles=("x", "y", "x"))])
        info = bank.info()
    assert (info.num_trajectories, info.num_successes, info.mean_reward) == (3, 2, 0.75)
    assert (info.domains, info.teams, info.models) == ({"b": 1, "sums": 2}, {"pair": 2, "trio": 1}, {"tiny": 3})
    assert info.roles == {"solver": 2, "x": 1, "y": 1}
    assert (info.embedder, info.width, info.schema_version) == ("tiny", WIDTH, 2)
    assert info.num_bytes >= (store.stat().st_size if isinstance(store, Path) else 3 * 8192)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (make("fine", response="half \ud83d"), r"lone surrogate here: '.*\\ud83d'"),
        (make("text \udc00"), "lone surrogate"),
        (make(data={"x": math.nan}), "cannot be written as JSON"),
        (make(data={"x": json.loads("[" * 230 + "]" * 230)}), "nested deeper than 100 levels"),
    ],
)
def test_a_trajectory_that_could_not_be_read_back_is_refused_with_its_batch(
    store: Store, bad: Trajectory, message: str
) -> None:
    with ExperienceBank(store, embed) as bank:
        with pytest.raises(DataError, match=message) as error:
            bank.add([make("good"), bad])
        assert bad.id in str(error.value)
        assert len(bank) == 0


def test_a_search_for_a_lone_surrogate_is_refused(store: Store) -> None:
    with ExperienceBank(store, embed) as bank, pytest.raises(DataError, match="lone surrogate"):
        bank.search(Task(id=None, domain="d", text="\ud800"), k=1)


# Embedders


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e39])
def test_a_useless_vector_is_refused_by_the_name_of_its_trajectory(store: Store, value: float) -> None:
    def broken(texts: list[str]) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.array([[1, 2] if text == "good" else [value, value] for text in texts]).astype(np.float32)

    bad = make("bad")
    with ExperienceBank(store, broken) as bank:
        with pytest.raises(BankError, match=f"trajectory {bad.id}: .*zero or non-finite"):
            bank.add([make("good"), bad])
        assert len(bank) == 0
        bank.add(make("good"))
        with pytest.raises(BankError, match=r"task 'sums:7': .*zero or non-finite"):
            bank.search(make("bad", id_="7").task, k=1)


def test_a_wrong_shape_is_refused_with_both_shapes(path: Path) -> None:
    bank = ExperienceBank(path, lambda texts: np.ones((1, 4)))
    with bank, pytest.raises(BankError, match=r"shape \[1, 4\] for 2 texts; expected \[2, e\]"):
        bank.add([make("a"), make("b")])


def test_vectors_are_stored_at_unit_length(store: Store) -> None:
    with ExperienceBank(store, lambda texts: np.full((len(texts), 4), 3e-30, dtype=np.float32)) as bank:
        bank.add(make())
        assert bank.search(make("other").task, k=1)[0].similarity == 1
    assert sql(store, "SELECT vector FROM trajectories") == [(np.full(4, 0.5, dtype="<f4").tobytes(),)]


def test_another_embedder_is_refused_until_reembed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reembedding, "BATCH_SIZE", 4)
    batch = [make(str(i)) for i in range(10)]

    def wider(texts: list[str]) -> np.ndarray:
        return np.concatenate([embed(texts)[:, ::-1] * 5, embed(texts)], axis=1)

    with ExperienceBank(store, embed, embedder="first") as old:
        old.add(batch)
        asked = Task(id=None, domain="sums", text="asked")
        before = old.search(asked, k=10)
        with pytest.raises(BankError, match=r"by embedder 'first', but it was opened with 'second'.*bank reembed"):
            ExperienceBank(store, wider, embedder="second")
        with (
            ExperienceBank(store, wider, embedder="first") as bank,
            pytest.raises(BankError, match=r"width 12.*width 6"),
        ):
            bank.search(asked, k=1)
        with ExperienceBank(store) as bank:
            assert bank.reembed(wider, "second") == 10
            assert (bank.info().embedder, bank.info().width) == ("second", 12)
            assert bank.verify().ok
            # Both halves of the new vectors give the old cosine.
            after = bank.search(asked, k=10)
            assert [f.trajectory.id for f in after] == [f.trajectory.id for f in before]
        with pytest.raises(BankError, match="by embedder 'second'"):
            old.add(make("new"))
        with pytest.raises(BankError, match="by embedder 'second'"):
            old.search(asked, k=1)


def test_reembed_takes_what_was_added_while_it_ran(store: Store) -> None:
    with ExperienceBank(store, embed, embedder="first") as other, ExperienceBank(store) as bank:
        other.add([make("1"), make("2")])

        def slow(texts: list[str]) -> np.ndarray:
            if "late" not in texts:
                other.add(make("late"))
            return -embed(texts)

        assert bank.reembed(slow, "second") == 3
        assert bank.verify().ok
    vectors = {np.sign(np.frombuffer(v, dtype="<f4")[0]) for (v,) in sql(store, "SELECT vector FROM trajectories")}
    assert vectors == {-1}


def test_an_emptied_bank_can_take_another_embedder(store: Store) -> None:
    with ExperienceBank(store, embed, embedder="first") as bank:
        bank.add(make())
        bank.delete(everything=True)
    with ExperienceBank(store) as bank:
        assert bank.reembed(lambda texts: np.ones((len(texts), 2)), "second") == 0
        assert bank.info().embedder is None
        bank.add(make())
        assert (bank.info().embedder, bank.info().width) == ("second", 2)


def test_no_lock_is_held_while_the_embedder_runs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_SECONDS", 0.01)
    with ExperienceBank(store, embed) as other:

        def busy(texts: list[str]) -> np.ndarray:
            other.add(make(f"while {texts}"))
            return embed(texts)

        with ExperienceBank(store, busy) as bank:
            bank.add(make("a"))
            bank.search(make("b").task, k=1)
            assert len(bank) == 3


def test_without_an_embedder_a_bank_can_be_read_only(store: Store) -> None:
    with ExperienceBank(store, embed) as bank:
        bank.add(make())
    with ExperienceBank(store) as bank:
        assert list(bank) == [make()]
        assert bank.export(io.StringIO()) == 1
        for call in (lambda: bank.add(make()), lambda: bank.search(make().task, k=1), lambda: bank.import_jsonl("x")):
            with pytest.raises(BankError, match=r": opened without an embedder"):
                call()


# JSON Lines

AWKWARD = [
    "line\u2028and\u2029paragraph",
    "nul \0 inside",
    "emoji \U0001f9ee",
    "\r\n\x85\x1c",
    "\ufeff\uffff",
    '"\\u0041',
]


def test_export_and_import_round_trip_byte_for_byte(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_module, "_BATCH_SIZE", 4)
    batch = [make(text, response=text[::-1], roles=(text,), data={text: [0.1, 10**30, -0.0]}) for text in AWKWARD]
    progress: list[int] = []
    with ExperienceBank(store, embed) as bank:
        bank.add(batch)
        assert bank.export(tmp_path / "out.jsonl") == 6
        stream = io.StringIO(newline="")
        bank.export(stream)
    exported = (tmp_path / "out.jsonl").read_bytes()
    assert exported == "".join(t.to_json() + "\n" for t in batch).encode()
    assert stream.getvalue().encode() == exported
    with ExperienceBank(tmp_path / "new", embed) as bank:
        assert bank.import_jsonl(tmp_path / "out.jsonl", progress.append) == AddReport(6, 0)
        assert bank.import_jsonl(tmp_path / "out.jsonl") == AddReport(0, 6)
        assert bank.verify().ok
        assert list(bank) == batch
        for t in batch:
            assert t not in [f.trajectory for f in bank.search(t.task, k=9)]
        bank.export(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == exported
    assert progress == [4, 6]
    there = {file.name for file in tmp_path.iterdir()} - {"bank.sqlite", "cache"}
    assert there == {"new", "new.index", "out.jsonl"}


def test_a_bad_line_is_named_with_what_was_stored_before(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_module, "_BATCH_SIZE", 2)
    lines = [make(str(i)).to_json() for i in range(5)]
    lines[3] = lines[3].replace('"reward":1.0', '"reward":7.0')
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(lines))
    with ExperienceBank(store, embed) as bank:
        with pytest.raises(DataError, match=r"in\.jsonl:4: reward: .*; lines 1 to 2 are stored") as error:
            bank.import_jsonl(file)
        assert "\n" not in str(error.value)
        assert len(bank) == 2
        file.write_text("\n" + make("x").to_json())
        with pytest.raises(DataError, match=r"in\.jsonl:1: not valid JSON.*; nothing is stored"):
            bank.import_jsonl(file)
        with pytest.raises(DataError, match=r"none\.jsonl: cannot be read \(No such file"):
            bank.import_jsonl(tmp_path / "none.jsonl")


def test_an_export_that_fails_leaves_the_old_file(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("old")
    with ExperienceBank(path, embed) as bank:
        bank.add(make())
        sql(path, "UPDATE trajectories SET json = x'00'")
        with pytest.raises(DataError, match="record 1: damaged"):
            bank.export(target)
        assert target.read_text() == "old"
        with pytest.raises(BankError, match="out/x: the export cannot be written"):
            bank.export(tmp_path / "out" / "x")
        with pytest.raises(BankError, match="over itself"):
            bank.export(path)


def test_every_commit_waits_for_the_disk(path: Path) -> None:
    ExperienceBank(path, embed).close()
    for embedder in (embed, None):  # the journal mode is the file's, the synchronous mode the connection's
        with ExperienceBank(path, embedder) as bank:
            db = bank._records._db
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert db.execute("PRAGMA synchronous").fetchone() == (2,)


# Files that are not what they should be


def test_a_bank_of_a_newer_schema_is_refused_in_one_line(store: Store) -> None:
    ExperienceBank(store, embed).close()
    sql(store, "UPDATE meta SET value = ? WHERE key = 'schema_version'", 3 if isinstance(store, Path) else "3")
    for embedder in (embed, None):
        with pytest.raises(BankError) as error:
            ExperienceBank(store, embedder)
        assert str(error.value) == (
            f"{store}: bank schema 3 is newer than 2, the newest this version reads; upgrade latentmem"
        )


def test_what_is_no_bank_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not a database, but long enough to be taken for one at first sight " * 20)
    other = tmp_path / "other"
    sql(other, "CREATE TABLE mine (x)")
    for file, message in (
        (text, "not a SQLite file"),
        (other, "not an experience bank"),
        (tmp_path, "cannot be opened"),
    ):
        before = file.read_bytes() if file.is_file() else b""
        for embedder in (embed, None):
            with pytest.raises(BankError, match=f"^{file}: .*{message}"):
                ExperienceBank(file, embedder)
        assert (file.read_bytes() if file.is_file() else b"") == before
    with pytest.raises(BankError, match="missing: no bank there"):
        ExperienceBank(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    with pytest.raises(BankError, match="folder cannot be made"):
        ExperienceBank(text / "below", embed)


def test_a_locked_bank_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_SECONDS", 0.01)
    with ExperienceBank(path, embed) as bank:
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(BankError, match=f"^{path}: locked by another process"):
            bank.add(make())
        assert len(bank) == 0  # reading goes on
        holder.close()
        assert bank.add(make()) == AddReport(1, 0)


def test_a_bank_that_cannot_be_written_says_so(path: Path) -> None:
    with ExperienceBank(path, embed) as bank:
        bank._records._db.execute("PRAGMA query_only = ON")  # root may write any file, so permissions cannot be tested
        with pytest.raises(BankError, match=f"^{path}: cannot be written; check the permissions"):
            bank.add(make())


def test_a_full_disk_stores_nothing_of_the_batch_and_loses_nothing_before(path: Path) -> None:
    with ExperienceBank(path, embed) as bank:
        bank.add(make("before"))
        (pages,) = bank._records._db.execute("PRAGMA page_count").fetchone()
        bank._records._db.execute(f"PRAGMA max_page_count = {pages + 3}")
        batch = [make(str(i)) for i in range(100)]
        with pytest.raises(BankError, match=f"^{path}: disk is full, this batch is not stored"):
            bank.add(batch)
        assert list(bank) == [make("before")]
        bank._records._db.execute("PRAGMA max_page_count = 100000")
        assert bank.add(batch) == AddReport(100, 0)
        assert bank.verify().ok


@pytest.mark.parametrize(
    ("tamper", "kind"),
    [
        ("UPDATE trajectories SET json = x'789c00' WHERE seq = 2", "json"),
        ("UPDATE trajectories SET id = hex(randomblob(16)) WHERE seq = 2", "id"),
        ("UPDATE trajectories SET domain = 'other' WHERE seq = 2", "columns"),
        ("UPDATE trajectories SET success = 0 WHERE seq = 2", "columns"),
        ("UPDATE trajectories SET task_text = 'other' WHERE seq = 2", "columns"),
        ("UPDATE roles SET role = 'other' WHERE seq = 2", "roles"),
        ("INSERT INTO roles VALUES (99, 'solver')", "roles"),
        ("UPDATE trajectories SET vector = x'0000' WHERE seq = 2", "vector"),
        ("UPDATE trajectories SET vector = zeroblob(24) WHERE seq = 2", "vector"),
        ("UPDATE trajectories SET vector = (SELECT vector FROM trajectories WHERE seq = 1) WHERE seq = 2", "index"),
    ],
)
def test_verify_names_what_was_tampered_with(path: Path, tamper: str, kind: str) -> None:
    with ExperienceBank(path, embed) as bank:
        bank.add([make("1"), make("2"), make("3")])
        bank.search(make("asked").task, k=1)
    with ExperienceBank(path) as bank:
        assert bank.verify().ok
        sql(path, tamper)
        report = bank.verify()
        assert (report.num_checked, report.counts) == (3, {kind: 1})
        assert report.problems[0].where.startswith(str(path))


def test_verify_notices_json_that_is_not_canonical(store: Store) -> None:
    with ExperienceBank(store, embed) as bank:
        bank.add(make("1"))
        loose = zlib.compress(json.dumps(json.loads(make("1").to_json())).encode())
        sql(store, "UPDATE trajectories SET json = ?", loose)
        assert bank.verify().problems[0].found == "not in canonical form"


def test_verify_reports_a_damaged_database_file(path: Path) -> None:
    with ExperienceBank(path, embed) as bank:
        bank.add([make(str(i), response=os.urandom(300).hex()) for i in range(60)])
    content = bytearray(path.read_bytes())
    content[4096 * 8 : 4096 * 30] = b"\xff" * (4096 * 22)
    path.write_bytes(content)
    with ExperienceBank(path) as bank:
        assert "sqlite" in bank.verify().counts
        with pytest.raises(BankError, match=f"^{path}: damaged; `latentmem bank verify`"):
            list(bank)


# Processes and threads

WRITER = """
path, tag, num_batches, start = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
print("ready", flush=True)
time.sleep(max(0, start - time.time()))
with ExperienceBank(path, embed) as bank:
    for batch in range(num_batches):
        own = [make(f"{tag} {batch} {i}", response="long " * 200) for i in range(5)]
        report = bank.add([*own, make(f"everybody's {batch}")])
        print(batch, report.num_added, flush=True)
"""


def check_whole(bank: ExperienceBank, acknowledged: set[tuple[str, int]]) -> None:
    counts: dict[tuple[str, int], int] = {}
    for trajectory in bank:
        tag, batch, *_ = trajectory.task.text.split()
        if tag != "everybody's":
            counts[tag, int(batch)] = counts.get((tag, int(batch)), 0) + 1
    assert set(counts.values()) <= {5}
    assert acknowledged <= set(counts)


def kill_writers(store: Store, num_kills: int) -> None:
    acknowledged: set[tuple[str, int]] = set()
    rng = random.Random(0)
    for kill in range(num_kills):
        process = child(WRITER, store, f"w{kill}", 10**9, 0)
        assert process.stdout is not None
        for line in itertools.islice(process.stdout, rng.randint(1, 30)):
            if line != "ready\n":
                acknowledged.add((f"w{kill}", int(line.split()[0])))
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        acknowledged |= {(f"w{kill}", int(line.split()[0])) for line in process.stdout if line != "ready\n"}
        process.stdout.close()
        process.wait()
        if bank_exists(bank_place(store)):
            with ExperienceBank(store, embed) as bank:
                check_whole(bank, acknowledged)
    assert acknowledged
    with ExperienceBank(store, embed) as bank:
        assert bank.verify().ok
        assert bank.add(make("after")) == AddReport(1, 0)


@pytest.mark.parametrize("store", SLOW_STORES, indirect=True)
def test_a_killed_writer_loses_nothing_acknowledged_and_leaves_no_half_batch(store: Store) -> None:
    kill_writers(store, 5)


@pytest.mark.slow
def test_thirty_killed_writers_lose_nothing_acknowledged(store: Store) -> None:
    kill_writers(store, 30)


@pytest.mark.parametrize("store", SLOW_STORES, indirect=True)
def test_processes_that_begin_and_fill_one_bank_together_lose_nothing(store: Store) -> None:
    start = time.time() + 1.0
    writers = [child(WRITER, store, f"w{i}", 25, start) for i in range(3)]
    outputs = [writer.communicate()[0].splitlines()[1:] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert sum(int(line.split()[1]) for output in outputs for line in output) == 3 * 25 * 5 + 25
    with ExperienceBank(store, embed) as bank:
        assert len(bank) == 3 * 25 * 5 + 25
        check_whole(bank, {(f"w{i}", batch) for i in range(3) for batch in range(25)})
        assert bank.verify().ok


BEGIN_TOGETHER = """
for number in range(60):
    while time.time() < float(sys.argv[2]) + number * 0.03:
        pass
    ExperienceBank(f"{sys.argv[1]}-{number}.sqlite", embed).close()
"""


def test_processes_that_begin_a_bank_at_the_same_moment_all_get_it(tmp_path: Path) -> None:
    start = time.time() + 3.0
    begun = [child(BEGIN_TOGETHER, tmp_path / "bank", start) for _ in range(4)]
    for one in begun:
        one.communicate(timeout=100)
    assert [one.returncode for one in begun] == [0] * 4


SMALL_DISK = """
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
bank = ExperienceBank(sys.argv[1], embed)
for batch in range(1000):
    try:
        bank.add([make(f"w {batch} {i}", response=str(hash((batch, i))) * 40) for i in range(5)])
    except BankError as error:
        print(error)
        break
    print(batch)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
bank.add([make(f"w 1000 {i}") for i in range(5)])
"""


def test_a_file_that_may_not_grow_is_an_error_and_loses_nothing_acknowledged(path: Path) -> None:
    process = child(SMALL_DISK, path)
    *batches, message = process.communicate()[0].splitlines()
    assert process.returncode == 0
    assert message.startswith(f"{path}: dis")
    assert "this batch is not stored" in message
    with ExperienceBank(path, embed) as bank:
        check_whole(bank, {("w", int(batch)) for batch in [*batches, "1000"]})
        assert len(bank) == 5 * (len(batches) + 1)
        assert bank.verify().ok


NO_ROOM_TO_READ = """
with ExperienceBank(sys.argv[1], embed) as bank:
    bank.add(make("first"))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    ExperienceBank(sys.argv[1])
except BankError as error:
    print(error)
"""


def test_a_disk_too_full_to_read_a_bank_is_named_and_the_bank_is_whole(path: Path) -> None:
    process = child(NO_ROOM_TO_READ, path)
    message = process.communicate()[0].strip()
    assert message.startswith(
        f"{path}: the disk is full; even reading a bank needs 32 kB for bank.sqlite-shm beside it. "
    )
    with ExperienceBank(path) as bank:
        assert len(bank) == 1
        assert bank.verify().ok


def test_threads_share_one_bank(store: Store) -> None:
    with ExperienceBank(store, embed) as bank:

        def work(tag: int) -> None:
            for i in range(20):
                bank.add(make(f"{tag} {i}"))
                assert bank.search(make(f"asked {i}").task, k=1)

        threads = [threading.Thread(target=work, args=(tag,)) for tag in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(bank) == 80
        assert bank.verify().ok


def test_a_forked_child_is_told_to_open_its_own(store: Store) -> None:
    with ExperienceBank(store, embed) as bank:
        child_id = os.fork()
        if child_id == 0:
            try:
                len(bank)
            except BankError as error:
                os._exit(7 if "before a fork" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child_id, 0)[1]) == 7
