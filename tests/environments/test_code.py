"""Programming tasks: which code is taken from a response, and that only passing all tests is success."""

import ast
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from latentmem.config import Rows, SandboxSection
from latentmem.environments.code import domain as module
from latentmem.environments.code.domain import CodeDomain
from latentmem.environments.code.extraction import complete, extract_code
from latentmem.environments.code.judging.inside import sign
from latentmem.environments.code.request import TaskTests, ended_early, needs_one_process, signed_verdict
from latentmem.environments.sandbox.sandbox import Sandbox, SandboxResult
from latentmem.errors import DataError, SandboxError
from latentmem.trajectory import Task

GOLD = {
    "humaneval": "canonical_solution",
    "mbpp": "code",
    "kodcode": "solution",
    "bigcodebench": "canonical_solution",
}
# None of these is given a real confinement: the sandbox has its own tests, and this code is ours.
UNCONFINED = SandboxSection(level="none", timeout_seconds=20.0)

PROMPT = (
    'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef quarter(x):\n    """A fourth of x, rounded down."""\n'
)


def humaneval(task_id="Own/1"):
    test = "def check(candidate):\n    assert candidate(9) == 2\n    assert candidate(4) == 1\n"
    return {"task_id": task_id, "prompt": PROMPT, "entry_point": "quarter", "test": test}


def mbpp(task_id=1, tests=("assert LIMIT == 3", "assert twice(2) == 4", "assert twice(-1) == -2")):
    return {"task_id": task_id, "text": "Double it.", "test_list": list(tests), "test_setup_code": "LIMIT = 3"}


def kodcode(test, question_id="own_1", declarations=("def twice(x):",)):
    info = [{"function_declaration": d, "function_name": d[4:].partition("(")[0]} for d in declarations]
    return {"question_id": question_id, "question": "Double it.", "test": test, "test_info": info}


def bigcodebench(task_id="BigCodeBench/own", wish="Twice x, as text."):
    begin = "import json\nSIGN = 1\n\ndef task_func(x):\n"
    test = (
        "import unittest\nclass TestCases(unittest.TestCase):\n"
        "    def test_two(self):\n        self.assertEqual(task_func(2), '4')\n"
        "    def test_three(self):\n        self.assertEqual(task_func(3), '6')\n"
    )
    return {
        "task_id": task_id,
        "complete_prompt": f'{begin}    """{wish}"""\n',
        "instruct_prompt": f"{wish}\nYou should write self-contained code starting with:\n```\n{begin}```",
        "code_prompt": begin,
        "test": test,
        "entry_point": "task_func",
        "libs": "['json']",
    }


def domain(tmp_path, schema, rows, sandbox=UNCONFINED, **options):
    paths = {"train": tmp_path / "train.jsonl", "test": tmp_path / "test.jsonl"}
    other = {
        "humaneval": humaneval("Own/test"),
        "mbpp": mbpp(99) | {"text": "Other."},
        "kodcode": kodcode("def test_it(): pass", "other") | {"question": "Other."},
        "bigcodebench": bigcodebench("BigCodeBench/other", "Thrice x."),
    }[schema]
    if schema == "humaneval":
        other["prompt"] = other["prompt"].replace("fourth", "quarter")
    for split, values in (("train", rows), ("test", [other])):
        paths[split].write_text("".join(json.dumps(value) + "\n" for value in values))
    return CodeDomain(
        schema=schema,
        train=Rows(path=str(paths["train"])),
        test=Rows(path=str(paths["test"])),
        sandbox=sandbox,
        **options,
    )


def play(tmp_path, schema, row, response, sandbox=UNCONFINED):
    made = domain(tmp_path, schema, [row], sandbox)
    (task,) = made.tasks("train")
    return made.start(task).step(response)


def fenced(text):
    return f"Here it is.\n```python\n{text}\n```\nDone."


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```python\ndef f(): pass\n```\nUse it:\n```python\nprint(f())\n```", "def f(): pass\n"),
        ("```python\ndef f(): return 1\n```\nBetter:\n```python\ndef f(): return 2\n```", "def f(): return 2\n"),
        ("```\ndef f(): pass\n```\n```python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```\n```\nlonger = 1\n```", "longer = 1\n"),
        ("```\n\n```python\ndef f(): pass\n```", "def f(): pass\n"),
        ("```python\ndef f(): pass\n```python\nx = 1\n```", "def f(): pass\n"),
        ("```python\ndef f(): pass\n```.\nUse it.\n```\nf()\n```", "def f(): pass\n"),
        ("```Python\ndef f(): pass", "def f(): pass"),
        ("<answer>def f(): pass</answer>", "def f(): pass"),
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("x = 1", None),
        ("I would write def f", None),
        ("```python\n```", None),
        ("", None),
    ],
)
def test_one_piece_of_code_is_extracted(response, code):
    assert extract_code(response) == code


def test_an_escape_that_python_warns_of_is_no_syntax_error():
    assert extract_code('def f():\n    return "\\d"') == 'def f():\n    return "\\d"'


def test_a_bare_body_is_code_only_where_a_prompt_begins_the_function():
    assert extract_code("    return x // 4", bare_body=True) == "    return x // 4"
    assert extract_code("    return x // 4") is None
    assert extract_code("I return x", bare_body=True) is None


@pytest.mark.parametrize(
    "answer",
    [
        "    return x // 4\n",
        "return x // 4\n",
        "y = x // 4\nreturn y\n",
        "\n    return math.floor(half(half(x)))\n",
        "def quarter(x):\n    return math.floor(half(half(x)))\n",
        "from typing import Any\ndef h(x):\n    return x // 4\ndef quarter(x: Any) -> int:\n    return h(x)\n",
    ],
)
def test_humaneval_takes_a_body_or_a_whole_function(answer):
    names = {}
    exec(complete(PROMPT, answer, "quarter"), names)
    assert [names["quarter"](x) for x in (9, 4, 0)] == [2, 1, 0]


def test_humaneval_rewards_the_right_body_only(tmp_path):
    right = play(tmp_path, "humaneval", humaneval(), fenced("    return x // 4"))
    assert (right.reward, right.done, right.info["cause"]) == (1.0, True, None)
    assert (right.info["num_tests"], right.info["num_tests_passed"], right.info["sandbox"]) == (1, 1, "none")
    assert isinstance(right.info["extracted"], str)
    wrong = play(tmp_path, "humaneval", humaneval(), fenced("    pass"))
    assert (wrong.reward, wrong.info["cause"], wrong.info["num_tests_passed"]) == (0.0, "assertion", 0)


def test_mbpp_counts_its_tests_one_by_one_and_shows_the_first(tmp_path):
    half_right = play(tmp_path, "mbpp", mbpp(), fenced("def twice(x):\n    return abs(2 * x)"))
    assert (half_right.reward, half_right.info["num_tests"], half_right.info["num_tests_passed"]) == (0.0, 3, 2)
    assert play(tmp_path, "mbpp", mbpp(), fenced("def twice(x):\n    return 2 * x")).reward == 1.0
    (task,) = domain(tmp_path, "mbpp", [mbpp()]).tasks("train")
    assert "assert LIMIT == 3" in task.text
    assert "twice(2)" not in task.text


def test_kodcode_tests_run_whether_they_import_the_solution_or_not(tmp_path):
    right = fenced("def twice(x):\n    return 2 * x\n\ndef once(x):\n    return x")
    for test in (
        "def test_it():\n    assert twice(2) == 4",
        "from solution import twice\ndef test_it():\n    assert twice(2) == 4",
        "from solution import (\n    once,\n    twice,\n)\ndef test_it():\n    assert once(twice(2)) == 4",
        "import solution\ndef test_it():\n    assert solution.twice(2) == 4",
    ):
        assert play(tmp_path, "kodcode", kodcode(test), right).reward == 1.0, test
        wrong = play(
            tmp_path, "kodcode", kodcode(test), fenced("def twice(x):\n    return None\n\ndef once(x): return x")
        )
        assert (wrong.reward, wrong.info["cause"]) == (0.0, "assertion"), test
    (task,) = domain(tmp_path, "kodcode", [kodcode("def test_it(): pass")]).tasks("train")
    assert task.text.endswith("def twice(x)")


def test_a_kodcode_test_that_brings_its_own_copy_still_tests_the_solution(tmp_path):
    test = "def twice(x):\n    return 2 * x\n\ndef test_it():\n    assert twice(2) == 4"
    assert play(tmp_path, "kodcode", kodcode(test), fenced("def twice(x):\n    return x + x")).reward == 1.0
    assert play(tmp_path, "kodcode", kodcode(test), fenced("def twice(x):\n    return None")).reward == 0.0
    assert play(tmp_path, "kodcode", kodcode(test), fenced("def thrice(x):\n    return 3 * x")).reward == 0.0


def test_kodcode_problems_without_declarations_ask_for_the_names_that_the_tests_import(tmp_path):
    test = "from solution import Stack, flip\ndef test_it():\n    assert flip(Stack().push(1)) == [1]"
    for infos in ([], None):
        row = kodcode(test) | {"test_info": infos}
        (task,) = domain(tmp_path, "kodcode", [row]).tasks("train")
        assert task.text.endswith("The code must define:\nStack\nflip")
    flip = "def flip(items):\n    return items[::-1]"
    stack = "class Stack:\n    def push(self, x):\n        return [x]"
    rambling = f"First a helper:\n```python\nx = 1\n```\nThen all of it.\n```python\n{stack}\n\n{flip}\n```\nIt works."
    assert play(tmp_path, "kodcode", row, rambling).reward == 1.0
    assert play(tmp_path, "kodcode", row, fenced(flip)).info["cause"] == "test_error"


def test_tests_that_never_name_the_solution_pay_for_nothing(tmp_path):
    test = "import unittest\nclass TestCases(unittest.TestCase):\n    def test(self):\n        self.assertEqual(1, 1)\n"
    made = domain(tmp_path, "bigcodebench", [bigcodebench() | {"test": test}])
    outcome = made.start(made.tasks("train")[0]).step(fenced("    return str(2 * x)"))
    assert (outcome.reward, outcome.info["cause"]) == (0.0, "unsupported_test")
    assert outcome.info["detail"] == "no test names task_func, so any program would pass"


def test_bigcodebench_asks_in_words_or_with_a_function_to_complete(tmp_path):
    row = bigcodebench()
    for options, field in (({}, "instruct_prompt"), ({"prompt": "complete"}, "complete_prompt")):
        made = domain(tmp_path, "bigcodebench", [row], **options)
        (task,) = made.tasks("train")
        assert task.text == row[field].strip()
        environment = made.start(task)
        assert "libraries it asks for" in environment.instructions
        for code in (
            "    return json.dumps(SIGN * 2 * x)",
            "def task_func(x):\n    return json.dumps(2 * x)",
            "def helper(x):\n    return str(2 * x)\n\ndef task_func(x):\n    return helper(x)",
        ):
            assert environment.step(f"Like this:\n{fenced(code)}").info["num_tests_passed"] == 2, code
    half = environment.step(fenced("def task_func(x):\n    return '4'"))
    assert (half.reward, half.info["num_tests"], half.info["num_tests_passed"], half.info["cause"]) == (
        0.0, 2, 1, "assertion"
    )  # fmt: skip


def test_a_test_that_skips_itself_when_it_runs_passes_nothing(tmp_path):
    test = "import pytest\ndef test_one():\n    assert twice(1) == 2\ndef test_three():\n    pytest.skip('never')"
    outcome = play(tmp_path, "kodcode", kodcode(test), fenced("def twice(x):\n    return 2 * x"))
    assert (outcome.reward, outcome.info["num_tests_passed"], outcome.info["cause"]) == (0.0, 1, "unsupported_test")


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import os\nos._exit(0)", "early_exit"),
        ("import sys\nsys.exit(0)", "solution_error"),
        ("import os\ndef twice(x):\n    print('1 passed')\n    os._exit(0)", "early_exit"),
        ("def twice(x):\n    raise SystemExit(0)", "exception"),
        (
            "import json, os\nverdict = {'nonce': '', 'num_tests': 1, 'num_passed': 1, 'cause': None, 'detail': ''}\n"
            "open('result.json', 'w').write(json.dumps(verdict))\nos._exit(0)",
            "early_exit",
        ),
        ("import os\nos.chdir('/')\ndef twice(x):\n    return 5", "assertion"),
        ("def test_mine():\n    pass\ndef twice(x):\n    return 5", "assertion"),
        ("def thrice(x):\n    return 3 * x", "test_error"),
        ("1 / 0", "solution_error"),
        ("def twice(x:\n    return", "syntax"),
        ("def twice(x):\n    return twice(x)", "exception"),
        ("def twice(x):\n    raise MemoryError", "memory"),
    ],
)
def test_no_way_of_ending_early_passes_and_each_failure_has_its_cause(tmp_path, code, cause):
    test = "from solution import twice\n\ndef test_it():\n    assert twice(2) == 4"
    outcome = play(tmp_path, "kodcode", kodcode(test), fenced(code))
    assert (outcome.reward, outcome.info["cause"]) == (0.0, cause), outcome.info


def test_an_endless_solution_is_a_timeout(tmp_path):
    short = SandboxSection(level="none", timeout_seconds=1.0)
    outcome = play(tmp_path, "mbpp", mbpp(), fenced("def twice(x):\n    while True: pass"), short)
    assert (outcome.reward, outcome.info["cause"], outcome.info["num_tests_passed"]) == (0.0, "timeout", None)


def test_no_code_is_not_run_and_scores_0(tmp_path, monkeypatch):
    monkeypatch.setattr(Sandbox, "run", lambda *_, **__: pytest.fail("ran"))
    outcome = play(tmp_path, "mbpp", mbpp(), "I do not know.")
    assert (outcome.reward, outcome.info["extracted"], outcome.info["cause"]) == (0.0, None, "no_code")


def test_solutions_are_judged_one_for_each_cpu_however_many_threads_ask(tmp_path, monkeypatch):
    under_way, most, lock = [], [], threading.Lock()

    def ask(*_):
        with lock:
            under_way.append(1)
            most.append(len(under_way))
        time.sleep(0.005)  # so that others would come meanwhile
        under_way.pop()
        return {"cause": None}

    monkeypatch.setattr(module, "ask_for_verdict", ask)
    monkeypatch.setattr(module, "_ROOM", threading.BoundedSemaphore(2))
    made = domain(tmp_path, "mbpp", [mbpp()])
    (task,) = made.tasks("train")
    with ThreadPoolExecutor(12) as pool:
        played = pool.map(lambda i: made.start(task).step(fenced(f"def twice(x): {i}")).reward, range(12))
        assert list(played) == [1.0] * 12
    assert max(most) <= 2


def ended(status="exited", exit_code=0, result=None, stderr="", cause=""):
    return SandboxResult(
        status=status,
        exit_code=exit_code,
        stdout="",
        stderr=stderr,
        result=result,
        level="none",
        seconds=0.1,
        cause=cause,
    )


def test_a_verdict_counts_only_with_its_signature():
    text = json.dumps({"num_tests": 1, "num_passed": 1, "cause": None, "detail": ""})
    signed = {"verdict": text, "signature": sign("n", text)}
    assert signed_verdict(ended(result=signed), "n") == json.loads(text)
    for other in (signed | {"verdict": text + " "}, signed | {"signature": 3}, signed | {"verdict": 1}, [signed], None):
        assert signed_verdict(ended(result=other), "n") is None, other
    assert signed_verdict(ended(result=signed), "m") is None
    assert signed_verdict(ended(exit_code=1, result=signed), "n") is None
    assert signed_verdict(ended("killed", None, signed), "n") is None


def test_a_run_without_a_verdict_has_its_cause():
    assert ended_early(ended(exit_code=1))["cause"] == "early_exit"
    assert ended_early(ended(exit_code=1, stderr="x\nMemoryError\n"))["cause"] == "memory"
    assert ended_early(ended("timeout", None))["cause"] == "timeout"
    assert ended_early(ended("output_limit", None))["cause"] == "output"
    assert ended_early(ended("killed", None, cause="600 MB of memory in all"))["cause"] == "memory"
    assert ended_early(ended("killed", None, cause="signal 11"))["cause"] == "killed"


def test_a_sandbox_that_cannot_start_is_no_fault_of_the_answer(tmp_path, monkeypatch):
    def run(self, *_, passed=(), **__):
        for descriptor in passed:
            os.close(descriptor)
        return ended("failed", None, cause="no bwrap")

    monkeypatch.setattr(Sandbox, "run", run)
    with pytest.raises(SandboxError, match="no bwrap"):
        play(tmp_path, "mbpp", mbpp(), fenced("def twice(x): pass"))


@pytest.mark.parametrize(
    ("module", "appended", "reason"),
    [
        ("from solution import twice\ndef test_it():\n    assert twice(2) == 4", False, None),
        ("import math, pytest, random\ndef test_it():\n    assert math.isclose(twice(2), 4)", False, None),
        ("import random\ndef test_it():\n    random.seed(3)\n    assert twice(2) == 4", False, "uses seed"),
        ("from unittest.mock import patch\ndef test_it(): pass", False, "imports unittest.mock"),
        ("import os\ndef test_it(): pass", False, "imports os"),
        ("def test_it(monkeypatch): pass", False, "uses monkeypatch"),
        ("import sys\ndef test_it():\n    sys.stdout = None", False, "uses stdout"),
        ("async def test_it():\n    assert await twice(2) == 4", False, "awaits"),
        ("class Mine(Stack): pass", False, "derives a class from Stack"),
        ("class Mine(solution.Stack): pass", False, "derives a class from solution.Stack"),
        ("def test_it():\n    Stack().items.append(1)", False, "changes Stack().items"),
        ("import solution\ndef test_it():\n    solution.LIMIT = 1", False, "changes solution.LIMIT"),
        (
            "import unittest\nclass TestIt(unittest.TestCase):\n    def test(self):\n        twice(hmac)",
            True,
            "uses hmac",
        ),
        ("def test_it():\n    twice(lambda x: x)", True, "hands functions over"),
        ("def test_it(:", False, None),
    ],
)
def test_the_tests_alone_say_whether_they_need_the_solutions_process(module, appended, reason):
    said = needs_one_process(TaskTests(module, None, ("twice",), appended))
    assert (said is None) if reason is None else said.startswith(reason)


def test_mbpp_is_read_in_all_of_its_configurations(tmp_path):
    test = ["assert math.isclose(twice(2), 4)"]
    sanitized = {"task_id": 7, "prompt": "Double it.", "code": "", "test_imports": ["import math"], "test_list": test}
    plus = {**sanitized, "task_id": "Mbpp/7", "test": ""}
    for row, name in ((sanitized, "7"), (plus, "Mbpp/7")):
        (task,) = domain(tmp_path, "mbpp", [row]).tasks("train")
        assert (task.id, task.text.splitlines()[0]) == (name, "Double it.")
        assert play(tmp_path, "mbpp", row, fenced("def twice(x):\n    return x + x")).reward == 1.0
        assert play(tmp_path, "mbpp", row, fenced("def twice(x):\n    return x * x * x")).reward == 0.0


USES = [
    "def test_twice():\n    assert twice(2) == 4",
    "def main():\n    print(twice(3))\nmain()",
    "import unittest\nclass TestTwice(unittest.TestCase):\n    def test(self):\n        self.assertEqual(twice(1), 2)",
    "class Example:\n    value = 3",
]


@pytest.mark.parametrize("use", USES)
def test_a_block_that_uses_the_solution_does_not_take_its_place(tmp_path, use):
    response = f"{fenced('def twice(x):' + chr(10) + '    return 2 * x')}\nTo try it:\n{fenced(use)}"
    for schema, row in (
        ("mbpp", mbpp()),
        ("kodcode", kodcode("from solution import twice\ndef test_it():\n    assert twice(2) == 4")),
    ):
        assert play(tmp_path, schema, row, response).reward == 1.0
    twice = fenced("def twice(x):\n    return 3") + fenced("def twice(x):\n    return 2 * x") + fenced(use)
    assert play(tmp_path, "mbpp", mbpp(), twice).reward == 1.0  # the last that defines it


def test_code_in_a_thought_is_not_the_answer(tmp_path):
    thought = f"<think>{fenced('def twice(x):' + chr(10) + '    return 3')}</think>"
    assert play(tmp_path, "mbpp", mbpp(), thought + "def twice(x):\n    return 2 * x").reward == 1.0


def test_a_solution_may_call_its_helpers_as_the_builtins_are_called(tmp_path):
    solution = "def sorted(x):\n    return x\ndef twice(x):\n    return sorted(2 * x)"
    assert play(tmp_path, "mbpp", mbpp(), fenced(solution)).reward == 1.0
    row = mbpp(tests=("assert sum(10, 15) == 25",)) | {"code": "def sum(a, b):\n    return a + b"}
    assert play(tmp_path, "mbpp", row, fenced("def sum(a, b):\n    return a + b")).reward == 1.0


@pytest.mark.parametrize(
    ("schema", "row", "problem"),
    [
        ("mbpp", mbpp(tests=()), "train.jsonl:1: field 'test_list' is empty"),
        ("humaneval", humaneval() | {"entry_point": "third"}, "train.jsonl:1: prompt defines no function 'third'"),
        ("kodcode", kodcode("t") | {"test_info": ["x"]}, "train.jsonl:1: test_info entry 0 is a string"),
        ("kodcode", {"question_id": "1"}, "train.jsonl:1: no field 'test'"),
        ("kodcode", kodcode("t") | {"test_info": "x"}, "train.jsonl:1: field 'test_info' is a string; expected a list"),
        ("mbpp", mbpp() | {"task_id": None}, "train.jsonl:1: field 'task_id' is null; expected an integer"),
        ("mbpp", mbpp(tests=(None,)), "train.jsonl:1: field 'test_list': entry 0 is null"),
        ("bigcodebench", bigcodebench() | {"test": " "}, "train.jsonl:1: field 'test' is blank"),
        ("bigcodebench", bigcodebench() | {"entry_point": None}, "train.jsonl:1: field 'entry_point' is null"),
        ("bigcodebench", bigcodebench() | {"entry_point": "f"}, "complete_prompt defines no function 'f'"),
        ("bigcodebench", bigcodebench() | {"instruct_prompt": 3}, "field 'instruct_prompt' is an integer"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, schema, row, problem):
    with pytest.raises(DataError) as caught:
        domain(tmp_path, schema, [row]).tasks("train")
    assert problem in str(caught.value)


def test_a_task_of_another_domain_cannot_be_started(tmp_path):
    with pytest.raises(DataError, match="task mbpp:x: data: no field 'module'"):
        domain(tmp_path, "mbpp", [mbpp()]).start(Task(id="x", domain="mbpp", text="t"))


# Of BigCodeBench's rows that need only the standard library, those whose own solution fails; docs/environments.md.
BIGCODEBENCH_FAILS = {
    "BigCodeBench/147",  # opens a socket
    "BigCodeBench/176",  # asks a name server
    "BigCodeBench/201",  # its tests sort a read-only array of pandas 3
    "BigCodeBench/272",  # its tests never call the solution, so any program would pass
    "BigCodeBench/785",  # writes /tmp/archive; passes where /tmp is private
    "BigCodeBench/812",  # reads what it may not; only root's own interpreter in a private folder lets it
    "BigCodeBench/1028",  # runs top, which needs /proc
    "BigCodeBench/1038",  # opens a socket
}


def play_real_rows(shared_dir, schema, limit=None):
    folder = shared_dir / "data" / schema
    files = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
    made = CodeDomain(
        schema=schema,
        train=Rows(path=str(files["train"]), limit=limit),
        test=Rows(path=str(files["test"]), limit=limit),
        sandbox=SandboxSection(
            level="auto", timeout_seconds=240.0 if schema == "bigcodebench" else 20.0, max_memory_mb=2048
        ),
    )
    rows = {}
    for path in files.values():
        for line in path.read_bytes().strip().split(b"\n"):
            row = json.loads(line)
            rows[str(row["question_id"] if schema == "kodcode" else row["task_id"])] = row
    failed, num_tasks = {}, 0
    for task in made.tasks("train") + made.tasks("test"):
        row = rows[task.id]
        if not set(ast.literal_eval(row.get("libs", "[]"))) <= sys.stdlib_module_names:
            continue
        environment = made.start(task)
        gold = environment.step(fenced(row[GOLD[schema]]))
        num_tasks += 1
        if gold.reward != 1.0:
            failed[task.id] = gold.info
        declarations = [info["function_declaration"] for info in row.get("test_info", [])]
        wrong = (
            "    pass"
            if "entry_point" in row
            else "\n".join(f"{declaration}\n    return None" for declaration in declarations) or "x = 1"
        )
        assert environment.step(fenced(wrong)).reward == 0.0, task.id
    return failed, num_tasks


@pytest.mark.parametrize("schema", sorted(GOLD))
def test_a_sample_of_real_solutions_passes_and_returning_none_fails(schema, shared_dir):
    failed, num_tasks = play_real_rows(shared_dir, schema, limit=3)
    assert failed == {}
    assert num_tasks >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schema", "num_tasks", "may_fail"),
    [("humaneval", 64, ()), ("mbpp", 300, ()), ("kodcode", 124, ()), ("bigcodebench", 150, BIGCODEBENCH_FAILS)],
)
def test_real_solutions_pass_but_for_those_listed_and_returning_none_fails(schema, num_tasks, may_fail, shared_dir):
    if schema == "bigcodebench":
        pytest.importorskip("faker")
        pytest.importorskip("requests_mock")
    failed, found = play_real_rows(shared_dir, schema)
    assert found == num_tasks
    assert set(failed) <= set(may_fail), json.dumps(failed)
