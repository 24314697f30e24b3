"""The supervised warm start on a real tiny model: what it learns from, that it learns, and that it resumes exactly."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_world import TASKS, Lines, World

from latentmem.carrying import roles_of_teams
from latentmem.errors import TrainingError
from latentmem.memory.memory import recall_one
from latentmem.teams.team import Agent, FixedTeam
from latentmem.training.checkpoint_folder import Progress
from latentmem.training.optimizer import StepResult
from latentmem.training.sft import SFTTrainer, _Judged
from latentmem.trajectory import Role, Trajectory


def trainer_of(
    world: World, trajectories: list[Trajectory] | None = None, held_out: list[Trajectory] | None = None, **kwargs
) -> SFTTrainer:
    trainer = SFTTrainer(
        world.memory,
        world.model,
        world.team,
        world.trajectories[:6] if trajectories is None else trajectories,
        world.trajectories[6:] if held_out is None else held_out,
        seed=1,
        **{"num_steps": 4, "trajectories_per_step": 2, "save_every": 1, "micro_batch_positions": 300, **kwargs},
    )
    trainer.optimization = world.optimization(trainer.settings.num_steps)
    return trainer


def weights(world: World) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in world.composer.trainable().items()}


def frozen(world: World) -> dict[str, torch.Tensor]:
    ours = {id(parameter) for parameter in world.composer.trainable().values()}
    return {n: p.detach().clone() for n, p in world.model.model.named_parameters() if id(p) not in ours}


def run(trainer: SFTTrainer, folder: Path, lines: list[dict[str, Any]], stop_at: int | None = None) -> Progress:
    step = trainer.step

    def stoppable(progress: Progress) -> StepResult:
        if progress.step == stop_at:
            raise KeyboardInterrupt
        return step(progress)

    trainer.step = stoppable  # type: ignore[method-assign]
    return trainer.train(folder, Lines(lines))


def test_loss_is_the_mean_cross_entropy_of_response_tokens_under_memory_of_other_tasks(world: World) -> None:
    trainer = trainer_of(world, trajectories_per_step=6)
    total = tokens = 0
    for trajectory in trainer.trajectories:
        for message in trajectory.messages:
            recall = recall_one(world.memory, trajectory.task, trainer.roles_of(trajectory)[message.role])
            assert recall.record.sources
            assert trajectory.id not in recall.record.sources
            prompt = world.model.encode_prompt(message.system, message.user)
            embed = world.model.model.get_input_embeddings()
            ids, response = torch.tensor([prompt]), torch.tensor([message.token_ids])
            with world.model.as_agent() as agent, torch.no_grad():
                inputs = torch.cat([embed(ids), recall.latents[None], embed(response)], dim=1)
                logits = agent.model(inputs_embeds=inputs).logits[0, len(prompt) + 3 - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, response[0], reduction="sum"))
            tokens += len(message.token_ids)
    metrics = trainer.step(Progress()).metrics
    assert metrics["tokens"] == tokens
    assert metrics["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_held_out_loss_falls_on_what_is_learned_and_the_agents_stay_bit_equal(world: World, tmp_path: Path) -> None:
    few = world.trajectories[:2]
    trainer = trainer_of(world, few, few, num_steps=8, eval_every=8, save_every=8)
    before, base = weights(world), frozen(world)
    lines: list[dict[str, Any]] = []
    progress = run(trainer, tmp_path / "x", lines)
    evaluated = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert evaluated[8] < evaluated[0] - 0.05
    assert (progress.best_step, progress.best_score) == (8, -evaluated[8])
    after = frozen(world)
    assert all(torch.equal(base[name], after[name]) for name in base)
    moved = {name for name, value in weights(world).items() if not torch.equal(value, before[name])}
    assert moved == set(before)


def test_resumed_training_equals_an_uninterrupted_one_bit_for_bit(make_world: Callable, tmp_path: Path) -> None:
    whole, part = make_world(), make_world()
    expected: list[dict[str, Any]] = []
    progress = run(trainer_of(whole, num_steps=3, eval_every=2), tmp_path / "whole", expected)
    lines: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        run(trainer_of(part, num_steps=3, eval_every=2), tmp_path / "part", lines, stop_at=2)
    again = make_world()
    assert run(trainer_of(again, num_steps=3, eval_every=2), tmp_path / "part", lines) == progress
    assert lines == expected
    first, second = weights(whole), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_successes_of_this_model_and_team_with_tokens_are_used(world: World) -> None:
    good = world.trajectories[0]
    failed = good.model_copy(update={"reward": 0.0, "success": False})
    foreign = good.model_copy(update={"model": "another"})
    message = good.messages[0]
    stranger = good.model_copy(
        update={"steps": (good.steps[0].model_copy(update={"messages": (message.model_copy(update={"role": "x"}),)}),)}
    )
    empty = message.model_copy(update={"token_ids": (), "logps": ()})
    silent = good.model_copy(update={"steps": (good.steps[0].model_copy(update={"messages": (empty,)}),)})
    bad = [failed, foreign, stranger, silent]
    assert trainer_of(world, [good, *bad]).trajectories == [good]
    with pytest.raises(TrainingError) as error:
        trainer_of(world, bad)
    assert str(error.value).startswith("none of 4 trajectories is a success of model ")
    assert str(error.value).endswith("with the team's roles; collect more, or on easier tasks, before sft")


def test_without_a_held_out_success_nothing_is_evaluated_and_that_is_told(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(world, held_out=[], num_steps=1, eval_every=1)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "sft: none of the 0 held-out trajectories is a success to evaluate on; the last step will be selected"
    ]
    lines: list[dict[str, Any]] = []
    assert run(trainer, tmp_path / "x", lines).best_step is None
    assert not any("eval_loss" in line for line in lines)


def test_process_without_an_example_takes_part(world: World) -> None:
    trainer = trainer_of(world)
    trainer.processes.shard = lambda items: []  # type: ignore[method-assign]
    real = trainer.processes.sum
    trainer.processes.sum = lambda values: {k: v + 5.0 for k, v in real(values).items()}  # type: ignore[method-assign]
    before = weights(world)
    metrics = trainer.step(Progress()).metrics
    assert (metrics["loss"], metrics["tokens"], metrics["grad_norm"]) == (5.0, 5.0, 0.0)
    assert all(torch.equal(before[name], value) for name, value in weights(world).items())
    trainer.processes.gather = lambda items: [*items, _Judged("x", 5.0, 5, True)]  # type: ignore[method-assign]
    assert trainer.held_out_loss() == 1.0


def test_roles_are_those_of_the_team(world: World) -> None:
    roles = trainer_of(world).roles_of(world.trajectories[0])
    assert {name: role.name for name, role in roles.items()} == {role.name: role.name for role in world.team.roles}
    assert len(TASKS) == len(world.trajectories)


def test_successes_without_tokens_are_left_out_and_counted(world: World, caplog: pytest.LogCaptureFixture) -> None:
    whole, other = world.trajectories[:2]
    first = other.messages[0].model_copy(update={"token_ids": (), "logps": ()})
    step = other.steps[0].model_copy(update={"messages": (first, *other.steps[0].messages[1:])})
    untold = other.model_copy(update={"steps": (step, *other.steps[1:])})
    trainer = trainer_of(world)
    with caplog.at_level(logging.WARNING):
        assert trainer._usable([whole, untold]) == [whole]
    assert "sft: 1 of 2 successes hold messages without token ids" in caplog.text


def test_of_several_teams_each_trajectory_is_told_with_its_own_teams_profiles(world: World) -> None:
    agents = [Agent(Role(name=r.name, profile=f"Twin of {r.name}."), "s", "{task}", ()) for r in world.team.roles]
    twin = FixedTeam("twin", agents, agents[0].role.name)
    ours, theirs, strangers = (
        world.trajectories[i].model_copy(update={"team": team})
        for i, team in enumerate((world.team.name, "twin", "strangers"))
    )
    trainer = trainer_of(world)
    trainer.roles_of = roles_of_teams((world.team, twin))
    assert trainer._usable([ours, theirs, strangers]) == [ours, theirs]
    for trajectory in (ours, theirs):
        texts = [example.composer_text for example in trainer._examples([trajectory])]
        assert [f"Twin of {m.role}." in text for m, text in zip(trajectory.messages, texts, strict=True)] == [
            trajectory is theirs
        ] * len(texts)
    alone = trainer_of(world)
    assert alone._usable([strangers]) == [strangers]  # a team by another name, as in a released bank


def test_what_is_carried_is_logged_with_each_evaluation_and_chooses_nothing(world: World, tmp_path: Path) -> None:
    trainer = trainer_of(world, num_steps=2, eval_every=1)
    numbers = iter([0.5, 0.1, 0.2])
    trainer.carried = lambda: {"carried": next(numbers)}
    lines: list[dict[str, Any]] = []
    progress = run(trainer, tmp_path / "x", lines)
    assert [line["carried"] for line in lines if "eval_loss" in line] == [0.5, 0.1, 0.2]
    assert progress.best_score == -min(line["eval_loss"] for line in lines if "eval_loss" in line)
