"""What only a bank on a PostgreSQL server can get wrong: order of commits, connections, texts, rights, passwords."""

import hashlib
import io
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentmem.bank import AddReport, ExperienceBank, bank_exists, copy_records
from latentmem.bank.embedding import unit_vectors
from latentmem.bank.stored_form import encode
from latentmem.bank.tables import record_of
from latentmem.bank_place import Server, bank_place, read_url, without_password
from latentmem.cli import main
from latentmem.config import dump_config, parse_config
from latentmem.errors import BankError, ConfigError
from latentmem.files import cache_folder
from latentmem.trajectory import Message, Recalled, Step, Task, Trajectory
from postgres_server import TestServer, sql


def embed(texts: list[str]) -> np.ndarray:
    rows = [[byte - 128 for byte in hashlib.sha256(text.encode()).digest()[:6]] for text in texts]
    return np.array(rows, dtype=np.float32)


def make(
    text: str, *, role: str = "solver", domain: str = "sums", team: str = "pair", success: bool = True
) -> Trajectory:
    message = Message(
        role=role,
        system="be brief",
        user=text,
        response="said",
        token_ids=(5, 2),
        logps=(-0.25, -1e-7),
        finish="stop",
        temperature=0.7,
        num_prompt_tokens=9,
        recalled=Recalled(kind="none"),
    )
    return Trajectory(
        schema_version=2,
        task=Task(id=text if len(text) % 2 else None, domain=domain, text=text, data={"n": [0.1, 10**30]}),
        team=team,
        model="tiny",
        steps=(Step(messages=(message,), action="said", observation=""),),
        reward=float(success),
        success=success,
        seed=3,
    )


def asked(text: str = "asked") -> Task:
    return Task(id=None, domain="d", text=text)


def texts(bank: ExperienceBank) -> list[str]:
    return [found.trajectory.task.text for found in bank.search(asked(), k=99)]


@pytest.fixture
def url(postgres_server: TestServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LATENTMEM_CACHE", str(tmp_path / "cache"))
    return postgres_server.new_bank()


def end_connections(url: str) -> int:
    """End all sessions but the one that asks."""
    query = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'latentmem'"
    return len(sql(url, query))


# The order of commits


def test_a_record_becomes_visible_after_all_with_smaller_numbers(url: str) -> None:
    with ExperienceBank(url, embed) as bank, ExperienceBank(url, embed) as other, ExperienceBank(url, embed) as reader:
        bank.add(make("first"))
        assert texts(reader) == ["first"]
        late = threading.Thread(target=other.add, args=(make("late"),))
        with bank._records.write() as transaction:
            early = make("early")
            (vector,) = unit_vectors(embed, ["early"], ["early"])
            assert transaction.insert([record_of(early, vector, encode(early))]) == 1
            late.start()
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory'"
            for _ in range(200):
                if sql(url, waiting) == [(1,)] or not late.is_alive():
                    break
                time.sleep(0.02)
            assert texts(reader) == ["first"]  # a writer that did not wait would be seen here, and hide the early one
        late.join()
        assert sorted(texts(reader)) == ["early", "first", "late"]
        assert [t.task.text for t in reader] == ["first", "early", "late"]


def test_a_writer_waits_for_the_other_only_so_long(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExperienceBank(url, embed) as bank, ExperienceBank(url, embed) as other:
        monkeypatch.setattr("latentmem.bank.postgres.BUSY_SECONDS", 0.05)
        with bank._records.write(), pytest.raises(BankError, match="locked by another process for 60 s; end that"):
            other.add(make("a"))
        assert len(other) == 0
        assert other.add(make("a")) == AddReport(1, 0)


def test_a_reader_sees_one_moment(url: str) -> None:
    with ExperienceBank(url, embed) as bank, ExperienceBank(url, embed) as reader:
        bank.add(make("a"))
        with reader._records.read() as snapshot:
            assert snapshot.size() == 1
            bank.add(make("b"))
            bank.delete(domain="sums")
            assert (snapshot.size(), len(snapshot.ids())) == (1, 1)
        assert len(reader) == 0


def test_every_commit_waits_for_the_disk_whatever_the_user_has_set(postgres_server: TestServer, url: str) -> None:
    sql(url, "ALTER ROLE tester SET synchronous_commit TO off")
    try:
        with ExperienceBank(url, embed) as bank, bank._records.write():
            connection = bank._records._connection  # type: ignore[attr-defined]
            assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)
    finally:
        sql(url, "ALTER ROLE tester RESET synchronous_commit")


# Connections


def test_a_connection_that_was_lost_meanwhile_is_made_again(url: str) -> None:
    with ExperienceBank(url, embed) as bank:
        for text in "abc":
            assert bank.add(make(text)) == AddReport(1, 0)
            assert end_connections(url) == 1
        assert sorted(texts(bank)) == ["a", "b", "c"]


def test_a_connection_lost_within_a_transaction_stores_nothing_of_it(url: str) -> None:
    with ExperienceBank(url, embed) as bank:
        bank.add(make("a"))

        def delete_while_cut() -> None:
            with bank._records.write() as transaction:
                transaction.delete(transaction.meeting({"domain": "sums"}))
                end_connections(url)
                transaction.delete(transaction.meeting({"domain": "sums"}))

        with pytest.raises(BankError, match=r"nothing of this was stored; check it and the network, then r") as error:
            delete_while_cut()
        assert "\n" not in str(error.value)
        assert len(bank) == 1


def test_a_connection_lost_while_the_server_saves_is_told_as_what_it_is(url: str) -> None:
    with ExperienceBank(url, embed) as bank:
        sql(
            url,
            "CREATE FUNCTION cut() RETURNS trigger AS 'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); "
            "PERFORM pg_sleep(5); RETURN NULL; END' LANGUAGE plpgsql",
        )
        sql(
            url,
            "CREATE CONSTRAINT TRIGGER cut AFTER INSERT ON trajectories DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION cut()",
        )
        with pytest.raises(
            BankError, match="so this is stored or it is not; repeat it, what is stored is not stored tw"
        ):
            bank.add(make("a"))
        assert [problem.found for problem in bank.verify().problems] == ["holds the trigger 'cut', which no bank has"]
        sql(url, "DROP TRIGGER cut ON trajectories")
        assert bank.add(make("a")) == AddReport(1, 0)
        assert bank.verify().ok


def test_a_child_process_that_ends_leaves_the_connection_to_its_parent(url: str) -> None:
    with ExperienceBank(url, embed) as bank:
        child_id = os.fork()
        if child_id == 0:
            try:
                bank._records._connection = None  # type: ignore[attr-defined]
            finally:
                os._exit(0)
        assert os.waitpid(child_id, 0)[1] == 0
        (before,) = sql(url, "SELECT pid FROM pg_stat_activity WHERE application_name = 'latentmem'")
        bank.add(make("a"))
        assert sql(url, "SELECT pid FROM pg_stat_activity WHERE application_name = 'latentmem'") == [before]


# Texts


def test_text_with_nul_and_text_of_any_length_are_stored_and_found(url: str) -> None:
    noise = "".join(hashlib.sha256(str(i).encode()).hexdigest() for i in range(400))
    batch = [
        make("a\0b\1c\1\1\2", role="r\0", domain="d\0", team="t\1"),
        make("a\1\1b", role="r\1\1", domain="d\1\1", team="t\0"),
        make(noise, role=noise, domain=noise, team=noise),
        make(noise + "x"),
    ]
    with ExperienceBank(url, embed) as bank:
        assert bank.add(batch) == AddReport(4, 0)
        assert list(bank) == batch
        assert bank.verify().ok
        assert bank.info().domains == {"d\0": 1, "d\1\1": 1, noise: 1, "sums": 1}
        assert list(bank.info().roles) == sorted([noise, "r\0", "r\1\1", "solver"])
        for trajectory in batch:
            assert bank.ids_of(trajectory.task) == [trajectory.id]
            found = bank.search(asked(), k=9, domain=trajectory.task.domain, role=trajectory.messages[0].role)
            assert [hit.trajectory for hit in found] == [trajectory]
        assert bank.delete(role="r\0").count == 1
        assert bank.delete(domain=noise, team=noise).count == 1
        assert list(bank) == [batch[1], batch[3]]
        with pytest.raises(BankError, match="which is not valid Unicode"):
            bank.delete(domain="\ud800")


# Copies


def test_copies_between_the_stores_are_the_same_to_the_byte_and_search_alike(url: str, tmp_path: Path) -> None:
    batch = [make(f"text {i} \0", success=i % 3 > 0, domain="ab"[i % 2], role=f"r{i % 5}") for i in range(300)]
    file, back = tmp_path / "bank.sqlite", tmp_path / "back.sqlite"
    with ExperienceBank(file, embed, embedder="mine") as bank:
        bank.add(batch)
        bank.delete(success=False, domain="a")
    assert copy_records(bank_place(file), bank_place(url)) == (250, 0)
    assert copy_records(bank_place(file), bank_place(url)) == (0, 250)
    with ExperienceBank(url) as bank:
        bank.copy_to(back)
    rows, found, lines = [], [], []
    for place in (file, url, back):
        with ExperienceBank(place, embed, embedder="mine") as bank:
            with bank._records.read() as transaction:
                rows.append([record for page in transaction.pages() for record in page])
            hits = bank.search_many([asked(str(i)) for i in range(5)], k=20, success=True)
            found.append([[(hit.trajectory, hit.similarity.hex()) for hit in row] for row in hits])
            stream = io.StringIO(newline="")
            bank.export(stream)
            lines.append(stream.getvalue())
            assert bank.verify().ok
    assert len(rows[0]) == 250
    assert rows[0] == rows[1] == rows[2]
    assert found[0] == found[1] == found[2]
    assert lines[0] == lines[1] == lines[2]
    with ExperienceBank(tmp_path / "other.sqlite", embed, embedder="another") as other:
        other.add(batch[0])
    with pytest.raises(BankError, match=r"by embedder 'another' of width 6, those of .* by 'mine'"):
        copy_records(bank_place(url), bank_place(tmp_path / "other.sqlite"))
    with pytest.raises(BankError, match="no bank there"):
        copy_records(bank_place(tmp_path / "none.sqlite"), bank_place(url))


def test_the_index_is_kept_in_the_cache_of_the_host(url: str) -> None:
    with ExperienceBank(url, embed) as bank:
        bank.add([make(str(i)) for i in range(9)])
        before = bank.search(asked(), k=3)
        (file,) = (cache_folder() / "banks").iterdir()
        content = file.read_bytes()
    with ExperienceBank(url, embed) as bank:
        assert bank.search(asked(), k=3) == before
        assert file.read_bytes() == content
        file.write_bytes(content[:-3])
        assert bank.verify().counts == {"index": 1}
    sql(url, "UPDATE meta SET value = '\"' || repeat('a', 32) || '\"' WHERE key = 'generation'")
    with ExperienceBank(url, embed) as bank:
        assert bank.search(asked(), k=3) == before


# Checks, and what is no bank


@pytest.mark.parametrize(
    ("tamper", "kind"),
    [
        ("UPDATE trajectories SET json = '\\x789c00' WHERE seq = 2", "json"),
        ("UPDATE trajectories SET id = md5('x') WHERE seq = 2", "id"),
        ("UPDATE trajectories SET success = 0 WHERE seq = 2", "columns"),
        ("UPDATE roles SET role = 'other' WHERE seq = 2", "roles"),
        ("UPDATE trajectories SET vector = '\\x0000' WHERE seq = 2", "vector"),
        ("UPDATE trajectories SET vector = (SELECT vector FROM trajectories WHERE seq = 1) WHERE seq = 2", "index"),
        ("ALTER TABLE trajectories DROP COLUMN reward", "postgresql"),
        ("UPDATE meta SET value = '1234' WHERE key = 'generation'", "postgresql"),
    ],
)
def test_verify_names_what_was_tampered_with(url: str, tamper: str, kind: str) -> None:
    with ExperienceBank(url, embed) as bank:
        bank.add([make("1"), make("2"), make("3")])
        texts(bank)
        assert bank.verify().ok
        sql(url, tamper)
        report = bank.verify()
        assert set(report.counts) == {kind}
        assert all("\n" not in problem.found for problem in report.problems)
        if kind == "postgresql":
            with pytest.raises(BankError, match=r"not an experience bank|its meta table holds"):
                bank.add(make("4"))


def test_what_is_no_bank_is_refused_and_left_alone(postgres_server: TestServer, url: str) -> None:
    assert not bank_exists(bank_place(url))
    with pytest.raises(BankError, match="no bank there; check the URL"):
        ExperienceBank(url)
    sql(url, f'CREATE SCHEMA "{read_url(url).name}"')
    assert not bank_exists(bank_place(url))
    sql(url, "CREATE TABLE roles (mine int)")
    for embedder in (embed, None):
        with pytest.raises(BankError, match="holds tables that are not those of a bank; name another with"):
            ExperienceBank(url, embedder)
    sql(url, "DROP TABLE roles")
    with ExperienceBank(url, embed) as bank:  # a schema that was made for it
        bank.add(make("a"))
    assert bank_exists(bank_place(url))
    sql(url, "DROP TABLE meta; CREATE TABLE meta (x int)")
    with pytest.raises(BankError, match="not an experience bank; name another schema"):
        ExperienceBank(url)
    sql(url, "CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0")
    with pytest.raises(BankError, match="with encoding SQL_ASCII; a bank needs"):
        ExperienceBank(url.replace("/postgres?", "/ascii?"), embed)


def test_who_may_only_read_can_read_search_and_verify(url: str) -> None:
    with ExperienceBank(url, embed) as bank:
        bank.add(make("a"))
    name = read_url(url).name
    sql(
        url,
        f'CREATE ROLE reader LOGIN; GRANT USAGE ON SCHEMA "{name}" TO reader; '
        f'GRANT SELECT ON ALL TABLES IN SCHEMA "{name}" TO reader',
    )
    with ExperienceBank(url.replace("tester@", "reader@"), embed) as bank:
        assert texts(bank) == ["a"]
        assert bank.verify().ok
        with pytest.raises(BankError, match="this user lacks a right; grant it"):
            bank.add(make("b"))
        assert len(bank) == 1
    with pytest.raises(BankError, match="this user lacks a right"):
        ExperienceBank(url.replace("tester@", "reader@") + "2", embed)


# Addresses, without a server


def test_a_url_is_taken_apart_and_shown_without_its_passwords() -> None:
    url = (
        "postgresql://me:se%40cret@h1:5432,[::1]:5433/db%2F?password=se%40cret&sslmode=require&bank=mine&sslpassword=x"
    )
    place = bank_place(url)
    assert isinstance(place, Server)
    assert str(place) == "postgresql://me@h1:5432,[::1]:5433/db%2F?sslmode=require&bank=mine"
    assert "cret" not in repr(place) + f"{place}" + without_password(url)
    assert (place.name, "bank" in place.url, "se%40cret" in place.url) == ("mine", False, True)
    assert bank_place(str(place)) == Server(place.shown.replace("&bank=mine", ""), "mine", place.shown)
    assert bank_place("postgres:///") == Server("postgres:///", "latentmem", "postgres:///")
    assert bank_place("bank.sqlite") == Path("bank.sqlite")
    assert without_password("a/b?password=c") == "a/b?password=c"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:se@cret@h/db",
        "postgresql://me:se/cret@h/db",
        "postgresql://me:se?cret@h/db",
        "postgresql://me:se#cret@h/db",
        "postgresql://me:secret@h/db?bank=Mine",
        "postgresql://me:secret@h/db?bank=pg_x",
        "postgresql://me:secret@h/db?bank=a&bank=b",
        "postgresql://me:secret%00@h/db",
    ],
)
def test_a_mistake_in_a_url_is_one_line_without_the_password(url: str) -> None:
    with pytest.raises(BankError, match=r"^the bank's URL (has|holds|needs)") as error:
        bank_place(url)
    assert "cret" not in str(error.value)
    with pytest.raises(ConfigError, match=r"bank\.path (has|holds|needs)") as refused:
        parse_config({"run": "r", "data": {"kind": "hidden_facts"}, "bank": {"path": url}})
    assert "cret" not in str(refused.value)


def test_a_url_given_as_a_path_is_refused() -> None:
    with pytest.raises(BankError, match="was given as a path, which loses a slash"):
        bank_place(Path("postgresql://h/db"))


def test_a_configuration_is_written_down_without_the_password(capsys: pytest.CaptureFixture[str]) -> None:
    url = "postgresql://me:secret@127.0.0.1:1/db?connect_timeout=2"
    config = parse_config({"run": "r", "data": {"kind": "hidden_facts"}, "bank": {"path": url}})
    assert config.bank.path == url
    assert "secret" not in dump_config(config)
    assert "postgresql://me@127.0.0.1:1/db?connect_timeout=2" in dump_config(config)
    if "psycopg" in sys.modules or pytest.importorskip("psycopg"):
        assert main(["bank", "info", url]) == 2
        said = capsys.readouterr().err
        assert said.startswith("latentmem: postgresql://me@127.0.0.1:1/db?connect_timeout=2: cannot be connected to; ")
        assert "secret" not in said
        assert said.count("\n") == 1


def test_without_psycopg_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "latentmem.bank.postgres", raising=False)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "latentmem.bank.postgres_server", raising=False)
    monkeypatch.delattr("latentmem.bank.postgres", raising=False)
    with pytest.raises(BankError, match=r"needs the library psycopg.*pip install 'latentmem\[postgres\]'"):
        ExperienceBank("postgresql://h/db")


# The command line


@pytest.mark.usefixtures("no_embedding_model")
def test_the_commands_take_a_url(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], fake_embed: Any) -> None:
    def run(*arguments: object) -> str:
        assert main(["bank", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    lines = tmp_path / "in.jsonl"
    with ExperienceBank(tmp_path / "a.sqlite", fake_embed, embedder="all-minilm-l6-v2") as bank:
        bank.add([make("one"), make("two", success=False)])
        bank.export(lines)
    assert run("import", url, lines) == "2 trajectories added, 0 were there already\n"
    assert "2 trajectories, 1 successes" in run("info", url)
    assert run("verify", url) == "2 trajectories checked, 0 problems\n"
    assert len(run("search", url, "one or two", "-k", 5).splitlines()) == 2
    assert run("export", url, tmp_path / "out.jsonl").startswith("2 trajectories written to")
    assert (tmp_path / "out.jsonl").read_bytes() == lines.read_bytes()
    assert run("copy", tmp_path / "a.sqlite", url) == f"0 trajectories copied to {url}, 2 were there already\n"
    assert run("copy", url, tmp_path / "b.sqlite").startswith("2 trajectories copied to")
    assert run("delete", url, "--success", "no") == "1 trajectories deleted\n"
    assert main(["bank", "pull", "me/bank", url]) == 2
    assert "pull writes a SQLite file; name one, then" in capsys.readouterr().err
    assert main(["bank", "info", f"{url}x"]) == 2
    assert "no bank there" in capsys.readouterr().err
