"""Valid files of every kind that is read, small ones, to be damaged."""

import json
from pathlib import Path
from random import Random

import torch
import yaml
from safetensors.torch import save

from fuzzing import Sample
from latentmem.environments.pddl_problems import generate
from latentmem.trajectory import Conversation, Message, Origin, Recalled, Served, Step, Task, Trajectory

QA = {"kind": "qa", "schema": "popqa", "train": {"path": "a"}, "test": {"path": "b"}, "search": {"url": "http://x"}}
FAMILY = {"name": "chain_sum", "weight": 2.0, "params": {"min_terms": 2}}
CONFIG = {
    "run": "r",
    "seed": 3,
    "team": "camel",
    "train_teams": ["solo", "pair"],
    "max_turns": 2,
    "report_to": ["tensorboard"],
    "data": {"kind": "reasoning_gym", "families": [FAMILY], "train_size": 4},
    "model": {"name": "m", "dtype": "float32"},
    "composer": {"num_latents": 4, "target_modules": ["q_proj"], "template": "{task} {memory}", "cue": "So"},
    "bank": {"path": "b.sqlite", "num_retrieved": 2},
    "lmpo": {"learning_rate": 1e-4, "initial": "warmup"},
    "evaluate": {"memories": ["none", "latent:untrained:zero", "grpo:x"], "num_tasks": 3},
}
MIX = {"run": "r", "data": {"kind": "mix", "train": [{"data": QA, "max_turns": 2}], "test": [{"data": QA}]}}
FACTS = {"run": "r", "data": {"kind": "hidden_facts", "needs": {"scout": ["code"]}, "outcomes": {"wrong": 1.0}}}
GRID = {
    "run": "g",
    "evaluate": {"num_tasks": 2},
    "grid": {
        "base": "popqa",
        "benchmarks": {"a": "popqa", "b": {"base": "triviaqa", "max_turns": 2, "data.train.limit": 3}},
        "teams": ["solo", "pair"],
        "memories": ["none", "text"],
        "seeds": [0, 1],
        "variants": {"k4": {"composer.num_latents": 4}, "k8": {"composer": {"num_latents": 8}}},
        "leave_out": "team",
    },
}
MEMORY = {
    **dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "reward", "no_answer", "retrieval_hits"), 0.5),
    **dict.fromkeys(("prompt_tokens", "generated_tokens", "memory_prompt_tokens", "memory_generated_tokens"), 8.0),
    "name": "text",
    "num_errors": 1,
    "memory_malformed": 2,
    "peak_memory_mb": 5.0,
    "seconds": {"total": 1.0, "recall": 0.5},
    "vs_none": {"difference": 0.2, "low": 0.1, "high": 0.3, "p_value": 0.01, "p_holm": 0.02},
    "carried": {"nats": 0.2, "low": 0.1, "high": 0.3, "num_tasks": 4},
    "groups": {"a": {"accuracy": 0.5, "low": 0.1, "high": 0.9, "num_tasks": 3, "hit": {"accuracy": 0.5}}},
    "learning": {"num_trajectories": 3, "prompt_tokens": 4, "generated_tokens": 5, "seconds": 1.5, "malformed": {}},
    "successes": [1, 0],
    "rewards": [1.0, 0.0],
    "extra": {"says_other": 0.5},
}
RESULTS = {
    "schema_version": 1,
    "run": "r",
    "num_tasks": 2,
    "seed": 0,
    "domain": "qa",
    "team": "solo",
    "model": "m",
    "temperature": 0.0,
    "task_ids": ["qa:1", "qa:2"],
    "memories": [{**MEMORY, "name": "none", "vs_none": None}, MEMORY, {**MEMORY, "name": "latent:lmpo"}],
}
RUN = {
    "seed": 0,
    "started": "2026-01-01T00:00:00+00:00",
    "versions": {"python": "3.11", "torch": None},
    "platform": "Linux",
    "git_commit": None,
    "skipped_rows": {"train": {}},
    "continued": [{"phase": "sft", "started": "x"}],
}
ROW = {"phase": "lmpo", "step": 1, "reward": 0.5, "loss": None, "non_finite": ["loss"], "groups": 2, "carried": 0.1}
READING = {"gate": 1.0, "length": 0.9, "nearest": [["a", 0.9]], "frame": ["is", 0.4]}
READINGS = {
    "format_version": 1,
    "memory": "latent:lmpo",
    "before": "latent:untrained",
    "tasks": [{"task": "t", "roles": [{"role": "scout", "after": [READING], "before": [READING]}]}],
}
PLACE = {"benchmark": "a", "team": "solo", "variant": "", "seed": 0}
TABLE = {
    "schema_version": 1,
    "run": "g",
    "grid": {**GRID["grid"], "benchmarks": {"a": "popqa"}},
    "train_teams": ["pair"],
    "models": ["m"],
    "num_cells": 3,
    "num_done": 2,
    "num_comparisons": 1,
    "rows": [{**PLACE, **MEMORY, "memory": name, "seeds": [0], "by_seed": [0.5]} for name in ("none", "text")],
    "overall": [],
    "cells": [{**PLACE, **MEMORY, "memory": "text", "run": "a-solo-seed0"}],
    "failures": [{**PLACE, "memory": "latent:lmpo", "line": "no checkpoint"}],
}
SETTINGS = {
    "format_version": 1,
    **{"base_model": "m", "agents": "m", "num_latents": 2, "d_composer": 4, "d_agent": 4, "rank": 2, "alpha": 32.0},
    **{"target_modules": ["q_proj"], "template": "{task}", "words": {"task": "{task}"}, "max_prompt_tokens": 8},
    **{"slots": 1, "sharpness": 2.0, "cue": None},
}
WEIGHTS = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
MESSAGE = Message(
    role="scout", system="s", user="u", response="42", token_ids=(1, 2), logps=(-0.5, -0.1), finish="stop",
    temperature=1.0, num_prompt_tokens=3, reads=(), recalled=Recalled(kind="text", text="m", sources=("x",)),
)  # fmt: skip
STEP = Step(messages=(MESSAGE, MESSAGE), action="42", observation="yes", info={"extracted": "42"})
TRAJECTORY = Trajectory(
    task=Task(id="1", domain="qa", text="What?", data={"answers": ["42"]}),
    team="solo", model="m", steps=(STEP, STEP), reward=1.0, success=True, seed=0,
)  # fmt: skip
CHAT = Conversation(
    messages=(
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}], "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f"}}]},
    ),
    tools=({"type": "function", "function": {"name": "f", "parameters": {}}},),
)
SERVED = TRAJECTORY.model_copy(
    update={
        "steps": (
            Step(
                messages=(
                    MESSAGE.model_copy(
                        update={
                            "finish": "cut",
                            "served": Served(call="c", conversation=CHAT, prompt_ids=(1, 2, 3), lineage="l"),
                        }
                    ),
                ),
                action="42",
                observation="",
            ),
        ),
        "rewards": {"scout": 0.5},
        "origin": Origin(tenant="acme", session="s", is_judged=True),
    }
)
RELEASED_MESSAGE = {"name": "a", "system_instruction": "s", "user_instruction": "u", "response": "r"}
RELEASED = [
    {
        "task_init_description": "Which?",
        "label": True,
        "trajectory": [
            {"action": "a", "observation": "o", "mas_message_graph": {"nodes": [{"message": RELEASED_MESSAGE}]}}
        ],
    }
]
TEXTS = [
    b"First I add.\n<answer>42</answer>",
    b"So \\boxed{\\frac{1}{2}} holds. The answer is 3.5 apples.",
    b"```python\ndef f(x):\n    return x + 1\n```\nassert f(1) == 2",
    b"Final Answer: yes, since A. B. Smith (1,234.5) said so.\nAction: pick up ball1 at room1 with left gripper",
]


OVERRIDES = [
    b"lmpo.group_size=8",
    b"data.needs={scout: [code]}",
    b"evaluate.memories=[none, text]",
    b"own.a:B={x: 1}",
]
PROBLEM = generate("gripper", "small", Random(0)).pddl("drawn", "gripper")


def mapping(path: Path) -> object:
    """The YAML file of that name as the value of a sample."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def header(body: dict[str, torch.Tensor], **metadata: str) -> Sample:
    """The header of a safetensors file, over the tensors."""
    content = save(body, metadata)
    size = 8 + int.from_bytes(content[:8], "little")

    def form(head: bytes) -> bytes:
        return len(head).to_bytes(8, "little") + head + content[size:]

    return Sample(json.loads(content[8:size]), form)


def settings_of(body: dict[str, torch.Tensor], values: object) -> Sample:
    """The settings in the header of a checkpoint."""
    return Sample(values, lambda text: save(body, {"latentmem": text.decode("utf-8", "replace")}))


def plain(content: bytes) -> Sample:
    """A file that is no value of JSON."""
    return Sample(None, lambda _: content)


def lines(*values: object) -> Sample:
    """A file of lines, the first of which is damaged most."""
    rest = "".join(json.dumps(value) + "\n" for value in values[1:]).encode()
    return Sample(values[0], lambda line: line + b"\n" + rest)


def adamw() -> dict[str, torch.Tensor]:
    return {"a/step": torch.tensor(1.0), "a/exp_avg": torch.ones(2, 3), "a/exp_avg_sq": torch.ones(2, 3)}
