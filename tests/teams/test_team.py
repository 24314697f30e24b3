"""Teams: the graph is checked, layers speak in order, and prompts are filled without a trace of what is empty."""

import re
from pathlib import Path

import pytest
import yaml

from latentmem.environments.environment import Outcome
from latentmem.errors import ConfigError
from latentmem.teams.team import Agent, FixedTeam, load_team, packaged_teams
from latentmem.teams.turn import Call, describe_history
from latentmem.trajectory import Message, Recalled, Role, Step, Task


def agent(name, *reads, system="You are {instructions}", user="{task}\n\n{history}\n\n{messages}"):
    return Agent(Role(name=name, profile=f"is {name}"), system, user, reads)


def play(team, task="T", instructions="I", history=(), say=lambda call: f"{call.role.name} speaks"):
    """All calls of a turn, layer by layer, and the action."""
    turn = team.turn(task, instructions, history)
    layers: list[list[Call]] = []
    responses = None
    while True:
        try:
            layers.append(next(turn) if responses is None else turn.send(responses))
        except StopIteration as stop:
            return layers, stop.value
        responses = [say(call) for call in layers[-1]]


def step(action, observation):
    message = Message(
        role="a", system="s", user="u", response=action, token_ids=(1,), logps=(0.0,), finish="stop", temperature=1.0,
        num_prompt_tokens=1, recalled=Recalled(kind="none"),
    )  # fmt: skip
    return Step(messages=(message,), action=action, observation=observation)


def names(layers):
    return [[call.role.name for call in layer] for layer in layers]


# The graph


def test_agents_speak_in_layers_by_the_longest_way_from_the_start():
    team = FixedTeam("t", [agent("d", "c", "a"), agent("c", "b"), agent("b", "a"), agent("a"), agent("x")], "d")
    layers, action = play(team)
    assert names(layers) == [["a", "x"], ["b"], ["c"], ["d"]]
    assert [role.name for role in team.roles] == ["a", "x", "b", "c", "d"]
    assert action == "d speaks"


def test_reads_count_responses_in_the_order_they_were_asked_for():
    team = FixedTeam("t", [agent("last", "two", "one"), agent("one"), agent("two", "one"), agent("side")], "last")
    layers, _ = play(team)
    said = [call for layer in layers for call in layer]
    for call in said:
        quoted = re.findall(r"(\w+) said:", call.user)
        assert [said[i].role.name for i in call.reads] == quoted
    assert said[-1].reads == (2, 0)  # asked for: one, side, two, last


def test_the_action_is_what_the_answering_role_said_even_if_others_speak_later():
    team = FixedTeam("t", [agent("a"), agent("b", "a")], "a")
    assert play(team)[1] == "a speaks"


@pytest.mark.parametrize(
    ("agents", "answer", "message"),
    [
        ([agent("a"), agent("a")], "a", "team t: two agents have the same role"),
        ([agent("actor"), agent("b", "acter")], "b", "team t: b reads 'acter'; did you mean 'actor'?"),
        ([agent("a", "b"), agent("b", "c"), agent("c", "a"), agent("d")], "d", "team t: a, b, c read each other in a "
         "circle"),
        ([agent("a"), agent("b", "a", "a")], "b", "team t: b reads 'a' twice; name it once"),
        ([agent("a", "a")], "a", "team t: a read each other in a circle"),
        ([agent("actor")], "acter", "team t: answer is 'acter'; did you mean 'actor'?"),
        ([agent("a", user="{taks}")], "a", "team t: user prompt of a: unknown field {taks}; did you mean 'task'?"),
        ([agent("a", system="{rule}")], "a", "team t: system prompt of a: unknown field {rule}; known: history, "
         "instructions, messages, task"),
    ],
)  # fmt: skip
def test_a_wrong_graph_or_prompt_is_one_clear_line(agents, answer, message):
    with pytest.raises(ConfigError) as error:
        FixedTeam("t", agents, answer)
    assert str(error.value) == message


# Prompts


def test_empty_history_and_messages_leave_no_blank_run():
    layers, _ = play(FixedTeam("t", [agent("a", user="{task}\n\n{history}\n\n{messages}\n\nYour answer:")], "a"))
    assert layers[0][0].user == "T\n\nYour answer:"


def test_blank_lines_inside_a_task_are_kept():
    task = "def f():\n    pass\n\n\n\ndef g():\n    pass"
    layers, _ = play(FixedTeam("t", [agent("a")], "a"), task=task)
    assert layers[0][0].user == task


def test_hostile_braces_in_task_and_responses_stay_text():
    team = FixedTeam("t", [agent("a"), agent("b", "a")], "b")
    layers, _ = play(team, task="{messages} {history}", instructions="{task}", say=lambda call: "{task} {x}")
    assert layers[1][0].user == "{messages} {history}\n\na said:\n{task} {x}"
    assert layers[1][0].system == "You are {task}"


def test_earlier_turns_are_shown_with_action_and_reply():
    layers, _ = play(FixedTeam("t", [agent("a")], "a"), history=[step("look", "dark"), step("lamp on", "a door")])
    assert (
        layers[0][0].user
        == "T\n\nTurn 1\nWe answered: look\nReply: dark\n\nTurn 2\nWe answered: lamp on\nReply: a door"
    )
    assert describe_history([]) == ""


# The packaged teams


def test_autogen_camel_and_macnet_ship_with_their_shape():
    assert sorted(packaged_teams()) == ["autogen", "camel", "dylan", "macnet", "pair", "solo"]
    assert names(play(load_team("autogen"))[0]) == [["assistant"], ["user proxy"]]
    assert names(play(load_team("camel"))[0]) == [["user proxy"], ["actor"], ["critic"], ["summariser"]]
    assert names(play(load_team("macnet"))[0]) == [
        ["first actor", "second actor"],
        ["first critic", "second critic"],
        ["summariser"],
    ]


@pytest.mark.parametrize("name", ["autogen", "camel", "macnet"])
def test_packaged_prompts_are_clean_and_tell_the_answering_agent_how_an_answer_looks(name):
    team = load_team(name)
    layers, action = play(team, task="Add 1 and 2.", instructions="Write the number alone.", history=[step("4", "no")])
    for call in (call for layer in layers for call in layer):
        assert "Add 1 and 2." in call.user
        assert "We answered: 4" in call.user
        assert "\n\n\n" not in call.user + call.system
        assert not re.search(r"\{[a-z]+\}", call.user + call.system)
    assert "Write the number alone." in layers[-1][0].system
    assert action == f"{team.answer} speaks"


@pytest.mark.parametrize("name", ["autogen", "camel", "dylan", "macnet"])
def test_packaged_prompts_know_no_domain(name):
    text = packaged_teams()[name].read_text().lower()
    text = re.sub(r"\{number\}|the numbers\s+of", "", text)  # of the answers that are read
    assert not re.search(r"<answer>|number|code|python|question|fact|math", text)


# Files


def write(tmp_path, **changes):
    values = {
        "name": "duo",
        "agents": [
            {"role": "writer", "profile": "writes", "system": "Write.", "user": "{task}"},
            {"role": "editor", "profile": "edits", "system": "Edit.", "user": "{messages}", "reads": ["writer"]},
        ],
        "answer": "editor",
    } | changes
    path = tmp_path / "duo.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not ...}))
    return str(path)


def test_a_team_of_ones_own_is_one_file(tmp_path):
    team = load_team(write(tmp_path))
    assert team.name == "duo"
    assert play(team)[0][1][0].user == "writer said:\nwriter speaks"
    assert [role.profile for role in team.roles] == ["writes", "edits"]


def test_the_words_around_messages_and_earlier_turns_are_replaced_in_the_file(tmp_path):
    path = write(tmp_path, message="<{role}> {response}\n", turn="{number}) {action} -> {observation}\n")
    layers, _ = play(load_team(path), say=lambda call: "{role} x", history=[step("look", "dark")])
    assert layers[1][0].user == "<writer> {role} x"
    path = write(tmp_path, agents=[{"role": "a", "profile": "", "system": "", "user": "{history}"}], answer="a",
                 turn="{number}) {action} -> {observation}\n")  # fmt: skip
    layers, _ = play(load_team(path), history=[step("look", "dark"), step("go", "far")])
    assert layers[0][0].user == "1) look -> dark\n\n2) go -> far"


def test_an_unknown_team_names_the_nearest_one():
    with pytest.raises(
        ConfigError, match=r"^team 'autogem': no such team, and no such file; did you mean 'autogen'\?$"
    ):
        load_team("autogem")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agnets": []}, "agnets: unknown field; did you mean 'agents'?"),
        ({"agents": [{"role": "a", "profile": "", "usr": ""}]}, "agents.0.usr: unknown field; did you mean 'user'?"),
        ({"agents": []}, "agents is empty; a team has at least one"),
        ({"answer": ...}, "answer: missing; it has no default"),
        ({"agents": "writer"}, "agents: input should be a valid list"),
        ({"message": "{name}"}, "message: unknown field {name}; known: response, role"),
        ({"turn": "{reply}"}, "turn: unknown field {reply}; known: action, number, observation"),
    ],
)  # fmt: skip
def test_a_wrong_file_names_the_field(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError) as error:
        load_team(path)
    assert str(error.value).startswith((f"team file {path}: ", "team duo: "))
    assert message in str(error.value)


def test_a_key_written_twice_is_refused(tmp_path):
    path = Path(write(tmp_path))
    path.write_text(path.read_text() + "\nname: other\n")
    with pytest.raises(ConfigError, match=r"cannot be read: key 'name' is given twice in line"):
        load_team(str(path))


def test_broken_yaml_and_a_folder_are_one_line(tmp_path):
    (tmp_path / "x.yaml").write_text("name: [\n")
    with pytest.raises(ConfigError, match=r"x\.yaml: cannot be read") as error:
        load_team(str(tmp_path / "x.yaml"))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no such team, and no such file"):
        load_team(str(tmp_path))


# The documentation


DOCS = (Path(__file__).resolve().parents[2] / "docs" / "teams.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def test_the_documented_file_is_a_team(tmp_path):
    text, *_ = blocks("yaml")
    (tmp_path / "proofreaders.yaml").write_text(text)
    layers, action = play(load_team(str(tmp_path / "proofreaders.yaml")))
    assert names(layers) == [["writer"], ["reader"]]
    assert layers[1][0].user == "T\n\nwriter said:\nwriter speaks"
    assert action == "reader speaks"


def test_the_documented_class_plays():
    class Domain:
        def start(self, task):
            class World:
                instructions = "Say a number."

                def step(self, action):
                    return Outcome("", float(action == "5"), True)

            return World()

    scope = {"tasks": [Task(id="1", domain="toy", text="2 + 3")], "domain": Domain()}
    for block in blocks("python"):
        exec(block, scope)
    (trajectory,) = scope["done"].trajectories
    assert [m.response for m in trajectory.messages] == ["4", "no, add again", "5", "yes"]
    assert [m.reads for m in trajectory.messages] == [(), (0,), (0, 1), (2,)]
    assert trajectory.success
