import ast
import importlib
import re
import subprocess
import sys
import tomllib
import types
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

import latentmem


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)  # no shell
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", latentmem.__all__)
def test_every_public_name_is_importable_documented_and_no_module(name):
    value = getattr(latentmem, name)
    assert not isinstance(value, types.ModuleType)
    assert name in ("Split", "Turn") or value.__doc__  # two are types of others


def test_type_checkers_see_the_same_names_at_places_that_have_them():
    tree = ast.parse(Path(latentmem.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: (node.module, alias.name) for node in imports for alias in node.names}
    assert seen.keys() == set(latentmem.__all__)
    for name, (home, there) in seen.items():
        assert name == there
        assert getattr(importlib.import_module(f"latentmem.{home}"), name) is getattr(latentmem, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="attribute rolout"):
        _ = latentmem.rolout


def test_importing_the_package_loads_no_torch():
    assert run_python("import sys, latentmem; print('torch' in sys.modules, 'transformers' in sys.modules)") == (
        "False False\n"
    )


def test_records_and_environments_load_no_torch():
    code = "import sys; from latentmem import Task, Environment, LatentMemError; print('torch' in sys.modules)"
    assert run_python(code) == "False\n"


def test_help_of_the_command_line_loads_no_torch():
    (script,) = entry_points(group="console_scripts", name="latentmem")
    code = f"""
import sys
from {script.module} import {script.attr} as main
sys.argv = ["latentmem", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("torch" in sys.modules)
"""
    out = run_python(code)
    assert "quickstart" in out
    assert out.endswith("False\n")


def test_rollout_stays_the_function_after_its_module_is_imported():
    code = "import latentmem.rollout; from latentmem import rollout; print(type(rollout).__name__)"
    assert run_python(code) == "function\n"


def test_the_citation_is_of_this_version_and_of_the_paper():
    root = Path(__file__).parents[1]
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert (
        citation["version"]
        == tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    )
    assert citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2602.03036"


def test_the_readme_lists_every_file_of_the_package_and_no_other():
    root = Path(latentmem.__file__).parent
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("## The code in five minutes")[2].split("```")[1]
    assert set(re.findall(r"\w+\.py", tree)) == {p.name for p in root.rglob("*.py")} - {"__init__.py"}
