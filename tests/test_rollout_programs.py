"""Rollouts of programs in this process: what a program of any form may do, and what is made of it."""

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from latentmem.config import Sampling
from latentmem.environments.environment import Outcome
from latentmem.errors import BankError, ConfigError, DataError, WindowError
from latentmem.memory.memory import NoMemory, Recall, Recalls
from latentmem.models.agent import Sampled, ScriptedModel
from latentmem.rollout import rollout
from latentmem.rollout.recalls import SharedRecalls
from latentmem.teams.team import load_team
from latentmem.teams.turn import Action, Call, Program, ProgramFailed, ServedCall, Teams
from latentmem.training.ahead import Ahead
from latentmem.trajectory import Conversation, Recalled, Role, Task

SAMPLING = Sampling(temperature=0.5, max_response_tokens=50)
PATIENCE = 60


def tasks(n=2):
    return [Task(id=str(i), domain="toy", text=f"task {i}") for i in range(n)]


@dataclass
class Engine:
    """Answers by a hash of what it is asked."""

    concurrent: bool = True
    name: str = "hashing"
    prompts: list = field(default_factory=list)

    def respond(self, prompts, sampling):
        self.prompts += prompts
        return [self._say(prompt) for prompt in prompts]

    def _say(self, prompt):
        told = (prompt.role, prompt.system, prompt.user, prompt.seed)
        said = hashlib.sha256(repr(told).encode()).hexdigest()[:8]
        ids = tuple(said.encode())
        if prompt.on_tokens is not None and not prompt.on_tokens(ids):
            ids = ids[:1]
        return Sampled(said, ids, (0.0,) * len(ids), "stop", len(prompt.user))


class Toy:
    instructions = "Say something."

    def __init__(self):
        self.heard = {}

    def hear(self, said):
        self.heard = dict(said)

    def step(self, action):
        return Outcome("", 0.5, True, {"extracted": action, "heard": self.heard})


class Scripted:
    """A program that is a function of the task, `speak` and its seed."""

    name = "scripted"

    def __init__(self, run, roles=(), parallel=4):
        self.run, self.roles, self.parallel = run, roles, parallel
        self.stopped = threading.Event()

    def play(self, task, instructions, seed, speak):
        self.instructions = instructions
        return self.run(task, speak)

    def stop(self):
        self.stopped.set()


A, B = Role(name="a", profile="first"), Role(name="b", profile="second")


def play(run, model=None, memory=None, num_tasks=2, roles=(), **options):
    team = run if not callable(run) else Scripted(run, roles)
    assert isinstance(team, (Program, Teams))
    options = {"sampling": SAMPLING} | options
    return rollout(team, memory or NoMemory(), model or Engine(), tasks(num_tasks), lambda task: Toy(), **options)


def two(task, speak):
    """Both speak; b reads a."""
    (first,) = speak([Call(A, "s", task.text)])
    (second,) = speak([Call(B, "s", f"{task.text}\na said: {first.response}")])
    return Action(second.response, {"asked": 2}, {"a": 0.25})


def test_an_episode_is_one_step_with_its_messages_rewards_and_record():
    done = play(two).trajectories[0]
    (step,) = done.steps
    assert [(m.role, m.reads) for m in step.messages] == [("a", ()), ("b", (0,))]
    assert step.action == step.messages[1].response
    assert step.info["team"] == {"asked": 2}
    assert step.info["heard"] == {"a": step.messages[0].response, "b": step.messages[1].response}
    assert (done.reward, done.rewards, done.team, done.error) == (0.5, {"a": 0.25}, "scripted", None)


@pytest.mark.parametrize("options", [{"workers": 1}, {"model": Engine(concurrent=False)}, {}])
def test_responses_are_the_same_however_episodes_are_played(options):
    first = play(two, num_tasks=5, group_size=3, seed=9)
    assert play(two, num_tasks=5, group_size=3, seed=9, **options).groups == first.groups
    assert len({m.response for t in first.trajectories for m in t.messages}) == 30


def test_a_response_does_not_depend_on_which_of_two_agents_asks_first():
    def both(order):
        def run(task, speak):
            said = {role.name: speak([Call(role, "s", task.text)])[0].response for role in order}
            return Action(said["a"])

        return run

    responses = [
        [sorted((m.role, m.response) for m in t.messages) for t in play(both(order)).trajectories]
        for order in ((A, B), (B, A))
    ]
    assert responses[0] == responses[1]


def test_the_same_question_asked_twice_has_two_answers():
    def run(task, speak):
        return Action(" ".join(speak([Call(A, "s", "x")])[0].response for _ in range(2)))

    first, second = play(run).trajectories[0].steps[0].action.split()
    assert first != second


def test_a_word_of_the_task_is_no_quotation():
    def run(task, speak):
        speak([Call(A, "s", "say the task")])
        speak([Call(B, "s", f"{task.text}: go on")])
        return Action("x")

    (done,) = play(run, ScriptedModel({"a": ["task 0"], "b": ["x"]}), num_tasks=1).trajectories
    assert [m.reads for m in done.messages] == [(), ()]


class Asked:
    """A memory that notes each batch that it is asked for."""

    kind = "text"

    def __init__(self, meanwhile=lambda: None):
        self.batches, self.meanwhile = [], meanwhile

    def recall_many(self, queries):
        self.batches.append([(task.id, role.name) for task, role in queries])
        self.meanwhile()
        return Recalls([Recall(Recalled(kind="text", text=f"{t.id} {r.name}")) for t, r in queries])

    def add(self, trajectory):
        raise NotImplementedError


def test_known_roles_are_recalled_in_one_batch_beforehand_and_found_ones_once():
    memory = Asked()
    done = play(two, memory=memory, roles=(A,), group_size=8)
    assert memory.batches[0] == [("0", "a"), ("1", "a")]
    assert sorted(query for batch in memory.batches[1:] for query in batch) == [("0", "b"), ("1", "b")]
    assert {key: r.record.text for key, r in done.recalls.items()} == {
        (f"toy:{i}", role): f"{i} {role}" for i in "01" for role in "ab"
    }
    assert {m.recalled.text for t in done.trajectories for m in t.messages} == {f"{i} {r}" for i in "01" for r in "ab"}


def test_what_many_miss_while_the_memory_is_asked_is_one_batch():
    asking, go_on = threading.Event(), threading.Event()

    def meanwhile():
        asking.set()
        assert go_on.wait(PATIENCE)

    memory = Asked(meanwhile)
    recalls = SharedRecalls(memory)
    with ThreadPoolExecutor(4) as pool:
        first, *others = tasks(4)
        found = [pool.submit(recalls.ask, [(first, A)])]
        assert asking.wait(PATIENCE)
        found += [pool.submit(recalls.ask, [(task, A)]) for task in others]
        until = time.monotonic() + PATIENCE
        while len(recalls._missing) < 3 and time.monotonic() < until:
            time.sleep(0.001)
        go_on.set()
        assert [done.result()[0].record.text for done in found] == ["0 a", "1 a", "2 a", "3 a"]
    assert [sorted(batch) for batch in memory.batches] == [[("0", "a")], [("1", "a"), ("2", "a"), ("3", "a")]]


def test_what_one_thread_failed_to_recall_for_another_is_asked_again():
    asking, go_on = threading.Event(), threading.Event()

    def meanwhile():
        if not asking.is_set():
            asking.set()
            assert go_on.wait(PATIENCE)
        elif len(memory.batches) == 2:
            raise BankError("busy")

    memory = Asked(meanwhile)
    recalls = SharedRecalls(memory)
    with ThreadPoolExecutor(4) as pool:
        first, *others = tasks(3)
        begun = pool.submit(recalls.ask, [(first, A)])
        assert asking.wait(PATIENCE)
        found = [pool.submit(recalls.ask, [(task, A)]) for task in others]
        until = time.monotonic() + PATIENCE
        while len(recalls._missing) < 2 and time.monotonic() < until:
            time.sleep(0.001)
        go_on.set()
        begun.result()
        errors = [done.exception() for done in found]
    assert sorted(map(type, errors), key=str) == [type(None), BankError]
    assert len(memory.batches) == 3


def test_a_failing_program_is_data_and_keeps_what_was_said():
    def run(task, speak):
        speak([Call(A, "s", task.text)])
        if task.id == "0":
            raise ProgramFailed("exit status 3")
        if task.id == "1":
            raise ZeroDivisionError("by zero")
        return Action("x")

    done = play(run, num_tasks=3).trajectories
    assert [t.error for t in done] == ["program: exit status 3", "program: ZeroDivisionError: by zero", None]
    assert [(t.reward, len(t.messages), t.steps[0].action) for t in done] == [(0, 1, ""), (0, 1, ""), (0.5, 1, "x")]


def test_a_call_after_the_end_is_refused_and_leaves_no_message():
    kept = {}

    def run(task, speak):
        kept[task.id] = speak
        if task.id == "1":
            with pytest.raises(ProgramFailed, match="after its episode had ended"):
                kept["0"]([Call(A, "s", "late")])
        return Action("x")

    done = play(run, workers=1).trajectories
    assert [t.messages for t in done] == [(), ()]
    assert [t.error for t in done] == [None, None]


def test_a_response_for_which_nobody_waits_is_not_kept():
    def run(task, speak):
        chat = Conversation(messages=({"role": "user", "content": "x"},))
        with pytest.raises(ProgramFailed, match="the client went away"):
            speak([Call(A, "", "x", served=ServedCall("id", chat, "l", on_tokens=lambda ids: False))])
        (said,) = speak([Call(A, "", "x", served=ServedCall("id", chat, "l", on_tokens=lambda ids: True))])
        return Action(said.response)

    (done,) = play(run, num_tasks=1).trajectories
    assert (done.error, len(done.messages)) == (None, 1)


def test_requests_of_one_lineage_have_streams_of_their_number_and_choice():
    def run(task, speak):
        chat = Conversation(messages=({"role": "user", "content": "x"},))
        for number, choice in ((0, 0), (0, 1), (1, 0), (0, 0)):
            speak([Call(A, "", "x", served=ServedCall("id", chat, "l", number, choice))])
        return Action("x")

    (done,) = play(run, num_tasks=1).trajectories
    first, second, third, again = [m.response for m in done.messages]
    assert first == again  # the same request, sent again
    assert len({first, second, third}) == 3


class TooLong(Engine):
    def respond(self, prompts, sampling):
        if "long" in prompts[0].user:
            raise WindowError("the prompt is too long")
        return super().respond(prompts, sampling)


def test_a_prompt_that_is_too_long_is_the_program_s_own_affair():
    def run(task, speak):
        with pytest.raises(WindowError):
            speak([Call(A, "s", "long")])
        return Action(speak([Call(A, "s", "short")])[0].response)

    assert [t.error for t in play(run, TooLong()).trajectories] == [None, None]


class Gone(Engine):
    def respond(self, prompts, sampling):
        raise DataError("the server is gone")


class BrokenBank(NoMemory):
    def recall_many(self, queries):
        raise BankError("the bank is gone")


@pytest.mark.parametrize(("parts", "error"), [({"model": Gone()}, DataError), ({"memory": BrokenBank()}, BankError)])
def test_an_error_of_the_model_or_the_memory_ends_the_rollout_whatever_the_program_makes_of_it(parts, error):
    def run(task, speak):
        if task.id != "0":
            assert team.stopped.wait(PATIENCE)  # it never calls, and is told to stop
            raise ProgramFailed("stopped")
        try:
            speak([Call(A, "s", "x")])
        except (DataError, BankError):
            return Action("as if nothing had happened")

    team = Scripted(run)
    with pytest.raises(error, match="is gone"):
        play(team, num_tasks=3, **parts)
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def test_a_mistake_that_the_program_s_own_class_tells_ends_the_rollout():
    def run(task, speak):
        raise ConfigError("team.command: not found")

    with pytest.raises(ConfigError, match="not found"):
        play(run)


def test_programs_and_fixed_teams_share_tasks():
    teams = Teams((load_team("autogen"), Scripted(two)), seed=1)
    done = play(teams, num_tasks=8).trajectories
    assert [t.task.id for t in done] == [str(i) for i in range(8)]
    assert {t.team for t in done} == {"autogen", "scripted"}
    for trajectory in done:
        assert trajectory.team == teams.of(trajectory.task).name


def test_that_most_episodes_failed_is_told_with_the_cause(caplog):
    def run(task, speak):
        speak([Call(A, "s", "x")])
        if task.id != "0":
            raise ProgramFailed("cut short")
        return Action("x")

    play(run, num_tasks=2)
    assert not caplog.records
    play(run, num_tasks=3)
    assert [r.message for r in caplog.records] == [
        "program scripted: 2 of 3 episodes failed, most often so: program: cut short"
    ]


def test_rewards_for_roles_that_said_nothing_are_told_of(caplog):
    def run(task, speak):
        speak([Call(A, "s", "x")])
        return Action("x", rewards={"planer": 1.0})

    play(run)
    assert [r.message for r in caplog.records] == [
        "program scripted: rewards are told for planer, who said nothing; the roles that spoke are a"
    ]


def test_what_is_played_ahead_needs_its_roles_beforehand():
    memory, team = Asked(), Scripted(two, roles=(A,))
    ahead = Ahead(memory, Engine())
    queries = [(task, A) for task in tasks()]
    ahead.begin(queries, lambda memory, model: play(team, model, memory))
    with pytest.raises(
        ConfigError, match=r"max_staleness is 1, .* but role 'b' was found while playing; list it in team"
    ):
        ahead.take()
    ahead.stop()
