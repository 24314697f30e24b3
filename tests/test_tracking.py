"""What trackers are told, read back by TensorBoard's own reader, against metrics.jsonl."""

import importlib.metadata
import json
import subprocess
import sys
from collections import defaultdict
from typing import ClassVar

import numpy as np
import pytest

from latentmem import cli, tracking
from latentmem.errors import ConfigError
from latentmem.files import read_json
from latentmem.runs import Run, read_metrics
from latentmem.tracking import check_trackers

CONFIG = "run: x\nseed: 1\n"


def opened(folder, phase="lmpo", report_to=("tensorboard",)):
    return Run.open(folder, CONFIG, phase, {}, report_to=report_to)


def shown(folder):
    """By tag, the steps and numbers that TensorBoard shows of a phase; and the last text of each tag."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    events = reader.EventAccumulator(str(folder), size_guidance={reader.SCALARS: 0, reader.TENSORS: 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {
        tag.removesuffix("/text_summary"): events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }
    return scalars, texts


def logged(folder, phase="lmpo"):
    """The same of metrics.jsonl, as TensorBoard keeps numbers."""
    numbers = defaultdict(list)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["phase"] == phase:
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    numbers[f"{phase}/{key}"].append((row["step"], float(np.float32(value))))
    return numbers


def test_tensorboard_shows_what_metrics_jsonl_has_also_of_steps_logged_again(tmp_path):
    with opened(tmp_path) as run:
        run.rewind_metrics("lmpo", -1)
        run.log({"step": 0, "eval_reward": 0.1})
        for step in (1, 2, 3):
            run.log({"step": step, "reward": step / 3, "loss": float("nan") if step == 2 else 0.5, "bad": 0.0})
        run.rewind_metrics("lmpo", 1)
        run.log({"step": 2, "reward": 0.25, "loss": 0.75})
    with opened(tmp_path) as run:  # goes on from the checkpoint of step 1 again
        run.rewind_metrics("lmpo", 1)
        run.log({"step": 2, "reward": 0.125, "loss": 0.5, "eval_reward": 0.2})
        run.log({"step": 3, "reward": 0.5, "loss": 0.5})
    scalars, texts = shown(tmp_path / "tensorboard" / "lmpo")
    assert scalars == logged(tmp_path)
    assert [step for step, _ in scalars["lmpo/reward"]] == [1, 2, 3]
    assert texts == {"configuration": "    run: x\n    seed: 1\n"}


def test_a_tracker_that_is_asked_for_later_shows_the_phase_from_its_start(tmp_path):
    with opened(tmp_path, report_to=()) as run:
        run.log({"step": 1, "loss": 3.0})
    with opened(tmp_path, "sft", report_to=()) as run:
        run.log({"step": 1, "loss": 9.0})
    assert not (tmp_path / "tensorboard").exists()
    with opened(tmp_path) as run:
        run.log({"step": 2, "loss": 2.0})
    assert shown(tmp_path / "tensorboard" / "lmpo")[0] == {"lmpo/loss": [(1, 3.0), (2, 2.0)]}
    with opened(tmp_path, report_to=()) as run:
        run.log({"step": 3, "loss": 1.0})
    assert shown(tmp_path / "tensorboard" / "lmpo")[0] == {"lmpo/loss": [(1, 3.0), (2, 2.0)]}


class Scripted(tracking._Tracker):
    """A tracker that fails where it is told to."""

    told: ClassVar[list] = []
    fails = ""

    def _tell(self, what, *values):
        if what == self.fails:
            raise OSError("the server\nis dead")
        self.told.append((what, *values))

    def start(self, tracked):
        self._tell("start", tracked.title)

    def log(self, step, numbers):
        self._tell(f"log {step}", numbers)

    def show(self, table):
        self._tell("show", table.numbers)

    def close(self):
        self._tell("close")


@pytest.fixture
def scripted(monkeypatch):
    kind = type("Fresh", (Scripted,), {"told": []})
    monkeypatch.setitem(tracking._TRACKERS, "wandb", kind)
    return kind


@pytest.mark.parametrize("fails", ["start", "log 1", "log 2", "show", "close"])
def test_a_tracker_that_fails_ends_no_phase_and_is_told_of_once(tmp_path, scripted, caplog, fails):
    scripted.fails = fails
    with opened(tmp_path, report_to=["tensorboard", "wandb"]) as run:
        for step in (1, 2, 3):
            run.log({"step": step, "loss": 1 / step})
        run.show_results([["memory"], ["none"]], "| none |", {"memories": [{"name": "none", "accuracy": 0.5}]})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl").rows] == [1, 2, 3]
    (warning,) = caplog.messages
    assert warning == (
        "report_to: wandb failed (the server is dead), so it gets no more of this phase; the run goes on, and "
        "metrics.jsonl holds all"
    )
    scalars, texts = shown(tmp_path / "tensorboard" / "lmpo")  # the other one is told all
    assert scalars == {**logged(tmp_path), "lmpo/none/accuracy": [(0, 0.5)]}
    assert texts["results"] == "| none |"


def test_a_phase_is_one_run_of_a_tracker_and_only_numbers_are_told(tmp_path, scripted):
    with opened(tmp_path / "mine", report_to=["wandb"]) as run:
        run.log({"step": 4, "loss": 1.5, "note": "x", "none": None, "parts": {"a": 1}, "kl": float("inf")})
        run.show_results([], "", {"memories": [{"name": "text", "accuracy": 1.0, "vs_none": {"p_value": 0.25}}]})
    assert scripted.told == [
        ("start", "mine lmpo"),
        ("log 4", {"lmpo/loss": 1.5, "lmpo/parts/a": 1}),
        ("show", {"lmpo/text/accuracy": 1.0, "lmpo/text/vs_none/p_value": 0.25}),
        ("close",),
    ]


def test_a_phase_that_goes_on_is_the_same_run_of_a_tracker_and_another_folder_is_not(tmp_path, scripted):
    def id_(folder, phase):
        with opened(folder, phase, report_to=["wandb"]) as run:
            return run._tracking._tracked.id

    first = id_(tmp_path / "a", "lmpo")
    assert id_(tmp_path / "a", "lmpo") == first
    assert len({first, id_(tmp_path / "a", "sft"), id_(tmp_path / "b", "lmpo")}) == 3


@pytest.mark.parametrize("obstacle", ["folder", pytest.param("disk", marks=pytest.mark.slow)])
def test_tensorboard_that_cannot_write_ends_no_phase(tmp_path, obstacle):
    """With a limit on the size of files as a disk that is full, in a process of its own."""
    pytest.importorskip("tensorboard")
    if obstacle == "folder":
        (tmp_path / "tensorboard").write_text("no folder")
    code = f"""
import resource
from latentmem.runs import Run
with Run.open({str(tmp_path)!r}, "run: " + 50_000 * "x", "sft", {{}}, report_to=["tensorboard"]) as run:
    if {obstacle == "disk"}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    for step in range(1, 6):
        run.log({{"step": step, "loss": 1.0}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("report_to: tensorboard failed (") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl").rows] == [1, 2, 3, 4, 5]


@pytest.fixture
def without_wandb(monkeypatch):
    real = importlib.metadata.distribution

    def distribution(name):
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(tracking, "distribution", distribution)


def test_a_tracker_that_is_not_installed_is_a_mistake(without_wandb):
    check_trackers([])
    with pytest.raises(ConfigError) as error:
        check_trackers(["wandb"])
    assert str(error.value) == (
        "report_to names wandb, which is not installed; pip install 'latentmem[wandb]', or leave it out"
    )


RUN = """
run: {folder}/run
model: {{name: {model}, device: cpu, dtype: float32}}
data: {{kind: qa, schema: popqa, train: {{path: {folder}/train.jsonl}}, test: {{path: {folder}/test.jsonl}}}}
composer: {{num_latents: 3, rank: 2, max_prompt_tokens: 500, template: '{{task}} {{memory}} {{role_messages}}'}}
bank: {{num_retrieved: 2, only_successes: false}}
sampling: {{temperature: 1.0, max_response_tokens: 4}}
lmpo: {{num_steps: 2, tasks_per_step: 2, group_size: 2, initial: untrained}}
evaluate: {{num_bootstraps: 50, memories: [none, text]}}
"""


@pytest.fixture
def config(tmp_path, tiny_model_dir):
    row = {"possible_answers": '["red"]', "o_aliases": "[]"}
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        rows = [row | {"id": number, "question": f"Which colour has door {number}?"} for number in numbers]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(RUN.format(folder=tmp_path, model=tiny_model_dir))
    return tmp_path / "c.yaml"


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_made(config, without_wandb, capsys):
    assert cli.main(["collect", str(config), "report_to=[wandb]", "model.name=no-such/model"]) == 2
    assert capsys.readouterr().err.startswith("latentmem: report_to names wandb, which is not installed; ")
    assert not (config.parent / "run").exists()
    assert cli.main(["collect", str(config), "report_to=[wendb]"]) == 2


@pytest.mark.usefixtures("no_embedding_model")
def test_a_whole_run_is_shown_by_tensorboard_and_report_to_may_change_when_a_phase_goes_on(config):
    run = config.parent / "run"
    assert cli.main(["collect", str(config)]) == 0
    assert cli.main(["train", "lmpo", str(config)]) == 0
    assert not (run / "tensorboard").exists()
    for words in (["collect"], ["train", "lmpo"], ["evaluate"]):
        assert cli.main([*words, str(config), "report_to=[tensorboard]"]) == 0
    assert [path.name for path in (run / "tensorboard").iterdir()] == ["evaluate"]  # the others were finished already
    scalars, texts = shown(run / "tensorboard" / "evaluate")
    for memory in read_json(run / "results.json")["memories"]:
        for key in ("accuracy", "reward", "prompt_tokens"):
            assert scalars[f"evaluate/{memory['name']}/{key}"] == [(0, float(np.float32(memory[key])))]
    assert texts["results"] == (run / "report" / "comparison.md").read_text().partition("\n\n")[2]
    configuration = texts["configuration"].splitlines()
    assert [line.removeprefix("    ") for line in configuration] == (run / "config.yaml").read_text().splitlines()

    assert cli.main(["collect", str(config), "run=" + str(run) + "2", "report_to=[tensorboard]"]) == 0
    assert cli.main(["train", "lmpo", str(config), "run=" + str(run) + "2", "report_to=[tensorboard]"]) == 0
    second = run.with_name("run2")
    assert sorted(path.name for path in (second / "tensorboard").iterdir()) == ["collect", "lmpo"]
    for phase in ("collect", "lmpo"):
        assert shown(second / "tensorboard" / phase)[0] == logged(second, phase)
