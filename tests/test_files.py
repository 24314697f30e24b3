"""What is written is the old or the new as a whole, and a lock is held by one."""

import fcntl
import os
from pathlib import Path

import pytest

from latentmem.files import put_folder, replacing, take, write_atomic


def test_writing_a_file_removes_what_a_killed_process_left_of_it_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    dead, alive, other = (tmp_path / name for name in (".state.json.1.tmp", ".state.json.2.tmp", ".run.json.1.tmp"))
    for file in (dead, alive, other):
        file.write_text("half")
    with alive.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        write_atomic(path, "new")
    assert sorted(os.listdir(tmp_path)) == [".run.json.1.tmp", ".state.json.2.tmp", "state.json"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "index"
    path.write_bytes(b"old")

    def fail_half_way() -> None:
        with replacing(path, durable=durable) as file:
            file.write(b"new")
            assert path.read_bytes() == b"old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["index"]


def test_a_folder_filled_aside_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    folder, aside = tmp_path / "model", tmp_path / "model.partial"
    for path, names in ((folder, "ab"), (aside, "bc")):
        path.mkdir()
        for name in names:
            (path / name).write_text(f"{name} of {path.name}")
    put_folder(aside, folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "b": "b of model.partial",
        "c": "c of model.partial",
    }
    assert os.listdir(tmp_path) == ["model"]


def test_a_lock_is_held_by_one_until_its_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with path.open("ab") as first, path.open("ab") as second:
        assert take(first)
        assert not take(second)
        first.close()
        assert take(second, wait=True)
