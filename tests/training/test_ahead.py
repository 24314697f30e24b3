"""LMPO whose rollouts run one step ahead: what is sampled when, what the loss is of it, and that it resumes exactly."""

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_lmpo import SETTINGS, TASKS, logps_now, moved, recorded, run, trainer_of, weights
from training_world import (
    SAMPLING,
    SlowLosses,
    Toy,
    World,
    assert_same_gradients,
    plain_logps,
    take_gradients,
)

from latentmem.config import LMPOSection, Sampling
from latentmem.errors import ConfigError, ModelError
from latentmem.models.agent import Prompt, Sampled
from latentmem.models.language_model import LanguageModel
from latentmem.training.checkpoint_folder import Progress
from latentmem.training.lmpo import LMPOTrainer
from latentmem.training.losses import group_advantages
from latentmem.training.scoring import Example
from peers import together

PATIENCE = 60
SHORT = Sampling(temperature=0.7, max_response_tokens=2)


class Engine:
    """A model of its own that many threads may ask; each response is sampled alone, so it does not depend on when."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.sample = LanguageModel.respond.__get__(model)
        self.lock = threading.Lock()
        self.threads: list[str] = []

    def respond(self, prompts: Sequence[Prompt], sampling: Sampling, kept: object = None) -> list[Sampled]:
        with self.lock:
            self.threads.append(threading.current_thread().name)
            return [self.sample([prompt], sampling)[0] for prompt in prompts]


@pytest.fixture
def make_served(make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> Callable[[], World]:
    """A world whose agents are served: sampled by another copy of their model."""

    def make() -> World:
        world, server = make_world(), make_world()
        world.model.respond = Engine(server.model).respond  # type: ignore[method-assign]
        return world

    def begin() -> World:
        world = make()
        monkeypatch.setattr(LanguageModel, "concurrent", True)
        return world

    return begin


def ahead_of(world: World, **changed: Any) -> LMPOTrainer:
    options = {"max_staleness": 1, "save_every": 9, "tasks": TASKS[:5]} | changed
    return trainer_of(world, **options)


def steps(trainer: LMPOTrainer, number: int) -> list[dict[str, float]]:
    found, progress = [], Progress()
    for _ in range(number):
        found.append(dict(trainer.step(progress).metrics))
        progress.step += 1
    return found


def put(world: World, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in world.composer.trainable().items():
            parameter.copy_(values[name])


def test_the_second_step_is_sampled_before_the_first_update_and_its_loss_is_that_of_the_old_probabilities(
    make_served: Callable[[], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_served()
    trainer = ahead_of(world, num_steps=2, optimization=world.optimization(4, 8e-2, warmup_steps=0))
    groups = recorded(trainer, monkeypatch)
    before = [weights(world)]
    really = trainer.optimization.step
    gradients: list[dict[str, torch.Tensor]] = []

    def step(number: int, loss: float) -> tuple[bool, float]:
        gradients.append({n: p.grad.clone() for n, p in world.composer.trainable().items() if p.grad is not None})
        result = really(number, loss)
        before.append(weights(world))
        return result

    monkeypatch.setattr(trainer.optimization, "step", step)
    first, second = steps(trainer, 2)
    assert (first["staleness"], second["staleness"]) == (0, 1)
    assert first["first_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert second["first_ratio_max"] > 1.05
    trainer.ahead.stop()

    played = [group for group in groups[2:] if len({t.reward for t in group}) > 1]
    assert len(groups) == 4
    assert played
    sampled = [m.logps for group in played for t in group for m in t.messages]
    put(world, before[0])  # the parameters from before the first update, that the latents were composed with
    for row, logps in zip(logps_now(world, played), sampled, strict=True):
        assert torch.allclose(row, torch.tensor(logps), atol=1e-4)

    put(world, before[1])
    slow, losses = SlowLosses(0.2, 0.2, math.inf, 0.0), []
    for group in played:
        advantages = group_advantages(torch.tensor([[t.reward for t in group]]))[0].tolist()
        for trajectory, advantage in zip(group, advantages, strict=True):
            for message in trajectory.messages:
                example = Example.of(message, world.model, message.recalled.text, SAMPLING.temperature)
                now = plain_logps(world.composer, world.model, example)
                losses += slow(now, message.logps, now.detach(), advantage)
    assert slow.kinds["clipped"] > 0
    expected = sum(losses) / len(losses)
    assert second["loss"] == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    assert second["clip_fraction"] == pytest.approx(slow.kinds["clipped"] / len(losses))
    take_gradients(world.composer)
    expected.backward()
    assert_same_gradients(gradients[1], take_gradients(world.composer), 1e-4)


def test_the_rollouts_go_on_while_the_step_updates(
    make_served: Callable[[], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_served()
    ahead, acted, updated = threading.Event(), threading.Event(), threading.Event()

    class Waiting(Toy):
        """In the second step, waits until the first has updated."""

        def step(self, action: str) -> Any:
            if ahead.is_set():
                acted.set()
                assert updated.wait(PATIENCE)
            return super().step(action)

    trainer = ahead_of(world, start=Waiting, num_steps=2, group_size=2, tasks_per_step=1)
    go_ahead, update = trainer._go_ahead, trainer._update

    def update_once_acted(*args: Any) -> Any:
        assert acted.wait(PATIENCE)
        result = update(*args)
        updated.set()
        return result

    monkeypatch.setattr(trainer, "_go_ahead", lambda progress: (ahead.set(), go_ahead(progress)))
    monkeypatch.setattr(trainer, "_update", update_once_acted)
    assert [row["errors"] for row in steps(trainer, 2)] == [0, 0]


@pytest.mark.slow
def test_resumed_training_equals_an_uninterrupted_one(make_served: Callable[[], World], tmp_path: Path) -> None:
    options = {
        "num_steps": 4,
        "save_every": 2,
        "eval_every": 3,
        "aside": TASKS[6:7],
        "group_size": 3,
        "tasks_per_step": 1,
    }
    whole = make_served()
    expected: list[dict[str, Any]] = []
    progress = run(ahead_of(whole, **options), tmp_path / "whole", expected)
    assert sum(line.get("updated", 0) for line in expected) > 1
    stale = [line["staleness"] for line in expected if "staleness" in line]
    assert stale == [0, 1, 0, 0]  # none is ahead after two steps, which are saved, and after three, which are evaluated
    lines: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        run(ahead_of(make_served(), **options), tmp_path / "part", lines, stop_at=3)
    again = make_served()
    assert run(ahead_of(again, **options), tmp_path / "part", lines) == progress
    assert lines == expected
    assert moved(weights(whole), again) == set()
    assert [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")] == []


def test_a_checkpoint_does_not_count_tasks_whose_rollouts_were_not_used(
    make_served: Callable[[], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = []
    for staleness in (0, 1):
        world = make_served()
        trainer = ahead_of(world, num_steps=3, max_staleness=staleness, group_size=2, tasks_per_step=1, sampling=SHORT)
        groups = recorded(trainer, monkeypatch)
        progress, positions = Progress(), []
        for _ in range(2):
            trainer.step(progress)
            progress.step += 1
            positions.append(progress.position)
        if trainer.ahead:
            trainer.ahead.take()
        both.append((positions, [[t.task.id, t.seed] for group in groups[:2] for t in group]))
    assert both[0] == both[1]


def test_an_error_of_the_server_is_told_after_the_update_that_it_did_not_concern(
    make_served: Callable[[], World], tmp_path: Path
) -> None:
    world = make_served()
    trainer = ahead_of(world, num_steps=3, tasks_per_step=1)
    answered = world.model.respond
    going = threading.Event()

    def respond(*args: Any) -> Any:
        if going.is_set():
            raise ModelError("the server is gone")
        return answered(*args)

    world.model.respond = respond  # type: ignore[method-assign]
    really = trainer._go_ahead
    trainer._go_ahead = lambda progress: (going.set(), really(progress))  # type: ignore[method-assign, assignment]
    lines: list[dict[str, Any]] = []
    with pytest.raises(ModelError, match="the server is gone"):
        run(trainer, tmp_path / "x", lines)
    assert [line["updated"] for line in lines] == [1]


@pytest.mark.slow
def test_two_processes_go_ahead_as_one_does(make_served: Callable[[], World], tmp_path: Path) -> None:
    worlds = [make_served() for _ in range(3)]
    options = {"num_steps": 2, "group_size": 2}
    alone = steps(ahead_of(worlds[0], **options), 2)

    def act(peer: Any) -> list[dict[str, float]]:
        peer.sum_gradients = lambda parameters: _sum_gradients(peer, parameters)
        world = worlds[1 + peer.rank]
        trainer = LMPOTrainer(
            world.memory, world.model, world.team, SimpleNamespace(start=Toy), SETTINGS,
            tasks=TASKS[:5], aside=TASKS[6:], sampling=SAMPLING, max_turns=2, seed=4, processes=peer,
            max_staleness=1, save_every=9, learning_rate=1e-3, projection_rate=0.5, warmup_steps=1, **options,
        )  # fmt: skip
        return steps(trainer, 2)

    for found in together(2, act):
        assert not isinstance(found, BaseException), found
        assert [row["staleness"] for row in found] == [0, 1]
        assert [row["reward"] for row in found] == [row["reward"] for row in alone]
        assert found[0]["loss"] == pytest.approx(alone[0]["loss"], abs=1e-5)


def _sum_gradients(peer: Any, parameters: Any) -> None:
    parameters = list(parameters)
    mine = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    everyone = peer._gather(mine)
    for number, parameter in enumerate(parameters):
        parameter.grad = sum(part[number] for part in everyone)


def test_where_it_cannot_be_it_is_refused_in_one_line(world: World) -> None:
    with pytest.raises(ConfigError, match="max_staleness is 1, but this process samples for the agents") as error:
        ahead_of(world)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="max_staleness 1 and max_resamples 2"):
        LMPOSection(max_staleness=1, max_resamples=2)
    assert "staleness" not in trainer_of(world).step(Progress()).metrics
