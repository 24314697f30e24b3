"""The control of the whole project: a composer carries what its tasks need from memory, and nothing where they do not.

On a world whose facts only experience tells, right responses are likelier under the memory of their own task than under
another's, for places that were never trained on; so the composer reads the fact. Trained on the same prompts with a
response that needs no memory, it is a learned prompt, and the difference is near nothing.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from latentmem.bank import ExperienceBank
from latentmem.config import HiddenFactsSection, MemorySection, Sampling
from latentmem.environments.hidden_facts.domain import HiddenFactsDomain
from latentmem.memory.composer import Composer
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import NoMemory
from latentmem.models.language_model import LanguageModel
from latentmem.rollout import rollout
from latentmem.teams.team import load_team
from latentmem.training.checkpoint_folder import Progress
from latentmem.training.demonstrations import demonstrate
from latentmem.training.scoring import Example, score_all
from latentmem.training.sft import SFTTrainer
from latentmem.trajectory import Task, Trajectory

NUM_STEPS = 30
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OBSERVATION = MemorySection(task="", step="", reply="{observation}", solved="", unsolved="", entry="{text}")
"""The composer reads what the environment told, and nothing else."""


def by_name(texts: list[str]) -> np.ndarray:
    """An embedder that knows a place by its name, whatever is asked about it."""
    rows = []
    for text in texts:
        name = re.search(r"[Tt]he ([A-Z]\w+ [A-Z]\w+)", text)
        assert name is not None
        seed = int.from_bytes(hashlib.sha256(name.group(1).encode()).digest()[:8], "big")
        rows.append(np.random.default_rng(seed).standard_normal(64))
    return np.array([row / np.linalg.norm(row) for row in rows], dtype=np.float32)


def carried(memory: LatentMemory, model: LanguageModel, trajectories: Sequence[Trajectory]) -> tuple[float, float]:
    """The 95% interval of the surprise under another task's memory minus that under its own, in nats a response."""
    role = load_team("solo").roles[0]
    tasks = [trajectory.task for trajectory in trajectories]

    def surprise(remembered: Sequence[Task]) -> list[float]:
        records = memory.records([(task, role) for task in remembered])
        examples = [
            Example.of(trajectory.messages[0], model, record.text, 1.0)
            for trajectory, record in zip(trajectories, records, strict=True)
        ]
        found = [0.0] * len(examples)
        for rows, logps, _ in score_all(memory.composer, model, examples, budget=4096):
            for row, logp in zip(rows, logps.sum(1).tolist(), strict=True):
                found[row] = -logp
        return found

    own, other = surprise(tasks), surprise([*tasks[1:], tasks[0]])
    gains = np.subtract(other, own)
    reach = 1.96 * gains.std(ddof=1) / len(gains) ** 0.5
    return gains.mean() - reach, gains.mean() + reach


@pytest.fixture(scope="module")
def domain() -> HiddenFactsDomain:
    section = HiddenFactsSection(
        kind="hidden_facts", train_entities=64, dev_entities=1, test_entities=24, values=4, phrasings=1
    )
    return HiddenFactsDomain(**{key: value for key, value in section if key != "kind"})


@pytest.mark.parametrize("needs_memory", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_composer_carries_facts_of_places_it_never_saw_if_and_only_if_its_training_needed_them(
    tiny_model_dir: Path, tmp_path: Path, domain: HiddenFactsDomain, needs_memory: bool
) -> None:
    model = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")
    team = load_team("solo")
    with ExperienceBank(tmp_path / "bank.sqlite", by_name, embedder="by name") as bank:
        sampling = Sampling(temperature=1.0, max_response_tokens=1)
        experience = domain.tasks("experience")
        bank.add(rollout(team, NoMemory(), model, experience, domain.start, sampling=sampling).trajectories)
        composer = Composer(
            model,
            num_latents=2,
            rank=16,
            target_modules=LAYERS,
            template="{memory}",
            initial_scale=1.0,
            words=OBSERVATION,
        )
        memory = LatentMemory(bank, composer, num_retrieved=1, only_successes=False)

        def demonstrated(tasks: Sequence[Task], true: bool) -> list[Trajectory]:
            return [
                demonstrate(team, task, "", domain.demonstrations(task) if true else {"": "apple"}, model)
                for task in tasks
            ]

        right = demonstrated(domain.tasks("test"), true=True)
        train = demonstrated(domain.tasks("train"), true=needs_memory)
        assert {t.task.text for t in right}.isdisjoint(t.task.text for t in train)
        trainer = SFTTrainer(
            memory,
            model,
            team,
            train,
            num_steps=NUM_STEPS,
            trajectories_per_step=16,
            micro_batch_positions=2048,
            learning_rate=1e-2,
            projection_rate=1.0,
            schedule="constant",
            warmup_steps=0,
        )
        progress, losses = Progress(), []
        for _ in range(NUM_STEPS):
            losses.append(trainer.step(progress).metrics["loss"])
            progress.step += 1
        held_out = right if needs_memory else demonstrated(domain.tasks("test"), true=False)
        with torch.no_grad():
            low, high = carried(memory, model, held_out)
    assert losses[-1] < losses[0] - 0.3  # both have learned something
    if needs_memory:
        assert low > 1
    else:
        assert -0.3 < low < high < 0.3
