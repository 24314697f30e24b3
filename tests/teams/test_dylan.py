"""DyLAN's rounds: who is asked in which order, who is dropped, when it ends, and scores worked out by hand."""

import re

import pytest
import yaml

from latentmem.config import Sampling
from latentmem.environments.environment import Outcome
from latentmem.errors import ConfigError
from latentmem.memory.memory import NoMemory
from latentmem.models.agent import ScriptedModel
from latentmem.rollout import rollout
from latentmem.teams.dylan import DylanFile, DylanTeam, importance, read_answer
from latentmem.teams.team import load_team
from latentmem.trajectory import Task

FILE = {
    "kind": "dylan",
    "name": "panel",
    "rounds": 3,
    "consensus": {"share": "2/3"},
    "ratings": {"mark": "Ratings:", "highest": 5},
    "agents": [
        {"role": name, "profile": f"is {name}", "system": f"You are {name}. {{instructions}}"} for name in "abcd"
    ],
    "first": "{task}\n\n{history}",
    "later": "{task}\n\n{history}\n\n{messages}\n\nRate all {count} after {mark}",
    "message": "No. {number}:\n{response}\n",
    "ranker": {
        "role": "ranker",
        "profile": "ranks",
        "system": "Rank.",
        "user": "{task}\n\n{messages}\n\n{stay} of {count} after {mark}",
        "mark": "Best:",
        "stay": {3: 2},
    },
}


def panel(read=None, **changes):
    values = {key: value for key, value in (FILE | changes).items() if value is not None}
    return DylanTeam(DylanFile.model_validate(values), read)


def agents(names):
    return [agent for agent in FILE["agents"] if agent["role"] in names]


def play(responses, team=None, num_turns=1):
    """The trajectory of one episode, and the roles of each call of the model, in order."""
    calls = []

    class Watched(ScriptedModel):
        def respond(self, prompts, sampling):
            calls.append([prompt.role for prompt in prompts])
            return super().respond(prompts, sampling)

    class World:
        instructions = "Say a number."

        def __init__(self, task):
            self.actions = []

        def step(self, action):
            self.actions.append(action)
            return Outcome("noted", float(action == "7"), len(self.actions) == num_turns, {"extracted": action})

    sampling = Sampling(max_response_tokens=10_000)
    (trajectory,) = rollout(
        team or panel(), NoMemory(), Watched(responses), [Task(id="1", domain="toy", text="3 + 4")], World,
        sampling=sampling, max_turns=num_turns,
    ).trajectories  # fmt: skip
    return trajectory, calls


def record(trajectory):
    return trajectory.steps[-1].info["team"]


# The dynamics


def test_the_whole_way_without_agreement_is_two_rounds_a_ranking_and_a_round_of_those_who_stay():
    trajectory, calls = play(
        {
            "a": ["1", "1\nRatings: 1, 1, 1, 1"],
            "b": ["2", "2\nRatings: 0, 0, 5, 0", "7\nRatings: 1, 0, 3, 0"],
            "c": ["3", "3 Ratings: 5, 5, 0, 0"],
            "d": ["4", "4", "8\nRatings: 0, 0, 0, 9"],
            "ranker": ["Best: 4, 2"],
        }
    )
    assert calls == [list("abcd"), list("abcd"), ["ranker"], ["b", "d"]]  # the rollout sorts the rows of a batch
    said = trajectory.messages
    assert [m.role for m in said] == [*"abcd", *"abcd", "ranker", "d", "b"]
    assert [m.reads for m in said] == [()] * 4 + [(0, 1, 2, 3)] * 4 + [(4, 5, 6, 7)] * 3
    assert said[0].user == "3 + 4"
    assert said[0].system == "You are a. Say a number."
    quoted = "No. 1:\n{}\n\nNo. 2:\n{}\n\nNo. 3:\n{}\n\nNo. 4:\n{}"
    assert {m.user for m in said[4:8]} == {f"3 + 4\n\n{quoted.format(*'1234')}\n\nRate all 4 after Ratings:"}
    assert said[8].user == f"3 + 4\n\n{quoted.format(*'1234')}\n\n2 of 4 after Best:"  # ratings are not passed on
    assert {m.user for m in said[9:]} == {f"3 + 4\n\n{quoted.format(*'1234')}\n\nRate all 4 after Ratings:"}
    # The ranker put d before b, and between answers given equally often the earlier one of the round decides.
    assert trajectory.steps[0].action == "8"
    found = record(trajectory)
    # By hand. Round 3: I = d 1. Round 2: d rated 0 0 0 9 (counted as 5), so I = d 1. Round 1: what d gave in round 2
    # could not be read, so a quarter each. Mean over three rounds: d (1 + 1 + 1/4) / 3, the others 1/12.
    assert found.pop("importance") == pytest.approx({"a": 1 / 12, "b": 1 / 12, "c": 1 / 12, "d": 0.75})
    assert found == {
        "rounds": 3, "consensus": False, "agreement": 0.5, "dropped": ["a", "c"], "rankings": 1,
        "rankings_incomplete": 0, "ratings": 6, "ratings_unread": 1,
    }  # fmt: skip


def test_it_stops_after_the_first_round_in_which_more_than_two_thirds_agree():
    trajectory, calls = play({"a": ["7"], "b": ["It is 7."], "c": ["9"], "d": ["<answer>7</answer>"]})
    assert calls == [list("abcd")]
    assert trajectory.steps[0].action == "7"
    assert trajectory.success
    assert record(trajectory)["importance"] == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 0, "d": 1 / 3})
    assert (record(trajectory)["consensus"], record(trajectory)["agreement"]) == (True, 0.75)


def test_two_thirds_exactly_are_not_enough():
    team = panel(agents=agents("abc"), ranker=None)
    trajectory, calls = play({"a": ["7"], "b": ["7"], "c": ["9", "7"]}, team)
    assert calls == [list("abc")] * 2
    assert record(trajectory)["rounds"] == 2
    assert record(trajectory)["consensus"]


@pytest.mark.parametrize(("share", "rounds"), [(0.5, 1), ("2/3", 1), (0.75, 3), (1, 3)])
def test_the_share_is_data(share, rounds):
    trajectory, _ = play(
        {"a": ["7"], "b": ["7"], "c": ["7"], "d": ["9"], "ranker": ["Best: 1, 4"]}, panel(consensus={"share": share})
    )
    assert record(trajectory)["rounds"] == rounds


def test_agreement_on_a_wrong_answer_ends_the_episode_too():
    trajectory, calls = play({name: ["5"] for name in "abcd"})
    assert len(calls) == 1
    assert trajectory.reward == 0
    assert record(trajectory)["importance"] == dict.fromkeys("abcd", 0.25)


def test_without_agreement_the_most_frequent_answer_of_the_last_round_is_the_action():
    team = panel(ranker=None)
    trajectory, calls = play({"a": ["1", "9"], "b": ["2", "7"], "c": ["3", "8"], "d": ["4", "7"]}, team)
    assert len(calls) == 3
    # Used in turn, the responses of round 3 are those of round 1 again: no two alike, so the first agent's.
    assert trajectory.steps[0].action == "1"
    trajectory, _ = play(
        {"a": ["1", "9"], "b": ["2", "7"], "c": ["3", "8"], "d": ["4", "7"]}, panel(ranker=None, rounds=2)
    )
    assert trajectory.steps[0].action == "7"
    assert record(trajectory)["agreement"] == 0.5


def test_a_single_agent_that_is_left_agrees_with_itself():
    team = panel(ranker=FILE["ranker"] | {"stay": {2: 1}})
    trajectory, calls = play({"a": ["1"], "b": ["2"], "c": ["3", "7"], "d": ["4"], "ranker": ["Best: 3"]}, team)
    assert calls == [list("abcd"), ["ranker"], ["c"]]
    assert (trajectory.steps[0].action, record(trajectory)["consensus"]) == ("7", True)
    assert record(trajectory)["importance"] == pytest.approx({"a": 1 / 8, "b": 1 / 8, "c": 5 / 8, "d": 1 / 8})


def test_a_team_of_one_answers_once():
    trajectory, calls = play({"a": ["7"]}, panel(agents=agents("a"), ranker=None))
    assert calls == [["a"]]
    assert record(trajectory)["importance"] == {"a": 1.0}


def test_a_ranker_can_act_before_several_rounds():
    team = panel(rounds=4, ranker=FILE["ranker"] | {"stay": {2: 3, 4: 2}})
    said = {name: [str(i), str(i + 10), str(i + 20)] for i, name in enumerate("abcd")}
    trajectory, calls = play(said | {"ranker": ["Best: 2, 3, 4", "Best: 3, 1"]}, team)
    assert [sorted(call) for call in calls] == [
        list("abcd"),
        ["ranker"],
        list("bcd"),
        list("bcd"),
        ["ranker"],
        ["b", "d"],
    ]
    assert [m.role for m in trajectory.messages[-2:]] == ["d", "b"]
    assert trajectory.messages[-1].reads == (8, 9, 10)
    assert record(trajectory)["dropped"] == ["a", "c"]


@pytest.mark.parametrize(
    ("ranking", "stay", "incomplete"),
    [
        ("Best: 4, 2", "db", 0),
        ("best: [[4,2]]", "db", 0),
        ("I have looked at 1 and 3.\n**Best:** 2, 1", "ba", 0),
        ("Best:\n4 and 2.", "db", 0),
        ("4, 2", "db", 0),
        ("[4, 2].", "db", 0),
        ("Best: 2, 2, 2", "bc", 1),  # c's answer is shared by d, and is first
        ("Best: 9, 0, 4", "dc", 1),
        ("Best: 1, 2, 3", "ab", 0),
        ("Best: 1\nNo, wait. Best: 4, 1", "da", 0),
        ("1 + 4 = 7", "cd", 1),
        ("Best: none of them", "cd", 1),
        ("Best: " + "9" * 6000, "cd", 1),
        ("", "cd", 1),
    ],
)  # fmt: skip
def test_what_the_ranker_says_decides_and_where_it_says_too_little_the_most_shared_answers_stay(
    ranking, stay, incomplete
):
    said = {"a": ["1"], "b": ["2"], "c": ["5"], "d": ["5"]}
    trajectory, _ = play(said | {"ranker": [ranking]})
    assert "".join(m.role for m in trajectory.messages[9:]) == stay
    assert record(trajectory)["rankings_incomplete"] == incomplete


def test_every_turn_of_an_episode_is_played_anew_and_knows_the_turns_before():
    trajectory, calls = play({"a": ["5", "7"], "b": ["5", "7"], "c": ["5", "7"], "d": ["1", "9"]}, num_turns=2)
    assert calls == [list("abcd")] * 2
    assert [step.action for step in trajectory.steps] == ["5", "7"]
    assert trajectory.steps[1].messages[0].user == "3 + 4\n\nTurn 1\nWe answered: 5\nReply: noted"
    assert [step.info["team"]["rounds"] for step in trajectory.steps] == [1, 1]
    assert trajectory.steps[0].info["extracted"] == "5"


def test_episodes_of_different_length_are_one_batch_as_long_as_they_last():
    calls = []

    class ByTask(ScriptedModel):
        def respond(self, prompts, sampling):
            calls.append(len(prompts))
            sampled = []
            for prompt in prompts:
                agree = prompt.user.startswith("easy")
                self.responses[prompt.role] = ["7" if agree else prompt.role]
                self._used[prompt.role] = 0
                sampled += super().respond([prompt], sampling)
            return sampled

    class World:
        instructions = ""

        def step(self, action):
            return Outcome("", 0.0, True)

    tasks = [Task(id=str(i), domain="toy", text=text) for i, text in enumerate(["easy", "hard", "easy"])]
    model = ByTask({role: [""] for role in (*"abcd", "ranker")})
    done = rollout(panel(), NoMemory(), model, tasks, lambda task: World(), sampling=Sampling()).trajectories
    assert calls == [12, 4, 1, 2]
    assert [len(t.messages) for t in done] == [4, 11, 4]


# Importance scores


def test_importance_flows_back_through_the_ratings():
    # Three agents, three rounds, worked out on paper. Round 3: a and b gave the answer, 1/2 each.
    # Round 2: I[a] = 1/2 * 0.5 + 1/2 * 0.2 = 0.35, I[b] = 0.25 + 0.3 = 0.55, I[c] = 0 + 0.1 = 0.1.
    # Round 1: I[a] = 0.35 * 0.6 + 0.55 * 0 + 0.1 * 1 = 0.31, I[b] = 0.35 * 0.4 + 0.55 * 0.2 = 0.25, I[c] = 0.55 * 0.8.
    weights = [
        {"a": {"a": 0.6, "b": 0.4, "c": 0.0}, "b": {"a": 0.0, "b": 0.2, "c": 0.8}, "c": {"a": 1.0, "b": 0.0, "c": 0.0}},
        {"a": {"a": 0.5, "b": 0.5, "c": 0.0}, "b": {"a": 0.2, "b": 0.6, "c": 0.2}},
    ]
    expected = {"a": (0.5 + 0.35 + 0.31) / 3, "b": (0.5 + 0.55 + 0.25) / 3, "c": (0 + 0.1 + 0.44) / 3}
    found = importance(weights, {"a": 0.5, "b": 0.5})
    assert found == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(1)


def test_ratings_are_clipped_normalised_and_uniform_where_they_cannot_be_used():
    said = {"a": ["1", "7\nRatings: 5, 3, 2"], "b": ["2", "7\nRatings: 9, 0, 0"], "c": ["3", "7\nRatings: 1, 2"]}
    trajectory, _ = play(said, panel(agents=agents("abc"), ranker=None))
    # Round 2: all agree, 1/3 each. Round 1: a gets (0.5 + 1 + 1/3) / 3, b (0.3 + 0 + 1/3) / 3, c (0.2 + 0 + 1/3) / 3.
    expected = {"a": (1 / 3 + 5.5 / 9) / 2, "b": (1 / 3 + 1.9 / 9) / 2, "c": (1 / 3 + 1.6 / 9) / 2}
    assert record(trajectory)["importance"] == pytest.approx(expected)
    assert (record(trajectory)["ratings"], record(trajectory)["ratings_unread"]) == (3, 1)
    said["a"][1] = "7\nRatings: 50, 3, 2"  # counts as 5
    assert record(play(said, panel(agents=agents("abc"), ranker=None))[0])["importance"] == pytest.approx(expected)


@pytest.mark.parametrize("rated", ["{} Ratings: 5, 5", "{}\nRatings:\n5, 5", "{}\nratings: [[5,5]]"])
def test_ratings_are_taken_off_after_the_last_mark(rated):
    said = "Ratings: I have none yet. The answer is 7."
    team = panel(agents=agents("ab"), ranker=None)
    trajectory, _ = play({"a": ["1", rated.format(said)], "b": ["2", "7"]}, team)
    assert trajectory.steps[0].action == said
    assert (record(trajectory)["rounds"], record(trajectory)["ratings_unread"]) == (2, 1)


def test_what_follows_the_line_of_the_ratings_stays():
    team = panel(agents=agents("ab"), ranker=None)
    trajectory, _ = play({"a": ["1", "Ratings: 5, 5\nThe answer is 7."], "b": ["2", "7"]}, team)
    assert trajectory.steps[0].action == "The answer is 7."


# Answers that agree


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("7", "The answer is 7."),
        ("3 + 4 = 7", "<answer> 7.0 </answer>"),
        ("<answer>3 + 4 = 7</answer>", "7"),
        ("```\n3 + 4 = 7", "7"),
        ("The sum of 3 and 4 is 7.", r"so \boxed{7}"),
        ("$1,200", "Answer: 1200"),
        ("Paris", "The capital of France is **Paris**."),
        ("<answer>the  Seine</answer>", "Answer: The Seine"),
        ("```python\ndef f(x):\n  return x+1  # more\n```", "Here:\n```\ndef f(x):\n\n    return (x + 1)\n```\nDone."),
    ],
)  # fmt: skip
def test_equal_answers_in_different_words_agree(one, other):
    assert read_answer(one) == read_answer(other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("7", "-7"),
        ("1.5", "15"),
        ("1, 2, 3", "2, 1, 3"),
        ("Apollo 11", "11"),
        ("<answer>Paris</answer>", "<answer>Lyon</answer>"),
        ("```python\ndef f(x):\n    return x + 1\n```", "```python\ndef f(y):\n    return y + 1\n```"),
        ("```python\ndef f(x:\n```", "```python\ndef f(y:\n```"),
    ],
)
def test_different_answers_do_not_agree(one, other):
    assert None is not read_answer(one) != read_answer(other)


@pytest.mark.parametrize("nothing", ["", " \n ", "<answer></answer>", "."])
def test_where_nothing_can_be_read_nobody_agrees(nothing):
    assert read_answer(nothing) is None
    trajectory, calls = play({name: [nothing] for name in "abcd"} | {"ranker": [nothing]})
    assert len(calls) == 4
    assert record(trajectory)["agreement"] == 0.5  # of two, one is the action
    assert sum(record(trajectory)["importance"].values()) == pytest.approx(1)


def test_the_rule_can_be_named_in_the_file_or_given_as_a_function():
    responses = {"a": ["so 7 apples"], "b": ["7 pears"], "c": ["3 + 4 is 7, I think"], "d": ["no"], "ranker": ["-"]}
    assert record(play(responses)[0])["rounds"] == 3
    number = panel(consensus={"share": "2/3", "judged_by": "number"})
    assert record(play(responses, number)[0])["rounds"] == 1
    assert record(play(responses, panel(read=len))[0])["rounds"] == 3
    assert record(play(responses, panel(read=lambda text: text[:0]))[0])["rounds"] == 1


# Files


def test_the_packaged_team_is_four_solvers_and_a_ranker():
    team = load_team("dylan")
    assert [role.name for role in team.roles] == ["doer", "planner", "doubter", "verifier", "ranker"]
    assert len({role.profile for role in team.roles}) == 5
    said = {name: [str(i)] for i, name in enumerate(("doer", "planner", "doubter", "verifier"))}
    trajectory, calls = play(said | {"ranker": ["Best: 2, 3"]}, team)
    assert calls[2:] == [["ranker"], ["doubter", "planner"]]
    for message in trajectory.messages:
        assert "3 + 4" in message.user
        assert "\n\n\n" not in message.user + message.system
        assert not re.search(r"\{[a-z]+\}", message.user + message.system)
        assert ("Say a number." in message.system) == (message.role != "ranker")


def test_a_panel_of_ones_own_is_one_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(FILE))
    team = load_team(str(tmp_path / "mine.yaml"))
    assert (team.name, [role.name for role in team.roles]) == ("panel", [*"abcd", "ranker"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "dilan"}, "kind is 'dilan'; did you mean 'dylan'?"),
        ({"kind": ["dylan"]}, "kind is ['dylan']; did you mean 'dylan'?"),
        ({"fisrt": "x"}, "fisrt: unknown field; did you mean 'first'?"),
        ({"agents": []}, "agents is empty; a team has at least one"),
        ({"agents": [{"role": "a", "sytem": ""}]}, "agents.0.sytem: unknown field; did you mean 'system'?"),
        ({"ranker": FILE["ranker"] | {"stey": 1}}, "ranker.stey: unknown field; did you mean 'stay'?"),
        ({"consensus": {"shares": 1}}, "consensus.shares: unknown field; did you mean 'share'?"),
        ({"consensus": {"share": "2/0"}}, "consensus.share: is '2/0'; expected a number from 0 to 1, or a fraction"),
        ({"consensus": {"share": 66}}, "consensus.share: is 66.0; expected a number from 0 to 1"),
        ({"first": None}, "first: missing; it has no default"),
        ({"rounds": 0}, "rounds: input should be greater than 0"),
    ],
)  # fmt: skip
def test_a_wrong_file_names_the_field(tmp_path, changes, message):
    path = tmp_path / "p.yaml"
    values = {key: value for key, value in (FILE | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as error:
        load_team(str(path))
    assert str(error.value).startswith(f"team file {path}: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"later": "{mesages}"}, "later: unknown field {mesages}; did you mean 'messages'?"),
        ({"first": "{messages}"}, "first: unknown field {messages}; known: history, instructions, task"),
        ({"message": "{role}"}, "message: unknown field {role}; known: number, response"),
        ({"turn": "{reply}"}, "turn: unknown field {reply}; known: action, number, observation"),
        ({"ranker": FILE["ranker"] | {"user": "{stays}"}}, "user prompt of ranker: unknown field {stays}; did you mean "
         "'stay'?"),
        ({"ranker": FILE["ranker"] | {"role": "a"}}, "two members have the same role"),
        ({"ranker": FILE["ranker"] | {"stay": {4: 2}}}, "ranker.stay keeps 2 before round 4; expected a round from "
         "2 to 3, and 1 to 3 of the 4 that are there by then"),
        ({"ranker": FILE["ranker"] | {"stay": {3: 4}}}, "ranker.stay keeps 4 before round 3; expected"),
        ({"ranker": FILE["ranker"] | {"stay": {2: 2, 3: 2}}}, "ranker.stay keeps 2 before round 3; expected a round "
         "from 2 to 3, and 1 to 1 of the 2"),
        ({"agents": agents("a")}, "ranker.stay keeps 2 before round 3; expected a round from 2 to 3, and 1 to 0"),
    ],
)  # fmt: skip
def test_a_wrong_prompt_or_a_ranker_that_could_not_act_is_one_clear_line(changes, message):
    with pytest.raises(ConfigError) as error:
        panel(**changes)
    assert str(error.value).startswith(f"team panel: {message}")
