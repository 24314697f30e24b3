"""Pushing to and pulling from a stand-in of the hub, by the real client; regular files and files by LFS."""

import json
import os
import sqlite3
import subprocess
import sys
import threading

import pytest
import torch
import yaml
from safetensors.torch import save, save_file
from stand_in import TOKEN, StandIn

from latentmem import cli
from latentmem import trajectory as trajectories
from latentmem.bank import ExperienceBank, copy_records
from latentmem.bank.copies import copy_bank
from latentmem.bank_place import bank_place
from latentmem.errors import BankError
from latentmem.hub import Origin
from latentmem.hub.cards import bank_card, checkpoint_card
from latentmem.memory.checkpoints import read_checkpoint, write_checkpoint
from latentmem.memory.composer import TEMPLATE
from latentmem.trajectory import Message, Recalled, Step, Task, Trajectory

# The client itself uploads in a way that the library below it calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

SETTINGS = {
    "base_model": "Qwen/Qwen3-4B",
    "agents": "Qwen/Qwen3-4B",
    "num_latents": 8,
    "d_composer": 4,
    "d_agent": 4,
    "rank": 2,
    "alpha": 32.0,
    "target_modules": ["q_proj", "v_proj"],
    "template": TEMPLATE,
    "max_prompt_tokens": 500,
    "slots": 2,
    "sharpness": 2.0,
    "cue": None,
}
TENSORS = {"query_latents": torch.arange(32.0).view(8, 4), "projection.weight": torch.eye(4)}


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A stand-in at which the client's requests end."""
    from huggingface_hub import constants

    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    resolve = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{")[2]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{{resolve}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers speak no HTTP that could be stood in for
    home = tmp_path_factory.mktemp("hf")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path / "mine", SETTINGS, TENSORS)
    return tmp_path / "mine"


def trajectory(number, reward=1.0):
    message = Message(
        role="solver", system="s", user="u", response=f"r{number}", token_ids=(1,), logps=(0.0,), finish="stop",
        temperature=1.0, num_prompt_tokens=2, recalled=Recalled(kind="none"),
    )  # fmt: skip
    return Trajectory(
        task=Task(id=str(number), domain="toy", text=f"door {number}"), team="duo", model="m", reward=reward,
        steps=(Step(messages=(message,), action="a", observation=""),), success=reward == 1, seed=0,
    )  # fmt: skip


@pytest.fixture
def bank(tmp_path, fake_embed):
    path = tmp_path / "bank.sqlite"
    with ExperienceBank(path, fake_embed, embedder="of-the-bank") as bank:
        bank.add([trajectory(1), trajectory(2, 0.0), trajectory(3, 0.5)])
    return path


@pytest.fixture
def fails(capsys):
    """Run a command that must fail as a user's mistake; its one line."""

    def fails(*words):
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latentmem: ")]
        return line.removeprefix("latentmem: ")

    return fails


def run(*words):
    assert cli.main([str(word) for word in words]) == 0


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Checkpoints


def test_a_checkpoint_that_is_pushed_and_pulled_is_the_same_file(hub, checkpoint, tmp_path, capsys):
    run("checkpoint", "push", checkpoint, "me/mine")
    ((commit, _),) = hub.commits["model", "me/mine"]
    assert capsys.readouterr().out == f"{hub.url}/me/mine/commit/{commit}\n"
    assert hub.private["model", "me/mine"]
    files = hub.files("model", "me/mine")
    assert sorted(files) == ["README.md", "composer.json", "composer.safetensors"]
    assert files["composer.safetensors"] == (checkpoint / "composer.safetensors").read_bytes()
    assert files["composer.json"] == (checkpoint / "composer.json").read_bytes()
    (digest,) = hub.objects  # the tensors went by LFS, the texts in the commit
    assert ("PUT", f"/objects/{digest}") in hub.requests

    run("checkpoint", "pull", "me/mine", tmp_path / "new" / "pulled")
    pulled = tmp_path / "new" / "pulled"
    assert "evaluate.memories names it 'latent:" in capsys.readouterr().out
    assert {path.name: text for path, text in everything(pulled).items()} == {
        path.name: text for path, text in everything(checkpoint).items()
    }
    assert ("GET", f"/objects/{digest}") in hub.requests


def test_a_lora_of_agents_is_pushed_and_pulled_as_such(hub, tmp_path, fails, checkpoint):
    write_checkpoint(tmp_path / "lora", {"agents": "m", "rank": 2}, {"lora.a": torch.ones(2)}, "agents")
    run("checkpoint", "push", tmp_path / "lora", "me/lora", "--public")
    assert not hub.private["model", "me/lora"]
    run("checkpoint", "pull", "me/lora", tmp_path / "pulled")
    assert read_checkpoint(tmp_path / "pulled", "agents")[0]["rank"] == 2
    before = everything(checkpoint)
    line = fails("checkpoint", "pull", "me/lora", checkpoint, "--force")
    assert line == f"{checkpoint}: holds a composer, but me/lora holds a LoRA of agents; name another folder"
    assert everything(checkpoint) == before


def test_a_revision_that_was_is_pulled_by_its_name_and_a_folder_is_replaced_only_by_force(
    hub, checkpoint, tmp_path, fails
):
    run("checkpoint", "push", checkpoint, "me/mine")
    write_checkpoint(checkpoint, {**SETTINGS, "num_latents": 3}, {"query_latents": torch.zeros(3, 4)})
    run("checkpoint", "push", checkpoint, "me/mine")
    (first, _), (second, _) = hub.commits["model", "me/mine"]
    pulled = tmp_path / "pulled"
    run("checkpoint", "pull", "me/mine", pulled, "--revision", first)
    assert read_checkpoint(pulled)[0]["num_latents"] == 8
    line = fails("checkpoint", "pull", "me/mine", pulled)
    assert line == f"{pulled}: exists already; name another folder, or replace what it holds with --force"
    assert read_checkpoint(pulled)[0]["num_latents"] == 8
    run("checkpoint", "pull", "me/mine", pulled, "--force")
    assert read_checkpoint(pulled)[0]["num_latents"] == 3
    assert "no such revision" in fails("checkpoint", "pull", "me/mine", tmp_path / "x", "--revision", "v9")
    assert second != first


HARMFUL = {
    "torch's pickle": b"PK\x03\x04 not tensors",
    "nothing": b"",
    "another's tensors": save({"a": torch.ones(1)}),
    "a list for settings": save({"a": torch.ones(1)}, {"latentmem": "[1]"}),
    "a text for a version": save({"a": torch.ones(1)}, {"latentmem": '{"format_version": "1"}'}),
    "a newer format": save({"a": torch.ones(1)}, {"latentmem": '{"format_version": 99}'}),
    "deep": save({"a": torch.ones(1)}, {"latentmem": "[" * 100_000}),
}


@pytest.mark.parametrize("content", HARMFUL.values(), ids=HARMFUL)
def test_what_is_no_checkpoint_is_one_line_and_leaves_nothing(hub, tmp_path, fails, content):
    hub.commit("model", "me/odd", {"composer.safetensors": content, "composer.json": b"{}", "setup.py": b"1/0"})
    assert fails("checkpoint", "pull", "me/odd", tmp_path / "pulled").startswith("me/odd: composer.safetensors: ")
    assert not list(tmp_path.iterdir())
    asked = {path.rsplit("/", 1)[-1] for method, path in hub.requests if method == "GET"}
    assert "setup.py" not in asked
    assert "composer.json" not in asked


def test_a_repository_without_a_checkpoint_or_with_two_is_named(hub, tmp_path, fails):
    hub.commit("model", "me/gpt", {"model.safetensors": b"x", "config.json": b"{}"})
    line = fails("checkpoint", "pull", "me/gpt", tmp_path / "a")
    assert line.startswith("me/gpt: holds no checkpoint of ours, neither composer.safetensors nor agents.safetensors")
    hub.commit("model", "me/two", {"composer.safetensors": b"x", "agents.safetensors": b"{}"})
    assert "holds both" in fails("checkpoint", "pull", "me/two", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_content_that_is_not_what_the_hub_says_is_refused(hub, checkpoint, tmp_path, fails):
    run("checkpoint", "push", checkpoint, "me/mine")
    (digest,) = hub.objects
    content = bytearray(hub.objects[digest])
    content[-1] ^= 1
    hub.objects[digest] = bytes(content)
    assert "composer.safetensors arrived damaged" in fails("checkpoint", "pull", "me/mine", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_what_the_hub_refuses_is_one_line(hub, checkpoint, tmp_path, fails, monkeypatch):
    pulled = tmp_path / "pulled"
    line = fails("checkpoint", "pull", "me/nowhere", pulled)
    assert line.startswith(f"me/nowhere: no such model repository on {hub.url}, or one that you may not see; ")
    assert "its owner grants access" in fails("checkpoint", "pull", "gated/x", pulled)
    assert "does not let you do this (status 403)" in fails("checkpoint", "push", checkpoint, "others/theirs")
    assert "answers with status 500" in fails("checkpoint", "push", checkpoint, "broken/x")
    assert (
        fails("checkpoint", "push", checkpoint, "a/b/c") == "'a/b/c' is not the name of a repository; write OWNER/NAME"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not let you do this (status 401)" in fails("checkpoint", "push", checkpoint, "me/mine")
    assert not hub.commits.get(("model", "me/mine"))
    assert not pulled.exists()


def test_a_hub_that_does_not_answer_is_one_line(hub, checkpoint, bank, tmp_path, fails, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for words in (
        ("checkpoint", "push", checkpoint, "me/mine"),
        ("checkpoint", "pull", "me/mine", tmp_path / "x"),
        ("bank", "push", bank, "me/bank"),
        ("bank", "pull", "me/bank", tmp_path / "x.sqlite"),
    ):
        assert "http://127.0.0.1:9 cannot be used (Connect" in fails(*words)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in fails("checkpoint", "pull", "me/mine", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_is_no_checkpoint_is_not_pushed(hub, tmp_path, fails):
    assert "no composer here" in fails("checkpoint", "push", tmp_path, "me/mine")
    save_file({"a": torch.ones(1)}, tmp_path / "composer.safetensors")
    assert "not written by latentmem" in fails("checkpoint", "push", tmp_path, "me/mine")
    assert not hub.requests


@pytest.mark.slow
def test_a_real_process_pushes_and_pulls_by_the_variables_of_the_client(hub, checkpoint, tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    pulled = tmp_path / "pulled"
    words = [["push", str(checkpoint), "me/mine"], ["pull", "me/mine", str(pulled)]]
    code = f"from latentmem.cli import main\nassert not any(main(['checkpoint', *words]) for words in {words})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert everything(pulled).keys() == {pulled / "composer.safetensors", pulled / "composer.json"}
    assert (pulled / "composer.safetensors").read_bytes() == (checkpoint / "composer.safetensors").read_bytes()


# Cards


def test_the_card_says_what_the_checkpoint_is_and_what_its_configuration_has_to_say():
    origin = Origin("lmpo", 40, {"data": {"kind": "qa"}, "team": "camel", "seed": 3}, "| memory | accuracy |\n")
    card = checkpoint_card("me/mine", "composer", {**SETTINGS, "words": {"entry": "({text})"}}, origin)
    head, body = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(head)["base_model"] == "Qwen/Qwen3-4B"
    for line in ("| base model | `Qwen/Qwen3-4B` |", "| latents (K) | `8` |", "| of them slots for words | `2` |",
                 "| trained by | lmpo, 40 steps |", "| data | `qa` |", "| team | `camel` |",
                 "| LoRA on | `q_proj`, `v_proj` |"):  # fmt: skip
        assert line in body
    assert "| template | sha256 " in body
    assert "In the table this checkpoint is `latent:lmpo`.\n\n| memory | accuracy |" in body
    said = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert said == {
        "model": {"name": "Qwen/Qwen3-4B"},
        "composer": {"num_latents": 8, "rank": 2, "alpha": 32.0, "target_modules": ["q_proj", "v_proj"],
                     "max_prompt_tokens": 500, "slots": 2, "sharpness": 2.0},
        "memory": {"entry": "({text})"},
    }  # fmt: skip
    local = checkpoint_card(
        "me/mine", "composer", {**SETTINGS, "base_model": "smollm2-135m", "template": "{task}"}, None
    )
    assert "base_model" not in yaml.safe_load(local.split("---\n")[1])
    assert "Results" not in local
    assert yaml.safe_load(local.split("```yaml\n")[1].split("```")[0])["composer"]["template"] == "{task}"


def test_a_bank_on_a_server_is_sent_as_a_file(hub, bank, postgres_server, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTMEM_CACHE", str(tmp_path / "cache"))
    url = postgres_server.new_bank()
    copy_records(bank, bank_place(url))
    run("bank", "push", url, "me/bank")
    run("bank", "pull", "me/bank", tmp_path / "pulled.sqlite")
    with ExperienceBank(bank) as ours, ExperienceBank(tmp_path / "pulled.sqlite") as pulled:
        assert list(pulled) == list(ours)
        assert pulled.verify().ok


def test_episodes_of_tenants_are_not_sent(hub, bank, tmp_path, caplog, fake_embed):
    origin = trajectories.Origin(tenant="acme", session="s", is_judged=True)
    theirs = trajectory(9).model_copy(update={"origin": origin})
    theirs = theirs.model_copy(update={"task": theirs.task.model_copy(update={"text": "quetzalcoatlus"})})
    with ExperienceBank(bank, fake_embed, embedder="of-the-bank") as opened:
        opened.add(theirs)
    run("bank", "push", bank, "me/bank")
    assert "1 trajectories of tenants are not sent, only the common pool" in caplog.text
    run("bank", "pull", "me/bank", tmp_path / "back.sqlite")
    with ExperienceBank(tmp_path / "back.sqlite") as back, ExperienceBank(bank) as opened:
        assert list(back) == [trajectory(1), trajectory(2, 0.0), trajectory(3, 0.5)]
        assert len(opened) == 4
    assert b"quetzal" not in (tmp_path / "back.sqlite").read_bytes()


def test_the_card_of_a_bank_counts_and_quotes_no_task(bank):
    with ExperienceBank(bank) as opened:
        card = bank_card("me/bank", opened.info())
    assert "| trajectories | 3 |" in card
    assert "| domains | `toy` 3 |" in card
    assert "door" not in card


def test_a_selected_checkpoint_of_a_run_is_pushed_with_the_run_and_its_results(hub, tmp_path):
    folder = tmp_path / "run" / "lmpo" / "checkpoints" / "step-000002"
    write_checkpoint(folder, SETTINGS, TENSORS)
    (folder.parent.parent.parent / "config.yaml").write_text("team: camel\nseed: 5\ndata: {kind: code}\n")
    memory = {"name": "latent:lmpo", "accuracy": 0.5, "accuracy_low": 0.1, "accuracy_high": 0.9}
    (tmp_path / "run" / "results.json").write_text(json.dumps({"memories": [memory], "num_tasks": 2}))
    run("checkpoint", "push", folder, "me/mine")
    card = hub.files("model", "me/mine")["README.md"].decode()
    assert "| trained by | lmpo, 2 steps |\n| data | `code` |\n| team | `camel` |\n| seed | `5` |" in card
    assert "Results" not in card  # nothing tells that the evaluation took this one
    (folder.parent / "progress.json").write_text(json.dumps({"step": 2}))
    (folder / "optimizer.safetensors").write_bytes(b"not to be sent")
    run("checkpoint", "push", folder, "me/mine")
    files = hub.files("model", "me/mine")
    assert "In the table this checkpoint is `latent:lmpo`." in files["README.md"].decode()
    assert r"| latent:lmpo | 50.0% \[10.0, 90.0\] |" in files["README.md"].decode()
    assert sorted(files) == ["README.md", "composer.json", "composer.safetensors"]


# Banks


def test_a_bank_that_is_pushed_and_pulled_holds_the_same(hub, bank, tmp_path, capsys, fake_embed):
    with ExperienceBank(bank, fake_embed, embedder="of-the-bank") as opened:  # in use: some of it is still in the log
        opened.add(trajectory(4))
        assert bank.with_name("bank.sqlite-wal").stat().st_size > 0
        run("bank", "push", bank, "me/bank")
        files = hub.files("dataset", "me/bank")
        assert sorted(files) == ["README.md", "bank.sqlite"]
        assert hub.private["dataset", "me/bank"]
        capsys.readouterr()
        pulled = tmp_path / "there" / "pulled.sqlite"
        run("bank", "pull", "me/bank", pulled)
        assert capsys.readouterr().out == f"4 trajectories, 2 successes, written to {pulled}\n"
        assert [path.name for path in pulled.parent.iterdir()] == ["pulled.sqlite"]
        with ExperienceBank(pulled, fake_embed, embedder="of-the-bank") as other:
            assert [*other] == [*opened]
            found = other.search(Task(id=None, domain="toy", text="door 3"), k=2)
            assert [hit.trajectory.id for hit in found] == [
                hit.trajectory.id for hit in opened.search(Task(id=None, domain="toy", text="door 3"), k=2)
            ]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_bank_is_replaced_only_by_force_and_another_file_never(hub, bank, tmp_path, fails, fake_embed):
    run("bank", "push", bank, "me/bank")
    task = Task(id=None, domain="toy", text="a window")
    with ExperienceBank(bank, fake_embed, embedder="of-the-bank") as opened:
        opened.add([trajectory(number) for number in range(5, 9)])
        opened.search(task, k=3)
        assert bank.with_name("bank.sqlite.index").exists()
        assert fails("bank", "pull", "me/bank", bank).startswith(f"{bank}: exists already; ")
        assert len(opened) == 7
        run("bank", "pull", "me/bank", bank, "--force")
        assert len(opened) == 3  # who has it open sees the new one
        assert len(opened.search(task, k=9)) == 3
        assert opened.verify().ok
    text = tmp_path / "notes.txt"
    text.write_text("mine")
    assert str(text) in fails("bank", "pull", "me/bank", text, "--force")
    assert text.read_text() == "mine"


def test_what_is_no_bank_or_a_damaged_one_or_more_than_one_is_not_pulled(hub, bank, tmp_path, fails):
    pulled = tmp_path / "pulled.sqlite"
    hub.commit("dataset", "me/rows", {"rows.jsonl": b"{}"})
    assert fails("bank", "pull", "me/rows", pulled).startswith("me/rows: holds no bank.sqlite; ")
    hub.commit("dataset", "me/text", {"bank.sqlite": b"this is no database, whatever its name says"})
    assert fails("bank", "pull", "me/text", pulled).startswith("me/text: bank.sqlite: ")
    for number, statement in enumerate((
        "UPDATE trajectories SET reward = 0.7 WHERE task_id = '3'",
        "CREATE TRIGGER t AFTER INSERT ON trajectories BEGIN DELETE FROM trajectories; END",
        "CREATE VIEW v AS SELECT 1",
    )):  # fmt: skip
        copy = tmp_path / f"copy-{number}.sqlite"
        copy_bank(bank, copy)
        with sqlite3.connect(copy) as db:
            db.execute(statement)
        db.close()
        hub.commit("dataset", f"me/odd{number}", {"bank.sqlite": copy.read_bytes()})
        line = fails("bank", "pull", f"me/odd{number}", pulled)
        assert line.startswith(f"me/odd{number}: bank.sqlite: ")
        assert ("problems" if number == 0 else "which no bank has; it is refused") in line
    assert not pulled.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_bank_with_problems_is_not_pushed(hub, bank, tmp_path, fails):
    with sqlite3.connect(bank) as db:
        db.execute("UPDATE trajectories SET reward = 0.7 WHERE task_id = '3'")
    db.close()
    assert fails("bank", "push", bank, "me/bank").startswith(
        f"{bank}: 1 problems, the first: columns: record 3: reward is 0.7"
    )
    assert "no bank there" in fails("bank", "push", tmp_path / "none.sqlite", "me/bank")
    assert not hub.requests


def test_a_copy_that_fails_leaves_the_older_one(bank, tmp_path):
    text = tmp_path / "text"
    text.write_text("no database at all, but long enough to look at")
    with pytest.raises(BankError, match="cannot be copied"):
        copy_bank(text, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(BankError, match="cannot be copied"):
        copy_bank(bank, text)
    assert text.read_text() == "no database at all, but long enough to look at"
