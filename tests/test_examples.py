"""Every example runs as it stands, on a tiny model; a new file in examples/ that nothing here runs fails."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from latentmem import cli

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ["researcher.py"]
CONFIGURED = ["guessing", "keyword_memory", "planner_solver", "until_agreed"]
NOTEBOOKS = ["own_data.ipynb"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the examples, which a user has gone to."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path / "examples"


def test_each_file_is_run_by_a_test() -> None:
    named = {*SCRIPTS, *NOTEBOOKS, *(f"{name}.{end}" for name in CONFIGURED for end in ("py", "yaml")), "README.md"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == named


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_and_prints_a_table(
    folder: Path,
    script: str,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [script, str(tiny_model_dir)])
    runpy.run_path(script, run_name="__main__")
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:2] == ["memory", "accuracy"]
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["none", "text", "latent"]


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_configuration_with_a_class_of_ones_own_is_collected_and_evaluated(
    folder: Path, name: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"model.name={tiny_model_dir}"
    assert cli.main(["collect", f"{name}.yaml", model]) == 0
    assert cli.main(["evaluate", f"{name}.yaml", model]) == 0
    out = capsys.readouterr().out
    results = json.loads(next((folder / "runs").glob("*/results.json")).read_text(encoding="utf-8"))
    assert results["num_tasks"] == 6
    for row in results["memories"]:
        assert row["name"] in out
    if name == "guessing":
        assert results["domain"] == "guessing"
    if name == "planner_solver":
        assert results["team"] == "planner_solver"
        assert all(row["num_errors"] == 0 for row in results["memories"])
    if name == "until_agreed":
        assert results["team"] == "until_agreed"
    if name == "keyword_memory":
        (own,) = [row for row in results["memories"] if row["name"] == "keyword_memory:KeywordMemory"]
        assert own["prompt_tokens"] > results["memories"][0]["prompt_tokens"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_cell_by_cell(
    folder: Path,
    name: str,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    notebook = json.loads((folder / name).read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    monkeypatch.setenv("LATENTMEM_EXAMPLE_MODEL", str(tiny_model_dir))
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, name, "exec"), names)
    assert "latent" in capsys.readouterr().out
