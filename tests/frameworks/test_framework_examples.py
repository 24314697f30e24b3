"""Each example of a framework plays as it stands, by its own environment, and so does their configuration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from talking import PLACE, WORDS, BothWords, RoleLatents, Talker
from venvs import NAMES, TRAINED, python_of

from latentmem import ExperienceBank, Task, rollout
from latentmem.config import ProgramSection, load_config
from latentmem.models.embedder import HashingEmbedder
from latentmem.serving.programs.team import ProgramTeam

FOLDER = Path(__file__).parents[2] / "examples" / "frameworks"
CONFIG = FOLDER / "hidden_facts.yaml"


def test_there_is_an_example_for_each_framework():
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == {
        *(f"{name}_team.py" for name in NAMES),
        CONFIG.name,
    }
    assert load_config(str(CONFIG)).team.call == "autogen_team:solve"


def played(framework, finish, monkeypatch):
    """Three episodes of an example, in one worker, and the roles that it was given."""
    monkeypatch.chdir(FOLDER)
    roles = yaml.safe_load(CONFIG.read_text())["team"]["roles"]
    section = ProgramSection(
        kind="program", call=f"{framework}_team:solve", python=str(python_of(framework)), parallel=1, roles=roles
    )
    model = Talker(finish)
    team = ProgramTeam(section, lambda: model)
    tasks = [Task(id=str(i), domain="toy", text=PLACE) for i in range(3)]
    try:
        return rollout(team, RoleLatents(), model, tasks, lambda task: BothWords()).trajectories, roles
    finally:
        team.close()


@pytest.mark.slow
@pytest.mark.parametrize("framework", NAMES)
def test_an_example_gives_each_of_its_roles_its_latents(framework, monkeypatch):
    trajectories, roles = played(framework, "stop", monkeypatch)
    for trajectory in trajectories:
        assert (trajectory.error, trajectory.reward) == (None, 1)
        assert {m.role for m in trajectory.messages} == set(WORDS)
        for message in trajectory.messages:
            profile = next(role["profile"] for role in roles if role["name"] == message.role)
            assert message.recalled.text == f"{PLACE} {message.role}: {profile}"


@pytest.mark.slow
@pytest.mark.parametrize("framework", TRAINED)
def test_an_example_that_is_trained_goes_on_with_a_response_that_reached_its_limit(framework, monkeypatch):
    for trajectory in played(framework, "length", monkeypatch)[0]:
        assert (trajectory.error, trajectory.reward) == (None, 1)
        assert {m.finish for m in trajectory.messages} == {"length"}


@pytest.mark.slow
def test_the_configuration_fills_a_bank(tmp_path, tiny_model_dir):
    python = python_of("langgraph")
    roles = yaml.safe_load(CONFIG.read_text())["team"]["roles"]
    team = {"kind": "program", "call": "langgraph_team:solve", "python": str(python), "roles": roles}
    small = ["data.train_entities=3", "data.dev_entities=1", "data.test_entities=2", "bank.embedder=hashing"]
    words = [f"run={tmp_path / 'run'}", f"model.name={tiny_model_dir}", f"team={yaml.safe_dump(team).strip()}", *small]
    done = subprocess.run(
        [sys.executable, "-m", "latentmem.cli", "collect", CONFIG, *words],
        cwd=FOLDER,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    with ExperienceBank(tmp_path / "run" / "bank.sqlite", HashingEmbedder(), embedder="hashing") as bank:
        stored = list(bank)
    assert len(stored) == 6
    for trajectory in stored:
        assert trajectory.error is None
        assert sorted(m.role for m in trajectory.messages) == ["porter", "scout"]
        assert "emblem" in trajectory.steps[0].observation
