"""The stand-in for pytest that a solution's tests meet in the sandbox, held to what pytest itself does."""

import textwrap

import pytest

from latentmem.environments.code.judging import inside, standin


def run(module, solution="def twice(x):\n    return 2 * x", calls=None, appended=False):
    import sys
    import types

    names = types.ModuleType("solution")
    exec(solution, vars(names))
    saved = {name: sys.modules.get(name) for name in ("pytest", "solution")}
    sys.modules["solution"] = names
    try:
        return inside.run({"module": textwrap.dedent(module), "names": [], "calls": calls, "appended": appended})
    finally:
        for name, value in saved.items():
            sys.modules.pop(name)
            if value is not None:
                sys.modules[name] = value


def test_what_pytest_tests_commonly_use_is_understood():
    verdict = run(
        """
        import pytest, unittest
        from heapq import merge as test_merge

        @pytest.fixture
        def base():
            yield 2

        @pytest.fixture()
        def double(base):
            return twice(base)

        def test_fixtures(double, base, extra=1):
            assert double == 2 * base

        @pytest.mark.parametrize("x, y", [(1, 2), (2, 4), pytest.param(3, 6)])
        @pytest.mark.parametrize("z", [0, 1])
        def test_cases(x, y, z):
            assert twice(x) + z == y + z

        class TestGroup:
            def setup_method(self):
                self.x = 4
            def test_method(self):
                assert twice(self.x) == 8

        class Case(unittest.TestCase):
            def test_equal(self):
                self.assertEqual(twice(3), 6)

        def test_raises():
            with pytest.raises((TypeError, ValueError), match="unsupported|bad") as caught:
                twice([]) + 1
                raise ValueError("bad")
            assert caught.type in (TypeError, ValueError)

        @pytest.mark.skip(reason="x")
        def test_skipped():
            assert False

        @pytest.mark.timeout(3)
        def test_marked():
            assert twice(0) == 0

        def helper():
            assert False
        """.replace('"unsupported|bad"', '"concatenate|unsupported|bad"')
    )
    assert verdict == {"num_tests": 11, "num_passed": 11, "cause": None, "detail": ""}


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("with pytest.raises(ValueError): twice(1)", "assertion"),
        ("with pytest.raises(ValueError): 1 / 0", "exception"),
        ("with pytest.raises(ZeroDivisionError, match='nonsense'): 1 / 0", "assertion"),
        ("pytest.fail('no')", "assertion"),
        ("assert twice(1) == pytest.approx(2.1)", "assertion"),
        ("assert [2.0, 3] == pytest.approx([2])", "assertion"),
    ],
)
def test_what_must_fail_fails(body, cause):
    verdict = run(f"import pytest\ndef test_it():\n    {body}\n")
    assert (verdict["num_passed"], verdict["cause"]) == (0, cause)


@pytest.mark.parametrize(
    ("found", "expected", "options"),
    [
        (1.0, 1.0 + 5e-7, {}),
        (1.0, 1.0 + 5e-6, {}),
        (0.0, 1e-13, {}),
        (0.0, 1e-11, {}),
        (100.0, 101.0, {"rel": 0.02}),
        (100.0, 101.0, {"abs": 0.5}),
        (100.0, 100.00001, {"abs": 1e-9}),
        (float("nan"), float("nan"), {}),
        (float("nan"), float("nan"), {"nan_ok": True}),
        (float("inf"), float("inf"), {}),
        (float("inf"), 1.0, {}),
        (1.0, float("inf"), {}),
        ([1.0, 2.0], [1.0, 2.0 + 1e-9], {}),
        ((1.0,), [1.0, 2.0], {}),
        ({"a": 1.0}, {"a": 1.0 + 1e-9}, {}),
        ({"a": 1.0}, {"b": 1.0}, {}),
        (True, True, {}),
    ],
)
def test_approx_agrees_with_pytest(found, expected, options):
    if isinstance(found, tuple):
        expected = tuple(expected)
    assert (found == standin.Approx(expected, **options)) == (found == pytest.approx(expected, **options))


def test_an_unknown_fixture_and_a_module_without_tests_are_named():
    assert run("def test_it(capsys): pass")["cause"] == "unsupported_test"
    assert run("x = 1")["cause"] == "no_tests"


def test_calls_are_one_test_each_with_the_solution_in_reach():
    verdict = run("LIMIT = 4", calls=["assert twice(2) == LIMIT", "assert twice(1) == LIMIT", "twice()"])
    assert (verdict["num_tests"], verdict["num_passed"], verdict["cause"]) == (3, 1, "assertion")


def test_a_unittest_class_is_prepared_once_and_each_of_its_tests_counted():
    verdict = run(
        """
        import unittest

        class TestCases(unittest.TestCase):
            prepared = 0

            @classmethod
            def setUpClass(cls):
                cls.prepared += 1

            def test_a_passes(self):
                self.assertEqual(twice(self.prepared), 2)

            def test_b_fails(self):
                self.assertEqual(twice(1), 3)

            def test_c_fails_in_part(self):
                for x in (0, 1, 0):
                    with self.subTest(x=x):
                        self.assertEqual(twice(x), 0)

            @unittest.skip("never")
            def test_d_is_skipped(self):
                raise ValueError

            @unittest.expectedFailure
            def test_e_fails_as_it_should(self):
                self.fail()

            def test_f_leaves(self):
                raise SystemExit(0)
        """
    )
    assert (verdict["num_tests"], verdict["num_passed"], verdict["cause"]) == (5, 2, "assertion")
    broken = run(
        """
        import unittest

        class TestCases(unittest.TestCase):
            @classmethod
            def setUpClass(cls):
                raise KeyError("no data")

            def test_a(self):
                self.assertEqual(twice(1), 2)
        """
    )
    assert (broken["num_tests"], broken["num_passed"], broken["cause"]) == (1, 0, "exception")
    assert "no data" in broken["detail"]


@pytest.mark.parametrize(
    ("module", "calls"),
    [
        ("def test_it():\n    yield\n    assert twice(1) == 2", None),
        ("async def test_it():\n    yield twice(1)", None),
        ("def test_it():\n    class Later:\n        def __await__(self): yield\n    return Later()", None),
        ("def test_it():\n    '''Later.'''", None),
        ("def test_it(): ...", None),
        ("import pytest\n@pytest.mark.skip\ndef test_it():\n    assert twice(1) == 2", None),
        ("import pytest\n@pytest.mark.parametrize('x', [])\ndef test_it(x):\n    assert twice(x) == 2", None),
        ("import pytest\ndef test_it():\n    pytest.skip('never')", None),
        ("import unittest\nclass TestIt(unittest.TestCase):\n    def test_it(self): pass", None),
        ("import unittest\nclass TestIt(unittest.TestCase):\n    def test_it(self):\n        self.skipTest('x')", None),
        ("import unittest\nclass TestIt(unittest.TestCase):\n    @unittest.skip('x')\n"
         "    def test_it(self):\n        1 / 0", None),
        ("import unittest\nclass TestIt(unittest.TestCase):\n    @classmethod\n    def setUpClass(cls):\n"
         "        raise unittest.SkipTest\n    def test_it(self):\n        1 / 0", None),
        ("import unittest\nclass TestIt(unittest.TestCase):\n    def test_it(self):\n        yield 1", None),
        ("def test_it(:", None),
        ("", [""]),
        ("", ["# assert twice(1) == 2", "pass"]),
        ("", ["assert twice(1) == "]),
    ],
)  # fmt: skip
def test_tests_that_do_not_run_pass_nothing(module, calls):
    verdict = run(module, calls=calls)
    assert (verdict["num_passed"], verdict["cause"]) == (0, "unsupported_test")


@pytest.mark.parametrize(
    "module",
    [
        "async def test_it():\n    assert twice(1) == 2",
        "import pytest\n@pytest.mark.asyncio\nasync def test_it():\n    assert twice(1) == 2",
        "import unittest\nclass TestIt(unittest.TestCase):\n    async def test_it(self):\n"
        "        self.assertEqual(twice(1), 2)",
        "import unittest\nclass TestIt(unittest.IsolatedAsyncioTestCase):\n    async def test_it(self):\n"
        "        self.assertEqual(twice(1), 2)",
        "class TestIt:\n    async def test_it(self):\n        assert twice(1) == 2",
    ],
)
def test_coroutines_are_run_to_their_end(module):
    assert run(module) == {"num_tests": 1, "num_passed": 1, "cause": None, "detail": ""}
    wrong = run(module, solution="def twice(x):\n    return x")
    assert (wrong["num_passed"], wrong["cause"]) == (0, "assertion")


def test_what_is_skipped_or_empty_does_not_count_beside_others():
    verdict = run("", calls=["assert twice(1) == 2", " "])
    assert verdict == {"num_tests": 1, "num_passed": 1, "cause": None, "detail": ""}


def test_appended_tests_share_the_solutions_module_and_its_own_tests_do_not_count():
    solution = """
import unittest
class TestCases(unittest.TestCase):
    def test_mine(self):
        pass
class TestMine(TestCases):
    pass
def test_also_mine():
    pass
def root(x):
    return math.isqrt(x)
def here():
    return os.path.basename(sys.executable) and environ is os.environ
"""
    tests = """
        import math
        from unittest.mock import patch
        class TestCases(unittest.TestCase):
            def test_root(self):
                self.assertEqual(root(10), 3)
                with patch(f"{__name__}.math.isqrt", return_value=7):
                    self.assertEqual(root(10), 7)
            def test_here(self):
                self.assertTrue(here())
        """
    verdict = run(tests, solution, appended=True)
    assert verdict == {"num_tests": 2, "num_passed": 2, "cause": None, "detail": ""}
    assert run(tests, solution)["cause"] == "exception"  # alone, the solution has neither math nor os
    assert run("x = 1", solution, appended=True)["cause"] == "no_tests"
