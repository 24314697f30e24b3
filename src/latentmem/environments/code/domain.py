"""Programming tasks: the reward tells whether the extracted code passes all tests of its task, run in the sandbox.

The tests run in `runner.py`, a separate program that is sent along with each solution; its docstring tells how far a
verdict can be trusted. Four data sets share one form of task: a module of tests, optionally a prompt to complete, and
optionally the calls that count as the tests.
"""

import ast
import hashlib
import json
import re
import secrets
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.resources import files
from typing import Any, Literal

from pydantic import JsonValue

from latentmem.config import Rows, SandboxSection
from latentmem.environments.answers import tagged
from latentmem.environments.environment import Outcome, Split
from latentmem.environments.rows import Row, Splits, all_strings, split_tasks, typed
from latentmem.environments.sandbox.sandbox import Sandbox, SandboxResult
from latentmem.errors import BadRowError, SandboxError
from latentmem.trajectory import Task

# A fence that names a language opens a block, even where another is open: SmolLM2 writes an empty fence before it.
_FENCED = re.compile(
    r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```(?![ \t]*\w)|(?=^[ \t]*```[ \t]*\w)|\Z)", re.MULTILINE | re.DOTALL
)
_DEFINITION = re.compile(r"^(?:async def|def|class)\s", re.MULTILINE)

Schema = Literal["humaneval", "mbpp", "kodcode", "bigcodebench"]

_ONE_BLOCK = "Give the whole code, imports included, in one block that begins with ```python and ends with ```."
INSTRUCTIONS = f"Solve the problem in Python, with the names it asks for and the standard library only. {_ONE_BLOCK}"
WITH_LIBRARIES = f"Solve the problem in Python, with the names and the libraries it asks for. {_ONE_BLOCK}"
"""Instructions for BigCodeBench, whose problems name libraries."""


@dataclass(frozen=True)
class CodeEnvironment:
    """One episode of one step. Reward: 1.0 if all tests pass in the sandbox, else 0.0.

    `info` holds `extracted` (a hash of the code, None if there was none), `num_tests` and `num_tests_passed` (None if
    unknown), `sandbox` (the level that was active), `cause` (None on success, else no_code, syntax, timeout, memory,
    output, killed, early_exit, or a cause of `runner.run`) and `detail`, the cause in words.
    """

    prompt: str | None
    """Code to complete; None if the answer is the whole code."""
    entry_point: str | None
    """Name of the function that the prompt begins."""
    module: str
    names: tuple[str, ...]
    """Functions that are tested as the solution defines them, even if the module brings its own."""
    calls: tuple[str, ...] | None
    sandbox: Sandbox
    instructions: str = INSTRUCTIONS
    """How an answer has to look."""
    appended: bool = False
    """Whether the module is executed at the end of the solution's own module; see `runner.run`."""

    def step(self, action: str) -> Outcome:
        """Run the tests on the team's code and end the episode.

        Raises:
            SandboxError: the sandbox could not start the program, which is not the answer's fault.
        """
        code = extract_code(action, bare_body=self.prompt is not None)
        info: dict[str, JsonValue] = {
            "extracted": None if code is None else hashlib.sha256(code.encode("utf-8", "replace")).hexdigest()[:16],
            "num_tests": None if self.calls is None else len(self.calls),
            "num_tests_passed": None,
            "sandbox": self.sandbox.level,
        }
        if code is None:
            info.update(cause="no_code", detail="no code found in the response")
        else:
            program = code if self.prompt is None else complete(self.prompt, code, self.entry_point or "")
            info.update(self._verdict(program))
        return Outcome(observation="", reward=float(info["cause"] is None), done=True, info=info)

    def _verdict(self, program: str) -> dict[str, JsonValue]:
        problem = _syntax_problem(program)
        if problem is not None:
            return {"cause": "syntax", "detail": problem}
        nonce = secrets.token_hex(16)
        request = {
            "nonce": nonce,
            "module": self.module,
            "names": self.names,
            "calls": self.calls,
            "appended": self.appended,
        }
        result = self.sandbox.run(
            {"solution.py": program, "runner.py": _runner()},
            ["python", "runner.py"],
            stdin=json.dumps(request),
            result_file="result.json",
        )
        return read_verdict(result, nonce)


def read_verdict(result: SandboxResult, nonce: str) -> dict[str, JsonValue]:
    """Read from a run what it says about the solution; only a result that carries the nonce can be a pass.

    Raises:
        SandboxError: the program was never started.
    """
    if result.status == "failed":
        raise SandboxError(f"sandbox {result.level}: the program could not be started ({result.cause})")
    if result.status != "exited":
        ended = "memory" if "memory" in result.cause.lower() else "killed"
        names = {"timeout": "timeout", "output_limit": "output"}
        return {"cause": names.get(result.status, ended), "detail": result.cause, "sandbox": result.level}
    verdict = result.result
    if not isinstance(verdict, dict) or verdict.get("nonce") != nonce or result.exit_code != 0:
        last = result.stderr.strip().splitlines()[-1:] or ["nothing on stderr"]
        detail = f"exit status {result.exit_code} before the tests had ended; {last[0][:300]}"
        ended = "memory" if "MemoryError" in last[0] else "early_exit"
        return {"cause": ended, "detail": detail, "sandbox": result.level}
    num_tests, num_passed, cause = verdict.get("num_tests"), verdict.get("num_passed"), verdict.get("cause")
    assert cause is not None or (num_tests == num_passed and num_tests), verdict
    return {
        "num_tests": num_tests,
        "num_tests_passed": num_passed,
        "cause": cause,
        "detail": verdict.get("detail", ""),
        "sandbox": result.level,
    }


def extract_code(response: str, *, bare_body: bool = False) -> str | None:
    """Return the code in a response, or None.

    Among fenced blocks, those marked python count, else unmarked ones, else all. Of these the last that defines a
    function or class is taken, else the longest. A block may be cut off by the end of the response. Without any block
    the text in the answer tags is taken, else the whole response if it is Python that defines a function (or, with
    `bare_body`, if it is Python when put into a function).
    """
    blocks: list[tuple[str, str]] = [
        (language.lower(), text) for language, text in _FENCED.findall(response) if text.strip()
    ]
    for languages in (("python", "py", "python3"), ("",), None):
        found: list[str] = [text for language, text in blocks if languages is None or language in languages]
        if found:
            defining: list[str] = [text for text in found if _DEFINITION.search(text)]
            return defining[-1] if defining else max(found, key=len)
    tag = tagged(response)
    if tag:
        return tag
    if _syntax_problem(response) is None and _DEFINITION.search(response):
        return response
    if bare_body and response.strip() and _syntax_problem(_as_body(response)) is None:
        return response
    return None


def complete(prompt: str, code: str, entry_point: str) -> str:
    """Join a prompt and an answer into one program; the answer is either the whole function or its continuation.

    An answer that defines `entry_point` replaces the prompt's function; imports and helpers before that function stay.
    Any other answer is taken as the function's body, and is indented if needed.
    """
    definition = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    if definition.search(code):
        begin = definition.search(prompt)
        return (prompt[: begin.start()] if begin else prompt) + "\n" + code
    separator = "" if prompt.endswith("\n") else "\n"
    as_it_is = prompt + separator + code
    if _syntax_problem(as_it_is) is None and code[:1] in (" ", "\t", "\n"):
        return as_it_is
    return prompt + separator + textwrap.indent(textwrap.dedent(code), "    ")


def _as_body(code: str) -> str:
    return "def function():\n" + textwrap.indent(textwrap.dedent(code), "    ")


def _syntax_problem(code: str) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a string is the model's business
        try:
            ast.parse(code)
        except SyntaxError as error:
            return f"line {error.lineno}: {error.msg}"
        except (ValueError, RecursionError, MemoryError) as error:
            return f"{type(error).__name__}: {error}"
    return None


@cache
def _runner() -> str:
    return (files("latentmem.environments.code") / "runner.py").read_text(encoding="utf-8")


class CodeDomain:
    """Tasks of HumanEval, MBPP, KodCode or BigCodeBench, with the field names of their hub data sets.

    `prompt` chooses between BigCodeBench's two wordings: a task in words, or a function to complete.

    Raises:
        SandboxError: the machine cannot contain code and `sandbox.level` is not none.
    """

    def __init__(
        self,
        *,
        schema: Schema,
        train: Rows,
        test: Rows,
        sandbox: SandboxSection,
        prompt: Literal["instruct", "complete"] = "instruct",
        instructions: str | None = None,
    ) -> None:
        self.name: str = schema
        self._instructions = instructions or (WITH_LIBRARIES if schema == "bigcodebench" else INSTRUCTIONS)
        self._train = train
        self._test = test
        self._sandbox = Sandbox(sandbox)
        makers: dict[str, Callable[[Row], Task]] = {
            "humaneval": _humaneval,
            "mbpp": _mbpp,
            "kodcode": _kodcode,
            "bigcodebench": partial(_bigcodebench, wording=f"{prompt}_prompt"),
        }
        self._task = makers[schema]

    def tasks(self, split: Split) -> list[Task]:
        """Return all tasks of a split, in the order of the rows; train tasks that also occur in test are left out.

        Raises:
            DataError: the rows do not exist, a row lacks what its schema asks for, or an id occurs twice.
        """
        return list(self._splits.tasks.get(split, ()))

    def skipped(self, split: Split) -> dict[str, int]:
        """Count the rows of a split that were left out, by reason."""
        return dict(self._splits.skipped.get(split, {}))

    @cached_property
    def _splits(self) -> Splits:
        return split_tasks(self._train, self._test, self._task)

    def start(self, task: Task) -> CodeEnvironment:
        """Make a fresh environment for one episode.

        Raises:
            DataError: the task's data are not those of a programming task.
        """
        row = Row(task.data, f"task {task.key}: data")
        calls = row.values.get("calls")
        where = f"{row.where}: field 'calls'"
        return CodeEnvironment(
            prompt=None if row.values.get("prompt") is None else row.field("prompt", str),
            entry_point=None if row.values.get("entry_point") is None else row.field("entry_point", str),
            module=row.field("module", str),
            names=tuple(row.strings("names")) if "names" in row.values else (),
            calls=None if calls is None else tuple(all_strings(typed(calls, list, where), where)),
            sandbox=self._sandbox,
            instructions=self._instructions,
            appended=self.name == "bigcodebench",
        )


def _humaneval(row: Row) -> Task:
    prompt, entry_point = _begun_function(row, "prompt")
    return Task(
        id=row.text("task_id"),
        domain="humaneval",
        text=f"Complete this Python function.\n\n{prompt.strip()}",
        data={
            "prompt": prompt,
            "entry_point": entry_point,
            "module": row.text("test"),
            "calls": [f"check({entry_point})"],
        },
    )


def _mbpp(row: Row) -> Task:
    tests = row.strings("test_list")
    if not tests:
        raise BadRowError("no answer", f"{row.where}: field 'test_list' is empty; expected at least one assertion")
    return Task(
        id=str(row.field("task_id", int)),
        domain="mbpp",
        text=f"{row.text('text').strip()}\nYour code should pass this test:\n{tests[0].strip()}",
        data={"module": row.field("test_setup_code", str), "calls": list(tests)},
    )


def _kodcode(row: Row) -> Task:
    test = row.text("test")
    declarations: list[str] = []
    functions: list[JsonValue] = []
    infos = [] if row.values.get("test_info", ()) is None else row.field("test_info", list)
    for i, info in enumerate(infos):  # null or empty where a problem asks for classes
        where = f"{row.where}: test_info entry {i}"
        function = Row(typed(info, dict, where), where)
        declarations.append(function.text("function_declaration").strip().rstrip(":"))
        functions.append(function.text("function_name"))
    names = declarations or _imported_names(test)
    asked = "\n\nThe code must define:\n" + "\n".join(names) if names else ""
    return Task(
        id=row.text("question_id"),
        domain="kodcode",
        text=row.text("question").strip() + asked,
        data={"module": test, "names": functions},
    )


def _bigcodebench(row: Row, wording: str) -> Task:
    """Make a task in one of the two wordings; both expect the rest of `complete_prompt` or a whole function."""
    prompt, entry_point = _begun_function(row, "complete_prompt")
    return Task(
        id=row.text("task_id"),
        domain="bigcodebench",
        text=row.text(wording).strip(),
        data={"prompt": prompt, "entry_point": entry_point, "module": row.text("test")},
    )


def _begun_function(row: Row, field: str) -> tuple[str, str]:
    prompt, entry_point = row.text(field), row.text("entry_point")
    if not re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", prompt, re.MULTILINE):
        raise BadRowError(
            "inconsistent", f"{row.where}: {field} defines no function {entry_point[:80]!r}, which entry_point names"
        )
    return prompt, entry_point


def _imported_names(test: str) -> list[str]:
    """Return the names that a test module imports from `solution`; class-based problems declare no function."""
    if _syntax_problem(test) is not None:
        return []
    tree: Any = ast.parse(test)
    return [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "solution"
        for alias in node.names
        if alias.name != "*"
    ]
