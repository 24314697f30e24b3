"""The audit log: a chain in which whatever is changed, removed or put in is found."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentmem.errors import AuditError
from latentmem.serving.operators.audit import FIRST, AuditLog, verify


@pytest.fixture
def path(tmp_path):
    return tmp_path / "serve" / "audit.jsonl"


def filled(path, count=5):
    log = AuditLog(path, clock=lambda: 1_700_000_000.0)
    hashes = [log.append("recalled", {"call": f"call-{i}", "sources": ["a", "b"]}) for i in range(count)]
    log.close()
    return hashes


def test_lines_are_numbered_dated_and_chained(path):
    hashes = filled(path, 2)
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {
        "number": 1,
        "time": "2023-11-14T22:13:20.000+00:00",
        "event": "recalled",
        "call": "call-0",
        "sources": ["a", "b"],
        "previous": FIRST,
        "hash": hashes[0],
    }
    assert (second["number"], second["previous"], second["hash"]) == (2, hashes[0], hashes[1])
    found = verify(path)
    assert (found.num_lines, found.last, found.problem) == (2, hashes[1], None)
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_empty_log_is_whole(path):
    AuditLog(path).close()
    assert verify(path).problem is None
    assert verify(path).last == FIRST


@given(data=st.data())
def test_any_change_of_a_byte_is_found(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("audit") / "log"
    filled(path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    new = data.draw(st.integers(0, 255).filter(lambda value: value != content[at]))
    content[at] = new
    path.write_bytes(content)
    assert verify(path).problem is not None


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:2] + rows[3:],
        lambda rows: rows[1:],
        lambda rows: [*rows, rows[2]],
        lambda rows: [rows[1], rows[0], *rows[2:]],
    ],
)
def test_lines_that_are_missing_doubled_or_moved_are_found(path, change):
    filled(path)
    path.write_bytes(b"".join(change(lines_of(path))))
    assert "does not follow the line before it" in verify(path).problem


def test_a_line_that_was_rewritten_with_a_new_hash_breaks_the_next(path):
    filled(path)
    rows = lines_of(path)
    other = path.with_name("other")
    log = AuditLog(other, clock=lambda: 1_700_000_000.0)
    log.append("recalled", {"call": "call-0", "sources": ["c"]})
    log.close()
    path.write_bytes(b"".join([*lines_of(other), *rows[1:]]))
    assert verify(path).problem.startswith("line 2 does not follow")


def test_lines_removed_from_the_end_are_found_by_a_hash_that_was_noted(path):
    hashes = filled(path)
    path.write_bytes(b"".join(lines_of(path)[:3]))
    assert verify(path).problem is None
    assert verify(path, hashes[2]).problem is None
    assert verify(path, hashes[4]).problem == f"no line has the hash {hashes[4]}: lines were removed from the end"


def test_a_line_that_a_killed_process_left_is_dropped_and_told(path):
    filled(path, 2)
    with path.open("ab") as file:
        file.write(b'{"call":"never ackn')
    assert verify(path).problem == "line 3 is cut off"
    log = AuditLog(path)
    log.append("refused", {"status": 401})
    log.close()
    assert verify(path).problem is None
    assert [json.loads(row)["event"] for row in lines_of(path)[2:]] == ["torn line dropped", "refused"]
    assert json.loads(lines_of(path)[2])["bytes"] == 19


def test_a_damaged_end_is_not_gone_on_from(path):
    filled(path, 2)
    path.write_bytes(path.read_bytes() + b"something else\n")
    log = AuditLog(path)
    with pytest.raises(AuditError, match="its last line is damaged; `latentmem audit verify` says which one"):
        log.append("refused", {})
    log.close()


def test_processes_write_one_chain(path):
    script = f"""
from pathlib import Path
from latentmem.serving.operators.audit import AuditLog
log = AuditLog(Path({str(path)!r}))
for i in range(50):
    log.append("recalled", {{"call": str(i)}}, durable=i % 10 == 0)
log.close()
"""
    running = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    found = verify(path)
    assert (found.num_lines, found.problem) == (150, None)


def test_a_full_disk_is_one_line_and_leaves_the_log_whole(path, monkeypatch):
    log = AuditLog(path)
    log.append("recalled", {"call": "1"})

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:7])

        def __getattr__(self, name):
            return getattr(self.file, name)

    whole = log._file
    log._file = Full(whole)
    with pytest.raises(AuditError, match=r"cannot be added to \(No space left on device\)\. Free some space"):
        log.append("recalled", {"call": "2"})
    log._file = whole
    log.append("recalled", {"call": "3"})
    log.close()
    assert verify(path).num_lines == 2
    assert verify(path).problem is None


def test_what_is_durable_is_on_stable_storage_before_it_returns(path, monkeypatch):
    log, synced = AuditLog(path), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_bytes()))
    log.append("recalled", {"call": "1"})
    assert synced == []
    log.append("forgotten", {"count": 3}, durable=True)
    assert synced == [path.read_bytes()]
    log.close()


def test_files_that_are_not_there_or_no_files_are_one_line(tmp_path):
    with pytest.raises(AuditError, match=r"the audit log cannot be read \(No such file or directory\)"):
        verify(tmp_path / "none")
    with pytest.raises(AuditError, match="the audit log cannot be opened"):
        AuditLog(tmp_path)
