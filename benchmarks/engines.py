"""New tokens a CPU second: the model in this process against a server of vLLM, asked alternately for the same work.

The server runs on this machine (`latentmem engine start`); the CPU time of all processes below `--pid` counts, and that
of this process. Groups of 8 share a prompt and latents, as in a step of LMPO.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

from latentmem.config import Sampling
from latentmem.engines.vllm import VLLMEngine
from latentmem.models.agent import Prompt
from latentmem.models.language_model import LanguageModel


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of all below it, in seconds."""
    seconds = sum(map(float, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return seconds / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, children))


def prompts_of(model: LanguageModel, groups: int, group_size: int, length: int, seed: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    words = ["lamp", "tower", "river", "gold", "mill", "stone", "wind", "salt"]
    rows = []
    for g in range(groups):
        picks = torch.randint(0, len(words), (length,), generator=generator).tolist()
        latents = 0.1 * torch.randn(8, model.width, generator=generator)
        text = " ".join(words[i] for i in picks)
        rows += [
            Prompt("a", "Be brief.", text, f"group {seed} {g}", seed * 1000 + i, latents) for i in range(group_size)
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=None, help="address of the server; without one there is nothing to compare")
    parser.add_argument("--pid", type=int, default=None, help="process of the server")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=4)
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
    found: dict[str, list[float]] = {"local": [], "vllm": []}
    for round_ in range(options.rounds + 1):
        prompts = prompts_of(model, options.groups, 8, options.length, round_)
        for name, one in (("local", model), ("vllm", engine)):
            began = time.process_time() + cpu_seconds(options.pid) * (name == "vllm")
            responses = one.respond(prompts, sampling)
            spent = time.process_time() + cpu_seconds(options.pid) * (name == "vllm") - began
            if round_:  # the first one warms up
                found[name].append(sum(len(response.token_ids) for response in responses) / spent)
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    for name, rates in found.items():
        print(f"{name:6} {medians[name]:7.1f} new tokens a CPU second ({', '.join(f'{rate:.1f}' for rate in rates)})")
    print(f"vllm / local: {medians['vllm'] / medians['local']:.2f}")
    if options.out is not None:
        options.out.write_text(
            json.dumps({"rates": found, "ratio": medians["vllm"] / medians["local"]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
