"""The process that holds tests and solution together, for tests that patch, seed or share files with the solution.

The request is wiped from standard input before the solution is imported, the verdict is signed with a key that no
Python object shows, and after the import and each test what judges must still be what it was. What this cannot stop:
code written against this very file, which walks the interpreter's frames and objects, or an object that equals
everything. `needs_one_process` in `request.py` says which tests come here; all others are judged apart.
"""

import builtins
import hashlib
import json
import os
import sys
import types
import unittest
import unittest.case
import unittest.loader
import unittest.suite
from typing import Any

from . import collecting, standin
from .collecting import Check, Verdict, find_tests, run_tests


class Tampered(Exception):  # noqa: N818
    """What judges the solution is not what it was."""


_CALLABLE = (types.FunctionType, types.BuiltinFunctionType, type)


def guard(pytest: types.ModuleType) -> Check:
    """What raises `Tampered` once a function or class of a loaded standard module, as it is now, is another.

    The classes that judge may not even gain a name.
    """
    judges = [unittest, unittest.case, unittest.loader, unittest.result, unittest.suite]
    judges += [pytest, standin, collecting, sys.modules[__name__]]
    modules = [m for name, m in dict(sys.modules).items() if name.partition(".")[0] in sys.stdlib_module_names]
    modules = [module for module in modules if type(module) is types.ModuleType]
    modules += [module for module in judges if module not in modules]
    loaded = dict(sys.modules)
    closed = [
        value
        for module in judges
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    before: list[tuple[Any, str, Any, Any]] = []
    for owner in (*modules, *closed):
        for name, value in list(vars(owner).items()):
            if isinstance(value, _CALLABLE) or (owner in closed and not isinstance(value, list | dict | set)):
                before.append((owner, name, value, getattr(value, "__code__", None)))
    names_of = [(kind, frozenset(vars(kind))) for kind in closed]
    # As they are now: the names may come to mean something else.
    look, kept, now, first = vars, frozenset, sys.modules, min

    def unchanged() -> None:
        for name in ("builtins", "json", "unittest", "pytest", "contextlib", "functools", "math", __name__):
            if name in loaded and now.get(name) is not loaded[name]:
                raise Tampered(name)
        for owner, name, value, code in before:
            if look(owner).get(name) is not value or (code is not None and value.__code__ is not code):
                raise Tampered(f"{owner.__name__}.{name}")
        for kind, names in names_of:
            new = kept(look(kind)) - names - {"_class_cleanups", "_classSetupFailed"}
            if new:
                raise Tampered(f"{kind.__name__}.{first(new)}")

    return unchanged


def run(request: dict[str, Any]) -> Verdict:
    """Import the solution and run the tests on it.

    request: as for `collecting.find_tests`, and `appended`, whether the text is executed as the end of the solution's
    own module, as BigCodeBench does, so that what it imports and patches is imported and patched there. The verdict's
    cause is one of solution_error, tampering, test_error, no_tests, assertion, memory, exception, unsupported_test.
    """
    verdict = Verdict()
    pytest = sys.modules["pytest"] = standin.make_pytest()
    unchanged = guard(pytest)
    try:
        import solution  # type: ignore[import-not-found]

        unchanged()
    except Tampered as error:
        return verdict.blame("tampering", error)
    except BaseException as error:  # whatever the solution raises, SystemExit included
        return verdict.blame("solution_error", error)
    names: dict[str, Any]
    if request["appended"]:
        names = vars(solution)
        names.update({"sys": sys, "os": os, "environ": os.environ} | names)  # BigCodeBench gives them to all code
    else:
        names = {
            name: value
            for name, value in vars(solution).items()
            if not name.startswith("__") and (name in request["names"] or not hasattr(builtins, name))
        }
        names["__name__"] = "test_solution"
    tests = find_tests(request, names, verdict, unchanged)
    if tests is not None:
        run_tests(tests, verdict, unchanged, Tampered)
    return verdict


def sign(key: str, text: str) -> str:
    """The signature of a verdict."""
    return hashlib.blake2b(text.encode(), key=key.encode()).hexdigest()


def main() -> None:
    """Read the request, wipe it, run it, write `result.json` and leave, whatever threads the solution started."""
    with open(0, "rb", closefd=False, buffering=0) as file:
        request = json.loads(file.readall())
    os.ftruncate(0, 0)
    signing = hashlib.blake2b(key=request.pop("nonce").encode())
    path, leave, write, encode = os.path.abspath("result.json"), os._exit, os.write, json.JSONEncoder().encode
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    verdict = run(request)
    text = encode(dict(verdict))
    signing.update(text.encode())
    if os.path.lexists(path):
        os.unlink(path)
    descriptor = os.open(path, flags, 0o600)
    write(descriptor, encode({"signature": signing.hexdigest(), "verdict": text}).encode())
    leave(0)


if __name__ == "__main__":
    main()
