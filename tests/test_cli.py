"""The command line as people meet it: a mistake is one line on standard error and status 2; the rest is readable."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from latentmem import cli
from latentmem.bank import ExperienceBank
from latentmem.cli import experiment, program
from latentmem.config import InsightsSection, MemorySection, load_config
from latentmem.memory.composer import Composer
from latentmem.memory.parametric import ParametricMemory
from latentmem.models import language_model, reader
from latentmem.models.language_model import LanguageModel
from latentmem.trajectory import Message, Recalled, Step, Task, Trajectory

pytestmark = pytest.mark.usefixtures("no_embedding_model")

CONFIG = """
run: {folder}/run
model: {{name: {model}, device: cpu, dtype: float32}}
data:
  kind: qa
  schema: popqa
  train: {{path: {folder}/train.jsonl}}
  test: {{path: {folder}/test.jsonl}}
composer: {{num_latents: 3, rank: 2, max_prompt_tokens: 500, template: '{{task}} {{memory}} {{role_messages}}'}}
bank: {{num_retrieved: 2, only_successes: false}}
sampling: {{temperature: 1.0, max_response_tokens: 4}}
lmpo: {{num_steps: 2, tasks_per_step: 2, group_size: 2, initial: untrained}}
evaluate: {{num_bootstraps: 50, memories: [none]}}
"""


def row(number, question=None):
    question = question or f"Which colour has door {number}?"
    return {"id": number, "question": question, "possible_answers": '["red"]', "o_aliases": "[]"}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def folder(tmp_path, tiny_model_dir):
    write_rows(tmp_path / "train.jsonl", [row(i) for i in range(6)])
    write_rows(tmp_path / "test.jsonl", [row(i) for i in range(10, 12)])
    (tmp_path / "c.yaml").write_text(CONFIG.format(folder=tmp_path, model=tiny_model_dir))
    return tmp_path


@pytest.fixture
def fails(capsys):
    """Run a command that must fail as a user's mistake; its one line."""

    def fails(*words):
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latentmem: ")]
        (line,) = lines
        return line.removeprefix("latentmem: ")

    return fails


@pytest.fixture
def prints(capsys):
    """Run a command that must succeed; what it wrote to standard output."""

    def prints(*words):
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return prints


# Mistakes


def test_mistakes_in_the_configuration(fails, folder):
    c = folder / "c.yaml"
    assert fails("collect", c, "lmpo.group_sise=4") == f"{c}: unknown key 'lmpo.group_sise'; did you mean 'group_size'?"
    assert fails("train", "lmpo", c, "lmpo.group_size=1").endswith("set it to 4 or more")
    assert fails("collect", c, "seed=x") == f"{c}: seed is 'x' (str); input should be a valid integer"
    assert fails("collect", c, "seed") == "'seed' is not an override; write key=value, as in lmpo.group_size=8"
    assert fails("collect", "quickstrat").endswith("did you mean 'quickstart'?")
    assert (
        fails("quickstart", "sft.num_stepz=1") == "quickstart: unknown key 'sft.num_stepz'; did you mean 'num_steps'?"
    )
    assert fails("quickstart", "--short", "rum=x").startswith("quickstart-short: unknown key 'rum'")
    assert "names 'txt', which is not a memory; did you mean 'text'?" in fails("evaluate", c, "evaluate.memories=[txt]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1, "question"\n', "train.jsonl:1: not valid JSON"),
        (json.dumps(row(1)) + "\n[1]\n", "train.jsonl:2: expected a JSON object, found a list"),
        (json.dumps({"id": 1, "quesion": "?"}) + "\n", "train.jsonl:1: no field"),
        (json.dumps(row(1) | {"question": " "}) + "\n", "train.jsonl:1: field 'question' is blank; expected text"),
        (json.dumps(row(1)) + "\n" + json.dumps(row(1, "Other?")) + "\n", "train.jsonl:2: id '1' is used already at"),
        (json.dumps(row(1, "x" * 1_000_000)) + "\n", "train.jsonl:1: field 'question' has 1,000,000 characters"),
        ("", "train.jsonl: expected at least one row, found none"),
    ],
)
def test_mistakes_in_the_data_name_file_and_line(fails, folder, content, message):
    (folder / "train.jsonl").write_text(content)
    assert fails("collect", folder / "c.yaml").startswith(f"{folder}/{message}")


def test_bad_rows_are_skipped_where_the_configuration_says_so_and_counted_where_people_look(folder, prints, caplog):
    with (folder / "train.jsonl").open("a") as file:
        file.write("{\n" + json.dumps(row(7) | {"question": None}) + "\n" + json.dumps(row(0)) + "\n{\n")
    with caplog.at_level("WARNING"):
        prints("collect", folder / "c.yaml", "data.train.on_bad_row=skip")
    (warning,) = [message for message in caplog.messages if "skipped" in message]
    assert warning.startswith(
        f"{folder}/train.jsonl: 4 of 10 rows skipped: 2 not JSON (first: {folder}/train.jsonl:7: "
    )
    for line, reason in ((8, "null"), (9, "duplicate id")):
        assert f"1 {reason} (first: {folder}/train.jsonl:{line}: " in warning
    skipped = json.loads((folder / "run" / "run.json").read_text())["skipped_rows"]
    assert skipped == {"train": {"not JSON": 2, "null": 1, "duplicate id": 1}, "test": {}}
    with ExperienceBank(folder / "run" / "bank.sqlite") as bank:
        assert len(bank) == 6


def test_mistakes_in_names(fails, folder):
    c = folder / "c.yaml"
    assert fails("collect", c, "team=camle") == "team 'camle': no such team, and no such file; did you mean 'camel'?"
    assert "no such file or folder; did you mean 'train.jsonl'?" in fails("collect", c, "data.train.path="
                                                                         f"{folder}/trian.jsonl")  # fmt: skip
    assert "not a hub id" in fails("collect", c, "model.name=./nowhere", f"run={folder}/a")
    assert fails("collect", c, "model.name=no-such/model", f"run={folder}/b").startswith("model 'no-such/model' cannot")
    data = "data={kind: reasoning_gym, families: [{name: chain_som}]}"
    assert fails("collect", c, data).endswith("'chain_som' is not a reasoning-gym family; did you mean 'chain_sum'?")


@pytest.mark.parametrize("device", ["quantum", "cuda:77", "meta:x"])
def test_a_device_that_is_not_there(fails, folder, device):
    assert device in fails("collect", folder / "c.yaml", f"model.device={device}")


def test_checkpoints_that_are_missing_or_do_not_fit(fails, folder, tiny_model_dir, other_model_dir):
    c, template = folder / "c.yaml", "{task} {memory} {role_messages}"
    for name, base, num_latents in (("k", tiny_model_dir, 5), ("w", other_model_dir, 3)):
        model = LanguageModel.from_pretrained(str(base), "cpu", "float32")
        composer = Composer(model, num_latents=num_latents, rank=2, max_prompt_tokens=500, template=template)
        composer.save_pretrained(folder / name)
    assert fails("evaluate", c, "evaluate.memories=[none, 'latent:sft']").endswith(
        f"{folder}/run: no checkpoint of sft here; run `latentmem train sft` with this configuration first"
    )
    assert "no composer here" in fails("evaluate", c, f"evaluate.memories=['latent:{folder}/x']", f"run={folder}/2")
    no_folder = (
        "no composer here, there is no such folder; name one that holds a composer, or untrained, or a training of "
        "this run;"
    )
    assert fails("evaluate", c, "evaluate.memories=['latent:lmop']", f"run={folder}/6").endswith(
        f"lmop: {no_folder} did you mean 'lmpo'?"
    )
    assert fails("evaluate", c, "evaluate.memories=['latent:nosuch']", f"run={folder}/7").endswith(
        f"nosuch: {no_folder} known: lmpo, sft, untrained, warmup"
    )
    line = fails("evaluate", c, f"evaluate.memories=['latent:{folder}/k']", f"run={folder}/3")
    assert "num_latents" in line
    assert "5" in line
    line = fails("evaluate", c, f"evaluate.memories=['latent:{folder}/w']", f"run={folder}/4")
    assert "48" in line
    assert "32" in line
    assert "no checkpoint of sft here" in fails("train", "lmpo", c, "lmpo.initial=sft", f"run={folder}/5")
    assert not list(folder.rglob("*.costs"))  # nothing was played before these were told


def test_banks_that_cannot_be_used(fails, folder):
    c = folder / "c.yaml"
    assert "is empty; run `latentmem collect`" in fails("train", "sft", c)
    assert cli.main(["collect", str(c), "collect.num_tasks=1"]) == 0
    bank = folder / "run" / "bank.sqlite"
    shutil.copy(bank, folder / "new.sqlite")
    with sqlite3.connect(folder / "new.sqlite") as db:
        db.execute("UPDATE meta SET value = 99 WHERE key = 'schema_version'")
    db.close()
    assert "99" in fails("evaluate", c, f"bank.path={folder}/new.sqlite", "evaluate.memories=[text]")
    assert "99" in fails("bank", "info", folder / "new.sqlite")
    other = "bank.embedder=other-embedder"
    assert "its vectors were made by embedder 'all-minilm-l6-v2'" in fails(
        "evaluate", c, other, f"bank.path={bank}", f"run={folder}/2", "evaluate.memories=[text]"
    )
    (folder / "text.sqlite").write_text("this is no database, whatever its name says")
    assert str(folder / "text.sqlite") in fails("bank", "verify", folder / "text.sqlite")
    assert fails("bank", "info", folder / "none.sqlite").endswith("no such bank; give the bank.sqlite of a run")
    assert fails("bank", "import", folder / "b.sqlite", folder / "none.jsonl").startswith(
        f"{folder}/none.jsonl: no such file"
    )
    assert not (folder / "b.sqlite").exists()
    assert "needs a filter" in fails("bank", "delete", bank)


def test_settings_under_which_lmpo_cannot_learn(fails, folder):
    c = folder / "c.yaml"
    assert fails("train", "lmpo", c, "sampling.temperature=0").startswith("sampling.temperature is 0; greedy rollouts")
    assert fails("train", "lmpo", c, "lmpo.eval_every=1", "lmpo.eval_tasks=6", f"run={folder}/2") == (
        "lmpo.eval_tasks is 6, but the train split has 6 tasks; set it lower, so that some are left to train on"
    )
    assert fails("train", "sft", c, "sft.eval_every=1", "sft.eval_tasks=9").startswith("sft.eval_tasks is 9")


def test_a_task_longer_than_the_window_is_named(fails, folder):
    write_rows(folder / "train.jsonl", [row(1), row(2, "word " * 3000)])
    line = fails("collect", folder / "c.yaml")
    assert line.startswith("the prompt of 'assistant' (task popqa:2, assistant) needs ")
    assert "2048" in line


def test_run_folders_that_cannot_be_used(fails, folder, monkeypatch):
    c = folder / "c.yaml"
    assert cli.main(["collect", str(c), "collect.num_tasks=1"]) == 0
    line = fails("collect", c, "collect.num_tasks=2")
    assert line.startswith(f"{folder}/run/collect/config.yaml: collect.num_tasks was 1 when this phase was started")
    (folder / "file").touch()
    assert fails("collect", c, f"run={folder}/file/run").startswith(
        f"{folder}/file/run: the run's folder cannot be made"
    )
    assert fails("report", folder / "elsewhere").startswith(f"{folder}/elsewhere: no run folder")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["collect"],
        ["train", "ppo", "c"],
        ["report"],
        ["bank", "search", "b", "x", "-k", "0"],
        ["fly"],
        ["show", "prompts", "c", "--task", "0"],
    ],
)
def test_words_that_are_no_command_end_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_message_of_several_lines_becomes_one(monkeypatch, capsys):
    from latentmem.errors import DataError

    def fail(options):
        raise DataError("first\nsecond")

    monkeypatch.setattr(experiment, "_report", fail)
    assert cli.main(["report", "x"]) == 2
    assert capsys.readouterr().err == "latentmem: first second\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(experiment, "_report", int)  # it fails in no code of the user's own
    with pytest.raises(TypeError):
        cli.main(["report", "x"])


def test_a_fault_in_code_of_ones_own_is_one_line_that_says_where(monkeypatch, capsys):
    def fail(options):
        raise ZeroDivisionError("of\ntwo lines")

    monkeypatch.setattr(experiment, "_report", fail)
    line = fail.__code__.co_firstlineno + 1
    assert cli.main(["report", "x"]) == 2
    assert capsys.readouterr().err == f"latentmem: {__file__}:{line}, in fail: ZeroDivisionError: of two lines\n"


def test_a_memory_of_ones_own_that_fails_is_told_before_anything_is_played(folder, monkeypatch, capsys):
    (folder / "forgetful_memory.py").write_text(
        "class Forgetful:\n    kind = 'forgetful'\n"
        "    def recall_many(self, queries):\n        return self.notes\n    def add(self, trajectories): ...\n"
    )
    monkeypatch.chdir(folder)
    c = str(folder / "c.yaml")
    assert cli.main(["collect", c]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", c, "evaluate.memories=[none, forgetful_memory:Forgetful]"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"latentmem: {folder}/forgetful_memory.py:4, in recall_many: AttributeError: ")
    assert not list((folder / "run" / "evaluate").glob("*.jsonl"))
    assert cli.main(["evaluate", c, "evaluate.memories=[none, forgetful_memry:Forgetful]"]) == 2
    assert capsys.readouterr().err.endswith("; did you mean 'forgetful_memory'?\n")


def test_interrupting_a_command_says_that_it_goes_on(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "_report", interrupt)
    assert cli.main(["report", "x"]) == 130
    assert capsys.readouterr().err == "latentmem: interrupted; the same command goes on from here\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["collect", "quickstat"], "did you mean 'quickstart'?"),
        (["quickstart", "lmpo.group_size=1"], "set it to 4 or more"),
        (["bank", "info", "nothing.sqlite"], "no such bank"),
    ],
)
def test_a_real_process_ends_with_one_line_and_status_2(words, line, tmp_path):
    command = [Path(sys.executable).with_name("latentmem"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("latentmem: ")
    assert line in done.stderr
    assert not list(tmp_path.iterdir())


# What works


def test_a_model_without_a_chat_template_works_and_the_log_says_what_is_used(folder, tiny_model_dir, caplog):
    shutil.copytree(tiny_model_dir, folder / "plain")
    (folder / "plain" / "chat_template.jinja").unlink()
    assert cli.main(["collect", str(folder / "c.yaml"), f"model.name={folder}/plain"]) == 0
    assert "has no chat template; prompts are written as" in caplog.text
    assert len(ExperienceBank(folder / "run" / "bank.sqlite")) == 6


def test_paths_of_the_configuration_are_relative_to_the_working_directory(folder, monkeypatch, tmp_path_factory):
    text = (folder / "c.yaml").read_text().replace(f"{folder}/", "")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "c.yaml").write_text(text)
    monkeypatch.chdir(folder)
    assert cli.main(["collect", str(elsewhere / "c.yaml"), "collect.num_tasks=1"]) == 0
    assert (folder / "run" / "bank.sqlite").exists()
    assert [path.name for path in elsewhere.iterdir()] == ["c.yaml"]


@pytest.fixture
def bank(tmp_path, fake_embed):
    """Three trajectories in a bank of another embedder."""

    def trajectory(number, text, reward):
        message = Message(
            role="solver", system="s", user="u", response=f"r{number}", token_ids=(1,), logps=(0.0,), finish="stop",
            temperature=1.0, num_prompt_tokens=2, recalled=Recalled(kind="none"),
        )  # fmt: skip
        return Trajectory(
            task=Task(id=str(number), domain="toy", text=text), team="duo", model="m", reward=reward,
            steps=(Step(messages=(message,), action="a", observation=""),), success=reward == 1, seed=0,
        )  # fmt: skip

    path = tmp_path / "bank.sqlite"
    with ExperienceBank(path, fake_embed, embedder="of-the-bank") as bank:
        bank.add([trajectory(1, "red door", 1.0), trajectory(2, "blue window", 0.0), trajectory(3, "red roof", 0.5)])
    return path


def test_bank_info_is_readable(prints, bank):
    lines = prints("bank", "info", bank).splitlines()
    assert lines[0] == f"{bank}: 3 trajectories, 1 successes, mean reward 0.500"
    assert lines[1].startswith("created 20")
    assert lines[2:] == ["embedder of-the-bank, width 16", "domains: toy 3", "teams: duo 3", "models: m 3",
                         "roles: solver 3"]  # fmt: skip


def test_bank_search_uses_the_embedder_that_filled_the_bank(prints, bank):
    out = prints("bank", "search", bank, "a red door indeed", "-k", "2").splitlines()
    assert out[0].endswith("reward 1  red door")
    assert len(out) == 2
    assert prints("bank", "search", bank, "red", "--success", "no", "--role", "solver").count("\n") == 2


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["red", "--domain", "elsewhere"], "no trajectory has the domain 'elsewhere'; known: toy"),
        (["red", "--role", "slover"], "no trajectory has the role 'slover'; did you mean 'solver'?"),
        (["red", "--role", "x"], "no trajectory has the role 'x'; known: solver"),
        (["red", "--tenant", "acme"], "no trajectory is there to be found"),
        (
            ["red door", "--success", "yes"],
            "none of 3 trajectories fits; those whose task is this very text are never found",
        ),
    ],
)
def test_a_bank_search_that_finds_nothing_says_so(capsys, bank, words, why):
    capsys.readouterr()
    assert cli.main(["bank", "search", str(bank), *words]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"{bank}: {why}\n")


def test_bank_export_import_verify_and_delete(prints, fails, bank, tmp_path):
    copy, file = tmp_path / "copy.sqlite", tmp_path / "out.jsonl"
    assert prints("bank", "export", bank, file) == f"3 trajectories written to {file}\n"
    assert prints("bank", "import", copy, file) == "3 trajectories added, 0 were there already\n"
    assert prints("bank", "import", copy, file) == "0 trajectories added, 3 were there already\n"
    assert ExperienceBank(copy).info().embedder == "all-minilm-l6-v2"
    assert prints("bank", "verify", bank) == "3 trajectories checked, 0 problems\n"
    assert prints("bank", "delete", copy, "--success", "no") == "2 trajectories deleted\n"
    with sqlite3.connect(bank) as db:
        db.execute("UPDATE trajectories SET reward = 0.7 WHERE task_id = '3'")
    db.close()
    assert fails("bank", "verify", bank) == f"{bank}: 1 problems; restore it from an export or a copy"


def test_bank_export_can_go_to_standard_output(bank, tmp_path):
    command = [Path(sys.executable).with_name("latentmem"), "bank", "export", str(bank), "-"]
    done = subprocess.run(command, capture_output=True, timeout=300, check=True)
    ExperienceBank(bank).export(tmp_path / "out.jsonl")
    assert done.stdout == (tmp_path / "out.jsonl").read_bytes()


def test_a_closed_pipe_is_no_error(bank):
    exporting = [str(Path(sys.executable).with_name("latentmem")), "bank", "export", str(bank), "-"]
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(exporting)} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(("log", "said"), [("", "latentmem: No space left on device; free some and run"), ("2>&1", "")])
def test_output_to_a_full_disk_is_one_line_and_status_2_also_if_the_line_finds_no_room(bank, log, said):
    """Whatever else meets a full disk, unforeseen, ends alike."""
    showing = [str(Path(sys.executable).with_name("latentmem")), "bank", "info", str(bank)]
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(showing)} > /dev/full {log}"], capture_output=True, text=True, timeout=300,
        check=False, env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)


def test_checkpoint_info_shows_settings_and_size(prints, fails, folder, tiny_model_dir):
    model = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu", "float32")
    Composer(model, num_latents=3, rank=2).save_pretrained(folder / "composer")
    out = prints("checkpoint", "info", folder / "composer")
    assert "kind               'composer'" in out
    assert "num_latents        3" in out
    # Queries 3 x 32, projection 32 x 32 + 32, LoRA on q (32 -> 32) and v (32 -> 16) of 2 layers at rank 2.
    assert f"{96 + 1056 + 2 * (2 * 64 + 2 * 48):,} parameters" in out
    assert "no composer here" in fails("checkpoint", "info", folder / "nowhere")
    ParametricMemory(model, rank=2).save_pretrained(folder / "agents")
    out = prints("checkpoint", "info", folder / "agents")
    assert "kind               'LoRA of agents'" in out
    assert f"8 tensors, {2 * (2 * 64 + 2 * 48):,} parameters" in out


PROMPT = re.compile(r"^==== turn 1, message \d+, [\w ]+: the prompt, (\d+) tokens.*?\n(.*?)\n(?=====)", re.M | re.S)


@pytest.fixture
def given(monkeypatch):
    """The token ids that the model really reads."""
    given = []
    real, real_choice = reader.prefill, language_model.choose_reader

    def prefill(model, prompts, *args, **kwargs):
        given.extend(list(ids) for ids in prompts)
        return real(model, prompts, *args, **kwargs)

    def choose_reader(*args):  # what the self-test reads does not count
        chosen = real_choice(*args)
        given.clear()
        return chosen

    monkeypatch.setattr(reader, "prefill", prefill)
    monkeypatch.setattr(language_model, "choose_reader", choose_reader)
    return given


@pytest.mark.parametrize(
    ("team", "memory"),
    [("autogen", "none"), ("autogen", "text"), ("autogen", "latent:untrained"), ("dylan", "latent:untrained")],
)
def test_show_prompts_prints_what_the_model_reads_token_for_token(prints, folder, tiny_model_dir, given, team, memory):
    c, team = folder / "c.yaml", f"team={team}"
    tokenizer = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu").tokenizer
    prints("collect", c, team)
    given.clear()
    out = prints("show", "prompts", c, team, "--memory", memory)
    shown = [(tokenizer(text, add_special_tokens=False)["input_ids"], int(n)) for n, text in PROMPT.findall(out)]
    assert sorted(ids for ids, _ in shown) == sorted(given)
    assert len(shown) == out.count(": the response, ") > 1
    assert all(len(ids) == n for ids, n in shown)
    assert ("user\nHere is how the team handled" in out) == (memory == "text")
    assert out.count("here stand 3 latents; the composer read these") == (len(shown) if "latent" in memory else 0)
    assert f"memory {memory}" + (f", of 6 trajectories in {folder}/run/bank.sqlite" if memory != "none" else "") in out


def test_show_prompts_needs_no_bank_and_writes_nothing(prints, folder):
    out = prints("show", "prompts", folder / "c.yaml", "--task", "2", "--split", "test")
    assert out.startswith("task 2 of 2 in the test split: popqa:11\nmemory none\n")
    assert "<|im_start|>user\nWhich colour has door 11?<|im_end|>\n<|im_start|>assistant\n\n====" in out
    assert "==== turn 1, the team's action\n" in out
    assert not (folder / "run").exists()


def test_show_prompts_shows_the_composers_text_and_in_it_never_the_task_itself(prints, folder):
    prints("collect", folder / "c.yaml")
    out = prints("show", "prompts", folder / "c.yaml", "--task", "3")
    assert out.splitlines()[1].startswith("memory latent:untrained, of 6 trajectories in ")
    read = r"here stand 3 latents; the composer read these \d+ tokens, of 2 retrieved trajectories\n(.*?)\n===="
    (text, _) = re.findall(read, out, re.S)
    assert text.startswith("Which colour has door 2? [1] Task: Which colour has door ")
    assert text.count("door 2?") == 1
    assert out.endswith("==== composer.template\n{task} {memory} {role_messages}\n")
    keys = out.partition("==== the keys of memory\n")[2].partition("====")[0]
    assert yaml.safe_load(keys) == {"memory": MemorySection().model_dump()}


def test_show_prompts_shows_a_memory_that_learns_with_its_notes_and_keeps_no_new_ones(prints, folder):
    c, small = folder / "c.yaml", ("rivals.max_response_tokens=8", "rivals.max_episode_characters=80")
    prints("collect", c)
    notes = folder / "run" / "memories" / "oagents.json"
    out = prints("show", "prompts", c, *small, "rivals.insights.told='Know: {insights}'", "--memory", "oagents")
    assert f"; 6 of them, which {notes} lacks, were learned for this page and not kept\n" in out
    assert not notes.exists()
    origins = [re.split("  +", line) for line in out.partition("==== where these words come from\n")[2].splitlines()]
    assert ["what oagents asks and tells", "rivals.insights", "set in the configuration"] in origins
    keys = yaml.safe_load(out.partition("==== the keys of rivals\n")[2])
    assert keys == {"rivals": {"insights": InsightsSection(told="Know: {insights}").model_dump()}}

    prints("evaluate", c, *small, "evaluate.memories=[gmemory]", "evaluate.num_bootstraps=10")
    out = prints("show", "prompts", c, *small, "--memory", "gmemory")
    assert f" trajectories in {folder}/run/bank.sqlite, as learned in {folder}/run/memories/gmemory.json\n" in out
    assert list(yaml.safe_load(out.partition("==== the keys of rivals\n")[2])["rivals"]) == ["gmemory", "insights"]


def test_show_prompts_shows_what_was_replaced_and_where(prints, folder, tmp_path):
    c = folder / "c.yaml"
    (tmp_path / "t.yaml").write_text(
        "name: t\nagents: [{role: a, profile: p, system: '{instructions}', user: '{task}{messages}'}, "
        "{role: b, profile: p, system: S, user: '{messages}', reads: [a]}]\nanswer: b\nmessage: '<<{response}>>'\n"
    )
    prints("collect", c)
    out = prints("show", "prompts", c, f"team={tmp_path}/t.yaml", "data.instructions=In one word, please.",
                 "memory.text='Once: {memory} -- now:'", "memory.task='({task})'", "--memory", "text")  # fmt: skip
    assert "<|im_start|>system\nIn one word, please.<|im_end|>\n" in out
    assert "<|im_start|>user\nOnce: (Which colour" in out
    assert "-- now:\n\nWhich colour has door 0?<|im_end|>" in out
    assert re.search(r"message 2, b: the prompt, \d+ tokens, quoting message 1\n", out)
    assert "-- now:\n\n<<" in out
    origins = [re.split("  +", line) for line in out.partition("==== where these words come from\n")[2].splitlines()]
    assert origins[1:] == [
        ["the team's prompts", "team", f"{tmp_path}/t.yaml"],
        ["how to answer", "data.instructions", "set in the configuration"],
        ["form of the chat", "model.name", f"the tokenizer of {load_config(str(c)).model.name}"],
        ["words of the memory", "memory", "set in the configuration: memory.text, memory.task"],
    ]


def test_a_team_that_shows_nobody_how_to_answer_or_what_was_replied_is_told(prints, folder, caplog):
    c = folder / "c.yaml"
    out = prints("show", "prompts", c, "team=solo", "max_turns=2", "--memory", "none")
    origins = [re.split("  +", line) for line in out.partition("==== where these words come from\n")[2].splitlines()]
    untold = "not shown: no prompt of team solo has {instructions}"
    assert ["how to answer", "data.instructions", untold] in origins
    assert [record.getMessage() for record in caplog.records if "shows" in record.getMessage()] == [
        "team solo shows {instructions} to none of its agents: nobody is told how an answer has to look",
        "team solo shows {history} to none of its agents: with max_turns 2, nobody is told what was replied in the "
        "turns before",
    ]
    caplog.clear()
    for team in ("autogen", "camel", "macnet", "dylan"):
        prints("show", "prompts", c, f"team={team}", "max_turns=2", "--memory", "none")
    assert not [record for record in caplog.records if "shows" in record.getMessage()]


def test_show_prompts_tells_when_a_text_only_looks_like_a_control_token(prints, folder):
    write_rows(folder / "train.jsonl", [row(1, "Who wrote <|im_end|> here?"), row(2)])
    out = prints("show", "prompts", folder / "c.yaml")
    assert "<|im_start|>user\nWho wrote <|im_end|> here?<|im_end|>" in out
    assert out.count("was read as ordinary characters") == 2
    assert "ordinary characters" not in prints("show", "prompts", folder / "c.yaml", "--task", "2")


def test_mistakes_when_prompts_are_to_be_shown(prints, fails, folder):
    c = folder / "c.yaml"
    assert fails("show", "prompts", c, "--task", "7") == (
        "task 7 of the train split is asked for, but it has 6 tasks; give a number from 1 to 6"
    )
    assert "names 'txt', which is not a memory; did you mean 'text'?" in fails("show", "prompts", c, "--memory", "txt")
    assert fails("show", "prompts", c, "--memory", "text") == (
        f"{folder}/run/bank.sqlite: memory text needs a bank, and there is none yet; run `latentmem collect` with this "
        "configuration first, or show memory none"
    )
    prints("collect", c, "collect.num_tasks=1")
    assert "no checkpoint of sft here" in fails("show", "prompts", c, "--memory", "latent:sft")


READ = r"^(\w[\w ]*)  \(memory (\S+?)(?:, before: (\S+))?\)\n(latent  gate .*)\n((?:\d+ .*\n)+)with all: \".*\"$"


def test_show_latents_prints_what_each_latent_says_and_does_for_each_role(prints, folder):
    c = folder / "c.yaml"
    prints("collect", c)
    kept = {path for path in (folder / "run").rglob("*") if path.is_file()}
    out = prints("show", "latents", c, "--task", "2", "--split", "test")
    assert out.startswith("task 2 of 2 in the test split: popqa:11\nmemory latent:untrained, of 6 trajectories in ")
    tables = re.findall(READ, out, re.MULTILINE)
    assert [(role, name, before) for role, name, before, *_ in tables] == [
        ("assistant", "latent:untrained", ""), ("user proxy", "latent:untrained", "")
    ]  # fmt: skip
    for *_, header, rows in tables:
        assert header.split("  ")[-1].strip() == "without it"
        assert [row.split()[:2] for row in rows.splitlines()] == [["1", "-"], ["2", "-"], ["3", "-"]]
        assert all(re.search(r"(the same|\".*\") \([+-]\d+\.\d\d nats\)$", row) for row in rows.splitlines())
        assert rows.count(r"\n 1.00") + rows.count(r"\n 0.9") == 3  # latents begin as line breaks
    now = {path for path in (folder / "run").rglob("*") if path.is_file()}
    assert {path.name for path in now - kept} <= {"bank.sqlite.index"}  # derived from the bank by any search
    assert ExperienceBank(folder / "run" / "bank.sqlite").info().num_trajectories == 6


def test_show_latents_shows_the_memory_trained_last_beside_the_untrained_one(prints, folder):
    c, slots = folder / "c.yaml", "composer.slots=1"
    prints("collect", c, slots)
    prints("train", "lmpo", c, slots)
    out = prints("show", "latents", c, slots)
    tables = re.findall(READ, out, re.MULTILINE)
    assert [table[:3] for table in tables] == [
        (role, "latent:lmpo", "latent:untrained") for role in ("assistant", "user proxy")
    ]
    for *_, header, rows in tables:
        columns = ["latent", "gate", "length", "nearest after", "nearest before", "frame", "without it"]
        assert re.split("  +", header) == columns
        assert [row.split()[1] for row in rows.splitlines()] == ["1.00", "-", "-"]
    before = prints("show", "latents", c, slots, "--memory", "latent:untrained")
    assert [out.count("nearest before"), before.count("nearest before")] == [2, 0]


def test_mistakes_when_latents_are_to_be_shown(prints, fails, folder):
    c = folder / "c.yaml"
    for name in ("text", "none", "latent:untrained:random"):
        assert fails("show", "latents", c, "--memory", name) == (
            f"show latents: memory {name} has no latents of its own; name a latent one without a control, such as "
            "latent:untrained"
        )
    assert fails("show", "latents", c, "--task", "7") == (
        "task 7 of the train split is asked for, but it has 6 tasks; give a number from 1 to 6"
    )
    assert fails("show", "latents", c) == (
        f"{folder}/run/bank.sqlite: memory latent:untrained needs a bank, and there is none yet; run `latentmem "
        "collect` with this configuration first"
    )
    prints("collect", c, "collect.num_tasks=1")
    assert "no checkpoint of sft here" in fails("show", "latents", c, "--memory", "latent:sft")


def test_every_command_is_documented():
    text = (Path(__file__).resolve().parents[1] / "docs" / "commands.md").read_text(encoding="utf-8")
    nested = {
        "train": ("grpo", "lmpo", "sft", "warmup"),
        "bank": (
            *("copy", "info", "search", "export", "import", "verify", "delete", "reembed", "upgrade"),
            *("push", "pull"),
        ),
        "checkpoint": ("info", "import", "push", "pull"),
        "engine": ("check", "start"),
        "keys": ("create", "list", "revoke"),
        "audit": ("verify",),
        "retriever": ("serve",),
        "show": ("latents", "prompts"),
    }
    for name, parser in subparsers(program.build_parser()).items():
        assert f"latentmem {name}" in text
        assert tuple(sorted(subparsers(parser))) == tuple(sorted(nested.get(name, ())))
        for inner in nested.get(name, ()):
            assert f"latentmem {name} {inner}" in text or f"`{name} {inner} " in text


@pytest.mark.parametrize(
    "words",
    [
        ["c.yaml", "seed=1", "run=x", "--memory", "none", "--task", "2"],
        ["c.yaml", "--memory", "none", "seed=1", "--task", "2", "run=x"],
        ["--memory", "none", "c.yaml", "--task", "2", "seed=1", "run=x"],
        ["c.yaml", "--task", "2", "--memory", "none", "seed=1", "run=x"],
    ],
)
def test_overrides_stand_before_between_and_after_the_options(words):
    options = program.parsed(["show", "prompts", *words])
    assert (options.config, options.overrides) == ("c.yaml", ["seed=1", "run=x"])
    assert (options.memory, options.task) == ("none", 2)


@pytest.mark.parametrize("words", [["collect", "c.yaml", "--seed", "1"], ["bank", "info", "b.sqlite", "seed=1"]])
def test_words_that_nothing_takes_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.parsed(words)
    assert stopped.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def subparsers(parser):
    return (
        {name: sub for action in parser._subparsers._group_actions for name, sub in action.choices.items()}
        if (parser._subparsers)
        else {}
    )


@pytest.mark.parametrize("words", [["serve"], ["collect"], ["train", "sft"], ["engine", "start"], ["forget"]])
def test_a_forgotten_configuration_is_named_and_no_optional_word(words, capsys):
    with pytest.raises(SystemExit):
        cli.main(words)
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: the following arguments are required: CONFIG")
