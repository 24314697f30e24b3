"""A function of a program may live in another environment: its interpreter is named, and needs nothing of ours."""

import sys

import pytest

from latentmem.config import ProgramSection
from latentmem.serving.programs.runners import Function

MODULE = """
import asyncio, os

async def loop(task):
    return str(id(asyncio.get_running_loop()))

def mark(task):
    return os.environ["MARK"] + task["text"]
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls a function of the module in a worker of an interpreter that marks its environment."""
    (tmp_path / "of_mine.py").write_text(MODULE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nMARK=here exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    made = []

    def run(name, text=""):
        if not made or made[-1].name != f"of_mine:{name}":
            made.append(Function(f"of_mine:{name}", 60, str(python)))
        return made[-1].run({"text": text}, {}, lambda end: None)

    yield run
    for function in made:
        function.close()


def test_the_named_interpreter_calls_the_function(call):
    assert call("mark", " and there") == "here and there"


def test_a_worker_has_one_event_loop_for_all_its_episodes(call):
    assert call("loop") == call("loop")


def test_an_interpreter_beside_a_command_is_refused():
    with pytest.raises(ValueError, match="name the interpreter in the command itself"):
        ProgramSection(kind="program", command=("python", "x.py"), python="/usr/bin/python3")
