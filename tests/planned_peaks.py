"""One phase of a run in a process of its own: what it took of memory, and what the plan of the same run says.

    python tests/planned_peaks.py PHASE MODEL SETTINGS

PHASE is collect, warmup, sft, lmpo or evaluate; SETTINGS is JSON: tasks, group, words, response, positions, latents.
For the warm-up, tasks are its lessons, and groups share a prompt. The last line of the output is JSON, in MiB:
`measured`, the high-water mark without what the process took before it loaded the model, and `planned`, without
libraries.
"""

import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from latentmem.memory_names import TRAININGS
from latentmem.models.embedder import HashingEmbedder
from latentmem.recipes import Planner
from latentmem.training.checkpoint_folder import Progress
from latentmem.training.sft import SFTTrainer
from latentmem.training.warmup import WarmupTrainer

PHASES = {
    "collect": "collect",
    "warmup": "train warmup",
    "sft": "train sft",
    "lmpo": "train lmpo",
    "evaluate": "evaluate",
}


class Judge:
    """Pays by every character of the answer, so that rollouts of one task differ."""

    instructions = "Give the final answer only."

    def __init__(self, task: Task) -> None:
        self.task = task

    def step(self, action: str) -> Outcome:
        digest = hashlib.sha256(f"{self.task.key}{action}".encode("utf-8", "replace")).digest()
        return Outcome(observation="", reward=digest[0] / 255, done=True, info={"extracted": action})


class Pleased(Judge):
    """Pays for everything."""

    def step(self, action: str) -> Outcome:
        return Outcome(observation="", reward=1.0, done=True, info={"extracted": action})


def make_tasks(name: str, count: int, words: int) -> list[Task]:
    texts = [" ".join(f"shop {j} sold {7 * i + j} apples," for j in range(words // 5)) for i in range(count)]
    return [Task(id=f"{name}-{i}", domain="apples", text=f"{text} how many in all?") for i, text in enumerate(texts)]


def mib(field: str) -> float:
    """A field of this process's status; the kernel has kilobytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 1024


def main(phase: str, name: str, settings: dict[str, int]) -> None:
    import peft  # noqa: F401 - the libraries are loaded before the baseline is taken
    import sentence_transformers  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    size = SimpleNamespace(**settings)
    folder = Path(tempfile.mkdtemp())
    bank = ExperienceBank(folder / "bank.sqlite", HashingEmbedder(), embedder="hashing")
    baseline = mib("VmRSS")
    model, team = LanguageModel.from_pretrained(name, dtype="float32"), load_team("autogen")
    sampling = Sampling(temperature=1.0, max_response_tokens=size.response)
    tasks = make_tasks("task", size.tasks, size.words)
    model.eos_ids = frozenset()  # every response has the longest length, as the plan assumes
    if phase == "collect":
        played = rollout(team, NoMemory(), model, tasks, Judge, sampling=sampling).trajectories
    else:
        past = rollout(team, NoMemory(), model, make_tasks("past", 2, size.words // 2), Pleased, sampling=sampling)
        bank.add(past.trajectories)
        memory = LatentMemory(bank, Composer(model, num_latents=size.latents), num_retrieved=1)
        played = rollout(team, NoMemory(), model, tasks, Pleased, sampling=sampling).trajectories
    if phase == "evaluate":
        played = rollout(team, memory, model, tasks, Judge, sampling=sampling).trajectories
    elif phase == "warmup":
        composer = Composer(model, num_latents=size.latents, slots=1, cue="\nThe word is")
        lessons: dict[str, Any] = {"lessons_per_step": size.tasks, "words_per_prompt": size.group}
        warmup = WarmupTrainer(composer, model, team, **lessons, micro_batch_positions=size.positions)
        assert warmup._frame_step(Progress()).moved
        assert warmup._copy_step(Progress()).moved
    elif phase == "sft":
        fields: dict[str, Any] = {"trajectories_per_step": size.tasks, "micro_batch_positions": size.positions}
        result = SFTTrainer(memory, model, team, played, num_steps=1, **fields).step(Progress())
        assert result.moved
    elif phase == "lmpo":
        fields = {"tasks_per_step": size.tasks, "group_size": size.group, "micro_batch_positions": size.positions}
        domain = SimpleNamespace(start=Judge)
        trainer = LMPOTrainer(
            memory, model, team, domain, tasks=tasks, aside=[], sampling=sampling, num_steps=1, **fields
        )
        assert trainer.step(Progress()).moved
    measured = mib("VmHWM") - baseline
    prompt = max(m.num_prompt_tokens for t in played for m in t.messages)
    text = None if phase == "warmup" else 1
    if phase not in ("collect", "warmup"):
        records = memory.records([(task, role) for task in tasks for role in team.roles])
        text = max(len(model.encode(record.text)) for record in records)
    config = parse_config(
        {
            "run": str(folder),
            "data": {"kind": "hidden_facts"},
            "model": {"name": name, "device": "cpu", "dtype": "float32"},
            "bank": {"embedder": "hashing"},
            "composer": {"num_latents": size.latents, "slots": 1 if phase == "warmup" else None},
            "sampling": sampling.model_dump(),
            "collect": {"batch_size": size.tasks},
            "evaluate": {"batch_size": size.tasks, "memories": ["none", f"latent:{phase}"]}
            if phase in TRAININGS
            else {"batch_size": size.tasks},
            "warmup": {
                "lessons_per_step": size.tasks,
                "words_per_prompt": size.group,
                "micro_batch_positions": size.positions,
            },
            "sft": {"trajectories_per_step": size.tasks, "micro_batch_positions": size.positions},
            "lmpo": {"tasks_per_step": size.tasks, "group_size": size.group, "micro_batch_positions": size.positions},
        }
    )
    plan = Planner(config, prompt_tokens=prompt, composer_tokens=text).plan()
    peak, gaps = plan.peaks[PHASES[phase]], plan.gaps(PHASES[phase])
    figures = {key: round(value / 2**20, 1) for key, value in vars(peak).items()}
    told = {"measured": measured, "planned": (peak.total + gaps) / 2**20, "gaps": gaps / 2**20, **figures}
    print(json.dumps({**told, "prompt": prompt, "text": text}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
