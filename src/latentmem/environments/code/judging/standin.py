"""The stand-in for pytest that tests meet, even where pytest is installed: one verdict everywhere."""

import math
import re
import types
from typing import Any


class Skipped(Exception):  # noqa: N818  # a signal, as unittest.SkipTest is
    """A test asked not to be run."""


class Unsupported(Exception):  # noqa: N818
    """A test needs a part of pytest that the stand-in lacks."""


class Approx:
    """A number, or a list, tuple or dict of them, equal to what is within 1e-6 relative or 1e-12 absolute."""

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
    """Context in which one of the expected exceptions must be raised, its text matching a pattern if there is one."""

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
    """`pytest.mark`: parametrize, skip and skipif mean something, any other mark leaves the test as it is."""

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
        """Leave the test out if the condition holds."""
        return Mark.skip if condition is True else lambda test: test

    @staticmethod
    def skip(test: Any = None, **_: Any) -> Any:
        """Leave the test out."""

        def decorate(test: Any) -> Any:
            test.skipped = True
            return test

        return decorate(test) if callable(test) else decorate


class Param(tuple[Any, ...]):
    """Values of one case, as `pytest.param` gives them."""


def make_pytest() -> types.ModuleType:
    """The stand-in for pytest: raises, approx, mark, param, fixture, fail, skip."""

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
