"""A corpus file: its rows by position, the bad ones by line, and a change under our hands."""

import gzip
import hashlib
import json
import os

import pytest

from latentmem.errors import DataError
from latentmem.server.corpus import Corpus, Passage


@pytest.fixture
def corpus(tmp_path):
    made = []

    def corpus(*rows, **options):
        path = tmp_path / "corpus.jsonl"
        path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
        made.append(Corpus(path, **options))
        return made[-1]

    yield corpus
    for opened in made:
        opened.close()


GOOD = {"id": "7", "contents": "Door\nRed."}


def test_both_forms_of_rows_are_read(corpus):
    found = corpus(GOOD, b"   \n\n", {"id": 8, "title": "Roof", "text": "Blue.\u2028Flat."}, {**GOOD, "extra": [1]})
    assert len(found) == 3
    assert [found[i] for i in range(3)] == [
        Passage("7", "Door\nRed."),
        Passage(8, '"Roof"\nBlue.\u2028Flat.'),
        Passage("7", "Door\nRed."),
    ]
    with pytest.raises(IndexError):
        found[3]


def test_a_last_line_without_its_end_and_other_separators_are_rows(corpus):
    line = json.dumps({"id": "x", "contents": "a\u2028b\x0bc"}, ensure_ascii=False).encode()
    found = corpus(GOOD, line)
    assert found[1] == Passage("x", "a\u2028b\x0bc")


BAD = [
    (b"{\n", "line 2: not valid JSON"),
    (b"[1]\n", "line 2: expected a JSON object, found a list"),
    (b'{"id": "1", "contents": "\xff"}\n', "line 2: not valid UTF-8"),
    (b'{"id": "1", "contents": "\\ud800"}\n', "line 2: not valid UTF-8"),
    ({"contents": "x"}, "line 2: field 'id' is missing, or neither text nor a whole number"),
    ({"id": True, "contents": "x"}, "line 2: field 'id' is missing, or neither text nor a whole number"),
    ({"id": "1"}, "line 2: no field 'contents'"),
    ({"id": "1", "contents": " "}, "line 2: field 'contents' is blank"),
    ({"id": "1", "contents": ["x"]}, "line 2: field 'contents' is a list; expected a string"),
    ({"id": "1", "title": 7, "text": "x"}, "line 2: field 'title' is an integer; expected a string"),
    ({"id": "1", "title": " ", "text": ""}, "line 2: field 'text' is blank, and there is no title"),
]


@pytest.mark.parametrize(("row", "problem"), BAD, ids=[problem for _, problem in BAD])
def test_a_bad_row_is_named_by_its_line(corpus, row, problem):
    with pytest.raises(DataError) as error:
        corpus(GOOD, row, GOOD)
    line = str(error.value)
    assert "corpus.jsonl: 1 of 3 rows are no passages (" in line
    assert problem in line
    assert line.endswith("mend them, or leave them out with --on-bad-row skip")


def test_many_bad_rows_are_counted_and_the_first_three_named(corpus):
    with pytest.raises(DataError) as error:
        corpus(*[{"id": i} for i in range(5)], GOOD)
    assert "5 of 6 rows are no passages (line 1: no field 'contents'" in str(error.value)
    assert "line 3:" in str(error.value)
    assert "line 4:" not in str(error.value)
    assert "; and 2 more)" in str(error.value)


def test_skipped_rows_are_counted_and_leave_no_gap(corpus):
    found = corpus({"id": 1}, GOOD, b"nonsense\n", {"id": 2, "contents": "x"}, on_bad_row="skip")
    assert (len(found), found.num_bad) == (2, 2)
    assert found.bad_rows.startswith("line 1: no field 'contents'")
    assert found[1] == Passage(2, "x")


def test_files_that_hold_no_passage(tmp_path, corpus):
    with pytest.raises(DataError, match="holds no passage"):
        corpus()
    with pytest.raises(DataError, match="holds no passage"):
        corpus({"id": 1}, on_bad_row="skip")
    with pytest.raises(DataError, match=r"corpsu\.jsonl: no such file; did you mean 'corpus\.jsonl'\?"):
        Corpus(tmp_path / "corpsu.jsonl")
    with pytest.raises(DataError, match="is not a file"):
        Corpus(tmp_path)


def test_identity_is_that_of_the_bytes(corpus):
    found = corpus(GOOD, GOOD)
    content = found.path.read_bytes()
    assert found.identity == {
        "corpus_bytes": len(content),
        "corpus_sha256": hashlib.sha256(content).hexdigest(),
        "num_passages": 2,
    }


def test_a_change_under_our_hands_is_an_error_and_not_another_passage(corpus):
    found = corpus(GOOD, GOOD)
    with found.path.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(DataError, match=r"was changed after it was read; start the retriever again"):
        found[0]


def test_a_file_put_in_its_place_does_not_matter(corpus, tmp_path):
    found = corpus(GOOD)
    (tmp_path / "new.jsonl").write_text(json.dumps({"id": 1, "contents": "other"}))
    (tmp_path / "new.jsonl").rename(found.path)
    assert found[0] == Passage("7", "Door\nRed.")


FORMS = [
    ({"_id": "a", "title": "Roof", "text": "Blue.", "metadata": {}}, Passage("a", '"Roof"\nBlue.')),
    ({"docid": 4, "title": "Roof", "text": "Blue."}, Passage(4, '"Roof"\nBlue.')),
    ({"id": "a", "text": "Blue."}, Passage("a", "Blue.")),
    ({"id": "a", "title": None, "text": "Blue."}, Passage("a", "Blue.")),
    ({"id": "a", "title": " ", "text": "Blue.\nFlat."}, Passage("a", "\nBlue.\nFlat.")),
    ({"id": "a", "title": "Roof\nof tin", "text": "Blue."}, Passage("a", '"Roof of tin"\nBlue.')),
    ({"id": "a", "title": "Roof", "text": ""}, Passage("a", "Roof")),
]


@pytest.mark.parametrize(("row", "passage"), FORMS)
def test_forms_that_people_have(corpus, row, passage):
    assert corpus(row, GOOD)[0] == passage


def test_a_byte_order_mark_belongs_to_no_passage(corpus):
    found = corpus(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n", GOOD)
    assert [found[0], found[1]] == [Passage("7", "Door\nRed.")] * 2


OTHERS = [
    (lambda line: gzip.compress(line), "is gzip, not JSON Lines; convert it: gunzip -k "),
    (lambda line: b"[" + line + b"]", "is a JSON array, not JSON Lines; convert it: jq -c '.[]' "),
    (lambda line: line.decode().encode("utf-16"), "is UTF-16, not JSON Lines; convert it: iconv -f UTF-16 "),
    (lambda line: b"PAR1" + line, "is parquet, not JSON Lines; convert it: python -c"),
    (lambda line: json.dumps(json.loads(line), indent=2).encode(), "is JSON over several lines, not JSON Lines"),
]


@pytest.mark.parametrize(("change", "said"), OTHERS, ids=[said[3:12] for _, said in OTHERS])
def test_another_form_is_called_by_its_name(corpus, change, said):
    with pytest.raises(DataError) as error:
        corpus(change(json.dumps(GOOD).encode()))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.timeout(60)
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "beir").mkdir()
    (tmp_path / "beir" / "corpus.jsonl").touch()
    with pytest.raises(DataError, match="is not a file"):
        Corpus(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"beir: is not a file; did you mean 'corpus\.jsonl'\?"):
        Corpus(tmp_path / "beir")
