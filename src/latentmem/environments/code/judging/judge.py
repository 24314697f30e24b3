"""The process that judges: it runs the tests, and asks the solution in its own process whatever they want to know.

Tests, expected values and the verdict are here only. Of its objects the other process gets to see functions and
iterators that a test passes on, to call and to step, and the public parts of a test's own classes.
"""

import ast
import builtins
import collections.abc
import functools
import json
import os
import sys
import types
import unittest
from typing import Any

from .collecting import Verdict, find_tests, run_tests
from .mirrors import OPERATORS, TEXTS, MirrorClass
from .standin import make_pytest
from .wire import Gone, Peer

_MODULE = "test_solution"
_CALLED = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_FROM_SOLUTION = 0
"""The number of the solution's loader; see `solver.py`."""


def _is_of_tests(value: Any) -> bool:
    kind = value if isinstance(value, type) else type(value)
    return kind.__module__ == _MODULE and not issubclass(kind, unittest.TestCase)


def shows(value: Any) -> bool:
    """Whether the solution may be handed an object of the tests."""
    return type(value) is object or isinstance(value, (*_CALLED, collections.abc.Iterator)) or _is_of_tests(value)


def permits(value: Any, action: str, arguments: tuple[Any, ...]) -> bool:
    """Whether the solution may do this with an object of the tests: nothing leads from it to what is expected."""
    if action == "call":
        return isinstance(value, _CALLED) or _is_of_tests(value)
    if action in ("get", "set", "del"):
        name = arguments[0]
        if type(name) is not str:
            return False
        if action == "get" and name in ("__name__", "__qualname__", "__doc__") and isinstance(value, (*_CALLED, type)):
            return True
        return _is_of_tests(value) and not name.startswith("_") and not (action != "get" and isinstance(value, type))
    return action in OPERATORS or action in TEXTS or action == "plain"


def judge(request: dict[str, Any], peer: Peer) -> Verdict:
    """Let the other process import the solution, and run the tests of a request against it.

    The verdict's cause is one of solution_error, test_error, no_tests, unsupported_test, assertion, memory, exception,
    and early_exit if the other process ended before the tests.
    """
    verdict = Verdict()
    sys.modules["pytest"] = make_pytest()
    try:
        found = peer.ask(_FROM_SOLUTION, "call", request["imports"])
    except Gone as error:
        return verdict.blame("early_exit", error)
    except BaseException as error:  # whatever the solution raises, SystemExit included
        return verdict.blame("solution_error", error)
    if type(found) is not dict:
        return verdict.blame("early_exit", Gone("no names"))
    solution = types.ModuleType("solution")
    vars(solution).update(found)
    sys.modules["solution"] = solution
    known = _identifiers(request)
    for name, value in found.items():
        if isinstance(value, MirrorClass) and name in known:
            value._mirror_is_known = True
    # What a solution calls `sorted` is its own affair, unless that is what it was asked for.
    names = {n: v for n, v in found.items() if n in request["names"] or not hasattr(builtins, n)}
    names["__name__"] = _MODULE
    names["__builtins__"] = builtins

    def alive() -> None:
        if peer.gone:
            raise Gone("the solution has ended")

    tests = find_tests(request, names, verdict, alive)
    if tests is not None:
        run_tests(tests, verdict, alive, Gone)
    if peer.gone:
        verdict.update(cause="early_exit", detail="the solution's process ended before the tests")
    return verdict


def _identifiers(request: dict[str, Any]) -> set[str]:
    """All names that the tests' texts use."""
    found: set[str] = set()
    for text in (request["module"], *(request["calls"] or ())):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.alias):
                found.add(node.name)
    return found


def main() -> None:
    """Judge the request on standard input over the two descriptors of the command line; write `result.json`."""
    request = json.loads(sys.stdin.read())
    path = os.path.abspath("result.json")
    verdict = judge(request, Peer(int(sys.argv[1]), int(sys.argv[2]), shows, permits))
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"nonce": request["nonce"], **verdict}, file)
        file.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
