"""What is asked of the judging programs: which of them, with what texts, and what their answer means."""

import ast
import builtins
import concurrent.futures
import hashlib
import json
import os
import re
import secrets
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import JsonValue

from latentmem.environments.code.judging.wire import SHARED_MODULES
from latentmem.environments.sandbox.sandbox import Sandbox, SandboxResult
from latentmem.errors import SandboxError

_ALSO_SHARED = frozenset({"pytest", "solution", "random", "sys", "timeit", "inspect", "types", "__future__"})
"""Modules that tests judged apart may import, as long as they use no name of `_OF_ONE_PROCESS`."""
_OF_ONE_PROCESS = frozenset(
    [
        "mock",
        "patch",
        "monkeypatch",
        "capsys",
        "capfd",
        "caplog",
        "tmp_path",
        "tmpdir",
        "setrecursionlimit",
        "stdout",
        "stdin",
        "stderr",
        "argv",
        "modules",
        "seed",
        "settrace",
        "environ",
        "open",
        "globals",
        "locals",
        "exec",
        "eval",
        "__import__",
        "setswitchinterval",
        "getrecursionlimit",
        "getsource",
        "signature",
        "isgeneratorfunction",
        "iscoroutinefunction",
        "getfullargspec",
        "getmembers",
        "__code__",
        "__globals__",
        "__closure__",
        "__dict__",
        "__wrapped__",
        "getrefcount",
        "getsizeof",
        "asdict",
        "is_dataclass",
    ]
)
"""Names by which a test reaches into the process of what it tests."""
_CHANGES = frozenset(
    [
        "append",
        "extend",
        "insert",
        "remove",
        "pop",
        "clear",
        "sort",
        "reverse",
        "add",
        "discard",
        "update",
        "setdefault",
        "popitem",
    ]
)


@dataclass(frozen=True)
class TaskTests:
    """The tests of one task."""

    module: str
    """Text that is executed with the solution's names in reach."""
    calls: tuple[str, ...] | None
    """Statements that are one test each; None for the tests that the module defines."""
    names: tuple[str, ...] = ()
    """What the solution is asked for."""
    appended: bool = False
    """Whether the module belongs to the end of the solution's own module, as in BigCodeBench."""

    @property
    def texts(self) -> tuple[str, ...]:
        """All of their Python."""
        return (self.module, *(self.calls or ()))


@cache
def needs_one_process(tests: TaskTests) -> str | None:
    """Why tests have to run in the process of what they test; None if they can be judged apart.

    It depends on the tests alone, so that no solution can choose.
    """
    try:
        trees = [ast.parse(text) for text in tests.texts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # unsupported in either way
    nodes = [node for tree in trees for node in ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    imported: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module not in SHARED_MODULES | _ALSO_SHARED and module != "collections.abc":
                    return f"imports {module}"
            if isinstance(node, ast.ImportFrom) and node.module != "solution":
                imported |= {a.asname or a.name for a in node.names}
            for alias in node.names:
                if alias.name in _OF_ONE_PROCESS:
                    return f"uses {alias.name}"
    for node in nodes:
        problem = _reaches_in(node, own | imported)
        if problem:
            return problem
    if tests.appended:
        borrowed = _free_names(nodes) - set(tests.names)
        if borrowed:
            return f"uses {min(borrowed)} of the solution"
        if any(_defines_inside(node) for node in nodes):
            return "hands functions over, which may be inspected"
    return None


def _free_names(nodes: list[ast.AST]) -> set[str]:
    """Names that tests use and neither define nor import."""
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return {name for name in used - bound if not hasattr(builtins, name) and not name.startswith("__")}


def _defines_inside(node: ast.AST) -> bool:
    is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    return is_test and any(isinstance(n, ast.FunctionDef | ast.Lambda) for n in ast.walk(node) if n is not node)


def _reaches_in(node: ast.AST, known_bases: set[str]) -> str | None:
    if isinstance(node, ast.Name) and node.id in _OF_ONE_PROCESS:
        return f"uses {node.id}"
    if isinstance(node, ast.arg) and node.arg in _OF_ONE_PROCESS:
        return f"uses {node.arg}"
    if isinstance(node, ast.Attribute) and node.attr in _OF_ONE_PROCESS:
        return f"uses {node.attr}"
    if isinstance(node, ast.Await):
        return "awaits"
    if isinstance(node, ast.ClassDef):
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id not in known_bases and not hasattr(builtins, base.id):
                return f"derives a class from {base.id}"
            if isinstance(base, ast.Attribute) and not _is_module(base.value):
                return f"derives a class from {ast.unparse(base)}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGES:
        inner = node.func.value
        if isinstance(inner, ast.Attribute) and not (isinstance(inner.value, ast.Name) and inner.value.id == "self"):
            return f"changes {ast.unparse(inner)}"
    targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
    if isinstance(node, ast.AugAssign):
        targets = [node.target]
    for target in targets:
        if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Attribute):
            return f"changes {ast.unparse(target.value)}"
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "solution":
            return f"changes {ast.unparse(target)}"
    return None


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in SHARED_MODULES | {"collections"}


@cache
def _programs(*names: str) -> dict[str, str]:
    folder = files("latentmem.environments.code.judging")
    return {f"judging/{name}.py": (folder / f"{name}.py").read_text(encoding="utf-8") for name in ("__init__", *names)}


def ask_for_verdict(sandbox: Sandbox, program: str, tests: TaskTests) -> dict[str, JsonValue]:
    """Run the tests on a program and say what became of them; `cause` is None where all passed.

    Raises:
        SandboxError: a sandbox could not start its program, which is no fault of the solution.
    """
    if _ask_for_nothing(tests):
        detail = f"no test names {' or '.join(tests.names)}, so any program would pass"
        verdict = {"num_tests": 0, "num_passed": 0, "cause": "unsupported_test", "detail": detail}
        return {**_said(verdict, sandbox.level), "judged": "apart"}
    if needs_one_process(tests) is None:
        return {**_judged_apart(sandbox, program, tests), "judged": "apart"}
    return {**_judged_inside(sandbox, program, tests), "judged": "inside"}


@cache
def _ask_for_nothing(tests: TaskTests) -> bool:
    """Whether no test names what the solution is asked for."""
    named = [rf"\b{re.escape(name)}\b" for name in tests.names]
    return bool(named) and not any(re.search(name, text) for name in named for text in tests.texts)


def _judged_apart(sandbox: Sandbox, program: str, tests: TaskTests) -> dict[str, JsonValue]:
    nonce = secrets.token_hex(16)
    request: dict[str, Any] = {"nonce": nonce, "module": tests.module, "calls": tests.calls, "names": tests.names}
    request["imports"] = _imports(tests.module) if tests.appended else ""
    asks, hears = os.pipe(), os.pipe()  # what the judge says, and what the solution says
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        solved = threads.submit(
            sandbox.run,
            {"solution.py": program, **_programs("wire", "mirrors", "solver")},
            ["python", "-m", "judging.solver", str(asks[0]), str(hears[1])],
            passed=(asks[0], hears[1]),
        )
        judged = sandbox.run(
            _programs("wire", "mirrors", "standin", "collecting", "judge"),
            ["python", "-m", "judging.judge", str(hears[0]), str(asks[1])],
            stdin=json.dumps(request),
            result_file="result.json",
            passed=(hears[0], asks[1]),
        )
        solver = solved.result()
    for result in (judged, solver):
        if result.status == "failed":
            raise SandboxError(f"sandbox {result.level}: the program could not be started ({result.cause})")
    verdict = judged.result
    if judged.status == "exited" and isinstance(verdict, dict) and verdict.get("nonce") == nonce:
        if verdict.get("cause") != "early_exit":
            return _said(verdict, judged.level)
        return ended_early(solver)
    return ended_early(solver if solver.status != "exited" else judged)


def _judged_inside(sandbox: Sandbox, program: str, tests: TaskTests) -> dict[str, JsonValue]:
    nonce = secrets.token_hex(16)
    request = {"nonce": nonce, "module": tests.module, "calls": tests.calls, "names": tests.names}
    result = sandbox.run(
        {"solution.py": program, **_programs("standin", "collecting", "inside")},
        ["python", "-m", "judging.inside"],
        stdin=json.dumps({**request, "appended": tests.appended}),
        result_file="result.json",
    )
    if result.status == "failed":
        raise SandboxError(f"sandbox {result.level}: the program could not be started ({result.cause})")
    verdict = signed_verdict(result, nonce)
    return ended_early(result) if verdict is None else _said(verdict, result.level)


def signed_verdict(result: SandboxResult, nonce: str) -> dict[str, JsonValue] | None:
    """The verdict of a run that ended by itself and signed it with its nonce."""
    found = result.result
    if result.status != "exited" or result.exit_code != 0 or not isinstance(found, dict):
        return None
    text = found.get("verdict")
    if not isinstance(text, str):
        return None
    right = hashlib.blake2b(text.encode(), key=nonce.encode()).hexdigest()
    if not secrets.compare_digest(right, str(found.get("signature")).encode("ascii", "replace").decode()):
        return None
    return dict(json.loads(text))


def _said(verdict: dict[str, Any], level: str) -> dict[str, JsonValue]:
    num_tests, num_passed, cause = verdict.get("num_tests"), verdict.get("num_passed"), verdict.get("cause")
    assert cause is not None or (num_tests == num_passed and num_tests), verdict
    return {
        "num_tests": num_tests,
        "num_tests_passed": num_passed,
        "cause": cause,
        "detail": verdict.get("detail", ""),
        "sandbox": level,
    }


def ended_early(result: SandboxResult) -> dict[str, JsonValue]:
    """What a program that brought no verdict died of."""
    if result.status != "exited":
        ended = "memory" if "memory" in result.cause.lower() else "killed"
        names = {"timeout": "timeout", "output_limit": "output"}
        return {"cause": names.get(result.status, ended), "detail": result.cause, "sandbox": result.level}
    last = result.stderr.strip().splitlines()[-1:] or ["nothing on stderr"]
    detail = f"exit status {result.exit_code} before the tests had ended; {last[0][:300]}"
    ended = "memory" if "MemoryError" in last[0] else "early_exit"
    return {"cause": ended, "detail": detail, "sandbox": result.level}


def _imports(module: str) -> str:
    """The lines of a tests' text that import, which in BigCodeBench its solution shares."""
    try:
        tree = ast.parse(module)
    except (SyntaxError, ValueError):
        return ""
    lines = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(["import os, sys", "from os import environ", *lines])  # the first two as its evaluation does
