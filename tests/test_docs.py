"""Every command and every Python block of the documentation runs, in the order of its page, as a reader would do it.

Each page has one folder. Commands run there on a tiny random model, with few tasks, few steps and an environment that
pays by luck. The keys that a command sets stay, and the whole configuration is validated before it is made small.
Some commands cannot run here: `CHECKED` and `Reader.programs` say which, and how far each of them is checked instead.
A command that neither knows fails the test.
"""

import argparse
import copy
import importlib.util
import json
import re
import runpy
import signal
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import latentmem
from latentmem import Message, Outcome, Step, Task, Trajectory, cli
from latentmem.bank import ExperienceBank
from latentmem.cli.program import parsed
from latentmem.config import load_config, parse_config, read_values
from latentmem.config import read as reading
from latentmem.environments.reasoning import ReasoningDomain
from latentmem.errors import ConfigError
from latentmem.grid.file import load_grid
from latentmem.memory.text import TextMemory
from latentmem.models.language_model import LanguageModel
from latentmem.recipes import phase
from latentmem.released import read_weights, sections
from latentmem.teams.team import load_team
from latentmem.trajectory import Recalled
from pages import PAGES, ROOT, blocks, commands
from test_released import TEMPLATE, chroma_folder, data_json, their_entry, their_weights, written

SERVED = "http://127.0.0.1:8080"
"""Where the pages' server of agent programs answers; the reader's has a free port."""
COMMANDS = ("sh", "console", "indented")
"""Blocks of commands. Pages of results have theirs indented."""
TOLD = ("text", "yaml", "json")
"""Blocks that are no commands: output, formulas, files."""

CHECKED = {
    r"docs/results/.*": "is a record of what was run for hours; it has to be a command and a configuration of today",
    r".*: evaluate (grid|ablation)-.*": "plays a whole grid; tests/grid/ plays small ones",
    r".*: report runs/(grid-quick|ablation-num-latents)\b.*": "reads what such a grid played",
    r".*: (checkpoint|bank) (push|pull) .*": "talks to the hub; tests/hub/ has a stand-in of it",
    r".*postgresql://.*": "needs a PostgreSQL server; tests/test_bank_postgres.py has one of its own",
    r"docs/reports.md: train lmpo mine.yaml .*": "trains a real model; tests/test_tracking.py reads what is tracked",
    r"docs/released-weights.md: (checkpoint|bank) import .*\.\./shared/.*": "needs files of others; "
    "tests/test_released.py reads them where they lie",
    r"README.md: serve .*": "serves what was trained; docs/serving.md has a server that runs",
    r"docs/training.md: evaluate reasoning-quickstart-short run=runs/rival .*": "names the checkpoint that was best in "
    "the run shown; here luck decides which one is kept",
}
"""Commands of latentmem that are parsed, with their configuration validated, and not run; and why."""

SLOW = (
    "README.md",
    "docs/analysis.md",
    "docs/first-steps.md",
    "docs/python.md",
    "docs/memories.md",
    "docs/programs.md",
    "docs/training.md",
)
"""Pages whose commands train and play for long, even on the tiny model. `make slow` runs them; else they are parsed."""

SMALL_CONFIG = """
run: RUN
data:
  kind: reasoning_gym
  families: [{name: chain_sum, params: {max_terms: 2}}]
composer: {num_latents: 3, slots: 1, cue: "\\nThe word is"}
evaluate: {memories: [none, "latent:lmpo"]}
"""
CODE_CONFIG = """
run: RUN
data: {kind: code, schema: kodcode, train: {path: data/train.jsonl}, test: {path: data/test.jsonl}}
evaluate: {memories: [none]}
"""
BEFORE = {
    "README.md": ["collect quickstart"],
    "docs/analysis.md": ["quickstart"],
    "docs/evaluation.md": ["collect CONFIG", "train lmpo CONFIG lmpo.initial=untrained"],
    "docs/memories.md": ["collect CONFIG", "train lmpo CONFIG lmpo.initial=untrained"],
    "docs/reports.md": ["collect CONFIG", "evaluate CONFIG evaluate.memories=[none]"],
    "docs/training.md": ["quickstart"],
}
"""What a page takes for granted."""
HUB_MODEL = "Qwen/Qwen3-4B-Instruct-2507"
"""Named on the command line; the tiny model takes its place."""
FILES = {
    "README.md": {"mine.yaml": "README.md"},
    "docs/reports.md": {"mine.yaml": "README.md"},
    "docs/programs.md": {"mine.yaml": "docs/programs.md", "my_program.py": "docs/programs.md"},
    "docs/serving.md": {"served.yaml": "docs/serving.md"},
    "docs/operating.md": {"served.yaml": "docs/operating.md"},
    "docs/teams.md": {"proofreaders.yaml": "docs/teams.md", "sums.yaml": "docs/configuration.md"},
    "docs/released-weights.md": {"released.yaml": "docs/released-weights.md"},
}
"""Files that commands name, and the page whose first block of that language each of them is."""


def test_every_fence_says_what_is_in_it():
    for page in PAGES:
        for block in blocks(page):
            assert block.language in (*COMMANDS, *TOLD, "python"), f"{block.where}: fence is {block.language!r}"
            assert block.language != "indented" or page.startswith("docs/results/"), f"{block.where}: put it in a fence"


NO_DEFAULT = {"code": {"schema": "mbpp", "train": {"path": "train.jsonl"}, "test": {"path": "test.jsonl"}}}
"""What an excerpt of these data may leave out."""
YAML = [block for page in PAGES for block in blocks(page) if block.language == "yaml"]


@pytest.mark.parametrize("block", YAML, ids=lambda block: block.where)
def test_every_yaml_block_is_a_configuration_a_grid_or_a_team(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "shown.yaml"
    file.write_text(block.text)
    values = read_values(str(file))
    if "agents" in values:
        load_team(str(file))
    elif "grid" in values:
        load_grid(values, str(file))
    else:  # an excerpt: what has no default is added
        data = {"kind": "hidden_facts"} | values.get("data", {})
        parse_config({"run": "runs/x"} | values | {"data": NO_DEFAULT.get(data["kind"], {}) | data}, block.where)


def runnable(page):
    return [block for block in blocks(page) if block.language in (*COMMANDS, "python")]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES if runnable(page)],
)
def test_every_block_of_the_page_runs(page, reader):
    reader.open(page)
    for block in runnable(page):
        reader.read(block)


@pytest.mark.parametrize("page", SLOW)
def test_every_block_of_a_slow_page_is_at_least_valid(page, reader):
    reader.open(page, only_check=True)
    for block in runnable(page):
        reader.read(block)


def test_a_command_that_nobody_runs_fails(reader):
    reader.open("docs/bank.md")
    with pytest.raises(pytest.fail.Exception, match="nobody runs"):
        reader.programs["wget"](("wget", "x"), None)


def test_a_command_that_is_no_longer_right_fails(reader):
    reader.open("CONTRIBUTING.md")
    for words, error in (
        ("latentmem train ppo CONFIG", SystemExit),
        ("latentmem collect CONFIG lmpo.group_sise=2", AssertionError),
        ("latentmem evaluate grid-quick grid.seedz=[0]", ConfigError),
        ("pip install latentmem[nothing]", KeyError),
        ("make nothing", AssertionError),
        ("torchrun --nproc_per_node 2 -m latentmem.cli train ppo CONFIG", SystemExit),
        (".venv/bin/python benchmarks/cost.py --onyl update", SystemExit),
    ):
        command = tuple(words.split())
        with pytest.raises(error):
            reader.programs[command[0]](command, None)


# The reader


class Lucky:
    """An environment that pays for an odd number of characters: a random model solves nothing else."""

    instructions = "Say something."

    def step(self, action):
        return Outcome("", float(len(action) % 2), True, {"extracted": action or None})


class Toy:
    """Tasks of our own."""

    name = "toy"

    def tasks(self, split):
        return [Task(id=str(i), domain="toy", text=f"{i} + 1 =") for i in range(4)]

    def start(self, task):
        return Lucky()


class Programs(dict):
    """What is done for each program, by its name; one that is not listed fails."""

    def __missing__(self, name):
        def fail(words, command):
            pytest.fail(f"nobody runs {' '.join(words)}: let Reader.programs know how")

        return fail


class Reader:
    """Goes through a page: each block finds what those before it left in the folder, and the names they left."""

    def __init__(self, folder, model_dir, embed, monkeypatch, capsys):
        self.folder, self.model_dir, self.embed = folder, model_dir, embed
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.servers = []
        self.url = None
        self.served = SERVED
        self.programs = Programs(
            {
                "latentmem": self.latentmem,
                "sqlite3": self.sqlite,
                "curl": self.curl,
                # Launchers of several processes: tests/test_sharded_recipes.py really launches.
                "torchrun": self.torchrun,
                "accelerate": self.accelerate,
                # Minutes to hours each: the words are given to the program's own parser.
                ".venv/bin/python": self.script,
                "python": self.script,
                # They change the machine or need the network: what they name has to exist in the project.
                "make": self.make,
                "pip": self.pip,
                "hf": self.hf,
                ".ci/run": lambda words, command: self.exists(".ci/run"),
                "pre-commit": lambda words, command: self.exists(".pre-commit-config.yaml"),
                "source": lambda words, command: None,
                # The reader's own.
                "my_program": lambda words, command: None,
                # It serves until it is stopped.
                "tensorboard": lambda words, command: importlib.util.find_spec("tensorboard") or pytest.fail("absent"),
                # Of the system's package manager, and a program that it installs.
                "sudo": lambda words, command: None,
                "bwrap": lambda words, command: None,
            }
        )

    def open(self, page, only_check=False):
        """Lay out what the page takes for granted; with `only_check` its commands and blocks are parsed and not run."""
        self.page = page
        self.only_check = only_check
        self.names = {}
        (self.folder / "src").symlink_to(ROOT / "src")
        (self.folder / "CONFIG").write_text(CODE_CONFIG if page == "docs/sandbox.md" else SMALL_CONFIG)
        self.rows()
        for name, source in FILES.get(page, {}).items():
            language = "python" if name.endswith(".py") else "yaml"
            text = next(block.text for block in blocks(source) if block.language == language)
            (self.folder / name).write_text(text)
        if page == "docs/results/grid.md":
            (self.folder / "grid.yaml").write_text((ROOT / "docs/results/grid.yaml").read_text())
        if page == "docs/released-weights.md":
            self.released()
        if only_check:
            return
        if any(block.language == "python" for block in blocks(page)):
            self.stand_ins()
        if page == "docs/python.md":
            self.smaller_python()
        for words in BEFORE.get(page, []):
            self.latentmem(("latentmem", *words.split()), None)

    def read(self, block):
        """Run one block."""
        if block.language == "python":
            text = block.text.replace(SERVED, self.served)
            code = compile("\n" * block.line + text, str(ROOT / block.page), "exec")
            if not self.only_check:
                exec(code, self.names)
            return
        for command in commands(block, self.folder):
            self.monkeypatch.chdir(command.folder)
            self.programs[command.words[0]](command.words, command)
            self.monkeypatch.chdir(self.folder)

    def close(self):
        """End the servers as a person would."""
        for server in self.servers:
            server.send_signal(signal.SIGTERM)
        ends = [server.wait(60) for server in self.servers]
        for server in self.servers:
            server.stdout.close()
        assert not any(ends)

    # Programs

    def latentmem(self, words, command):
        words = [str(self.model_dir) if word == HUB_MODEL else word for word in words[1:]]
        line = " ".join(words)
        names = (self.page, f"{self.page}: {line}")
        if words == ["--help"]:
            with pytest.raises(SystemExit) as end:
                cli.main(words)
            assert end.value.code == 0
            return
        if self.only_check or any(re.fullmatch(pattern, name) for pattern in CHECKED for name in names):
            self.check(words)
            return
        if words[:2] == ["retriever", "serve"]:
            self.serve(words)
            return
        if words[0] == "serve":
            self.serve_programs(words)
            return
        mistake = [told for told in (command.told if command else ()) if told.startswith("latentmem: ")]
        self.capsys.readouterr()
        status = cli.main(words)
        errors = [told for told in self.capsys.readouterr().err.splitlines() if told.startswith("latentmem: ")]
        assert errors == mistake, f"{self.page}: latentmem {line}"
        assert status == (2 if mistake else 0)

    def check(self, words):
        """The words are a command, and what they configure is valid as it is."""
        options = parsed(words)
        if not hasattr(options, "config"):
            return
        values = read_values(options.config, options.overrides)
        if "grid" in values:
            load_grid(values, options.config)
        else:
            load_config(options.config, options.overrides)

    def serve(self, words):
        options = parsed(words)
        port = [] if options.port == 8000 else ["--port", str(options.port)]
        assert words[len(words) - len(port) :] == port
        free = [*words[: len(words) - len(port)], "--port", "0"]  # another program may listen at the page's
        server = subprocess.Popen(
            [Path(sys.executable).with_name("latentmem"), *free], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        self.servers.append(server)
        line = server.stdout.readline()
        self.url = re.search(r"(http://\S+)/retrieve", line).group(1)

    def serve_programs(self, words):
        small = [f"model.name={self.model_dir}", "bank.embedder=hashing", "serve.log=none", "--port", "0"]
        server = subprocess.Popen(
            [Path(sys.executable).with_name("latentmem"), *words, *small], stdout=subprocess.PIPE, text=True
        )
        self.servers.append(server)
        self.served = re.search(r"(http://\S+)/v1", server.stdout.readline()).group(1)

    def curl(self, words, command):
        here = [word.replace(SERVED, self.served) for word in words]
        subprocess.run([*here, "--silent", "--show-error"], check=True, capture_output=True, timeout=300)

    def sqlite(self, words, command):
        _, bank, query = words
        with sqlite3.connect(self.folder / bank) as db:
            assert db.execute(query).fetchall()
        db.close()

    def torchrun(self, words, command):
        from torch.distributed.run import parse_args

        options = parse_args(list(words[1:]))
        assert (options.module, options.training_script) == (True, "latentmem.cli")
        self.check(options.training_script_args)

    def accelerate(self, words, command):
        from accelerate.commands.launch import launch_command_parser

        assert words[1] == "launch"
        options = launch_command_parser().parse_args(list(words[2:]))
        assert (options.module, options.training_script) == (True, "latentmem.cli")
        if options.config_file:
            assert yaml.safe_load((command.folder / options.config_file).read_text())
        self.monkeypatch.chdir(self.folder)
        self.check(options.training_script_args)

    def script(self, words, command):
        if words[1] == "-m":
            assert importlib.util.find_spec(words[2])
            return
        self.exists(words[1])
        real = argparse.ArgumentParser.parse_args

        class Parsed(Exception):
            pass

        def parse(parser, *args):
            real(parser, list(words[2:]))
            raise Parsed

        self.monkeypatch.syspath_prepend(str((ROOT / words[1]).parent))
        with self.monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
            with pytest.raises(Parsed):
                runpy.run_path(str(ROOT / words[1]), run_name="__main__")

    def make(self, words, command):
        targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)

    def pip(self, words, command):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        assert words[1] == "install"
        for word in words[2:]:
            asked = re.fullmatch(r"(?:latentmem|\.)\[(.+)\]", word)
            for extra in asked.group(1).split(",") if asked else ():
                assert extras[extra]
            assert asked or word in ("-e", ".", "--no-deps", *pins)

    def hf(self, words, command):
        hub = Path(sys.executable).with_name("hf")
        subprocess.run([hub, *words[1:], "--help"], check=True, capture_output=True, timeout=300)

    def exists(self, path):
        assert (ROOT / path).is_file()

    # What stands in

    def small(self, values):
        """The same experiment on the tiny model, in seconds."""
        values = copy.deepcopy(values)

        def at_most(key, limit, default=None):
            *sections, last = key.split(".")
            section = values
            for name in sections:
                section = section.setdefault(name, {})
            found = section.get(last)
            section[last] = min(found, limit) if found is not None else default or limit

        values["model"] = {"name": str(self.model_dir), "device": "cpu", "dtype": "float32"}
        values.setdefault("composer", {})["max_prompt_tokens"] = 1000  # its tokenizer spells most words
        values["composer"].pop("model", None)
        kind = values["data"]["kind"]
        if kind == "reasoning_gym":
            at_most("data.train_size", 64, 16)
            at_most("data.test_size", 6)
        if kind == "hidden_facts":
            for split, size in (("train", 8), ("dev", 2), ("test", 4)):
                at_most(f"data.{split}_entities", size)
        if values["data"].get("search"):
            values["data"]["search"]["url"] = self.url
        at_most("collect.num_tasks", 16)
        at_most("evaluate.num_tasks", 4)
        at_most("evaluate.num_bootstraps", 50)
        at_most("sampling.max_response_tokens", 4)
        at_most("evaluate.max_response_tokens", 4)
        at_most("rivals.max_response_tokens", 8)
        at_most("rivals.max_episode_characters", 200)
        for steps in ("warmup.frame_steps", "sft.num_steps", "lmpo.num_steps", "grpo.num_steps"):
            at_most(steps, 12, 2)
        at_most("warmup.copy_steps", 1)
        at_most("warmup.lessons_per_step", 8)
        at_most("sft.trajectories_per_step", 2)
        at_most("lmpo.tasks_per_step", 2)
        at_most("grpo.tasks_per_step", 2)
        for trainer in ("sft", "lmpo", "grpo"):
            if values[trainer].get("eval_every"):
                at_most(f"{trainer}.eval_tasks", 4)
        return values

    def rows(self):
        """Rows in the schemas that commands name."""
        asked = [
            {"id": i, "question": f"Which colour has door {i}?", "possible_answers": '["red"]', "o_aliases": "[]"}
            for i in range(12)
        ]
        yes_or_no = [{"qid": f"q{i}", "question": f"Is door {i} red?", "answer": bool(i % 2)} for i in range(12)]
        programs = [
            {
                "question_id": f"k{i}",
                "question": f"Write plus(x), which returns x + {i}.",
                "test_info": None,
                "test": f"from solution import plus\n\ndef test_plus():\n    assert plus(1) == {1 + i}\n",
            }
            for i in range(12)
        ]
        rows = yes_or_no if self.page == "docs/environments.md" else asked
        for folder, found in ((".", rows), ("popqa", asked), ("data", programs)):
            (self.folder / folder).mkdir(exist_ok=True)
            for split, part in (("train", found[:8]), ("test", found[8:])):
                text = "".join(json.dumps(row) + "\n" for row in part)
                (self.folder / folder / f"{split}.jsonl").write_text(text)
        (self.folder / "wiki-corpus").mkdir()
        (self.folder / "wiki-corpus" / "corpus.jsonl").write_text(
            "".join(json.dumps({"id": str(i), "contents": f'"Door {i}"\nDoor {i} is red.'}) + "\n" for i in range(9))
        )

    def released(self):
        """Weights and a bank as the authors lay them out, for the tiny model."""
        file = written(self.folder / "theirs" / "model.safetensors", their_weights(self.model_dir))
        (self.folder / "theirs.txt").write_text(TEMPLATE)
        (self.folder / "theirs-bank").mkdir()
        chroma_folder(self.folder / "theirs-bank" / "rag_0", [their_entry()])
        data_json(self.folder / "damaged.json", [their_entry(), their_entry(label=None)])
        (self.folder / "team.yaml").write_text((ROOT / "src/latentmem/teams/autogen.yaml").read_text())
        with (self.folder / "released.yaml").open("a") as page:  # which says that these sections are to be added
            page.write(sections(read_weights(file, str(self.model_dir), template=TEMPLATE).settings))

    def smaller_python(self):
        """The page's lines as they stand, on the tiny model, with four tasks a split."""
        load, tasks = LanguageModel.from_pretrained, ReasoningDomain.tasks
        self.monkeypatch.setattr(LanguageModel, "from_pretrained", lambda name: load(str(self.model_dir), "cpu"))
        self.monkeypatch.setattr(ReasoningDomain, "tasks", lambda domain, split: tasks(domain, split)[:4])
        assert latentmem.Embedder  # loaded, so that the package has it back afterwards
        self.monkeypatch.setattr(latentmem, "Embedder", lambda: self.embed)

    def stand_ins(self):
        """The names that Python blocks take for granted."""
        message = Message(
            role="solver", system="s", user="u", response="4", token_ids=(1,), logps=(0.0,), finish="stop",
            temperature=1.0, num_prompt_tokens=2, recalled=Recalled(kind="none"),
        )  # fmt: skip
        domain = Toy()
        tasks = domain.tasks("train")
        trajectories = [
            Trajectory(
                task=task, team="solo", model="tiny", steps=(Step(messages=(message,), action="4", observation=""),),
                reward=1.0, success=True, seed=0,
            )
            for task in tasks
        ]  # fmt: skip
        bank = ExperienceBank(self.folder / "stored.sqlite", self.embed, embedder="fake")
        bank.add(trajectories)
        self.names |= {
            "embed": self.embed,
            "model": LanguageModel.from_pretrained(str(self.model_dir), "cpu", "float32"),
            "domain": domain,
            "tasks": tasks,
            "task": Task(id=None, domain="toy", text="2 + 2 ="),
            "trajectories": trajectories,
            "bank": bank,
            "team": load_team("autogen"),
            "mine": TextMemory(bank),
        }


@pytest.fixture
def reader(tmp_path, wordy_model_dir, fake_embed, no_embedding_model, monkeypatch, capsys):
    """A reader in a folder of its own, for whom every model is the tiny one and each answer a matter of luck."""
    from latentmem.environments.code.domain import CodeDomain
    from latentmem.environments.qa import QADomain

    monkeypatch.chdir(tmp_path)
    assert phase  # it has the real parse_config by now, and keeps it
    reader = Reader(tmp_path, wordy_model_dir, fake_embed, monkeypatch, capsys)
    for domain in (ReasoningDomain, QADomain, CodeDomain):
        monkeypatch.setattr(domain, "start", lambda self, task: Lucky())
    real = reading.parse_config

    def parse(values, source="configuration"):
        real(values, source)
        return real(reader.small(values), source)

    monkeypatch.setattr(reading, "parse_config", parse)
    monkeypatch.setattr("latentmem.config.parse_config", parse)
    yield reader
    reader.close()
