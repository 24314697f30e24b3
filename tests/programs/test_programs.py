"""Programs played as teams over HTTP: the same as our own loop, side by side, and each harming only itself."""

import json
import re
import sys
import threading
from pathlib import Path

import pytest
from keepers import keepers
from sample_programs import BEHAVIOURS

from latentmem.config import Sampling
from latentmem.environments.environment import Outcome
from latentmem.errors import ConfigError, EngineError
from latentmem.memory.memory import NoMemory, Recall, Recalls
from latentmem.models.language_model import LanguageModel
from latentmem.rollout import rollout
from latentmem.teams.team import load_team
from latentmem.trajectory import Recalled, Task

GREEDY = Sampling(temperature=0, max_response_tokens=5)
SAMPLING = Sampling(temperature=0.8, max_response_tokens=5)


class Toy:
    instructions = "Give the final answer only."

    def step(self, action):
        return Outcome("", 0.5, True, {"extracted": action})


class Told:
    """A memory whose text names the task and the role."""

    kind = "text"

    def __init__(self):
        self.asked = []

    def recall_many(self, queries):
        self.asked += [(task.id, role.name, role.profile) for task, role in queries]
        return Recalls([Recall(Recalled(kind="text", text=f"{t.id} {r.name}")) for t, r in queries])

    def add(self, trajectory):
        raise NotImplementedError


def tasks(*texts):
    return [Task(id=str(i), domain="toy", text=text) for i, text in enumerate(texts or ("What is 1 + 7?", "Two?"))]


def play(team, model, chosen=None, memory=None, sampling=GREEDY, **options):
    return rollout(
        team, memory or NoMemory(), model, chosen or tasks(), lambda task: Toy(), sampling=sampling, **options
    )


def said(trajectory):
    """What counts of a trajectory, without the ids of requests."""
    return [
        (m.role, m.system, m.user, m.response, m.token_ids, m.finish, m.recalled, m.reads) for m in trajectory.messages
    ]


@pytest.mark.parametrize("memory", [NoMemory, Told])
@pytest.mark.parametrize("name", ["autogen", "pair"])
def test_a_program_that_does_what_a_team_does_has_the_same_trajectories(program, model, name, memory):
    fixed = load_team(name)
    roles = [{"name": role.name, "profile": role.profile} for role in fixed.roles]
    own = play(program(f"plays_{name}", roles=roles), model, memory=memory(), group_size=2)
    ours = play(fixed, model, memory=memory(), group_size=2)
    assert [said(t) for t in own.trajectories] == [said(t) for t in ours.trajectories]
    assert [t.steps[0].action for t in own.trajectories] == [t.steps[0].action for t in ours.trajectories]
    for theirs, our in zip(own.trajectories, ours.trajectories, strict=True):
        for one, other in zip(theirs.messages, our.messages, strict=True):
            assert one.logps == pytest.approx(other.logps, abs=1e-4)
            assert one.served.prompt_ids == tuple(model.encode_prompt(other.system, other.recalled.before(other.user)))
    assert own.recalls.keys() == ours.recalls.keys()


def test_responses_depend_neither_on_what_runs_beside_nor_on_the_order_of_requests(program, model):
    runs = [
        play(program("all_at_once", parallel=parallel), model, sampling=SAMPLING, group_size=3, seed=4).trajectories
        for parallel in (1, 6)
    ]
    alone, together = ([sorted((m.served.lineage, m.token_ids) for m in t.messages) for t in run] for run in runs)
    assert alone == together
    assert len({tuple(one) for one in alone}) == 6
    for trajectory in runs[1]:
        lineages = [message.served.lineage for message in trajectory.messages]
        assert len(lineages) == 13  # four conversations of three requests, and one that reads them
        assert sorted(map(lineages.count, set(lineages))) == [1, 3, 3, 3, 3]


def test_roles_are_found_while_playing_and_the_memory_is_asked_once_for_task_and_role(program, model):
    memory = Told()
    played = play(program("planner_and_solver"), model, memory=memory, group_size=4)
    assert sorted(memory.asked) == sorted(set(memory.asked))
    assert {(task, profile) for task, _, profile in memory.asked} == {
        (task, profile) for task in "01" for profile in ("You plan.", "You solve.")
    }
    for trajectory in played.trajectories:
        plan, solution = trajectory.messages
        assert solution.reads == (0,)
        assert plan.recalled.text == f"{trajectory.task.id} {plan.role}"
        assert played.recalls[trajectory.task.key, plan.role].record == plan.recalled


def test_listed_roles_are_recognised_by_a_pattern(program, model):
    roles = [
        {"name": "planner", "profile": "plans", "pattern": "(?i)plan"},
        {"name": "solver", "profile": "You solve."},
    ]
    (done, _) = play(program("planner_and_solver", roles=roles), model).trajectories
    assert [message.role for message in done.messages] == ["planner", "solver"]


def test_answers_tell_a_misspelt_role_and_the_tokens_that_were_kept(program, model, caplog):
    roles = [{"name": "plannner", "profile": "plans"}]
    (done,) = play(program("tells_what_it_is_told", roles=roles), model, tasks("What is 1 + 7?")).trajectories
    line = "role 'planner' is not in the configuration and is taken for a new one; did you mean 'plannner'?"
    assert [message.role for message in done.messages] == ["planner", "planner"]
    first, second = json.loads(done.steps[0].action)
    assert (first["known"], first["warnings"]) == (False, [line])
    assert [text for text in caplog.messages if "planner" in text] == [line]
    num = done.messages[0].num_prompt_tokens
    assert (first["usage"]["prompt_tokens"], second["usage"]["prompt_tokens"]) == (num, num)
    cached = [told["usage"]["prompt_tokens_details"]["cached_tokens"] for told in (first, second)]
    assert cached == [0, num - 1]


def test_the_official_client_is_enough_and_its_sampling_is_the_run_s(program, model):
    first, second = play(program("uses_openai"), model, group_size=2).groups[0]
    assert [m.token_ids for m in first.messages] == [m.token_ids for m in second.messages]  # greedy, whatever it asks
    assert [(len(m.token_ids), m.temperature) for m in first.messages] == [(3, 0.0)] * 2  # its limit counts
    (streamed, _) = play(program("streams"), model).trajectories
    assert streamed.steps[0].action == streamed.messages[0].response


def test_requests_that_are_sent_again_are_one_message(program, model):
    (done, _) = play(program("retries"), model).trajectories
    assert done.error is None
    assert len(done.messages) == 2


def test_rewards_of_agents_are_kept_and_the_team_s_is_the_domain_s(program, model):
    roles = [{"name": "planner", "profile": "You plan."}, {"name": "solver", "profile": "You solve."}]
    (done, _) = play(program("rewards_agents", roles=roles), model).trajectories
    assert done.error is None
    assert done.reward == 0.5
    assert done.rewards == {"planner": float(len(done.steps[0].action) % 2), "solver": 0.5}
    assert done.steps[0].info["team"] == {"told_reward": 0.25}


@pytest.mark.slow
def test_two_hundred_episodes_are_played_side_by_side(program, model):
    together = threading.Barrier(200, timeout=300)

    lock, own = threading.Lock(), model.respond

    class Locked:
        """Answers when two hundred ask."""

        name, concurrent = "together", True

        def respond(self, prompts, sampling):
            together.wait()
            with lock:
                return own(prompts, sampling)

    command = [sys.executable, "-S", str(Path(__file__).parent / "asks_once.py")]
    team = program(command=command, parallel=200, timeout_seconds=300)
    done = play(team, Locked(), [Task(id=str(i), domain="toy", text=f"task {i}") for i in range(200)]).trajectories
    assert [t.error for t in done] == [None] * 200
    assert [m.user for t in done for m in t.messages] == [f"task {i}" for i in range(200)]


@pytest.mark.parametrize("behaviour", sorted(set(BEHAVIOURS) - {"tells_its_address", "hears_of_it"}))
def test_a_program_that_misbehaves_harms_only_its_own_episode(program, model, behaviour, tmp_path, monkeypatch):
    for name in ("LEFT_BEHIND", "TOLD", "ADDRESS", "DONE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    other = "tells_its_address" if behaviour == "uses_anothers_address" else "well"
    team = program("misbehaves", parallel=4, timeout_seconds=20 if behaviour != "hangs" else 6)
    done = play(team, model, tasks("well 0", f"{behaviour} 1", f"{other} 2", "well 3")).trajectories
    errors = [t.error for t in done]
    wrong = errors.pop(1)
    assert errors == [None] * 3
    assert [t.reward for t in done] == [0.5, 0.5 if wrong is None else 0.0, 0.5, 0.5]
    assert [m.user for t in done for m in t.messages[:1]] == ["well 0", f"{behaviour} 1", f"{other} 2", "well 3"]
    causes = {
        "raises": "program: ValueError: the program broke in two lines",
        "crashes": "program: exit status 137",
        "hangs": "program: not over after 6 seconds",
        "returns_nothing": "program: TypeError: the function returned NoneType; expected the answer as text",
        "forks": "program: exit status 137",
        "calls_late": None,
        "uses_anothers_address": "program: HTTPError: HTTP Error 403: Forbidden",
    }
    if behaviour == "goes_away":
        # A client that is gone before its request was admitted has asked nothing.
        assert wrong is None or wrong.startswith("program: 1 of 2 calls got no answer: ")
    else:
        assert wrong == causes[behaviour]
    if behaviour == "forks":
        for pid in (tmp_path / "LEFT_BEHIND").read_text().split():
            assert not _is_running(int(pid))
    if behaviour == "uses_anothers_address":
        assert len(done[2].messages) == 1  # nothing of the other's came into it


def test_a_call_after_the_end_of_its_episode_is_refused_and_told_why(program, model, tmp_path, monkeypatch):
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    team = program("misbehaves", parallel=1)
    first, second = play(team, model, tasks("calls_late 0", "hears_of_it 1")).trajectories
    assert (first.error, second.error) == (None, None)
    assert (tmp_path / "told").read_text() == "409 session_ended\n"


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("code", "action"),
    [
        ("print('one'); print('two'); print()", "two"),
        ("import json; print(json.dumps({'answer': 'a\\nb'}))", "a\nb"),
        ("print('{not json')", "{not json"),
        ("print('x' * 3_000_000); print('end')", "end"),
    ],
)
def test_the_last_thing_that_a_command_prints_is_the_action(program, model, code, action):
    (done,) = play(program(command=["python", "-c", code]), model, tasks("t")).trajectories
    assert done.error is None
    assert done.steps[0].action == action


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("pass", "program: it printed no answer; expected one in the last line of its standard output"),
        ("import sys; print('x'); sys.exit('no plan')", "program: exit status 1: no plan"),
        ("import os; os.kill(os.getpid(), 11)", "program: exit status 139"),
    ],
)
def test_a_command_that_fails_has_its_cause_told(program, model, code, error):
    (done,) = play(program(command=["python", "-c", code]), model, tasks("t")).trajectories
    assert (done.error, done.reward, done.success) == (error, 0.0, False)


def test_a_program_sees_the_task_and_never_what_it_is_judged_by(program, model):
    task = Task(id="7", domain="toy", text="What?", data={"secret": "the answer"})
    code = "import os; print({k: v for k, v in os.environ.items() if 'LATENTMEM' in k or 'OPENAI' in k})"
    (done,) = play(program(command=["python", "-c", code]), model, [task]).trajectories
    assert '{"id": "7", "text": "What?", "instructions": "Give the final answer only."}' in done.steps[0].action
    assert "the answer" not in done.steps[0].action


def test_a_program_that_asks_nobody_is_told_of(program, model, caplog):
    team = program("makes_no_call", name="silent")
    assert [t.error for t in play(team, model).trajectories] == [None, None]
    assert [r.message for r in caplog.records] == [
        "program silent: no call of it reached an agent; is its base_url taken from OPENAI_BASE_URL?"
    ]


def test_a_program_whose_failure_is_known_is_not_asked_for_its_base_url(program, model, caplog):
    team = program(command=["python", "-c", "raise SystemExit('Connection refused')"], name="fixed")
    assert [t.error for t in play(team, model, tasks("t")).trajectories] == [
        "program: exit status 1: Connection refused"
    ]
    assert [r.message for r in caplog.records] == [
        "program fixed: 1 of 1 episodes failed, most often so: program: exit status 1: Connection refused"
    ]


def test_a_misspelt_reward_is_refused_with_the_name_that_was_meant(program, model):
    (done,) = play(program("tells_rewards"), model, tasks("t")).trajectories
    assert done.steps[0].action == ("400 event_type: 'rewards' would reward nobody; did you mean 'reward'?")


def test_a_base_url_without_v1_is_told_the_right_one(program, model):
    (done,) = play(program("has_no_v1"), model, tasks("t")).trajectories
    said = done.steps[0].action
    sid, address = re.search(r"/sessions/([^/]+)/", said)[1], re.search(r"http://127.0.0.1:\d+", said)[0]
    assert said == (
        f"404 there is no route POST /sessions/{sid}/chat/completions; OpenAI's API is at /v1 "
        f"(base_url {address}/v1); did you mean POST /sessions/{sid}/v1/chat/completions?"
    )


def test_a_program_that_fails_after_it_has_asked_is_not_asked_for_its_base_url(program, model, caplog):
    play(program("fails_after_a_call"), model, tasks("t"))
    assert "most often so" in caplog.text
    assert "base_url" not in caplog.text


@pytest.mark.parametrize("is_there", [True, False])
def test_an_interpreter_that_cannot_run_is_told_before_any_episode(program, tmp_path, is_there):
    path = tmp_path / "python"
    if is_there:
        path.write_text("not executable")
    with pytest.raises(ConfigError) as caught:
        program("makes_no_call", python=str(path))
    assert str(caught.value) == (
        f"team.python: {path}: no such program, or it may not be executed; give the path of a Python interpreter"
    )


def test_a_program_that_is_not_there_is_a_mistake_of_the_configuration(program, model):
    with pytest.raises(ConfigError, match=r"team\.command: 'nosuchprogram' is no program that can be found"):
        program(command=["nosuchprogram"])
    with pytest.raises(ConfigError, match=r"team\.call: sample_programs:slove: AttributeError"):
        play(program("slove"), model)


def test_a_missing_module_is_told_with_the_folder_that_was_searched_or_the_interpreter(
    program, model, tmp_path, monkeypatch
):
    def refused():
        with pytest.raises(ConfigError) as caught:
            play(program(call="mine_own:solve", python=sys.executable), model)
        return str(caught.value)

    monkeypatch.chdir(tmp_path)
    assert refused() == (
        "team.call: mine_own:solve: ModuleNotFoundError: No module named 'mine_own'; looked for in "
        f"{tmp_path} and among the packages of {sys.executable}"
    )
    (tmp_path / "mine_own.py").write_text("import nosuchframework\n")
    assert refused() == (
        "team.call: mine_own:solve: ModuleNotFoundError: No module named 'nosuchframework'; the interpreter is "
        f"{sys.executable}; install it there, or name another in team.python"
    )


def test_an_error_of_the_model_ends_the_rollout_and_all_programs(program):
    class Broken:
        name, concurrent = "broken", True

        def respond(self, prompts, sampling):
            if "hangs" not in prompts[0].user:
                raise EngineError("the server is gone")
            return LanguageModel.respond(model_, prompts, sampling)

    team = program("misbehaves", parallel=4, timeout_seconds=200)
    model_ = team_model(team)
    with pytest.raises(EngineError, match="the server is gone"):
        play(team, Broken(), tasks("hangs 0", "well 1", "hangs 2", "well 3"))
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def team_model(team):
    return team._host.desk._writing()._model


def test_a_prompt_that_is_too_long_is_refused_and_the_program_may_go_on(program, model):
    code = (
        "import sys; sys.path.insert(0, os.environ['PYTHONPATH'].split(os.pathsep)[0]); import json, urllib.error\n"
        "from sample_programs import say\n"
        "try: say('s', 'word ' * 3000)\n"
        "except urllib.error.HTTPError as error: print(error.code, json.load(error)['error']['code'])\n"
    )
    (done,) = play(program(command=["python", "-c", f"import os\n{code}"]), model, tasks("t")).trajectories
    assert done.error is None
    assert done.steps[0].action == "400 context_length_exceeded"
    assert done.messages == ()


def test_nothing_is_left_when_a_team_is_closed(program, model):
    before, kept = {t.name for t in threading.enumerate()}, keepers()
    team = program("plays_solo")
    play(team, model)
    team.close()
    left = [t.name for t in threading.enumerate() if t.name not in before]
    assert left == []
    assert keepers() <= kept
