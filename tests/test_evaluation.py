"""Evaluation: numbers worked out by hand from scripted outcomes, equal conditions for all memories, interruptions."""

import errno
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from killing import killed_at_sync
from latentmem import evaluation
from latentmem.bank import ExperienceBank
from latentmem.config import Sampling
from latentmem.environments.environment import Outcome
from latentmem.errors import BankError, ConfigError, RunError
from latentmem.evaluation import forget
from latentmem.evaluation.batches import MAX_KEPT_TASKS
from latentmem.kept_latents import read_latents
from latentmem.memory.memory import NoMemory, Recall, Recalls, Spent
from latentmem.memory_names import MemoryName
from latentmem.models.agent import ScriptedModel
from latentmem.rollout import rollout
from latentmem.stats import wilson_interval
from latentmem.teams.team import Agent, FixedTeam
from latentmem.teams.turn import Action, Call
from latentmem.trajectory import Recalled, Role, Task
from peers import together

SOLO = FixedTeam("solo", [Agent(Role(name="a", profile="x"), "sys", "{task}", ())], "a")
TASKS = [Task(id=str(i), domain="toy", text=f"t{i}") for i in range(4)]
GREEDY = Sampling(temperature=0.0, max_response_tokens=9)


class World:
    """The action is the reward; `?` is no answer, `!` a crash, `~` half right."""

    instructions = ""

    def step(self, action):
        if action == "!":
            raise RuntimeError("broken")
        reward = {"1": 1.0, "~": 0.5}.get(action, 0.0)
        info = {"extracted": None if action == "?" else action, "close": action in "1~"}
        return Outcome("", reward, True, info)


class Kind(NoMemory):
    """A memory that is told apart by its kind, and logs what it learns."""

    def __init__(self, kind, learned=None, latents=0):
        self.kind, self.learned, self.latents = kind, learned, latents

    def recall_many(self, queries):
        record = Recalled(kind=self.kind, text=f"[{self.kind}]", num_latents=self.latents)
        numbers = [int(task.id) for task, _ in queries]
        odd = sum(number % 2 for number in numbers)
        spent = Spent(prompt_tokens=10 * sum(numbers), generated_tokens=sum(numbers), malformed={"odd": odd})
        return Recalls([Recall(record)] * len(queries), spent)

    def add(self, trajectory):
        self.learned.append(trajectory.task.id)


class Scripted(ScriptedModel):
    """A response for each (memory, task); counts its calls, and dies at a wanted one."""

    def __init__(self, answers, die_at=None):
        super().__init__({"a": ["x"]})
        self.answers, self.num_calls, self.die_at = answers, 0, die_at

    def respond(self, prompts, sampling):
        self.num_calls += 1
        if self.num_calls == self.die_at:
            raise KeyboardInterrupt
        sampled = []
        for prompt in prompts:
            kind = prompt.user.split("]")[0].strip("[") if prompt.user.startswith("[") else "none"
            self.responses = {"a": [self.answers[kind][int(prompt.user[-1])]]}
            sampled += super().respond([prompt], sampling)
        return sampled


ANSWERS = {"none": "1?0~", "text": "1111", "mine": "1!0?"}


def evaluate(team, model, memories, tasks, start, folder, **options):
    domain = SimpleNamespace(start=start)
    return evaluation.evaluate(team, model, memories, domain, tasks=tasks, folder=folder, **options).to_dict()


def compare(folder, model=None, names=("none", "text", "mine"), tasks=TASKS, **options):
    memories = {
        "none": NoMemory,
        "text": lambda: Kind("text"),
        "mine": lambda: Kind("mine"),
    }
    return evaluate(
        SOLO,
        model or Scripted(ANSWERS),
        {name: memories[name] for name in names},
        tasks,
        lambda task: World(),
        folder,
        **{"sampling": GREEDY, "batch_size": 2, "num_bootstraps": 500} | options,
    )


def without_costs(results):
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory_mb")} for row in results["memories"]]
    return {**results, "memories": rows}


class Noting:
    """One agent, whose team counts rounds and names who was heard."""

    name, roles = "noting", SOLO.roles

    def turn(self, task, instructions, history):
        (said,) = yield [Call(self.roles[0], "sys", task)]
        return Action(said, {"rounds": int(task[-1]), "agreed": task[-1] == "3", "heard": {"a": 0.5}, "names": ["a"]})


# Numbers


def test_what_a_team_records_is_averaged_over_all_turns(tmp_path):
    results = evaluate(
        Noting(), Scripted(ANSWERS), {"none": NoMemory}, TASKS, lambda task: World(), tmp_path, sampling=GREEDY,
        num_bootstraps=10,
    )  # fmt: skip
    measures = {"close": 0.5, "team.agreed": 0.25, "team.heard.a": 0.5, "team.rounds": 1.5}
    assert results["memories"][0]["extra"] == measures


def test_the_table_is_what_one_counts_by_hand(tmp_path):
    results = compare(tmp_path)
    none, text, mine = results["memories"]
    assert (none["accuracy"], text["accuracy"], mine["accuracy"]) == (0.25, 1.0, 0.25)
    assert (none["reward"], none["rewards"], none["successes"]) == (0.375, [1.0, 0.0, 0.0, 0.5], [1, 0, 0, 0])
    assert (none["no_answer"], mine["no_answer"]) == (0.25, 0.5)
    assert (none["num_errors"], mine["num_errors"]) == (0, 1)
    assert none["extra"] == {"close": 0.5}  # and nothing of the team, which records nothing
    assert none["generated_tokens"] == 2.0  # one byte and the end
    assert none["prompt_tokens"] == len("sys" + "t0")
    assert text["prompt_tokens"] == len("sys" + "[text]\n\nt0")
    assert none["latent_tokens"] == 0
    # Tasks 0 to 3: 10, 1 and one odd number each.
    names = ("memory_prompt_tokens", "memory_generated_tokens", "memory_malformed")
    assert [[row[name] for name in names] for row in (none, mine)] == [[0, 0, 0], [15.0, 1.5, 2]]
    assert (results["num_tasks"], results["domain"], results["team"]) == (4, "toy", "solo")
    assert results["task_ids"] == ["toy:0", "toy:1", "toy:2", "toy:3"]
    json.dumps(results, allow_nan=False)


def test_the_interval_of_the_accuracy_is_wilsons(tmp_path):
    n, p, z = 4, 0.25, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    none = compare(tmp_path)["memories"][0]
    assert (none["accuracy_low"], none["accuracy_high"]) == pytest.approx((centre - half, centre + half))


def test_differences_are_paired_and_against_the_baselines_that_were_played(tmp_path):
    none, text, mine = compare(tmp_path)["memories"]
    assert none["vs_none"] is None
    assert none["vs_text"]["difference"] == -0.75
    assert text["vs_none"]["difference"] == 0.75
    assert text["vs_none"]["low"] < 0.75 < text["vs_none"]["high"]
    # Three tasks differ, all in one direction: 2 of 8 sign patterns are as extreme.
    assert text["vs_none"]["p_value"] == pytest.approx(0.25, abs=0.08)
    assert mine["vs_none"]["difference"] == 0.0
    assert mine["vs_none"]["p_value"] == 1.0
    (alone,) = compare(tmp_path / "alone", names=("mine",))["memories"]
    assert alone["vs_none"] is alone["vs_text"] is None


def test_latent_tokens_are_those_of_all_messages_of_a_task(tmp_path):
    row = evaluate(
        SOLO, Scripted({"none": "1111"}), {"l": lambda: Kind("l", latents=3)}, TASKS, lambda task: World(), tmp_path,
        sampling=GREEDY, num_bootstraps=10,
    )["memories"][0]  # fmt: skip
    assert (row["latent_tokens"], row["prompt_tokens"]) == (3.0, 5.0)


def test_all_memories_meet_the_same_seeds_in_the_same_batches(tmp_path):
    model = Scripted(ANSWERS)
    compare(tmp_path, model)
    by_memory = {}
    for prompt in model.prompts:
        kind = "none" if not prompt.user.startswith("[") else prompt.user.split("]")[0]
        by_memory.setdefault(kind, []).append((prompt.seed, prompt.system, prompt.user[-2:]))
    assert len(by_memory) == 3
    assert by_memory["none"] == by_memory["[text"] == by_memory["[mine"]
    assert len({seed for seed, _, _ in by_memory["none"]}) == 4


def test_an_episode_without_steps_is_counted_as_an_error(tmp_path):
    def start(task):
        if task.id == "1":
            raise ValueError("no world")
        return World()

    row = evaluate(
        SOLO, Scripted({"none": "1111"}), {"none": NoMemory}, TASKS, start, tmp_path, sampling=GREEDY, num_bootstraps=10
    )["memories"][0]
    assert (row["accuracy"], row["num_errors"], row["no_answer"]) == (0.75, 1, 0.0)


# Going on


@pytest.mark.parametrize("die_at", range(1, 7))
def test_an_evaluation_interrupted_in_any_batch_goes_on_and_ends_with_the_same_numbers(tmp_path, die_at):
    whole = compare(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "cut", Scripted(ANSWERS, die_at=die_at))
    again = Scripted(ANSWERS)
    assert without_costs(compare(tmp_path / "cut", again)) == without_costs(whole)
    assert again.num_calls == 6 - (die_at - 1)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) - num_bytes])


def extend(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize(
    ("damage", "num_batches_again"),
    [
        (lambda folder: cut(folder / "none.costs", 1), 1),  # the line that makes a batch count is torn
        (lambda folder: cut(folder / "none.costs", 30), 1),
        (lambda folder: (folder / "none.costs").unlink(), 2),  # trajectories are there, no cost is
        (lambda folder: cut(folder / "none.jsonl", 5), 1),
        (lambda folder: (folder / "none.jsonl").unlink(), 2),
        (lambda folder: extend(folder / "none.jsonl", '{"task": {"id'), 0),
    ],
)
def test_torn_and_missing_lines_are_played_again(tmp_path, damage, num_batches_again):
    whole = compare(tmp_path, names=("none", "text"))
    damage(tmp_path)
    model = Scripted(ANSWERS)
    assert without_costs(compare(tmp_path, model, names=("none", "text"))) == without_costs(whole)
    assert model.num_calls == num_batches_again
    assert len((tmp_path / "none.jsonl").read_bytes().splitlines()) == 4
    assert len((tmp_path / "none.costs").read_bytes().splitlines()) == 2


@pytest.mark.parametrize("fatal", range(1, 5))
def test_kill_9_at_any_write_ends_with_the_same_numbers(tmp_path, monkeypatch, fatal):
    whole = compare(tmp_path / "whole", names=("none",))
    # Two writes a batch are synced: trajectories, then the cost.
    assert killed_at_sync(fatal, monkeypatch, lambda: compare(tmp_path / "cut", names=("none",)))
    assert without_costs(compare(tmp_path / "cut", names=("none",))) == without_costs(whole)


@pytest.mark.parametrize(("full_at", "name"), [(4, "none.jsonl"), (5, "none.costs"), (8, "text.costs")])
def test_a_full_disk_is_named_and_costs_one_batch_at_most(tmp_path, monkeypatch, full_at, name):
    """The first batch of a memory makes four syncs: of two files and, since they are new, of their folder."""
    whole = compare(tmp_path / "whole", batch_size=2)
    left, sync = iter(range(full_at, -1, -1)), os.fsync

    def full(handle):
        if not next(left, 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            RunError, match=rf"{name}: cannot be added to \(No space left on device\)\. Free some space"
        ):
            compare(tmp_path / "cut", batch_size=2)
    again = Scripted(ANSWERS)
    assert without_costs(compare(tmp_path / "cut", again, batch_size=2)) == without_costs(whole)
    assert again.num_calls == 6 - (1 if name.startswith("none") else 2)


def test_trajectories_of_other_tasks_are_refused(tmp_path):
    compare(tmp_path, names=("none",))
    other = [TASKS[0], Task(id="9", domain="toy", text="t9"), *TASKS[2:]]
    with pytest.raises(RunError) as error:
        compare(tmp_path, names=("none",), tasks=other)
    assert str(error.value).startswith(
        f"{tmp_path / 'none.jsonl'}:2: task 'toy:1' was played here, which is not task 2 of the data now"
    )
    with pytest.raises(RunError, match="task 'toy:3' was played here"):
        compare(tmp_path, names=("none",), tasks=TASKS[:3])


def test_a_forgotten_memory_is_played_again_and_no_other(tmp_path):
    compare(tmp_path)
    forget(tmp_path, MemoryName.parse("text"))
    model = Scripted(ANSWERS)
    compare(tmp_path, model)
    assert model.num_calls == 2


# Several processes


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 4])  # 4, 2 and 1 batches: some processes have none
def test_several_processes_play_the_same_batches_and_write_the_same_files(tmp_path, size, batch_size):
    models = [Scripted(ANSWERS) for _ in range(1 + size)]
    alone = compare(tmp_path / "alone", models[0], batch_size=batch_size)
    shared = together(
        size,
        lambda peer: compare(tmp_path / "shared", models[1 + peer.rank], batch_size=batch_size, processes=peer),
    )
    assert [without_costs(results) for results in shared] == [without_costs(alone)] * size
    assert shared[0]["memories"] == shared[1]["memories"]  # costs too: all know what each batch cost who played it
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == names
    for name in names:
        ours, theirs = ((tmp_path / folder / name).read_bytes() for folder in ("shared", "alone"))
        if name.endswith(".jsonl"):
            assert ours == theirs
        else:
            assert [json.loads(x)["num_tasks"] for x in ours.splitlines()] == [
                json.loads(x)["num_tasks"] for x in theirs.splitlines()
            ]
    calls = [model.num_calls for model in models]
    assert calls[0] == sum(calls[1:]) == 3 * math.ceil(4 / batch_size)
    assert max(calls[1:]) == 3 * math.ceil(calls[0] / 3 / size)


@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("sizes", [(2, 1), (2, 3), (1, 2)])
def test_an_evaluation_goes_on_with_any_number_of_processes(tmp_path, dies, sizes):
    whole = compare(tmp_path / "whole", batch_size=1)

    def begin(peer):
        model = Scripted(ANSWERS, die_at=3 if peer.rank == dies % sizes[0] else None)
        return compare(tmp_path / "cut", model, batch_size=1, processes=peer)

    assert any(isinstance(outcome, KeyboardInterrupt) for outcome in together(sizes[0], begin))
    again = together(sizes[1], lambda peer: compare(tmp_path / "cut", batch_size=1, processes=peer))
    assert [without_costs(results) for results in again] == [without_costs(whole)] * sizes[1]


def test_an_evaluation_that_learns_as_it_goes_refuses_several_processes(tmp_path):
    found = together(2, lambda peer: compare(tmp_path / "eval", online=True, processes=peer))
    assert all(isinstance(outcome, ConfigError) for outcome in found)
    assert str(found[0]) == (
        "evaluate.online is true: each batch learns from the one before it, in one process, but 2 were launched; "
        "start it without torchrun, or set it to false"
    )
    assert not (tmp_path / "eval").exists()


# Latents that are kept

PAIR = FixedTeam(
    "pair",
    [Agent(Role(name=name, profile="x"), "sys", "{task}", ()) for name in ("a", "b")],
    "a",
)


class Latent(NoMemory):
    """Gives each role of each task latents of its own, [2, 3]."""

    kind = "latent"

    def recall_many(self, queries):
        values = [10.0 * int(task.id) + (role.name == "b") for task, role in queries]
        record = Recalled(kind="latent", num_latents=2)
        return Recalls([Recall(record, torch.full((2, 3), value)) for value in values])


class Both(Scripted):
    """`Scripted` for a team of two."""

    def respond(self, prompts, sampling):
        self.num_calls += 1
        if self.num_calls == self.die_at:
            raise KeyboardInterrupt
        self.responses, self._used = {"a": ["1"], "b": ["1"]}, {"a": 0, "b": 0}
        return [ScriptedModel.respond(self, [prompt], sampling)[0] for prompt in prompts]


FAMILIES = [Task(id=str(i), domain="toy", text=f"t{i}", data={"family": "odd" if i % 2 else "even"}) for i in range(4)]


def keep(folder, model=None, names=("latent:lmpo",), tasks=FAMILIES, **options):
    options = {"sampling": GREEDY, "batch_size": 2, "num_bootstraps": 10} | options
    memories = {name: NoMemory if name == "none" else Latent for name in names}
    return evaluate(PAIR, model or Both({}), memories, tasks, lambda task: World(), folder, **options)


def test_latents_are_kept_by_task_and_role_with_what_each_task_is_one_of(tmp_path):
    keep(tmp_path, names=("none", "latent:lmpo", "latent:lmpo:random"))
    kept = read_latents(tmp_path / "latent-lmpo.safetensors")
    assert (kept.tasks, kept.roles) == (tuple(task.key for task in FAMILIES), ("a", "b"))
    assert kept.domains == ("even", "odd", "even", "odd")
    assert kept.latents.shape == (4, 2, 2, 3)
    assert kept.latents[:, :, 1, 2].tolist() == [[0, 1], [10, 11], [20, 21], [30, 31]]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1  # neither of no memory nor of a control
    forget(tmp_path, MemoryName.parse("latent:lmpo"))
    assert not list(tmp_path.glob("latent-lmpo.*"))


def test_latents_of_a_sample_of_the_tasks_are_kept(tmp_path):
    tasks = [Task(id=str(i), domain=f"d{i // 50}", text=f"t{i}") for i in range(100)]
    keep(tmp_path, tasks=tasks, batch_size=30)
    kept = read_latents(tmp_path / "latent-lmpo.safetensors")
    assert len(set(kept.tasks)) == MAX_KEPT_TASKS < 100
    assert set(kept.domains) == {"d0", "d1"}  # of a split that is sorted by them
    assert list(kept.tasks) == [task.key for task in tasks if task.key in kept.tasks]
    values = {task: row[0, 0, 0] for task, row in zip(kept.tasks, kept.latents, strict=True)}
    assert all(values[task.key] == 10 * int(task.id) for task in tasks if task.key in values)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("die_at", [1, 2])
def test_an_interruption_and_several_processes_change_nothing_in_what_is_kept(tmp_path, size, die_at):
    keep(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path / "cut", Both({}, die_at=die_at))
    together(size, lambda peer: keep(tmp_path / "cut", batch_size=1, processes=peer))
    whole, cut = ((tmp_path / name / "latent-lmpo.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.parametrize("fatal", range(1, 9))
def test_kill_9_at_any_write_leaves_latents_that_are_made_whole(tmp_path, monkeypatch, fatal):
    keep(tmp_path / "whole")
    assert killed_at_sync(fatal, monkeypatch, lambda: keep(tmp_path / "cut"))
    keep(tmp_path / "cut")
    for name in ("latent-lmpo.safetensors", "latent-lmpo.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_damaged_file_of_latents_is_told_when_it_is_to_be_added_to(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path, Both({}, die_at=2))
    cut(tmp_path / "latent-lmpo.safetensors", 9)
    with pytest.raises(RunError, match=r"latent-lmpo\.safetensors: damaged .*remove it"):
        keep(tmp_path)


def test_a_control_is_compared_with_what_it_controls(tmp_path):
    memories = {
        "latent:x": lambda: Kind("text"),
        "latent:x:other-role": lambda: Kind("mine"),
        "latent:y:random": lambda: Kind("mine"),
    }
    rows = evaluate(
        SOLO, Scripted(ANSWERS), memories, TASKS, lambda task: World(), tmp_path, sampling=GREEDY, num_bootstraps=500
    )["memories"]
    assert "vs_real" not in rows[0]
    assert rows[1]["vs_real"]["difference"] == -0.75
    assert rows[1]["vs_real"]["p_value"] == pytest.approx(0.25, abs=0.08)
    assert "vs_real" not in rows[2]  # what it controls was not played


def test_a_control_of_text_is_compared_with_text_and_with_no_other(tmp_path):
    memories = {name: lambda: Kind("text") for name in ("text", "text:irrelevant", "latent:x:other-task")}
    rows = evaluate(
        SOLO, Scripted(ANSWERS), memories, TASKS, lambda task: World(), tmp_path, sampling=GREEDY, num_bootstraps=10
    )["memories"]
    assert ["vs_real" in row for row in rows] == [False, True, False]
    assert rows[1]["vs_real"]["difference"] == 0
    assert (tmp_path / "text-irrelevant.jsonl").exists()


# What is carried, found, and of which group


def test_scripted_agents_carry_nothing_that_could_be_measured(tmp_path):
    assert [row["carried"] for row in compare(tmp_path)["memories"]] == [None] * 3


class Pointing(NoMemory):
    """Recalls the trajectories that it is told for each task."""

    kind = "text"

    def __init__(self, sources):
        self.sources = sources

    def recall_many(self, queries):
        sources = [tuple(self.sources[task.id]) for task, _ in queries]
        return Recalls([Recall(Recalled(kind="text", text="[text]", sources=found)) for found in sources])


def test_hits_and_groups_are_counted_by_hand(tmp_path, fake_embed):
    with ExperienceBank(tmp_path / "bank.sqlite", fake_embed, embedder="fake") as bank:
        past = [Task(id=name, domain="toy", text=f"past {name} 1") for name in ("a", "b", "c")]
        played = rollout(SOLO, NoMemory(), ScriptedModel({"a": ["1"]}), past, lambda task: World(), sampling=GREEDY)
        bank.add(played.trajectories)
        a, b, c = (t.id for t in played.trajectories)
        data = [
            {"answered_by": ["a"], "group": "old"},
            {"answered_by": ["a", "b"], "group": "old"},
            {"answered_by": ["c"], "group": "new"},
            {"group": "new"},
        ]
        tasks = [Task(id=str(i), domain="toy", text=f"t{i}", data=values) for i, values in enumerate(data)]
        # Found: a; b but not a; c with one that is nowhere; and what nobody asks for.
        memory = Pointing({"0": [a, c], "1": [b, c], "2": [c, "elsewhere"], "3": [a]})
        rows = evaluate(
            SOLO, Scripted(ANSWERS | {"text": "1101"}), {"none": NoMemory, "text": lambda: memory}, tasks,
            lambda task: World(), tmp_path, sampling=GREEDY, num_bootstraps=10, bank=bank,
        )["memories"]  # fmt: skip
    none, text = rows
    assert (none["retrieval_hits"], none["accuracy_hit"]) == (None, None)  # it recalls nothing
    assert none["groups"]["old"] == {**share(1, 2), "hit": None}
    assert text["retrieval_hits"] == pytest.approx(2 / 3)
    assert text["accuracy_hit"] == share(1, 2)
    assert text["groups"] == {
        "new": {**share(1, 2), "hit": share(0, 1)},
        "old": {**share(2, 2), "hit": share(1, 1)},
    }


def share(successes, total):
    low, high = wilson_interval(successes, total)
    return {"accuracy": successes / total, "low": low, "high": high, "num_tasks": total}


def test_without_answers_or_groups_nothing_is_said_of_them(tmp_path):
    for row in compare(tmp_path)["memories"]:
        assert (row["retrieval_hits"], row["accuracy_hit"], row["groups"]) == (None, None, None)


def test_a_bank_that_changes_during_an_evaluation_is_told_unless_it_is_to_learn(tmp_path, fake_embed):
    with ExperienceBank(tmp_path / "bank.sqlite", fake_embed, embedder="fake") as bank:
        task = Task(id="p", domain="toy", text="past 1")
        (late,) = rollout(
            SOLO, NoMemory(), ScriptedModel({"a": ["1"]}), [task], lambda task: World(), sampling=GREEDY
        ).trajectories

        class Writing(NoMemory):
            def recall_many(self, queries):
                bank.add(late)
                return super().recall_many(queries)

            def add(self, trajectory):
                bank.add(trajectory)

        def run(folder, online=False):
            evaluate(
                SOLO, Scripted(ANSWERS), {"mine": Writing}, TASKS, lambda task: World(), folder, sampling=GREEDY,
                num_bootstraps=10, bank=bank, online=online,
            )  # fmt: skip

        with pytest.raises(BankError, match=r"the bank changed during an evaluation \(0 trajectories before, 1 now\)"):
            run(tmp_path / "frozen")
        run(tmp_path / "online", online=True)


# Learning as it goes


@pytest.mark.parametrize("die_at", [None, 1, 2])
def test_online_memories_learn_each_batch_after_it_was_played_also_after_an_interruption(tmp_path, die_at):
    def run(model):
        learned = []
        memories = {"mine": lambda: Kind("mine", learned)}
        evaluate(
            SOLO, model, memories, TASKS, lambda task: World(), tmp_path, sampling=GREEDY, batch_size=2, online=True,
            num_bootstraps=10, on_progress=lambda *_: None,
        )  # fmt: skip
        return learned

    if die_at is not None:
        with pytest.raises(KeyboardInterrupt):
            run(Scripted(ANSWERS, die_at))
    assert run(Scripted(ANSWERS)) == ["0", "1", "2", "3"]  # after an interruption the earlier ones are learned first


def test_nothing_is_learned_unless_online(tmp_path):
    class Never(NoMemory):
        def add(self, trajectory):
            raise AssertionError("learned")

    evaluate(
        SOLO, Scripted(ANSWERS), {"none": Never}, TASKS, lambda task: World(), tmp_path, sampling=GREEDY,
        num_bootstraps=10,
    )  # fmt: skip


# Names


def test_files_are_called_as_their_memories_and_never_collide_or_leave_the_folder(tmp_path):
    assert MemoryName.parse("none").file_stem == "none"
    assert MemoryName.parse("latent:lmpo").file_stem == "latent-lmpo"
    assert MemoryName.parse("latent:lmpo:other-role").file_stem == "latent-lmpo-other-role"
    names = [
        "latent:lmpo", "latent:LMPO", "latent:lmpo/", "latent-lmpo", "latent:a/b", "latent:a_b", "latent:a:b",
        "latent:a-b", "latent:/a/b", "latent:../a/b", "latent:..", "latent:a/b.x", "latent:a/b.y",
        "latent:lmpo:random", "latent:lmpo-random", "latent:lmpo:randoms",
        "latent:" + "x" * 300, "latent:" + "x" * 301, "latent:ä", "latent: ", "latent:*",
    ]  # fmt: skip
    stems = [MemoryName.parse(name).file_stem for name in names]
    assert len({stem.lower() for stem in stems}) == len(names)
    for stem in stems:
        assert (tmp_path / f"{stem}.jsonl").parent == tmp_path
        (tmp_path / f"{stem}.jsonl").touch()
    forget(tmp_path, MemoryName.parse("latent:a/b.x"))
    assert len(list(tmp_path.iterdir())) == len(names) - 1


def test_results_name_the_file_of_each_memory(tmp_path):
    evaluate(
        SOLO, Scripted({"none": "1111"}), {"latent:../x": NoMemory}, TASKS, lambda task: World(), tmp_path,
        sampling=GREEDY, num_bootstraps=10,
    )  # fmt: skip
    (path,) = tmp_path.glob("*.jsonl")
    assert path.name == f"{MemoryName.parse('latent:../x').file_stem}.jsonl"
