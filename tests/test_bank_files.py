"""A bank's files as they get damaged, moved, written over, and kept where nothing can be written."""

import gzip
import os
import shutil
import sqlite3
import tempfile
import zlib
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from latentmem import cli
from latentmem.bank import ExperienceBank
from latentmem.errors import BankError, DataError
from latentmem.trajectory import Task
from test_bank import embed, make, sql

QUERY = Task(id=None, domain="sums", text="what else")


@pytest.fixture
def path(tmp_path):
    """A bank of three."""
    file = tmp_path / "bank.sqlite"
    with opened(file) as bank:
        bank.add([make("one"), make("two"), make("three", domain="odds")])
    return file


def opened(path, **options):
    return ExperienceBank(path, embed, embedder="own", **options)


def found(bank):
    return [hit.trajectory.task.text for hit in bank.search(QUERY, k=3)]


# What verify is there for

DAMAGE = [
    ("DROP TABLE roles", [("sqlite", "no table roles")]),
    ("DROP TABLE trajectories", [("sqlite", "no table trajectories")]),
    ("ALTER TABLE trajectories DROP COLUMN team", [("sqlite", "table trajectories has no team")]),
    ("CREATE VIEW extra AS SELECT 1", [("sqlite", "holds the view 'extra', which no bank has")]),
    ("UPDATE trajectories SET vector = 'text' WHERE seq = 2", [("vector", "is of type str, expected bytes")]),
    ("UPDATE trajectories SET json = 'text' WHERE seq = 2", [("json", "damaged")]),
    ("UPDATE trajectories SET json = x'00' WHERE seq = 2", [("json", "damaged")]),
    ("UPDATE trajectories SET team = CAST(x'ff' AS TEXT) WHERE seq = 2", [("columns", "team is '\ufffd'")]),
    ("UPDATE roles SET role = CAST(x'ff' AS TEXT) WHERE seq = 2", [("roles", "roles are ['\ufffd']")]),
    ("UPDATE meta SET value = 'wide' WHERE key = 'width'", [("sqlite", "holds 'wide' as 'width'")]),
    ("UPDATE meta SET value = 'x' WHERE key = 'generation'", [("sqlite", "holds 'x' as 'generation'")]),
    ("DELETE FROM meta WHERE key = 'created'", [("sqlite", "its meta table lacks 'created'")]),
    ("INSERT INTO meta VALUES ('colour', 'red')", []),
]


@pytest.mark.parametrize(("statement", "problems"), DAMAGE, ids=[statement for statement, _ in DAMAGE])
def test_verify_tells_what_is_damaged(path, capsys, statement, problems):
    sql(path, statement)
    with ExperienceBank(path) as bank:
        report = bank.verify()
    assert report.ok == (not problems)
    for kind, said in problems:
        assert any(problem.kind == kind and said in problem.found for problem in report.problems), report.problems
    assert cli.main(["bank", "verify", str(path)]) == (2 if problems else 0)
    assert "Traceback" not in capsys.readouterr().err


def deep(content):
    return content.replace(b'"data":{}', b'"data":' + b'{"a":' * 5000 + b"1" + b"}" * 5000)


def endless(content):
    return content.replace(b'"data":{}', b'"data":{"a":1e999}')


def halved(content):
    return content.replace(b'"text":"two"', b'"text":"\\ud800"')


@pytest.mark.parametrize("damage", [deep, endless, halved])
def test_verify_and_the_others_survive_json_that_cannot_be_read(path, damage, capsys):
    ((stored,),) = sql(path, "SELECT json FROM trajectories WHERE seq = 2")
    content = zlib.decompress(stored)
    assert damage(content) != content
    sql(path, "UPDATE trajectories SET json = ? WHERE seq = 2", zlib.compress(damage(content)))
    with ExperienceBank(path) as bank:
        report = bank.verify()
    assert report.num_checked == 3
    assert [problem.kind for problem in report.problems] == ["json"]
    lines = path.with_name("lines.jsonl")
    lines.write_bytes(damage(content) + b"\n")
    assert cli.main(["bank", "info", str(path)]) == 0
    with opened(path.with_name("fresh.sqlite")) as fresh, pytest.raises(DataError, match=r"lines\.jsonl:1|trajectory "):
        fresh.import_jsonl(lines)


def test_what_a_search_meets_in_a_damaged_record_is_one_line(path):
    sql(path, "UPDATE trajectories SET json = 'text' WHERE seq = 2")
    with opened(path) as bank, pytest.raises(DataError, match="record 2: damaged"):
        bank.search(QUERY, k=3)
    sql(path, "UPDATE trajectories SET vector = 7 WHERE seq = 2")
    path.with_name("bank.sqlite.index").unlink()
    with opened(path) as bank, pytest.raises(BankError, match="record 2: its vector has a int, but width"):
        bank.search(QUERY, k=3)


def test_a_trajectory_that_claims_to_be_huge_is_not_unpacked(path, monkeypatch):
    monkeypatch.setattr("latentmem.bank.stored_form.MAX_BYTES", 100)
    with (
        ExperienceBank(path) as bank,
        pytest.raises(DataError, match=r"record 1: damaged \(cut off, or over 100 bytes\)"),
    ):
        list(bank)


def test_a_file_without_a_banks_tables_is_one_line(path, capsys):
    sql(path, "DROP TABLE meta")
    for command in ("info", "verify", "export"):
        words = ["-"] if command == "export" else []
        assert cli.main(["bank", command, str(path), *words]) == 2
        assert "no such table: meta" in capsys.readouterr().err


def test_a_filter_that_is_no_text_is_one_line(path):
    with (
        ExperienceBank(path) as bank,
        pytest.raises(BankError, match=r"a filter is '\\udcff', which is not valid Unicode"),
    ):
        bank.delete(domain="\udcff")


# Where nothing can be written


@pytest.fixture
def as_nobody():
    """What a superuser may do is not what is tested."""

    @contextmanager
    def as_nobody():
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return as_nobody


@pytest.fixture
def shelf(path):
    """The bank in a folder that everybody may read and nobody write."""
    place = Path(tempfile.mkdtemp())
    shutil.copy(path, place)
    (place / path.name).chmod(0o444)
    place.chmod(0o555)
    yield place / path.name
    place.chmod(0o755)
    shutil.rmtree(place)


def test_a_bank_on_a_shelf_is_read_searched_verified_and_not_added_to(shelf, as_nobody):
    with as_nobody(), opened(shelf) as bank:
        assert sorted(found(bank)) == ["one", "three", "two"]
        assert len(bank) == 3
        assert bank.verify().ok
        with pytest.raises(BankError, match="cannot be written"):
            bank.add(make("four"))
    assert [file.name for file in shelf.parent.iterdir()] == [shelf.name]


def test_a_file_that_cannot_be_written_in_a_folder_that_can_is_read(shelf, as_nobody):
    shelf.parent.chmod(0o777)
    with as_nobody(), ExperienceBank(shelf) as bank:
        assert len(bank) == 3


def test_a_bank_on_a_shelf_with_a_log_beside_it_is_not_read_in_part(path, shelf, as_nobody):
    shelf.parent.chmod(0o777)
    with opened(path) as bank:
        bank.add(make("four"))
        for tail in ("", "-wal"):
            shutil.copy(f"{path}{tail}", f"{shelf}{tail}")
    shelf.chmod(0o444)
    shelf.parent.chmod(0o555)
    with (
        as_nobody(),
        pytest.raises(BankError, match=r"bank\.sqlite-wal holds changes that are not in it yet; copy both files into"),
    ):
        ExperienceBank(shelf)


def test_a_bank_on_a_shelf_can_be_copied(shelf, as_nobody):
    from latentmem.bank.copies import copy_bank

    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o777)
        with as_nobody():
            copy_bank(shelf, Path(place) / "copy.sqlite")
        with ExperienceBank(Path(place) / "copy.sqlite") as bank:
            assert len(bank) == 3


# The index beside it


def cut(index):
    with index.open("r+b") as file:
        file.truncate(100)


def emptied(index):
    index.write_bytes(b"")


def overwritten(index):
    content = index.read_bytes()
    with index.open("r+b") as file:
        file.write(bytes(len(content)))
    os.utime(index, ns=(1, 1))


def fifo(index):
    index.unlink()
    os.mkfifo(index)


def folder(index):
    index.unlink()
    index.mkdir()


def device(index):
    index.unlink()
    index.symlink_to("/dev/zero")


@pytest.mark.timeout(60)  # a search that waits for a FIFO waits for ever
@pytest.mark.parametrize("damage", [cut, emptied, overwritten, fifo, folder, device])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_search_outlives_what_is_done_to_its_index(path, damage, when):
    index = path.with_name("bank.sqlite.index")
    with opened(path) as bank:
        expected = bank.search(QUERY, k=3)
        if when == "meanwhile":
            damage(index)
            assert bank.search(QUERY, k=3) == expected
    if when == "before":
        damage(index)
        with ExperienceBank(path) as bank:
            assert [problem.kind for problem in bank.verify().problems] == ["index"]
    with opened(path) as bank:
        assert bank.search(QUERY, k=3) == expected


@pytest.mark.timeout(60)
def test_a_fifo_in_the_place_of_lists_or_of_a_leftover_is_not_waited_for(path):
    os.mkfifo(path.with_name("bank.sqlite.lists"))
    os.mkfifo(path.with_name(".bank.sqlite.index.0.tmp"))
    with ExperienceBank(path) as bank:
        assert [problem.kind for problem in bank.verify().problems] == ["index"]
    with opened(path) as bank:
        assert len(found(bank)) == 3


# Moved while it is open


def unlinked(path):
    path.unlink()


def renamed(path):
    path.rename(path.with_name("elsewhere.sqlite"))


def replaced(path):
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


def without_log(path):
    path.with_name("bank.sqlite-wal").unlink()


@pytest.mark.parametrize("move", [unlinked, renamed, replaced, without_log])
def test_nothing_is_acknowledged_that_would_be_lost(path, move):
    with opened(path) as bank:
        move(path)
        with pytest.raises(BankError, match="was removed, renamed or replaced while the bank was open"):
            bank.add(make("four"))
        with pytest.raises(BankError, match="was removed, renamed or replaced while the bank was open"):
            bank.delete(everything=True)


def test_a_bank_that_is_moved_while_a_batch_is_written_is_noticed(path, monkeypatch):
    with opened(path) as bank:
        insert = type(bank._records)._check_place
        calls = []

        def late(records):
            insert(records)
            if not calls:
                calls.append(1)
                path.unlink()  # between the last look and the commit

        monkeypatch.setattr(type(bank._records), "_check_place", late)
        with pytest.raises(BankError, match="was removed"):
            bank.add(make("four"))


def test_another_process_that_comes_and_goes_is_no_move(path):
    with opened(path) as bank:
        bank.add(make("four"))
        with opened(path) as other:
            other.add(make("five"))
        with closing(sqlite3.connect(path)) as plain:
            plain.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            plain.execute("VACUUM")
        assert bank.add(make("six")).num_added == 1
        assert len(bank) == 6


# What is imported


def test_an_export_in_another_form_is_called_by_its_name_and_a_mark_is_skipped(path, tmp_path):
    lines = tmp_path / "lines.jsonl"
    with ExperienceBank(path) as bank:
        assert bank.export(lines) == 3
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    lines.write_bytes(b"\xef\xbb\xbf" + lines.read_bytes())
    with opened(tmp_path / "fresh.sqlite") as fresh:
        with pytest.raises(DataError, match=r"lines\.jsonl\.gz: is gzip, not JSON Lines; convert it: gunzip -k "):
            fresh.import_jsonl(tmp_path / "lines.jsonl.gz")
        assert fresh.import_jsonl(lines).num_added == 3
        (tmp_path / "none.jsonl").touch()
        assert fresh.import_jsonl(tmp_path / "none.jsonl").num_added == 0
