"""Forgetting: what meets the filters and nothing else, no byte of it left, and honest words where that cannot be."""

import io
import json
import random
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import postgres_server
from latentmem import cli
from latentmem.bank import ExperienceBank, Receipt, sqlite
from latentmem.bank import lists as bank_approximate
from latentmem.models.embedder import HashingEmbedder
from latentmem.trajectory import Message, Origin, Recalled, Step, Task, Trajectory

MARK = "quetzalcoatlus"
embed = HashingEmbedder(16)
Store = Path | str
ASKED = Task(id=None, domain="sums", text="which one is asked")


def make(
    text: str,
    tenant: str = "",
    session: str = "s",
    *,
    success: bool = True,
    domain: str = "sums",
    role: str = "solver",
    team: str = "pair",
    task_id: str | None = None,
) -> Trajectory:
    message = Message(
        role=role, system="", user=text, response=f"said {text}", token_ids=(2,), logps=(-0.5,), finish="stop",
        temperature=1.0, num_prompt_tokens=9, recalled=Recalled(kind="none"),
    )  # fmt: skip
    return Trajectory(
        task=Task(id=task_id, domain=domain, text=text),
        team=team,
        model="tiny",
        steps=(Step(messages=(message,), action="said", observation=""),),
        reward=float(success),
        success=success,
        seed=0,
        origin=Origin(tenant=tenant, session=session, is_judged=True) if session else None,
    )


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("LATENTMEM_CACHE", str(tmp_path / "cache"))
    if request.param == "sqlite":
        return tmp_path / "bank.sqlite"
    return str(request.getfixturevalue("postgres_server").new_bank())


def sql(store: Store, statement: str) -> list[Any]:
    if isinstance(store, str):
        return postgres_server.sql(store, statement)
    db = sqlite3.connect(store)
    try:
        with db:
            return db.execute(statement).fetchall()
    finally:
        db.close()


def files_with(folder: Path, text: str) -> list[str]:
    """The files of a folder that hold a text, or the beginning of it."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and text[:10].encode() in p.read_bytes())


def test_each_filter_deletes_what_a_slow_loop_finds(store: Store) -> None:
    rng = random.Random(3)
    everything = [
        make(
            f"text {i}",
            rng.choice(["", "acme", "bolt"]),
            rng.choice(["", "s1", "s2"]),
            success=rng.random() < 0.5,
            domain=rng.choice(["sums", "words"]),
            role=rng.choice(["solver", "critic"]),
            team=rng.choice(["pair", "trio"]),
            task_id=rng.choice([None, "7", "8"]),
        )
        for i in range(60)
    ]

    def origin(trajectory: Trajectory, name: str) -> Any:
        return getattr(trajectory.origin, name) if trajectory.origin else {"tenant": "", "session": None}[name]

    meets: dict[str, Any] = {
        "success": lambda t, value: t.success == value,
        "domain": lambda t, value: t.task.domain == value,
        "role": lambda t, value: value in {m.role for m in t.messages},
        "team": lambda t, value: t.team == value,
        "tenant": lambda t, value: origin(t, "tenant") == value,
        "session": lambda t, value: origin(t, "session") == value,
        "task_id": lambda t, value: t.task.id == value,
        "ids": lambda t, value: t.id in value,
    }
    chosen = [t.id for t in everything[::3]]
    cases: list[dict[str, Any]] = [
        {"success": False}, {"domain": "words"}, {"role": "critic"}, {"team": "trio"}, {"tenant": ""},
        {"tenant": "acme", "session": "s1"}, {"session": "s2"}, {"task_id": "7"}, {"ids": [*chosen, "0" * 32]},
        {"ids": chosen, "success": True}, {"ids": []}, {"tenant": "nobody"},
    ]  # fmt: skip
    with ExperienceBank(store, embed) as bank:
        for filters in cases:
            bank.add(everything)
            assert len(bank) == 60
            before, stored = bank.digest(), list(bank)
            expected = [t.id for t in stored if all(meets[name](t, value) for name, value in filters.items())]
            trial = bank.delete(**filters, dry_run=True)
            assert (trial.ids, trial.count, trial.is_dry_run) == (tuple(expected), len(expected), True)
            assert (bank.digest(), len(bank)) == (before, 60)
            assert bank.forgotten(trial.ids).ok == (not expected)
            bank.search(ASKED, k=3)
            receipt = bank.delete(**filters)
            assert (receipt.ids, receipt.is_dry_run) == (tuple(expected), False)
            assert (receipt.digest_before, receipt.digest_after) == (before, bank.digest())
            assert receipt.filters == filters | ({"ids": sorted(filters["ids"])} if "ids" in filters else {})
            assert receipt.is_erased == isinstance(store, Path)
            kept = [t for t in stored if t.id not in expected]
            assert list(bank) == kept
            assert {hit.trajectory.id for hit in bank.search(ASKED, k=99)} == {t.id for t in kept}
            assert bank.forgotten(expected).ok
            assert bank.verify().ok
        for mistake in ({}, {"everything": True, "tenant": ""}, {"before": datetime(2020, 1, 1)}):
            with pytest.raises(ValueError, match=r"at least one filter|without its zone"):
                bank.delete(**mistake)  # type: ignore[arg-type]


def test_before_asks_when_a_trajectory_was_stored_here(store: Store) -> None:
    with ExperienceBank(store, embed) as bank:
        bank.add([make(text) for text in "abc"])
        sql(store, "UPDATE trajectories SET stored = '2026-01-02T03:04:05+00:00' WHERE seq = 1")
        sql(store, "UPDATE trajectories SET stored = '2026-01-02T03:04:06+00:00' WHERE seq = 2")
        assert bank.delete(before=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)).count == 0
        east = datetime.fromisoformat("2026-01-02T05:04:06+02:00")
        assert bank.delete(before=east).ids == (make("a").id,)
        assert bank.delete(before=datetime.now(UTC) - timedelta(days=1)).ids == (make("b").id,)
        assert bank.delete(before=datetime.now(UTC) + timedelta(days=1)).count == 1


@pytest.mark.parametrize("overwrites", [True, False])  # what it deletes; SQLite is built either way
def test_no_byte_of_what_was_deleted_is_left_in_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrites: bool
) -> None:
    monkeypatch.setattr(bank_approximate, "_FEW_ROWS", 5)
    monkeypatch.setattr(bank_approximate, "_FEW_ROWS_PER_K", 0)
    pytest.importorskip("faiss")
    path, rng = tmp_path / "bank.sqlite", random.Random(0)
    with ExperienceBank(path, embed, index="approximate") as bank:
        bank._records._db.execute(f"PRAGMA secure_delete = {overwrites}")  # type: ignore[attr-defined]
        for part in range(8):
            bank.add(
                [
                    make(
                        f"{rng.random()} {MARK if marked else 'harmless'} {'x' * rng.randrange(400)}",
                        MARK if marked else "acme",
                        f"{MARK if marked else 's'} {rng.randrange(9)}",
                        role=MARK if marked else "solver",
                        task_id=f"{MARK if marked else 'task'} {part} {i}",
                    )
                    for i in range(40)
                    for marked in [rng.random() < 0.2]
                ]
            )
            bank.search(ASKED, k=3)
            if part % 3 == 2:  # pages are joined and split, which leaves copies of rows in between
                bank.delete(ids=rng.sample(bank.ids(), 20))
                bank.search(ASKED, k=3)
        assert "bank.sqlite" in files_with(tmp_path, MARK)
        assert {"bank.sqlite.index", "bank.sqlite.lists"} <= {p.name for p in tmp_path.iterdir()}
        kept = len(bank.seen_by(["acme"]))
        receipt = bank.delete(tenant=MARK)
        assert receipt.is_erased
        assert files_with(tmp_path, MARK) == []
        assert bank.forgotten(receipt.ids).ok
        assert not path.with_name("bank.sqlite.index").exists()
        assert len(bank.search(ASKED, k=999)) == kept
        assert bank.forgotten(receipt.ids).ok
        assert bank.verify().ok
    assert files_with(tmp_path, MARK) == []


def test_bytes_that_another_process_still_reads_are_told_and_removed_by_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlite, "_READERS_SECONDS", 0.01)
    path = tmp_path / "bank.sqlite"
    with ExperienceBank(path, embed) as bank, ExperienceBank(path, embed) as reader:
        bank.add([make(MARK), make("other")])
        with reader._records.read() as snapshot:
            assert snapshot.size() == 2
            receipt = bank.delete(ids=[make(MARK).id])
            assert (receipt.count, receipt.is_erased) == (1, False)
            assert "its bytes are still in the file or its -wal (another process reads it)" in caplog.text
            assert files_with(tmp_path, MARK) != []
        assert bank.delete(ids=[make(MARK).id]).is_erased
        assert files_with(tmp_path, MARK) == []


def test_files_that_another_process_made_of_the_older_state_are_found(tmp_path: Path) -> None:
    path = tmp_path / "bank.sqlite"
    index = path.with_name("bank.sqlite.index")
    with ExperienceBank(path, embed) as bank:
        bank.add([make("a"), make("b")])
        bank.search(ASKED, k=1)
        old = index.read_bytes()
        receipt = bank.delete(ids=[make("a").id])
        assert not index.exists()
        for content, found in ((old, "was made before the last deletion; delete it"), (old[:99], "are too few for")):
            index.write_bytes(content)
            left = bank.forgotten(receipt.ids)
            assert (left.ok, [problem.where for problem in left.problems]) == (False, [str(index)])
            assert found in left.problems[0].found
        bank.search(ASKED, k=1)  # replaces it
        assert bank.forgotten(receipt.ids).ok
        # A record whose roles were left behind, as a database without its foreign keys leaves them.
        sql(path, f"INSERT INTO roles VALUES (1, '{MARK}')")
        assert [problem.kind for problem in bank.forgotten(receipt.ids).problems] == ["roles"]


def test_an_index_that_another_process_writes_during_the_deletion_is_removed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bank.sqlite"
    index = path.with_name("bank.sqlite.index")
    with ExperienceBank(path, embed) as bank:
        bank.add([make("a"), make("b")])
        bank.search(ASKED, k=1)
        old, erase = index.read_bytes(), bank._records.erase
        monkeypatch.setattr(bank._records, "erase", lambda: index.write_bytes(old) and erase())
        receipt = bank.delete(ids=[make("a").id])
        assert not index.exists()
        assert (receipt.is_erased, bank.forgotten(receipt.ids).ok) == (True, True)


def test_a_search_in_another_object_forgets_too(store: Store) -> None:
    with ExperienceBank(store, embed) as bank, ExperienceBank(store, embed) as other:
        bank.add([make("a", "acme"), make("b", "acme"), make("c")])
        assert len(other.search(ASKED, k=9, tenants=["acme"])) == 2
        generation = other.generation()
        bank.add(make("d"))
        assert other.generation() == generation
        bank.delete(ids=[make("a", "acme").id])
        assert other.generation() != generation
        assert [hit.trajectory for hit in other.search(ASKED, k=9, tenants=["acme"])] == [make("b", "acme")]


# The commands


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = cli.main(["bank", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_the_command_lists_deletes_and_writes_a_receipt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, receipt = tmp_path / "bank.sqlite", tmp_path / "receipt.json"
    mine, other = make("a", "acme", "s-17"), make("b")
    with ExperienceBank(path, embed) as bank:
        bank.add([mine, other])
        before = bank.digest()
    status, out = run(capsys, "delete", path, "--tenant", "acme", "--session", "s-17", "--dry-run")
    assert (status, out) == (0, f"{mine.id}\n1 trajectories would be deleted\n")
    nowhere = tmp_path / "none" / "receipt.json"
    status, out = run(capsys, "delete", path, "--tenant", "acme", "--receipt", nowhere)
    assert status == 2
    assert "there is no folder of that name" in out
    assert run(capsys, "delete", path, "--tenant", "acme", "--receipt", receipt) == (0, "1 trajectories deleted\n")
    status, out = run(capsys, "delete", path, "--tenant", "acme", "--receipt", receipt)
    assert (status, "no receipt is overwritten" in out) == (2, True)
    told = json.loads(receipt.read_text())
    assert (told["count"], told["ids"], told["filters"]) == (1, [mine.id], {"tenant": "acme"})
    assert (told["digest_before"], told["is_erased"], told["is_dry_run"]) == (before, True, False)
    assert run(capsys, "delete", path, "--older-than", "1") == (0, "0 trajectories deleted\n")
    assert run(capsys, "delete", path, "--id", other.id, "--id", "x", "--task-id", "9")[1] == "0 trajectories deleted\n"
    status, out = run(capsys, "delete", path, "--older-than", "1e30")
    assert (status, "is before all time" in out) == (2, True)
    assert run(capsys, "delete", path)[0] == 2
    status, out = run(capsys, "info", path)
    assert "tenants" not in out
    assert run(capsys, "delete", path, "--tenant", "") == (0, "1 trajectories deleted\n")


def test_the_commands_look_at_one_tenant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, lines = tmp_path / "bank.sqlite", tmp_path / "lines.jsonl"
    hashing = HashingEmbedder()
    with ExperienceBank(path, hashing) as bank:
        bank.add([make("a", "acme"), make("b")])
    assert "tenants: (common pool) 1, acme 1\n" in run(capsys, "info", path)[1]
    assert make("a", "acme").id in run(capsys, "search", path, "text", "--tenant", "acme")[1]
    assert make("b").id not in run(capsys, "search", path, "text", "--tenant", "acme")[1]
    assert run(capsys, "export", path, lines, "--tenant", "acme")[1].startswith("1 trajectories")
    assert lines.read_text() == make("a", "acme").to_json() + "\n"


def test_the_command_reembeds_and_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bank.sqlite"
    with ExperienceBank(path, embed, embedder="older") as bank:
        bank.add([make(str(i)) for i in range(5)])
    assert cli.main(["bank", "reembed", str(path), "--embedder", "hashing"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "5 trajectories embedded with hashing\n"
    assert "5/5" in captured.err
    with ExperienceBank(path, HashingEmbedder()) as bank:
        assert len(bank.search(ASKED, k=9)) == 5
        assert bank.verify().ok


def test_a_receipt_is_json_in_which_the_bank_has_no_password(postgres_server: Any, tmp_path: Path) -> None:
    url = postgres_server.new_bank().replace("tester@", "tester:hunter2@")
    with ExperienceBank(url, embed) as bank:
        bank.add(make("a"))
        receipt = bank.delete(everything=True)
    assert isinstance(receipt, Receipt)
    assert json.loads(receipt.to_json())["count"] == 1
    assert "hunter2" not in receipt.to_json()
    assert io.StringIO(receipt.to_json()).readline() == "{\n"
