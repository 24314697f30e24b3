"""What a trainer writes beside its checkpoints when it is told nothing else; it resumes by it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_world import SAMPLING, TASKS, Lines, Toy, World

from latentmem.errors import ConfigError
from latentmem.training.checkpoint_folder import Progress
from latentmem.training.journal import step_bar
from latentmem.training.lmpo import LMPOTrainer
from latentmem.training.sft import SFTTrainer


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def domain() -> Any:
    splits = {"train": TASKS[:6], "dev": TASKS[6:]}
    return SimpleNamespace(start=Toy, tasks=lambda split: splits.get(split, []))


def lmpo_of(world: World, **fields: Any) -> LMPOTrainer:
    small = {"num_steps": 2, "tasks_per_step": 2, "group_size": 3, "eval_every": 1, "eval_tasks": 1, "save_every": 1}
    return LMPOTrainer(
        world.memory, world.model, world.team, domain(), sampling=SAMPLING, max_turns=2, seed=4, **{**small, **fields}
    )


def test_a_domain_is_enough_its_dev_tasks_choose_and_numbers_stand_beside_the_checkpoints(
    world: World, tmp_path: Path
) -> None:
    trainer = lmpo_of(world)
    assert [task.key for task in trainer.aside] == [TASKS[6].key]
    assert sorted(task.key for task in trainer.passes.items) == sorted(task.key for task in TASKS[:6])
    done = trainer.train(str(tmp_path / "lmpo"))
    assert done.step == 2
    found = rows(tmp_path / "lmpo" / "metrics.jsonl")
    assert [row["step"] for row in found] == [0, 1, 1, 2, 2]
    assert [row["step"] for row in found if "eval_reward" in row] == [0, 1, 2]


def test_the_bar_says_what_is_done_between_two_steps_until_the_next_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with step_bar(2, "lmpo", "reward") as bar:
        bar.show({"step": 2, "reward": 0.5})
        capsys.readouterr()
        bar.doing("evaluating")
        assert re.match(r"lmpo, evaluating: 100%\|.* 2/2 .*reward=0.500", capsys.readouterr().err)
        bar.show({"step": 2, "eval_reward": 0.25})
        assert re.match(r"lmpo: 100%\|.* 2/2 .*eval_reward=0.250", capsys.readouterr().err)


def test_each_evaluation_is_told_before_it_begins(world: World, tmp_path: Path) -> None:
    lines = Lines()
    trainer = lmpo_of(world)
    evaluate = trainer._evaluate
    told: list[int] = []
    trainer._evaluate = lambda step: told.append(len(lines.done)) or evaluate(step)  # type: ignore[method-assign]
    trainer.train(tmp_path / "lmpo", lines)
    assert told == [1, 2, 3]
    assert lines.done == ["evaluating"] * 3


@pytest.mark.slow
def test_the_same_lines_go_on_where_they_stopped(world: World, tmp_path: Path) -> None:
    trainer = lmpo_of(world, num_steps=3)
    step = trainer.step

    def stumble(progress: Progress) -> Any:
        if progress.step == 2:
            raise KeyboardInterrupt
        return step(progress)

    trainer.step = stumble  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tmp_path / "lmpo")
    with (tmp_path / "lmpo" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "reward": 9.0}\n{"torn')
    assert lmpo_of(world, num_steps=3).train(tmp_path / "lmpo").step == 3
    found = rows(tmp_path / "lmpo" / "metrics.jsonl")
    assert [row["step"] for row in found if "grad_norm" in row or "groups" in row] == [1, 2, 3]
    assert not any(row.get("reward") == 9.0 for row in found)


def test_what_each_held_out_task_came_to_stands_in_a_file_of_its_own(world: World, tmp_path: Path) -> None:
    SFTTrainer(
        world.memory, world.model, world.team, world.trajectories[:4], world.trajectories[4:6],
        num_steps=1, trajectories_per_step=2, eval_every=1, micro_batch_positions=300,
    ).train(tmp_path / "sft")  # fmt: skip
    held_out = list(dict.fromkeys(t.task.key for t in world.trajectories[4:6]))
    found = rows(tmp_path / "sft" / "dev-tasks.jsonl")
    assert [(row["step"], row["task"]) for row in found] == [(step, key) for step in (0, 1) for key in held_out]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_stesp": 2}, "lmpo: unknown key 'num_stesp'; did you mean 'num_steps'?"),
        ({"epsilon_low": "much"}, "lmpo: epsilon_low is 'much' (str); "),
    ],
)
def test_a_wrong_keyword_is_one_line(world: World, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        lmpo_of(world, **fields)
    assert str(error.value).startswith(message)
