"""A composer is trained through programs of four frameworks: each fills its own bank, and its memory beats its control.

All start from one warm-up and a few steps of SFT. These tests take the embedded model, and some ten minutes each on
two idle cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from venvs import TRAINED, python_of

FOLDER = Path(__file__).parents[2] / "examples" / "frameworks"
CONFIG = FOLDER / "hidden_facts.yaml"
SMALL = ["data.train_entities=32", "data.dev_entities=16", "data.test_entities=40"]
LMPO = "latent:lmpo"

pytestmark = pytest.mark.slow


def phase(*words, framework, run, **more):
    """Run one phase with a framework's program as the team."""
    team = yaml.safe_load(CONFIG.read_text())["team"]
    team |= {"call": f"{framework}_team:solve", "python": str(python_of(framework))}
    keys = [f"{key}={value}" for key, value in more.items()]
    command = [*words, str(CONFIG), f"run={run}", f"team={json.dumps(team)}", *SMALL, *keys]
    done = subprocess.run(
        [sys.executable, "-m", "latentmem.cli", *command],
        cwd=FOLDER,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=5000,
    )
    print(f"$ latentmem {' '.join(words)} ({framework})\n{done.stdout}{done.stderr[-2000:]}", flush=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The checkpoint that all start from."""
    run = tmp_path_factory.mktemp("start")
    for words in (("collect",), ("train", "warmup"), ("train", "sft")):
        phase(*words, framework="langgraph", run=run)
    (checkpoint,) = (run / "sft" / "checkpoints").glob("step-*")
    return checkpoint


@pytest.mark.parametrize("framework", TRAINED)
def test_its_own_memory_beats_its_control(framework, start, tmp_path):
    python_of(framework)
    memories = ["none", LMPO, f"{LMPO}:irrelevant", f"{LMPO}:other-role"]
    for words in (("collect",), ("train", "lmpo"), ("evaluate",)):
        phase(
            *words,
            framework=framework,
            run=tmp_path,
            **{"lmpo.initial": start, "evaluate.memories": json.dumps(memories)},
        )
    rows = {row["name"]: row for row in json.loads((tmp_path / "results.json").read_text())["memories"]}
    own = rows.pop(LMPO)
    assert own["num_errors"] == 0
    for control in rows.values():
        assert own["accuracy_low"] > control["accuracy_high"], (own["accuracy"], control["name"], control["accuracy"])
    assert own["carried"]["low"] > 0
