"""Seconds of the whole main path on a workload of fixed lengths, beside those of the authors' implementation.

The parts are those that the commands use: a team of two, SmolLM2-135M in float32, a bank to retrieve from, K = 8; to
evaluate, two candidates a task are rated by the model and one is recalled.
Prompts have 220 to 310 tokens, composer texts 300 to 600, every response 64 (nothing ends a response here, so the
amount of work is fixed); rewards are a hash of what was said, so that every group carries signal. Each phase runs in a
process of its own, whose highest resident memory is reported.

    python benchmarks/main_path.py [--rounds 3] [--threads N] [--out results.json]
    python benchmarks/main_path.py --quick --model FOLDER      a smoke run, seconds with a tiny model
"""

import argparse
import hashlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from latentmem.bank import ExperienceBank
from latentmem.config import Sampling
from latentmem.environments.environment import Outcome
from latentmem.evaluation import evaluate
from latentmem.memory.composer import Composer
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import NoMemory
from latentmem.memory.rating import Rater
from latentmem.models.embedder import Embedder
from latentmem.models.language_model import LanguageModel
from latentmem.rollout import rollout
from latentmem.teams.team import load_team
from latentmem.training.checkpoint_folder import Progress
from latentmem.training.lmpo import LMPOTrainer
from latentmem.trajectory import Task

ORIGINAL = {
    "collect": {"seconds_a_task": 21.0},
    "evaluate": {"seconds_a_task": 24.0},
    "lmpo": {"rollout_seconds": 346.0, "update_seconds": 185.0, "peak_mib": 18.9 * 1024},
}
"""The authors' implementation (github.com/KANABOON1/LatentMem) on work of these sizes: measured once on two cores of
this kind (AMD EPYC with AVX-512), same model, float32; not in the run of this script."""
WORDS = 95
"""Words of a task's text, such that prompts have 220 to 300 tokens."""


class Judge:
    """Gives each answer a reward that depends on every character of it."""

    instructions = "Give the final answer only."

    def __init__(self, task: Task) -> None:
        self.task = task

    def step(self, action: str) -> Outcome:
        digest = hashlib.sha256(f"{self.task.key}{action}".encode("utf-8", "replace")).digest()
        return Outcome(observation="", reward=digest[0] / 255, done=True, info={"extracted": action})


def make_tasks(name: str, count: int, words: int) -> list[Task]:
    generator = torch.Generator().manual_seed(int.from_bytes(name.encode(), "big") % 2**31)
    tasks = []
    for i in range(count):
        numbers = torch.randint(0, 100, (words // 5,), generator=generator).tolist()
        text = " ".join(f"shop {j} sold {n} apples," for j, n in enumerate(numbers))
        tasks.append(Task(id=f"{name}-{i}", domain="apples", text=f"{text} how many did all shops sell together?"))
    return tasks


class World:
    """The parts, made once a process."""

    def __init__(self, model: str, folder: Path, words: int, new_tokens: int) -> None:
        self.words = words
        self.model = LanguageModel.from_pretrained(model, dtype="float32")
        self.model.eos_ids = frozenset()
        self.team = load_team("autogen")
        self.sampling = Sampling(temperature=0.7, max_response_tokens=new_tokens)
        embedder = Embedder()
        self.bank = ExperienceBank(folder / "bank.sqlite", embedder, embedder=embedder.name)

    def memory(self, rated: bool = False) -> LatentMemory:
        """Filled with what a team said to other tasks, and a composer on the shared backbone."""
        short = Sampling(temperature=0.7, max_response_tokens=24)
        played = rollout(
            self.team, NoMemory(), self.model, make_tasks("past", 4, self.words // 2), Judge, sampling=short
        )
        self.bank.add(played.trajectories)
        composer = Composer(self.model, num_latents=8, max_prompt_tokens=600)
        rate = Rater(self.model) if rated else None
        return LatentMemory(self.bank, composer, num_retrieved=1, only_successes=False, rate=rate)


def lengths(world: World, messages: list[Any]) -> dict[str, list[int]]:
    """Shortest and longest, to see that the workload is what it says."""
    prompts = [message.num_prompt_tokens for message in messages]
    texts = [len(world.model.encode(message.recalled.text)) for message in messages]
    responses = [len(message.token_ids) for message in messages]
    return {name: [min(v), max(v)] for name, v in (("prompt", prompts), ("composer", texts), ("response", responses))}


def collect(world: World, size: argparse.Namespace) -> dict[str, Any]:
    tasks = make_tasks("task", size.batch, world.words)
    began = time.perf_counter()
    played = rollout(world.team, NoMemory(), world.model, tasks, Judge, sampling=world.sampling).trajectories
    world.bank.add(played)
    seconds = time.perf_counter() - began
    messages = [message for trajectory in played for message in trajectory.messages]
    return {"seconds_a_task": seconds / len(tasks), "tokens": lengths(world, messages)}


def evaluation(world: World, size: argparse.Namespace) -> dict[str, Any]:
    memory = world.memory(rated=True)
    tasks = make_tasks("task", size.batch, world.words)
    greedy = Sampling(temperature=0.0, max_response_tokens=world.sampling.max_response_tokens)
    began = time.perf_counter()
    results = evaluate(
        world.team, world.model, {"latent": memory}, SimpleNamespace(start=Judge), tasks=tasks, sampling=greedy,
        batch_size=size.batch,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    return {"seconds_a_task": seconds / len(tasks), **results["memories"][0]["seconds"]}


def lmpo(world: World, size: argparse.Namespace) -> dict[str, Any]:
    memory = world.memory()
    trainer = LMPOTrainer(
        memory, world.model, world.team, SimpleNamespace(start=Judge), tasks=make_tasks("task", 2, world.words),
        aside=[], sampling=world.sampling, num_steps=1, tasks_per_step=2, group_size=size.group,
        micro_batch_positions=size.positions, learning_rate=1e-4, schedule="constant", warmup_steps=0,
    )  # fmt: skip
    result = trainer.step(Progress())
    metrics = result.metrics
    assert result.moved, "no group carried signal"
    return {key: metrics[key] for key in ("rollout_seconds", "update_seconds", "first_ratio_max", "signal_groups")}


PHASES = {"collect": collect, "evaluate": evaluation, "lmpo": lmpo}


def run_phase(name: str, options: argparse.Namespace) -> None:
    """In a process of its own: one round, its figures as the last line."""
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        world = World(options.model, Path(folder), 20 if options.quick else WORDS, 5 if options.quick else 64)
        figures = PHASES[name](world, options)
        world.bank.close()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    print(json.dumps(figures | {"peak_mib": int(found[1]) / 1024, "threads": torch.get_num_threads()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--positions", type=int, default=512, help="micro_batch_positions of the update")
    parser.add_argument("--batch", type=int, default=8, help="tasks played side by side to collect and to evaluate")
    parser.add_argument("--only", choices=list(PHASES))
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: only to see that it works")
    parser.add_argument("--phase", choices=list(PHASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch, options.group = (2, 2) if options.quick else (options.batch, 8)
    if options.phase:
        run_phase(options.phase, options)
        return
    results: dict[str, Any] = {"model": options.model, "torch": torch.__version__, "original": ORIGINAL}
    chosen = [name for name in PHASES if options.only in (None, name)]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for _ in range(1 if options.quick else options.rounds):
        for name in chosen:  # in turn, so that a busy minute of the machine does not fall on one of them alone
            command = [sys.executable, __file__, *sys.argv[1:], "--phase", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
    for name, figures in rounds.items():
        results[name] = {}
        for key, value in figures[0].items():
            if not isinstance(value, float):
                results[name][key] = value
                print(f"{name + '.' + key:<32}{value}")
                continue
            median = statistics.median(round_[key] for round_ in figures)
            results[name][key] = median
            theirs = ORIGINAL[name].get(key)
            beside = f"   original {theirs:8.1f}   {theirs / median:6.1f} times" if theirs else ""
            print(f"{name + '.' + key:<32}{median:10.3f}{beside}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
