"""The loop around both trainers: rates by hand, the stream, saving, resuming bit for bit, and what stops it."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_world import Lines, World

from latentmem.errors import CheckpointError, LatentMemError, TrainingError
from latentmem.memory.composer import Composer
from latentmem.processes import Processes
from latentmem.training import checkpoint_folder as module
from latentmem.training.checkpoint_folder import Progress, newest_checkpoint, selected_checkpoint
from latentmem.training.loop import train
from latentmem.training.optimizer import Schedule, StepResult, learning_rate_at
from latentmem.training.tasks import Passes


def weights(composer: Composer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in composer.trainable().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Loop:
    """`train` around steps whose gradients are made of the step's number alone."""

    def __init__(self, world: World, folder: Path, scores: dict[int, float] | None = None, **kwargs) -> None:
        self.world = world
        self.folder = folder
        self.lines: list[dict[str, Any]] = []
        self.scores = scores or {}
        self.settings = {"num_steps": 6, "save_every": 2, "eval_every": None, **kwargs}
        self.optimization = world.optimization(self.settings["num_steps"])
        self.bad: set[int] = set()
        self.killed_in: int | None = None
        self.progress = Progress()

    def step(self, progress: Progress) -> StepResult:
        self.progress = progress
        if progress.step == self.killed_in:
            raise KeyboardInterrupt
        progress.position += 3
        for i, parameter in enumerate(self.world.composer.trainable().values()):
            generator = torch.Generator().manual_seed(100 * progress.step + i)
            parameter.grad = torch.randn(parameter.shape, generator=generator) * parameter.detach().abs().mean()
        good, norm = self.optimization.step(progress.step, math.nan if progress.step in self.bad else 1.0)
        return StepResult({"grad_norm": norm}, moved=good, finite=good)

    def evaluate(self, step: int) -> tuple[float, dict[str, float]]:
        score = self.scores[self.progress.step]
        return score, {"eval_reward": score}

    def run(self) -> Progress:
        return train(
            self.world.composer,
            self.optimization,
            self.folder,
            Processes(),
            take_step=self.step,
            evaluate=self.evaluate,
            journal=Lines(self.lines),
            **self.settings,
        )


def steps_on_disk(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*step*"))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_learning_rates_by_hand(schedule: Schedule, expected: list[float]) -> None:
    assert [learning_rate_at(step, 6, 1.0, 2, schedule) for step in range(6)] == pytest.approx(expected)
    assert learning_rate_at(0, 1, 3.0, 0, schedule) == 3.0
    assert learning_rate_at(1, 2, 3.0, 4, schedule) == 1.5


def test_each_pass_of_a_stream_is_a_permutation_and_passes_differ() -> None:
    stream = Passes(list("abcdef"), seed=2)
    drawn, position = [], 0
    for _ in range(12):
        items, position = stream.take(position, 2)
        drawn += items
    passes = ["".join(drawn[i : i + 6]) for i in range(0, 24, 6)]
    assert all(sorted(one) == list("abcdef") for one in passes)
    assert len(set(passes)) > 1
    assert Passes(list("abcdef"), seed=2).take(6, 6)[0] == list(passes[1])
    assert Passes(list("abcdef"), seed=3).take(0, 6)[0] != list(passes[0])


def test_take_never_holds_an_item_twice_and_its_position_is_all_its_state() -> None:
    stream = Passes(list(range(5)), seed=0)
    position, counts = 0, Counter[int]()
    for _ in range(40):
        items, after = stream.take(position, 3)
        assert len(set(items)) == len(items) == 3
        assert Passes(list(range(5)), seed=0).take(position, 3) == (items, after)
        assert after >= position + 3
        position = after
        counts.update(items)
    assert set(counts) == set(range(5))
    items, position = stream.take(0, 9)
    assert (sorted(items), position) == ([0, 1, 2, 3, 4], 5)
    assert Passes([], seed=0).take(0, 3) == ([], 0)


def test_saved_optimizer_takes_the_same_next_step_bit_for_bit(make_world: Callable, tmp_path: Path) -> None:
    first, second = make_world(), make_world()
    one = Loop(first, tmp_path / "x")
    one.step(Progress(step=0))
    one.step(Progress(step=1))
    one.optimization.save(tmp_path / "optimizer.safetensors")
    first.composer.save_pretrained(tmp_path)
    other = Loop(second, tmp_path / "x")
    second.composer.load_weights(tmp_path)
    other.optimization.load(tmp_path / "optimizer.safetensors")
    one.step(Progress(step=2))
    other.step(Progress(step=2))
    assert equal(weights(first.composer), weights(second.composer))


def test_gradients_are_scaled_to_the_norm_and_the_rate_is_that_of_the_step(world: World) -> None:
    optimization = world.optimization(10, 0.1, schedule="constant", warmup_steps=2, max_grad_norm=1e-6)
    before = weights(world.composer)
    for parameter in world.composer.trainable().values():
        parameter.grad = torch.full_like(parameter, 2.0)
    num = sum(parameter.numel() for parameter in before.values())
    good, norm = optimization.step(0, 1.0)
    assert (good, norm) == (True, pytest.approx(2 * math.sqrt(num)))
    # The first AdamW step is rate * g / (|g| + eps), with all g = 1e-6 / sqrt(num).
    g = 1e-6 / math.sqrt(num)
    for name, parameter in world.composer.trainable().items():
        moved = before[name] - parameter.detach()
        rate = 0.025 if name.startswith("projection.") else 0.05  # half of the peak, and half of that
        assert torch.allclose(moved, torch.full_like(moved, rate * g / (g + 1e-8)), rtol=1e-3, atol=1e-6)
        assert parameter.grad is None


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_non_finite_loss_or_gradient_leaves_weights_and_moments_alone(world: World, kind: str) -> None:
    optimization = world.optimization()
    before = weights(world.composer)
    for parameter in world.composer.trainable().values():
        parameter.grad = torch.ones_like(parameter)
    if kind == "gradient":
        world.composer.query_latents.grad[0, 0] = math.inf
    good, _ = optimization.step(0, math.nan if kind == "loss" else 1.0)
    assert not good
    assert equal(before, weights(world.composer))
    assert not optimization.adamw.state
    assert all(parameter.grad is None for parameter in world.composer.trainable().values())


def test_interrupted_training_equals_an_uninterrupted_one(make_world: Callable, tmp_path: Path) -> None:
    scores = {0: 0.1, 3: 0.5, 6: 0.4}
    whole = Loop(make_world(), tmp_path / "whole", scores, eval_every=3)
    expected = whole.run()
    lines: list[dict[str, Any]] = []
    for killed_in in (0, 1, 3, 5, None):
        part = Loop(make_world(), tmp_path / "parts", scores, eval_every=3)
        part.lines, part.killed_in = lines, killed_in
        if killed_in is None:
            assert part.run() == expected
        else:
            with pytest.raises(KeyboardInterrupt):
                part.run()
        lines = part.lines
    assert lines == whole.lines
    assert [line["step"] for line in lines if "eval_reward" in line] == [0, 3, 6]
    assert equal(weights(whole.world.composer), weights(part.world.composer))
    for name in ("whole", "parts"):
        assert steps_on_disk(tmp_path / name) == ["step-000003", "step-000006"]
    assert (tmp_path / "whole/progress.json").read_bytes() == (tmp_path / "parts/progress.json").read_bytes()


def test_finished_training_does_nothing_more(make_world: Callable, tmp_path: Path) -> None:
    Loop(make_world(), tmp_path).run()
    again = Loop(make_world(), tmp_path)
    again.killed_in = 6
    assert again.run().step == 6
    assert again.lines == []


def test_best_evaluated_checkpoint_is_kept_and_selected(world: World, tmp_path: Path) -> None:
    scores = {0: 0.1, 1: 0.2, 2: 0.9, 3: 0.9, 4: math.nan, 5: 0.3, 6: 0.3}
    loop = Loop(world, tmp_path, scores, eval_every=1, save_every=100)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    evaluate = loop.evaluate

    def evaluate_and_remember(step: int) -> tuple[float, dict[str, float]]:
        seen[loop.progress.step] = weights(world.composer)
        return evaluate(step)

    loop.evaluate = evaluate_and_remember  # type: ignore[method-assign]
    progress = loop.run()
    assert (progress.best_step, progress.best_score) == (2, 0.9)
    assert set(progress.scores) == {"0", "1", "2", "3", "5", "6"}
    assert steps_on_disk(tmp_path) == ["step-000002", "step-000006"]
    assert newest_checkpoint(tmp_path) == tmp_path / "step-000006"
    assert selected_checkpoint(tmp_path) == tmp_path / "step-000002"
    world.composer.load_weights(tmp_path / "step-000002")
    assert equal(weights(world.composer), seen[2])


def test_without_evaluations_the_newest_is_kept_and_selected(world: World, tmp_path: Path) -> None:
    assert selected_checkpoint(tmp_path) is None
    Loop(world, tmp_path).run()
    assert steps_on_disk(tmp_path) == ["step-000006"]
    assert selected_checkpoint(tmp_path) == newest_checkpoint(tmp_path) == tmp_path / "step-000006"


def test_three_bad_steps_in_a_row_end_training_with_the_last_good_weights(world: World, tmp_path: Path) -> None:
    loop = Loop(world, tmp_path, num_steps=9)
    loop.bad = {1, 2, 5, 6, 7}
    with pytest.raises(TrainingError) as error:
        loop.run()
    assert str(error.value) == (
        f"{tmp_path}: loss or gradient was not finite in 3 steps in a row, up to step 8; {tmp_path / 'step-000006'} is "
        "the last good checkpoint. Lower the learning rate or use float32, in a new run"
    )
    assert [line["bad"] for line in loop.lines] == [0, 1, 1, 0, 0, 1, 1, 1]
    stopped = weights(world.composer)
    world.composer.load_weights(tmp_path / "step-000006")
    assert equal(weights(world.composer), stopped)


def test_count_of_bad_steps_survives_an_interruption(make_world: Callable, tmp_path: Path) -> None:
    loop = Loop(make_world(), tmp_path, save_every=1)
    loop.bad, loop.killed_in = {2, 3, 4}, 4
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    again = Loop(make_world(), tmp_path, save_every=1)
    again.bad = {4}
    with pytest.raises(TrainingError, match="up to step 5"):
        again.run()


def test_last_step_is_saved_even_if_it_was_stopped(world: World, tmp_path: Path) -> None:
    loop = Loop(world, tmp_path)
    loop.bad = {5}
    assert loop.run().bad_steps == 1
    assert newest_checkpoint(tmp_path) == tmp_path / "step-000006"


@pytest.mark.parametrize("at", ["composer.safetensors", "optimizer.safetensors", "progress.json"])
def test_full_disk_during_a_save_keeps_the_last_good_checkpoint(
    make_world: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    expected = Loop(make_world(), tmp_path / "whole")
    expected.run()
    folder = tmp_path / "full"
    loop = Loop(make_world(), folder)
    loop.killed_in = 4
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    with monkeypatch.context() as patch:
        fill_disk(patch, at)
        full = Loop(make_world(), folder)
        with pytest.raises(LatentMemError, match=rf"{at}: cannot be written \(No space left on device\)"):
            full.run()
    assert newest_checkpoint(folder) == selected_checkpoint(folder) == folder / "step-000004"
    again = Loop(make_world(), folder)
    again.run()
    assert equal(weights(again.world.composer), weights(expected.world.composer))
    assert steps_on_disk(folder) == ["step-000006"]


def fill_disk(patch: pytest.MonkeyPatch, name: str) -> None:
    """Any further write of a file of this name finds the disk full."""
    import errno
    import os

    real = os.fsync

    def fsync(handle: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    patch.setattr(os, "fsync", fsync)


def test_kill_while_old_checkpoints_are_removed_costs_nothing(
    make_world: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(make_world(), tmp_path)

    def half_removed(path: Path) -> None:
        (path / "composer.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", half_removed)
        with pytest.raises(KeyboardInterrupt):
            loop.run()
    assert steps_on_disk(tmp_path) == ["step-000000", "step-000002"]
    again = Loop(make_world(), tmp_path)
    again.run()
    assert steps_on_disk(tmp_path) == ["step-000006"]


def test_damaged_checkpoints_are_told_in_one_line(make_world: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Loop(make_world(), folder, num_steps=2).run()

    def refused(name: str, content: bytes) -> str:
        copied = tmp_path / "copy"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(folder, copied)
        (copied / name).write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            Loop(make_world(), copied, num_steps=3).run()
        assert "\n" not in str(error.value)
        return str(error.value).removeprefix(str(copied / name))

    optimizer = "step-000002/optimizer.safetensors"
    whole = (folder / optimizer).read_bytes()
    assert refused(optimizer, whole[:-7]).startswith(": the optimizer cannot be read (")
    progress = json.loads((folder / "progress.json").read_text())
    assert refused("progress.json", b"{").startswith(": not valid JSON (")
    assert refused("progress.json", json.dumps({**progress, "x": 1}).encode()).startswith(": damaged (x: ")
    assert refused("step-000002/composer.safetensors", b"").startswith(": damaged (")
