"""LMPO on a real tiny model, two turns an episode: who learns, in which direction, and that it resumes exactly."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_world import (
    SAMPLING,
    TASKS,
    Lines,
    SlowLosses,
    Toy,
    World,
    assert_same_gradients,
    plain_logps,
    take_gradients,
    wake,
)

from latentmem.config import LMPOSection, Sampling
from latentmem.errors import ConfigError, TrainingError
from latentmem.models.agent import Sampled
from latentmem.models.language_model import KeepingModel
from latentmem.rollout import Rollouts
from latentmem.teams.dylan import DylanTeam
from latentmem.training import lmpo as module
from latentmem.training.checkpoint_folder import Progress
from latentmem.training.lmpo import LMPOTrainer
from latentmem.training.losses import group_advantages
from latentmem.training.optimizer import Optimization, StepResult
from latentmem.training.scoring import Example, score_all
from latentmem.training.signal import TEAM
from latentmem.trajectory import Task, Trajectory

SETTINGS = LMPOSection(
    num_steps=4, tasks_per_step=2, group_size=3, save_every=1, eval_every=None, micro_batch_positions=200
)
TIMES = ("rollout_seconds", "update_seconds")


def trainer_of(
    world: World,
    start: Callable[[Task], Any] = Toy,
    sampling: Sampling = SAMPLING,
    optimization: Optimization | None = None,
    tasks: list[Task] | None = None,
    aside: list[Task] | None = None,
    **changed,
) -> LMPOTrainer:
    trainer = LMPOTrainer(
        world.memory,
        world.model,
        world.team,
        SimpleNamespace(start=start),
        SETTINGS,
        tasks=TASKS[:6] if tasks is None else tasks,
        aside=TASKS[6:] if aside is None else aside,
        sampling=sampling,
        max_turns=2,
        seed=4,
        **changed,
    )
    trainer.optimization = optimization or world.optimization(trainer.settings.num_steps, 1e-3)
    return trainer


def weights(world: World) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in world.composer.trainable().items()}


def moved(before: dict[str, torch.Tensor], world: World) -> set[str]:
    return {name for name, value in weights(world).items() if not torch.equal(value, before[name])}


def recorded(trainer: LMPOTrainer, monkeypatch: pytest.MonkeyPatch) -> list[list[Trajectory]]:
    """The groups that this trainer plays from now on."""
    groups: list[list[Trajectory]] = []
    real = module.rollout

    def rollout(*args: Any, **kwargs: Any) -> Rollouts:
        played = real(*args, **kwargs)
        groups.extend(played.groups)
        return played

    monkeypatch.setattr(module, "rollout", rollout)
    return groups


def logps_now(world: World, groups: list[list[Trajectory]]) -> list[torch.Tensor]:
    examples = [
        Example.of(m, world.model, m.recalled.text, SAMPLING.temperature)
        for group in groups
        for trajectory in group
        for m in trajectory.messages
    ]
    found: dict[int, torch.Tensor] = {}
    for rows, logps, mask in score_all(world.composer, world.model, examples, 500):
        found |= {row: logps[i, mask[i]] for i, row in enumerate(rows)}
    return [found[row] for row in range(len(examples))]


def objective(world: World, groups: list[list[Trajectory]]) -> float:
    """Mean of advantage x log-probability over all response tokens."""
    advantages = []
    for group in groups:
        rewards = torch.tensor([[trajectory.reward for trajectory in group]])
        for trajectory, advantage in zip(group, group_advantages(rewards)[0].tolist(), strict=True):
            advantages += [advantage] * len(trajectory.messages)
    rows = logps_now(world, groups)
    return sum(a * float(row.sum()) for a, row in zip(advantages, rows, strict=True)) / sum(map(len, rows))


def run(trainer: LMPOTrainer, folder: Path, lines: list[dict[str, Any]], stop_at: int | None = None) -> Progress:
    step = trainer.step

    def stoppable(progress: Progress) -> StepResult:
        if progress.step == stop_at:
            raise KeyboardInterrupt
        return step(progress)

    trainer.step = stoppable  # type: ignore[method-assign]
    return trainer.train(folder, Lines(lines, without=TIMES))


def test_first_ratio_is_one_and_the_loss_that_of_the_advantages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(world)
    groups = recorded(trainer, monkeypatch)
    result = trainer.step(Progress())
    metrics = result.metrics
    assert metrics["first_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["clip_fraction"] == 0
    assert (result.moved, result.finite) == (True, True)
    assert (metrics["groups"], metrics["signal_groups"]) == (2, 2)
    total = tokens = 0
    for group in groups:
        rewards = torch.tensor([trajectory.reward for trajectory in group])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert all(len(trajectory.steps) == 2 for trajectory in group)
        for trajectory, advantage in zip(group, advantages.tolist(), strict=True):
            length = sum(len(message.token_ids) for message in trajectory.messages)
            total -= advantage * length
            tokens += length
    assert metrics["loss"] == pytest.approx(total / tokens, abs=1e-5)
    rewards = [trajectory.reward for group in groups for trajectory in group]
    assert metrics["reward"] == pytest.approx(sum(rewards) / 6)
    assert metrics["response_tokens"] == pytest.approx(tokens / 24)


@pytest.mark.parametrize("team", ["autogen", "camel", pytest.param("dylan", marks=pytest.mark.slow), "macnet"])
def test_first_ratio_of_every_token_is_one_in_all_turns_of_every_team(
    make_world: Callable, monkeypatch: pytest.MonkeyPatch, team: str
) -> None:
    world = make_world(team)
    wake(world.composer)
    ratios: list[torch.Tensor] = []
    real = module.lmpo_loss

    def spy(logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, **kwargs: Any):
        ratios.append((logps - old_logps).detach()[mask].exp())
        return real(logps, old_logps, advantages, mask, **kwargs)

    monkeypatch.setattr(module, "lmpo_loss", spy)
    trainer = trainer_of(world)
    groups = recorded(trainer, monkeypatch)
    assert trainer.step(Progress()).metrics["signal_groups"] == len(groups) == 2
    messages = [message for group in groups for trajectory in group for message in trajectory.messages]
    if team != "dylan":  # which decides as it goes
        assert len(messages) == 2 * 3 * 2 * len(world.team.roles)  # tasks, rollouts, turns, agents
    together = torch.cat(ratios)
    assert len(together) == sum(len(message.token_ids) for message in messages)
    assert torch.allclose(together, torch.ones_like(together), rtol=0, atol=1e-4)


class Forgetful(KeepingModel):
    """Keeps nothing of what it reads."""

    def respond(self, prompts: Any, sampling: Sampling) -> list[Sampled]:
        return self.model.respond(prompts, sampling)


def test_what_the_rollout_read_is_not_read_again_and_moves_the_composer_alike(
    make_world: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, after = [], []
    for keeps in (True, False):
        world = make_world("autogen")
        wake(world.composer)
        if not keeps:
            monkeypatch.setattr(module, "KeepingModel", Forgetful)
        seen: list[int] = []
        first = world.model.model.base_model.layers[0]
        first.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[1] * len(inputs[0])))
        trainer = trainer_of(world)
        trainer.max_turns = 1  # over several turns the prompts of a role begin alike in less than each turn's
        assert trainer.step(Progress()).moved
        counts.append(sum(seen))
        after.append(weights(world))
    assert counts[0] < counts[1] - 100
    for name, value in after[0].items():
        torch.testing.assert_close(value, after[1][name], atol=1e-6, rtol=1e-4)


def test_messages_of_one_group_may_differ_in_number_and_each_has_the_advantage_of_its_episode(
    make_world: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world("dylan")
    # Agreement by chance: whether the number of characters is even or odd.
    world.team = DylanTeam(world.team.file, read=lambda text: str(len(text) % 2))
    wake(world.composer)
    trainer = trainer_of(world, group_size=6, micro_batch_positions=10**6)
    groups = recorded(trainer, monkeypatch)
    advantages: list[float] = []
    real = module.lmpo_loss

    def spy(logps: torch.Tensor, old_logps: torch.Tensor, given: torch.Tensor, mask: torch.Tensor, **kwargs: Any):
        assert torch.allclose(logps[mask], old_logps[mask], rtol=0, atol=1e-4)
        advantages.extend(given.tolist())
        return real(logps, old_logps, given, mask, **kwargs)

    monkeypatch.setattr(module, "lmpo_loss", spy)
    result = trainer.step(Progress())
    assert result.metrics["first_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert result.moved
    counts = [[len(trajectory.messages) for trajectory in group] for group in groups]
    assert all(len(set(group)) > 1 for group in counts), counts
    assert {"ranker"} < {m.role for group in groups for t in group for m in t.messages}
    expected = []
    for group, sizes in zip(groups, counts, strict=True):
        rewards = torch.tensor([trajectory.reward for trajectory in group])
        for advantage, size in zip(((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist(), sizes, strict=True):
            expected += [advantage] * size
    assert sorted(advantages) == pytest.approx(sorted(expected), abs=1e-4)


def test_update_is_the_objective_written_as_loops_over_whole_sequences(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, high, delta, beta = 0.2, 0.25, 1.5, 0.3
    wake(world.composer)
    trainer = trainer_of(world, epsilon_high=high, delta=delta, beta=beta, micro_batch_positions=10**6)
    rolled = trainer._rollouts(Progress())
    kept = rolled.groups
    assert len(kept) == 2
    wake(world.composer)  # so that the policy of the rollouts, which the KL term refers to, is not today's any more
    scored = []  # examples with their old log-probs, reference and advantage; composed anew for each message
    for group, by_role, _ in kept:
        for trajectory, advantage in zip(group, [only[TEAM] for only in by_role], strict=True):
            for m in trajectory.messages:
                example = Example.of(m, world.model, m.recalled.text, SAMPLING.temperature)
                scored.append((example, m.logps, advantage))
    now = weights(world)
    with torch.no_grad():
        for name, parameter in world.composer.trainable().items():
            parameter.copy_(trainer.initial[name])
        references = [plain_logps(world.composer, world.model, example).tolist() for example, _, _ in scored]
        for name, parameter in world.composer.trainable().items():
            parameter.copy_(now[name])

    losses: list[list[torch.Tensor]] = []  # token by token
    slow = SlowLosses(low, high, delta, beta)
    for (example, old, advantage), reference in zip(scored, references, strict=True):
        losses.append(slow(plain_logps(world.composer, world.model, example), old, reference, advantage))
    slow.assert_all_ways_were_taken()

    num_tokens, num_messages = sum(map(len, losses)), len(losses)
    token_mean = sum(sum(row) for row in losses) / num_tokens
    totals = {
        "grpo": sum(sum(row) / len(row) for row in losses) / num_messages,
        "bnpo": token_mean,  # all of the step are one micro-batch here
        "dapo": token_mean,
        "dr_grpo": token_mean * num_tokens / (num_messages * SAMPLING.max_response_tokens),
    }
    expected = {}
    for loss_type, total in totals.items():
        total.backward(retain_graph=True)
        expected[loss_type] = take_gradients(world.composer)

    found: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(
        trainer.optimization, "step", lambda *_: (True, found.append(take_gradients(world.composer)) or 1.0)
    )
    for loss_type, total in totals.items():
        trainer.settings = trainer.settings.model_copy(update={"loss_type": loss_type})
        metrics = trainer._update(rolled._replace(composed={}), 0).metrics  # the composer was changed since
        assert metrics["loss"] == pytest.approx(float(total.detach()), rel=1e-5, abs=1e-6)
        assert metrics["clip_fraction"] == pytest.approx((slow.kinds["clipped"] + slow.kinds["bounded"]) / num_tokens)
        assert_same_gradients(found.pop(), expected[loss_type], 1e-4)


def test_importance_weighs_each_token_by_what_is_scored_over_what_was_sampled_up_to_the_cap(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cap = 1.1
    trainer = trainer_of(world, importance_cap=cap, micro_batch_positions=60)
    rolled = trainer._rollouts(Progress())
    kept = rolled.groups
    wake(world.composer)  # so that what is scored is not what was sampled
    total, ratios = torch.zeros(()), []
    for group, by_role, _ in kept:
        for trajectory, advantage in zip(group, [only[TEAM] for only in by_role], strict=True):
            for m in trajectory.messages:
                example = Example.of(m, world.model, m.recalled.text, SAMPLING.temperature)
                logps = plain_logps(world.composer, world.model, example)
                ratio = (logps.detach() - torch.tensor(m.logps)).exp()
                ratios += ratio.tolist()
                # Before the update the policy's own ratio is 1, and its gradient that of the log-probability.
                total = total - ((1 + logps - logps.detach()) * advantage * ratio.clamp(max=cap)).sum()
    assert min(ratios) < 1 / cap
    assert sum(ratio > cap for ratio in ratios) > 3
    (total / len(ratios)).backward()
    expected = take_gradients(world.composer)
    found: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(
        trainer.optimization, "step", lambda *_: (True, found.append(take_gradients(world.composer)) or 1.0)
    )
    metrics = trainer._update(rolled._replace(composed={}), 0).metrics
    assert metrics["loss"] == pytest.approx(float(total.detach()) / len(ratios), rel=1e-4, abs=1e-6)
    assert metrics["first_ratio_max"] == pytest.approx(1, abs=1e-6)
    assert metrics["importance_max"] == pytest.approx(max(ratios), rel=1e-4)
    assert metrics["importance_mean"] == pytest.approx(sum(min(r, cap) for r in ratios) / len(ratios), rel=1e-4)
    assert_same_gradients(found.pop(), expected, 1e-4)


def test_in_bfloat16_the_first_ratio_is_one_only_with_importance_weights(make_world: Callable) -> None:
    without, corrected = (
        trainer_of(make_world(half=True), importance_cap=cap, micro_batch_positions=60).step(Progress()).metrics
        for cap in (None, 2.0)
    )
    assert without["first_ratio_max"] > 1.005
    assert "importance_max" not in without
    assert corrected["first_ratio_max"] == 1
    assert corrected["importance_max"] == pytest.approx(without["first_ratio_max"])
    assert corrected["importance_mean"] == pytest.approx(1, abs=0.05)


def test_everything_of_the_composer_moves_and_the_backbone_stays_bit_equal(world: World) -> None:
    ours = {id(parameter) for parameter in world.composer.trainable().values()}
    base = {n: p for n, p in world.model.model.named_parameters() if id(p) not in ours}
    before, frozen = weights(world), {name: parameter.clone() for name, parameter in base.items()}
    trainer, progress = trainer_of(world, optimization=world.optimization(4, 1e-2)), Progress()
    trainer.step(progress)
    # B starts at zero, so the first gradient of A is zero.
    asleep = {name for name in before if "lora_A" in name}
    assert len(asleep) == 4
    assert moved(before, world) == set(before) - asleep
    progress.step = 1
    trainer.step(progress)
    assert moved(before, world) == set(before)
    assert all(torch.equal(frozen[name], parameter) for name, parameter in base.items())


def test_update_makes_better_rollouts_likelier(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # AdamW's first step goes down each coordinate of the gradient alike; small enough, it must raise the objective.
    trainer = trainer_of(world, group_size=4, optimization=world.optimization(4, 2e-4, projection_rate=0.1))
    groups = recorded(trainer, monkeypatch)
    rolled = trainer._rollouts(Progress())
    before = objective(world, groups)
    trainer._update(rolled, 0)
    assert objective(world, groups) > before + 3e-4


def test_equal_rewards_move_nothing(world: World) -> None:
    before = weights(world)
    result = trainer_of(world, lambda task: Toy(task, 2, lambda action: 0.5)).step(Progress())
    metrics = result.metrics
    assert (result.moved, result.finite, metrics["signal_groups"], metrics["groups"]) == (False, True, 0, 2)
    assert metrics["reward"] == pytest.approx(0.5)
    assert "loss" not in metrics
    assert moved(before, world) == set()


def test_crashed_episodes_are_counted_and_not_compared(world: World) -> None:
    class Crashing(Toy):
        def step(self, action: str) -> Any:
            raise RuntimeError("out of order")

    number = iter(range(100))
    before = weights(world)
    # One of three crashes; the other two have equal rewards, so no group carries signal.
    start = lambda task: Crashing(task) if next(number) % 3 == 1 else Toy(task, 2, lambda _: 1.0)  # noqa: E731
    result = trainer_of(world, start).step(Progress())
    assert (result.metrics["errors"], result.metrics["signal_groups"], result.moved) == (2, 0, False)
    assert moved(before, world) == set()


def test_further_tasks_are_drawn_until_enough_groups_carry_signal(world: World) -> None:
    progress = Progress()
    none = trainer_of(world, lambda task: Toy(task, 2, lambda action: 0.0), max_resamples=2)
    assert none.step(progress).metrics["groups"] == 6
    assert progress.position == 6
    assert trainer_of(world, max_resamples=2).step(Progress()).metrics["groups"] == 2


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_step_does_not_depend_on_micro_batch_positions(make_world: Callable, loss_type: str) -> None:
    found = []
    for budget in (10**6, 60):
        world = make_world()
        trainer = trainer_of(world, loss_type=loss_type, micro_batch_positions=budget)
        metrics = trainer.step(Progress()).metrics
        found.append((metrics["loss"], metrics["grad_norm"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


def test_bnpo_takes_the_mean_over_micro_batches(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    real = module.lmpo_loss

    def spy(*args: Any, **kwargs: Any) -> Any:
        loss, stats = real(*args, **kwargs)
        losses.append(1.0 + len(losses))  # that of these advantages sums to about zero
        return loss + losses[-1], stats

    monkeypatch.setattr(module, "lmpo_loss", spy)
    metrics = trainer_of(world, loss_type="bnpo", micro_batch_positions=60).step(Progress()).metrics
    assert len(losses) >= 4
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_second_pass_has_other_ratios_against_the_log_probs_of_sampling(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    old: list[torch.Tensor] = []
    real = module.lmpo_loss

    def spy(logps: torch.Tensor, old_logps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        old.append(old_logps)
        return real(logps, old_logps, *args, **kwargs)

    monkeypatch.setattr(module, "lmpo_loss", spy)
    trainer = trainer_of(world, num_iterations=2, micro_batch_positions=10**6, optimization=world.optimization(4, 3e-2))
    groups = recorded(trainer, monkeypatch)
    result = trainer.step(Progress())
    metrics = result.metrics
    assert metrics["first_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["ratio_max"] > 1.01
    first, second = old
    assert torch.equal(first, second)
    sampled = sorted(m.logps for group in groups for t in group for m in t.messages)
    rows = sorted(tuple(row[row != 0].tolist()) for row in first)
    assert torch.allclose(torch.tensor(sum(sampled, ())), torch.tensor(sum(rows, ())))


def test_kl_is_zero_before_the_first_update_and_pulls_back_after(world: World) -> None:
    trainer = trainer_of(world, beta=0.5)
    rolled = trainer._rollouts(Progress())
    kept = rolled.groups
    examples = [
        Example.of(m, world.model, m.recalled.text, SAMPLING.temperature)
        for group, *_ in kept
        for t in group
        for m in t.messages
    ]
    reference = trainer._reference_logps(examples, rolled.kept)
    before = logps_now(world, [group for group, *_ in kept])
    assert all(torch.allclose(torch.tensor(r), b, atol=1e-5) for r, b in zip(reference, before, strict=True))
    assert trainer._update(rolled, 0).metrics["kl"] == pytest.approx(0, abs=1e-6)

    with torch.no_grad():
        for parameter in world.composer.trainable().values():
            parameter += 0.03
    assert all(
        torch.equal(torch.tensor(a), torch.tensor(b))
        for a, b in zip(trainer._reference_logps(examples, rolled.kept), reference, strict=True)
    )
    flat = [
        module.Group(group, [{TEAM: 0.0} for _ in by_role], own) for group, by_role, own in kept
    ]  # nothing but the KL term
    found = [trainer._update(rolled._replace(groups=flat, composed={}), 0).metrics["kl"] for _ in range(6)]
    assert found[0] > 1e-3
    assert found[-1] < found[0] * 0.9


def test_without_beta_no_kl_is_reported(world: World) -> None:
    assert "kl" not in trainer_of(world).step(Progress()).metrics


def test_non_finite_loss_stops_the_step_and_three_in_a_row_the_training(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = module.lmpo_loss
    trainer = trainer_of(world, num_steps=9)

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        loss, stats = real(*args, **kwargs)
        return (loss * math.nan if trainer_step["now"] >= 1 else loss), stats

    trainer_step = {"now": 0}
    step = trainer.step

    def counting(progress: Progress) -> StepResult:
        trainer_step["now"] = progress.step
        return step(progress)

    trainer.step = counting  # type: ignore[method-assign]
    monkeypatch.setattr(module, "lmpo_loss", spoilt)
    lines: list[dict[str, Any]] = []
    with pytest.raises(TrainingError, match="up to step 4"):
        run(trainer, tmp_path / "x", lines)
    assert [(line["updated"], line["bad"]) for line in lines] == [(1, 0), (0, 1), (0, 1), (0, 1)]
    assert all(math.isnan(line["loss"]) for line in lines[1:])
    stopped = weights(world)
    world.composer.load_weights(tmp_path / "x/step-000003")
    assert moved(stopped, world) == set()


@pytest.mark.slow
def test_resumed_training_equals_an_uninterrupted_one_bit_for_bit(make_world: Callable, tmp_path: Path) -> None:
    options = {"num_steps": 3, "eval_every": 2, "beta": 0.1, "num_iterations": 2, "max_resamples": 1}
    whole = make_world()
    expected: list[dict[str, Any]] = []
    progress = run(trainer_of(whole, **options), tmp_path / "whole", expected)
    lines: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        run(trainer_of(make_world(), **options), tmp_path / "part", lines, stop_at=2)
    again = make_world()
    assert run(trainer_of(again, **options), tmp_path / "part", lines) == progress
    assert lines == expected
    assert {line["step"] for line in lines if "eval_reward" in line} == {0, 2, 3}
    assert moved(weights(whole), again) == set()


def test_evaluation_is_greedy_on_the_tasks_set_aside(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(world)
    groups = recorded(trainer, monkeypatch)
    score = trainer.evaluate()
    assert [group[0].task for group in groups] == TASKS[6:]
    assert {m.temperature for (t,) in groups for m in t.messages} == {0}
    assert score == pytest.approx(sum(t.reward for (t,) in groups) / 2)
    assert trainer.evaluate() == score


def test_settings_that_leave_nothing_to_compare_are_refused(world: World) -> None:
    with pytest.raises(ConfigError) as error:
        trainer_of(world, group_size=1)
    assert str(error.value) == (
        "lmpo: group_size is 1; advantages need at least 2 rollouts per task, set it to 4 or more"
    )
    with pytest.raises(ConfigError) as error:
        trainer_of(world, sampling=Sampling(temperature=0))
    assert str(error.value) == (
        "sampling.temperature is 0; greedy rollouts of one task are all equal, set it to 0.6 or more"
    )
    with pytest.raises(
        TrainingError, match=r"^6 tasks to train on and 0 set aside to evaluate on; give at least one of each$"
    ):
        trainer_of(world, aside=[], eval_every=2)
    with pytest.raises(TrainingError, match=r"^0 tasks to train on"):
        trainer_of(world, tasks=[])
