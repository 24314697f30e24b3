"""The main path with a tiny model: each phase alone and in a row, interrupted anywhere, under changed circumstances."""

import json
import os
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from killing import killed_at_sync
from latentmem import evaluation, processes, recipes
from latentmem.bank import ExperienceBank
from latentmem.bank import lists as bank_approximate
from latentmem.config import load_config, parse_config
from latentmem.environments.environment import Outcome
from latentmem.environments.reasoning import ReasoningDomain
from latentmem.errors import BankError, CheckpointError, ConfigError, DataError, RunError, TrainingError
from latentmem.evaluation import compare
from latentmem.folders import steps_done, warmup_steps_done
from latentmem.kept_latents import read_latents
from latentmem.memory.checkpoints import kind_of, read_checkpoint
from latentmem.memory.memory import recall_one
from latentmem.memory_names import MemoryName
from latentmem.models.language_model import LanguageModel
from latentmem.progress import progress
from latentmem.recipes.domains import DOMAINS
from latentmem.recipes.lessons import right_responses
from latentmem.recipes.memories import made_of, memory_of
from latentmem.recipes.phase import open_run
from latentmem.report import write_report
from latentmem.report.read import read_run
from latentmem.rollout import rollout
from latentmem.runs import Run
from latentmem.teams.team import load_team
from latentmem.training.checkpoint_folder import selected_checkpoint
from latentmem.training.lmpo import LMPOTrainer
from latentmem.training.sft import SFTTrainer
from latentmem.trajectory import Step, Task, Trajectory
from models.architectures import tiny
from peers import together

pytestmark = pytest.mark.usefixtures("lucky")
named = MemoryName.parse

CONFIG = """
run: {run}
model: {{name: {model}, device: cpu, dtype: float32}}
data:
  kind: reasoning_gym
  families: [{{name: chain_sum, params: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}}}]
  train_size: 12
  test_size: 4
composer: {{num_latents: 3, rank: 2, max_prompt_tokens: 500, template: '{{task}} {{memory}} {{role_messages}}'}}
bank: {{num_retrieved: 2, only_successes: false}}
sampling: {{temperature: 1.0, max_response_tokens: 4}}
collect: {{num_tasks: 8, batch_size: 4, rollouts_per_task: 2}}
sft: {{num_steps: 3, trajectories_per_step: 2, save_every: 2}}
lmpo: {{num_steps: 3, tasks_per_step: 2, group_size: 3, save_every: 2, initial: untrained}}
grpo: {{num_steps: 3, tasks_per_step: 2, group_size: 3, save_every: 2, rank: 2, learning_rate: 1e-2}}
evaluate: {{batch_size: 2, num_bootstraps: 50}}
"""


class FakeEmbedder:
    """The fixture's hashing embedder behind the class that the recipes make."""

    made = 0

    def __init__(self, name="all-minilm-l6-v2"):
        type(self).made += 1
        self.name = name

    def __call__(self, texts):
        return self.embed(texts)


@pytest.fixture(autouse=True)
def embedder(monkeypatch, fake_embed):
    monkeypatch.setattr(FakeEmbedder, "embed", staticmethod(fake_embed), raising=False)
    monkeypatch.setattr(FakeEmbedder, "made", 0)
    monkeypatch.setattr("latentmem.models.embedder.Embedder", FakeEmbedder)
    return FakeEmbedder


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Figures take longer than all the rest; one test draws them."""
    monkeypatch.setattr(recipes.evaluate, "write_report", lambda runs: "no report")


@pytest.fixture
def configure(tmp_path, tiny_model_dir):
    def configure(run, *overrides):
        path = tmp_path / "config.yaml"
        path.write_text(CONFIG.format(run=tmp_path / run, model=tiny_model_dir))
        return load_config(str(path), list(overrides))

    return configure


QUICKSTART = {
    "collect": recipes.collect,
    "sft": recipes.train_sft,
    "lmpo": recipes.train_lmpo,
    "evaluate": recipes.compare,
}
PHASES = {**QUICKSTART, "warmup": recipes.train_warmup, "grpo": recipes.train_grpo}


def do(config, *phases):
    for phase in phases:
        PHASES[phase](config)


def metrics(config, drop=("rollout_seconds", "update_seconds")):
    lines = (Path(config.run) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]


def exported(config):
    path = Path(config.run) / "bank.sqlite"
    ExperienceBank(path).export(path.with_name("export.jsonl"))
    return path.with_name("export.jsonl").read_bytes()


def weights(config, phase):
    folder = selected_checkpoint(Path(config.run) / phase / "checkpoints")
    return read_checkpoint(folder, kind_of(folder))[1]


def results(config):
    found = json.loads((Path(config.run) / "results.json").read_text())
    del found["run"]
    for row in found["memories"]:
        del row["seconds"], row["peak_memory_mb"]
        if row["learning"] is not None:
            del row["learning"]["seconds"]
    return found


def notes(config, name, folder="memories"):
    found = json.loads((Path(config.run) / folder / f"{name}.json").read_text())
    del found["costs"]["seconds"]
    return found


def assert_same(ours, theirs, *phases):
    assert metrics(ours) == metrics(theirs)
    assert exported(ours) == exported(theirs)
    for phase in set(phases) & {"warmup", "sft", "lmpo", "grpo"}:
        left, right = weights(ours, phase), weights(theirs, phase)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    if "evaluate" in phases:
        assert results(ours) == results(theirs)


class Interrupted(BaseException):
    """As KeyboardInterrupt; the autograd engine of torch does not live through a fork."""


def interrupted_at_sync(number, monkeypatch, action):
    """Run an action that is interrupted at its `number`-th write to stable storage."""
    left = iter(range(number - 1, -1, -1))
    sync = os.fsync

    def fsync(handle):
        if not next(left, 1):
            raise Interrupted
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(Interrupted):
            action()


# The path


def test_the_phases_one_by_one_and_the_quickstart_give_the_same_run(configure, embedder, capsys, monkeypatch):
    monkeypatch.setattr(recipes.evaluate, "write_report", write_report)
    whole, parts = configure("whole"), configure("parts")
    recipes.quickstart(whole)
    assert embedder.made == 1
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("== ")] == [
        "== collect: the team plays without memory; the bank fills",
        "== sft: the composer learns from right responses",
        "== lmpo: the composer learns from the team's reward",
        "== evaluate: memories compared on held-out tasks",
    ]
    monkeypatch.setattr(recipes.evaluate, "write_report", lambda runs: None)
    do(parts, *QUICKSTART)
    assert_same(whole, parts, *QUICKSTART)
    run = Path(whole.run)
    assert (run / "report" / "report.html").exists()
    assert [row["name"] for row in results(whole)["memories"]] == [*map(str, whole.evaluate.memories)]
    assert len([row for row in metrics(whole) if row["phase"] == "collect"]) == 4  # 2 tasks x 2 rollouts a batch
    assert {row["phase"] for row in metrics(whole)} == {"collect", "sft", "lmpo"}


def test_the_banks_of_a_run_are_searched_as_configured(configure, monkeypatch):
    opened = []

    def opening(path, *arguments, **settings):
        opened.append((Path(path).name, settings["index"]))
        return ExperienceBank(path, *arguments, **settings)

    monkeypatch.setattr(recipes.parts, "ExperienceBank", opening)
    monkeypatch.setattr(bank_approximate, "_FEW_ROWS", 4)
    config = configure(
        "run", "bank.index=approximate", "evaluate.online=true", "evaluate.memories=[text]", "evaluate.batch_size=4"
    )
    do(config, "collect", "evaluate")
    assert set(opened) == {("bank.sqlite", "approximate"), ("text.sqlite", "approximate")}
    assert (Path(config.run) / "evaluate" / "text.sqlite.lists").exists()


def test_collect_stores_failures_too_and_counts(configure):
    config = configure("run")
    do(config, "collect")
    rows = metrics(config)
    bank = ExperienceBank(Path(config.run) / "bank.sqlite")
    assert rows[-1]["stored"] == len(bank) == 16
    assert sum(row["successes"] for row in rows) == bank.info().num_successes
    assert 0 < bank.info().num_successes < 16
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert not list((Path(config.run) / "collect").glob("batch-*"))


def test_a_finished_phase_says_so_and_changes_nothing(configure, capsys, monkeypatch):
    config = configure("run")
    do(config, "collect", "sft", "lmpo")
    before = {p: p.read_bytes() for p in Path(config.run).rglob("*") if p.is_file() and p.suffix != ".sqlite"}
    capsys.readouterr()
    monkeypatch.setattr(LanguageModel, "from_pretrained", lambda *_: pytest.fail("a model was loaded"))
    do(config, "collect", "sft", "lmpo")
    out = capsys.readouterr().out
    assert "collect: finished already, 8 train tasks; the bank has 16 trajectories" in out
    assert "sft: finished already, 3 steps" in out
    assert "lmpo: finished already, 3 steps" in out
    now = {p: p.read_bytes() for p in Path(config.run).rglob("*") if p.is_file() and p.suffix != ".sqlite"}
    changed = {p.name for p in before | now if before.get(p) != now.get(p)}
    assert changed <= {"bank.sqlite-wal", "bank.sqlite-shm", ".lock"}


# Interruptions


def test_collect_killed_at_any_write_goes_on_to_the_same_bank_and_metrics(configure, monkeypatch):
    options = ("collect.memory=text", "collect.num_tasks=4")  # a memory that sees what is stored already
    whole = configure("whole", *options)
    do(whole, "collect")
    stored_but_not_counted = 0
    for number in range(7, 15):
        cut = configure(f"cut-{number}", *options)
        assert killed_at_sync(number, monkeypatch, lambda config=cut: do(config, "collect"))
        if list((Path(cut.run) / "collect").glob("batch-*")):
            stored_but_not_counted += len(ExperienceBank(Path(cut.run) / "bank.sqlite")) in (4, 8)
        do(cut, "collect")
        assert_same(cut, whole)
    assert stored_but_not_counted


@pytest.mark.parametrize("phase", [pytest.param("sft", marks=pytest.mark.slow), "lmpo"])
def test_training_interrupted_at_some_writes_goes_on_to_the_same_weights(configure, monkeypatch, phase):
    whole = configure("whole")
    do(whole, "collect", phase)
    for number in (5, 11, 14):
        cut = configure(f"cut-{number}")
        do(cut, "collect")
        interrupted_at_sync(number, monkeypatch, lambda config=cut: do(config, phase))
        do(cut, phase)
        assert_same(cut, whole, phase)


class Unpaid:
    """An environment in which every action is worth nothing."""

    instructions = "Say a number."

    def step(self, action):
        return Outcome("", reward=0.0, done=True)


SAME_REWARDS = "3 steps done, none changed {}: no group had rewards that differ; see docs/training.md, Signal; "


@pytest.mark.parametrize(("phase", "trained"), [("lmpo", "the composer"), ("grpo", "the agents")])
def test_a_training_that_moved_nothing_says_so_also_after_an_interruption(
    configure, monkeypatch, capsys, phase, trained
):
    monkeypatch.setattr(ReasoningDomain, "start", lambda *_: Unpaid())
    config = configure("run")
    do(config, "collect")
    interrupted_at_sync(9, monkeypatch, lambda: do(config, phase))
    do(config, phase)
    said = SAME_REWARDS.format(trained)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{phase}: {said}")
    do(config, phase)
    assert capsys.readouterr().out.startswith(f"{phase}: {said.replace('3 steps done', 'finished already, 3 steps')}")


def test_a_training_whose_earlier_command_moved_something_is_not_said_to_have_moved_nothing(
    configure, monkeypatch, capsys
):
    shorter = configure("run", "lmpo.num_steps=2")
    do(shorter, "collect", "lmpo")
    (Path(shorter.run) / "lmpo" / "config.yaml").unlink()
    monkeypatch.setattr(ReasoningDomain, "start", lambda *_: Unpaid())
    do(configure("run"), "lmpo")
    updated = [row["updated"] for row in metrics(shorter) if row["phase"] == "lmpo"]
    assert updated[0] == 1
    assert updated[2] == 0
    out = capsys.readouterr().out
    assert "lmpo: 3 steps done; " in out
    assert "none changed" not in out


def test_nothing_is_claimed_of_a_training_whose_metrics_are_lost(configure, monkeypatch, capsys):
    monkeypatch.setattr(ReasoningDomain, "start", lambda *_: Unpaid())
    config = configure("run")
    do(config, "collect", "lmpo")
    path = Path(config.run) / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[-1] + "\n")
    capsys.readouterr()
    do(config, "lmpo")
    assert capsys.readouterr().out.startswith("lmpo: finished already, 3 steps; ")


@pytest.fixture
def configure_wordy(configure, wordy_model_dir):
    """With slots, and agents that have words."""
    options = (
        f"model.name={wordy_model_dir}",
        "composer.slots=1",
        "composer.template='{memory}'",
        "warmup.frame_steps=2",
        "warmup.copy_steps=2",
        "warmup.lessons_per_step=2",
        "warmup.words_per_prompt=2",
        "warmup.save_every=1",
        "warmup.eval_every=2",
        "sft.initial=warmup",
        "lmpo.initial=warmup",
    )
    return lambda run, *more: configure(run, *options, *more)


@pytest.mark.slow
def test_a_warm_up_interrupted_at_some_writes_goes_on_to_the_same_weights(configure_wordy, monkeypatch, capsys):
    whole = configure_wordy("whole")
    do(whole, "warmup")
    assert [row["step"] for row in metrics(whole)] == [0, 1, 2, 2, 3, 4, 5, 5]
    assert not (Path(whole.run) / "bank.sqlite").exists()
    reached = set()
    for number in (16, 40, 50):
        cut = configure_wordy(f"cut-{number}")
        interrupted_at_sync(number, monkeypatch, lambda config=cut: do(config, "warmup"))
        folder = Path(cut.run) / "warmup" / "checkpoints"
        reached.add(warmup_steps_done(folder, frame_steps=2))
        do(cut, "warmup")
        assert metrics(cut) == metrics(whole)
        assert all(torch.equal(w, weights(cut, "warmup")[name]) for name, w in weights(whole, "warmup").items())
    assert reached == {0, 2, 3}  # in the frame stage, between the two, and in the copy stage
    capsys.readouterr()
    do(whole, "warmup")
    assert "warmup: finished already, 2 frame steps and 2 copy steps; " in capsys.readouterr().out


def test_a_warm_up_without_copying_says_that_the_frame_was_trained(configure_wordy, capsys):
    config = configure_wordy("run", "warmup.copy_steps=0", "warmup.eval_every=null")
    selected = (
        f"{config.run}/warmup/checkpoints/step-000000 is selected, which is after all frame steps and 0 copy steps"
    )
    do(config, "warmup")
    assert capsys.readouterr().out == f"warmup: 2 frame steps and 0 copy steps done; {selected}\n"
    do(config, "warmup")
    assert capsys.readouterr().out == f"warmup: finished already, 2 frame steps and 0 copy steps; {selected}\n"


@pytest.mark.slow
def test_trainings_start_from_the_warm_up_and_its_composer_is_evaluated(configure_wordy):
    config = configure_wordy("run", "sft.num_steps=1", "sft.eval_every=1", "sft.eval_tasks=1", "sft.learning_rate=1e-9",
                             "evaluate.memories=[latent:warmup]")  # fmt: skip
    do(config, "collect")
    with pytest.raises(CheckpointError, match="no checkpoint of warmup here; run `latentmem train warmup`"):
        do(config, "sft")
    do(config, "warmup", "sft", "evaluate")
    begun, warm = weights(config, "sft"), weights(config, "warmup")
    assert all(torch.allclose(begun[name], warm[name], atol=1e-6) for name in warm)
    assert [row["name"] for row in results(config)["memories"]] == ["latent:warmup"]


@pytest.mark.slow
def test_evaluation_killed_at_some_writes_goes_on_to_the_same_results(configure, monkeypatch):
    options = ("evaluate.memories=[none, text, latent:untrained]",)
    whole = configure("whole", *options)
    do(whole, "collect", "evaluate")
    for number in (5, 8, 13):
        cut = configure(f"cut-{number}", *options)
        do(cut, "collect")
        assert killed_at_sync(number, monkeypatch, lambda config=cut: do(config, "evaluate"))
        do(cut, "evaluate")
        assert_same(cut, whole, "evaluate")


def test_a_process_killed_while_it_tidied_up_leaves_nothing_for_good(configure):
    config = configure("run")
    do(config, "collect", "sft")
    run = Path(config.run)
    listing = sorted(run.rglob("*"))
    (run / "sft" / "checkpoints" / "step-000002").mkdir()
    (run / "sft" / "checkpoints" / "step-000002" / "composer.json").write_text("{}")
    (run / "collect" / "batch-000006.jsonl").write_text("counted already\n")
    do(config, "collect", "sft")
    assert sorted(path for path in run.rglob("*") if "bank.sqlite" not in path.name) == [
        path for path in listing if "bank.sqlite" not in path.name
    ]


@pytest.mark.slow
def test_a_bank_that_cannot_be_copied_is_named_and_copied_by_the_next_command(configure, monkeypatch):
    options = ("evaluate.online=true", "evaluate.memories=[text]")
    config, whole = configure("run", *options), configure("whole", *options)
    do(config, "collect")
    do(whole, "collect", "evaluate")
    connect = sqlite3.connect

    def small(path, *args, **kwargs):
        database = connect(path, *args, **kwargs)
        if ".fresh" in str(path):
            database.execute("PRAGMA max_page_count = 3")  # SQLite then says what it says of a full disk
        return database

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", small)
        with pytest.raises(BankError, match=r"evaluate/text\.fresh: the bank cannot be copied here; free some .*full"):
            do(config, "evaluate")
    do(config, "evaluate")
    assert_same(config, whole, "evaluate")


# Demonstrations


def written(folder, *rows):
    path = folder / "said.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(config, numbers, text="It is {}."):
    tasks = recipes.Parts(config).train_tasks
    return [{"task": tasks[i].id, "responses": {"": text.format(i)}} for i in numbers]


def dev(config):
    return [json.loads(line) for line in (Path(config.run) / "sft" / "dev.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_sft_on_demonstrations_interrupted_at_some_writes_goes_on_to_the_same_weights_and_dev_rows(
    configure, monkeypatch, tmp_path
):
    # Task 9 has two demonstrations, task 11 has none.
    path = written(tmp_path, *said(configure("whole"), (0, 3, 9, 10, 9)))
    options = (f"sft.demonstrations={path}", "sft.eval_every=1", "sft.eval_tasks=3")
    whole = configure("whole", *options)
    do(whole, "collect", "sft")
    keys = [recipes.Parts(whole).train_tasks[i].key for i in (9, 10)]
    assert [(row["step"], row["task"]) for row in dev(whole)] == [(s, key) for s in range(4) for key in keys]
    evaluated = [row for row in metrics(whole) if "eval_accuracy" in row]
    assert [row["step"] for row in evaluated] == [0, 1, 2, 3]
    assert all(0 <= row["accuracy"] <= 1 and row["loss"] > 0 for row in dev(whole))
    torn = 0
    for number in (10, 15, 22):
        cut = configure(f"cut-{number}", *options)
        do(cut, "collect")
        interrupted_at_sync(number, monkeypatch, lambda config=cut: do(config, "sft"))
        saved = steps_done(Path(cut.run) / "sft" / "checkpoints")
        torn += any(row["step"] > saved for row in dev(cut))
        with (Path(cut.run) / "sft" / "dev.jsonl").open("a") as file:
            file.write('{"step": 1, "ta')
        do(cut, "sft")
        assert_same(cut, whole, "sft")
        assert dev(cut) == dev(whole)
    assert torn


def test_demonstrations_of_the_domain_are_learned_but_for_those_of_tasks_set_aside(configure, monkeypatch):
    text = "as {} is told"

    class Telling(ReasoningDomain):
        def demonstrations(self, task):
            return {"": text.format(task.id)}

    monkeypatch.setattr(recipes.domains, "ReasoningDomain", Telling)
    config = configure("run", "sft.demonstrations=domain", "sft.eval_every=3", "sft.eval_tasks=2", "sft.num_steps=1")
    do(config, "collect")
    made = []
    real = SFTTrainer
    monkeypatch.setattr(
        recipes.train, "SFTTrainer", lambda *args, **kwargs: made.append(real(*args, **kwargs)) or made[0]
    )
    parts = recipes.Parts(config)
    recipes.train_sft(config, parts)
    (trainer,) = made
    tasks = parts.train_tasks
    assert [t.task for t in trainer.trajectories] == tasks[:-2]
    assert [t.task for t in trainer.held_out] == tasks[-2:]
    assert {m.response for m in trainer.trajectories[3].messages} == {text.format(tasks[3].id)}
    # The prompt is the environment's and the team's own, the memory the one that an evaluation recalls.
    (_, second) = trainer.trajectories[3].messages
    assert "Say something." in second.system
    role = parts.team.roles[1]
    assert trainer._examples(trainer.trajectories[3:4])[1].composer_text == (
        recall_one(memory_of(parts, named("latent:untrained")), tasks[3], role).record.text
    )
    shown = right_responses(parts, parts.tasks["test"], parts.team)
    assert shown is not None
    assert [t.task for t in shown] == parts.tasks["test"]


def test_data_that_demonstrate_nothing_show_nothing(configure):
    parts = recipes.Parts(configure("run"))
    assert right_responses(parts, parts.train_tasks, parts.team) is None


def test_demonstrations_that_cannot_be_used_are_told(configure, tmp_path, monkeypatch):
    config = configure("run")
    do(config, "collect")
    alone = [{**row, "responses": {"assistant": "a"}} for row in said(config, (0,))]
    monkeypatch.setattr(SFTTrainer, "__init__", lambda *_: pytest.fail("a trainer was made"))
    for rows, override, kind, message in [
        (
            said(config, (10,)),
            "sft.eval_every=1",
            TrainingError,
            "none of its 1 demonstrations is of a task that is left to train on",
        ),
        (alone, "seed=0", DataError, "said.jsonl:1: role 'user proxy' of team autogen has no demonstrated"),
        ([{"task": "x", "responses": {}}], "seed=0", DataError, "said.jsonl:1: task 'x' is not in the data; expected"),
    ]:
        path = written(tmp_path, *rows)
        with pytest.raises(kind, match=message):
            do(configure("run", f"sft.demonstrations={path}", "sft.eval_tasks=2", override), "sft")
        for name in ("config.yaml", "state.json"):
            (Path(config.run) / "sft" / name).unlink(missing_ok=True)


def test_sft_and_lmpo_start_where_they_are_told(configure):
    first = configure("first")
    do(first, "collect", "sft")
    trained = weights(first, "sft")
    folder = selected_checkpoint(Path(first.run) / "sft" / "checkpoints")
    # A phase before sft keeps its checkpoints as every phase does.
    (Path(first.run) / "warmup").mkdir()
    shutil.copytree(Path(first.run) / "sft" / "checkpoints", Path(first.run) / "warmup" / "checkpoints")
    bank = f"bank.path={first.run}/bank.sqlite"
    tiny = "learning_rate=1e-30"
    other = configure("other", bank, f"sft.initial={folder}", f"sft.{tiny}")
    do(other, "sft")
    again = configure("first", "sft.initial=warmup", "lmpo.initial=warmup", f"lmpo.{tiny}", "lmpo.num_steps=1")
    do(again, "lmpo")
    for config, phase in ((other, "sft"), (again, "lmpo")):
        found = weights(config, phase)
        assert all(torch.allclose(found[name], value, rtol=0, atol=1e-20) for name, value in trained.items())
    parts = recipes.Parts(again)
    memory = memory_of(parts, named("latent:warmup"))
    assert all(torch.equal(memory.composer.trainable()[name], value) for name, value in trained.items())
    assert (
        made_of(parts, named("latent:warmup"))
        == made_of(parts, named("latent:sft"))
        != made_of(parts, named("latent:untrained"))
    )
    with pytest.raises(CheckpointError, match="no checkpoint of warmup here; run `latentmem train warmup` with this"):
        do(configure("none", bank, "sft.initial=warmup"), "sft")


# Evaluation of what has changed, and while learning


@pytest.mark.slow
def test_a_memory_whose_composer_was_trained_on_is_evaluated_again_and_no_other(configure, caplog):
    options = ("evaluate.memories=[none, latent:lmpo]",)
    config = configure("run", "lmpo.num_steps=1", *options)
    do(config, "collect", "lmpo", "evaluate")
    stale = results(config)
    longer = configure("run", "lmpo.num_steps=3", *options)
    checkpoints = Path(config.run) / "lmpo"
    (checkpoints / "config.yaml").unlink()  # a run that was evaluated in the middle of its training
    do(longer, "lmpo")
    files = [Path(config.run) / "evaluate" / f"{name}.jsonl" for name in ("none", "latent-lmpo")]
    before = [file.stat().st_mtime_ns for file in files]
    do(longer, "evaluate")
    assert "latent:lmpo has changed since it was evaluated; it is evaluated again" in caplog.text
    assert [file.stat().st_mtime_ns == old for file, old in zip(files, before, strict=True)] == [True, False]
    assert results(longer)["memories"][0] == stale["memories"][0]
    caplog.clear()
    do(longer, "evaluate")
    assert "has changed" not in caplog.text


def test_a_finished_evaluation_is_told_again_without_making_a_composer(configure, monkeypatch):
    config = configure("run", "evaluate.memories=[none, text, latent:untrained, latent:untrained:random]")
    do(config, "collect", "evaluate")
    first, composer, made = results(config), recipes.Parts.composer, []
    monkeypatch.setattr(recipes.Parts, "composer", lambda parts: made.append(1) or composer(parts))
    do(config, "evaluate")
    assert results(config) == first
    assert not made
    costs = Path(config.run) / "evaluate" / "latent-untrained-random.costs"
    costs.write_bytes(b"".join(costs.read_bytes().splitlines(keepends=True)[:-1]))  # as if its last batch was lost
    do(config, "evaluate")
    assert results(config) == first
    assert made == [1]


def test_an_unfinished_training_is_used_with_a_warning(configure, caplog):
    config = configure("run", "lmpo.num_steps=1", "evaluate.memories=[latent:lmpo]")
    do(config, "collect", "lmpo")
    do(configure("run", "lmpo.num_steps=3", "evaluate.memories=[latent:lmpo]"), "evaluate")
    assert "lmpo has done 1 of its 3 steps; its checkpoint so far is used" in caplog.text


def test_an_online_evaluation_learns_into_copies_and_leaves_the_runs_bank_alone(configure):
    options = ("evaluate.memories=[none, text, latent:untrained]",)
    config = configure("run", "evaluate.online=true", *options)
    do(config, "collect")
    before = exported(config)
    do(config, "evaluate")
    assert exported(config) == before
    test_ids = set(results(config)["task_ids"])
    for name in ("text", "latent-untrained"):
        copy = list(ExperienceBank(Path(config.run) / "evaluate" / f"{name}.sqlite"))
        assert len(copy) == 16 + 4
        assert {t.task.key for t in copy[16:]} == test_ids
    assert not (Path(config.run) / "evaluate" / "none.sqlite").exists()

    offline = configure("offline", *options)
    do(offline, "collect", "evaluate")
    assert exported(offline) == before
    assert not list((Path(offline.run) / "evaluate").glob("*.sqlite"))


@pytest.mark.slow
def test_checkpoints_by_folder_keep_files_of_their_own_and_the_report_finds_them(configure, tmp_path):
    config = configure("run")
    do(config, "collect", "sft", "lmpo")
    folders = [selected_checkpoint(Path(config.run) / phase / "checkpoints") for phase in ("sft", "lmpo")]
    names = [f"latent:{folder}" for folder in folders]
    compared = configure("run", f"evaluate.memories={json.dumps([*names, 'latent:sft'])}")
    do(compared, "evaluate")
    assert len(list((Path(config.run) / "evaluate").glob("*.jsonl"))) == 3
    first, second, sft = results(compared)["memories"]
    assert first["rewards"] == sft["rewards"]
    assert len({row["trajectories"] for row in (first, second, sft)}) == 3
    record = read_run(Path(config.run))
    assert list(record.trajectories) == [*names, "latent:sft"]
    assert all(len(rows) == 4 for rows in record.trajectories.values())


# Agents that are trained themselves


def test_agents_are_trained_and_evaluated_without_a_bank(configure, capsys):
    config = configure("run", "evaluate.memories=[none, grpo]")
    do(config, "grpo", "evaluate")
    assert "grpo: 3 steps done; " in capsys.readouterr().out
    assert not (Path(config.run) / "bank.sqlite").exists()
    rows = metrics(config)
    assert [row["step"] for row in rows if row["phase"] == "grpo"] == [1, 2, 3]
    assert all(row["first_ratio_max"] == pytest.approx(1, abs=1e-4) for row in rows if row["updated"])
    none, grpo = results(config)["memories"]
    assert (none["name"], grpo["name"]) == ("none", "grpo")
    assert none["prompt_tokens"] == pytest.approx(grpo["prompt_tokens"], rel=0.2)
    assert grpo["latent_tokens"] == 0
    assert grpo["vs_none"] is not None
    said = [(Path(config.run) / "evaluate" / f"{name}.jsonl").read_text() for name in ("none", "grpo")]
    assert said[0].replace('"none"', '"parametric"') != said[1]
    do(config, "grpo")
    assert "grpo: finished already, 3 steps; " in capsys.readouterr().out


@pytest.mark.parametrize("order", ["[grpo, none, latent:untrained, grpo:FOLDER]", "[latent:untrained, none, grpo]"])
def test_each_memory_plays_bit_for_bit_as_if_it_were_alone(configure, order):
    def played(config, name):
        text = (Path(config.run) / "evaluate" / f"{name}.jsonl").read_text()
        return [{k: v for k, v in json.loads(line).items() if k != "id"} for line in text.splitlines()]

    alone = configure("alone", "evaluate.memories=[none, latent:untrained]")
    do(alone, "collect", "evaluate")
    config = configure("run")
    do(config, "collect", "grpo")
    trained = selected_checkpoint(Path(config.run) / "grpo" / "checkpoints")
    first = Path(config.run) / "first"
    recipes.Parts(config).parametric_memory().save_pretrained(first)  # untrained
    do(configure("run", f"evaluate.memories={order.replace('FOLDER', str(first))}"), "evaluate")
    for name in ("none", "latent-untrained"):
        assert played(config, name) == played(alone, name)
    only = configure("only", f"evaluate.memories=['grpo:{trained}']")
    do(only, "evaluate")
    (file,) = (Path(only.run) / "evaluate").glob("grpo-*.jsonl")
    assert played(config, "grpo") == played(only, file.stem)
    assert played(config, "grpo") != played(alone, "none")
    if "FOLDER" in order:
        (file,) = (Path(config.run) / "evaluate").glob("grpo-*.jsonl")
        assert [t["steps"][0]["action"] for t in played(config, file.stem)] == [
            t["steps"][0]["action"] for t in played(alone, "none")
        ]


def test_agents_that_were_trained_on_are_evaluated_again(configure, caplog):
    options = ("evaluate.memories=[none, grpo]",)
    do(configure("run", "grpo.num_steps=1", *options), "grpo", "evaluate")
    longer = configure("run", *options)
    (Path(longer.run) / "grpo" / "config.yaml").unlink()
    do(longer, "grpo", "evaluate")
    assert "grpo has changed since it was evaluated; it is evaluated again" in caplog.text
    assert "none has changed" not in caplog.text


def test_agents_that_are_not_there_or_are_a_composer_are_told(configure):
    config = configure("run", "evaluate.memories=[grpo]")
    with pytest.raises(CheckpointError, match=r"run: no checkpoint of grpo here; run `latentmem train grpo` with this"):
        do(config, "evaluate")
    do(config, "collect", "lmpo", "grpo")
    composer, agents = (selected_checkpoint(Path(config.run) / phase / "checkpoints") for phase in ("lmpo", "grpo"))

    def refused(run, *options):
        with pytest.raises(CheckpointError) as error:
            do(configure(run, *options), "evaluate")
        return str(error.value)

    assert refused("second", f"evaluate.memories=['grpo:{composer}']") == (
        f"{composer}: holds a composer, not a LoRA of agents; write latent:FOLDER to use it"
    )
    assert refused("third", f"evaluate.memories=['latent:{agents}']") == (
        f"{agents}: holds a LoRA of agents, not a composer; write grpo:FOLDER to use it"
    )
    assert refused("fourth", "grpo.rank=4", f"evaluate.memories=['grpo:{agents}']") == (
        f"{agents}: checkpoint has rank 2, this adapter 4; use the configuration it was trained with"
    )
    with pytest.raises(ConfigError, match=r"^grpo.target_modules: 'lm_head' is the embedding or the output layer of"):
        do(configure("fifth", "grpo.target_modules=[lm_head]"), "grpo")
    with pytest.raises(ConfigError, match=r"^grpo.eval_tasks is 32, but the train split has 12 tasks; set it lower"):
        do(configure("sixth", "grpo.eval_every=1"), "grpo")


def test_prompts_of_trained_agents_are_shown_without_a_bank(configure, capsys):
    config = configure("run")
    do(config, "grpo")
    capsys.readouterr()
    recipes.show_prompts(config, memory="grpo")
    out = capsys.readouterr().out
    assert "memory grpo\n" in out
    assert "words of the memory" not in out


# Controls of latent memory


def test_controls_are_played_with_the_composer_they_control_and_mapped_ones_are_kept(configure):
    names = ["latent:lmpo", "latent:lmpo:random", "latent:lmpo:other-role", "latent:lmpo:irrelevant"]
    config = configure("run", f"evaluate.memories={json.dumps(names)}")
    do(config, "collect", "lmpo", "evaluate")
    played = {
        name: [
            json.loads(line)["steps"][0]["messages"]
            for line in (Path(config.run) / "evaluate" / f"{name.replace(':', '-')}.jsonl").read_text().splitlines()
        ]
        for name in names
    }
    real, noise, role, task = ([[m["recalled"] for m in row] for row in played[name]] for name in names)
    assert [[m["num_latents"] for m in row] for row in noise] == [[m["num_latents"] for m in row] for row in real]
    assert all(m["text"] == "" for row in noise for m in row)
    assert [[m["text"] for m in row] for row in role] == [[m["text"] for m in row][::-1] for row in real]
    assert [m["sources"] for row in task for m in row] != [m["sources"] for row in real for m in row]
    rows = results(config)["memories"]
    assert ["vs_real" in row for row in rows] == [False, True, True, True]
    kept = read_latents(Path(config.run) / "evaluate" / "latent-lmpo.safetensors")
    memory = memory_of(recipes.Parts(config), named("latent:lmpo"))
    tasks = {t.key: t for t in recipes.Parts(config).tasks["test"]}
    role = next(role for role in load_team("autogen").roles if role.name == kept.roles[1])
    again = recall_one(memory, tasks[kept.tasks[2]], role)
    torch.testing.assert_close(torch.from_numpy(kept.latents[2, 1]), again.latents, rtol=0, atol=1e-5)
    assert kept.domains == ("chain_sum",) * 4


@pytest.mark.slow
def test_what_latents_say_is_kept_read_once_and_forgotten_with_an_outdated_memory(configure, monkeypatch):
    config = configure("run", 'evaluate.memories=["none","latent:untrained","latent:lmpo","latent:lmpo:random"]')
    do(config, "collect", "lmpo", "evaluate")
    folder = Path(config.run) / "evaluate"
    assert {path.name for path in folder.glob("*.read.json")} == {"latent-untrained.read.json", "latent-lmpo.read.json"}
    path = folder / "latent-lmpo.read.json"
    found = json.loads(path.read_text())
    assert (found["memory"], found["before"]) == ("latent:lmpo", "latent:untrained")
    kept = read_latents(folder / "latent-lmpo.safetensors")
    assert [task["task"] for task in found["tasks"]] == list(kept.tasks[:3])
    untrained = json.loads((folder / "latent-untrained.read.json").read_text())
    assert untrained["before"] is None
    for task, earlier in zip(found["tasks"], untrained["tasks"], strict=True):
        assert [role["role"] for role in task["roles"]] == list(kept.roles)
        for role, other in zip(task["roles"], earlier["roles"], strict=True):
            assert other["before"] is None
            # Composed again from the episode's text, in another batch.
            for one, again in zip(role["before"], other["after"], strict=True):
                assert one["length"] == pytest.approx(again["length"], abs=1e-3)
                assert one["nearest"][0][0] == again["nearest"][0][0]
            assert role["after"] != role["before"]
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(recipes.readings, "read_out", lambda *_: pytest.fail("read again"))
        do(config, "evaluate")
    assert path.read_bytes() == before
    evaluation.forget(folder, named("latent:lmpo"))
    assert not path.exists()


def test_the_prompts_of_a_control_can_be_shown(configure, capsys):
    config = configure("run")
    do(config, "collect")
    for name in (
        "latent:untrained:random",
        "latent:untrained:other-role",
        "latent:untrained:other-task",
        "latent:untrained:filler",
        "text:corrupt",
        "metagpt:shuffle",
    ):
        recipes.show_prompts(config, memory=name)
        assert f"memory {name}, of 16 trajectories" in capsys.readouterr().out


def test_a_control_that_cannot_be_is_told_before_a_model_is_loaded(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageModel, "from_pretrained", lambda *_: pytest.fail("a model was loaded"))
    alone = tmp_path / "alone.yaml"
    alone.write_text(
        "name: alone\nagents: [{role: solver, profile: Solves., system: You solve., user: '{task}'}]\nanswer: solver\n"
    )
    for run, override, name, message in (
        (
            "one-role",
            f"team={alone}",
            "latent:untrained:other-role",
            "needs a team of two roles or more, but this team has one",
        ),
        (
            "one-task",
            "data.test_size=1",
            "text:irrelevant",
            "needs two tasks or more, but the test split has one",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            do(configure(run, override, f"evaluate.memories=['{name}']"), "evaluate")


# What a memory carries


def carried(config):
    return {row["name"]: row["carried"] for row in results(config)["memories"]}


def test_what_each_memory_carries_is_measured_once_and_again_when_what_it_is_made_of_changes(configure, monkeypatch):
    names = ["none", "text", "text:empty", "voyager", "latent:untrained"]
    config = configure("run", f"evaluate.memories={json.dumps(names)}", "data.test_size=6")
    do(config, "collect", "evaluate")
    found = carried(config)
    assert (found["none"], found["text:empty"]) == (None, None)
    for name in ("text", "voyager", "latent:untrained"):
        told = found[name]
        assert told["low"] <= told["nats"] <= told["high"], name
        assert told["other"] - told["own"] == pytest.approx(told["nats"])
        assert 2 <= told["num_tasks"] <= 6
    assert len({found[name]["num_tasks"] for name in ("text", "voyager", "latent:untrained")}) == 1
    assert found["text"]["nats"] != 0
    folder = Path(config.run) / "evaluate"
    assert (folder / "latent-untrained.carried.json").exists()
    measured = []
    real = compare.measure_carried
    monkeypatch.setattr(compare, "measure_carried", lambda m, *a, **k: measured.append(m.kind) or real(m, *a, **k))
    do(config, "evaluate")
    assert (measured, carried(config)) == ([], found)
    (folder / "text.carried.json").unlink()  # as if it had been killed before
    do(config, "evaluate")
    assert (measured, carried(config)) == (["text"], found)
    measured.clear()
    parts = recipes.Parts(config)
    none, tasks = memory_of(parts, named("none")), parts.train_tasks[8:9]
    played = rollout(parts.team, none, parts.model, tasks, parts.domain.start, sampling=parts.sampling)
    parts.bank.add(played.trajectories)
    do(config, "evaluate")
    assert sorted(measured) == ["latent", "text", "voyager"]
    kept = json.loads((folder / "text.carried.json").read_text())
    (folder / "text.carried.json").write_text(json.dumps(kept | {"carried": {"nats": "much"}}))
    with pytest.raises(RunError, match=r"text\.carried\.json: damaged \(carried\.nats: .*\); remove it, and it is"):
        do(config, "evaluate")


def test_what_the_data_demonstrate_is_measured_by_in_place_of_what_was_played(configure, monkeypatch):
    config = configure("run", "evaluate.memories=[text]")
    do(config, "collect")
    solved = [t for t in recipes.Parts(config).bank if t.success]
    for shown, num_tasks in ((solved, len({t.task.key for t in solved})), (solved[:1], None)):
        monkeypatch.setattr(recipes.evaluate, "right_responses", lambda *_, shown=shown: shown)
        (row,) = recipes.play_test(config)["memories"]
        assert (row["carried"] and row["carried"]["num_tasks"]) == num_tasks


def test_training_logs_what_latents_carry_with_each_evaluation(configure):
    config = configure(
        "run", "collect.num_tasks=12", "sft.eval_every=2", "sft.eval_tasks=6", "lmpo.eval_every=3", "lmpo.eval_tasks=6"
    )
    do(config, "collect", "sft", "lmpo")
    for phase, key in (("sft", "eval_loss"), ("lmpo", "eval_reward")):
        rows = [row for row in metrics(config) if row["phase"] == phase and key in row]
        assert len(rows) >= 2
        for row in rows:
            assert row["carried_low"] <= row["carried"] <= row["carried_high"]
    assert not any("carried" in row for row in metrics(config) if "loss" in row)


def test_training_says_so_where_nothing_was_collected_to_measure_by(configure, caplog):
    config = configure("run", "collect.num_tasks=7", "sft.eval_every=2", "sft.eval_tasks=6")
    do(config, "collect", "sft")
    assert not any("carried" in row for row in metrics(config))
    assert "sft: the held-out tasks have too few successes to measure what latents carry" in caplog.text


# Several processes


@pytest.fixture
def peers(monkeypatch):
    """Runs an action in several threads that the recipes take for processes; returns what became of each."""
    here = threading.local()
    real, lock = LanguageModel.from_pretrained, threading.Lock()

    def from_pretrained(*args):
        with lock:  # transformers changes settings of the whole process while it loads
            return real(*args)

    def run(size, action):
        def act(peer):
            here.peer = peer
            return action()

        with monkeypatch.context() as patch:
            patch.setattr(processes, "_SILENT_SECONDS", 0.0)
            patch.setattr(recipes.phase, "Processes", lambda: here.peer)
            patch.setattr(LanguageModel, "from_pretrained", from_pretrained)
            return together(size, act)

    return run


@pytest.mark.parametrize(("size", "num_tasks", "batch_size"), [(2, 5, 4), (2, 1, 4), (3, 8, 2)])
def test_several_processes_collect_the_very_bank_of_one(configure, peers, capfd, size, num_tasks, batch_size):
    options = (f"collect.num_tasks={num_tasks}", f"collect.batch_size={batch_size}")
    alone, shared = configure("alone", *options), configure("shared", *options)
    do(alone, "collect")
    told = capfd.readouterr()
    assert peers(size, lambda: do(shared, "collect")) == [None] * size
    assert_same(shared, alone)
    assert len(ExperienceBank(Path(shared.run) / "bank.sqlite")) == 2 * num_tasks
    now = capfd.readouterr()
    assert now.out == told.out.replace("alone", "shared")  # the first one speaks, once
    assert now.err.count("100%") == 1


def test_several_processes_collect_with_a_memory_that_sees_what_one_process_would_see(configure, peers):
    options = ("collect.memory=text", "collect.num_tasks=5", "collect.batch_size=4")
    alone, shared = configure("alone", *options), configure("shared", *options)
    do(alone, "collect")
    assert peers(2, lambda: do(shared, "collect")) == [None, None]
    assert metrics(shared) == metrics(alone)
    ours, theirs = ([json.loads(line) for line in exported(config).splitlines()] for config in (shared, alone))
    assert any(message["recalled"]["sources"] for row in theirs for message in row["steps"][0]["messages"])
    for row in theirs:
        for message in row["steps"][0]["messages"]:
            message["logps"] = pytest.approx(message["logps"], rel=1e-4, abs=1e-5)
    assert ours == theirs


@pytest.mark.slow
def test_collect_interrupted_in_several_processes_goes_on_in_any_number(configure, peers, monkeypatch):
    options = ("collect.num_tasks=5", "collect.batch_size=2")
    whole = configure("whole", *options)
    do(whole, "collect")
    reached = set()
    for number, sizes in ((9, (2, 1)), (13, (2, 3)), (16, (3, 2)), (21, (1, 2))):
        cut = configure(f"cut-{number}", *options)
        left = iter(range(number - 1, -1, -1))  # only the first process writes
        sync = os.fsync

        def fsync(handle, left=left, sync=sync):
            if not next(left, 1):
                raise Interrupted
            sync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            assert isinstance(peers(sizes[0], lambda config=cut: do(config, "collect"))[0], Interrupted)
        state = Path(cut.run) / "collect" / "state.json"
        reached.add(json.loads(state.read_text())["tasks"] if state.exists() else 0)
        assert peers(sizes[1], lambda config=cut: do(config, "collect")) == [None] * sizes[1]
        assert_same(cut, whole)
    assert reached <= {0, 1, 2, 3, 4}
    assert len(reached) > 2


@pytest.mark.parametrize("num_tasks", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_several_processes_evaluate_to_the_very_results_of_one(configure, peers, capfd, num_tasks):
    options = ("evaluate.memories=[none, text]", f"evaluate.num_tasks={num_tasks}")
    alone, shared = configure("alone", *options), configure("shared", *options)
    do(alone, "collect", "evaluate")
    do(shared, "collect")
    capfd.readouterr()
    assert peers(2, lambda: do(shared, "evaluate")) == [None, None]
    assert_same(shared, alone, "evaluate")
    told = capfd.readouterr()
    assert told.out.count("report: no report") == 1
    assert told.err.count("evaluate: 100%") == 1
    for name in ("none", "text"):
        ours, theirs = (Path(config.run) / "evaluate" / f"{name}.jsonl" for config in (shared, alone))
        assert ours.read_bytes() == theirs.read_bytes()


def test_quickstart_takes_several_processes_through_all_phases(configure, peers, monkeypatch, capsys):
    seen = []
    for name in ("collect", "train_sft", "train_lmpo", "compare"):
        monkeypatch.setattr(recipes.main_path, name, lambda config, parts, name=name: seen.append(name))
    assert peers(2, lambda: recipes.quickstart(configure("run"))) == [None, None]
    assert sorted(seen) == sorted(["collect", "train_sft", "train_lmpo", "compare"] * 2)
    assert capsys.readouterr().out.count("== ") == 4


def test_an_online_evaluation_by_several_processes_is_refused_before_anything_is_made(configure, peers):
    config = configure("run", "evaluate.online=true")
    first, second = peers(2, lambda: do(config, "evaluate"))
    assert isinstance(first, ConfigError)
    assert "evaluate.online is true" in str(first)
    assert isinstance(second, SystemExit)
    assert not Path(config.run).exists()


def test_a_launch_that_would_shard_otherwise_than_it_was_told_is_refused_before_anything_is_made(
    configure, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    config = configure("run")
    with pytest.raises(ConfigError, match="FSDP_VERSION=1"):
        do(config, "collect")
    assert not Path(config.run).exists()


def test_a_mistake_that_only_one_process_meets_ends_all_and_is_told_there(configure, peers, monkeypatch):
    from latentmem.environments.reasoning import ReasoningDomain

    config = configure("run")
    do(config, "collect")
    with open_run(config, "sft", recipes.Parts(config).domain):
        first, second = peers(2, lambda: do(config, "collect"))
    assert isinstance(first, RunError)  # only the first opens the run
    assert "is working in this run folder" in str(first)
    assert isinstance(second, SystemExit)

    start = ReasoningDomain.start

    def stumble(self, task):
        if task == self.tasks("train")[5]:  # of the second batch of four, which the second process plays
            raise DataError("the sixth task stumbles")
        return start(self, task)

    monkeypatch.setattr(ReasoningDomain, "start", stumble)
    other = configure("other", "collect.rollouts_per_task=1")
    first, second = peers(2, lambda: do(other, "collect"))
    assert isinstance(first, SystemExit)
    assert first.code == 2
    assert isinstance(second, DataError)


@pytest.mark.parametrize("phase", ["sft", "lmpo", "grpo"])
def test_only_the_first_process_opens_the_run_and_the_others_train_beside_it(
    configure, peers, monkeypatch, capfd, phase
):
    config = configure("run")
    do(config, "collect")
    seen, opened = [], []
    really = Run.open
    monkeypatch.setattr(Run, "open", lambda *args: opened.append(args) or really(*args))

    def train(self, folder, journal):
        journal.log({"step": 1, "loss": 0.0, "reward": 0.0})
        journal.rewind(1)
        seen.append((self.processes.rank, folder))

    trainer = SFTTrainer if phase == "sft" else LMPOTrainer
    monkeypatch.setattr(trainer, "train", train)
    capfd.readouterr()
    assert peers(2, lambda: do(config, phase)) == [None, None]
    assert sorted(seen) == [(rank, Path(config.run) / phase / "checkpoints") for rank in (0, 1)]
    assert len(opened) == 1
    assert len([row for row in metrics(config) if row["phase"] == phase]) == 1
    assert capfd.readouterr().out.count("\n") == 1


# Packaged benchmarks


@pytest.mark.parametrize(
    "name", ["bigcodebench", "gsm8k", "humaneval", "kodcode", "mbpp", "popqa", "strategyqa", "triviaqa"]
)
def test_a_packaged_benchmark_takes_real_rows_from_files(shared_dir, name):
    overrides = [f"data.{split}={{path: {shared_dir}/data/{name}/{split}.jsonl}}" for split in ("train", "test")]
    if name in ("bigcodebench", "humaneval", "kodcode", "mbpp"):
        overrides.append("data.sandbox.level=none")
    config = load_config(name, overrides)
    domain = DOMAINS[type(config.data)](config.data)
    for split in ("train", "test"):
        path = Path(shared_dir, "data", name, f"{split}.jsonl")
        assert len(domain.tasks(split)) == path.read_bytes().strip().count(b"\n") + 1
        assert domain.skipped(split) == {}
        outcome = domain.start(domain.tasks(split)[0]).step("I cannot tell.")
        assert (outcome.reward, outcome.done, outcome.info["extracted"] or "I cannot tell") == (
            0.0,
            True,
            "I cannot tell",
        )


# Hidden facts


FACTS = {"kind": "hidden_facts", "attributes": 2, "needs": {"scout": ("password",), "porter": ("emblem",)}}


@pytest.mark.parametrize("mixed", [False, True])
def test_a_role_that_is_judged_has_to_be_in_every_team_that_plays(mixed):
    def parts(*teams, **needs):
        facts = FACTS | ({"needs": needs} if needs else {})
        data = {"kind": "mix", "train": [{"data": facts}], "test": [{"data": facts}]} if mixed else facts
        return recipes.Parts(parse_config({"run": "r", "data": data, "team": teams[0], "train_teams": teams[1:]}))

    assert len(parts("pair").tasks["test"]) == 100
    for teams, needs, message in (
        (("pair",), {"scoot": ("password",)}, "data.needs: team pair has no role 'scoot'; did you mean 'scout'?"),
        (("solo",), {}, "data.needs: team solo has no role 'scout'; known: reader"),
        (("pair", "solo"), {}, "data.needs: team solo has no role 'scout'; known: reader"),
    ):
        with pytest.raises(ConfigError) as raised:
            parts(*teams, **needs)
        assert str(raised.value) == message


# Retrieval in two stages


def test_ratings_choose_what_every_memory_recalls_and_each_memory_keeps_its_own(configure):
    config = configure("run", "bank.rating=logits", "bank.rating_max_tokens=700", "collect.memory=text")
    do(config, "collect")
    parts = recipes.Parts(config)
    memories = [memory_of(parts, named(name)) for name in ("text", "latent:untrained")]
    raters = [memory.rate for memory in memories]
    assert raters[0] is not raters[1]
    assert {rater.max_prompt_tokens for rater in raters} == {700}
    role, num_moved = parts.team.roles[0], 0
    for asked in parts.tasks["test"]:
        candidates = [hit.trajectory for hit in parts.bank.search(asked, k=4)]
        assert len(candidates) == 4
        ratings = raters[0]([(asked, candidate) for candidate in candidates])
        best = [candidates[i].id for i in sorted(range(4), key=lambda i: -ratings[i])[:2]]
        assert [list(recall_one(memory, asked, role).record.sources) for memory in memories] == [best, best]
        num_moved += best != [candidate.id for candidate in candidates[:2]]
    assert num_moved, "the test is void where the nearest are rated best"


def test_nothing_is_rated_by_default(configure):
    config = configure("run")
    do(config, "collect")
    assert {memory_of(recipes.Parts(config), named(name)).rate for name in ("text", "latent:untrained")} == {None}


# Memories that learn

LEARN = ("rivals={batch_size: 6, max_response_tokens: 8, max_episode_characters: 80}", "bank.rating_max_tokens=700")
LEARNERS = ["voyager", "generative", "oagents", "gmemory"]


def test_memories_that_learn_do_so_before_they_are_compared_and_say_what_it_cost(configure, capsys):
    config = configure("run", *LEARN, f"evaluate.memories={json.dumps(['none', 'text', 'metagpt', *LEARNERS])}")
    do(config, "collect", "evaluate")
    rows = {row["name"]: row for row in results(config)["memories"]}
    ids = [json.loads(line) for line in exported(config).splitlines()]
    for name in LEARNERS:
        kept = notes(config, name)
        assert len(kept["learned"]) == len(ids) == 16
        assert rows[name]["learning"] == {"num_trajectories": 16, **kept["costs"]}
        assert rows[name]["learning"]["prompt_tokens"] > 400
        (first, *_) = (Path(config.run) / "evaluate" / f"{name}.jsonl").read_text().splitlines()
        recalled = json.loads(first)["steps"][0]["messages"][0]["recalled"]
        assert (recalled["kind"], recalled["num_latents"]) == (name, 0)
        assert recalled["text"]
    assert rows["generative"]["learning"]["generated_tokens"] == 0
    assert rows["none"]["learning"] is rows["text"]["learning"] is None
    spent = {name: (row["memory_prompt_tokens"] > 0, row["memory_generated_tokens"] > 0) for name, row in rows.items()}
    assert spent == {
        **dict.fromkeys(["none", "text", "metagpt", "voyager", "oagents"], (False, False)),
        "generative": (True, False),
        "gmemory": (True, bool(notes(config, "gmemory")["notes"]["insights"])),
    }
    out = capsys.readouterr().out
    assert "voyager: learned from 16 trajectories before; a language model read" in out
    # The same bank is not learned from, and no memory evaluated, a second time.
    files = [*Path(config.run, "memories").iterdir(), *Path(config.run, "evaluate").glob("*.jsonl")]
    before = {file: file.stat().st_mtime_ns for file in files}
    do(config, "evaluate")
    assert {file: file.stat().st_mtime_ns for file in files} == before
    capsys.readouterr()
    recipes.show_prompts(config, memory="generative")
    out = capsys.readouterr().out
    assert f"as learned in {config.run}/memories/generative.json\nTo recall it, language models read" in out
    assert "user\nHere is how the team handled similar tasks before:" in out


def test_metagpt_is_text_memory_that_is_not_rated(configure):
    config = configure("run", "bank.rating=logits", "bank.rating_max_tokens=700")
    do(config, "collect")
    for only in (True, False):
        parts = recipes.Parts(configure("run", "bank.rating=logits", f"bank.only_successes={only}"))
        memory = memory_of(parts, named("metagpt"))
        asked = parts.tasks["test"][0]
        nearest = [hit.trajectory.id for hit in parts.bank.search(asked, k=2, success=True if only else None)]
        assert list(recall_one(memory, asked, parts.team.roles[0]).record.sources) == nearest
        assert (memory.rate, memory_of(parts, named("text")).rate is None) == (None, False)
        parts.close()


@pytest.mark.slow
def test_learning_and_comparing_killed_at_some_writes_go_on_to_the_same_notes_and_results(configure, monkeypatch):
    options = (*LEARN, "evaluate.memories=[voyager, gmemory]")
    whole = configure("whole", *options)
    do(whole, "collect", "evaluate")
    half_learned = 0
    for number in (6, 8, 11, 15):
        cut = configure(f"cut-{number}", *options)
        do(cut, "collect")
        assert killed_at_sync(number, monkeypatch, lambda config=cut: do(config, "evaluate"))
        path = Path(cut.run) / "memories" / "voyager.json"
        half_learned += path.exists() and len(notes(cut, "voyager")["learned"]) < 16
        do(cut, "evaluate")
        assert_same(cut, whole, "evaluate")
        assert [notes(cut, name) for name in ("voyager", "gmemory")] == [
            notes(whole, name) for name in ("voyager", "gmemory")
        ]
    assert half_learned


@pytest.mark.slow
def test_collecting_with_a_memory_that_learns_is_the_same_in_pieces_and_shared(configure, monkeypatch, peers):
    options = (*LEARN, "collect.memory=voyager", "collect.num_tasks=4")
    whole = configure("whole", *options)
    do(whole, "collect")
    told = [json.loads(line)["steps"][0]["messages"][0]["recalled"]["text"] for line in exported(whole).splitlines()]
    assert any(told)
    for number in (9, 11, 12):
        cut = configure(f"cut-{number}", *options)
        assert killed_at_sync(number, monkeypatch, lambda config=cut: do(config, "collect"))
        do(cut, "collect")
        assert_same(cut, whole)
        assert notes(cut, "voyager") == notes(whole, "voyager")
    shared = configure("shared", *options)
    assert peers(2, lambda: do(shared, "collect")) == [None, None]
    assert metrics(shared) == metrics(whole)
    assert notes(shared, "voyager") == notes(whole, "voyager")


@pytest.mark.slow
def test_several_processes_compare_a_memory_that_only_the_first_lets_learn(configure, peers):
    options = (*LEARN, "evaluate.memories=[gmemory, oagents]")
    alone, shared = configure("alone", *options), configure("shared", *options)
    do(alone, "collect", "evaluate")
    do(shared, "collect")
    assert peers(2, lambda: do(shared, "evaluate")) == [None, None]
    assert_same(shared, alone, "evaluate")
    for name in ("gmemory", "oagents"):
        assert notes(shared, name) == notes(alone, name)


@pytest.mark.slow
def test_while_it_is_compared_online_a_memory_learns_into_a_copy_of_its_notes(configure):
    options = (*LEARN, "evaluate.memories=[oagents, gmemory]", "evaluate.online=true")
    config = configure("run", *options)
    do(config, "collect", "evaluate")
    played = set(results(config)["task_ids"])
    for name in ("oagents", "gmemory"):
        kept, copy = notes(config, name), notes(config, name, "evaluate")
        assert len(kept["learned"]) == 16
        assert copy["learned"][:16] == kept["learned"]
        bank = ExperienceBank(Path(config.run) / "evaluate" / f"{name}.sqlite")
        assert {t.task.key for t in bank.get(copy["learned"][16:])} == played
    row = results(config)["memories"][0]
    assert row["learning"]["num_trajectories"] == 20


# Mistakes that only a recipe can see


def test_a_phase_refuses_to_go_on_with_other_settings(configure):
    do(configure("run"), "collect")
    with pytest.raises(RunError, match=r"sampling\.temperature was 1\.0 when this phase was started and is 0\.5 now"):
        do(configure("run", "sampling.temperature=0.5"), "collect")


def test_mistakes_in_cheap_parts_are_told_before_a_model_is_loaded(configure, monkeypatch):
    monkeypatch.setattr(LanguageModel, "from_pretrained", lambda *_: pytest.fail("a model was loaded"))
    for override, message in [
        ("team=autogem", "no such team"),
        ("data.families.0.name=chain_som", "did you mean 'chain_sum'"),
        ("composer.template='{taks}'", "composer.template: unknown field {taks}; did you mean 'task'?"),
        ("bank.rating_template='{task}'", "bank.rating_template: the field {episode} is missing"),
        ("sft.demonstrations=domain", "sft.demonstrations is domain, but data of kind reasoning_gym demonstrates noth"),
    ]:
        with pytest.raises(ConfigError) as error:
            do(configure("run", override), "collect")
        assert message in str(error.value)


# Progress


def test_progress_in_a_log_file_is_few_whole_lines(capfd):
    with progress(1000, "collect", "task") as bar:
        for i in range(1000):
            bar.set_postfix(reward=i, refresh=False)
            bar.update(1)
    err = capfd.readouterr().err
    assert "\r" not in err
    lines = err.splitlines()
    assert len(lines) <= 3
    assert lines[-1].startswith("collect: 100%")
    assert "reward=999" in lines[-1]


@pytest.mark.parametrize(
    "data",
    [
        "{kind: reasoning_gym, families: [{name: chain_sum}], train_size: 2, test_size: 2",
        "{kind: qa, schema: popqa, train: {path: FOLDER/qa.jsonl, limit: 1}, test: {path: FOLDER/qa.jsonl, skip: 1}",
        "{kind: code, schema: mbpp, train: {path: FOLDER/code.jsonl, limit: 1}, "
        "test: {path: FOLDER/code.jsonl, skip: 1}, sandbox: {level: none}",
    ],
)
def test_every_kind_of_data_lets_its_instructions_be_replaced(configure, tmp_path, monkeypatch, data):
    monkeypatch.undo()  # the real environments
    for i in (1, 2):
        question = {"id": i, "question": f"Which {i}?", "possible_answers": '["red"]', "o_aliases": "[]"}
        program = {"task_id": i, "text": f"Add {i}.", "test_list": ["assert f(1) == 2"], "test_setup_code": ""}
        for name, row in (("qa", question), ("code", program)):
            with (tmp_path / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    told = []
    for changed in ("", ", instructions: Be brief."):
        section = configure("run", "data=" + data.replace("FOLDER", str(tmp_path)) + changed + "}").data
        domain = DOMAINS[type(section)](section)
        told.append(domain.start(domain.tasks("test")[0]).instructions)
    assert len(told[0]) > 50
    assert told[1] == "Be brief."


# Splits


@pytest.fixture
def four_splits(monkeypatch):
    """Reasoning tasks have an experience split and a dev split too."""
    tasks = ReasoningDomain.tasks

    def split(self, name):
        if name in ("train", "test"):
            return tasks(self, name)
        num = {"experience": 6, "dev": 5}[name]
        return [Task(id=f"{name}-{i}", domain=self.name, text=f"{name} {i}", data={}) for i in range(num)]

    monkeypatch.setattr(ReasoningDomain, "tasks", split)


def played(path):
    return [Trajectory.from_json(line).task for line in path.read_bytes().splitlines()]


def test_the_experience_split_is_played_into_the_bank_and_nothing_else_is(configure, four_splits, capsys):
    config = configure("run", "collect.num_tasks=4", "lmpo.eval_every=1", "lmpo.eval_tasks=2")
    do(config, "collect")
    bank = ExperienceBank(Path(config.run) / "bank.sqlite")
    assert {t.task.id for t in bank} == {f"experience-{i}" for i in range(4)}
    assert "episodes succeeded, on 4 experience tasks; " in capsys.readouterr().out
    parts = recipes.Parts(config)
    assert [task.id for task in parts.eval_tasks("lmpo", config.lmpo)] == ["dev-0", "dev-1"]
    assert len(parts.train_tasks) == 12  # none was set aside
    assert [
        task.id for task in parts.held_out_tasks(config.sft.model_copy(update={"eval_every": 1, "eval_tasks": 1}))
    ] == [parts.train_tasks[-1].id]
    with pytest.raises(
        ConfigError, match=r"bank.experience_tasks is 2, but these data have .* of 6 tasks; set it to 0"
    ):
        recipes.Parts(configure("run", "bank.experience_tasks=2"))


def test_the_first_train_tasks_become_experience_where_the_data_have_none(configure):
    train = recipes.Parts(configure("run")).train_tasks
    config = configure(
        "run", "bank.experience_tasks=5", "collect.num_tasks=null", "lmpo.eval_every=1", "lmpo.eval_tasks=3"
    )
    parts = recipes.Parts(config)
    assert parts.collected_tasks == train[:5]
    assert parts.train_tasks == train[5:]
    assert parts.eval_tasks("lmpo", config.lmpo) == train[-3:]
    with pytest.raises(ConfigError, match=r"experience_tasks is 12, but the train split has 12 tasks; set it lower"):
        recipes.Parts(configure("run", "bank.experience_tasks=12"))
    with pytest.raises(ConfigError, match=r"lmpo.eval_tasks is 7, but the train split has 7 tasks"):
        recipes.Parts(config).eval_tasks("lmpo", config.lmpo.model_copy(update={"eval_tasks": 7}))


def test_a_dev_evaluation_and_one_of_test_stand_side_by_side(configure, caplog, capsys):
    options = ("evaluate.memories=[none]", "lmpo.eval_tasks=3")
    test, dev = configure("run", *options), configure("run", *options, "evaluate.split=dev")
    train = recipes.Parts(test).train_tasks
    do(test, "evaluate")
    do(dev, "evaluate")
    run = Path(test.run)
    assert played(run / "evaluate-dev" / "none.jsonl") == train[-3:]
    assert "the last 3 train tasks are taken, which lmpo trains on too unless lmpo.eval_every is set" in caplog.text
    assert f"dev split, for choices: {run / 'results-dev.json'}" in capsys.readouterr().out
    found = {name: json.loads((run / name).read_text()) for name in ("results.json", "results-dev.json")}
    assert [(r["split"], r["num_tasks"]) for r in found.values()] == [("test", 4), ("dev", 3)]
    before = (run / "results.json").read_bytes()
    do(test, "evaluate")
    assert (run / "results.json").read_bytes() == before
    do(configure("run", *options, "evaluate.split=dev"), "evaluate")
    with pytest.raises(RunError, match=r"evaluate-dev/config.yaml: evaluate.batch_size was 2"):
        do(configure("run", *options, "evaluate.split=dev", "evaluate.batch_size=3"), "evaluate")


def test_a_dev_split_of_the_data_is_what_dev_means(configure, four_splits, caplog):
    config = configure("run", "evaluate.memories=[none]", "evaluate.split=dev", "evaluate.num_tasks=3")
    do(config, "evaluate")
    assert [task.id for task in played(Path(config.run) / "evaluate-dev" / "none.jsonl")] == ["dev-0", "dev-1", "dev-2"]
    assert "lmpo trains on" not in caplog.text


def test_prompts_of_every_split_are_shown_and_an_empty_one_is_one_line(configure, four_splits, capsys):
    config = configure("run")
    recipes.show_prompts(config, "experience", 2)
    recipes.show_prompts(config, "dev", 1)
    out = capsys.readouterr().out
    assert "task 2 of 6 in the experience split" in out
    assert "task 1 of 5 in the dev split" in out


def test_prompts_of_a_split_that_the_data_lack_are_refused(configure):
    with pytest.raises(
        ConfigError, match=r"the dev split is asked for, but these data have none; they have train, test"
    ):
        recipes.show_prompts(configure("run"), "dev")


def test_a_run_that_was_started_before_a_key_was_known_goes_on(configure, capsys):
    config = configure("run")
    do(config, "collect")
    start = Path(config.run) / "collect" / "config.yaml"
    then = yaml.safe_load(start.read_text())
    del then["bank"]["experience_tasks"], then["memory"], then["data"]["families"][0]["weight"]
    start.write_text(yaml.safe_dump(then))
    do(config, "collect")
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"bank.experience_tasks was 0 when this phase was started and is 2 now"):
        do(configure("run", "bank.experience_tasks=2"), "collect")


# Feedback


def failures(config, num_failures, num_successes, observation):
    parts = recipes.Parts(config)

    def episode(i, success):
        step = Step(messages=(), action="a", observation=observation)
        task = Task(id=str(i), domain="d", text=f"text {i}")
        return Trajectory(task=task, team="t", model="m", steps=(step,), reward=float(success), success=success, seed=0)

    parts.bank.add([episode(i, i < num_successes) for i in range(num_failures + num_successes)])
    return parts


@pytest.mark.parametrize(
    ("num_failures", "num_successes", "observation", "only_successes", "expected"),
    [
        (3, 2, "No. It is corn.", "true", "3 of 5 stored episodes are failures and never recalled"),
        (3, 0, "", "true", "all 3 stored episodes are failures, so nothing is ever recalled"),
        (3, 2, "", "true", None),
        (2, 3, "No. It is corn.", "true", None),
        (3, 2, "No. It is corn.", "false", None),
        (0, 0, "", "true", None),
    ],
)
def test_failures_with_feedback_that_are_never_recalled_are_told_once(
    configure, caplog, num_failures, num_successes, observation, only_successes, expected
):
    config = configure("run", f"bank.only_successes={only_successes}")
    parts = failures(config, num_failures, num_successes, observation)
    for name in ("none", "text", "latent:untrained", "metagpt"):
        memory_of(parts, named(name))
    told = [record.getMessage() for record in caplog.records if "stored episodes are failures" in record.getMessage()]
    assert len(told) == (expected is not None)
    assert all(expected in line and "set bank.only_successes to false" in line for line in told)


def test_experience_is_recalled_and_not_trained_on(configure):
    config = configure("run", "bank.experience_tasks=4", "collect.num_tasks=null")
    do(config, "collect")
    with pytest.raises(TrainingError, match=r"only episodes of experience tasks, .* set sft.demonstrations"):
        do(config, "sft")


# A model that is read the plain way


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma2", "mamba", "qwen3_next", "gpt_oss"])
def test_a_model_on_the_plain_path_goes_through_all_phases(configure, tiny_model_dir, tmp_path, kind):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tiny(kind, len(tokenizer)).save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    target = "in_proj" if kind == "mamba" else "q_proj"
    words = [f"model.name={tmp_path / kind}", f"composer.target_modules=[{target}]", f"grpo.target_modules=[{target}]"]
    path = written(tmp_path, *said(configure("whole"), (0, 3, 9)))
    config = configure(
        kind, *words, f"sft.demonstrations={path}", "sampling.temperature=9"
    )  # or it says one token only
    do(config, "collect", "sft", "lmpo", "grpo", "evaluate")
    rows = metrics(config)
    assert {row["phase"] for row in rows} == {"collect", "sft", "lmpo", "grpo"}
    ratios = [row["first_ratio_max"] for row in rows if "first_ratio_max" in row]
    assert len(ratios) >= 2
    assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-4)
    assert len(results(config)["memories"]) == len(config.evaluate.memories)
