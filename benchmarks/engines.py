"""New tokens a CPU second: the model in this process, a server of vLLM and transformers' `generate`, asked alternately.

The server runs on this machine (`latentmem engine start`); the CPU time of all processes below `--pid` counts, and that
of this process. Shared prompts are those of a step of LMPO: groups of 8 with one prompt and its latents. At the end,
whole steps with and without the server.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from processes import cpu_seconds

from latentmem import Composer, ExperienceBank, LatentMemory, LMPOTrainer, Outcome, Split, Task, load_team
from latentmem.config import Sampling
from latentmem.engines.vllm import VLLMEngine
from latentmem.models.agent import Prompt
from latentmem.models.embedder import HashingEmbedder
from latentmem.models.language_model import LanguageModel


def prompts_of(model: LanguageModel, batch: int, shared: bool, length: int, seed: int) -> list[Prompt]:
    """Prompts of some `length` words; shared: groups of 8 have one prompt and its latents, as in a step of LMPO."""
    generator = torch.Generator().manual_seed(seed)
    words = ["lamp", "tower", "river", "gold", "mill", "stone", "wind", "salt"]
    group_size = 8 if shared else 1
    rows = []
    for g in range(batch // group_size):
        picks = torch.randint(0, len(words), (length,), generator=generator).tolist()
        latents = 0.1 * torch.randn(8, model.width, generator=generator)
        text = " ".join(words[i] for i in picks)
        rows += [
            Prompt("a", "Be brief.", text, f"group {seed} {g}", seed * 1000 + g * 8 + i, latents)
            for i in range(group_size)
        ]
    return rows


@torch.no_grad()
def generate(model: LanguageModel, prompts: list[Prompt], new: int) -> int:
    """Sample with transformers' own `generate` from the same rows [prompt ; m]; return the number of new tokens."""
    embed = model.model.get_input_embeddings()
    rows = [torch.cat([embed(torch.tensor(model.prompt_ids(p))), p.latents]) for p in prompts]
    longest = max(map(len, rows))
    padded = torch.stack([torch.cat([row.new_zeros(longest - len(row), row.shape[1]), row]) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    made = model.model.generate(
        inputs_embeds=padded,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=new,
        pad_token_id=model.tokenizer.eos_token_id,
    )
    return sum(_length(row, model.eos_ids) for row in made.tolist())


def _length(row: list[int], eos_ids: frozenset[int]) -> int:
    return next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=None, help="address of the server; without one there is nothing to compare")
    parser.add_argument("--pid", type=int, default=None, help="process of the server")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.url is None or options.pid is None:
        print("start a server with `latentmem engine start CONFIG`, and give its --url and --pid")
        return
    model = LanguageModel.from_pretrained(options.model, device="cpu", dtype="float32")
    engine = VLLMEngine(model, [options.url])
    sampling = Sampling(temperature=1.0, max_response_tokens=options.new)

    def tokens_of(name: str, prompts: list[Prompt]) -> int:
        if name == "generate":
            return generate(model, prompts, options.new)
        asked = engine if name == "vllm" else model
        return sum(len(response.token_ids) for response in asked.respond(prompts, sampling))

    def timed(name: str, work: Callable[[], int]) -> float:
        """Work for each CPU second, of this process and for vLLM of the server too."""
        began = time.process_time() + cpu_seconds(options.pid) * (name == "vllm")
        done = work()
        return done / (time.process_time() + cpu_seconds(options.pid) * (name == "vllm") - began)

    found = []
    for batch in options.batches:
        for shared in (True, False):
            rates: dict[str, list[float]] = {"local": [], "vllm": [], "generate": []}
            for round_ in range(options.rounds + 1):
                prompts = prompts_of(model, batch, shared, options.length, round_ + 100 * batch + 7 * shared)
                for name, values in rates.items():
                    rate = timed(name, partial(tokens_of, name, prompts))
                    if round_:  # the first one warms up
                        values.append(rate)
            medians = {name: statistics.median(values) for name, values in rates.items()}
            print(
                f"batch {batch:2}, {'shared  ' if shared else 'unshared'}: "
                + ", ".join(f"{name} {value:.1f}" for name, value in medians.items())
                + f" new tokens a CPU second; vllm / local {medians['vllm'] / medians['local']:.2f}, "
                f"generate / local {medians['generate'] / medians['local']:.2f}",
                flush=True,
            )
            found.append({"batch": batch, "shared": shared, "rates": rates, "medians": medians})
    steps = {"local": [], "vllm": []}
    for round_ in range(options.rounds + 1):
        for name, values in steps.items():
            model.engine = engine if name == "vllm" else None
            seconds = 1 / timed(name, partial(one_step, model, round_))
            if round_:
                values.append(seconds)
    medians = {name: statistics.median(values) for name, values in steps.items()}
    print(
        f"a step of LMPO, 4 tasks x 8: local {medians['local']:.1f} CPU seconds, vllm {medians['vllm']:.1f}; "
        f"local / vllm {medians['local'] / medians['vllm']:.2f}"
    )
    if options.out is not None:
        options.out.write_text(json.dumps({"batches": found, "steps": steps}, indent=1) + "\n")


class OddWorld:
    """A domain in which about every second answer is right, so that each group has something to learn from."""

    name = "odd"
    instructions = "Say something."

    def tasks(self, split: Split) -> list[Task]:
        return [Task(id=f"{split} {i}", domain="odd", text=f"What about lamp {i}?") for i in range(8)]

    def skipped(self, split: Split) -> dict[str, int]:
        return {}

    def start(self, task: Task) -> "OddWorld":
        return self

    def step(self, action: str) -> Outcome:
        return Outcome(observation="", reward=float(len(action) % 2), done=True)


def one_step(model: LanguageModel, seed: int) -> int:
    """Roll out and update once; return 1."""
    with tempfile.TemporaryDirectory() as folder:
        bank = ExperienceBank(Path(folder) / "bank.sqlite", HashingEmbedder())
        memory = LatentMemory(bank, Composer(model, num_latents=8))
        try:
            trainer = LMPOTrainer(
                memory,
                model,
                load_team("solo"),
                OddWorld(),
                num_steps=1,
                tasks_per_step=4,
                group_size=8,
                seed=seed,
                sampling=Sampling(temperature=1.0, max_response_tokens=24),
            )
            done = trainer.train(Path(folder) / "checkpoints")
        finally:
            memory.composer.detach()
            bank.close()
    assert done.step == 1
    return 1


if __name__ == "__main__":
    main()
