"""Kills and full disks against an undisturbed run: whatever happens on the way, the end is the same, bit for bit.

    python tests/interruption/interruption.py kills       SIGKILL at 20 random moments, and while files are being saved
    python tests/interruption/interruption.py full-disks  a real file system (tmpfs) that fills up while files are saved

Both run the real commands (collect, train sft, train lmpo, evaluate) in processes of their own, with a tiny random
model and the real embedder. A command that was killed or refused is given again, the very same, until it ends.
`IGNORED` lists all that may differ from the undisturbed run; everything else is compared. Exit status 0 if nothing
else differs.

Options: --seed N of the moments (default: drawn, and printed); --kills N; --work FOLDER to keep the runs there, in
which case the undisturbed run is not made again; --warm to fork each process off one that has imported torch already,
which is less like real life and several times as fast.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import deeds

from latentmem.bank import ExperienceBank
from latentmem.memory.checkpoints import read_checkpoint

HERE = Path(__file__).resolve().parent

PHASES = {"collect": ["collect"], "sft": ["train", "sft"], "lmpo": ["train", "lmpo"], "evaluate": ["evaluate"]}

TEAM = """
name: pair
description: One guesses, the other answers.
agents:
  - {role: guesser, profile: Guesses., system: Guess., user: '{task}'}
  - {role: answerer, profile: Answers., reads: [guesser], system: Answer., user: '{task} {messages}'}
answer: answerer
"""
CONFIG = """
run: {run}
team: {team}
model: {{name: {model}, device: cpu, dtype: float32}}
data:
  kind: reasoning_gym
  families: [{{name: gcd, params: {{min_numbers: 2, max_numbers: 2, min_value: 1, max_value: 40}}}}]
  train_size: 96
  test_size: 16
composer: {{num_latents: 3, rank: 2, max_prompt_tokens: 600, template: '{{task}} {{memory}} {{role_messages}}'}}
bank: {{num_retrieved: 2, only_successes: false}}
sampling: {{temperature: 1.0, max_response_tokens: 2}}
collect: {{num_tasks: 96, batch_size: 8, rollouts_per_task: 2, memory: text}}
sft: {{num_steps: 30, trajectories_per_step: 4, save_every: 2, eval_every: 10, eval_tasks: 16}}
lmpo: {{num_steps: 16, tasks_per_step: 3, group_size: 4, save_every: 2, eval_every: 4, eval_tasks: 8, initial: sft}}
evaluate: {{memories: [none, text, 'latent:sft', 'latent:lmpo'], batch_size: 2, online: true, num_bootstraps: 200}}
"""

IGNORED = {
    "metrics.jsonl": "rollout_seconds and update_seconds of a line",
    "results.json": "`run`, and of each memory its seconds and peak_memory_mb",
    "evaluate/*.costs": "all but num_tasks: times and memory",
    "run.json": "`started`",
    "config.yaml": "`run`, the folder's own name",
    ".lock": "the number of the last process",
    "*.sqlite": "the bytes, and of its table `meta` the values of created and generation; every other row of every "
    "table is compared, and `bank export` byte for byte",
    "*.sqlite.index, *.sqlite-wal, *.sqlite-shm": "whether they are there, and their bytes; `bank verify` reads them",
    "report/": "what its files hold: pictures and tables of times, and a random nonce",
}
"""What is not compared, by file."""

AIMED = {
    "collect": [r"sql (INSERT INTO traj|COMMIT)", r"sql (INSERT INTO traj|COMMIT)", r" \S*/collect/|metrics|\.index"],
    "sft": [r" \S*/checkpoints/", r" \S*/checkpoints/", r"(rename|rmtree) \S*/checkpoints/"],
    "lmpo": [r" \S*/checkpoints/", r" \S*/checkpoints/", r"(rename|rmtree) \S*/checkpoints/"],
    "evaluate": [r" \S*/evaluate/\S*(jsonl|costs|fresh)", r"sql (INSERT INTO traj|COMMIT)", r" \S*/report/|results"],
}
"""What a process is killed at, besides random moments; saving takes too small a share of the time to be hit often."""


class World:
    """A folder with a model, and how to run commands in it."""

    def __init__(self, folder: Path, warm: bool) -> None:
        self.folder, self.warm = folder, warm
        if not (folder / "model").exists():
            make_model(folder / "model")
        (folder / "team.yaml").write_text(TEAM, encoding="utf-8")
        self.environment = {
            **os.environ,
            "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),  # many short processes: each would compile all of torch
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def start(self, run: Path, phase: str, deed: dict[str, Any] | None = None) -> "Process":
        """Give a phase's command for a run folder, with a deed or without."""
        config = self.folder / f"{run.name}.yaml"
        values = {"run": run, "team": self.folder / "team.yaml", "model": self.folder / "model"}
        config.write_text(CONFIG.format(**values), encoding="utf-8")
        return Process([*PHASES[phase], str(config)], deed, self, run)

    def whole(self) -> Path:
        """The undisturbed run, with a copy of its folder and the seconds of work after each phase."""
        run = self.folder / "whole"
        if not self.after("evaluate").exists():
            shutil.rmtree(run, ignore_errors=True)
            seconds = {}
            for phase in PHASES:
                process = self.start(run, phase)
                process.wait_until_open()
                began = time.monotonic()
                process.must_end()
                seconds[phase] = time.monotonic() - began
                print(f"{phase}: {process.last_words()} ({seconds[phase]:.1f} s of work)", flush=True)
                (self.folder / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
                shutil.copytree(run, self.after(phase), dirs_exist_ok=True)
        return run

    def after(self, phase: str) -> Path:
        """A copy of the undisturbed run as it was after a phase."""
        return self.folder / f"whole-after-{phase}"

    def seconds(self, phase: str) -> float:
        """How long the undisturbed phase had its run folder open."""
        return float(json.loads((self.folder / "seconds.json").read_text(encoding="utf-8"))[phase])


class Process:
    """One command at work."""

    def __init__(self, words: list[str], deed: dict[str, Any] | None, world: World, run: Path) -> None:
        self.run = run
        self.files = [world.folder / name for name in ("stdout", "stderr")]
        self.deed = deed
        sys.stdout.flush()
        self.child = multiprocessing.get_context("fork").Process(target=self._become, args=(words, world))
        self.child.start()

    def _become(self, words: list[str], world: World) -> None:
        for handle, path in enumerate(self.files, start=1):
            os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), handle)
        if world.warm:
            os.environ.update(world.environment)
            sys.stdout, sys.stderr = (open(handle, "w", encoding="utf-8") for handle in (1, 2))  # noqa: SIM115
            deeds.run(self.deed, words)
        else:
            program = ["-m", "latentmem.cli"] if self.deed is None else [deeds.__file__, json.dumps(self.deed)]
            os.execve(sys.executable, [sys.executable, *program, *words], world.environment)

    def wait_until_open(self) -> None:
        """Come back when the process has its run folder open, or has ended."""
        lock, mine = self.run / ".lock", f"{self.child.pid}\n"
        while self.child.exitcode is None and not (lock.exists() and lock.read_text(encoding="ascii") == mine):
            time.sleep(0.005)

    def kill_at(self, moment: float) -> bool:
        """Kill it so many seconds after it has opened its run; False if it had ended by then."""
        self.wait_until_open()
        end = time.monotonic() + moment
        while self.child.exitcode is None and time.monotonic() < end:  # join takes exec for the end
            time.sleep(0.002)
        self.child.kill()
        return self.was_killed()

    def status(self) -> int:
        """Wait for its end."""
        self.child.join()
        assert self.child.exitcode is not None
        return self.child.exitcode

    def was_killed(self) -> bool:
        """Wait for its end; False if it ended by itself, and well."""
        status = self.status()
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"exit status {status}\n{self.text('stderr')}")
        return status != 0

    def must_end(self) -> None:
        """Wait for its good end."""
        if self.was_killed():
            raise SystemExit("killed by someone else")

    def text(self, name: str) -> str:
        return next(f for f in self.files if f.name == name).read_text(encoding="utf-8")

    def last_words(self) -> str:
        return ([""] + [line for line in self.text("stdout").splitlines() if ": " in line])[-1]

    def first_words(self) -> str:
        """Where it said that it goes on, or that there is nothing to do; empty if it did not come to that."""
        lines = [*self.text("stderr").splitlines(), *self.text("stdout").splitlines()]
        bars = [re.sub(r"\|.*\|", "", line.split("[")[0]) for line in lines if "%|" in line]
        return " ".join(([line for line in lines if "finished already" in line] + bars + [""])[0].split())[:60]


# Kills


def kills(world: World, num_random: int, seed: int) -> int:
    """Kill a run again and again; returns the number of differences from the undisturbed one."""
    draw = random.Random(seed)
    print(f"seed {seed}; {num_random} kills at random moments, and {sum(map(len, AIMED.values()))} while saving")
    whole, run = world.whole(), world.folder / "killed"
    shutil.rmtree(run, ignore_errors=True)
    phases = list(PHASES)
    plan: dict[str, list[dict[str, Any] | float]] = {
        phase: [draw.uniform(0, world.seconds(phase)) for _ in range(i, num_random, len(phases))]
        + [
            {"at": at, "number": draw.randint(1, 12), "kill_after": draw.choice([0, draw.uniform(0, 4e-3)])}
            for at in AIMED[phase]
        ]
        for i, phase in enumerate(phases)
    }
    print(f"\n{'':>3}  {'phase':8}  {'killed':34}  {'the next start said':40}  found there")
    number, problems = 0, []
    row = ""
    for before, phase in zip([None, *phases], phases, strict=False):
        left = plan[phase]
        draw.shuffle(left)
        reached: dict[str, int] = {}
        while left:
            kill = left[0]
            process = world.start(run, phase, kill if isinstance(kill, dict) else None)
            killed = process.kill_at(kill) if isinstance(kill, float) else process.was_killed()
            if row:
                print(row.format(said=process.first_words() or "(killed before it said anything)"), flush=True)
            row = ""
            if killed:
                left.pop(0)
                number += 1
                moment = f"{kill:.2f} s after opening" if isinstance(kill, float) else _moment(kill)
                row = f"{number:3}  {phase:8}  {moment:34}  {{said:40}}  {_found(run, phase)}"
                problems += [f"after kill {number}: {problem}" for problem in lost(run, world.after(phase), reached)]
                continue
            # The phase ended first; the kills that are left get another beginning.
            problems += different(run, world.after(phase))
            shutil.rmtree(run)
            reached = {}
            if before is not None:
                shutil.copytree(world.after(before), run)
            if isinstance(kill, dict):
                kill["number"] = draw.randint(1, max(1, kill["number"] - 1))
        process = world.start(run, phase)
        process.must_end()
        if row:
            print(row.format(said=process.first_words()), flush=True)
        row = ""
        problems += different(run, world.after(phase))
    return _verdict(f"{number} kills (seed {seed})", problems + different(run, whole))


def _moment(deed: dict[str, Any]) -> str:
    what = deed["at"].replace("\\S*", "").replace("INSERT INTO traj", "INSERT").strip()
    return f"{deed['number']}. '{what[:18]}' + {1e3 * deed['kill_after']:.1f} ms"


def _found(run: Path, phase: str) -> str:
    """What a killed process left behind, in few words."""
    told = []
    for name, key in (("state.json", "tasks"), ("checkpoints/progress.json", "step")):
        path = run / phase / name
        if path.exists() and (value := json.loads(path.read_text(encoding="utf-8")).get(key)) is not None:
            told.append(f"{key} {value}")
    if phase == "evaluate":
        told.append(f"batches {sum(len(_lines(path)) for path in (run / phase).glob('*.costs'))}")
    newest = (
        json.loads((run / phase / "checkpoints/progress.json").read_text())["step"] if "step" in " ".join(told) else -1
    )
    for path in sorted([*run.glob("*"), *(run / phase).rglob("*")]):
        unnamed = path.parent.name == "checkpoints" and path.name.startswith("step-") and int(path.name[5:]) > newest
        if unnamed or path.suffix in (".tmp", ".fresh") or path.name.startswith("batch-"):
            told.append(path.name)
        elif path.name.endswith("-wal") and path.stat().st_size:
            told.append(f"{path.name} {path.stat().st_size >> 10} kB")
    return ", ".join(told) or "nothing yet"


# What must hold at any moment, and at the end


def lost(run: Path, whole: Path, reached: dict[str, int]) -> Iterator[str]:
    """What a dead process had acknowledged and is not there now, or is not as in the undisturbed run.

    It looks at copies, so that the next process finds the folder as the dead one left it. `reached` says how far the
    run had come when it was last looked at, and is brought up to now.
    """
    if not run.exists():
        return

    def count(what: str, number: int) -> Iterator[str]:
        if number < reached.get(what, 0):
            yield f"{what}: {number}, fewer than before, {reached[what]}"
        reached[what] = number

    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "run"
        shutil.copytree(run, copy)
        metrics = _metrics(copy)
        state = json.loads((copy / "collect/state.json").read_text()) if (copy / "collect/state.json").exists() else {}
        stored = [
            row["stored"] for row in metrics if row["phase"] == "collect" and row["step"] <= state.get("tasks", 0)
        ]
        for path in sorted(copy.rglob("*.sqlite")):
            with closing(sqlite3.connect(path)) as db:
                begun = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if not begun and not stored:  # its tables were never committed; the next process begins it anew
                continue
            with ExperienceBank(path) as bank:
                report = bank.verify()
                yield from (f"{path.name}: {problem}" for problem in report.problems)
                ours, theirs = list(bank), list(ExperienceBank(_copied(whole / path.relative_to(copy), Path(name))))
            if path.name == "bank.sqlite" and len(ours) < max(stored, default=0):
                yield f"{path.name} has {len(ours)} trajectories, {stored[-1]} were acknowledged"
            yield from count(f"trajectories in {path.name}", len(ours))
            if ours != theirs[: len(ours)]:
                yield f"{path.name}: its {len(ours)} trajectories are not the first of the undisturbed run's"
        for trainer in ("sft", "lmpo"):
            folder = copy / trainer / "checkpoints"
            if (folder / "progress.json").exists():
                progress = json.loads((folder / "progress.json").read_text())
                for step in {progress["step"], progress["best_step"]} - {None}:
                    read_checkpoint(folder / f"step-{step:06d}")
                    if not (folder / f"step-{step:06d}/optimizer.safetensors").exists():
                        yield f"{trainer}: step {step} has no optimizer"
                yield from count(f"{trainer}: steps saved", progress["step"])
                steps = {row["step"] for row in metrics if row["phase"] == trainer}
                if not steps >= set(range(1, progress["step"] + 1)):
                    yield f"{trainer}: the checkpoint is of step {progress['step']}, the metrics lack steps before it"
        for path in (copy / "evaluate").glob("*.costs"):
            counted = sum(json.loads(line)["num_tasks"] for line in _lines(path))
            yield from count(f"tasks in {path.name}", counted)
            lines = _lines(path.with_suffix(".jsonl"))
            if lines[:counted] != _lines(whole / "evaluate" / f"{path.stem}.jsonl")[:counted] or len(lines) < counted:
                yield f"{path.name} counts {counted} tasks, whose trajectories are not those of the undisturbed run"


def different(run: Path, whole: Path) -> list[str]:
    """Every way in which two run folders differ, but for what `IGNORED` lists."""
    problems = []
    listings = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} for folder in (run, whole)
    ]
    ours, theirs = ({n for n in names if not n.endswith(("-wal", "-shm", ".sqlite.index"))} for names in listings)
    problems += [f"{name}: only in the killed run" for name in sorted(ours - theirs)]
    problems += [f"{name}: only in the undisturbed run" for name in sorted(theirs - ours)]
    with tempfile.TemporaryDirectory() as scratch:
        for name in sorted(ours & theirs):
            left, right = (_compared(folder, name, Path(scratch)) for folder in (run, whole))
            if left != right:
                problems.append(f"{name}: differs from the undisturbed run's")
    return [f"{run.name} after {whole.name.rpartition('-')[2]}: {problem}" for problem in problems]


def _compared(folder: Path, name: str, scratch: Path) -> Any:
    """Of a file of the run, what is compared."""
    path = folder / name
    if name == ".lock" or name.startswith("report/"):
        return None
    if name == "metrics.jsonl":
        return _metrics(folder)
    if name.endswith(".costs"):
        return [json.loads(line)["num_tasks"] for line in _lines(path)]
    if name == "run.json":
        return {key: value for key, value in json.loads(path.read_bytes()).items() if key != "started"}
    if name == "results.json":
        results = json.loads(path.read_bytes())
        memories = [
            {k: v for k, v in row.items() if k not in ("seconds", "peak_memory_mb")} for row in results["memories"]
        ]
        return {key: value for key, value in results.items() if key != "run"} | {"memories": memories}
    if name == "config.yaml":
        return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("run: ")]
    if name.endswith(".sqlite"):
        return _bank(_copied(path, scratch))
    return path.read_bytes()


def _bank(path: Path) -> Any:
    """Every row of a bank's tables, and its export."""
    with ExperienceBank(path) as bank:
        if not bank.verify().ok:
            return bank.verify()
        bank.export(path.with_suffix(".jsonl"))
    with closing(sqlite3.connect(path)) as db:
        tables = {
            "trajectories": db.execute("SELECT * FROM trajectories ORDER BY seq").fetchall(),
            "roles": db.execute("SELECT * FROM roles ORDER BY seq, role").fetchall(),
            "meta": db.execute("SELECT * FROM meta WHERE key NOT IN ('created', 'generation') ORDER BY key").fetchall(),
        }
    return tables, path.with_suffix(".jsonl").read_bytes()


def _copied(path: Path, scratch: Path) -> Path:
    """A bank's files copied, under a name of their own."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    for tail in ("", "-wal", "-shm", ".index"):
        if (file := path.with_name(path.name + tail)).exists():
            shutil.copy(file, folder)
    return folder / path.name


def _metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in _lines(folder / "metrics.jsonl")]
    return [{k: v for k, v in row.items() if k not in ("rollout_seconds", "update_seconds")} for row in rows]


def _lines(path: Path) -> list[bytes]:
    """The whole lines of a file; none where there is none. A torn last line was never acknowledged."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _verdict(what: str, problems: list[str]) -> int:
    print(f"\nnot compared: {'; '.join(f'{name}: {what}' for name, what in IGNORED.items())}")
    for problem in problems:
        print(problem)
    print(f"{what}: {len(problems)} differences from the undisturbed run")
    return len(problems)


# Full disks

LAST_OF_A_PAGE = -1
"""Stands for the size of metrics.jsonl when the next line needs a page more; a full disk has room up to there."""
FULL: list[tuple[str, dict[str, Any] | None, str]] = [
    ("collect", None, ".lock: cannot be written"),
    ("collect", {"at": r"open \S*/\.batch-", "number": 2}, r"collect/batch-000004.jsonl: cannot be written"),
    ("collect", {"at": "sql INSERT INTO traj", "number": 2}, "bank.sqlite: disk is full"),
    ("sft", {"at": r"open \S*/\.composer.safetensors", "number": 2, "left": 4096}, "composer.safetensors: cannot be"),
    ("sft", {"at": r"open \S*metrics", "number": 1, "size": LAST_OF_A_PAGE}, "metrics.jsonl: cannot be added to"),
    ("sft", {"at": r"open \S*/\.optimizer.safetensors", "number": 2, "left": 8192}, "optimizer.safetensors: cannot be"),
    ("sft", {"at": r"open \S*/\.progress.json", "number": 2}, "progress.json: cannot be written"),
    ("lmpo", {"at": r"open \S*/\.composer.safetensors", "number": 3}, "composer.safetensors: cannot be written"),
    ("evaluate", {"at": r"open \S*evaluate/text\.jsonl", "number": 1}, "evaluate/text.jsonl: cannot be added to"),
    (
        "evaluate",
        {"at": r"connect \S*latent-sft.fresh", "number": 1},
        "latent-sft.fresh: the bank cannot be copied here",
    ),
    ("evaluate", {"at": r"open \S*latent-sft.costs", "number": 1}, "latent-sft.costs: cannot be added to"),
    ("evaluate", {"at": r"open \S*/\.results.json", "number": 1}, "results.json: cannot be written"),
    ("evaluate", {"at": r"open \S*/report/\.", "number": 2}, "report/"),
]
"""Where the disk fills up (None: before the start), and what the command then says."""


def full_disks(world: World) -> int:
    """Fill the disk while each kind of file is written; returns the number of differences from the undisturbed run."""
    whole, disk = world.whole(), world.folder / "small-disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    try:
        return _full_disks(world, whole, disk)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _full_disks(world: World, whole: Path, disk: Path) -> int:
    run, ballast = disk / "run", disk / "ballast"
    print(f"a disk of 24 MB that fills up {len(FULL)} times")
    problems: list[str] = []
    reached: dict[str, int] = {}
    for i, (phase, deed, expected) in enumerate(FULL):
        if deed is None:
            deeds.fill_disk(ballast, 0)
        if deed is not None:
            deed = {**deed, "fill": str(ballast)}
            if deed.get("size") == LAST_OF_A_PAGE:
                deed["size"] = _size_before_the_next_page(world.after(phase) / "metrics.jsonl", phase)
        process = world.start(run, phase, deed)
        status = process.status()
        said = process.text("stderr").splitlines()
        errors = [line.replace(f"{disk}/", "") for line in said if line.startswith("latentmem: ")]
        print(f"{phase:8}  status {status}  {'; '.join(errors)}", flush=True)
        if status != 2 or len(errors) != 1 or expected not in errors[0] or "ree some" not in errors[0]:
            problems.append(
                f"{phase}: expected status 2 and one line with {expected!r}, found {status} and {said[-30:]}"
            )
        problems += [f"full disk, {phase}: {problem}" for problem in lost(run, world.after(phase), reached)]
        ballast.unlink(missing_ok=True)
        if i + 1 == len(FULL) or FULL[i + 1][0] != phase:
            world.start(run, phase).must_end()
            problems += different(run, world.after(phase))
    return _verdict(f"{len(FULL)} full disks", problems + different(run, whole))


def _size_before_the_next_page(metrics: Path, phase: str) -> int:
    size = 0
    for line in _lines(metrics):
        end = size + len(line) + 1
        if json.loads(line)["phase"] == phase and size // deeds.PAGE != (end - 1) // deeds.PAGE:
            return size
        size = end
    raise ValueError(f"no line of {phase} in {metrics} goes over the end of a page")


def make_model(folder: Path) -> None:
    """A random Llama of 2 layers and width 32 that likes to say 1, the answer of every other task."""
    import torch
    from transformers import LlamaForCausalLM

    sys.path.append(str(HERE.parent))
    from tiny_models import llama_config, save_tokenizer

    folder.mkdir()
    config = llama_config(save_tokenizer(folder, vocab_size=320), tied=False)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    with torch.no_grad():
        # One dimension is the same for every token, and so a bias of the output.
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight[:, 0] = 0.0
        for text, bias in (("1", 4.2), ("2", 3.8), ("3", 3.6), ("<|im_end|>", 4.1)):
            model.lm_head.weight[vocabulary[text], 0] = bias
    model.save_pretrained(folder)


@contextmanager
def _work_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name).resolve()


def _in_a_namespace_of_mounts() -> None:
    """Start this script again where it may mount a disk of its own, which nobody else sees."""
    if os.environ.get("LATENTMEM_TEST_NAMESPACE"):
        return
    options = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
    if subprocess.run(["unshare", *options, "true"], check=False, capture_output=True).returncode:
        raise SystemExit(NO_NAMESPACE)
    os.environ["LATENTMEM_TEST_NAMESPACE"] = "1"
    os.execvp("unshare", ["unshare", *options, sys.executable, *sys.argv])


NO_NAMESPACE = "no full disk can be made here: neither root nor user namespaces"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kills", "full-disks"))
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--warm", action="store_true")
    options = parser.parse_args()
    if options.what == "full-disks":
        _in_a_namespace_of_mounts()
    with _work_folder(options.work) as folder:
        world = World(folder, options.warm)
        if options.warm:
            import reasoning_gym  # noqa: F401
            import sentence_transformers  # noqa: F401

            import latentmem.recipes  # noqa: F401
        if options.what == "full-disks":
            return min(1, full_disks(world))
        seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
        return min(1, kills(world, options.kills, seed))


if __name__ == "__main__":
    sys.exit(main())
