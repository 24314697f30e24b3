"""Wrong solutions that try to be paid all the same: none is, at any level of confinement that the machine has."""

# ruff: noqa: E501 - a table, a cheat a line

import pytest

from latentmem.config import SandboxSection
from latentmem.environments.code.domain import CodeEnvironment
from latentmem.environments.sandbox.sandbox import Sandbox

# The task: f(x) is 2 * x, and each wrong solution gives None in the end, or whatever it thinks will do.
FORMS = {
    "functions": {
        "module": "import math, pytest\nfrom solution import f\ndef test_one():\n    assert f(1) == 2\n"
        "def test_two():\n    assert math.isclose(f(2), 4)\ndef test_three():\n    assert f(3) == pytest.approx(6)\n"
        "def test_four():\n    assert sorted([f(4), 1]) == [1, 8] and set([f(5)]) == {10}\n",
    },
    "statements": {
        "module": "import math",
        "calls": (
            "assert f(1) == 2",
            "assert set([f(2)]) == set([4])",
            "assert sorted([f(3)]) == [6]",
            "assert abs(f(4) - 8) < 1e-6",
        ),
    },
    "methods": {
        "module": "import unittest\nclass TestCases(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(1), 2)\n"
        "    def test_b(self): self.assertTrue(f(2) == 4)\n    def test_c(self): self.assertIn(f(3), [6])\n",
        "appended": True,
    },
    "inside": {
        "module": "import os, math, unittest\nclass TestCases(unittest.TestCase):\n"
        "    def test_a(self): self.assertEqual(f(1), 2)\n    def test_b(self): assert math.isclose(f(2), 4)\n",
        "appended": True,
    },
}
WRONG = "\ndef f(x): return None\n"
LIAR = "class Liar{base}:\n    def {name}: return {value}\n{more}def f(x): return Liar({made})\n"


def patched(lines, wrong=WRONG):
    return lines + wrong


def liar(name, value, base="", more="", made=""):
    return LIAR.format(name=name, value=value, base=base, more=more, made=made)


OPERATORS = "    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = lambda *a: True\n    __hash__ = lambda s: 4\n"
FORGED = '{"num_tests": 4, "num_passed": 4, "cause": None, "detail": "", "nonce": "", "signature": "", "verdict": "{}"}'

# Cheats that need no knowledge of where the tests run.
ANYWHERE = {
    "leaves at once": "import os; os._exit(0)",
    "leaves politely": "import sys; sys.exit(0)",
    "leaves in a call": "import os\ndef f(x): os._exit(0)",
    "exits in a call": "def f(x): raise SystemExit(0)",
    "prints success": patched("print('4 passed'); print('OK')"),
    "writes a verdict": patched(f"import json; json.dump({FORGED}, open('result.json', 'w'))"),
    "writes a verdict and leaves": f"import json, os; json.dump({FORGED}, open('result.json', 'w')); os._exit(0)",
    "a FIFO for a verdict": patched("import os; os.mkfifo('result.json')"),
    "a folder for a verdict": patched("import os; os.makedirs('result.json/x')"),
    "a link for a verdict": patched("import os; os.symlink('/dev/full', 'result.json')"),
    "reads its input again": "import os, json\nos.lseek(0, 0, 0); r = json.loads(os.read(0, 1 << 20))\n"
    "json.dump({'nonce': r['nonce'], 'num_tests': 4, 'num_passed': 4, 'cause': None, 'detail': ''}, open('result.json', 'w'))\nos._exit(0)",
    "reads its input in a call": "import os\ndef f(x):\n    os.lseek(0, 0, 0); text = os.read(0, 1 << 20)\n    return 2 * x if b'assert' in text else None",
    "a child that rewrites the verdict": patched(
        "import os, json\nif os.fork() == 0:\n    os.setsid()\n    while True:\n        try:\n"
        "            d = json.load(open('result.json')); d.update(num_passed=d['num_tests'], cause=None)\n"
        "            open('r2', 'w').write(json.dumps(d)); os.rename('r2', 'result.json')\n        except Exception: pass"),
    "a child between a FIFO and the verdict": patched(
        "import os, json\nos.mkfifo('result.json')\nif os.fork() == 0:\n    v = json.load(open('result.json'))\n"
        "    v.update(num_passed=4, num_tests=4, cause=None)\n    os.unlink('result.json'); open('result.json', 'w').write(json.dumps(v)); os._exit(0)"),
    "answers in a child": "import os\nif os.fork() == 0: os._exit(0)\nos.wait()\ndef f(x): return None",
    "answers every descriptor": patched("import os\nfor n in range(3, 40):\n    try: os.write(n, b'\\x00' * 64)\n    except OSError: pass"),
    "closes every descriptor": patched("import os; os.closerange(3, 64)"),
    "listens to every descriptor": "import os\ndef f(x):\n    for n in range(3, 40):\n        try: os.set_blocking(n, False); os.read(n, 1 << 16)\n        except OSError: pass\n    return None",
    "json.dumps": patched("import json; r = json.dumps; json.dumps = lambda v, **k: r({**v, 'cause': None})"),
    "json.dump": patched("import json; json.dump = lambda v, f, **k: f.write('{}')"),
    "json encoder": patched("import json\no = json._default_encoder.encode\njson._default_encoder.encode = lambda d: o({**d, 'num_passed': d['num_tests'], 'cause': None})"),
    "JSONEncoder.encode": patched("import json; o = json.JSONEncoder.encode\njson.JSONEncoder.encode = lambda s, d: o(s, {**d, 'cause': None})"),
    "json.loads": patched("import json; json.loads = lambda t: {'module': '', 'calls': ['1'], 'names': [], 'nonce': ''}"),
    "ExitStack": patched("import contextlib; contextlib.ExitStack.__exit__ = lambda *a: True"),
    "partial": patched("import functools; functools.partial = lambda *a, **k: (lambda: None)"),
    "isclose": patched("import math; math.isclose = lambda *a, **k: True"),
    "abs": patched("import builtins; builtins.abs = lambda x: 0"),
    "builtin set": patched("import builtins; builtins.set = lambda *a: 0"),
    "builtin sorted": patched("import builtins; builtins.sorted = lambda *a, **k: 0"),
    "builtin exec": patched("import builtins; builtins.exec = lambda *a: None"),
    "builtin compile": patched("import builtins; builtins.compile = lambda *a, **k: (lambda: 0).__code__"),
    "builtin isinstance": patched("import builtins; builtins.isinstance = lambda *a: True"),
    "builtin len": patched("import builtins; builtins.len = lambda *a: 1"),
    "builtin AssertionError": patched("import builtins; builtins.AssertionError = type('E', (Exception,), {})"),
    "own set": patched("set = sorted = abs = lambda *a: 0"),
    "own isclose": patched("class math:\n    isclose = staticmethod(lambda *a, **k: True)"),
    "own unittest": patched("class unittest:\n    class TestCase: pass"),
    "assertEqual": patched("import unittest; unittest.TestCase.assertEqual = unittest.TestCase.assertIn = unittest.TestCase.assertTrue = lambda *a: None"),
    "assertEqual's code": patched("import unittest\ndef easy(self, *a, **k): pass\nfor n in ('assertEqual', 'assertIn', 'assertTrue'): getattr(unittest.TestCase, n).__code__ = easy.__code__"),
    "assert method per type": patched("import unittest; unittest.TestCase._baseAssertEqual = lambda *a, **k: None; unittest.TestCase._getAssertEqualityFunc = lambda *a: (lambda *a, **k: None)"),
    "expecting failure": patched("import unittest; unittest.TestCase.__unittest_expecting_failure__ = True"),
    "skipped class": patched("import unittest; unittest.TestCase.__unittest_skip__ = True"),
    "__getattribute__": patched("import unittest; unittest.TestCase.__getattribute__ = lambda s, n: (lambda *a, **k: None) if n.startswith('assert') else object.__getattribute__(s, n)"),
    "TestCase.run": patched("import unittest; unittest.TestCase.run = lambda s, r: r"),
    "TestCase.__call__": patched("import unittest; unittest.TestCase.__call__ = lambda s, *a: None"),
    "_callTestMethod": patched("import unittest; unittest.TestCase._callTestMethod = lambda *a: None"),
    "failureException": patched("import unittest; unittest.TestCase.failureException = unittest.SkipTest"),
    "other TestCase": patched("import unittest\nclass Easy(unittest.TestCase):\n    def assertEqual(self, *a): pass\nunittest.TestCase = Easy"),
    "TestSuite.run": patched("import unittest.suite; unittest.suite.BaseTestSuite.run = unittest.TestSuite.run = lambda s, r, *a: r"),
    "TestLoader": patched("import unittest; unittest.TestLoader.getTestCaseNames = lambda *a: []"),
    "TestResult": patched("import unittest; unittest.TestResult.addFailure = unittest.TestResult.addError = lambda *a: None"),
    "fake unittest": patched("import sys, types, unittest\nm = types.ModuleType('unittest'); vars(m).update(vars(unittest))\nm.TestCase = type('TestCase', (), {})\nsys.modules['unittest'] = m"),
    "fake pytest": patched("import sys, types\nm = types.ModuleType('pytest'); m.approx = lambda *a, **k: None\nsys.modules['pytest'] = m"),
    "fake math": patched("import sys, types\nm = types.ModuleType('math'); m.isclose = lambda *a, **k: True\nsys.modules['math'] = m"),
    "pytest.approx": patched("import sys\np = sys.modules.get('pytest')\nif p: p.approx = lambda *a, **k: None"),
    "Approx.__eq__": patched("import sys\np = sys.modules.get('pytest')\nif p: p.approx.__eq__ = lambda *a: True"),
    "runner's functions": patched("import __main__\nfor n in ('collect', 'run_tests', 'find_tests'):\n    setattr(__main__, n, lambda *a, **k: [])"),
    "another module's runner": patched("import sys\nfor m in list(sys.modules.values()):\n    for n in ('finish', 'is_empty'):\n        if hasattr(m, n): setattr(m, n, lambda *a: None)"),
    "skips by raising": "import unittest\ndef f(x):\n    if x == 1: return 2\n    raise unittest.SkipTest('hard')",
    "skips from elsewhere": "exec(compile('import unittest\\ndef f(x):\\n    if x == 1: return 2\\n    raise unittest.SkipTest(1)', 'other', 'exec'))",
    "skips by pytest": "import unittest\ndef f(x):\n    try:\n        import pytest; pytest.skip('hard')\n    except ImportError: raise unittest.SkipTest",
    "a class named SkipTest": "class SkipTest(Exception): pass\ndef f(x): raise SkipTest",
    "raises AssertionError's child": "class Fine(AssertionError): pass\ndef f(x): raise Fine",
    "raises what nobody catches": "def f(x): raise BaseException('done')",
    "raises GeneratorExit": "def f(x): raise GeneratorExit",
    "raises KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "own passing tests": "def test_mine(): pass\ndef f(x): return None",
    "own TestCases": "import unittest\nclass TestCases(unittest.TestCase):\n    def test_a(self): pass\ndef f(x): return None",
    "a meta path finder": patched("import sys\nclass Finder:\n    def find_spec(self, *a): raise SystemExit(0)\nsys.meta_path.insert(0, Finder())"),
    "an exit handler": patched("import atexit, os; atexit.register(os._exit, 0)"),
    "an excepthook": patched("import sys; sys.excepthook = lambda *a: None"),
    "files beside it": patched("for n in ('sitecustomize.py', 'unittest.py', 'pytest.py', 'math.py', 'json.py'): open(n, 'w').write('raise SystemExit(0)')"),
    "writes over the judge": patched("import os\nfor p, _, ns in os.walk('.'):\n    for n in ns:\n        if n != 'solution.py': open(os.path.join(p, n), 'w').write('raise SystemExit(0)')"),
    "chdir": patched("import os; os.chdir('/')"),
    "kills its parent": patched("import os, signal\ntry: os.kill(os.getppid(), signal.SIGKILL)\nexcept OSError: pass"),
    "kills all it can": patched("import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntry: os.kill(-1, signal.SIGTERM)\nexcept OSError: pass"),
    "returns a mock": "from unittest.mock import MagicMock\ndef f(x): return MagicMock(spec=int)",
    "returns NaN": "def f(x): return float('nan')",
    "returns a text": "def f(x): return str(2 * x)",
    "returns a generator": "def f(x): yield 2 * x",
    "returns NotImplemented": "def f(x): return NotImplemented",
    "returns a coroutine": "async def f(x): return 2 * x",
    "returns itself": "def f(x): return f",
    "is a class": "class f:\n    def __init__(self, x): pass",
}  # fmt: skip
# Objects that say yes to everything: judged apart, they are compared without being asked.
LIARS = {
    "equals everything": liar("__eq__(s, o)", "True"),
    "equals and hashes": liar("__eq__(s, o)", "True", more="    def __hash__(s): return 4\n"),
    "all operators": liar("__bool__(s)", "True", more=OPERATORS + "    __sub__ = __rsub__ = __add__ = __abs__ = lambda *a: 0\n    __float__ = lambda s: 4.0\n"),
    "an int that equals": liar("__eq__(s, o)", "True", "(int)", OPERATORS, "7"),
    "a float that equals": liar("__eq__(s, o)", "True", "(float)", OPERATORS, "7.5"),
    "a float close to all": liar("__sub__(s, o)", "0.0", "(float)", "    __rsub__ = __sub__\n    __abs__ = lambda s: 0.0\n", "7.5"),
    "a text that equals": liar("__eq__(s, o)", "True", "(str)", OPERATORS, "'7'"),
    "a list that equals": liar("__eq__(s, o)", "True", "(list)", OPERATORS),
    "a dict that equals": liar("__eq__(s, o)", "True", "(dict)", OPERATORS),
    "a tuple that equals": liar("__eq__(s, o)", "True", "(tuple)", OPERATORS),
    "a metaclass that equals": "class M(type):\n    __eq__ = lambda *a: True\n    __hash__ = lambda s: 4\nclass C(metaclass=M): pass\ndef f(x): return C",
    "reduces to a liar": "class R:\n    def __reduce__(self): return (eval, ('7',))\ndef f(x): return R()",
    "claims another class": liar("__eq__(s, o)", "True", more="    __class__ = property(lambda s: int)\n    __hash__ = lambda s: 4\n"),
    "copies what it meets": "class Liar:\n    def __eq__(s, o): s.seen = o; return True\n    def __rsub__(s, o): return 0\n    __sub__ = __rsub__\nthe = Liar()\ndef f(x): return the",
    "an exception that equals": "class E(Exception):\n    __eq__ = lambda *a: True\n    __hash__ = lambda s: 4\ndef f(x): return E()",
    "a deque's child": "import collections\nclass Liar(collections.deque):\n    __eq__ = lambda *a: True\ndef f(x): return Liar()",
}  # fmt: skip

APART = ("functions", "statements", "methods")
CASES = [(form, name, code) for form in APART for name, code in {**ANYWHERE, **LIARS}.items()]
CASES += [("inside", name, code) for name, code in ANYWHERE.items()]
ALWAYS = {
    ("functions", "a child between a FIFO and the verdict"), ("functions", "isclose"), ("functions", "fake pytest"),
    ("functions", "equals and hashes"), ("functions", "skips by raising"), ("functions", "reads its input again"),
    ("statements", "all operators"), ("statements", "own set"), ("methods", "__getattribute__"), ("methods", "partial"),
    ("inside", "reads its input again"), ("inside", "expecting failure"), ("inside", "json encoder"),
    ("inside", "a child between a FIFO and the verdict"), ("inside", "skips from elsewhere"),
}  # fmt: skip


def reward(form, code, level):
    sandbox = Sandbox(SandboxSection(level=level, timeout_seconds=30.0))
    options = {"prompt": None, "entry_point": None, "names": ("f",), "calls": None, **FORMS[form]}
    outcome = CodeEnvironment(sandbox=sandbox, **options).step(f"```python\n{code}\n```")
    assert outcome.info["judged"] == ("inside" if form == "inside" else "apart"), outcome.info
    return outcome.reward, outcome.info


@pytest.mark.parametrize("form", FORMS)
def test_the_right_solution_is_paid(form):
    assert reward(form, "def f(x):\n    return 2 * x", "auto")[0] == 1.0


@pytest.mark.parametrize(
    ("form", "name", "code"),
    [
        pytest.param(*case, id="-".join(case[:2]), marks=[] if case[:2] in ALWAYS else pytest.mark.slow)
        for case in CASES
    ],
)
def test_no_cheat_is_paid(form, name, code):
    paid, info = reward(form, code, "auto")
    assert paid == 0.0, info


def test_the_table_is_as_long_as_it_says():
    assert len(ANYWHERE) + len(LIARS) >= 85
