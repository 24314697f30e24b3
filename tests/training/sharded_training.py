"""Run by test_sharded_training.py, alone or as one of several processes: both trainers, their weights on disk.

sharded_training.py BANK MODEL OTHER OUT [steps|fsdp|crash]: a few steps of each, or a mistake in the second process.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import test_lmpo
import test_sft
import torch
from torch.distributed.tensor import DTensor
from training_world import TASKS, make_world
from transformers import PreTrainedModel

from latentmem.bank import ExperienceBank
from latentmem.errors import TrainingError
from latentmem.models.sharding import shard
from latentmem.processes import Processes
from latentmem.training.checkpoint_folder import Progress


def embed(texts: list[str]) -> np.ndarray:
    rows = [[byte - 127.5 for byte in hashlib.sha256(text.encode()).digest()[:16]] for text in texts]
    return np.array(rows, dtype=np.float32)


def held_elements(model: PreTrainedModel) -> tuple[int, int]:
    """Elements of the frozen decoder layers that this process holds, and all there are."""
    weights = [w for name, w in model.base_model.layers.named_parameters() if ".composer." not in name]
    return sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in weights), sum(
        w.numel() for w in weights
    )


def main(bank_path: str, model: str, other: str, out: str, mode: str = "steps") -> None:
    torch.set_num_threads(1)
    processes = Processes()
    if processes.is_first:
        with ExperienceBank(Path(bank_path), embed, embedder="hash") as bank:
            make_world(bank, Path(model), Path(other))
    processes.wait()
    bank = ExperienceBank(Path(bank_path), embed, embedder="hash")

    def fresh(**kwargs):
        if mode == "fsdp":
            kwargs["place"] = shard
        return make_world(bank, Path(model), Path(other), **kwargs)

    if mode == "crash":
        if processes.rank == 1:
            raise TrainingError("rank 1 stumbles")
        test_sft.trainer_of(fresh()).step(Progress())
        return

    results = {}

    def keep(name: str, world, metrics) -> None:
        results[name] = {key: value for key, value in metrics.items() if not key.endswith("_seconds")}
        if processes.is_first:
            world.composer.save_pretrained(Path(out) / name)

    world = fresh()
    trainer = test_sft.trainer_of(world, trajectories_per_step=3)
    progress = Progress()
    for step in range(2):
        progress.step = step
        metrics = trainer.step(progress).metrics
    keep("sft", world, {**metrics, "held_out": trainer.held_out_loss()})

    cases = {
        "uneven": {"tasks_per_step": 3, "beta": 0.1, "num_iterations": 2},
        "grpo": {"tasks_per_step": 3, "loss_type": "grpo"},
        # One task over two processes: one of them has nothing to roll out, nothing to score and no gradient.
        "idle": {"tasks_per_step": 1, "group_size": 4, "beta": 0.1},
        "bnpo": {"tasks_per_step": 1, "group_size": 4, "loss_type": "bnpo", "micro_batch_positions": 10**6},
    }
    for name, changed in cases.items():
        world = fresh()
        trainer = test_lmpo.trainer_of(world, aside=TASKS[7:], **changed)
        result = trainer.step(Progress())
        keep(name, world, {**result.metrics, "updated": result.moved, "evaluated": trainer.evaluate()})

    world = fresh()
    trainer = test_lmpo.trainer_of(world, tasks_per_step=1, num_steps=2, eval_every=1)
    lines: list[dict] = []
    done = test_lmpo.run(trainer, Path(out) / "whole", lines)
    trainer = test_lmpo.trainer_of(world, tasks_per_step=1, num_steps=3, eval_every=1)
    again = test_lmpo.run(trainer, Path(out) / "whole", lines)
    keep("whole", world, {"steps": again.step, "first": done.step, "lines": len(lines)})
    if mode == "fsdp":  # the composer on a model of its own: two models are spread
        world = fresh(other_base=True)
        test_sft.trainer_of(world, trajectories_per_step=3).step(Progress())
        results["held"] = [processes.gather([held_elements(m.model)]) for m in (world.model, world.composer.backbone)]
    results["num_processes"] = processes.size
    if processes.is_first:
        (Path(out) / "results.json").write_text(json.dumps(results))
    bank.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
