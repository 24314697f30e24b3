"""What a memory carries: against a slow version, exactly 0 where there is nothing to carry, and paired by task."""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from latentmem.bank import ExperienceBank
from latentmem.carrying import Carried, measure_carried, roles_of_teams, scorable
from latentmem.errors import BankError, ModelError
from latentmem.memory.composer import Composer
from latentmem.memory.controls import ControlMemory, empty
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import NoMemory, Recall, Recalls, recall_one
from latentmem.memory.parametric import ParametricMemory
from latentmem.memory.text import TextMemory
from latentmem.models.language_model import LanguageModel
from latentmem.stats import PairedResult
from latentmem.teams.team import load_team
from latentmem.trajectory import Message, Recalled, Step, Task, Trajectory
from peers import together

TEAM = load_team("autogen")
ROLES = {role.name: role for role in TEAM.roles}
TASKS = [Task(id=str(i), domain="sums", text=f"What is {12 + i} + {7 * i}?" + " Add." * i) for i in range(5)]


def episode(task: Task, words: str, *, model: LanguageModel, turns: int = 1, success: bool = True) -> Trajectory:
    """Each role says a few words, in each of its turns others."""

    def message(role: str, turn: int) -> Message:
        said = f"{words} {turn}" if role == "assistant" else f"{words} it is"
        ids = (*model.encode(said), *(sorted(model.eos_ids)[:1] if turn == 0 else ()))
        return Message(
            role=role, system=f"You are {role}.", user=task.text, response=said, token_ids=ids,
            logps=(-1.0,) * len(ids), finish="stop", temperature=0.7, num_prompt_tokens=9,
            recalled=Recalled(kind="text", text="what another memory told", sources=()),
        )  # fmt: skip

    steps = tuple(
        Step(messages=tuple(message(role, turn) for role in ROLES), action=f"{words} {turn}", observation="Go on.")
        for turn in range(turns)
    )
    return Trajectory(
        task=task, team=TEAM.name, model=model.name, steps=steps, reward=float(success), success=success, seed=0
    )


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LanguageModel:
    found = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")
    found.model.double()
    return found


@pytest.fixture(scope="module")
def held_out(model):
    words = ["the answer is nineteen", "twenty five", "the answer is", "subtract the tens then the ones", "nineteen"]
    played = [
        episode(task, said, model=model, turns=1 + i % 2)
        for i, (task, said) in enumerate(zip(TASKS, words, strict=True))
    ]
    return [*played, episode(TASKS[0], "a second success", model=model)]


@pytest.fixture(scope="module")
def bank(tmp_path_factory, fake_embed, model):
    with ExperienceBank(tmp_path_factory.mktemp("bank") / "bank.sqlite", fake_embed, embedder="fake") as found:
        found.add(
            [
                episode(Task(id=f"past {i}", domain="sums", text=f"What is {i} + {i}?"), f"it is {2 * i}", model=model)
                for i in range(4)
            ]
        )
        yield found


@pytest.fixture(scope="module")
def latent(bank, model):
    composer = Composer(model, num_latents=3, rank=2, initial_scale=2.0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in composer.trainable().values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    yield LatentMemory(bank, composer, num_retrieved=2)
    composer.detach()


def measure(memory, model, held_out, **kwargs) -> Carried:
    found = measure_carried(memory, model, held_out, lambda t: ROLES, **kwargs)
    assert found is not None
    return found


def slow_logps(model, message: Message, recall: Recall) -> torch.Tensor:
    """[T]: the whole sequence at once, by transformers alone."""
    embed = model.model.get_input_embeddings()
    user = f"{recall.record.text}\n\n{message.user}" if recall.latents is None and recall.record.text else message.user
    prompt = torch.tensor([model.encode_prompt(message.system, user)])
    response = torch.tensor([message.token_ids])
    parts = [embed(prompt), embed(response)]
    if recall.latents is not None:
        parts.insert(1, recall.latents[None].double())
    with model.as_agent() as agent, torch.no_grad():
        logits = agent.model(inputs_embeds=torch.cat(parts, dim=1)).logits[0, -response.shape[1] - 1 : -1]
    return logits.log_softmax(1).gather(1, response[0][:, None])[:, 0]


class Fixed:
    """What each task's recalls are, told beforehand."""

    kind = "fixed"

    def __init__(self, recalls):
        self.recalls = recalls

    def recall_many(self, queries):
        return Recalls([self.recalls[task.key, role.name] for task, role in queries])

    def add(self, trajectory):
        raise AssertionError("learned")


@pytest.mark.parametrize("kind", ["latent", "text"])
@pytest.mark.parametrize("positions", [pytest.param(1, marks=pytest.mark.slow), 8192])
def test_it_is_the_slow_difference_of_surprises_by_task_and_its_interval(
    model, held_out, bank, latent, kind, positions
):
    memory = latent if kind == "latent" else TextMemory(bank, num_retrieved=1)
    drawn = {}

    def control(given, another):
        assert given is memory
        drawn.update({task.key: another(task) for task in TASKS})
        return Fixed(
            {
                (task.key, name): memory.recall_from(
                    [(task, role)], {task.key: memory.retrieved([drawn[task.key]])[drawn[task.key].key]}
                )[0]
                for task in TASKS
                for name, role in ROLES.items()
            }
        )

    found = measure(memory, model, held_out, control=control, positions=positions)
    by_task = {}
    for trajectory in held_out:
        other = next(t for t in held_out if t.task.key == drawn[trajectory.task.key].key)
        assert other.task.key != trajectory.task.key
        own_ce = other_ce = differing = 0.0
        said = {}
        for message in trajectory.messages:
            number = said[message.role] = said.get(message.role, -1) + 1
            theirs = [m.token_ids for m in other.messages if m.role == message.role]
            theirs = theirs[number] if number < len(theirs) else ()
            role = ROLES[message.role]
            mine = slow_logps(model, message, recall_one(memory, trajectory.task, role))
            # The default control, written out: this task and role, another task's trajectories.
            away = memory.retrieved([other.task])[other.task.key]
            under_other = slow_logps(
                model, message, memory.recall_from([(trajectory.task, role)], {trajectory.task.key: away})[0]
            )
            own_ce -= float(mine.sum())
            other_ce -= float(under_other.sum())
            differing += sum(
                float(mine[i] - under_other[i])
                for i, token in enumerate(message.token_ids)
                if i >= len(theirs) or theirs[i] != token
            )
        count = len(trajectory.messages)
        by_task.setdefault(trajectory.task.key, []).append((own_ce / count, other_ce / count, differing / count))
    means = {key: [statistics.fmean(column) for column in zip(*rows, strict=True)] for key, rows in by_task.items()}
    assert len(by_task["sums:0"]) == 2  # two successes of one task count as one
    assert [task.task for task in found.tasks] == list(means)
    for task in found.tasks:
        assert [task.own, task.other, task.differing] == pytest.approx(means[task.task], rel=1e-4, abs=1e-4)
    differences = np.array([other - own for own, other, _ in means.values()])
    assert np.abs(differences).max() > 0.01
    interval = scipy_stats.t.interval(0.95, 4, differences.mean(), scipy_stats.sem(differences))
    assert (found.total.difference, found.total.low, found.total.high) == pytest.approx(
        (differences.mean(), *interval), rel=1e-3, abs=1e-4
    )
    told = found.as_json()
    assert told["differing"]["nats"] == pytest.approx(
        statistics.fmean(m[2] for m in means.values()), rel=1e-3, abs=1e-4
    )
    assert told["own"] == pytest.approx(statistics.fmean(m[0] for m in means.values()), rel=1e-4)
    assert told["other"] - told["own"] == pytest.approx(told["nats"])
    assert told["num_tasks"] == 5
    assert found.metrics() == {"carried": told["nats"], "carried_low": told["low"], "carried_high": told["high"]}
    # And the default is that control.
    assert [task.other for task in measure(memory, model, held_out).tasks] == pytest.approx(
        [task.other for task in found.tasks], rel=1e-4
    )


def test_no_memory_weights_and_the_same_latents_for_all_carry_exactly_nothing(model, held_out):
    latents = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    same = Recall(Recalled(kind="latent", text="t", num_latents=3), latents)
    for memory in (
        NoMemory(),
        Fixed({(task.key, name): same for task in TASKS for name in ROLES}),
    ):
        found = measure(memory, model, held_out)
        assert found.total == PairedResult(0.0, 0.0, 0.0, 1.0)
        assert found.differing == PairedResult(0.0, 0.0, 0.0, 1.0)
        assert found.tasks[0].own > 1
    near = {}
    for i, task in enumerate(TASKS):
        for name in ROLES:
            near[task.key, name] = Recall(same.record, latents + 1e-7 * i)  # as rounding of batches leaves them
    assert abs(measure(Fixed(near), model, held_out).total.difference) < 1e-4


def test_trained_agents_are_scored_with_their_adapter_and_carry_nothing(model, held_out):
    memory = ParametricMemory(model, rank=2)
    try:
        with torch.no_grad():
            for matrix in memory.trainable().values():
                matrix += 0.2
        found, without = measure(memory, model, held_out), measure(NoMemory(), model, held_out)
        assert found.total.difference == 0
        assert abs(found.tasks[0].own - without.tasks[0].own) > 1e-3
    finally:
        memory.detach()


def test_each_task_and_role_is_asked_for_once_and_never_held_against_itself(model, held_out):
    calls = []

    class Asked(NoMemory):
        def recall_many(self, queries):
            calls.append([task.key for task, _ in queries])
            return super().recall_many(queries)

    measure(Asked(), model, held_out)
    own, other = calls
    assert len(own) == len(other) == len(TASKS) * len(ROLES)  # once for a task and role
    assert all(a != b for a, b in zip(own, other, strict=True))


def test_only_successes_of_this_model_and_team_are_scored_and_two_tasks_are_needed(model, held_out):
    failed = episode(TASKS[1], "wrong", model=model, success=False)
    foreign = held_out[2].model_copy(update={"model": "another"})
    silent = held_out[3].model_copy(
        update={"steps": tuple(s.model_copy(update={"messages": ()}) for s in held_out[3].steps)}
    )
    roles_of = roles_of_teams([TEAM])
    assert scorable([held_out[0], failed, foreign, silent], model, roles_of) == held_out[:1]
    assert measure_carried(NoMemory(), model, [held_out[0], held_out[-1], failed, foreign], roles_of) is None
    assert measure_carried(NoMemory(), model, [], roles_of) is None
    other = roles_of_teams([TEAM, load_team("camel")])
    assert set(other(held_out[0])) == set(ROLES)
    assert other(held_out[0].model_copy(update={"team": "nobody"})) == {}
    assert set(roles_of(held_out[0].model_copy(update={"team": "renamed"}))) == set(ROLES)


def test_messages_of_roles_that_the_team_has_not_are_left_out(model, held_out, bank):
    memory = TextMemory(bank, num_retrieved=1)
    only = {"assistant": ROLES["assistant"]}
    found = measure_carried(memory, model, held_out, lambda t: only)
    assert found is not None
    both = measure(memory, model, held_out)
    assert found.tasks[0].own != pytest.approx(both.tasks[0].own, rel=1e-3)


def test_several_processes_find_the_very_same(tiny_model_dir, held_out, bank, monkeypatch):
    monkeypatch.setattr("latentmem.carrying._TOGETHER", 2)
    models = [LanguageModel.from_pretrained(str(tiny_model_dir), "cpu") for _ in range(3)]
    memory = TextMemory(bank, num_retrieved=1)
    alone = measure(memory, models[0], held_out)
    assert len(alone.tasks) == 5
    assert together(3, lambda peer: measure(memory, models[peer.rank], held_out, processes=peer)) == [alone] * 3


def test_values_that_are_not_finite_are_told_as_nan(model, held_out):
    broken = Recall(Recalled(kind="latent", num_latents=1), torch.full((1, 32), math.nan))
    good = Recall(Recalled(kind="latent", num_latents=1), torch.zeros(1, 32))
    recalls = {(t.key, name): broken if i == 0 else good for i, t in enumerate(TASKS) for name in ROLES}
    assert math.isnan(measure(Fixed(recalls), model, held_out).metrics()["carried"])


def test_a_message_beyond_the_window_is_refused(model, held_out):
    long = Recall(Recalled(kind="text", text="the answer is " * 700))
    with pytest.raises(ModelError, match=r"a stored message needs .* tokens with its latents and response"):
        measure(Fixed({(t.key, name): long for t in TASKS for name in ROLES}), model, held_out)


def test_another_control_can_be_measured_with(model, held_out, bank):
    memory = TextMemory(bank, num_retrieved=1)
    found = measure(memory, model, held_out, control=lambda given, another: ControlMemory(given, empty()))
    assert found.as_json()["other"] == pytest.approx(measure(NoMemory(), model, held_out).as_json()["own"])


# The bank meanwhile


def test_a_bank_that_changes_is_told_and_one_that_is_only_read_is_not(tmp_path, fake_embed, model, held_out):
    with ExperienceBank(tmp_path / "b.sqlite", fake_embed, embedder="fake") as bank:
        bank.add(held_out[0])
        before = bank.digest()
        with bank.frozen("a test"):
            bank.search(TASKS[1], k=1)
            assert bank.digest() == before
        for change in (
            lambda: bank.add(held_out[1]),
            lambda: bank.reembed(fake_embed, "another"),
            lambda: bank.delete(everything=True),
        ):
            num = len(bank)
            with pytest.raises(BankError) as error, bank.frozen("a test"):
                change()
            assert str(error.value) == (
                f"{bank.path}: the bank changed during a test ({num} trajectories before, {len(bank)} now), so the "
                "recalled episodes come from two states of it; stop what else writes to it, and run this again"
            )
        with pytest.raises(ValueError, match="first"), bank.frozen("a test"):  # noqa: PT012 - its own error comes first
            bank.add(held_out[2])
            raise ValueError("first")
