"""Run by test_sharded_training.py, alone or as one of several processes: the loop around an optimizer, without a model.

sharded_optimizer.py OUT [adamw|zero2] RUN:N[:BAD]... - in the folder RUN training goes on to N steps; in step BAD the
last process has a gradient that is not finite. Prints what came of each step, and the moments that this process holds.
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from latentmem.processes import Processes
from latentmem.training.optimization import Optimization, train

SHAPES = {
    "query_latents": (3, 5),
    "lora.a": (2, 7),
    "lora.b": (9,),
    "projection.weight": (4, 5),
    "projection.bias": (4,),
}


class Composer:
    """Only what the loop needs of one."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.parameters = {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}

    def trainable(self):
        return self.parameters

    def save_pretrained(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().clone() for name, p in self.parameters.items()}, folder / "weights.safetensors")

    def load_weights(self, folder):
        for name, weight in load_file(folder / "weights.safetensors").items():
            self.parameters[name].data.copy_(weight)


def go_on(processes: Processes, folder: Path, zero2: bool, num_steps: int, bad: int | None = None) -> None:
    composer, lines = Composer(), []
    optimization = Optimization(
        composer, processes, num_steps=6, learning_rate=1e-2, projection_rate=0.5, schedule="cosine", warmup_steps=1,
        max_grad_norm=1.0, weight_decay=0.1, zero2=zero2,
    )  # fmt: skip

    def step(progress):
        # The sum over processes is the same however many there are; in odd steps only the first has any gradient.
        share = 1.0 if processes.size == 1 else (0.25, 0.75)[processes.rank]
        if progress.step % 2:
            share = float(processes.is_first)
        for i, parameter in enumerate(composer.trainable().values()):
            # Nothing may depend on when gradients are made: here they come out of a backward pass, as in training.
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * progress.step + i))
            if progress.step == bad and processes.rank == processes.size - 1:
                gradient = torch.full_like(gradient, math.inf)
                share = 1.0
            if share:
                (parameter * gradient * share).sum().backward()
        good, norm = optimization.step(progress.step, 1.0)
        return {"updated": float(good), "bad": float(not good), "norm": norm}

    train(
        composer, optimization, folder, processes, num_steps=num_steps, save_every=1, eval_every=None, take_step=step,
        evaluate=None, log=lines.append, rewind=lambda step: None,
    )  # fmt: skip
    moments = [moment for state in optimization.adamw.state.values() for moment in state.values() if moment.dim()]
    result = {"updated": [line["updated"] for line in lines], "held": sum(moment.numel() for moment in moments)}
    (folder / f"result-{processes.size}-{processes.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, kind, *runs = sys.argv[1:]
    for run in runs:
        name, *numbers = run.split(":")
        go_on(Processes(), Path(out) / name, kind == "zero2", *map(int, numbers))
