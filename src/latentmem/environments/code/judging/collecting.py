"""Finds the tests in what a tests' text defines, and runs each once: what did not run has not passed."""

import asyncio
import contextlib
import functools
import inspect
import itertools
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any

from .standin import Skipped, Unsupported

Test = Callable[[], None]
Check = Callable[[], None]

_exit_stack, _partial = contextlib.ExitStack, functools.partial


def _nothing() -> None:
    pass


# The operations without their arguments, which differ with a text.
_NOTHING = [code.co_code[::2] for code in (_nothing.__code__, compile("", "", "exec"), compile("'text'", "", "exec"))]


def is_empty(code: types.CodeType) -> bool:
    """Whether a function or a module does nothing: it has no statement but pass and texts."""
    return code.co_code[::2] in _NOTHING


def finish(returned: Any) -> None:
    """Run a coroutine that a test returned to its end.

    Raises:
        Unsupported: the test is a generator, or returned something else that would have to be waited for.
    """
    if inspect.iscoroutine(returned):
        asyncio.run(returned)
    elif inspect.isgenerator(returned) or inspect.isasyncgen(returned):
        raise Unsupported("a test that is a generator does not run")
    elif inspect.isawaitable(returned):
        raise Unsupported("a test that returns an awaitable does not run")


def collect(new: dict[str, Any], names: dict[str, Any], unchanged: Check) -> tuple[list[Test], int]:
    """The tests among what the tests' text brought into a module's names, and how many more are skipped or empty.

    Tests are functions `test*`, and methods `test*` of classes `Test*` or TestCases.
    """
    tests: list[Test] = []
    left_out = 0
    for name, value in new.items():
        # `from heapq import merge as test_merge` is a test to nobody who wrote it.
        if isinstance(value, types.FunctionType) and name.startswith("test") and value.__globals__ is names:
            found, out = _cases(value, value, names)
        elif isinstance(value, type) and value.__module__ == names["__name__"]:
            if issubclass(value, unittest.TestCase):
                found, out = _unittest_cases(value, unchanged)
            elif name.startswith("Test"):
                found, out = [], 0
                for method in (m for m in dir(value) if m.startswith("test") and callable(getattr(value, m))):
                    more, more_out = _cases(getattr(value, method), _fresh(value, method), names)
                    found, out = found + more, out + more_out
            else:
                continue
        else:
            continue
        tests, left_out = tests + found, left_out + out
    return tests, left_out


class _Errors(unittest.TestResult):
    """What each test of a class raised, by the name of its method; under None what went wrong around them."""

    def __init__(self, unchanged: Check) -> None:
        super().__init__()
        self.unchanged = unchanged
        self.raised: dict[str | None, BaseException] = {}
        self.ended: set[str] = set()

    def stopTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        """Look at the judges after each test, for the next one may put them back."""
        try:
            self.unchanged()
        except BaseException as error:
            self.raised.setdefault(None, error)
        self.ended.add(test._testMethodName)
        super().stopTest(test)

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """A part of a test has ended; it failed if there is an error."""
        if err is not None:
            self.addError(test, err)

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """A test, or the preparation of its class, raised."""
        self.raised.setdefault(getattr(test, "_testMethodName", None), err[1])

    addFailure = addError  # noqa: N815

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        """A test, or the preparation of its class, asked not to be run."""
        self.raised.setdefault(getattr(test, "_testMethodName", None), sys.exc_info()[1] or Skipped(reason))

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        """As in BigCodeBench's own evaluation, that is no failure."""


def _unittest_cases(case: type[unittest.TestCase], unchanged: Check) -> tuple[list[Test], int]:
    """The tests of a class; the first one that is asked for plays all, between setUpClass and tearDownClass."""
    found = unittest.TestLoader().getTestCaseNames(case)
    methods = [m for m in found if not _is_left_out(case, m)]
    for method in methods:
        function = getattr(case, method)
        if inspect.isgeneratorfunction(function) or not issubclass(case, unittest.IsolatedAsyncioTestCase):
            setattr(case, method, _finished(function))
    errors = _Errors(unchanged)

    def test(method: str) -> None:
        if not errors.testsRun:
            unittest.TestSuite([case(name) for name in methods]).run(errors)
            errors.testsRun = max(errors.testsRun, 1)
        error = errors.raised.get(method, errors.raised.get(None))
        if error is not None:
            raise error
        if method not in errors.ended:
            raise Unsupported(f"{method} did not run")

    return [_partial(test, method) for method in methods], len(found) - len(methods)


def _is_left_out(case: type, method: str) -> bool:
    function = getattr(case, method)
    skipped = getattr(function, "__unittest_skip__", False) or getattr(case, "__unittest_skip__", False)
    return bool(skipped) or is_empty(getattr(function, "__code__", _finished.__code__))


def _finished(function: Any) -> Any:
    @functools.wraps(function)
    def test(*values: Any, **named: Any) -> None:
        finish(function(*values, **named))

    return test


def _fresh(owner: type, method: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        instance: Any = owner()
        for setup in ("setup_class", "setup_method"):
            function = getattr(instance, setup, None)
            if function is not None:
                function(*[None] * len(inspect.signature(function).parameters))
        return getattr(instance, method)(**arguments)

    return call


def _cases(function: Any, call: Callable[..., Any], names: dict[str, Any]) -> tuple[list[Test], int]:
    if getattr(function, "skipped", False) or is_empty(function.__code__):
        return [], 1
    tests: list[Test] = []
    for combination in itertools.product(*getattr(function, "cases", [])):
        given = {name: value for case in combination for name, value in case.items()}

        def test(given: dict[str, Any] = given) -> None:
            with _exit_stack() as stack:
                finish(call(**_arguments(function, given, names, stack)))

        tests.append(test)
    return tests, 0 if tests else 1


def _arguments(
    function: Any, given: dict[str, Any], names: dict[str, Any], stack: contextlib.ExitStack
) -> dict[str, Any]:
    arguments = dict(given)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in given or name == "self" or parameter.default is not parameter.empty:
            continue
        fixture: Any = names.get(name)
        if not getattr(fixture, "fixture", False):
            raise Unsupported(f"no fixture {name}")
        value = fixture(**_arguments(fixture, {}, names, stack))
        if inspect.isgenerator(value):
            value = stack.enter_context(_once(value))
        arguments[name] = value
    return arguments


@contextlib.contextmanager
def _once(generator: Iterator[Any]) -> Iterator[Any]:
    yield next(generator)
    next(generator, None)


class Verdict(dict[str, Any]):
    """What became of the tests: num_tests, num_passed, and of the first failure its cause and detail."""

    def __init__(self) -> None:
        super().__init__(num_tests=None, num_passed=0, cause=None, detail="")

    def blame(self, cause: str, error: object) -> "Verdict":
        """Note a failure; the first one stays."""
        if self["cause"] is None:
            self.update(cause=cause, detail=f"{type(error).__name__}: {str(error)[:300]}")
        return self


def find_tests(request: dict[str, Any], names: dict[str, Any], verdict: Verdict, unchanged: Check) -> list[Test] | None:
    """Execute the tests' text among the solution's names and find its tests; None if the verdict is spoken.

    request: `module`, text executed with the solution's names in reach; `calls`, statements that are one test each,
    or null for the tests that the module defines; `names`, functions that are the solution's even where the module
    defines them again.
    """
    try:
        module = compile(request["module"], "tests", "exec")
        codes = None if request["calls"] is None else [compile(call, "tests", "exec") for call in request["calls"]]
    except (SyntaxError, ValueError) as error:
        verdict.blame("unsupported_test", error)
        return None
    before = dict(names)
    asked = {name: names.get(name) for name in request["names"]}
    try:
        exec(module, names)  # noqa: S102  # the purpose of this program
        for name, value in asked.items():
            # Some tests bring their own copy of what the solution is asked for, and would test only that.
            if getattr(names.get(name), "__globals__", None) is names and not getattr(names[name], "fixture", False):
                names[name] = value
        if codes is None:
            new = {name: value for name, value in names.items() if before.get(name) is not value}
            tests, left_out = collect(new, names, unchanged)
        else:
            running = [code for code in codes if not is_empty(code)]
            tests, left_out = [_partial(exec, code, names) for code in running], len(codes) - len(running)
    except BaseException as error:  # importing a name that the solution lacks ends here
        verdict.blame("test_error", error)
        return None
    verdict["num_tests"] = len(tests)
    if not tests:
        verdict.update(cause="unsupported_test" if left_out else "no_tests", detail=f"{left_out} skipped or empty")
        return None
    return tests


def run_tests(tests: list[Test], verdict: Verdict, unchanged: Check, tampered: type[BaseException]) -> None:
    """Run each test once, and look after each whether what judges is unchanged."""
    for test in tests:
        try:
            test()
            unchanged()
        except (Skipped, unittest.SkipTest, Unsupported) as error:
            verdict.blame("unsupported_test", error)
        except AssertionError as error:
            verdict.blame("assertion", error)
        except MemoryError as error:
            verdict.blame("memory", error)
        except tampered as error:
            verdict.blame("tampering", error)
        except BaseException as error:  # a test that calls sys.exit has failed, too
            verdict.blame("exception", error)
        else:
            verdict["num_passed"] += 1
