"""Rollouts with a model that many threads may ask: no episode waits for another, and nothing else is different."""

import hashlib
import os
import signal
import threading
import time
from dataclasses import dataclass, field

import pytest

from latentmem.config import Sampling
from latentmem.environments.environment import Outcome
from latentmem.errors import DataError, ModelError
from latentmem.memory.memory import NoMemory, Recall, Recalls
from latentmem.models.agent import Sampled
from latentmem.rollout import EPISODES_AT_ONCE, rollout
from latentmem.teams.dylan import DylanTeam
from latentmem.teams.team import load_team
from latentmem.trajectory import Recalled, Task

SAMPLING = Sampling(temperature=0.5, max_response_tokens=50)
PATIENCE = 60
"""Seconds after which a test that waits for an event gives up."""


def tasks(n):
    return [Task(id=str(i), domain="toy", text=f"task {i}") for i in range(n)]


@dataclass
class Engine:
    """Answers by a hash of what it is asked, so a response depends on its own prompt alone."""

    concurrent: bool = True
    name: str = "hashing"
    asked: list[tuple[str, str]] = field(default_factory=list)

    def respond(self, prompts, sampling):
        self.asked += [(prompt.group, prompt.user) for prompt in prompts]
        return [self._say(prompt, sampling) for prompt in prompts]

    def _say(self, prompt, sampling):
        said = hashlib.sha256(repr((prompt.role, prompt.system, prompt.user, prompt.seed)).encode()).hexdigest()[:4]
        ids = tuple(said.encode())
        return Sampled(said, ids, tuple(-i / 100 for i in ids), "stop", len(prompt.user) + sampling.max_response_tokens)


class Toy:
    """Ends after `turns` turns, with a reward made of the last action; `wait` is called before each."""

    instructions = "Say something."

    def __init__(self, turns=3, wait=lambda turn: None):
        self.turns, self.turn, self.wait = turns, 0, wait

    def step(self, action):
        self.wait(self.turn)
        self.turn += 1
        reward = hashlib.sha256(action.encode()).digest()[0] / 255
        return Outcome(f"turn {self.turn} over", reward, self.turn == self.turns, {"extracted": action})


class Remembering(NoMemory):
    def __init__(self):
        self.asked = []

    def recall_many(self, queries):
        self.asked += [(task.key, role.name) for task, role in queries]
        return Recalls([Recall(Recalled(kind="text", text=f"{t.key} {r.name}", sources=())) for t, r in queries])


def play(model=None, num_tasks=2, start=lambda task: Toy(), team="autogen", memory=None, **options):
    return rollout(
        load_team(team) if isinstance(team, str) else team,
        memory or NoMemory(),
        model or Engine(),
        tasks(num_tasks),
        start,
        **{"sampling": SAMPLING, "max_turns": 5} | options,
    )


def episode_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


class Crashing(Toy):
    def step(self, action):
        if self.turn == 1:
            raise RuntimeError("the world broke")
        return super().step(action)


def some_worlds(task):
    if task.id == "1":
        raise KeyError("board")
    return Crashing() if task.id == "2" else Toy(1 + int(task.id) % 4)


@pytest.mark.parametrize("team", ["autogen", "macnet", "dylan"])
def test_trajectories_are_those_of_episodes_in_step_and_the_model_is_asked_the_same(team):
    engines = [Engine(concurrent) for concurrent in (False, True)]
    memories = [Remembering() for _ in engines]
    in_step, apart = (
        play(engine, 6, some_worlds, team, memory, group_size=3, seed=7)
        for engine, memory in zip(engines, memories, strict=True)
    )
    assert apart.groups == in_step.groups
    assert {t.error for t in apart.trajectories} == {
        None, "environment: KeyError: 'board'", "environment: RuntimeError: the world broke"
    }  # fmt: skip
    assert sorted(engines[0].asked) == sorted(engines[1].asked)
    assert memories[0].asked == memories[1].asked
    assert len(set(memories[1].asked)) == len(memories[1].asked)
    assert isinstance(load_team("dylan"), DylanTeam)  # a team that decides as it goes


def test_a_fast_episode_ends_while_a_slow_one_has_not_acted_once():
    over = threading.Event()

    def start(task):
        if task.id == "0":
            return Toy(2, lambda turn: _wait(over))
        return Toy(4, lambda turn: over.set() if turn == 3 else None)

    slow, fast = play(start=start).trajectories
    assert (len(slow.steps), len(fast.steps)) == (2, 4)
    assert slow.error is fast.error is None


def _pause(turn):
    """Leave the processor to the others: an episode that never ends would be very long."""
    time.sleep(0.005)


def _wait(event):
    if not event.wait(PATIENCE):
        raise TimeoutError("nothing happened")


def test_a_world_that_is_slow_to_start_holds_up_its_own_episode_only():
    over = threading.Event()

    def start(task):
        if task.id == "0":
            _wait(over)
            return Toy(1)
        return Toy(2, lambda turn: over.set() if turn == 1 else None)

    assert [len(t.steps) for t in play(start=start).trajectories] == [1, 2]


def test_hundreds_of_episodes_are_under_way_at_once_and_no_more_than_allowed():
    assert EPISODES_AT_ONCE >= 200
    together = threading.Barrier(200, timeout=PATIENCE)
    done = play(num_tasks=50, start=lambda task: Toy(1, lambda turn: together.wait()), group_size=4).trajectories
    assert [t.error for t in done] == [None] * 200
    under_way, most, lock = set(), [], threading.Lock()

    class Watched(Toy):
        def step(self, action):
            with lock:
                under_way.add(self)
                most.append(len(under_way))
            outcome = super().step(action)
            under_way.discard(self)
            return outcome

    assert len(play(num_tasks=40, start=lambda task: Watched(1), workers=3).trajectories) == 40
    assert max(most) <= 3


def test_no_tasks_are_no_trajectories():
    assert play(num_tasks=0).groups == []


@dataclass
class Failing(Engine):
    """Raises at the prompts of one task; answers for the others only when that has happened."""

    failed: threading.Event = field(default_factory=threading.Event)

    def respond(self, prompts, sampling):
        if "task toy:3" in prompts[0].group:
            self.failed.set()
            raise ModelError("the server is gone")
        _wait(self.failed)
        return super().respond(prompts, sampling)


def test_an_error_of_the_model_ends_the_rollout_and_leaves_no_thread():
    model = Failing()
    with pytest.raises(ModelError, match="the server is gone"):
        play(model, 8, lambda task: Toy(-1, _pause), max_turns=10**9)
    assert episode_threads() == []


def test_a_mistake_that_an_environment_tells_ends_the_rollout():
    def start(task):
        if task.id == "5":
            raise DataError("row 5: no answer")
        return Toy(-1, _pause)

    with pytest.raises(DataError, match="row 5"):
        play(num_tasks=8, start=start, max_turns=10**9)
    assert episode_threads() == []


def test_episodes_that_did_not_begin_before_an_error_never_do():
    begun = []

    def start(task):
        begun.append(task.id)
        raise DataError("no")

    with pytest.raises(DataError):
        play(num_tasks=500, start=start, workers=1)
    assert len(begun) < 500


def test_ctrl_c_ends_the_rollout_and_leaves_no_thread():
    begun = threading.Barrier(4, lambda: os.kill(os.getpid(), signal.SIGINT), timeout=PATIENCE)

    def start(task):
        if int(task.id) < 4:
            return Toy(1)
        return Toy(-1, lambda turn: begun.wait() if turn == 1 else _pause(turn))

    with pytest.raises(KeyboardInterrupt):  # in the last four episodes, for which no thread is made any more
        play(num_tasks=8, start=start, max_turns=10**9, workers=4)
    assert episode_threads() == []


def test_seconds_are_sums_over_the_episodes():
    together = threading.Barrier(8, timeout=PATIENCE)
    passed = threading.Event()

    def wait(turn):
        together.wait()
        passed.wait(0.05)  # all eight wait at the same time

    seconds = play(num_tasks=8, start=lambda task: Toy(1, wait)).seconds
    assert seconds.environment >= 8 * 0.05
    assert seconds.generation > 0
