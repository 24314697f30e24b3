"""Rows from files: each complaint is one line that names file and row, and nothing is left out unsaid."""

import builtins
import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import sys

import pytest

from latentmem.config import Rows
from latentmem.environments.rows import MAX_FIELD_CHARACTERS, Row, read_tasks, split_tasks
from latentmem.errors import DataError
from latentmem.trajectory import Task


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return Rows(path=str(path))


def complaint(rows):
    with pytest.raises(DataError) as caught:
        read(rows)
    text = str(caught.value)
    assert "\n" not in text
    return text


def read(rows):
    found = []
    read_tasks(rows, lambda row: found.append(row) or Task(id=str(len(found)), domain="d", text="t"))
    return found


def make(row):
    return Task(id=row.text("id"), domain="d", text=row.text("text"))


def pairs(path, *pairs):
    return write(path, *({"id": i, "text": t} for i, t in pairs))


def test_only_a_line_feed_ends_a_row_and_each_row_knows_its_line(tmp_path):
    strange = "one\u2028two\u0085three\x0cfour"
    line = json.dumps({"a": strange}, ensure_ascii=False).encode()
    found = read(write(tmp_path / "x.jsonl", line + b"\r", b"", {"a": "2"}, b""))
    assert [row.values["a"] for row in found] == [strange, "2"]
    assert [row.where for row in found] == [f"{tmp_path / 'x.jsonl'}:1", f"{tmp_path / 'x.jsonl'}:3"]


def test_a_folder_is_read_in_the_order_of_names_up_to_the_limit(tmp_path):
    write(tmp_path / "b.jsonl", {"n": 3}, {"n": 4})
    write(tmp_path / "a.jsonl", {"n": 1}, {"n": 2})
    (tmp_path / "c.txt").write_text("no rows")
    assert [row.values["n"] for row in read(Rows(path=str(tmp_path)))] == [1, 2, 3, 4]
    assert [row.values["n"] for row in read(Rows(path=str(tmp_path), limit=3))] == [1, 2, 3]
    assert [row.values["n"] for row in read(Rows(path=str(tmp_path), skip=1, limit=2))] == [2, 3]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "x.jsonl:2: not valid JSON"),
        (b"[1]", "x.jsonl:2: expected a JSON object, found a list"),
        (b"3", "x.jsonl:2: expected a JSON object, found an integer"),
        (b'{"a": NaN}', "x.jsonl:2: not valid JSON (NaN is not a JSON number)"),
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
    assert "expected at least one row, found none" in complaint(write(tmp_path / "empty.jsonl"))
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


def test_train_tasks_that_occur_in_test_by_id_or_text_are_dropped_and_counted(tmp_path, caplog):
    train = pairs(tmp_path / "train.jsonl", ("1", "one"), ("2", "two"), ("3", "three"))
    test = pairs(tmp_path / "test.jsonl", ("2", "other"), ("9", "three"))
    with caplog.at_level(logging.WARNING):
        tasks = split_tasks(train, test, make).tasks
    assert [task.id for task in tasks["train"]] == ["1"]
    assert [task.id for task in tasks["test"]] == ["2", "9"]
    assert "2 of 3 train tasks also occur in test" in caplog.text


def test_equal_ids_in_one_split_are_named_by_both_rows(tmp_path):
    rows = pairs(tmp_path / "f.jsonl", ("1", "a"), ("2", "b"), ("1", "c"))
    with pytest.raises(DataError, match=r"/f.jsonl:3: id '1' is used already at .*/f.jsonl:1; ids must differ"):
        read_tasks(rows, make)


def test_a_train_split_within_test_is_an_error(tmp_path):
    rows = pairs(tmp_path / "f.jsonl", ("1", "a"))
    with pytest.raises(DataError, match=r"f.jsonl: every train task also occurs in test"):
        split_tasks(rows, rows, make)


BAD_ROWS = [
    # the line, the reason it is counted under, how the complaint goes on after FILE:LINE
    (b'{"id": "x", "text": null}', "null", ": field 'text' is null; expected a string"),
    (b'{"id": "x", "text": 3}', "wrong type", ": field 'text' is an integer; expected a string"),
    (b'{"id": "x", "text": ["a"]}', "wrong type", ": field 'text' is a list; expected a string"),
    (b'{"id": "x"}', "missing field", ": no field 'text'; known: id"),
    (b'{"id": "x", "text": " "}', "blank", ": field 'text' is blank; expected text"),
    (b'{"id": "good", "text": "t"}', "duplicate id", ": id 'good' is used already at"),
    (json.dumps({"id": "x", "text": "a" * 1_000_000}).encode(), "too long",
     ": field 'text' has 1,000,000 characters; expected at most 200,000"),
    (json.dumps({"id": "x" * 1_000_000, "text": "a"}).encode(), "too long", ": field 'id' has 1,000,000 characters"),
    ('{"id": "x", "text": "caf\u00e9"}'.encode("latin-1"), "not UTF-8", ": not valid UTF-8"),
    ('{"id": "x", "text": "caf\u00e9"}'.encode("utf-16"), "not UTF-8", ": not valid UTF-8"),
    (b'{"id": "x", "text": "\\udfff"}', "not UTF-8", ": not valid UTF-8"),
    (b'{"id": "x", "text": "a', "not JSON", ": not valid JSON"),
    (b'["id", "text"]', "not an object", ": expected a JSON object, found a list"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "reason", "problem"), BAD_ROWS, ids=[f"{r}{i}" for i, (_, r, _) in enumerate(BAD_ROWS)]
)
def test_a_bad_row_is_refused_or_skipped_as_the_configuration_says(tmp_path, caplog, line, reason, problem):
    path = tmp_path / "x.jsonl"
    write(path, {"id": "good", "text": "t"}, line, {"id": "fine", "text": "u"})
    with pytest.raises(DataError) as caught:
        read_tasks(Rows(path=str(path)), make)
    assert str(caught.value).startswith(f"{path}:2{problem}")
    assert len(str(caught.value)) < 400
    with caplog.at_level(logging.INFO):
        tasks, skipped = read_tasks(Rows(path=str(path), on_bad_row="skip"), make)
    assert [task.id for task in tasks] == ["good", "fine"]
    assert skipped == {reason: 1}
    each, summary = caplog.messages
    assert each.startswith(f"skipped ({reason}): {path}:2{problem}")
    assert summary.startswith(f"{path}: 1 of 3 rows skipped: 1 {reason} (first: {path}:2{problem}")


def test_skipped_rows_are_counted_by_reason_in_one_warning_and_count_against_the_limit(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    write(path, b"{", {"id": "1", "text": None}, {"id": "2", "text": "t"}, {"id": "3", "text": None}, {"id": "4"})
    with caplog.at_level(logging.WARNING):
        tasks, skipped = read_tasks(Rows(path=str(path), skip=1, limit=3, on_bad_row="skip"), make)
    assert [task.id for task in tasks] == ["2"]
    assert skipped == {"null": 2}
    assert caplog.messages == [
        f"{path}: 2 of 3 rows skipped: 2 null (first: {path}:2: field 'text' is null; expected a string)"
    ]


def test_rows_of_which_none_can_be_used_are_an_error_even_where_bad_ones_are_skipped(tmp_path):
    write(tmp_path / "x.jsonl", b"{", b"}")
    with pytest.raises(DataError, match=r"x.jsonl: expected at least one row, found none that can be used"):
        read_tasks(Rows(path=str(tmp_path / "x.jsonl"), on_bad_row="skip"), make)


def test_a_field_may_be_as_long_as_the_bound_and_unused_ones_longer(tmp_path):
    texts = {"text": "a" * MAX_FIELD_CHARACTERS, "unused": "b" * (MAX_FIELD_CHARACTERS + 1)}
    tasks, _ = read_tasks(write(tmp_path / "x.jsonl", {"id": "1", **texts}), make)
    assert len(tasks[0].text) == MAX_FIELD_CHARACTERS
    row = Row({"l": ["a" * MAX_FIELD_CHARACTERS, "b"]}, "f:1")
    with pytest.raises(DataError, match=r"f:1: field 'l' has 200,001 characters"):
        row.strings("l")


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
    found = read(Rows(hub="some/set", name="v1", split="test", limit=1))
    assert [(row.values, row.where) for row in found] == [({"a": "test"}, "some/set (v1), split test, row 0")]

    with pytest.raises(DataError, match=r"some/set \(v1\), split test, row 1: field 'a' is a string; expected a list"):
        read_tasks(
            Rows(hub="some/set", name="v1", split="test", skip=1), lambda row: Task(id=row.field("a", list), domain="d")
        )

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no route\nto host")

    fake.load_dataset = unreachable
    assert "some/set, split test: cannot be loaded from the hub (no route to host)" in complaint(
        Rows(hub="some/set", split="test")
    )


# Files as people have them

PEOPLE = [
    {"id": "a", "text": "Is 4 even?", "good": True, "rank": 1, "tags": ["x", "y"]},
    {"id": "b", "text": "caf\u00e9 \u2028 line", "good": False, "rank": 2, "tags": []},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PEOPLE)


def saved(folder):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(PEOPLE).save_to_disk(str(folder))


def parquet(path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    pyarrow.write_table(pa.Table.from_pylist(PEOPLE), path)


FILES = {
    "mark.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES.encode()),
    "lines.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "no-ending": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "lines.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES.encode())),
    "lines.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES.encode())),
    "wide.jsonl": lambda path: path.write_bytes(LINES.encode("utf-16")),
    "wide-without-mark.jsonl": lambda path: path.write_bytes(LINES.encode("utf-16-le")),
    "wider.jsonl": lambda path: path.write_bytes(LINES.encode("utf-32")),
    "wide.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode("utf-16"))),
    "array.json": lambda path: path.write_text("\n " + json.dumps(PEOPLE, indent=1)),
    "array.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(PEOPLE).encode())),
    "rows.parquet": parquet,
    "saved": saved,
}


@pytest.mark.parametrize("name", FILES)
def test_rows_are_the_same_in_every_form(tmp_path, name):
    FILES[name](tmp_path / name)
    assert [row.values for row in read(Rows(path=str(tmp_path / name)))] == PEOPLE


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t")])
def test_a_table_of_text_gives_each_field_the_type_that_is_asked_for(tmp_path, name, delimiter, encoding):
    table = io.StringIO()
    writer = csv.DictWriter(table, list(PEOPLE[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(row | {"tags": json.dumps(row["tags"])} for row in PEOPLE)
    (tmp_path / name).write_bytes(table.getvalue().encode(encoding))
    rows = read(Rows(path=str(tmp_path / name)))
    kinds = {"id": str, "text": str, "good": bool, "rank": int, "tags": list}
    assert [{field: row.field(field, kind) for field, kind in kinds.items()} for row in rows] == PEOPLE
    assert rows[0].text("rank") == "1"  # what is asked for as text is text


def test_rows_of_a_table_know_their_lines_and_bad_ones_are_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('id,text\n1,"two\nlines"\n\n2\n3,x,y\n4,\n')
    found = [(row.where, row.text("text")) for row in read(Rows(path=str(path), limit=1))]
    assert found == [(f"{path}:2", "two\nlines")]
    with pytest.raises(DataError, match=r"t\.csv:5: 1 cells, but the first line names 2 fields"):
        read(Rows(path=str(path)))
    tasks, skipped = read_tasks(Rows(path=str(path), on_bad_row="skip"), make)
    assert [task.id for task in tasks] == ["1"]
    assert skipped == {"wrong number of cells": 2, "blank": 1}
    row = read(Rows(path=str(path), skip=3))[0]
    for kind, problem in ((int, "null; expected an integer"), (bool, "null; expected true or false")):
        with pytest.raises(DataError, match=rf"t\.csv:7: field 'text' is {problem}"):
            row.field("text", kind)
    with pytest.raises(DataError, match="field 'id' is an integer; expected true or false"):
        row.field("id", bool)


def test_a_folder_holds_files_of_several_forms_and_a_limit_stops_early(tmp_path):
    parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "c.jsonl").write_text("{")
    (tmp_path / "README.md").write_text("no rows")
    assert [row.values["id"] for row in read(Rows(path=str(tmp_path), limit=4))] == ["a", "b"] * 2
    with pytest.raises(DataError, match=r"c\.jsonl:1: not valid JSON"):
        read(Rows(path=str(tmp_path)))


def packed_cut(content):
    return gzip.compress(content * 100)[:-9]


OTHERS = [
    ("x.jsonl.zst", b"\x28\xb5\x2f\xfd...", "is Zstandard, not JSON Lines; convert it: unzstd "),
    ("x.xlsx", b"PK\x03\x04...", "is a zip archive or an Excel workbook"),
    ("x.arrow", b"ARROW1...", "is an Arrow file"),
    ("x.pkl", b"\x80\x04\x95", "is a Python pickle"),
    ("x.sqlite", b"SQLite format 3\x00", "is an SQLite database"),
    ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS in the place of the file"),
    ("x.jsonl", b"<!DOCTYPE html>", "is a web page or XML"),
    ("x.json", b'{\n  "a": 1\n}', "is JSON over several lines, not JSON Lines; convert it: jq -c . "),
    ("x.json", b'[{"a": 1},', "begins as a JSON array, but is not valid JSON"),
    ("x.json", b"[" * 100_000, "begins as a JSON array, but is not valid JSON"),
    ("x.json", b'[{"a": NaN}]', "begins as a JSON array, but is not valid JSON"),
    ("x.json", b'[{"a": 1}, 7]', "x.json, entry 2: expected a JSON object, found an integer"),
    ("x.json", b'[{"a": "\\ud800"}]', "x.json, entry 1: not valid UTF-8"),
    ("x.json", b'[{"a": "\xff"}]', "begins as a JSON array, but is not valid JSON"),
    ("x.jsonl", b"[1]\n[2]\n", "x.jsonl:1: expected a JSON object, found a list"),
    ("x.parquet", b"PAR1 and no more", "the parquet file cannot be read"),
    ("x.jsonl.gz", packed_cut(LINES.encode()), "x.jsonl.gz: cannot be read"),
    ("x.jsonl.gz", b"\x1f\x8bnot gzip at all", "x.jsonl.gz: cannot be read"),
    ("x.jsonl", "\ufeff{}".encode("utf-16")[:-1], "not valid UTF-16"),
    ("x.csv", b"a,b\n\xff,1\n", "not valid UTF-8"),
    ("x.csv", b"a,a\n1,2\n", "x.csv:1: two columns have one name"),
    ("x.csv", b'a,b\n"1,2\n', "not valid CSV"),
]


@pytest.mark.parametrize(("name", "content", "said"), OTHERS, ids=[said[:40] for _, _, said in OTHERS])
def test_what_is_not_read_is_called_by_its_name(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert said in complaint(Rows(path=str(tmp_path / name)))


def test_folders_of_save_to_disk_that_are_not_read(tmp_path, monkeypatch):
    saved(tmp_path / "both" / "train")
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert "holds several splits of a data set (train); name one of them, such as " in complaint(
        Rows(path=str(tmp_path / "both"))
    )
    for arrow in (tmp_path / "both" / "train").glob("*.arrow"):
        arrow.write_bytes(b"nothing")
    assert "written by save_to_disk, but it cannot be read" in complaint(Rows(path=str(tmp_path / "both" / "train")))


@pytest.mark.parametrize(("name", "missing"), [("rows.parquet", "pyarrow"), ("saved", "datasets")])
def test_without_the_extra_it_is_said_what_to_install(tmp_path, monkeypatch, name, missing):
    FILES[name](tmp_path / name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert "pip install 'latentmem[hub]'" in complaint(Rows(path=str(tmp_path / name)))


def test_text_that_is_none_is_refused_wherever_it_comes_from():
    row = Row({"s": "a\ud800", "l": ["a", "\udfff"]}, "f:7")
    for read, text in [
        (lambda: row.text("s"), "f:7: field 's': not valid UTF-8"),
        (lambda: row.strings("l"), "f:7: field 'l': not valid UTF-8"),
    ]:
        with pytest.raises(DataError) as caught:
            read()
        assert str(caught.value).startswith(text)
