"""Check one GPU: the tests that are marked `gpu`, then steps of LMPO with a random model of Qwen3's shape, timed.

    python tests/gpu_check.py [--out FILE]             eight minutes at most on one GPU
    python tests/gpu_check.py --device cpu --tiny      the same path in seconds, to see that the script works

It needs no weights and no network: the model of 0.6 B parameters is drawn from a seed. It prints a table and writes
JSON (to `--out`, else to $OUT/gpu-check.json, else to gpu-check.json) after each part, so that a part that fails takes
nothing with it. The exit status is 1 if a part failed.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from latentmem import (
    Composer,
    ExperienceBank,
    LanguageModel,
    LatentMemory,
    LMPOTrainer,
    NoMemory,
    Outcome,
    Sampling,
    Task,
    load_team,
    rollout,
)
from latentmem.config import parse_config
from latentmem.models.agent import Prompt
from latentmem.models.embedder import HashingEmbedder
from latentmem.recipes import Planner
from latentmem.training.checkpoint_folder import Progress
from tiny_models import save_tokenizer

DENSE_BF16 = {"H100 80GB HBM3": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
"""TFLOP/s of bfloat16 products, dense, by a part of the card's name: from NVIDIA's data sheets. Others have no MFU."""
TEST_SECONDS, VLLM_SECONDS = 200, 150
"""Limits of the tests and of vLLM, so that all of it stays within eight minutes."""

SIZES = {
    "0.6B": {
        "model": {
            "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        },
        "tasks": 4, "group": 8, "words": 60, "response": 128, "positions": 8192, "rows": 64, "steps": 3,
    },
    "tiny": {
        "model": {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 400,
        },
        "tasks": 2, "group": 2, "words": 10, "response": 4, "positions": 512, "rows": 4, "steps": 2,
    },
}  # fmt: skip


def peak_tflops(card: str | None) -> int | None:
    """Return what a card can do at most, in TFLOP/s, or None where that is not in the table."""
    return next((tflops for part, tflops in DENSE_BF16.items() if card and part in card), None)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def about(device: str) -> dict[str, Any]:
    """The machine: card, driver, versions."""
    facts: dict[str, Any] = {
        "device": device, "python": platform.python_version(), "torch": torch.__version__, "card": None, "driver": None,
    }  # fmt: skip
    if device == "cuda":
        facts["card"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, check=False)
        facts["driver"] = found.stdout.split("\n")[0].strip() or None
    facts["peak_tflops"] = peak_tflops(facts["card"])
    return facts


def run_tests() -> dict[str, Any]:
    """The tests that are marked `gpu`."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", "tests/test_devices.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=TEST_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return {"summary": done.stdout.strip().splitlines()[-1]}


class Judge:
    """Pays each rollout another reward, whatever it says: a random model says nothing."""

    instructions = "Give the final answer only."
    numbers = count()

    def __init__(self, task: Task) -> None:
        self.task = task

    def step(self, action: str) -> Outcome:
        reward = next(self.numbers) * 7919 % 101 / 100
        return Outcome(observation="", reward=reward, done=True, info={"extracted": action})


class World:
    """The random model, a team, a bank of a few episodes and a composer."""

    def __init__(self, device: str, size: SimpleNamespace, folder: Path) -> None:
        self.device, self.size, self.folder = device, size, folder
        save_tokenizer(folder, vocab_size=320)
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        shape = Qwen3Config(**size.model, max_position_embeddings=8192, tie_word_embeddings=True, **ends)
        shape.save_pretrained(folder)
        torch.manual_seed(0)
        with torch.device(device):
            drawn = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        self.model = LanguageModel(drawn, AutoTokenizer.from_pretrained(folder), "qwen3-shaped")
        self.model.eos_ids = frozenset()  # every response has its full length
        self.team = load_team("autogen")
        self.sampling = Sampling(temperature=1.0, max_response_tokens=size.response)
        bank = ExperienceBank(folder / "bank.sqlite", HashingEmbedder(), embedder="hashing")
        past = rollout(
            self.team, NoMemory(), self.model, self.tasks("past", 4), Judge,
            sampling=Sampling(temperature=1.0, max_response_tokens=8),
        )  # fmt: skip
        bank.add(past.trajectories)
        composer = Composer(self.model, num_latents=8, max_prompt_tokens=1024)
        self.memory = LatentMemory(bank, composer, num_retrieved=1, only_successes=False)
        self.layers = sum(p.numel() for p in drawn.model.layers.parameters() if not p.requires_grad)

    def tasks(self, name: str, number: int) -> list[Task]:
        texts = [" ".join(f"shop {j} sold {7 * i + j} apples," for j in range(self.size.words // 5)) for i in range(number)]  # fmt: skip  # noqa: E501
        return [Task(id=f"{name}-{i}", domain="apples", text=f"{text} how many?") for i, text in enumerate(texts)]

    def generate(self) -> dict[str, Any]:
        """Tokens a second, prompts read included."""
        tasks = self.tasks("ask", self.size.rows)
        prompts = [Prompt("agent", "Solve it.", task.text, task.key, i) for i, task in enumerate(tasks)]
        seconds = []
        for _ in range(2):
            synchronize(self.device)
            began = time.perf_counter()
            said = self.model.respond(prompts, self.sampling)
            synchronize(self.device)
            seconds.append(time.perf_counter() - began)
        tokens = sum(len(response.token_ids) for response in said)
        prompt = max(response.num_prompt_tokens for response in said)
        return {"rows": len(said), "prompt_tokens": prompt, "tokens": tokens, "tokens_a_second": tokens / min(seconds)}

    def train(self) -> dict[str, Any]:
        """Steps of LMPO: seconds, memory beside the plan's, waits for the GPU, and the products of the update."""
        size = self.size
        trainer = LMPOTrainer(
            self.memory, self.model, self.team, SimpleNamespace(start=Judge), tasks=self.tasks("task", size.tasks),
            aside=[], sampling=self.sampling, num_steps=size.steps + 1, tasks_per_step=size.tasks,
            group_size=size.group, micro_batch_positions=size.positions,
        )  # fmt: skip
        played: list[Any] = []
        play = trainer._play

        def remembering(*arguments: Any) -> Any:
            played.append(play(*arguments))
            return played[-1]

        trainer._play = remembering  # type: ignore[method-assign]
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        metrics = []
        for step in range(size.steps):
            result = trainer.step(Progress(step=step))
            assert result.moved, "the parameters did not move"
            metrics.append(result.metrics)
        later = metrics[1:]  # the first one compiles and allocates
        messages = [message for t in played[-1].trajectories for message in t.messages]
        texts = {message.recalled.text for message in messages}
        composed = sum(len(self.model.encode(text)) + 8 for text in texts)
        tokens = sum(len(message.token_ids) for message in messages)
        scored = tokens + 8 * len(messages)
        # Weights are frozen: a product forward, and one backward for its input. Attention is left out.
        flops = 4 * self.layers * (composed + scored) + 4 * self.model.width * size.model["vocab_size"] * tokens
        update = median(found["update_seconds"] for found in later)
        figures = {
            "seconds_a_step": median(found["rollout_seconds"] + found["update_seconds"] for found in later),
            "rollout_seconds": median(found["rollout_seconds"] for found in later),
            "update_seconds": update,
            "update_tflops": flops / update / 1e12,
            "response_tokens": tokens,
            "composed_tokens": composed,
            "prompt_tokens": max(message.num_prompt_tokens for message in messages),
            "first_ratio_max": max(found["first_ratio_max"] for found in metrics),
            "planned_mib": self.planned(messages, texts) / 2**20,
            "peak_mib": None,
            "waits": None,
        }
        if self.device == "cuda":
            figures["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                trainer.step(Progress(step=size.steps))
                torch.cuda.set_sync_debug_mode("default")
            figures["waits"] = sum("synchroniz" in str(warning.message) for warning in told)
        return figures

    def planned(self, messages: list[Any], texts: set[str]) -> int:
        """What the plan of this step says, without gaps and a CUDA context: what torch's own count is compared with."""
        size = self.size
        config = parse_config(
            {
                "run": str(self.folder / "none"),
                "data": {"kind": "hidden_facts"},
                "model": {"name": str(self.folder), "device": self.device, "dtype": "bfloat16", "fused": "never"},
                "bank": {"embedder": "hashing"},
                "sampling": self.sampling.model_dump(),
                "lmpo": {
                    "tasks_per_step": size.tasks,
                    "group_size": size.group,
                    "micro_batch_positions": size.positions,
                },
            }
        )
        prompt = max(message.num_prompt_tokens for message in messages)
        text = max(len(self.model.encode(text)) for text in texts)
        return Planner(config, prompt_tokens=prompt, composer_tokens=text).plan().peaks["train lmpo"].total


VLLM = """
import json, sys, time
import torch
from vllm import LLM, SamplingParams
folder, rows, length, new, width = sys.argv[1], *map(int, sys.argv[2:])
llm = LLM(folder, load_format="dummy", dtype="bfloat16", enable_prompt_embeds=True, max_model_len=8192,
          gpu_memory_utilization=0.3)
prompts = [{"prompt_embeds": torch.randn(length, width, dtype=torch.bfloat16)} for _ in range(rows)]
asked = SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True)
llm.generate(prompts[:1], asked)
began = time.perf_counter()
said = llm.generate(prompts, asked)
seconds = time.perf_counter() - began
print(json.dumps({"tokens_a_second": sum(len(r.outputs[0].token_ids) for r in said) / seconds}))
"""


def run_vllm(world: World, prompt_tokens: int) -> dict[str, Any]:
    """Tokens a second of vLLM on the same shape, from embeddings, in a process of its own; only where it is there."""
    if importlib.util.find_spec("vllm") is None:
        return {"skipped": "vllm is not installed"}
    numbers = (world.size.rows, prompt_tokens, world.size.response, world.size.model["hidden_size"])
    command = [sys.executable, "-c", VLLM, str(world.folder), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=VLLM_SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in place of 0.6 B")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU; `--device cpu --tiny` shows that the script works", file=sys.stderr)
        return 2
    name = "tiny" if options.tiny else "0.6B"
    size = SimpleNamespace(**SIZES[name])
    out = options.out or Path(os.environ.get("OUT", "."), "gpu-check.json")
    results: dict[str, Any] = {"model": name, "failed": []}

    def part(title: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            found = work()
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[-4000:]}
            results["failed"].append(title)
        results[title] = found | {"seconds": time.perf_counter() - began}
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        return results[title]

    machine = part("machine", lambda: about(options.device))
    if options.device == "cuda":
        part("tests", run_tests)
    with tempfile.TemporaryDirectory() as folder:
        made: list[World] = []

        def build() -> dict[str, Any]:
            made.append(World(options.device, size, Path(folder)))
            return {"parameters": sum(p.numel() for p in made[0].model.model.parameters() if not p.requires_grad)}

        part("build", build)
        if made:
            world = made[0]
            generation = part("generation", world.generate)
            training = part("lmpo", world.train)
            limit = machine.get("peak_tflops")
            training["update_mfu"] = (
                training["update_tflops"] / limit if limit and "update_tflops" in training else None
            )
            part("vllm", lambda: run_vllm(world, generation.get("prompt_tokens", 256)))
            world.memory.bank.close()
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for title, found in results.items():
        if isinstance(found, dict):
            for key, value in found.items():
                print(f"{title + '.' + key:28} {f'{value:,.3f}' if isinstance(value, float) else value}")
    print(f"{'written to':28} {out}")
    if results["failed"]:
        print(f"failed: {', '.join(results['failed'])}", file=sys.stderr)
    return bool(results["failed"])


if __name__ == "__main__":
    sys.exit(main())
