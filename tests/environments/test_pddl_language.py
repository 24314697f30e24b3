"""Words of the four worlds: which part of a response is the action, and that every action can be said and read."""

import pytest

from latentmem.environments.pddl_language import CHECK, LOOK, WORLDS, is_check, is_look, language

PICK = "pick up ball1 in rooma with the left gripper"


@pytest.mark.parametrize(
    ("response", "action"),
    [
        (PICK, PICK),
        (f"Action: {PICK}", PICK),
        (f"ACTION : {PICK}.", PICK),
        (f"**Action:** `{PICK}`", PICK),
        (f"Answer: '{PICK}'", PICK),
        (f"The next action is: {PICK}.", PICK),
        (f"The best action is to {PICK}, since ball1 is there.", f"to {PICK}"),
        (f"Action:\n\n{PICK}", PICK),
        (f"Action 1: {PICK}\nAction 2: move from rooma to roomb", PICK),
        (f"1. {PICK}\n2. move from rooma to roomb", PICK),
        (f"- {PICK} (it is free)", PICK),
        (f"> {PICK}; then go on", PICK),
        (f"Let me think: the ball is near.\n{PICK}", PICK),
        (f"move from here\n{PICK}", PICK),  # the first line that has the form of a command
        (f"The action is hard.\nAction: {PICK}", PICK),
        ("Action: fly\nAction: move from rooma to roomb", "move from rooma to roomb"),
        ("Action: fly\nhover", "fly"),
        ("I am not sure. Perhaps later.", "I am not sure"),
        ("check valid actions", CHECK),
        ("Valid actions?\nLook around.", "Look around"),
        ("", None),
        (" \n ", None),
        ("Action:", "Action"),
        ("...", None),
    ],
)
def test_one_action_is_taken_from_a_response(response, action):
    assert language("gripper").extract(response) == action


def test_only_the_first_ten_thousand_characters_are_read():
    assert language("gripper").extract("x " * 4000 + f"\n{PICK}") == PICK
    assert language("gripper").extract("x " * 5000 + f"\n{PICK}") != PICK


@pytest.mark.parametrize(
    "text",
    [
        PICK,
        PICK.upper(),
        "Pick up the ball1 in the rooma with left gripper",
        "I will pick up ball1 in rooma with the left gripper",
        "let's now pick up 'ball1' in rooma, with the left gripper.",
        "  to   pick up ball1 in rooma with the left gripper ",
    ],
)
def test_case_articles_lead_ins_and_marks_do_not_matter(text):
    ((command, fields),) = language("gripper").read(text)
    assert (command.action, fields) == ("pick", {"ball": "ball1", "room": "rooma", "hand": "left"})


@pytest.mark.parametrize("text", ["cannot " + PICK, PICK + " now", "pick ball1 rooma left", "pick up ball1", "the"])
def test_other_words_are_no_command(text):
    assert language("gripper").read(text) == []


def test_the_two_questions_are_recognised_as_such_only():
    assert all(map(is_check, (CHECK, "Check the valid actions", "please check valid action")))
    assert all(map(is_look, (LOOK, "I look around")))
    assert not any(map(is_check, ("check", "check the ball", "valid actions", LOOK)))
    assert not any(map(is_look, ("look", "look around the room", CHECK)))


@pytest.mark.parametrize("world", WORLDS)
def test_every_command_is_in_the_instructions_and_is_read_back(world):
    words = language(world)
    for command in words.commands.values():
        assert f"- {command.form}\n" in words.instructions
        fields = {name: f"{name}-1" for name in command.arguments if name}
        assert (command, fields) in words.read(command.say.format(**fields))
    assert f"- {CHECK}\n- {LOOK}\n" in words.instructions
    assert words.instructions.endswith(f"\nAction: {words.example}")
    assert words.read(words.example)


@pytest.mark.parametrize("world", WORLDS)
def test_every_sentence_has_its_objects_in_it_and_no_two_are_alike(world):
    words = language(world)
    said = [words.sentence((predicate, "x1", "x2")) for predicate in words.facts]
    assert len(set(said)) == len(said)
    assert all(sentence.endswith(".") for sentence in said)


def test_ball2_is_told_before_ball10():
    facts = [("at", "ball10", "rooma"), ("at", "ball2", "rooma"), ("ball", "ball2")]
    assert language("gripper").sentences(facts) == "ball2 is in rooma. ball10 is in rooma."
