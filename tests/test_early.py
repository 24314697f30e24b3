"""Mistakes that need no model to be found are told before torch is loaded."""

import json
import sys

import pytest

from latentmem import cli
from latentmem.runs import lock

CONFIG = {"run": "run", "model": {"name": "smollm2-135m"}, "data": {"kind": "hidden_facts"}}
PROGRAM = {"kind": "program", "call": "nosuchmodule:solve"}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command that must fail without loading anything heavy; its one line."""
    monkeypatch.chdir(tmp_path)
    for name in ("latentmem.recipes", "latentmem.recipes.serve", "latentmem.recipes.rights"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails, and with another error

    def refused(*words, **sections):
        (tmp_path / "c.yaml").write_text(json.dumps(CONFIG | sections))
        capsys.readouterr()
        assert cli.main([*words[:-1], "c.yaml"] if words[-1] is None else [*words]) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("latentmem: ")

    return refused


def test_a_program_that_is_not_there(refused, tmp_path):
    assert refused("collect", None, team=PROGRAM) == (
        "team.call: nosuchmodule:solve: ModuleNotFoundError: No module named 'nosuchmodule'; looked for in "
        f"{tmp_path} and among the packages of {sys.executable}"
    )
    assert refused("collect", None, team=PROGRAM | {"python": "/no/python"}).startswith("team.python: /no/python: no")
    script = {"kind": "program", "command": ["python", "mine.py"]}
    assert refused("train", "sft", None, team=script) == (
        f"team.command: mine.py: no such file, seen from {tmp_path}; give its path"
    )
    assert "max_turns is 3, but team nosuchmodule is a program" in refused("collect", None, team=PROGRAM, max_turns=3)


def test_a_checkpoint_that_is_not_there(refused):
    missing = "run: no checkpoint of {0} here; run `latentmem train {0}` with this configuration first"
    compared = {"memories": ["none", "latent:lmpo:random"]}
    assert refused("evaluate", None, evaluate=compared) == missing.format("lmpo")
    assert refused("evaluate", None, evaluate={"memories": ["grpo"]}) == missing.format("grpo")
    assert refused("evaluate", None, evaluate={"memories": ["latent:nowhere"]}).startswith("nowhere: no composer here")
    assert refused("train", "lmpo", None, lmpo={"initial": "sft"}) == missing.format("sft")
    assert refused("serve", None, serve={"memory": "latent:lmpo"}) == missing.format("lmpo")


def test_a_folder_in_which_another_process_works(refused, tmp_path):
    for folder in (tmp_path / "run", tmp_path / "run" / "serve"):
        folder.mkdir()
    with lock(tmp_path / "run"):
        for command in (["collect"], ["train", "grpo"], ["evaluate"]):
            assert "is working in this run folder" in refused(*command, None, evaluate={"memories": ["none"]})
    with lock(tmp_path / "run" / "serve"):
        for words in (["serve", "c.yaml"], ["forget", "c.yaml", "--domain", "x"], ["replay", "c.yaml", "s"]):
            assert "is working in this run folder" in refused(*words)


def test_several_processes_look_for_others_later_where_they_end_together(refused, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with lock(tmp_path / "run"):
        assert refused("collect", None, team=PROGRAM).startswith("team.call: nosuchmodule")


def test_an_address_that_others_reach_without_keys(refused):
    assert refused("serve", None, serve={"host": "0.0.0.0"}) == (
        "serve.host is '0.0.0.0', which others can reach, and there are no API keys; make one with "
        "`latentmem keys create CONFIG`, or serve on 127.0.0.1"
    )


@pytest.mark.parametrize("command", [["collect"], ["train", "lmpo"], ["serve"]])
def test_a_misspelt_model(refused, command):
    assert "did you mean 'smollm2-135m'?" in refused(*command, None, model={"name": "smollm2-135"})
