"""What a server takes from the configuration of an experiment, and what it says when its packages are missing."""

import subprocess
import sys

import pytest

from latentmem.cli.arguments import serving_packages
from latentmem.config import parse_config
from latentmem.errors import ServingError
from latentmem.recipes.serve import known_roles

PROGRAM = {
    "kind": "program",
    "command": ["python", "team.py"],
    "roles": [{"name": "scout", "profile": "Finds the place.", "pattern": "scout"}],
}


def config(**values):
    return parse_config({"run": "r", "data": {"kind": "hidden_facts"}, **values})


def test_a_server_knows_the_roles_that_its_program_was_trained_with():
    (known,) = known_roles(config(team=PROGRAM))
    assert (known.role.name, known.role.profile) == ("scout", "Finds the place.")
    assert known.speaks_in("You are the scout of the team.")
    own = {"name": "guide", "profile": "Guides."}
    assert [each.role.name for each in known_roles(config(team=PROGRAM, serve={"roles": [own]}))] == ["guide"]
    assert known_roles(config(team="autogen")) == []


def test_a_missing_package_is_told_and_what_is_missing_of_ours_is_a_bug():
    said = r"needs the package fastapi; pip install 'latentmem\[serve\]'"
    with pytest.raises(ServingError, match=said), serving_packages():
        raise ModuleNotFoundError(name="fastapi")
    with pytest.raises(ModuleNotFoundError), serving_packages():
        raise ModuleNotFoundError(name="latentmem.nowhere")


@pytest.mark.slow
def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "served.yaml").write_text("run: r\n")
    code = """
import sys
sys.modules["fastapi"] = None
from latentmem.cli import main
sys.argv = ["latentmem", "serve", "served.yaml"]
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "latentmem: serving needs the package fastapi; pip install 'latentmem[serve]'\n"
