"""GRPO on the agents themselves: LMPO's trainer with another policy, on a model that a composer shares."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_lmpo import moved, recorded, run, weights
from test_scoring import LARGE, toy_loss
from torch import Tensor
from training_world import (
    SAMPLING,
    TASKS,
    SlowLosses,
    Toy,
    World,
    assert_same_gradients,
    assert_slopes,
    take_gradients,
    wake,
)

from latentmem.config import GRPOSection
from latentmem.memory.parametric import ParametricMemory
from latentmem.rollout import rollout
from latentmem.training import lmpo as module
from latentmem.training.checkpoint_folder import Progress
from latentmem.training.lmpo import LMPOTrainer
from latentmem.training.policies import AgentsPolicy
from latentmem.training.scoring import Example
from latentmem.training.signal import TEAM
from latentmem.trajectory import Message, Trajectory

GRPO = GRPOSection(
    num_steps=4,
    tasks_per_step=2,
    group_size=3,
    schedule="cosine",
    warmup_steps=1,
    save_every=1,
    micro_batch_positions=200,
)


def rival_of(world: World) -> ParametricMemory:
    return ParametricMemory(world.model, rank=2, alpha=4.0, target_modules=("q_proj", "down_proj"), seed=12)


def trainer_of(rival: ParametricMemory, world: World, learning_rate: float = 1e-3, **changed: Any) -> LMPOTrainer:
    return LMPOTrainer(
        rival,
        world.model,
        world.team,
        SimpleNamespace(start=Toy),
        GRPO,
        tasks=TASKS[:6],
        aside=TASKS[6:],
        sampling=SAMPLING,
        max_turns=2,
        seed=4,
        **{"learning_rate": learning_rate, **changed},
    )


def played_by(rival: ParametricMemory, world: World, tasks: int = 2, group_size: int = 3) -> list[Message]:
    played = rollout(
        world.team,
        rival,
        world.model,
        TASKS[:tasks],
        Toy,
        sampling=SAMPLING,
        group_size=group_size,
        seed=5,
        max_turns=2,
    )
    return [message for trajectory in played.trajectories for message in trajectory.messages]


def examples_of(messages: list[Message], rival: ParametricMemory) -> list[Example]:
    return [AgentsPolicy(rival).example(message, SAMPLING.temperature) for message in messages]


def plain_logps(rival: ParametricMemory, example: Example) -> Tensor:
    """Log-probs [T] of one message alone: the whole sequence, transformers' own mask, all logits."""
    ids = torch.tensor([[*example.prompt_ids, *example.token_ids]])
    with rival.model.as_agent(rival.adapter) as agent:
        logits = agent.model(ids).logits[0, len(example.prompt_ids) - 1 : -1]
    response = torch.tensor(example.token_ids)[:, None]
    return (logits / example.temperature).log_softmax(1).gather(1, response)[:, 0]


def plain_loss(rival: ParametricMemory, examples: list[Example], loss_of: Callable = toy_loss) -> Tensor:
    parts = []
    for row, example in enumerate(examples):
        logps = plain_logps(rival, example)[None]
        parts.append(loss_of([row], logps, torch.ones_like(logps, dtype=torch.bool)))
    return torch.stack(parts).sum()


def test_gradients_equal_finite_differences_and_a_plain_backward_pass(make_world: Callable) -> None:
    world = make_world(double=True)
    rival = rival_of(world)
    assert {p.dtype for p in rival.trainable().values()} == {torch.float64}
    wake(rival)
    wake(world.composer)
    policy, examples = AgentsPolicy(rival), examples_of(played_by(rival, world, tasks=1), rival)
    plain_loss(rival, examples).backward()
    expected = take_gradients(rival)
    assert expected.keys() == rival.trainable().keys()
    for budget in (LARGE, 150):
        assert policy.accumulate(examples, toy_loss, budget, None) == pytest.approx(
            float(plain_loss(rival, examples).detach()), rel=1e-6
        )
        found = take_gradients(rival)
        assert_same_gradients(found, expected, 1e-10)

    def loss() -> float:
        return sum(float(toy_loss(rows, logps, mask)) for rows, logps, mask in policy.score_all(examples, 300))

    assert_slopes(rival, loss, found)
    assert take_gradients(world.composer) == {}


@pytest.mark.parametrize("budget", [LARGE, 300, 150, 1])
def test_micro_batches_hold_every_message_once_and_keep_to_the_budget(world: World, budget: int) -> None:
    rival = rival_of(world)
    examples = examples_of(played_by(rival, world), rival)
    policy = AgentsPolicy(rival)
    batches = policy.micro_batches(examples, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(examples)))
    assert batches == [rows for rows, _, _ in policy.score_all(examples, budget)]
    for batch in batches:
        longest = max(len(examples[row].prompt_ids) + len(examples[row].token_ids) - 1 for row in batch)
        assert longest <= budget or len(batch) == 1
    assert policy.accumulate([], toy_loss, budget, None) == 0
    assert policy.micro_batches([], budget) == []


def test_what_rollouts_share_of_their_prompts_is_read_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = rival_of(world)
    examples = examples_of(played_by(rival, world, tasks=2, group_size=4), rival)
    positions = []
    real = type(world.model.model.base_model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        positions.append(kwargs["inputs_embeds"].shape[:2].numel())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(world.model.model.base_model), "forward", forward)
    list(AgentsPolicy(rival).score_all(examples, 1))
    alone = sum(len(example.prompt_ids) + len(example.token_ids) - 1 for example in examples)
    assert sum(positions) == alone
    positions.clear()
    list(AgentsPolicy(rival).score_all(examples, 600))
    assert sum(positions) < 0.55 * alone


@pytest.mark.parametrize(
    "team",
    ["autogen", "camel", pytest.param("dylan", marks=pytest.mark.slow), pytest.param("macnet", marks=pytest.mark.slow)],
)
def test_first_ratio_of_every_token_is_one_in_all_turns_of_every_team(
    make_world: Callable, monkeypatch: pytest.MonkeyPatch, team: str
) -> None:
    world = make_world(team)
    rival = rival_of(world)
    wake(rival)
    ratios: list[Tensor] = []
    real = module.lmpo_loss

    def spy(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, **kwargs: Any) -> Any:
        ratios.append((logps - old_logps).detach()[mask].exp())
        return real(logps, old_logps, advantages, mask, **kwargs)

    monkeypatch.setattr(module, "lmpo_loss", spy)
    trainer = trainer_of(rival, world)
    groups = recorded(trainer, monkeypatch)
    metrics = trainer.step(Progress()).metrics
    groups = [group for group in groups if len({trajectory.reward for trajectory in group}) > 1]
    assert metrics["signal_groups"] == len(groups) > 0
    assert metrics["first_ratio_max"] == pytest.approx(1, abs=1e-4)
    messages = [message for group in groups for trajectory in group for message in trajectory.messages]
    assert {message.recalled.kind for message in messages} == {"parametric"}
    assert all(len(trajectory.steps) == 2 for group in groups for trajectory in group)
    together = torch.cat(ratios)
    assert len(together) == sum(len(message.token_ids) for message in messages)
    assert torch.allclose(together, torch.ones_like(together), rtol=0, atol=1e-4)


def test_the_adapter_moves_the_logps_so_equal_ratios_mean_something(world: World) -> None:
    rival = rival_of(world)
    messages = played_by(rival, world)
    wake(rival)
    examples = examples_of(messages, rival)
    for rows, logps, mask in AgentsPolicy(rival).score_all(examples, LARGE):
        for i, row in enumerate(rows):
            assert (logps[i, mask[i]] - torch.tensor(messages[row].logps)).abs().sum() > 1e-2


def test_update_is_the_objective_written_as_loops_over_whole_sequences(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, high, delta, beta = 0.2, 0.25, 1.5, 0.3
    rival = rival_of(world)
    trainer = trainer_of(rival, world, epsilon_high=high, delta=delta, beta=beta, micro_batch_positions=LARGE)
    rolled = trainer._rollouts(Progress())
    kept = rolled.groups
    assert len(kept) == 2
    wake(rival)  # so that neither the policy of the rollouts nor the frozen model is today's any more
    losses: list[list[Tensor]] = []
    slow = SlowLosses(low, high, delta, beta)
    for group, by_role, _ in kept:
        advantages = [only[TEAM] for only in by_role]
        rewards = torch.tensor([trajectory.reward for trajectory in group])
        assert advantages == pytest.approx(((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist(), abs=1e-5)
        for trajectory, advantage in zip(group, advantages, strict=True):
            for message in trajectory.messages:
                (example,) = examples_of([message], rival)
                ids = torch.tensor([[*example.prompt_ids, *example.token_ids]])
                with torch.no_grad(), world.model.as_agent() as frozen:  # the reference: no adapter at all
                    logits = frozen.model(ids).logits[0, len(example.prompt_ids) - 1 : -1] / SAMPLING.temperature
                reference = logits.log_softmax(1).gather(1, torch.tensor(example.token_ids)[:, None])[:, 0]
                losses.append(slow(plain_logps(rival, example), message.logps, reference, advantage))
    slow.assert_all_ways_were_taken()
    num_tokens = sum(map(len, losses))
    total = sum(sum(row) for row in losses) / num_tokens
    total.backward()
    expected = take_gradients(rival)

    found: list[dict[str, Tensor]] = []
    monkeypatch.setattr(trainer.optimization, "step", lambda *_: (True, found.append(take_gradients(rival)) or 1.0))
    metrics = trainer._update(rolled._replace(composed={}), 0).metrics
    assert metrics["loss"] == pytest.approx(float(total.detach()), rel=1e-5, abs=1e-6)
    assert metrics["clip_fraction"] == pytest.approx((slow.kinds["clipped"] + slow.kinds["bounded"]) / num_tokens)
    assert_same_gradients(found.pop(), expected, 1e-4)


def matrices(rival: ParametricMemory) -> dict[str, Tensor]:
    return {name: matrix.detach().clone() for name, matrix in rival.trainable().items()}


def test_the_adapter_alone_moves_backbone_and_composer_stay_bit_equal(world: World) -> None:
    rival = rival_of(world)
    ours = {id(matrix) for matrix in rival.trainable().values()}
    before, composer = matrices(rival), weights(world)
    frozen = {n: p.detach().clone() for n, p in world.model.model.named_parameters() if id(p) not in ours}
    latents = world.composer.compose(["a text"]).detach()
    trainer, progress = trainer_of(rival, world, 1e-2), Progress()
    for step in range(2):
        progress.step = step
        assert trainer.step(progress).moved
    assert all(not torch.equal(before[name], value) for name, value in matrices(rival).items())
    assert moved(composer, world) == set()
    found = dict(world.model.model.named_parameters())
    assert all(torch.equal(frozen[name], found[name]) for name in frozen)
    assert torch.equal(world.composer.compose(["a text"]), latents)


def test_update_makes_better_rollouts_likelier(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = rival_of(world)
    trainer = trainer_of(rival, world, 2e-4, group_size=4)
    rolled = trainer._rollouts(Progress())
    kept = rolled.groups

    @torch.no_grad()
    def objective() -> float:
        gains = [
            advantage * float(plain_logps(rival, example).sum())
            for group in kept
            for message, advantage in group.messages()
            for example in examples_of([message], rival)
        ]
        return sum(gains) / len(gains)

    before = objective()
    trainer._update(rolled, 0)
    assert objective() > before + 1e-4


def test_step_does_not_depend_on_micro_batch_positions(make_world: Callable) -> None:
    found = []
    for budget in (LARGE, 120):
        world = make_world()
        metrics = trainer_of(rival_of(world), world, micro_batch_positions=budget).step(Progress()).metrics
        found.append((metrics["loss"], metrics["grad_norm"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_resumed_training_equals_an_uninterrupted_one_bit_for_bit(make_world: Callable, tmp_path: Path) -> None:
    options = {"num_steps": 2, "eval_every": 2, "beta": 0.1, "num_iterations": 2, "micro_batch_positions": 1000}
    world = make_world()
    whole = rival_of(world)
    expected: list[dict[str, Any]] = []
    progress = run(trainer_of(whole, world, **options), tmp_path / "whole", expected)
    assert {line["kl"] > 0 for line in expected if "kl" in line} == {True}
    lines: list[dict[str, Any]] = []
    world = make_world()
    with pytest.raises(KeyboardInterrupt):
        run(trainer_of(rival_of(world), world, **options), tmp_path / "part", lines, stop_at=1)
    world = make_world()
    again = rival_of(world)
    assert run(trainer_of(again, world, **options), tmp_path / "part", lines) == progress
    assert lines == expected
    assert all(torch.equal(matrices(whole)[name], value) for name, value in matrices(again).items())


def test_latent_memory_plays_alike_whether_or_not_its_agents_were_trained(make_world: Callable) -> None:
    def said(world: World) -> list[tuple[float, ...]]:
        return [message.logps for trajectory in world.play() for message in trajectory.messages]

    alone = make_world()
    wake(alone.composer)
    beside = make_world()
    wake(beside.composer)
    rival = rival_of(beside)
    wake(rival)
    played: list[Trajectory] = alone.play()
    assert [m.token_ids for t in beside.play() for m in t.messages] == [m.token_ids for t in played for m in t.messages]
    assert said(beside) == said(alone)
