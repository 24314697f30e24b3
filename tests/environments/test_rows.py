"""Rows from files: each complaint is one line that names file and row, and nothing is left out unsaid."""

import builtins
import json
import logging

import pytest

from latentmem.config import Rows
from latentmem.environments.rows import Row, read_rows, split_tasks
from latentmem.errors import DataError
from latentmem.trajectory import Task


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return Rows(path=str(path))


def complaint(rows):
    with pytest.raises(DataError) as caught:
        read_rows(rows)
    text = str(caught.value)
    assert "\n" not in text
    return text


def make(row):
    return Task(id=row.text("id"), domain="d", text=row.text("text"))


def rows_of(*pairs, name="f"):
    return [Row({"id": i, "text": t}, f"{name}:{n}") for n, (i, t) in enumerate(pairs, start=1)]


def test_only_a_line_feed_ends_a_row_and_each_row_knows_its_line(tmp_path):
    strange = "one\u2028two\u0085three\x0cfour"
    line = json.dumps({"a": strange}, ensure_ascii=False).encode()
    found = read_rows(write(tmp_path / "x.jsonl", line + b"\r", b"", {"a": "2"}, b""))
    assert [row.values["a"] for row in found] == [strange, "2"]
    assert [row.where for row in found] == [f"{tmp_path / 'x.jsonl'}:1", f"{tmp_path / 'x.jsonl'}:3"]


def test_a_folder_is_read_in_the_order_of_names_up_to_the_limit(tmp_path):
    write(tmp_path / "b.jsonl", {"n": 3}, {"n": 4})
    write(tmp_path / "a.jsonl", {"n": 1}, {"n": 2})
    (tmp_path / "c.txt").write_text("no rows")
    assert [row.values["n"] for row in read_rows(Rows(path=str(tmp_path)))] == [1, 2, 3, 4]
    assert [row.values["n"] for row in read_rows(Rows(path=str(tmp_path), limit=3))] == [1, 2, 3]
    assert [row.values["n"] for row in read_rows(Rows(path=str(tmp_path), skip=1, limit=2))] == [2, 3]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "x.jsonl:2: not valid JSON"),
        (b"[1]", "x.jsonl:2: expected a JSON object, found a list"),
        (b"3", "x.jsonl:2: expected a JSON object, found an integer"),
        (b'{"a": NaN}', "x.jsonl:2: not valid JSON (NaN is no JSON number)"),
        (b'{"a": "\xff"}', "x.jsonl:2: not valid UTF-8"),
        (b'{"a": "\\ud800"}', "x.jsonl:2: not valid UTF-8"),
        (b"[" * 100_000, "x.jsonl:2: not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    assert problem in complaint(write(tmp_path / "x.jsonl", {"a": 1}, line))


def test_missing_and_empty_sources_are_named_with_the_nearest_name(tmp_path):
    write(tmp_path / "train.jsonl", {"a": 1})
    assert "did you mean 'train.jsonl'?" in complaint(Rows(path=str(tmp_path / "trian.jsonl")))
    assert "does not exist either" in complaint(Rows(path=str(tmp_path / "nowhere" / "train.jsonl")))
    assert "holds no row" in complaint(write(tmp_path / "empty.jsonl"))
    (tmp_path / "folder").mkdir()
    assert "holds no .jsonl file" in complaint(Rows(path=str(tmp_path / "folder")))


def test_fields_are_checked_for_presence_and_type():
    row = Row({"n": True, "s": " ", "l": ["a", 1], "none": None}, "f:7")
    for read, text in [
        (lambda: row.field("m", int), "f:7: no field 'm'"),
        (lambda: row.field("n", int), "f:7: field 'n' is true or false; expected an integer"),
        (lambda: row.field("none", str), "f:7: field 'none' is null; expected a string"),
        (lambda: row.text("s"), "f:7: field 's' is blank"),
        (lambda: row.strings("l"), "f:7: field 'l': entry 1 is an integer; expected a string"),
    ]:
        with pytest.raises(DataError) as caught:
            read()
        assert str(caught.value).startswith(text)


def test_train_tasks_that_occur_in_test_by_id_or_text_are_dropped_and_counted(caplog):
    train = rows_of(("1", "one"), ("2", "two"), ("3", "three"))
    test = rows_of(("2", "other"), ("9", "three"))
    with caplog.at_level(logging.WARNING):
        tasks = split_tasks(train, test, make)
    assert [task.id for task in tasks["train"]] == ["1"]
    assert [task.id for task in tasks["test"]] == ["2", "9"]
    assert "2 of 3 train tasks also occur in test" in caplog.text


def test_equal_ids_in_one_split_are_named_by_both_rows():
    with pytest.raises(DataError, match=r"^f:3: id '1' stands already at f:1"):
        split_tasks(rows_of(("1", "a"), ("2", "b"), ("1", "c")), rows_of(("9", "z")), make)


def test_a_train_split_within_test_is_an_error():
    with pytest.raises(DataError, match="every train task also occurs in test"):
        split_tasks(rows_of(("1", "a")), rows_of(("1", "a")), make)


def test_the_hub_without_the_extra_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    assert "pip install 'latentmem[hub]'" in complaint(Rows(hub="some/set", split="test"))


def test_hub_rows_are_read_and_an_unreachable_hub_is_one_line(monkeypatch):
    import sys
    import types

    class DatasetsError(Exception):
        pass

    fake = types.ModuleType("datasets")
    fake.exceptions = types.SimpleNamespace(DatasetsError=DatasetsError)
    fake.load_dataset = lambda hub, name, split: [{"a": split}, {"a": hub}]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = read_rows(Rows(hub="some/set", name="v1", split="test", limit=1))
    assert [(row.values, row.where) for row in found] == [({"a": "test"}, "some/set (v1), split test, row 0")]

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no route\nto host")

    fake.load_dataset = unreachable
    assert "some/set, split test: cannot be loaded from the hub (no route to host)" in complaint(
        Rows(hub="some/set", split="test")
    )
