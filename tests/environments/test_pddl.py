"""PDDL worlds as a team meets them: what an action does, what it earns, and which folders and tasks are refused."""

import json
import subprocess
import sys

import pytest

from latentmem.environments import pddl, pddl_world
from latentmem.environments.pddl import PDDLDomain, PDDLEnvironment
from latentmem.environments.pddl_language import WORLDS, language
from latentmem.environments.pddl_world import World
from latentmem.errors import ConfigError, DataError
from latentmem.trajectory import Task

# Two balls, both to be in roomb, one of them there already.
HALF_DONE = """
(define (problem two) (:domain gripper)
  (:objects rooma roomb ball1 ball2 left right)
  (:init (room rooma) (room roomb) (ball ball1) (ball ball2) (gripper left) (gripper right) (free left) (free right)
         (at-robby roomb) (at ball1 rooma) (at ball2 roomb))
  (:goal (and (at ball1 roomb) (at ball2 roomb))))
"""


HINT = "Reply with one of them, such as\nAction: check valid actions"


def domain(**changes):
    arguments = {"worlds": WORLDS, "size": "small", "train_size": 12, "test_size": 6, "seed": 0, "path": None}
    return PDDLDomain(**arguments | changes)


@pytest.fixture(scope="module")
def half_done():
    return World(language("gripper").domain, HALF_DONE, domain_file="gripper.pddl", problem_file="two.pddl")


@pytest.fixture
def play(half_done):
    environment = PDDLEnvironment(half_done, language("gripper"))

    def play(*commands):
        return [environment.step(command) for command in commands][-1]

    return play


def test_an_episode_earns_the_best_share_of_the_goal_that_an_action_brought_about_and_ends_at_1(play):
    # The half that holds at the start counts from the first action that changes something, as in AgentBoard.
    assert [play(c).reward for c in ("look around", "check valid actions", "fly", "move from roomb to roomb")] == [
        0
    ] * 4
    assert play("pick up ball2 in roomb with the left gripper").reward == 0  # it took the one goal fact away
    assert play("drop ball2 in roomb with the left gripper").reward == 0.5
    outcome = play("pick up ball2 in roomb with the left gripper")
    assert (outcome.reward, outcome.info["progress"], outcome.done) == (0.5, 0, False)
    outcome = play(
        "move from roomb to rooma",
        "pick up ball1 in rooma with the right gripper",
        "move from rooma to roomb",
        "drop ball1 in roomb with the right gripper",
    )
    assert (outcome.reward, outcome.info["progress"], outcome.done) == (0.5, 0.5, False)
    outcome = play("drop ball2 in roomb with the left gripper")
    assert (outcome.reward, outcome.info["progress"], outcome.done) == (1.0, 1.0, True)
    assert outcome.observation.endswith("The goal is reached.")


@pytest.mark.parametrize(
    ("action", "cause", "observation"),
    [
        ("", "no_action", f"Your reply names no action. {HINT}"),
        (" \n\t", "no_action", f"Your reply names no action. {HINT}"),
        ("Action: juggle ball1", "unknown_command", f"'juggle ball1' is none of the actions. {HINT}"),
        ("pick up ball1", "unknown_command", f"'pick up ball1' is none of the actions. {HINT}"),
        (
            "pick up ball9 in rooma with the left gripper",
            "unknown_object",
            "'ball9' is unknown as BALL in: pick up BALL in ROOM with the HAND gripper.",
        ),
        (
            "pick up ball1 in rooma with the left gripper",
            "unmet",
            "That cannot be done now. It would need: The robot is in rooma.",
        ),
        (
            "drop left in roomb with the ball1 gripper",
            "unmet",
            "That cannot be done now. It would need: The ball1 gripper holds left. left is a ball. ball1 is a gripper.",
        ),
        ("move from roomb to roomb", "no_change", "That would change nothing."),
    ],
)
def test_an_invalid_action_says_why_and_changes_nothing(play, action, cause, observation):
    before = play("look around").observation
    outcome = play(action)
    assert (outcome.info["cause"], outcome.info["valid"], outcome.observation) == (cause, False, observation)
    assert not outcome.done
    assert play("look around").observation == before


def test_an_object_of_the_wrong_kind_is_told_from_an_unknown_one():
    made = domain(worlds=("tyreworld",))
    environment = made.start(made.tasks("test")[0])
    assert environment.step("open jack").observation == "'jack' cannot be CONTAINER in: open CONTAINER."
    assert environment.step("open trunk").observation == "'trunk' is unknown as CONTAINER in: open CONTAINER."


def test_check_valid_actions_lists_what_changes_something_and_look_around_tells_the_state(play):
    assert play("check valid actions").observation == (
        "You can: move from roomb to rooma; pick up ball2 in roomb with the left gripper; "
        "pick up ball2 in roomb with the right gripper."
    )
    assert play("Look around!").observation == (
        "rooma is a room. roomb is a room. The robot is in roomb. ball1 is in rooma. ball2 is in roomb. "
        "The left gripper is free. The right gripper is free."
    )
    outcome = play("move from roomb to rooma")
    assert (outcome.info["valid"], outcome.info["cause"]) == (True, None)
    # What no action changes is not told again after each.
    assert outcome.observation == (
        "The robot is in rooma. ball1 is in rooma. ball2 is in roomb. The left gripper is free. "
        "The right gripper is free."
    )


def test_barman_and_tyreworld_tell_only_what_came_about():
    made = domain(worlds=("barman",), size="medium")
    environment = made.start(made.tasks("train")[0])
    assert environment.step("grasp shaker1 with the left hand").observation == "The left hand holds shaker1."


@pytest.mark.parametrize(
    "response",
    [
        "x" * 1_000_000,
        "\n" * 1_000_000,
        "Action: " * 200_000,
        "Action: pick up " + "ball1 " * 200_000,
        "\x00\x1b[2J\ud800\u202e\u2028" * 1000,
        "Action: pick up \u0431\u0430\u043b\u043b\x00 in rooma with the left gripper",
        "(((((" * 100_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_hostile_responses_are_answered_in_few_printable_words(play, response):
    outcome = play(response)
    assert outcome.info["valid"] is False
    assert len(outcome.observation) < 200
    assert outcome.observation.replace("\n", " ").isprintable()
    assert len(str(outcome.info["extracted"])) <= 200


def test_equal_arguments_give_equal_tasks_and_another_seed_gives_others():
    first, again, other = domain(), domain(), domain(seed=1)
    for split in ("train", "test"):
        assert first.tasks(split) == again.tasks(split)
        assert not {task.id for task in first.tasks(split)} & {task.id for task in other.tasks(split)}
    assert {task.text for task in first.tasks("train")} != {task.text for task in other.tasks("train")}


@pytest.mark.parametrize("size", ["small", "medium"])
def test_no_task_is_in_both_splits_or_twice_and_the_worlds_come_in_agentboards_shares(size):
    made = domain(train_size=300, test_size=60, size=size)
    train, test = made.tasks("train"), made.tasks("test")
    assert len({task.text for task in train + test}) == 360
    assert len({task.id for task in train + test}) == 360
    shares = [sum(task.data["world"] == world for task in test) for world in WORLDS]
    assert shares == [20, 10, 20, 10]
    assert {task.data["difficulty"] for task in test} == {"easy" if size == "small" else "hard"}


def test_a_world_that_runs_out_of_problems_is_named(monkeypatch):
    monkeypatch.setattr(pddl, "MAX_REPEATS", 2)
    with pytest.raises(
        DataError,
        match=r"blockworld has too few different problems: after \d+ train tasks, 2 draws in a row brought nothing new",
    ):
        domain(worlds=("blockworld",), train_size=10_000).tasks("train")


def test_a_stored_task_can_be_played_by_another_domain_object():
    task = Task.model_validate_json(domain().tasks("train")[0].model_dump_json())
    environment = domain(worlds=("tyreworld",), seed=5).start(task)
    outcomes = [environment.step(command) for command in task.data["plan"]]
    assert outcomes[-1].reward == 1.0


@pytest.mark.parametrize("data", [{}, {"world": "hanoi", "problem": HALF_DONE}, {"world": "gripper", "problem": 3}])
def test_a_task_of_another_kind_is_refused(data):
    with pytest.raises(
        DataError, match="task pddl:x: its data hold no world and problem; expected a task of kind pddl"
    ):
        domain().start(Task(id="x", domain="pddl", text="?", data=data))


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(pddl_world, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package unified-planning; pip install 'latentmem\[pddl\]'"):
        domain()


def test_importing_the_environment_loads_no_planning_library():
    program = (
        "import sys; import latentmem.environments.pddl;"
        "print([m for m in ('torch', 'unified_planning', 'numpy', 'networkx') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


# Folders in AgentBoard's layout.

ONE_BALL = HALF_DONE.replace("(at ball2 roomb))))", ")))").replace("(problem two)", "(problem one)")


def label(number, *subgoals, subtask="gripper", **more):
    row = {"id": number, "task": "pddl", "goal": "", "subgoals": list(subgoals), "difficulty": "easy"}
    return row | {"additional_info": {"subtask": subtask}} | more


BOTH = ("ball1 is at roomb.", "ball2 is at roomb.")


@pytest.fixture
def folder(tmp_path):
    """Two gripper problems, whose names sort otherwise as strings than as numbers, and a way to write their labels."""
    (tmp_path / "gripper").mkdir()
    (tmp_path / "gripper.pddl").write_text(language("gripper").domain)
    (tmp_path / "gripper" / "p2.pddl").write_text(HALF_DONE)
    (tmp_path / "gripper" / "p10.pddl").write_text(ONE_BALL)

    def write(*rows):
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return domain(path=str(tmp_path), worlds=("gripper",), train_size=2)

    return write


def test_a_folder_is_read_in_the_order_of_its_labels_and_keyed_by_domain_and_file(folder):
    tasks = folder(label(7, BOTH[0]), label(8, *BOTH)).tasks("test")
    assert [(task.id, task.data["label"], task.data["difficulty"]) for task in tasks] == [
        ("gripper/p10", 7, "easy"),
        ("gripper/p2", 8, "easy"),
    ]
    assert tasks[1].text == (
        "You steer a robot with two grippers.\nGoal: ball1 is in roomb. ball2 is in roomb.\n"
        "At the start: rooma is a room. roomb is a room. The robot is in roomb. ball1 is in rooma. ball2 is in roomb. "
        "The left gripper is free. The right gripper is free."
    )


def test_labels_that_name_their_files_may_be_any_part_of_them(folder):
    (task,) = folder(label(8, *BOTH, problem_file="gripper/p2.pddl")).tasks("test")
    assert task.id == "gripper/p2"


BAD_LABELS = [
    ([label(0, BOTH[0]) | {"id": None}], "test.jsonl:1: field 'id' is null; expected an integer"),
    ([label("0", BOTH[0])], "test.jsonl:1: field 'id' is a string; expected an integer"),
    ([label(0, BOTH[0], additional_info=None)], "test.jsonl:1: field 'additional_info' is null; expected an object"),
    ([label(0, BOTH[0], additional_info={})], "test.jsonl:1: additional_info: no field 'subtask'"),
    ([label(0, BOTH[0], subtask="griper")], "test.jsonl:1: subtask 'griper' is not a world known here; did you"),
    ([label(0, None)], "test.jsonl:1: field 'subgoals': entry 0 is null; expected a string"),
    ([label(0, BOTH[0], difficulty=3)], "test.jsonl:1: field 'difficulty' is an integer; expected a string"),
    ([label(0, BOTH[0]), label(0, *BOTH)], "test.jsonl:2: 0 is labelled already at"),
    (
        [label(0, BOTH[0], problem_file="gripper/p10.pddl"), label(1, BOTH[0], problem_file="gripper/p10.pddl")],
        "gripper/p10.pddl is labelled already at",
    ),
    ([label(0, BOTH[0], problem_file="../secret.pddl")], "'../secret.pddl' is not a problem of gripper;"),
    ([label(0, *BOTH)], "test.jsonl:1: its subgoals are about ball1 and roomb; ball2 and roomb, but the goal in"),
    (
        [label(0, BOTH[0]), label(1, *BOTH), label(2, *BOTH)],
        "test.jsonl:3: label 3 of gripper, but",
    ),
    ([label(0, "b1 is on b2.", subtask="blockworld")], "blockworld holds 0 .pddl files; expected one for each label"),
]


@pytest.mark.parametrize(("rows", "problem"), BAD_LABELS, ids=[problem[:60] for _, problem in BAD_LABELS])
def test_labels_that_cannot_be_used_are_named_by_file_and_line(folder, rows, problem):
    with pytest.raises(DataError) as caught:
        folder(*rows).tasks("test")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_FILES = [
    ("gripper.pddl", "(define (domain gripper)", "gripper.pddl:1: the ( of this line is never closed"),
    ("gripper/p10.pddl", "(define\n(problem x)))", "p10.pddl:2: a ) that closes nothing"),
    ("gripper/p10.pddl", "", "p10.pddl: expected one PDDL definition, (define ...), and nothing else"),
    ("gripper/p10.pddl", language("gripper").domain, "p10.pddl: expected (define (problem NAME) (:SECTION ...) ...)"),
    ("gripper/p10.pddl", "(" * 5000 + ")" * 5000, "p10.pddl: expected (define (problem NAME)"),
    (
        "gripper/p10.pddl",
        ONE_BALL.replace("(at ball1 roomb)", "(at ball1)"),
        "p10.pddl: not PDDL that unified-planning",
    ),
    ("gripper/p10.pddl", ONE_BALL.replace("ball1 ball2", "ball2"), "p10.pddl: not PDDL that unified-planning can step"),
    ("gripper/p10.pddl", ONE_BALL.replace("(and (at ball1 roomb) )", "(and)"), "p10.pddl: the goal is empty"),
    (
        "gripper/p10.pddl",
        ONE_BALL.replace("(and (at ball1 roomb) )", "(not (at ball1 rooma))"),
        "p10.pddl: the goal asks for (not at(ball1, rooma)); expected facts joined by and",
    ),
    (
        "gripper.pddl",
        language("gripper").domain.replace("(free ?hand) (ball ?thing)", "(or (free ?hand) (ball ?thing))"),
        "gripper.pddl: action pick asks for",
    ),
    ("gripper.pddl", language("gripper").domain.replace("(room ?x)", "(romo ?x)"), "gripper.pddl: not PDDL that"),
    (
        "gripper.pddl",
        language("gripper").domain.replace("action drop", "action toss"),
        "gripper.pddl: action 'toss' is",
    ),
    ("gripper.pddl", language("gripper").domain.replace("free", "idle"), "not PDDL"),
    ("gripper.pddl", language("gripper").domain.replace("(:action", "(:predicates) (:action", 1), "stands twice"),
]


@pytest.mark.parametrize(("file", "text", "problem"), BAD_FILES, ids=[problem[:50] for *_, problem in BAD_FILES])
def test_pddl_that_cannot_be_used_is_named_by_file(folder, tmp_path, file, text, problem):
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError) as caught:
        folder(label(7, BOTH[0])).tasks("test")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folders_and_files_and_other_bytes_are_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"data\.path: nowhere is no folder; expected DOMAIN\.pddl"):
        domain(path="nowhere").tasks("test")
    (tmp_path / "gripper.pddl").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"gripper\.pddl: not valid UTF-8"):
        folder(label(7, BOTH[0])).tasks("test")
    (tmp_path / "gripper.pddl").unlink()
    with pytest.raises(DataError, match=r"gripper\.pddl: cannot be read \(No such file"):
        folder(label(7, BOTH[0])).tasks("test")
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"test\.jsonl: no such file"):
        domain(path=str(tmp_path)).tasks("test")


# AgentBoard's own problems, where they lie beside a checkout.

GRIPPER_1 = [
    (command, reward)
    for pair, rewards in (((1, 2), (0.25, 0.5)), ((3, 4), (0.75, 1.0)))
    for command, reward in [
        *([("move from roomb to rooma", 0.5)] if pair == (3, 4) else []),
        (f"pick up ball{pair[0]} in rooma with the left gripper", rewards[0] - 0.25),
        (f"pick up ball{pair[1]} in rooma with the right gripper", rewards[0] - 0.25),
        ("move from rooma to roomb", rewards[0] - 0.25),
        (f"drop ball{pair[0]} in roomb with the left gripper", rewards[0]),
        (f"drop ball{pair[1]} in roomb with the right gripper", rewards[1]),
    ]
]
BLOCKWORLD_1 = [
    ("take b2 off b3", 0.0),
    ("put b2 on the table", 0.0),
    ("take b3 off b1", 0.0),
    ("stack b3 on b2", 0.5),  # one of the two facts, at the wrong place
    ("take b3 off b2", 0.5),
    ("put b3 on the table", 0.5),
    ("pick up b2 from the table", 0.5),
    ("stack b2 on b1", 0.5),
    ("pick up b3 from the table", 0.5),
    ("stack b3 on b2", 1.0),
]
BARMAN_1 = [
    ("grasp shot2 with the left hand", 0.0),
    ("fill shot2 with ingredient2 from dispenser2", 0.5),
    ("put down shot2 with the left hand", 0.5),
    ("grasp shot3 with the right hand", 0.5),
    ("fill shot3 with ingredient1 from dispenser1", 0.5),
    ("pour ingredient1 from shot3 into the clean shaker1", 0.5),
    ("clean shot3 of ingredient1", 0.5),
    ("fill shot3 with ingredient3 from dispenser3", 0.5),
    ("add ingredient3 from shot3 to shaker1", 0.5),
    ("put down shot3 with the right hand", 0.5),
    ("grasp shaker1 with the left hand", 0.5),
    ("shake cocktail1 from ingredient1 and ingredient3 in shaker1", 0.5),
    ("pour cocktail1 from shaker1 into shot1", 1.0),
]
TYREWORLD_1 = [
    ("open boot", 0.0),
    ("take pump out of boot", 0.0),
    ("take jack out of boot", 0.0),
    ("take wrench out of boot", 0.0),
    ("take r1 out of boot", 0.0),
    ("inflate r1", 1 / 3),
    ("loosen nuts1 on the-hub1", 1 / 3),
    ("lift the-hub1", 1 / 3),
    ("unscrew nuts1 from the-hub1", 1 / 3),
    ("remove w1 from the-hub1", 1 / 3),
    ("mount r1 on the-hub1", 2 / 3),
    ("put w1 into boot", 1.0),
]


@pytest.fixture
def agentboard(shared_dir):
    folder = shared_dir / "data" / "pddl"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


@pytest.mark.slow
def test_all_of_agentboards_problems_at_hand_load_and_start_as_they_are(agentboard):
    made = domain(path=str(agentboard))
    tasks = made.tasks("test")
    assert [sum(task.data["world"] == world for task in tasks) for world in WORLDS] == [10, 5, 10, 5]
    for task in tasks:
        outcome = made.start(task).step("check valid actions")
        assert (outcome.reward, outcome.done) == (0.0, False)
        assert outcome.observation.startswith("You can: ")


@pytest.mark.parametrize(
    ("world", "problem", "plan"),
    [
        ("gripper", "prob01", GRIPPER_1),
        ("blockworld", "problem1", BLOCKWORLD_1),
        ("barman", "p01", BARMAN_1),
        ("tyreworld", "p01", TYREWORLD_1),
    ],
)
def test_a_plan_by_hand_reaches_agentboards_goal_and_each_prefix_its_progress(agentboard, world, problem, plan):
    texts = [(agentboard / name).read_text() for name in (f"{world}.pddl", f"{world}/{problem}.pddl")]
    data = {"world": world, "domain": texts[0], "problem": texts[1]}
    environment = domain().start(Task(id=f"{world}/{problem}", domain="pddl", text="", data=data))
    for command, reward in plan:
        outcome = environment.step(f"Action: {command}")
        assert (outcome.info["valid"], outcome.reward) == (True, pytest.approx(reward)), command
    assert outcome.done
