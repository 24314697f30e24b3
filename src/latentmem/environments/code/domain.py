"""Programming tasks: the reward tells whether the extracted code passes all tests of its task, run in the sandbox.

The tests run in a process that the solution does not share, where they can; `request.py` says which cannot, and
`judging/inside.py` what is left to trust there. Four data sets become one form of task: an optional prompt to
complete, a module of tests, and optionally the calls that are the tests.
"""

import ast
import builtins
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from threading import BoundedSemaphore
from typing import Literal

from pydantic import JsonValue

from latentmem.config import Rows, SandboxSection
from latentmem.environments.code.extraction import complete, extract_code, syntax_problem
from latentmem.environments.code.request import TaskTests, ask_for_verdict
from latentmem.environments.environment import Outcome, Split
from latentmem.environments.rows import Row, Splits, all_strings, split_tasks, typed
from latentmem.environments.sandbox.sandbox import Sandbox
from latentmem.errors import BadRowError
from latentmem.trajectory import Task

Schema = Literal["humaneval", "mbpp", "kodcode", "bigcodebench"]

_ONE_BLOCK = "Give the whole code, imports included, in one block that begins with ```python and ends with ```."
INSTRUCTIONS = f"Solve the problem in Python, with the names it asks for and the standard library only. {_ONE_BLOCK}"
WITH_LIBRARIES = f"Solve the problem in Python, with the names and the libraries it asks for. {_ONE_BLOCK}"
"""Instructions for BigCodeBench, whose problems name libraries."""
_ROOM = BoundedSemaphore(os.cpu_count() or 1)
"""Solutions are judged against the clock, so however many episodes play at once, one for each CPU is judged at a time.
"""


@dataclass(frozen=True)
class CodeEnvironment:
    """One episode of one step. Reward: 1.0 if all tests pass in the sandbox, else 0.0.

    `info` holds `extracted` (a hash of the code, None where there was none), `num_tests` and `num_tests_passed` (None
    where unknown), `sandbox` (the level that was active), `judged` (apart or inside, None where nothing ran), `cause`
    (None on success, else no_code, syntax, timeout, memory, output, killed, early_exit, or what `judge.judge` and
    `inside.run` name) and `detail`, the cause in words.
    """

    prompt: str | None
    """Code to complete; None if the answer is the whole code."""
    entry_point: str | None
    """Name of the function that the prompt begins."""
    module: str
    names: tuple[str, ...]
    """What the solution is asked for; it counts even where the module brings its own."""
    calls: tuple[str, ...] | None
    sandbox: Sandbox
    instructions: str = INSTRUCTIONS
    """How an answer has to look."""
    appended: bool = False
    """Whether the module is executed as the end of the solution's own; see `inside.run`."""

    def step(self, action: str) -> Outcome:
        """Run the tests on the team's code and end the episode.

        Raises:
            SandboxError: the sandbox could not start the program, which is not the answer's fault.
        """
        asked = self.names if self.entry_point is None else (self.entry_point,)
        code = extract_code(action, asked=asked, bare_body=self.prompt is not None)
        info: dict[str, JsonValue] = {
            "extracted": None if code is None else hashlib.sha256(code.encode("utf-8", "replace")).hexdigest()[:16],
            "num_tests": None if self.calls is None else len(self.calls),
            "num_tests_passed": None,
            "sandbox": self.sandbox.level,
            "judged": None,
        }
        if code is None:
            info.update(cause="no_code", detail="no code found in the response")
        else:
            program = code if self.prompt is None else complete(self.prompt, code, self.entry_point or "")
            problem = syntax_problem(program)
            if problem is not None:
                info.update(cause="syntax", detail=problem)
            else:
                tests = TaskTests(self.module, self.calls, asked, self.appended)
                with _ROOM:
                    info.update(ask_for_verdict(self.sandbox, program, tests))
        return Outcome(observation="", reward=float(info["cause"] is None), done=True, info=info)


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
    """The prompt's helpers stand before the tests as well, which use some: an answer's own are another's."""
    prompt, entry_point = _begun_function(row, "prompt")
    helpers = prompt[: re.search(_begins(entry_point), prompt, re.MULTILINE).start()]  # type: ignore[union-attr]
    return Task(
        id=row.text("task_id"),
        domain="humaneval",
        text=f"Complete this Python function.\n\n{prompt.strip()}",
        data={
            "prompt": prompt,
            "entry_point": entry_point,
            "module": f"{helpers}\n{row.text('test')}",
            "calls": [f"check({entry_point})"],
        },
    )


def _mbpp(row: Row) -> Task:
    """A row of any configuration: full has `text`, sanitized and MBPP+ have `prompt` and `test_imports`."""
    tests = row.strings("test_list")
    if not tests:
        raise BadRowError("no answer", f"{row.where}: field 'test_list' is empty; expected at least one assertion")
    imports = row.strings("test_imports") if "test_imports" in row.values else ()
    setup = "" if "test_imports" in row.values else row.field("test_setup_code", str)
    wish = row.text("text" if "text" in row.values or "prompt" not in row.values else "prompt")
    number = row.values.get("task_id")
    return Task(
        id=row.text("task_id") if isinstance(number, str) else str(row.field("task_id", int)),
        domain="mbpp",
        text=f"{wish.strip()}\nYour code should pass this test:\n{tests[0].strip()}",
        data={
            "module": "\n".join([*imports, setup]),
            "calls": list(tests),
            "names": list(_asked_names(tests, str(row.values.get("code") or ""))),
        },
    )


def _asked_names(tests: Sequence[str], code: str) -> list[str]:
    """The names that tests want of a solution: those that the reference solution brings, if it is there."""
    used = [
        {node.id: None for node in ast.walk(_tree(test)) if isinstance(node, ast.Name)}
        for test in tests
        if test.strip()
    ]
    every = list(dict.fromkeys(name for names in used for name in names))
    brought = {getattr(node, "name", None) for node in _tree(code).body}
    return (
        [name for name in every if name in brought]
        or [name for name in every if not hasattr(builtins, name)]
        or [name for name in every if all(name in names for names in used)]
    )


def _kodcode(row: Row) -> Task:
    test = row.text("test")
    declarations: list[str] = []
    functions: list[str] = []
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
        data={"module": test, "names": [*dict.fromkeys([*functions, *_imported_names(test)])]},
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
    if not re.search(_begins(entry_point), prompt, re.MULTILINE):
        raise BadRowError(
            "inconsistent", f"{row.where}: {field} defines no function {entry_point[:80]!r}, which entry_point names"
        )
    return prompt, entry_point


def _imported_names(test: str) -> list[str]:
    """Names that a test module imports from `solution`; class-based problems declare no function."""
    return [
        alias.name
        for node in ast.walk(_tree(test))
        if isinstance(node, ast.ImportFrom) and node.module == "solution"
        for alias in node.names
        if alias.name != "*"
    ]


def _tree(text: str) -> ast.Module:
    return ast.parse(text) if syntax_problem(text) is None else ast.Module([], [])


def _begins(entry_point: str) -> str:
    return rf"^(?:async )?def {re.escape(entry_point)}\b"
