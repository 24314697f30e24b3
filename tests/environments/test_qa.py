"""Question answering: what counts as an accepted answer, on rows of our own and on real ones."""

import json
from pathlib import Path

import pytest

from latentmem.config import Rows
from latentmem.environments.qa import QADomain, QAEnvironment, extract, normalise
from latentmem.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def popqa(task_id=1, question="Which genre does Moss Lantern play?", answers=("dub techno",), aliases=("Dub-techno",)):
    return {
        "id": task_id,
        "question": question,
        "possible_answers": json.dumps(answers),
        "o_aliases": json.dumps(aliases),
    }


def triviaqa(task_id="q1", value="Seven", aliases=("7",), normalized=("seven", "7")):
    answer = {"value": value, "aliases": list(aliases), "normalized_aliases": list(normalized)}
    return {"question_id": task_id, "question": "How many locks has the canal of Wend?", "answer": answer}


def domain(tmp_path, schema, train, test):
    rows = {}
    for split, values in (("train", train), ("test", test)):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        rows[split] = Rows(path=str(path))
    return QADomain(schema=schema, **rows)


def score(response, *answers):
    return QAEnvironment(answers=tuple(map(normalise, answers))).step(response)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The   Beatles. ", "beatles"),
        ("An apple a day", "apple day"),
        ("U.S.", "us"),
        ("Spider-Man", "spiderman"),
        ("\u2018Tis", "tis"),
        ("Cafe\u0301", "caf\u00e9"),
        ("theatre", "theatre"),
        ("The The", "the the"),
        ("!!!", "!!!"),
        (" ", ""),
    ],
)
def test_normalisation(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<answer>Paris</answer>", "Paris"),
        ("<answer>Rome</answer> <answer> 'Paris'. </answer>", "Paris"),
        ("Well. The answer is **Paris**. It is in France.", "Paris"),
        ("Answer: Paris\nBecause.", "Paris"),
        ("\n\nParis. It is in France.", "Paris"),
        ("Paris\nRome\nMadrid", "Paris"),
        ("The capital of France is Paris. It was Bourges.", "Paris"),
        ("The capital of France, which is large, is Paris", "Paris"),
        ("What Is Love", "What Is Love"),
        ("<answer> </answer> Paris", None),
        (" \n", None),
    ],
)
def test_one_answer_is_extracted(response, answer):
    assert extract(response) == answer


def test_reward_is_exact_match_and_containing_is_only_recorded():
    right = score("<answer>the dub techno.</answer>", "Dub techno")
    assert (right.reward, right.done) == (1.0, True)
    assert right.info == {"extracted": "the dub techno", "exact_match": True, "contains": True}
    listed = score("<answer>house, dub techno, jazz</answer>", "Dub techno")
    assert listed.reward == 0.0
    assert listed.info == {"extracted": "house, dub techno, jazz", "exact_match": False, "contains": True}
    assert score("<answer>dubious technology</answer>", "dub").info["contains"] is False
    nothing = score("", "x")
    assert (nothing.reward, nothing.info["extracted"]) == (0.0, None)


def test_popqa_rows_become_tasks_with_all_accepted_answers(tmp_path):
    made = domain(tmp_path, "popqa", [popqa(1)], [popqa(2, question="What does Ada Quill do?")])
    (task,) = made.tasks("train")
    assert (task.id, task.domain, task.text) == ("1", "popqa", "Which genre does Moss Lantern play?")
    for accepted in ("dub techno", "Dub-techno"):
        assert made.start(task).step(f"<answer>{accepted}</answer>").reward == 1.0
    assert made.start(task).step("<answer>house</answer>").reward == 0.0


def test_triviaqa_rows_accept_value_and_aliases(tmp_path):
    test = triviaqa("q2") | {"question": "Another?"}
    made = domain(tmp_path, "triviaqa", [triviaqa()], [test])
    (task,) = made.tasks("train")
    assert task.id == "q1"
    assert [made.start(task).step(f"<answer>{a}</answer>").reward for a in ("Seven", "7", "seven", "eight")] == [
        1,
        1,
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("schema", "row", "problem"),
    [
        ("popqa", popqa() | {"possible_answers": "jazz"}, "train.jsonl:1: field 'possible_answers' is 'jazz'"),
        ("popqa", popqa() | {"o_aliases": "[1]"}, "train.jsonl:1: field 'o_aliases': entry 0 is an integer"),
        ("popqa", popqa(answers=(" ",), aliases=()), "train.jsonl:1: no accepted answer"),
        ("popqa", popqa() | {"id": "1"}, "train.jsonl:1: field 'id' is a string; expected an integer"),
        ("popqa", popqa(question=" "), "train.jsonl:1: field 'question' is blank"),
        ("triviaqa", triviaqa() | {"answer": {"value": "x", "aliases": []}}, "answer: no field 'normalized_aliases'"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, schema, row, problem):
    with pytest.raises(DataError) as caught:
        domain(tmp_path, schema, [row], [popqa(9) if schema == "popqa" else triviaqa("q9")]).tasks("train")
    assert problem in str(caught.value)


@pytest.mark.parametrize("schema", ["popqa", "triviaqa"])
def test_every_accepted_alias_of_the_real_rows_scores_1_and_another_rows_answer_0(schema):
    folder = SHARED / schema
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    made = QADomain(
        schema=schema, train=Rows(path=str(folder / "train.jsonl")), test=Rows(path=str(folder / "test.jsonl"))
    )
    values = {}
    for split in ("train", "test"):
        for line in (folder / f"{split}.jsonl").read_bytes().strip().split(b"\n"):
            row = json.loads(line)
            values[str(row["id"] if schema == "popqa" else row["question_id"])] = row
    tasks = made.tasks("train") + made.tasks("test")
    assert len(tasks) == 300
    for task in tasks:
        row = values[task.id]
        if schema == "popqa":
            accepted = [row["obj"], *json.loads(row["possible_answers"]), *json.loads(row["o_aliases"])]
        else:
            accepted = [row["answer"]["value"], *row["answer"]["aliases"], *row["answer"]["normalized_aliases"]]
        environment = made.start(task)
        for answer in accepted:
            assert environment.step(f"I think so. <answer>{answer}</answer>").reward == 1.0, (task.id, answer)
        assert environment.step("<answer>a purple submarine sandwich</answer>").reward == 0.0
        assert environment.step("I do not know.").reward == 0.0
