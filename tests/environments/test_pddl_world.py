"""Stepping: agreement with a second library on what can be done and what it leads to, along random walks."""

from pathlib import Path
from random import Random

import pytest

from latentmem.environments.pddl_language import WORLDS, language
from latentmem.environments.pddl_problems import generate
from latentmem.environments.pddl_world import Action, World

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "pddl"


def drawn(world, size="small", number=0):
    problem = generate(world, size, Random(number))
    return World(language(world).domain, problem.pddl("drawn", world), domain_file="d", problem_file="p")


@pytest.mark.parametrize("world", WORLDS)
def test_an_action_is_applicable_exactly_if_nothing_it_needs_is_unmet(world):
    made = drawn(world)
    random, state = Random(1), made.initial
    for _ in range(3):
        applicable = set(made.applicable(state))
        for name, parameters in made.parameters.items():
            for action in made.instances(name, [None] * len(parameters)):
                assert (action in applicable) == (not made.unmet(state, action))
                assert (action in applicable) == (made.apply(state, action) is not None)
        state = made.apply(state, random.choice(sorted(applicable, key=repr)))


@pytest.mark.parametrize("world", WORLDS)
def test_every_action_along_a_walk_is_said_in_words_that_lead_back_to_it(world):
    made, words = drawn(world, "medium"), language(world)
    words.check(made, "our own domain")
    random, state = Random(2), made.initial
    for _ in range(8):
        applicable = made.applicable(state)
        for action in applicable:
            readings = words.read(words.commands[action.name].of(action))
            fitting = [
                candidate
                for command, fields in readings
                for candidate in made.instances(command.action, [fields[a] if a else None for a in command.arguments])
                if made.apply(state, candidate) is not None
            ]
            assert fitting == [action]
        state = made.apply(state, random.choice(applicable))


def test_states_are_equal_if_the_same_facts_hold():
    made = drawn("blockworld")
    action = made.applicable(made.initial)[0]
    back = {"pickup": "putdown", "unstack": "stack"}[action.name]
    held = made.apply(made.initial, action)
    assert held != made.initial
    assert made.apply(held, Action(back, action.objects)) == made.initial


class Plado:
    """The same questions put to plado, which reads the texts by itself."""

    def __init__(self, domain, problem):
        from plado.parser import LookaheadStreamer, parse_domain, parse_problem, tokenize
        from plado.pddl_utils.normalize import normalize_conditions, normalize_effects
        from plado.semantics.applicable_actions_generator import ApplicableActionsGenerator
        from plado.semantics.successor_generator import SuccessorGenerator
        from plado.semantics.task import Task

        parsed = parse_domain(LookaheadStreamer(tokenize(domain))), parse_problem(LookaheadStreamer(tokenize(problem)))
        normalize_conditions(*parsed)
        normalize_effects(parsed[0])
        self.task = Task(*parsed)
        self.initial = self.task.initial_state
        self._applicable = ApplicableActionsGenerator(self.task)
        self._successors = SuccessorGenerator(self.task)

    def applicable(self, state):
        """The actions, each with plado's own name for it."""
        return {
            Action(self.task.actions[i].name, tuple(self.task.objects[o] for o in args)): (i, args)
            for i, args in self._applicable(state)
        }

    def apply(self, state, reference):
        ((after, _),) = self._successors(state, reference)
        return after

    def facts(self, state):
        """Of the predicates that actions change."""
        return {
            (predicate.name, *(self.task.objects[o] for o in args))
            for predicate, atoms in zip(self.task.predicates, state.atoms, strict=False)
            for args in atoms
        }


def walk(ours, theirs, steps, seed):
    random, state, other = Random(seed), ours.initial, theirs.initial
    for _ in range(steps):
        assert {fact for fact in state.facts if fact[0] not in ours.static} == theirs.facts(other)
        applicable = ours.applicable(state)
        references = theirs.applicable(other)
        assert set(applicable) == set(references)
        assert len(applicable) == len(set(applicable))
        action = random.choice(sorted(applicable, key=repr))
        state, other = ours.apply(state, action), theirs.apply(other, references[action])


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_second_library_agrees_along_random_walks_of_generated_problems(world, size):
    pytest.importorskip("plado", reason="plado is not installed; pip install -e '.[dev]'")
    for number in range(3):
        text = generate(world, size, Random(number)).pddl("drawn", world)
        walk(drawn(world, size, number), Plado(language(world).domain, text), 40, number)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_a_second_library_agrees_along_random_walks_of_agentboards_problems(world):
    """plado reads the files themselves, and of tyreworld, which it refuses, the version repaired by hand."""
    pytest.importorskip("plado", reason="plado is not installed; pip install -e '.[dev]'")
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    theirs = SHARED / "strict" if world == "tyreworld" else SHARED
    for number, file in enumerate(sorted((SHARED / world).glob("*.pddl"))):
        domain, problem = (SHARED / f"{world}.pddl").read_text(), file.read_text()
        ours = World(domain, problem, domain_file="d", problem_file=str(file))
        other = Plado((theirs / f"{world}.pddl").read_text(), (theirs / world / file.name).read_text())
        walk(ours, other, 25, number)
