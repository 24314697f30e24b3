"""Every example runs as it stands, on a tiny model; a new file in examples/ that nothing here runs fails."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ["researcher.py"]
CONFIGURED = ["guessing", "keyword_memory", "until_agreed"]
NOTEBOOKS = ["own_data.ipynb"]


def run(folder: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=280,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    return tmp_path / "examples"


def test_each_file_is_run_by_a_test() -> None:
    named = {*SCRIPTS, *NOTEBOOKS, *(f"{name}.{end}" for name in CONFIGURED for end in ("py", "yaml")), "README.md"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == named


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_and_prints_a_table(folder: Path, script: str, tiny_model_dir: Path) -> None:
    out = run(folder, script, str(tiny_model_dir))
    assert out.splitlines()[0].split()[:2] == ["memory", "accuracy"]
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["none", "text", "latent"]


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_configuration_with_a_class_of_ones_own_is_collected_and_evaluated(
    folder: Path, name: str, tiny_model_dir: Path
) -> None:
    model = f"model.name={tiny_model_dir}"
    run(folder, "-m", "latentmem.cli", "collect", f"{name}.yaml", model)
    out = run(folder, "-m", "latentmem.cli", "evaluate", f"{name}.yaml", model)
    results = json.loads(next((folder / "runs").glob("*/results.json")).read_text(encoding="utf-8"))
    assert results["num_tasks"] == 6
    for row in results["memories"]:
        assert row["name"] in out
    if name == "guessing":
        assert results["domain"] == "guessing"
    if name == "until_agreed":
        assert results["team"] == "until_agreed"
    if name == "keyword_memory":
        (own,) = [row for row in results["memories"] if row["name"] == "keyword_memory:KeywordMemory"]
        assert own["prompt_tokens"] > results["memories"][0]["prompt_tokens"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_cell_by_cell(folder: Path, name: str, tiny_model_dir: Path) -> None:
    notebook = json.loads((folder / name).read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    (folder / "cells.py").write_text("\n\n".join(cells), encoding="utf-8")
    assert "latent" in run(folder, "cells.py", LATENTMEM_EXAMPLE_MODEL=str(tiny_model_dir))
