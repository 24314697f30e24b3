"""A small world to train in: a real tiny model, a real bank, a real team, and an environment of several turns."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from latentmem.bank import ExperienceBank
from latentmem.config import Sampling
from latentmem.environments.environment import Outcome
from latentmem.memory.composer import Composer
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import NoMemory
from latentmem.models.language_model import LanguageModel
from latentmem.processes import Processes
from latentmem.rollout import rollout
from latentmem.teams.team import load_team
from latentmem.teams.turn import Team
from latentmem.training.optimizer import Optimization, Trained
from latentmem.training.scoring import Example
from latentmem.trajectory import Task, Trajectory

SAMPLING = Sampling(temperature=0.7, max_response_tokens=6)
TEMPLATE = "{task}\n{role}\n{memory}\n{role_messages}\n{num_latents}:"
TASKS = [
    Task(id=str(i), domain="sums", text=f"What is {12 + i} + {7 * i}?" + " Subtract the tens, then the ones." * (i % 3))
    for i in range(8)
]


class Toy:
    """Answers twice; the reward is the share of the second action's characters that stand early in the alphabet."""

    instructions = "Give the final answer only."

    def __init__(self, task: Task, turns: int = 2, reward: Callable[[str], float] | None = None) -> None:
        self.turns = turns
        self.reward = reward or (lambda action: sum(ord(c) % 2 for c in action) / max(1, len(action)))

    def step(self, action: str) -> Outcome:
        self.turns -= 1
        return Outcome(
            observation="Go on.", reward=self.reward(action), done=not self.turns, info={"extracted": action}
        )


@dataclass
class World:
    model: LanguageModel
    bank: ExperienceBank
    composer: Composer
    memory: LatentMemory
    team: Team
    trajectories: list[Trajectory]
    """Successes on `TASKS`, as the bank holds them."""

    def optimization(self, num_steps: int = 6, learning_rate: float = 1e-2, **kwargs) -> Optimization:
        chosen = {
            "projection_rate": 0.5,
            "schedule": "cosine",
            "warmup_steps": 1,
            "max_grad_norm": 1.0,
            "weight_decay": 0.0,
            "learning_rate": learning_rate,
            **kwargs,
        }
        return Optimization(self.composer, Processes(), num_steps=num_steps, **chosen)

    def play(self, tasks: Sequence[Task] = TASKS[:2], group_size: int = 2, seed: int = 5) -> list[Trajectory]:
        return rollout(
            self.team,
            self.memory,
            self.model,
            tasks,
            Toy,
            sampling=SAMPLING,
            group_size=group_size,
            seed=seed,
            max_turns=2,
        ).trajectories


class Lines:
    """A journal that keeps what it is told in lists, all but the keys of `without`."""

    def __init__(self, lines: list[dict[str, Any]] | None = None, without: Sequence[str] = ()) -> None:
        self.lines = [] if lines is None else lines
        self.tasks: list[dict[str, Any]] = []
        self.done: list[str] = []
        self.without = without

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.lines.append({key: value for key, value in metrics.items() if key not in self.without})

    def log_tasks(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.tasks += map(dict, rows)

    def doing(self, what: str) -> None:
        self.done.append(what)

    def rewind(self, step: int) -> None:
        self.lines[:] = [line for line in self.lines if line["step"] <= step]
        self.tasks[:] = [row for row in self.tasks if row["step"] <= step]


def make_world(
    bank: ExperienceBank,
    model_dir: Path,
    other_model_dir: Path,
    team: str = "autogen",
    other_base: bool = False,
    double: bool = False,
    half: bool = False,
    num_latents: int = 3,
    place: Callable[[PreTrainedModel, torch.device], object] | None = None,
    **kwargs,
) -> World:
    """Equal arguments give equal worlds. An empty bank is filled first."""
    model = LanguageModel.from_pretrained(str(model_dir), "cpu", place=place)
    loaded = load_team(team)
    if not len(bank):
        always = partial(Toy, turns=1, reward=lambda _: 1.0)
        bank.add(rollout(loaded, NoMemory(), model, TASKS, always, sampling=SAMPLING, seed=3).trajectories)
    base = LanguageModel.from_pretrained(str(other_model_dir), "cpu", place=place) if other_base else model
    if double:
        model.model.double()
        base.model.double()
    if half:
        model.model.bfloat16()
    kwargs = {"num_latents": num_latents, "rank": 2, "alpha": 4.0, "seed": 11, "template": TEMPLATE, **kwargs}
    composer = Composer(base, model, **kwargs)
    return World(model, bank, composer, LatentMemory(bank, composer, num_retrieved=2), loaded, list(bank))


def wake(composer: Composer) -> None:
    """LoRA B starts at zero, where A gets no gradient; give everything some size."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in composer.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.05 * noise.to(parameter.dtype)


def plain_logps(composer: Composer, model: LanguageModel, example: Example) -> Tensor:
    """Log-probs [T] of one example: composed alone, whole sequence, transformers' own mask, full graph."""
    embed = model.model.get_input_embeddings()
    ids = torch.tensor([composer.backbone.encode(example.composer_text)])
    queries = composer.query_latents[None]
    inputs = torch.cat([composer.backbone.model.get_input_embeddings()(ids), queries], dim=1)
    with composer.backbone.adapters.only(composer.adapter):
        hidden = composer.backbone.model.base_model(inputs_embeds=inputs).last_hidden_state[:, ids.shape[1] :]
    latents = composer.projection(hidden)
    prompt, response = torch.tensor([example.prompt_ids]), torch.tensor([example.token_ids])
    whole = torch.cat([embed(prompt), latents, embed(response)], dim=1)
    with model.as_agent() as agent:
        logits = agent.model(inputs_embeds=whole).logits[:, prompt.shape[1] + latents.shape[1] - 1 : -1]
    return (logits / example.temperature).log_softmax(2).gather(2, response[..., None])[0, :, 0]


def take_gradients(composer: Composer) -> dict[str, Tensor]:
    """Those that there are, by name; they are cleared."""
    found = {name: p.grad.clone() for name, p in composer.trainable().items() if p.grad is not None}
    for parameter in composer.trainable().values():
        parameter.grad = None
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < relative, name


def assert_slopes(trained: Trained, loss: Callable[[], float], found: Mapping[str, Tensor]) -> None:
    """Each gradient, along a random direction, is the slope of the loss by central differences; for float64."""
    generator = random.Random(3)
    for name, parameter in trained.trainable().items():
        direction = torch.tensor([generator.gauss(0, 1) for _ in range(parameter.numel())]).double().view_as(parameter)
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * 1e-5 * direction
                values.append(loss())
                parameter -= sign * 1e-5 * direction
        slope = (values[0] - values[1]) / 2e-5
        assert float((found[name] * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9), name


@dataclass
class SlowLosses:
    """The clipped objective with its KL term, token by token as the paper writes it; counts which way each took."""

    low: float
    high: float
    delta: float
    beta: float
    kinds: Counter[str] = field(default_factory=Counter)

    def __call__(
        self, logps: Tensor, old: Sequence[float], reference: Sequence[float] | Tensor, advantage: float
    ) -> list[Tensor]:
        losses = []
        for t, logp in enumerate(logps):
            ratio = (logp - old[t]).exp()
            if advantage > 0 and ratio > 1 + self.high:
                gain, kind = torch.tensor((1 + self.high) * advantage), "clipped"
            elif advantage < 0 and ratio < 1 - self.low:
                gain, kind = torch.tensor((1 - self.low) * advantage), "clipped"
            elif advantage < 0 and ratio > self.delta:
                gain, kind = torch.tensor(self.delta * advantage), "bounded"
            else:
                gain, kind = ratio * advantage, "inside"
            self.kinds[kind] += 1
            r = reference[t] - logp
            losses.append(-gain + self.beta * (r.exp() - r - 1))
        return losses

    def assert_all_ways_were_taken(self) -> None:
        assert min(self.kinds[kind] for kind in ("inside", "clipped", "bounded")) > 0, self.kinds
