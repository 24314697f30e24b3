"""Demonstrated responses as trajectories: as a rollout leaves them, from rows, and as something that SFT learns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_sft import run, trainer_of
from training_world import TASKS, Lines, Toy, World, wake

from latentmem.config import Sampling
from latentmem.errors import BadRowError, DataError, ModelError
from latentmem.memory.memory import NoMemory
from latentmem.models.language_model import LanguageModel
from latentmem.rollout import rollout
from latentmem.teams.team import load_team
from latentmem.training.demonstrations import demonstrate, read_demonstrations
from latentmem.trajectory import Task, Trajectory

EOS = 2


def shown(world: World, task: Task, text: str) -> Trajectory:
    return demonstrate(world.team, task, Toy.instructions, {"": text}, world.model)


def as_a_rollout(trajectory: Trajectory) -> dict[str, Any]:
    """What does not depend on sampling, on the reward, or on the environment."""
    record = trajectory.model_dump(exclude={"seed": True, "reward": True, "success": True})
    for step in record["steps"]:
        step["observation"], step["info"] = "", {}
        for message in step["messages"]:
            message["logps"] = [0.0] * len(message["logps"])
    return record


@pytest.mark.parametrize("team", ["autogen", "camel", "macnet"])
def test_what_a_greedy_rollout_says_is_demonstrated_as_that_very_trajectory(make_world: Callable, team: str) -> None:
    world = make_world(team)
    sampling = Sampling(temperature=0.0, max_response_tokens=6)
    (played,) = rollout(world.team, NoMemory(), world.model, TASKS[1:2], Toy, sampling=sampling).trajectories
    # What it said need not be how its text would be encoded, and was cut; so its tokens are made those of its text.
    said = {message.role: message.response for message in played.messages}
    assert all(said.values())
    found = demonstrate(world.team, TASKS[1], Toy.instructions, said, world.model)
    messages = [
        message.model_copy(update={"token_ids": ids, "logps": (0.0,) * len(ids), "finish": "stop"})
        for message in played.messages
        for ids in [(*world.model.encode(message.response), EOS)]
    ]
    step = played.steps[0].model_copy(update={"messages": tuple(messages)})
    assert as_a_rollout(found) == as_a_rollout(played.model_copy(update={"steps": (step,)}))
    assert (found.reward, found.success, found.error) == (1.0, True, None)


def test_tokens_are_those_of_the_bare_text_and_an_eos(world: World) -> None:
    message = shown(world, TASKS[0], " answer is 19.\n").messages[0]
    assert message.response == "answer is 19."
    assert message.token_ids == (*world.model.tokenizer("answer is 19.")["input_ids"], EOS)
    assert world.model.spell(message.token_ids) == "answer is 19.<|im_end|>"
    assert set(message.logps) == {0.0}
    assert Trajectory.from_json(shown(world, TASKS[0], "19").to_json()) == shown(world, TASKS[0], "19")


def test_a_control_token_in_a_demonstrated_text_is_ordinary_text(world: World) -> None:
    message = shown(world, TASKS[0], "so<|im_end|>it is").messages[0]
    assert message.token_ids.count(EOS) == 1
    assert message.response == "so<|im_end|>it is"


def test_who_is_not_named_says_what_stands_under_the_empty_name(world: World) -> None:
    first, second = (role.name for role in world.team.roles)
    found = demonstrate(world.team, TASKS[0], "", {first: "left", "": "right"}, world.model)
    assert [m.response for m in found.messages] == ["left", "right"]
    assert "left" in found.messages[1].user
    assert found.messages[1].reads == (0,)
    assert found.steps[0].action in ("left", "right")
    with pytest.raises(DataError) as error:
        demonstrate(world.team, TASKS[0], "", {first: "left"}, world.model)
    assert str(error.value) == (
        f"sums:0: role '{second}' of team autogen has no demonstrated response; add one under its name, or one under "
        "the empty name, which stands for every role without its own"
    )
    with pytest.raises(DataError, match=f"^rows:3: the demonstrated response of '{first}' is blank"):
        demonstrate(world.team, TASKS[0], "", {"": " \n"}, world.model, "rows:3")


def test_a_team_that_decides_as_it_goes_is_demonstrated_with_its_record(tiny_model_dir: Path) -> None:
    model = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")
    found = demonstrate(load_team("dylan"), TASKS[0], "", {"": "19"}, model)
    assert {message.response for message in found.messages} == {"19"}
    assert isinstance(found.steps[0].info["team"], dict)


def test_a_tokenizer_without_an_eos_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.model.tokenizer, "_special_tokens_map", {})
    with pytest.raises(ModelError, match="its tokenizer has no EOS"):
        shown(world, TASKS[0], "19")


def test_rows_are_read_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    rows = [{"task": "1", "responses": {"": "a"}}, {"task": "1", "responses": {"x": "b", "": "c"}}]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    found = read_demonstrations(path, TASKS, ["x"])
    assert [(one.task, dict(one.said), one.where) for one in found] == [
        (TASKS[1], {"": "a"}, f"{path}:1"),
        (TASKS[1], {"x": "b", "": "c"}, f"{path}:3"),
    ]


def test_an_id_that_two_domains_have_is_told_and_their_keys_tell_them_apart(tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    tasks = [Task(domain="a", id="1", text="one"), Task(domain="b", id="1", text="two"), TASKS[0]]
    path.write_text(json.dumps({"task": "1", "responses": {"": "x"}}))
    with pytest.raises(BadRowError, match=r"jsonl:1: 2 tasks have the id '1'; write 'a:1' or 'b:1'$"):
        read_demonstrations(path, tasks, [])
    path.write_text(json.dumps({"task": "b:1", "responses": {"": "x"}}))
    assert [one.task for one in read_demonstrations(path, tasks, [])] == [tasks[1]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"task": "99", "responses": {"": "a"}}, ":2: task '99' is not in the data; expected an id such as '0'"),
        ({"task": 1, "responses": {"": "a"}}, ":2: field 'task' is an integer; expected a string"),
        ({"task": "1", "response": {"": "a"}}, ":2: no field 'responses'; did you mean 'response'?"),
        ({"task": "1", "responses": "a"}, ":2: field 'responses' is a string; expected an object"),
        ({"task": "1", "responses": {}}, ":2: responses: is empty; expected a text for each role"),
        ({"task": "1", "responses": {"": None}}, ":2: responses: field '' is null; expected a string"),
        ({"task": "1", "responses": {"x": " "}}, ":2: responses: field 'x' is blank; expected text"),
        ({"task": "1", "responses": {"xx": "a"}}, ":2: responses: no team has a role 'xx'; did you mean 'x'?"),
        ([], ":2: expected a JSON object, found a list"),
    ],
)
def test_a_row_that_cannot_be_used_is_told_in_one_line(tmp_path: Path, row: Any, expected: str) -> None:
    path = tmp_path / "said.jsonl"
    path.write_text(json.dumps({"task": "1", "responses": {"": "a"}}) + "\n" + json.dumps(row))
    with pytest.raises(BadRowError) as error:
        read_demonstrations(path, TASKS, ["x"])
    assert str(error.value) == f"{path}{expected}"


def test_no_rows_are_told(tmp_path: Path) -> None:
    (tmp_path / "said.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"said\.jsonl: expected at least one demonstration, found none"):
        read_demonstrations(tmp_path / "said.jsonl", TASKS, [])


def test_sft_learns_what_was_demonstrated(world: World, tmp_path: Path) -> None:
    examples = [shown(world, TASKS[0], "19")]
    trainer = trainer_of(world, examples, examples, num_steps=8, eval_every=8, save_every=8)
    lines: list[dict[str, Any]] = []
    run(trainer, tmp_path / "x", lines)
    evaluated = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert evaluated[8] < evaluated[0] - 1


def test_a_message_counts_as_right_if_its_tokens_are_those_of_greedy_decoding(world: World) -> None:
    """Said by the real decoder under the very memory that SFT composes; then one token of one message is changed."""
    wake(world.composer)
    sampling = Sampling(temperature=0.0, max_response_tokens=6)
    played = rollout(world.team, world.memory, world.model, TASKS[:3], Toy, sampling=sampling).trajectories
    right = [trajectory.model_copy(update={"reward": 1.0, "success": True}) for trajectory in played]
    assert [message.exact for message in trainer_of(world, held_out=right)._judge()] == [True] * 6
    for place in (0, 3, 5):
        first, second = right[0].messages
        ids = list(second.token_ids)
        ids[place] = (ids[place] + 7) % 300 + 5
        step = (
            right[0]
            .steps[0]
            .model_copy(update={"messages": (first, second.model_copy(update={"token_ids": tuple(ids)}))})
        )
        wrong = [right[0].model_copy(update={"steps": (step,)}), *right[1:]]
        judged = trainer_of(world, held_out=wrong)._judge()
        assert sorted(message.exact for message in judged) == [False] + [True] * 5
        assert {message.task for message in judged if not message.exact} == {right[0].task.key}


def test_each_held_out_task_has_its_own_loss_and_accuracy(world: World, tmp_path: Path) -> None:
    held_out = [shown(world, TASKS[6], "19"), shown(world, TASKS[7], "a longer one"), shown(world, TASKS[6], "25")]
    journal = Lines()
    trainer = trainer_of(world, held_out=held_out, num_steps=1, eval_every=1)
    trainer.train(tmp_path / "x", journal)
    dev, lines = journal.tasks, journal.lines
    assert [(row["step"], row["task"]) for row in dev] == [(s, f"sums:{t}") for s in (0, 1) for t in (6, 7)]
    alone = trainer_of(world, held_out=held_out[::2], num_steps=1)
    assert dev[2]["loss"] == pytest.approx(alone.held_out_loss(), rel=1e-5)
    num_tokens = [sum(len(m.token_ids) for t in part for m in t.messages) for part in (held_out[::2], held_out[1:2])]
    mean = sum(n * row["loss"] for n, row in zip(num_tokens, dev[2:], strict=True)) / sum(num_tokens)
    assert next(line["eval_loss"] for line in lines if line.get("eval_loss") and line["step"]) == pytest.approx(mean)
