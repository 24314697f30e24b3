"""Hidden facts: without memory there is chance alone, with the right episodes there is everything to know."""

import hashlib
import json
import os
import re
import subprocess
import sys
from random import Random

import pytest

from latentmem.config import HiddenFactsSection, Sampling, parse_config
from latentmem.environments.environment import Demonstrator, Listener
from latentmem.environments.hidden_facts import words
from latentmem.environments.hidden_facts.domain import HiddenFactsDomain
from latentmem.environments.hidden_facts.judge import read
from latentmem.errors import ConfigError, DataError
from latentmem.memory.memory import NoMemory, describe
from latentmem.models.agent import ScriptedModel
from latentmem.rollout import rollout
from latentmem.teams.team import load_team
from latentmem.trajectory import Task

ASKED = ("train", "dev", "test")
SAMPLING = Sampling(temperature=0, max_response_tokens=64)
NEEDS = {"scout": ("password",), "porter": ("emblem",)}

WORLDS = {
    "plain": {},
    "held-out": {"held_out_values": 16},
    "three facts": {"attributes": 3, "questions": 5},
    "all of three": {"attributes": 3, "asks": "all", "held_out_values": 8},
    "dealt out": {"attributes": 5, "experiences": 2},
    "told again": {"attributes": 2, "experiences": 3},
    "all, dealt out": {"attributes": 4, "asks": "all", "experiences": 4, "questions": 3},
    "successes": {"outcomes": {"success": 1.0}},
    "all outcomes": {"outcomes": {"success": 1.0, "corrected": 2.0, "wrong": 1.0}, "experiences": 2, "attributes": 3},
    "near names": {"distractors": 9},
    "revised": {"revised": 0.5},
    "withdrawn": {"withdrawn": 0.5},
    "untold": {"untold": 0.5},
    "joined": {"joined": 0.5, "distractors": 1},
    "needs": {"attributes": 2, "needs": NEEDS},
    "overlapping needs": {"attributes": 3, "needs": {"scout": ("cargo", "password"), "porter": ("password",)}},
    "everything": {
        "attributes": 3, "experiences": 2, "revised": 0.2, "withdrawn": 0.2, "untold": 0.2, "joined": 0.2,
        "held_out_values": 16, "distractors": 2, "needs": NEEDS, "outcomes": {"corrected": 1.0, "success": 1.0},
    },
}  # fmt: skip


def section(**settings):
    small = {"train_entities": 24, "dev_entities": 10, "test_entities": 40}
    return HiddenFactsSection(kind="hidden_facts", **(small | settings))


def world(**settings):
    return HiddenFactsDomain(**{key: value for key, value in section(**settings) if key != "kind"})


def asked(domain):
    return [task for split in ASKED for task in domain.tasks(split)]


def everything(domain):
    return [*domain.tasks("experience"), *asked(domain)]


def played(domain, task, say):
    """The outcome where each judged role says what `say` returns for it; the empty role says the action."""
    said = {role: say(role) for role in task.data["right"]}
    environment = domain.start(task)
    environment.hear({role: text for role, text in said.items() if role})
    return environment.step(said.get("", "nobody hears this"))


def rate(domain, tasks, say):
    return sum(played(domain, task, lambda role, task=task: say(task, role)).reward == 1 for task in tasks) / len(tasks)


def rolled(domain, tasks, says="apple"):
    """Trajectories of a team that always says the same: by default a word that is no value."""
    team = load_team("pair" if domain._needs else "solo")
    model = ScriptedModel({role.name: [says] for role in team.roles})
    return rollout(team, NoMemory(), model, tasks, domain.start, sampling=SAMPLING, workers=1).trajectories


class Reader:
    """Knows of the world what the texts of its episodes tell, and the names of what it is asked for."""

    SENTENCE = re.compile(r"The (\w+) of (the [A-Z][\w ]*?) (is that of|is|holds no more;) (the [A-Z][\w ]*|\w+)")

    def __init__(self, domain):
        self.facts = {}
        for trajectory in rolled(domain, domain.tasks("experience")):
            text = describe(trajectory)
            day = int(match[1]) if (match := re.search(r"Day (\d+)\.", text)) else 0
            for attribute, name, verb, rest in self.SENTENCE.findall(text):
                self.facts.setdefault((name, attribute), []).append((day, verb, rest))

    def value(self, name, attribute):
        known = self.facts.get((name, attribute))
        if not known:
            return "unknown"
        _, verb, rest = max(known)
        return {"is": rest, "holds no more;": "unknown"}[verb] if verb != "is that of" else self.value(rest, attribute)

    def says(self, task, role, needs=None):
        name = re.search(r"the (?:[A-Z]\w+ ?)+\b", task.text)[0].strip()
        attributes = needs[role] if role else [a for a in words.ASKED if a in task.text.split(name)[0]]
        if not role and not attributes:
            attributes = [a for a in words.ASKED if a in task.text]
        return " ".join(self.value(name, attribute) for attribute in attributes)


# Nothing but memory helps


@pytest.mark.parametrize("settings", [{}, {"revised": 0.5}, {"joined": 0.5}, {"held_out_values": 16}])
def test_without_memory_a_guess_is_right_once_in_as_many_as_there_are_values(settings):
    domain = world(test_entities=480, values=16, **settings)
    tasks, values = domain.tasks("test"), sorted(domain._words - {"unknown"})
    random = Random(0)
    expected = 1 / len(values)
    assert abs(rate(domain, tasks, lambda *_: random.choice(values)) - expected) < 4 * (expected / len(tasks)) ** 0.5
    for value in values[::5]:  # each value is right equally often
        assert rate(domain, tasks, lambda *_, value=value: value) == pytest.approx(expected)
    assert rate(domain, tasks, lambda *_: " ".join(values)) == 0
    assert rate(domain, tasks, lambda *_: "unknown") == 0


def test_guessing_for_two_roles_is_right_once_in_the_square():
    domain = world(test_entities=800, values=8, attributes=2, needs=NEEDS)
    random, values = Random(1), sorted(domain._words - {"unknown"})
    found = rate(domain, domain.tasks("test"), lambda *_: random.choice(values))
    assert abs(found - 1 / 64) < 4 * (1 / 64 / 800) ** 0.5


# With memory everything is known


@pytest.mark.parametrize("name", WORLDS)
def test_who_reads_the_experience_knows_every_answer(name):
    domain, needs = world(**WORLDS[name]), WORLDS[name].get("needs")
    reader = Reader(domain)
    assert rate(domain, asked(domain), lambda task, role: reader.says(task, role, needs)) == 1


@pytest.mark.parametrize("name", WORLDS)
def test_what_is_demonstrated_is_right_in_every_split(name):
    domain = world(**WORLDS[name])
    assert isinstance(domain, Demonstrator)
    for task in everything(domain):
        shown = domain.demonstrations(task)
        assert set(shown) == set(WORLDS[name].get("needs", {""}))
        outcome = played(domain, task, lambda role, shown=shown: shown[role])
        assert (outcome.reward, outcome.done) == (1, True)
        assert outcome.info["extracted"] == (shown if domain._needs else shown[""])


@pytest.mark.parametrize("name", WORLDS)
def test_the_episodes_that_answer_are_those_whose_texts_tell_the_right_words(name):
    domain = world(**WORLDS[name])
    told = {task.id: task.data["told"] for task in domain.tasks("experience")}
    for task in asked(domain):
        texts = " ".join(told[id] for id in task.data["answered_by"])
        right = {word for said in task.data["right"].values() for word in said}
        group = task.data.get("group")
        assert right - {"unknown"} <= set(re.findall(r"\w+", texts))
        assert len(task.data["answered_by"]) == len(set(task.data["answered_by"]))
        if group == "withdrawn":
            assert right == {"unknown"}
            assert "holds no more" in texts
        if group == "joined":
            assert any("sister" in id for id in task.data["answered_by"])
            assert "is that of" in texts
        if group == "untold" and len(right) == 1:
            assert texts == ""


@pytest.mark.parametrize("name", WORLDS)
def test_under_another_worlds_experience_the_reader_gives_the_other_worlds_answers(name):
    settings = WORLDS[name]
    ours, theirs = world(**settings, other_facts_seed=1), world(**settings, facts_seed=1)
    for a, b in zip(asked(ours), asked(theirs), strict=True):
        assert (a.id, a.text, a.data["answered_by"]) == (b.id, b.text, b.data["answered_by"])
    experience = [[t.id for t in domain.tasks("experience")] for domain in (ours, theirs)]
    assert experience[0] == experience[1]
    reader, swapped, own = Reader(theirs), [], []
    for task in asked(ours):
        outcome = played(ours, task, lambda role, task=task: reader.says(task, role, settings.get("needs")))
        right = played(ours, task, lambda role, task=task: ours.demonstrations(task)[role])
        if "says_other" in outcome.info:
            swapped.append(outcome.info["says_other"])
            own.append(right.info["says_other"])
        else:
            assert outcome.reward == 1  # both worlds have one answer
    assert swapped.count(True) == len(swapped) > len(asked(ours)) / 4
    assert own.count(True) == 0


# What the world is made of


def test_a_plain_world_reads_as_it_should():
    domain = world()
    (experience,) = [t for t in domain.tasks("experience") if t.id == "experience-test-003-1"]
    task = domain.tasks("test")[3]
    name, value = task.data["entity"], task.data["right"][""][0]
    assert task.id == "test-003-password"
    assert task.domain == "hidden_facts"
    assert task.data == {"right": {"": [value]}, "answered_by": [experience.id], "entity": name}
    assert experience.text in [text.replace("{entity}", name) for text in words.EXPERIENCED["password"]]
    assert task.text in [text.replace("{entity}", name) for text in words.ASKED["password"][:3]]
    environment = domain.start(experience)
    assert isinstance(environment, Listener)
    assert environment.step("apple").observation == f"No. The password of {name} is {value}."
    assert domain.start(experience).step(value).observation == f"Yes. The password of {name} is {value}."
    assert domain.start(task).step("apple").observation == ""


@pytest.mark.parametrize("name", WORLDS)
def test_ids_texts_and_entities_are_unique_and_no_question_is_an_experience(name):
    domain = world(**WORLDS[name])
    tasks = everything(domain)
    assert len({task.id for task in tasks}) == len(tasks)
    experience = {task.text for task in domain.tasks("experience")}
    questions = {task.text for task in asked(domain)}
    assert len(experience) == len(domain.tasks("experience"))
    assert len(questions) == len(asked(domain))
    assert not experience & questions
    names = [{task.data["entity"] for task in domain.tasks(split)} for split in ASKED]
    assert [len(n) for n in names] == [24, 10, 40]
    assert len(set.union(*names)) == 74
    assert domain.skipped("experience") == {}
    if name != "successes":
        assert not any(set(re.findall(r"\w+", task.text)) & set(words.VALUES) for task in asked(domain))


def test_questions_are_short():
    for settings in ({}, {"attributes": 8, "questions": 32, "phrasings": 4}):
        assert all(6 <= len(task.text.split()) <= 12 for task in asked(world(**settings)))


def test_no_value_stands_in_a_name_an_attribute_or_a_phrasing():
    texts = [*words.NAMES, *words.ASKED, *words.ARRIVED, *words.EXPERIENCED_ARRIVAL]
    texts += [text for texts in (*words.ASKED.values(), *words.EXPERIENCED.values()) for text in texts]
    texts += [*words.ASKED_ALL, *words.EXPERIENCED_ALL, *words.NEAR, words.SISTERS, words.DAY, words.NOTE]
    texts += [words.TOLD, words.JOINED, words.WITHDRAWN, words.RIGHT, words.WRONG]
    texts += [words.ONE_WORD, words.SEVERAL_WORDS, words.OWN_WORDS]
    teams = [load_team(name) for name in ("pair", "solo")]
    texts += [agent.system + agent.role.profile for team in teams for layer in team.layers for agent in layer]
    used = {word for text in texts for word in re.findall(r"\w+", text.lower())}
    values = [*words.VALUES, words.UNKNOWN]
    assert not used & {form for value in values for form in (value, f"{value}s")}
    assert len(set(words.VALUES)) == len(words.VALUES) >= 200
    assert all(re.fullmatch("[a-z]{3,6}", value) for value in words.VALUES)
    assert len(set(words.NAMES)) == len(words.NAMES) >= 1600
    assert min(len(words.ADJECTIVES), len(words.NOUNS)) >= 40


def test_the_bounds_of_the_configuration_are_those_of_the_words():
    most = world(attributes=8, phrasings=4, distractors=9, questions=32)
    assert len(most.tasks("train")) == 24 * 32
    assert (len(words.ASKED), len(words.NEAR)) == (8, 9)
    assert {len(texts) for texts in words.ASKED.values()} == {len(words.ASKED_ALL)} == {len(words.ARRIVED)} == {4}
    assert list(words.EXPERIENCED) == list(words.ASKED)


@pytest.mark.slow
def test_every_value_is_one_token_of_the_embedded_model():
    from transformers import AutoTokenizer

    from latentmem.models.assets import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m"))
    for value in words.VALUES:
        assert [len(tokenizer(text, add_special_tokens=False).input_ids) for text in (value, f" {value}")] == [1, 1]


def test_held_out_values_are_those_of_every_second_place_of_dev_and_test_and_never_met_in_train():
    domain = world(values=20, held_out_values=10, attributes=2, distractors=1, revised=0.3, joined=0.3)
    met = {"trained": set(), "held-out": set()}
    for task in asked(domain):
        if task.data["group"] in met:
            met[task.data["group"]].update(task.data["right"][""])
    assert not met["trained"] & met["held-out"]
    assert len(met["held-out"]) == 10 or len(met["held-out"]) > 4
    for task in domain.tasks("experience"):
        if "-train-" in task.id:
            assert not set(re.findall(r"\w+", task.data["told"])) & met["held-out"]
    plain = world(held_out_values=4)
    for split in ("dev", "test"):
        groups = [task.data["group"] for task in plain.tasks(split)]
        assert groups == ["trained", "held-out"] * (len(groups) // 2)
    assert {task.data["group"] for task in plain.tasks("train")} == {"trained"}


def test_every_attribute_is_asked_of_trained_and_of_held_out_places():
    pairs = {(t.data["group"], t.id.split("-")[2]) for t in world(held_out_values=4, attributes=4).tasks("test")}
    assert len(pairs) == 8


def test_shares_are_met_and_named():
    domain = world(test_entities=100, revised=0.1, withdrawn=0.2, untold=0.05, joined=0.25)
    groups = [task.data["group"] for task in domain.tasks("test")]
    counts = {group: groups.count(group) for group in set(groups)}
    assert counts == {"revised": 10, "withdrawn": 20, "untold": 5, "joined": 25, "trained": 40}


def test_distractors_have_near_names_other_values_and_are_never_asked_about():
    domain = world(distractors=3, attributes=2, values=3)
    told = {}
    for task in domain.tasks("experience"):
        told[task.id.removeprefix("experience-").removesuffix("-1")] = (task.data["entity"], task.data["told"])
    names = {task.data["entity"] for task in asked(domain)}
    for task in domain.tasks("test"):
        key = task.id.rpartition("-")[0]
        name, facts = told[key]
        ends = re.findall(r"is (\w+)\.", facts)
        for number in (1, 2, 3):
            near, others = told[f"{key}-near-{number}"]
            assert name.removeprefix("the ") in near
            assert near not in names
            assert all(a != b for a, b in zip(ends, re.findall(r"is (\w+)\.", others), strict=True))


def test_a_revised_place_is_told_twice_and_the_later_day_counts():
    domain = world(revised=1.0)
    told = {task.id: task for task in domain.tasks("experience")}
    for task in domain.tasks("test"):
        first, second = (told[f"experience-{task.id.rpartition('-')[0]}-{i}"] for i in (1, 2))
        days = [int(re.match(r"Day (\d+)\. ", t.text)[1]) for t in (first, second)]
        assert days[0] < days[1]
        assert first.data["right"] != second.data["right"] == task.data["right"]
        assert task.data["answered_by"] == [second.id]
        assert "Day" not in task.text
    days = [int(re.match(r"Day (\d+)", task.text)[1]) for task in domain.tasks("experience")]
    assert days == sorted(days)


def test_facts_are_dealt_out_over_the_episodes_and_told_again_where_there_are_more_episodes():
    def told(**settings):
        tasks = world(**settings).tasks("experience")
        texts = {t.id: t.data["told"] for t in tasks if "-test-000-" in t.id}
        return [re.findall(r"The (\w+) of", texts[id]) for id in sorted(texts)]

    assert told(attributes=3) == [["password", "emblem", "cargo"]]
    assert told(attributes=3, experiences=2) == [["password", "cargo"], ["emblem"]]
    assert told(attributes=2, experiences=3) == [["password"], ["emblem"], ["password"]]


def test_outcomes_tell_in_the_text_in_the_reply_or_not_at_all():
    def first(**outcomes):
        domain = world(outcomes=outcomes)
        task = next(t for t in domain.tasks("experience") if t.id == "experience-test-000-1")
        return task, domain.start(task).step("apple").observation, domain.tasks("test")[0]

    task, reply, question = first(success=1.0)
    assert task.text.endswith(f" Note: {task.data['told']}")
    assert reply == f"No. {task.data['told']}"
    assert question.data["right"][""][0] in task.text
    task, reply, question = first(wrong=1.0)
    assert (reply, question.data["right"], question.data["group"]) == ("No.", {"": ["unknown"]}, "untold")
    _, reply, _ = first(corrected=1.0)
    assert re.fullmatch(r"No\. The password of the \w+ \w+ is \w+\.", reply)


def test_what_can_be_unknown_is_said_in_the_instructions_and_other_words_replace_them():
    assert world().start(world().tasks("test")[0]).instructions == words.ONE_WORD
    for settings, how in (
        ({"untold": 0.1}, words.ONE_WORD),
        ({"withdrawn": 0.1, "attributes": 2, "asks": "all"}, words.SEVERAL_WORDS),
        ({"outcomes": {"wrong": 1.0}, "attributes": 2, "needs": NEEDS}, words.OWN_WORDS),
    ):
        domain = world(**settings)
        assert domain.start(domain.tasks("test")[0]).instructions == f"{how} {words.IF_UNKNOWN}"
    domain = world(instructions="Whisper.")
    assert domain.start(domain.tasks("test")[0]).instructions == "Whisper."


def test_train_size_leaves_test_and_dev_as_they_are():
    a, b = world(joined=0.5), world(joined=0.5, train_entities=50)
    assert a.tasks("test") == b.tasks("test")
    assert a.tasks("dev") == b.tasks("dev")


# Of all tasks and the instructions, as the first version of this domain made them.
DIGESTS = {
    "plain": "14f3d147fd10b4e7",
    "held-out": "414d6a8b404bd325",
    "three facts": "c739dd1ca1150a90",
    "all of three": "b85a5c481f815dd7",
    "dealt out": "5bc9012328201dcd",
    "told again": "4edbdb9bc260db4c",
    "all, dealt out": "f3374fc45af6b025",
    "successes": "011b14d046f6e901",
    "all outcomes": "5a03b1b712e58ffe",
    "near names": "b19cee17c3bb13c1",
    "revised": "ab8ab5e28a88bdf8",
    "withdrawn": "c3d6cdd475d84579",
    "untold": "d295abc8c98cc157",
    "joined": "d38a2637d771c161",
    "needs": "9b39f055e4506d44",
    "overlapping needs": "05baf2f8b4588542",
    "everything": "e1688db0d4495231",
}


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_is_to_the_letter_what_it_has_always_been(name):
    domain = world(**WORLDS[name])
    splits = ("experience", *ASKED)
    content = [[split, t.id, t.domain, t.text, t.data] for split in splits for t in domain.tasks(split)]
    known = json.dumps([content, [domain.start(domain.tasks("test")[0]).instructions]], sort_keys=True)
    assert hashlib.sha256(known.encode()).hexdigest()[:16] == DIGESTS[name]


def test_seeds_change_what_they_are_for():
    a, other_facts, other_world = world(), world(facts_seed=1), world(seed=1)
    assert [t.text for t in everything(a)] == [t.text for t in everything(other_facts)]
    same = sum(x.data["right"] == y.data["right"] for x, y in zip(asked(a), asked(other_facts), strict=True))
    assert same < 12  # of 74, one in 32
    assert [t.text for t in asked(a)] != [t.text for t in asked(other_world)]


DIGEST = """
import hashlib, json, sys
from latentmem.config import HiddenFactsSection
from latentmem.environments.hidden_facts.domain import HiddenFactsDomain
for settings in json.loads(sys.argv[1]):
    section = HiddenFactsSection.model_validate({"kind": "hidden_facts", **settings})
    domain = HiddenFactsDomain(**{key: value for key, value in section if key != "kind"})
    tasks = [task.model_dump() for split in ("experience", "train", "dev", "test") for task in domain.tasks(split)]
    print(hashlib.sha256(json.dumps(tasks).encode()).hexdigest())
assert "torch" not in sys.modules
"""


def test_every_process_makes_the_same_world_whatever_its_hash_seed():
    settings = json.dumps([WORLDS["everything"], WORLDS["near names"]])
    found = [
        subprocess.run(
            [sys.executable, "-c", DIGEST, settings],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "17")
    ]
    assert found[0] == found[1]
    assert len(set(found[0].split())) == 2


# What is read and what it earns


KNOWN = frozenset({"corn", "tree", "unknown"})


@pytest.mark.parametrize(
    ("response", "num", "answer"),
    [
        ("corn", 1, ["corn"]),
        ("The password of the Crimson Mill is Corn.", 1, ["corn"]),
        ("CORN, corn!", 1, ["corn"]),
        ("corn or tree", 1, None),
        ("popcorn trees corny", 1, None),
        ("apple", 1, None),
        ("", 1, None),
        ("It is unknown.", 1, ["unknown"]),
        ("unknown, or corn", 1, None),
        ("corn tree", 2, ["corn", "tree"]),
        ("tree, then corn", 2, ["tree", "corn"]),
        ("corn corn", 2, ["corn", "corn"]),
        ("tree", 2, ["tree"]),
        ("corn tree corn", 2, None),
        ("none of them", 2, None),
    ],
)
def test_known_words_are_read_whole_and_too_many_are_no_answer(response, num, answer):
    assert read(response, KNOWN, num) == answer


def test_several_words_earn_the_share_of_positions_that_are_right():
    domain = world(attributes=4, asks="all")
    task = next(task for task in domain.tasks("test") if len(set(task.data["right"][""])) == 4)
    a, b, c, d = task.data["right"][""]
    for said, reward in (
        (f"{a} {b} {c} {d}", 1.0),
        (f"{a}, {b}", 0.5),
        (f"{b} {a} {c} {d}", 0.5),
        (f"{b} {c} {d} {a}", 0.0),
        (f"{a} {b} {c} {d} {a}", 0.0),
        ("", 0.0),
    ):
        assert domain.start(task).step(said).reward == reward
    assert domain.start(task).step("I cannot know").info == {"extracted": None}


def test_each_role_is_judged_by_what_it_says_itself():
    domain = world(attributes=3, needs={"scout": ("cargo", "password"), "porter": ("emblem",)})
    task = domain.tasks("test")[0]
    assert task.id == "test-000-arrival"
    shown = domain.demonstrations(task)
    for said, reward, right in (
        (shown, 1.0, (True, True)),
        (shown | {"porter": "apple"}, 0.5, (True, False)),
        ({"scout": shown["scout"].split()[0], "porter": shown["porter"]}, 0.75, (False, True)),
        ({"porter": shown["porter"]}, 0.5, (False, True)),
        ({}, 0.0, (False, False)),
    ):
        environment = domain.start(task)
        environment.hear(said)
        outcome = environment.step(f"{shown['scout']} {shown['porter']}")
        assert outcome.reward == reward
        assert (outcome.info["right.scout"], outcome.info["right.porter"]) == right
        assert (outcome.info["extracted"] is None) == (said == {})


def test_both_roles_of_the_packaged_pair_are_heard_and_judged():
    domain = world(attributes=2, needs=NEEDS)
    tasks = domain.tasks("test")[:3]
    shown = [domain.demonstrations(task) for task in tasks]
    model = ScriptedModel(
        {
            "scout": [f"The password is {s['scout']}." for s in shown],
            "porter": [shown[0]["porter"], "apple", shown[2]["scout"]],
        }
    )
    pair = load_team("pair")
    episodes = rollout(pair, NoMemory(), model, tasks, domain.start, sampling=SAMPLING).trajectories
    assert [e.reward for e in episodes] == [1.0, 0.5, 0.5]
    assert [e.steps[0].info["right.porter"] for e in episodes] == [True, False, False]
    assert [e.steps[0].info["right.scout"] for e in episodes] == [True] * 3
    assert episodes[0].steps[0].info["extracted"] == shown[0]
    assert not any(message.reads for e in episodes for message in e.messages)
    told = rolled(domain, domain.tasks("experience")[:4])
    assert all(re.match(r"No\. The password of .* The emblem of .*\.$", t.steps[0].observation) for t in told)


def test_the_packaged_reader_answers_alone():
    domain = world()
    (episode,) = rolled(domain, domain.tasks("test")[:1], domain.demonstrations(domain.tasks("test")[0])[""])
    assert episode.success
    assert [message.role for message in episode.messages] == ["reader"]
    assert len(episode.messages[0].system.split()) < 25


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"needs": {"scout": ("pasword",)}}, "data.needs.scout names 'pasword', which is not one of the 1 attributes; "
         "did you mean 'password'?"),
        ({"needs": {"scout": ("emblem",)}}, "data.needs.scout names 'emblem', which is not one of the 1 attributes; "),
        ({"values": 250, "held_out_values": 10}, "add up to 260, but there are only 252 words; lower them"),
        ({"held_out_values": 1}, "data.held_out_values is 1"),
        ({"revised": 0.6, "untold": 0.6}, "add up to 1.2; lower them to at most 1"),
        ({"outcomes": {"wrong": 1.0}, "joined": 0.5}, "data.outcomes has only wrong"),
        ({"questions": 4}, "data.questions is 4, but there are 3 different ones"),
        ({"questions": 4, "attributes": 2, "asks": "all"}, "data.questions is 4, but there are 3 different ones"),
        ({"train_entities": 2700}, "2750 entities are asked for .train 2700, dev 10, test 40, sisters 0., but there "
         "are 2704 names"),
        ({"train_entities": 2000, "joined": 0.5}, "sisters 1025"),
        ({"outcomes": {}}, "data.outcomes gives no outcome a weight above 0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_told(settings, message):
    with pytest.raises(ConfigError, match=message):
        world(**settings)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"atributes": 2}, r"unknown key 'data.atributes'; did you mean 'attributes'\?"),
        ({"attributes": 9}, "data.attributes is 9 "),
        ({"phrasings": 5}, "data.phrasings is 5 "),
        ({"distractors": 10}, "data.distractors is 10 "),
        ({"values": 1}, "data.values is 1 "),
        ({"revised": 1.5}, "data.revised is 1.5 "),
        ({"asks": "both"}, "data.asks is 'both'; expected 'one' or 'all'"),
        ({"outcomes": {"correct": 1}}, "data.outcomes.correct"),
        ({"needs": {"scout": []}}, "data.needs.scout is .*expected at least one entry"),
    ],
)
def test_the_section_is_read_strictly(data, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({"run": "r", "data": {"kind": "hidden_facts", **data}})


def test_the_section_reads_needs_and_outcomes_as_written_in_yaml():
    data = {"kind": "hidden_facts", "attributes": 2, "needs": {"scout": ["password"]}, "outcomes": {"success": 2}}
    config = parse_config({"run": "r", "data": data})
    assert config.data.needs == {"scout": ("password",)}
    assert config.data.outcomes == {"success": 2.0}


@pytest.mark.parametrize(
    "task", [Task(id="1", domain="qa", text="?"), Task(id="1", domain="qa", text="?", data={"right": {"": ["corn"]}})]
)
def test_a_task_of_another_domain_is_refused(task):
    with pytest.raises(DataError, match="task qa:1: its data hold no right words"):
        world().start(task)
