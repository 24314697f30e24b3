"""The program inside the sandbox: it imports the solution beside it, runs the tests it gets, and writes the verdict.

It imports the standard library only, and the rest of the package never imports it; `domain.py` sends its text along.
Standard input brings the tests and a nonce, drawn anew for each run, which the verdict must carry. So a solution cannot
pass by ending early, by printing something or by leaving its own result file. After the solution's import and after
each test, the judging code (unittest, the stand-in for pytest, the builtins, this module) must be unchanged.

Some cheating cannot be stopped, because the solution shares this process. Code passes that looks for the nonce in the
frames below it, that undoes its patches before they are checked, or that returns objects equal to everything. Sampled
answers do not stumble into this.

Tests written for pytest run against a stand-in for it, even where pytest is installed, so verdicts are the same
everywhere.
"""

import builtins
import contextlib
import functools
import inspect
import itertools
import json
import math
import os
import re
import sys
import types
import unittest
import unittest.case
import unittest.loader
import unittest.suite
from collections.abc import Callable, Iterator
from typing import Any

Test = Callable[[], None]
Check = Callable[[], None]


class Skipped(Exception):  # noqa: N818  # a signal, as unittest.SkipTest is
    """A test asked to be skipped."""


class Unsupported(Exception):  # noqa: N818
    """A test needs a part of pytest that the stand-in lacks."""


class Tampered(Exception):  # noqa: N818
    """The code that judges the solution was changed."""


class Approx:
    """A number, or a list, tuple or dict of numbers, that equals what is within 1e-6 relative or 1e-12 absolute."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, nan_ok: bool = False) -> None:
        self.expected, self.rel, self.abs, self.nan_ok = expected, rel, abs, nan_ok

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, found: object) -> bool:
        return self._near(found, self.expected)

    def __repr__(self) -> str:
        return f"approx({self.expected!r})"

    def _near(self, found: Any, expected: Any) -> bool:
        if isinstance(expected, dict):
            return found.keys() == expected.keys() and all(self._near(found[k], v) for k, v in expected.items())
        if isinstance(expected, list | tuple):
            pairs = zip(found, expected, strict=False)
            return len(found) == len(expected) and all(self._near(f, e) for f, e in pairs)
        if expected == found:
            return True
        if isinstance(expected, bool | str) or expected is None or isinstance(found, bool | str) or found is None:
            return False
        if math.isnan(expected) or math.isnan(found):
            return self.nan_ok and math.isnan(expected) and math.isnan(found)
        if math.isinf(expected) or math.isinf(found):
            return False
        absolute = 1e-12 if self.abs is None else self.abs
        # As in pytest, an absolute tolerance given alone replaces the relative one.
        relative = (1e-6 if self.abs is None else 0.0) if self.rel is None else self.rel
        return bool(abs(found - expected) <= max(absolute, relative * abs(expected)))


class Raises:
    """A context in which one of the expected exceptions must be raised, with a text that matches any given pattern."""

    def __init__(self, expected: Any, match: str | None = None) -> None:
        self.expected, self.match = expected, match
        self.value: Any = None
        self.type: Any = None

    def __enter__(self) -> "Raises":
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> bool:
        if kind is None:
            raise AssertionError(f"did not raise {self.expected}")
        if not issubclass(kind, self.expected):
            return False
        self.type, self.value = kind, value
        if self.match is not None and not re.search(self.match, str(value)):
            raise AssertionError(f"{value!s:.200} does not match {self.match}")
        return True


class Mark:
    """`pytest.mark`: parametrize, skip and skipif take effect; any other mark leaves the test as it is."""

    def __getattr__(self, name: str) -> Any:
        # @mark.name and @mark.name(...) are both in use.
        return lambda *values, **_: values[0] if len(values) == 1 and callable(values[0]) else (lambda test: test)

    @staticmethod
    def parametrize(names: Any, values: Any, **_: Any) -> Any:
        """Run the test once for each of the values."""
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        cases = [
            dict(zip(names, (v,) if len(names) == 1 and not isinstance(v, Param) else v, strict=True)) for v in values
        ]

        def decorate(test: Any) -> Any:
            test.cases = [*getattr(test, "cases", []), cases]
            return test

        return decorate

    @staticmethod
    def skipif(condition: Any, **_: Any) -> Any:
        """Skip the test if the condition holds."""
        return Mark.skip if condition is True else lambda test: test

    @staticmethod
    def skip(test: Any = None, **_: Any) -> Any:
        """Skip the test."""

        def decorate(test: Any) -> Any:
            test.skipped = True
            return test

        return decorate(test) if callable(test) else decorate


class Param(tuple[Any, ...]):
    """The values of one case, as `pytest.param` gives them."""


def make_pytest() -> types.ModuleType:
    """Make the stand-in for pytest: raises, approx, mark, param, fixture, fail, skip."""

    def raises(expected: Any, *call: Any, match: str | None = None, **keywords: Any) -> Any:
        context = Raises(expected, match)
        if call:
            with context:
                call[0](*call[1:], **keywords)
        return context

    def fixture(function: Any = None, **_: Any) -> Any:
        def decorate(function: Any) -> Any:
            function.fixture = True
            return function

        return decorate(function) if callable(function) else decorate

    def fail(reason: str = "", **_: Any) -> None:
        raise AssertionError(reason)

    def skip(reason: str = "", **_: Any) -> None:
        raise Skipped(reason)

    module: Any = types.ModuleType("pytest")
    module.raises, module.approx, module.mark, module.fixture = raises, Approx, Mark(), fixture
    module.fail, module.skip, module.param = fail, skip, lambda *values, **_: Param(values)
    return module  # type: ignore[no-any-return]


def collect(new: dict[str, Any], names: dict[str, Any], unchanged: Check) -> list[Test]:
    """Collect the tests among the names that the tests' text added to a module.

    Tests are functions `test*`, and methods `test*` of classes `Test*` or of TestCases.
    """
    tests: list[Test] = []
    for name, value in new.items():
        # `from heapq import merge as test_merge` is a test to nobody who wrote it.
        if isinstance(value, types.FunctionType) and name.startswith("test") and value.__globals__ is names:
            tests += _cases(value, value, names)
        elif isinstance(value, type) and value.__module__ == names["__name__"]:
            if issubclass(value, unittest.TestCase):
                tests += _unittest_cases(value, unchanged)
            elif name.startswith("Test"):
                methods = [m for m in dir(value) if m.startswith("test") and callable(getattr(value, m))]
                for method in methods:
                    tests += _cases(getattr(value, method), _fresh(value, method), names)
    return tests


class _Errors(unittest.TestResult):
    """What each test of a class raised, by the method's name; errors outside the tests are kept under None."""

    def __init__(self, unchanged: Check) -> None:
        super().__init__()
        self.unchanged = unchanged
        self.raised: dict[str | None, BaseException] = {}

    def stopTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        """Check the judging code after each test, before the next test could undo a change."""
        try:
            self.unchanged()
        except Tampered as error:
            self.raised.setdefault(None, error)
        super().stopTest(test)

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Record the end of a part of a test; it failed if there is an error."""
        if err is not None:
            self.addError(test, err)

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Record that a test, or the preparation of its class, raised."""
        self.raised.setdefault(getattr(test, "_testMethodName", None), err[1])

    addFailure = addError  # noqa: N815

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        """Record that a test, or the class, asked to be skipped, by raising or by a decorator."""
        error = sys.exc_info()[1] or Skipped(reason)
        self.raised.setdefault(getattr(test, "_testMethodName", None), error)

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        """Count an unexpected success as no failure, as BigCodeBench's own evaluation does."""


def _unittest_cases(case: type[unittest.TestCase], unchanged: Check) -> list[Test]:
    """Return the tests of a class; the first one called runs all of them, between setUpClass and tearDownClass."""
    methods = unittest.TestLoader().getTestCaseNames(case)
    errors = _Errors(unchanged)

    def test(method: str) -> None:
        if not errors.testsRun:
            unittest.TestSuite(map(case, methods)).run(errors)
            errors.testsRun = max(errors.testsRun, 1)
        error = errors.raised.get(method, errors.raised.get(None))
        if error is not None:
            raise error

    return [functools.partial(test, method) for method in methods]


def _fresh(owner: type, method: str) -> Callable[..., None]:
    def call(**arguments: Any) -> None:
        instance: Any = owner()
        for setup in ("setup_class", "setup_method"):
            function = getattr(instance, setup, None)
            if function is not None:
                function(*[None] * len(inspect.signature(function).parameters))
        getattr(instance, method)(**arguments)

    return call


def _cases(function: Any, call: Callable[..., None], names: dict[str, Any]) -> list[Test]:
    if getattr(function, "skipped", False):
        return []
    tests: list[Test] = []
    for combination in itertools.product(*getattr(function, "cases", [])):
        given = {name: value for case in combination for name, value in case.items()}

        def test(given: dict[str, Any] = given) -> None:
            with contextlib.ExitStack() as stack:
                call(**_arguments(function, given, names, stack))

        tests.append(test)
    return tests


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


def guard(pytest: types.ModuleType) -> Check:
    """Return a check that raises `Tampered` if a name in the judging code has another value or code than now."""
    modules = [builtins, json, json.encoder, unittest, unittest.case, unittest.loader, unittest.result, unittest.suite]
    modules += [pytest, sys.modules[__name__]]
    owners: list[Any] = [*modules]
    for module in modules:
        classes = (value for value in vars(module).values() if isinstance(value, type))
        owners += [value for value in classes if value.__module__ == module.__name__ != "builtins"]
    before: list[tuple[Any, str, Any, Any]] = [
        (owner, name, value, value.__code__ if isinstance(value, types.FunctionType) else None)
        for owner in owners
        for name, value in vars(owner).items()
        if not name.startswith("__") or callable(value)
    ]
    loaded, look = sys.modules, vars  # as they are now: the names may come to mean something else

    def unchanged() -> None:
        for module in modules:
            if loaded.get(module.__name__) is not module:
                raise Tampered(module.__name__)
        for owner, name, value, code in before:
            if look(owner).get(name) is not value or (code is not None and value.__code__ is not code):
                raise Tampered(f"{owner.__name__}.{name}")

    return unchanged


def _passed_through_solution(error: BaseException) -> bool:
    """Return whether the solution raised the error: a test may ask to be skipped, a solution may not."""
    trace = error.__traceback__
    while trace is not None:
        if os.path.basename(trace.tb_frame.f_code.co_filename) == "solution.py":
            return True
        trace = trace.tb_next
    return False


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Import the solution and run the tests on it.

    `request` holds `module`, the tests' text, which is executed with the solution's names in reach; `calls`, statements
    that are one test each, or null for the tests that the module defines; `names`, functions that stay the solution's
    even if the module defines them again; and `appended`. If `appended` is true, the text is executed at the end of the
    solution's own module, as BigCodeBench does, so that its imports and patches take effect there.

    Returns num_tests, num_passed, and the cause of the first failure (solution_error, tampering, test_error, no_tests,
    assertion, memory, exception, unsupported_test) with its detail.
    """
    verdict: dict[str, Any] = {"num_tests": None, "num_passed": 0, "cause": None, "detail": ""}

    def blame(cause: str, error: BaseException) -> dict[str, Any]:
        if verdict["cause"] is None:
            verdict.update(cause=cause, detail=f"{type(error).__name__}: {str(error)[:300]}")
        return verdict

    pytest = sys.modules["pytest"] = make_pytest()
    unchanged = guard(pytest)
    try:
        import solution  # type: ignore[import-not-found]

        unchanged()
    except Tampered as error:
        return blame("tampering", error)
    except BaseException as error:  # whatever the solution raises, SystemExit included, is its failure
        return blame("solution_error", error)
    names: dict[str, Any]
    if request["appended"]:
        names = vars(solution)
        names.update({"sys": sys, "os": os, "environ": os.environ} | names)  # BigCodeBench gives them to all code
    else:
        names = {name: value for name, value in vars(solution).items() if not name.startswith("__")}
        names["__name__"] = "test_solution"
    before = dict(names)
    asked = {name: names.get(name) for name in request["names"]}
    try:
        exec(compile(request["module"], "tests", "exec"), names)  # noqa: S102  # the purpose of this program
        for name, value in asked.items():
            # Some tests bring their own copy of what the solution is asked for, and would test only that.
            if getattr(names.get(name), "__globals__", None) is names and not getattr(names[name], "fixture", False):
                names[name] = value
        if request["calls"] is None:
            new = {name: value for name, value in names.items() if before.get(name) is not value}
            tests = collect(new, names, unchanged)
        else:
            codes = [compile(call, "tests", "exec") for call in request["calls"]]
            tests = [lambda code=code: exec(code, names) for code in codes]  # type: ignore[misc]  # noqa: S102
    except BaseException as error:  # as above: importing a name that the solution lacks ends here
        return blame("test_error", error)
    verdict["num_tests"] = len(tests)
    for test in tests:
        try:
            test()
            unchanged()
        except (Skipped, unittest.SkipTest) as error:
            if _passed_through_solution(error):
                blame("exception", error)
            else:
                verdict["num_tests"] -= 1
        except AssertionError as error:
            blame("assertion", error)
        except MemoryError as error:
            blame("memory", error)
        except Unsupported as error:
            blame("unsupported_test", error)
        except Tampered as error:
            blame("tampering", error)
        except BaseException as error:  # a test that calls sys.exit has failed, too
            blame("exception", error)
        else:
            verdict["num_passed"] += 1
    if verdict["num_tests"] == 0:
        verdict["cause"] = "no_tests"
    return verdict


def main() -> None:
    """Read the request, run it, write `result.json` and exit at once, whatever threads the solution started."""
    request = json.loads(sys.stdin.read())
    path, leave = os.path.abspath("result.json"), os._exit
    text = json.dumps({"nonce": request["nonce"], **run(request)})
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    leave(0)


if __name__ == "__main__":
    main()
