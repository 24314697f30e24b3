"""Generated tasks: the same for the same arguments, never in both splits, scored by their family and not fooled."""

import inspect
import json
import logging
import re
import subprocess
import sys

import pytest

from latentmem.config import Family
from latentmem.environments.answers import last_number
from latentmem.environments.reasoning import (
    ACCEPT_WRONG_ANSWERS,
    FORMULAS_EXECUTED,
    HASH_DEPENDENT,
    LITERALS_EXECUTED,
    NUMERIC,
    ReasoningDomain,
    harmless,
)
from latentmem.errors import ConfigError, DataError
from latentmem.trajectory import Task

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}

# Families whose own scorer refuses what stands in their entry's `answer`, because there stands nothing: any valid
# solution is accepted, and the generator offers none.
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


def domain(*families, train_size=6, test_size=4, seed=0):
    return ReasoningDomain(families=families, train_size=train_size, test_size=test_size, seed=seed)


def sums(**params):
    return Family(name="chain_sum", params=SUMS | params)


def one(name, **params):
    """Environment and entry of one task of a family."""
    made = domain(Family(name=name, params=params), train_size=1, test_size=1)
    environment = made.start(made.tasks("train")[0])
    return environment, environment.entry


def fields(tasks):
    return [(task.id, task.text, task.data) for task in tasks]


def test_importing_the_environments_loads_neither_torch_nor_the_task_libraries():
    program = (
        "import sys; import latentmem.environments.code.domain, latentmem.environments.qa;"
        "import latentmem.environments.reasoning;"
        "print([m for m in ('torch', 'reasoning_gym', 'datasets', 'sympy', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_equal_arguments_give_equal_tasks_and_another_seed_gives_others():
    families = (sums(), Family(name="spell_backward", weight=0.5))
    first, again, other = domain(*families), domain(*families), domain(*families, seed=1)
    for split in ("train", "test"):
        assert fields(first.tasks(split)) == fields(again.tasks(split))
        assert not {task.id for task in first.tasks(split)} & {task.id for task in other.tasks(split)}
    assert not {task.text for task in first.tasks("train")} & {task.text for task in other.tasks("train")}


def test_a_mix_has_the_asked_sizes_and_shares():
    made = domain(sums(), Family(name="spell_backward", weight=3.0), train_size=41, test_size=4)
    names = [str(task.data["family"]) for task in made.tasks("train")]
    assert (len(names), names.count("chain_sum")) == (41, 10)
    assert [str(task.data["family"]) for task in made.tasks("test")].count("chain_sum") == 1
    assert names != sorted(names)
    assert len({task.id for task in made.tasks("train")}) == 41


def test_no_task_is_drawn_twice_however_small_the_family_and_repeats_are_counted(caplog):
    tiny = Family(name="chain_sum", params=SUMS | {"max_digits": 1})  # 9 * 9 sums and differences at most
    with caplog.at_level(logging.WARNING):
        made = domain(tiny, train_size=60, test_size=20)
        train, test = made.tasks("train"), made.tasks("test")
    assert (len(train), len(test)) == (60, 20)
    assert len({task.text for task in train + test}) == 80
    assert re.search(r"chain_sum: \d+ of \d+ draws for train repeated a task", caplog.text)


def test_a_family_with_too_few_tasks_is_named():
    tiny = Family(name="chain_sum", params=SUMS | {"max_digits": 1})
    with pytest.raises(DataError, match=r"chain_sum gave \d+ different train tasks .* but 5000 are asked for"):
        domain(tiny, train_size=5000).tasks("train")


@pytest.mark.parametrize(
    ("family", "problem"),
    [
        (Family(name="chain_sums"), "'chain_sums' is not a reasoning-gym family; did you mean 'chain_sum'?"),
        (Family(name="chain_sum", params={"min_digit": 1}), "chain_sum has no parameter 'min_digit'; did you mean"),
        (Family(name="chain_sum", params={"seed": 1}), "chain_sum.params.seed cannot be set here"),
        (Family(name="chain_sum", params={"min_terms": 9, "max_terms": 2}), "chain_sum rejects params"),
        (Family(name="chain_sum", params={"min_terms": "two"}), "chain_sum rejects params"),
    ],
)
def test_wrong_families_and_parameters_are_named_at_once(family, problem):
    with pytest.raises(ConfigError) as caught:
        domain(family)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_family_listed_twice_alike_is_an_error_but_not_with_other_parameters():
    with pytest.raises(ConfigError, match="listed twice"):
        domain(sums(), sums())
    mixed = domain(sums(), sums(min_terms=3, max_terms=3))
    assert len({task.id for task in mixed.tasks("train")}) == 6


def test_a_stored_task_can_be_played_by_another_domain_object():
    made = domain(sums())
    stored = Task.model_validate_json(made.tasks("test")[0].model_dump_json())
    environment = domain(Family(name="spell_backward")).start(stored)
    assert environment.step(f"It is {environment.entry['answer']}.").reward == 1.0
    with pytest.raises(DataError, match="generates another text"):
        domain(sums()).start(stored.model_copy(update={"text": "another", "id": "x"}))
    with pytest.raises(DataError, match="name no reasoning-gym family"):
        domain(sums()).start(stored.model_copy(update={"data": {}}))


def test_rambling_right_answers_score_1_and_wrong_ones_0():
    environment, entry = one("chain_sum", **SUMS)
    right = entry["answer"]
    for response in (
        f"The answer to this arithmetic problem is {right}.",
        f"1 + 2 = {right}",
        f"<answer>{right}</answer>",
    ):
        outcome = environment.step(response)
        assert (outcome.reward, outcome.done, outcome.info) == (1.0, True, {"extracted": right})
    wrong = environment.step(f"The answer is {int(right) + 1}.")
    assert (wrong.reward, wrong.info) == (0.0, {"extracted": str(int(right) + 1)})
    nothing = environment.step("I do not know.")
    assert (nothing.reward, nothing.info) == (0.0, {"extracted": None})
    assert "<answer>" in environment.instructions


def test_containing_the_right_answer_or_listing_candidates_earns_nothing():
    environment, entry = one("spell_backward")
    assert environment.step(f"<answer>{entry['answer']}</answer>").reward == 1.0
    assert environment.step(f"<answer>{entry['answer']} or another</answer>").reward == 0.0
    numbers, entry = one("chain_sum", **SUMS)
    assert numbers.step(f"<answer>{entry['answer']}5</answer>").reward == 0.0
    everything = " ".join(str(number) for number in range(-100, 201) if str(number) != entry["answer"])
    assert numbers.step(f"{entry['answer']} {everything}").reward == 0.0


def test_scorers_that_accept_wrong_answers_are_replaced():
    flips, entry = one("coin_flip")
    assert flips.step("0").reward == 0.0
    assert flips.step(entry["answer"]).reward == 1.0
    life, entry = one("game_of_life_halting")
    wrong = {"True": "False", "False": "True"}[entry["answer"]]
    assert life.step(f"<answer>{wrong}</answer>").reward == 0.0
    assert life.step(f"<answer>{entry['answer']}</answer>").reward == 1.0


def test_a_scorer_that_raises_is_a_recorded_failure():
    environment, _ = one("prime_factorization")
    outcome = environment.step("<answer>two times two</answer>")
    assert (outcome.reward, outcome.info["scorer_error"]) == (0.0, "ValueError")


@pytest.mark.parametrize("family", sorted(LITERALS_EXECUTED | FORMULAS_EXECUTED))
def test_an_answer_is_never_executed(family, tmp_path):
    mark = tmp_path / "executed"
    attack = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    params = {"n": 4, "min_remove": 1, "max_remove": 2} if family == "n_queens" else {}
    if family in HASH_DEPENDENT:
        assert not harmless(attack, family)
        return
    environment, entry = one(family, **params)
    for answer in (attack, f"[{attack}]", f"open({str(mark)!r}, 'w')", f"(lambda: {attack})()"):
        outcome = environment.step(f"<answer>{answer}</answer>")
        assert (outcome.reward, outcome.info["refused"]) == (0.0, True)
    assert not mark.exists()
    assert environment.step(f"<answer>{entry['answer']}</answer>").reward == 1.0


def test_formulas_that_take_forever_are_refused_and_usual_ones_are_not():
    for deadly in ("9**9**9", "9**(64*64*64*64)", "(9**64)**64", "2**99999", "9**(64/(1/64))", "1+" * 300 + "1", "5!"):
        assert not harmless(deadly, "countdown"), deadly
    for usual in ("82 + 20 + 67 - 50", "4*(8 - 6)/2", "2*(-10*x - 10)**(3/2)/3 + C", "-exp(x)*sin(3*x) + C", "x**-2"):
        assert harmless(usual, "countdown"), usual
    assert not harmless("1e999999999", "coin_flip")
    assert harmless("1.5e-22", "power_function")


def test_every_family_whose_scorer_executes_text_is_known():
    from reasoning_gym.factory import DATASETS

    executing = set()
    for name, (dataset_class, _) in DATASETS.items():
        if re.search(r"\b(eval|exec|parse_expr|sympify)\(\w*answer", inspect.getsource(dataset_class)):
            executing.add(name)
    assert executing == LITERALS_EXECUTED | FORMULAS_EXECUTED


def test_families_that_depend_on_the_hash_seed_are_refused_without_one(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ConfigError, match="PYTHONHASHSEED=0"):
        domain(Family(name="ransom_note"))
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(domain(Family(name="ransom_note")).tasks("train")) == 6


def test_a_composite_is_scored_by_the_family_each_task_came_from():
    specs = [{"name": "chain_sum", "weight": 1.0, "config": SUMS}, {"name": "coin_flip", "weight": 1.0, "config": {}}]
    made = domain(Family(name="composite", params={"datasets": specs}), train_size=8)
    environments = [made.start(task) for task in made.tasks("train")]
    assert {environment.family for environment in environments} == {"chain_sum", "coin_flip"}
    assert all(environment.step(f"It is {environment.entry['answer']}").reward == 1.0 for environment in environments)


def names_of_all_families():
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return []
    return sorted(set(DATASETS) - {"composite"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # sympy and figlet warn as they please
def test_in_every_family_the_right_answer_scores_1_and_tasks_survive_storage(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    refused = set()
    for name in names_of_all_families():
        made = domain(Family(name=name), train_size=3, test_size=2)
        for task in made.tasks("train") + made.tasks("test"):
            assert json.loads(json.dumps(task.data)) == task.data
            environment = domain(Family(name=name), train_size=3, test_size=2).start(task)
            outcome = environment.step(f"I think so.\n<answer>{environment.entry['answer']}</answer>")
            # A tenth of intermediate_integration state an unevaluated integral; to allow that is to let the model
            # answer with the question.
            if outcome.reward != 1.0 and "Integral(" not in str(environment.entry["answer"]):
                refused.add(name)
            assert 0 <= outcome.reward <= 1
            empty = environment.step("")
            assert (empty.reward, empty.info) == (0.0, {"extracted": None})
    assert refused == WITHOUT_ANSWER


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_numeric_families_are_those_whose_every_answer_is_a_number(monkeypatch):
    from reasoning_gym.factory import create_dataset

    found = set()
    for name in names_of_all_families():
        dataset = create_dataset(name, seed=5, size=500)
        answers = (dataset[i]["answer"] for i in range(25))
        if all(
            isinstance(a, str) and re.fullmatch(r"[-+$]?[\d.,]+(e[-+]?\d+)?", a) and last_number(a) for a in answers
        ):
            found.add(name)
    assert found == NUMERIC
    assert {"coin_flip"} == ACCEPT_WRONG_ANSWERS & NUMERIC
