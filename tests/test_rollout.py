"""The rollout: who is asked when and with what, on scripted models and toy environments."""

import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch

from latentmem.config import Sampling
from latentmem.environments.environment import Outcome
from latentmem.errors import ConfigError, DataError, ModelError
from latentmem.memory.memory import NoMemory, Recall, Recalls, Spent
from latentmem.models.agent import ScriptedModel
from latentmem.models.language_model import LanguageModel
from latentmem.rollout import rollout
from latentmem.teams.team import Agent, FixedTeam, load_team
from latentmem.teams.turn import Action, Call, Teams
from latentmem.trajectory import Recalled, Role, Task

SAMPLING = Sampling(temperature=0.5, max_response_tokens=50)
A, B, C = (Role(name=name, profile=f"is {name}") for name in "abc")
PAIR = FixedTeam(
    "pair",
    [
        Agent(A, "First.", "{task}\n\n{history}", ()),
        Agent(B, "Also first.", "{task}", ()),
        Agent(C, "Last. {instructions}", "{task}\n\n{messages}", ("b", "a")),
    ],
    "c",
)


def tasks(n):
    return [Task(id=str(i), domain="toy", text=f"task {i}") for i in range(n)]


@dataclass
class Toy:
    """Pays 1 for `right` in the last turn; tells the number of the turn before."""

    right: str = "yes"
    num_turns: int = 1
    instructions: str = "Say yes."
    actions: list[str] = field(default_factory=list)

    def step(self, action):
        self.actions.append(action)
        turn = len(self.actions)
        return Outcome(f"turn {turn} over", float(action == self.right), turn == self.num_turns, {"extracted": action})


class Counting(ScriptedModel):
    """Remembers which prompts came in one call."""

    def __init__(self, responses):
        super().__init__(responses)
        self.calls = []

    def respond(self, prompts, sampling):
        self.calls.append(list(prompts))
        return super().respond(prompts, sampling)


class Remembering(NoMemory):
    """Records what it was asked, and recalls what it was made with."""

    def __init__(self, make=lambda task, role: Recall(Recalled(kind="none"))):
        self.make = make
        self.asked = []

    def recall_many(self, queries):
        self.asked += [(task.key, role.name) for task, role in queries]
        return Recalls([self.make(task, role) for task, role in queries])


def scripted(**responses):
    return Counting({"a": ["from a"], "b": ["from b"], "c": ["yes"]} | responses)


def play(team=PAIR, memory=None, model=None, num_tasks=2, start=lambda task: Toy(), **options):
    return rollout(
        team, memory or NoMemory(), model or scripted(), tasks(num_tasks), start, **{"sampling": SAMPLING} | options
    )


# Who is asked, and when


def test_agents_of_one_depth_over_all_episodes_are_one_call_of_the_model():
    model = scripted()
    play(model=model, num_tasks=3, group_size=4)
    assert [len(call) for call in model.calls] == [2 * 3 * 4, 3 * 4]


def test_prompts_of_one_role_and_task_stand_side_by_side():
    model = scripted()
    play(model=model, num_tasks=3, group_size=4)
    groups = [prompt.group for prompt in model.calls[0]]
    assert len(set(groups)) == 6
    assert sum(x != y for x, y in pairwise(groups)) == 5


def test_groups_come_in_the_order_of_the_tasks_and_responses_reach_their_own_episode():
    class Echo(ScriptedModel):
        """Each response is the first line of its prompt."""

        def respond(self, prompts, sampling):
            sampled = []
            for prompt in prompts:
                self.responses = {prompt.role: [prompt.user.splitlines()[0]]}
                sampled += super().respond([prompt], sampling)
            return sampled

    groups = play(model=Echo({role: ["x"] for role in "abc"}), num_tasks=3, group_size=2).groups
    assert [[t.task.id for t in group] for group in groups] == [["0", "0"], ["1", "1"], ["2", "2"]]
    assert all({m.response for m in t.messages} == {t.task.text} for group in groups for t in group)


def test_memory_is_asked_once_for_each_task_and_role():
    memory = Remembering()
    play(memory=memory, num_tasks=2, group_size=3, start=lambda task: Toy(num_turns=2), max_turns=2)
    assert sorted(memory.asked) == [(f"toy:{i}", role) for i in (0, 1) for role in "abc"]


def test_reads_are_the_positions_of_the_quoted_messages():
    (trajectory,) = play(num_tasks=1).trajectories
    assert [m.role for m in trajectory.messages] == ["a", "b", "c"]
    assert [m.reads for m in trajectory.messages] == [(), (), (1, 0)]
    assert trajectory.messages[2].user == "task 0\n\nb said:\nfrom b\n\na said:\nfrom a"
    assert trajectory.messages[2].system == "Last. Say yes."


def test_the_trajectory_records_what_was_sampled():
    (trajectory,) = play(num_tasks=1, seed=3).trajectories
    message = trajectory.messages[2]
    assert message.token_ids == (*b"yes", 256)
    assert (message.finish, message.temperature, message.logps) == ("stop", 0.5, (0.0,) * 4)
    assert message.num_prompt_tokens == len("Last. Say yes.task 0\n\nb said:\nfrom b\n\na said:\nfrom a")
    assert (trajectory.team, trajectory.model, trajectory.reward, trajectory.success) == ("pair", "scripted", 1.0, True)
    assert trajectory.steps[0].info == {"extracted": "yes"}
    assert trajectory.error is None


# Seeds


def seeds(**options):
    model = scripted()
    play(model=model, **{"group_size": 2, "num_tasks": 2} | options)
    return [prompt.seed for call in model.calls for prompt in call]


def test_every_message_has_a_seed_of_its_own():
    found = seeds(start=lambda task: Toy(num_turns=3), max_turns=3, group_size=3)
    assert len(set(found)) == len(found) == 3 * 2 * 3 * 3


def test_a_seed_depends_on_seed_task_rollout_turn_and_number_but_not_on_the_company():
    assert set(seeds(num_tasks=1)) < set(seeds(num_tasks=2))
    assert set(seeds(group_size=1)) < set(seeds(group_size=2))
    assert set(seeds(max_turns=1)) < set(seeds(start=lambda task: Toy(num_turns=2), max_turns=2))
    assert not set(seeds(seed=1)) & set(seeds(seed=0))


# Turns


def test_history_reaches_the_prompts_of_the_next_turn():
    model = scripted(c=["no", "yes"])
    (trajectory,) = play(model=model, num_tasks=1, start=lambda task: Toy(num_turns=2), max_turns=5).trajectories
    assert [step.action for step in trajectory.steps] == ["no", "yes"]
    assert [step.observation for step in trajectory.steps] == ["turn 1 over", "turn 2 over"]
    assert trajectory.steps[0].messages[0].user == "task 0"
    assert trajectory.steps[1].messages[0].user == "task 0\n\nTurn 1\nWe answered: no\nReply: turn 1 over"
    assert [m.reads for m in trajectory.steps[1].messages] == [(), (), (1, 0)]
    assert trajectory.reward == 1.0


def test_an_episode_ends_at_max_turns_with_its_last_reward_and_others_go_on():
    start = {"0": Toy(num_turns=9), "1": Toy(num_turns=1), "2": Toy(num_turns=2)}
    done = play(num_tasks=3, start=lambda task: start[task.id], max_turns=3).trajectories
    assert [len(t.steps) for t in done] == [3, 1, 2]


# Failures


class Crashing(Toy):
    def step(self, action):
        raise RuntimeError("the world broke")


class Outside(Toy):
    def step(self, action):
        return Outcome("", 1.5, True)


class Refusing(Toy):
    def step(self, action):
        raise DataError("row 7: no answer")


class Unsayable(Toy):
    def step(self, action):
        raise RuntimeError("half a \ud800")


class Unwritable(Toy):
    def step(self, action):
        return Outcome("", 1.0, True, {"seen": {1}})


class Unending(Toy):
    def step(self, action):
        return Outcome("", 1.0, True, {"seen": float("nan")})


class Halved(Toy):
    """Says half a surrogate pair, before and after."""

    def __init__(self):
        super().__init__(instructions="Say \ud800.")

    def step(self, action):
        return Outcome("heard \udfff", 1.0, True, {"extracted": action})


def test_what_a_world_says_is_text_when_it_is_kept():
    model = scripted()
    (trajectory,) = play(num_tasks=1, model=model, start=lambda task: Halved()).trajectories
    assert trajectory.steps[0].observation == "heard \ufffd"
    assert "Say \ufffd." in trajectory.messages[-1].system
    assert trajectory.error is None
    assert trajectory.to_json().encode("utf-8")


def test_what_cannot_be_written_down_as_text_ends_its_episode():
    class Halves(Toy):
        def step(self, action):
            return Outcome("", 1.0, True, {"extracted": "\ud800"})

    (trajectory,) = play(num_tasks=1, start=lambda task: Halves()).trajectories
    assert trajectory.error.startswith("environment: UnicodeEncodeError: ")
    assert trajectory.steps[0].info == {"extracted": None}


@pytest.mark.parametrize(
    ("world", "error"),
    [
        (Crashing, "environment: RuntimeError: the world broke"),
        (Outside, "environment: ValueError: the reward is 1.5; expected a number from 0 to 1"),
        (Unsayable, "environment: RuntimeError: half a \ufffd"),
        (Unwritable, "environment: TypeError: Object of type set is not JSON serializable"),
        (Unending, "environment: ValueError: Out of range float values are not JSON compliant"),
    ],
)
def test_a_crashing_environment_is_data_and_the_siblings_go_on(world, error):
    done = play(num_tasks=3, start=lambda task: world() if task.id == "1" else Toy()).trajectories
    assert [t.error for t in done] == [None, error, None]
    assert [t.reward for t in done] == [1.0, 0.0, 1.0]
    assert done[1].steps[0].info == {"extracted": None}
    assert len(done[1].messages) == 3


def test_a_world_that_cannot_be_made_is_an_episode_without_steps():
    def start(task):
        if task.id == "0":
            raise KeyError("board")
        return Toy()

    model = scripted()
    done = play(model=model, start=start).trajectories
    assert [len(t.steps) for t in done] == [0, 1]
    assert done[0].error == "environment: KeyError: 'board'"
    assert [len(call) for call in model.calls] == [2, 1]


def test_a_crash_in_a_later_turn_keeps_the_turns_before():
    class Late(Toy):
        def step(self, action):
            if self.actions:
                raise OSError("gone")
            return super().step(action)

    (trajectory,) = play(num_tasks=1, start=lambda task: Late(num_turns=3), max_turns=3).trajectories
    assert len(trajectory.steps) == 2
    assert (trajectory.reward, trajectory.error) == (0.0, "environment: OSError: gone")


def test_a_mistake_of_the_user_is_not_swallowed():
    with pytest.raises(DataError, match="row 7"):
        play(start=lambda task: Refusing())


def test_environments_step_in_as_many_threads_as_there_are_workers():
    barrier = threading.Barrier(3, timeout=20)

    class Together(Toy):
        def step(self, action):
            barrier.wait()
            return super().step(action)

    assert all(t.success for t in play(num_tasks=3, start=lambda task: Together(), workers=3).trajectories)


# Memory


def test_memory_text_stands_before_the_users_text_and_the_message_stays_without_it():
    memory = Remembering(lambda task, role: Recall(Recalled(kind="text", text=f"OLD {role.name}", sources=("t1",))))
    model = scripted()
    (trajectory,) = play(memory=memory, model=model, num_tasks=1).trajectories
    assert [prompt.user.split("\n\n")[:2] for prompt in model.calls[0]] == [["OLD a", "task 0"], ["OLD b", "task 0"]]
    assert trajectory.messages[0].user == "task 0"
    assert trajectory.messages[0].recalled.sources == ("t1",)
    assert trajectory.messages[0].recalled.before(trajectory.messages[0].user) == "OLD a\n\ntask 0"


def test_latents_are_given_to_the_model_and_their_text_is_not():
    latents = torch.ones(2, 3)
    record = Recalled(kind="latent", text="composer's text", num_latents=2)
    model = scripted()
    play(memory=Remembering(lambda task, role: Recall(record, latents)), model=model, num_tasks=1)
    assert all(prompt.latents is latents and "composer" not in prompt.user for prompt in model.calls[0])


# Teams that decide as they go


class Debate:
    """Asks `a` again and again until it says stop, then lets nobody speak, then answers."""

    name = "debate"
    roles = (A,)

    def turn(self, task, instructions, history):
        said = []
        while "stop" not in said:
            said += yield [Call(A, "s", " ".join([task, *said]), tuple(range(len(said))))]
            if len(said) == 2:
                assert (yield []) == []
        return said[-2] if len(said) > 1 else "nothing"


def test_a_dynamic_team_may_repeat_a_role_and_stop_early():
    model = Counting({"a": ["yes", "stop", "yes", "yes", "stop"]})
    short, long = (play(Debate(), model=model, num_tasks=1).trajectories[0] for _ in range(2))
    assert [m.response for m in short.messages] == ["yes", "stop"]
    assert [m.response for m in long.messages] == ["yes", "yes", "stop"]
    assert long.messages[2].user == "task 0 yes yes"
    assert long.messages[2].reads == (0, 1)
    assert short.success
    assert long.success


def test_episodes_of_a_dynamic_team_end_at_different_depths_side_by_side():
    class Until(ScriptedModel):
        def respond(self, prompts, sampling):
            self.responses = {"a": ["stop" if p.user.count("go") == int(p.user[5]) else "go" for p in prompts]}
            self._used = {"a": 0}
            return super().respond(prompts, sampling)

    done = play(Debate(), model=Until({"a": ["go"]}), num_tasks=4).trajectories
    assert [len(t.messages) for t in done] == [1, 2, 3, 4]


def test_what_a_team_records_of_a_turn_is_kept_beside_what_the_environment_says():
    class Noting(Debate):
        def turn(self, task, instructions, history):
            said = yield [Call(A, "s", "u")]
            return Action(said[0], {"votes": 3} if said[0] == "yes" else {})

    model = Counting({"a": ["no", "yes"]})
    (trajectory,) = play(Noting(), model=model, num_tasks=1, start=lambda t: Toy(num_turns=2), max_turns=2).trajectories
    assert [s.info for s in trajectory.steps] == [{"extracted": "no"}, {"extracted": "yes", "team": {"votes": 3}}]
    assert trajectory.success


def test_a_role_that_the_team_does_not_name_is_one_clear_line():
    class Sloppy(Debate):
        def turn(self, task, instructions, history):
            yield [Call(Role(name="aa", profile=""), "s", "u")]
            return "x"

    with pytest.raises(ConfigError) as error:
        play(Sloppy())
    assert str(error.value) == "team debate: 'aa' speaks but is not among its roles; did you mean 'a'?"


# Costs, and a real model


class Composing(NoMemory):
    def recall_many(self, queries):
        time.sleep(0.01)
        return Recalls(super().recall_many(queries), Spent(composing_seconds=0.0078125))


def test_the_parts_of_the_time_are_counted_once_each():
    began = time.perf_counter()
    seconds = play(memory=Composing()).seconds
    total = time.perf_counter() - began
    assert seconds.composing == 0.0078125
    parts = (seconds.recall, seconds.composing, seconds.generation, seconds.environment)
    assert all(part > 0 for part in parts)
    assert sum(parts) <= total


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    return LanguageModel.from_pretrained(str(tiny_model_dir), "cpu", "float32", max_batch_size=5)


def test_a_task_longer_than_the_window_is_named(tiny):
    long = [Task(id="7", domain="toy", text="word " * 3000), Task(id=None, domain="toy", text="deep\n" * 3000)]
    for task, name in ((long[0], "task toy:7, assistant"), (long[1], f"task '{('deep ' * 12)[:60]}...', assistant")):
        with pytest.raises(ModelError) as error:
            rollout(load_team("autogen"), NoMemory(), tiny, [task], lambda task: Toy(), sampling=SAMPLING)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
        assert "2048" in str(error.value)


def test_rollouts_of_a_real_model_do_not_depend_on_the_company(tiny):
    def said(some, group_size):
        sampling = Sampling(temperature=1.0, max_response_tokens=6)
        done = rollout(PAIR, NoMemory(), tiny, some, lambda task: Toy(), sampling=sampling, group_size=group_size)
        return {(t.task.id, t.seed): [m.token_ids for m in t.messages] for t in done.trajectories}

    everything, alone = said(tasks(3), 3), said(tasks(3)[2:], 1)
    assert len({str(ids) for ids in everything.values()}) == 9
    assert alone.items() <= everything.items()


# Several teams


def test_of_several_teams_each_task_is_played_by_one_and_only_its_roles_are_asked_to_remember():
    solo = FixedTeam("solo", [Agent(C, "Alone.", "{task}", ())], "c")
    teams, memory = Teams((PAIR, solo), seed=3), Remembering()
    played = rollout(teams, memory, scripted(), tasks(12), lambda task: Toy(), sampling=SAMPLING, group_size=2).groups
    by_team = {group[0].task.key: {trajectory.team for trajectory in group} for group in played}
    assert set(map(len, by_team.values())) == {1}
    assert set.union(*by_team.values()) == {"pair", "solo"}
    assert {key: {teams.of(task).name} for key, task in ((task.key, task) for task in tasks(12))} == by_team
    roles = {"pair": ["a", "b", "c"], "solo": ["c"]}
    assert memory.asked == [(key, role) for key, names in by_team.items() for role in roles[next(iter(names))]]
    said = {trajectory.team: [m.system for m in trajectory.messages] for group in played for trajectory in group}
    assert said == {"pair": ["First.", "Also first.", "Last. Say yes."], "solo": ["Alone."]}


def test_which_team_plays_a_task_depends_on_the_seed_and_the_task_alone():
    teams = [PAIR, FixedTeam("solo", [Agent(C, "Alone.", "{task}", ())], "c")]
    dealt = [[Teams(tuple(teams), seed).of(task).name for task in tasks(200)] for seed in (0, 1)]
    assert dealt[0] != dealt[1]
    assert all(70 < names.count("solo") < 130 for names in dealt)
    assert dealt[0][5:9] == [Teams(tuple(teams), 0).of(task).name for task in tasks(200)[5:9]]
