"""Question answering: what counts as an accepted answer, on rows of our own and on real ones."""

import json
import re
from pathlib import Path

import pytest

from latentmem.config import Rows
from latentmem.environments.qa import QADomain, QAEnvironment, extract, normalise, plain_number, yes_or_no
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


def strategyqa(qid="s1", question="Can a kettle hold a canal?", answer=False):
    return {"qid": qid, "term": "Kettle", "question": question, "answer": answer, "facts": "one string", "other": None}


def gsm8k(question="Ada has 3 jars of 412 beads. How many beads?", answer="3 * 412 = 1236\n#### 1,236"):
    return {"question": question, "answer": answer}


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
        ("Cafe\u0301", "cafe"),
        ("S\u00f8ren \u0141ukasz", "soren lukasz"),
        ("\u0439 \u0438", "\u0439 \u0438"),
        ("1914\u20131918", "19141918"),
        ("Salt & Lime", "salt and lime"),
        ("AT&T", "att"),
        ("l\u2019Orme \u00abnoir\u00bb", "lorme noir"),
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


def test_the_documents_table_of_what_counts_is_true():
    page = (Path(__file__).resolve().parents[2] / "docs" / "environments.md").read_text()
    rows = re.findall(
        r"^\| `(.+)` \| ([01]) \|$", page[page.index("| response | reward |") :].split("\n\n")[0], re.MULTILINE
    )
    assert len(rows) >= 15
    for response, reward in rows:
        assert score(response, "St. Louis").reward == float(reward), response


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Hedda B. Lund", "Hedda B. Lund"),
        ("The answer is Dr. Ada J. Quill. She was born in Wend.", "Dr. Ada J. Quill"),
        ("Wend, N.Y. is the capital.", "Wend, N.Y"),
        ("E. F. Moss wrote it.", "E. F. Moss"),
        ("It is vitamin C. It helps.", "vitamin C"),
        ("Final Answer: Wend\n\nExplanation: the answer is known to all.", "Wend"),
        ("Answer: Wend\nNote that the answer is old.", "Wend"),
        ("Answer: Let's think. The answer is Wend.", "Wend"),
        ("Wend is the correct answer.", "Wend"),
        ("That was Wend.", "Wend"),
        ("<answer>Wend\nIt is old.", "Wend"),
        ("<answer>Wend - an old town</answer>", "Wend"),
        ("<answer>$\\boxed{\\text{Wend}}$</answer>", "Wend"),
        ("<think>The answer is Rome.</think>\nWend", "Wend"),
        ("<think>Wend", "Wend"),
        ("This Is Wend", "Wend"),
    ],
)
def test_one_answer_is_read_through_what_stands_around_it(response, answer):
    assert extract(response) == answer
    assert score(response, answer).reward == 1.0


def test_a_whole_response_that_is_accepted_counts_whatever_sentence_it_looks_like():
    for title in (
        "This Is Wend",
        "Blue is the Best Colour",
        "Who Killed It? Nobody",
        "Wend - the Opera",
        "If... (song)",
    ):
        assert score(title, title).reward == 1.0
        assert score(f"<answer>{title}</answer>", title).reward == 1.0


def test_two_candidates_are_never_read_out_of_one_response():
    for response in (
        "<answer>Rome, Wend</answer>",
        "<answer>Rome (or Wend)</answer>",
        "Rome or Wend",
        "Rome is the Wend",
        "<answer>Rome. Wend</answer>",
    ):
        assert score(response, "Wend").reward == 0.0, response


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
    ("response", "said"),
    [
        ("<answer>Yes</answer>", "yes"),
        ("<answer>yes</answer> No wait, <answer> **No.** </answer>", "no"),
        ("<answer>False</answer>", "no"),
        ("<answer>No, kettles are small.</answer>", "no"),
        ("<answer>maybe</answer> Yes.", None),
        ("<answer></answer> Yes.", None),
        ("Kettles are small. So the answer is no.", "no"),
        ("The answer is yes. Let me check. Answer: no", "no"),
        ("The answer is that no one knows.\nNo", "no"),
        ("Yes, since water is wet.\nIt is known.", "yes"),
        ("Yes it can", "yes"),
        ("It is small.\nTherefore, no.", "no"),
        ("It is large.\n\n**So yes!**\n", "yes"),
        ("No one has ever done that.", None),
        ("no-one", None),
        ("No - never", "no"),
        ("True love is rare.", None),
        ("yes or no", None),
        ("Yes/No", None),
        ("yes and no", None),
        ("Nothing is known.", None),
        ("It can.", None),
        ("", None),
    ],
)
def test_a_verdict_is_yes_or_no_or_nothing(response, said):
    assert yes_or_no(response) == said


def test_strategyqa_pays_for_the_right_verdict_only(tmp_path):
    test = strategyqa("s2", "Do canals freeze?", True)
    made = domain(tmp_path, "strategyqa", [strategyqa()], [test])
    ((no,), (yes,)) = made.tasks("train"), made.tasks("test")
    assert (no.id, no.domain, no.text, no.data) == (
        "s1", "strategyqa", "Can a kettle hold a canal?", {"answers": ["no"]}
    )  # fmt: skip
    responses = ("<answer>yes</answer>", "<answer>no</answer>", "yes or no", "yes no", "<answer>yes/no</answer>", "Hm.")
    assert [made.start(yes).step(response).reward for response in responses] == [1, 0, 0, 0, 0, 0]
    assert [made.start(no).step(response).reward for response in responses] == [0, 1, 0, 0, 0, 0]
    assert "yes or no" in made.start(yes).instructions


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,236", "1236"), ("2.50", "2.5"), ("$7.00.", "7"), ("-0", "0"), ("100", "100"), ("x", ""), ("1e3", "1000")],
)
def test_numbers_are_compared_by_value(text, number):
    assert plain_number(text) == plain_number(number)
    assert (plain_number(text) == "") == (number == "")


def test_gsm8k_pays_for_the_number_after_the_mark_and_numbers_its_questions_by_content(tmp_path):
    made = domain(tmp_path, "gsm8k", [gsm8k(), gsm8k("And 5 jars of 2?", "#### 10")], [gsm8k("And 1?", "#### 1")])
    task, ten = made.tasks("train")
    assert task.data == {"answers": [" 1,236"]}
    assert task.id != ten.id
    assert task.id == domain(tmp_path, "gsm8k", [gsm8k()], [gsm8k("And 1?", "#### 1")]).tasks("train")[0].id
    for response, reward in [
        ("3 * 412 = 1236", 1),
        ("<answer>$1,236.00</answer>", 1),
        ("#### 1236", 1),
        ("The answer is 1236 beads, as 3 * 400 = 1200.", 0),  # the last number of the mark counts
        ("The answer is 1236 beads. I checked it twice with 3 and 412.", 1),
        ("1236, or 1237", 0),
        ("<answer>none</answer> 1236", 0),
        ("", 0),
    ]:
        assert made.start(task).step(response).reward == reward, response


@pytest.mark.parametrize(
    ("schema", "row", "problem"),
    [
        ("popqa", popqa() | {"possible_answers": "jazz"}, "train.jsonl:1: field 'possible_answers' is 'jazz'"),
        ("popqa", popqa() | {"o_aliases": "[1]"}, "train.jsonl:1: field 'o_aliases': entry 0 is an integer"),
        ("popqa", popqa() | {"o_aliases": None}, "train.jsonl:1: field 'o_aliases' is null"),
        ("popqa", popqa(answers=(" ",), aliases=()), "train.jsonl:1: no accepted answer"),
        ("popqa", popqa() | {"id": "1"}, "train.jsonl:1: field 'id' is a string; expected an integer"),
        ("popqa", popqa(question=" "), "train.jsonl:1: field 'question' is blank"),
        ("triviaqa", triviaqa() | {"answer": {"value": "x", "aliases": []}}, "answer: no field 'normalized_aliases'"),
        ("triviaqa", triviaqa() | {"answer": None}, "train.jsonl:1: field 'answer' is null; expected an object"),
        ("strategyqa", strategyqa() | {"answer": "yes"}, "field 'answer' is a string; expected true or false"),
        ("strategyqa", strategyqa() | {"answer": None}, "field 'answer' is null; expected true or false"),
        ("strategyqa", strategyqa() | {"answer": 1}, "field 'answer' is an integer; expected true or false"),
        ("strategyqa", strategyqa(qid=""), "train.jsonl:1: field 'qid' is blank"),
        ("gsm8k", gsm8k(answer="It is 3."), "train.jsonl:1: no accepted answer"),
        ("gsm8k", gsm8k(answer="#### none"), "train.jsonl:1: no accepted answer"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, schema, row, problem):
    other = {
        "popqa": popqa(9),
        "triviaqa": triviaqa("q9"),
        "strategyqa": strategyqa("s9"),
        "gsm8k": gsm8k("Other?"),
    }[schema]
    with pytest.raises(DataError) as caught:
        domain(tmp_path, schema, [row], [other]).tasks("train")
    assert problem in str(caught.value)


def test_skipped_rows_are_counted_for_each_split(tmp_path):
    for split, rows in (("train", [popqa(1), popqa(1), popqa(2)]), ("test", [popqa(3, "Else?"), popqa("x")])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = {split: Rows(path=str(tmp_path / f"{split}.jsonl"), on_bad_row="skip") for split in ("train", "test")}
    made = QADomain(schema="popqa", **rows)
    assert made.skipped("train") == {"duplicate id": 1}
    assert made.skipped("test") == {"wrong type": 1}
    assert [task.id for task in made.tasks("train")] == ["1", "2"]


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


@pytest.mark.parametrize("schema", ["strategyqa", "gsm8k"])
def test_every_gold_answer_of_the_real_rows_scores_1_and_a_wrong_one_0(schema, shared_dir):
    folder = shared_dir / "data" / schema
    made = QADomain(
        schema=schema, train=Rows(path=str(folder / "train.jsonl")), test=Rows(path=str(folder / "test.jsonl"))
    )
    golds = {}
    for split in ("train", "test"):
        for line in (folder / f"{split}.jsonl").read_bytes().strip().split(b"\n"):
            row = json.loads(line)
            if schema == "strategyqa":
                golds[row["question"].strip()] = ("yes", "no") if row["answer"] else ("no", "yes")
            else:
                gold = row["answer"].split("#### ")[1]
                golds[row["question"].strip()] = (gold, f"{gold}1")
    tasks = made.tasks("train") + made.tasks("test")
    assert len(tasks) == 300
    for task in tasks:
        right, wrong = golds[task.text]
        environment = made.start(task)
        for frame in ("<answer>{}</answer>", "I looked at 2 facts.\nThe answer is {}.", "It follows.\n{}"):
            assert environment.step(frame.format(right)).reward == 1.0, (task.id, frame)
            assert environment.step(frame.format(wrong)).reward == 0.0, (task.id, frame)
        assert environment.step("I do not know.").reward == 0.0
