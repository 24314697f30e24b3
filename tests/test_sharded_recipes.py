"""Collecting, training and evaluating in launched processes against one process. They meet over gloo, without a GPU."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml

from latentmem.bank import ExperienceBank
from latentmem.config import load_config
from test_recipes import CONFIG, exported, metrics, results, weights

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SEARCHED = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": SEARCHED, "OMP_NUM_THREADS": "1"}
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--mixed_precision=no")
FSDP = ("-m", "accelerate.commands.launch", "--config_file", str(files("latentmem") / "configs/accelerate/fsdp.yaml"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SETTINGS = (
    "data.test_size=5", "collect.num_tasks=5", "collect.batch_size=4", "sampling.max_response_tokens=5",
    "sft.num_steps=2", "sft.trajectories_per_step=3", "lmpo.num_steps=1", "lmpo.tasks_per_step=3",
    "grpo.num_steps=1", "grpo.tasks_per_step=3",
    "evaluate.memories=[none, text, latent:sft]",
)  # fmt: skip


class Launcher:
    """Runs commands in one process or two; the folder of each run is named after them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model

    def config(self, run, *overrides):
        path = self.folder / f"{run}.yaml"
        path.write_text(CONFIG.format(run=self.folder / run, model=self.model))
        config = load_config(str(path), [*SETTINGS, *overrides])
        path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
        return config

    def __call__(self, starter, config, *phases, deeds=()):
        words = self.words(starter, config, *phases, deeds=deeds)
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=580, env=ENVIRONMENT)

    def words(self, starter, config, *phases, deeds=()):
        names = {phase: ["train", phase] for phase in ("sft", "lmpo", "grpo")}
        path = str(self.folder / f"{Path(config.run).name}.yaml")
        commands = [json.dumps([*names.get(phase, [phase]), path]) for phase in phases]
        return [sys.executable, *starter, str(HERE / "sharded_recipes.py"), json.dumps(deeds), *commands]


@pytest.fixture(scope="module")
def launch(tmp_path_factory, tiny_model_dir):
    return Launcher(tmp_path_factory.mktemp("runs"), tiny_model_dir)


@pytest.fixture(scope="module")
def alone(launch):
    """A whole run by one process."""
    config = launch.config("alone")
    done = launch((), config, "collect", "sft", "lmpo", "grpo", "evaluate")
    assert done.returncode == 0, done.stderr
    return config, done.stdout


def phase_metrics(config, phase):
    return [row for row in metrics(config) if row["phase"] == phase]


def assert_same_trajectories(ours, theirs, exact=True):
    assert phase_metrics(ours, "collect") == phase_metrics(theirs, "collect")
    assert_same_lines(exported(ours), exported(theirs), exact)


def assert_same_lines(ours, theirs, exact):
    """Equal trajectories; not exact: but for rounded log-probabilities, where weights lie elsewhere in memory."""
    if exact:
        assert ours == theirs
        return
    rows = [[json.loads(line) for line in text.splitlines()] for text in (ours, theirs)]
    logps = [[m.pop("logps") for row in part for step in row["steps"] for m in step["messages"]] for part in rows]
    assert rows[0] == rows[1]
    for mine, their in zip(*logps, strict=True):
        assert mine == pytest.approx(their, abs=1e-5)


def assert_same_training(ours, theirs, phase):
    """The same curve and the same weights, to float rounding."""
    for mine, their in zip(phase_metrics(ours, phase), phase_metrics(theirs, phase), strict=True):
        assert mine.pop("phase") == their.pop("phase")
        assert mine == pytest.approx(their, rel=2e-4, abs=2e-5)
    mine, their = weights(ours, phase), weights(theirs, phase)
    assert mine.keys() == their.keys()
    # AdamW's first step is the sign of the gradient where that is much larger than its eps.
    assert all(torch.allclose(mine[name], their[name], rtol=1e-3, atol=2e-4) for name in mine)


@pytest.mark.parametrize(
    ("name", "starter"),
    [
        ("both", TORCHRUN),
        ("fsdp", FSDP),
    ],
)
def test_two_processes_make_the_run_of_one(launch, alone, name, starter):
    config, said = alone
    both = launch.config(name)
    done = launch(starter, both, "collect", "sft", "lmpo", "grpo", "evaluate")
    assert done.returncode == 0, done.stderr
    exact = name != "fsdp"
    assert_same_trajectories(both, config, exact)
    for phase in ("sft", "lmpo", "grpo"):
        assert_same_training(both, config, phase)
    # Memories without weights are the same to the last digit, unless the model's lie elsewhere.
    for ours, theirs in zip(results(both)["memories"][:2], results(config)["memories"][:2], strict=True):
        assert ours == theirs
        files = [Path(c.run) / "evaluate" / ours["trajectories"] for c in (both, config)]
        assert_same_lines(files[0].read_bytes(), files[1].read_bytes(), exact)
    assert done.stdout.count("report: no report") == said.count("report: no report") == 1  # one speaks
    assert done.stdout.count("collect: ") == 1


@pytest.mark.parametrize(("name", "starter"), [("plain", ACCELERATE), ("spread", FSDP)])
def test_one_task_keeps_two_processes_together_and_a_composer_gives_the_same(launch, alone, name, starter):
    """The run of one process is evaluated again, with its own composer, by two that accelerate launched."""
    composer = f"latent:{alone[0].run}/sft/checkpoints/step-000002"
    options = (f"evaluate.memories={json.dumps(['latent:untrained', composer])}", "collect.num_tasks=1")
    first, second = launch.config("first", *options), launch.config(name, *options)
    if not Path(first.run).exists():
        assert launch((), first, "collect", "evaluate").returncode == 0
    done = launch(starter, second, "collect", "evaluate")
    assert done.returncode == 0, done.stderr
    assert_same_trajectories(second, first, exact=name == "plain")
    assert results(second) == results(first)


@pytest.mark.parametrize(
    ("phase", "rank", "word"),
    # The word is one behind the first stored batch and before the last.
    [("collect", 0, 5), ("collect", 1, 5), ("evaluate", 0, 7), ("evaluate", 1, 7)],
)
def test_a_killed_process_takes_the_other_along_and_one_process_finishes_the_run(launch, alone, phase, rank, word):
    config = launch.config(
        f"cut-{phase}-{rank}", "evaluate.memories=[none, text]", "evaluate.num_tasks=5", "evaluate.batch_size=1"
    )
    if phase == "evaluate":
        assert launch((), config, "collect").returncode == 0
    done = launch(TORCHRUN, config, phase, deeds=[["kill", rank, word]])
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    if phase == "collect":
        assert 0 < len(ExperienceBank(Path(config.run) / "bank.sqlite")) < 10
    else:
        assert 0 < len((Path(config.run) / "evaluate" / "none.jsonl").read_bytes().splitlines()) < 5
    rest = launch((), config, *(["collect", "evaluate"] if phase == "collect" else ["evaluate"]))
    assert rest.returncode == 0, rest.stderr
    assert_same_trajectories(config, alone[0])
    whole = launch.config("whole", "evaluate.memories=[none, text]", "evaluate.num_tasks=5", "evaluate.batch_size=1")
    if not Path(whole.run).exists():
        assert launch((), whole, "collect", "evaluate").returncode == 0
    assert results(config) == results(whole)


@pytest.mark.parametrize(("name", "starter"), [("plain", TORCHRUN), ("spread", FSDP)])
def test_a_mistake_in_one_process_is_one_line_and_status_2(launch, name, starter):
    config = launch.config(f"mistaken-{name}")
    done = launch(starter, config, "collect", deeds=[["stumble", 2]])  # in the second batch, so the second process
    lines = [line for line in done.stderr.splitlines() if line.startswith("latentmem: ")]
    assert len(lines) == 1
    assert lines[0].endswith("stumbles")
    assert "exitcode  : 2" in done.stderr
    assert "rank      : 1" in done.stderr  # which torchrun names as the first to end
    assert "Connection closed" not in done.stderr
