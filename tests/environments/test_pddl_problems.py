"""Generated problems: solved by the plan they come with, within AgentBoard's thirty turns, never from the start."""

from random import Random

import pytest

from latentmem.environments.pddl import PDDLEnvironment
from latentmem.environments.pddl_language import WORLDS, language
from latentmem.environments.pddl_problems import generate
from latentmem.environments.pddl_world import World

AGENTBOARD_TURNS = 30


def problems(world, size, number):
    return [generate(world, size, Random(f"{world} {size} {i}")) for i in range(number)]


def play(world, problem):
    """Rewards of the plan, said in words."""
    words = language(world)
    text = problem.pddl("drawn", world)
    environment = PDDLEnvironment(World(words.domain, text, domain_file="d", problem_file="p"), words)
    outcomes = [environment.step(words.commands[action.name].of(action)) for action in problem.plan]
    assert [o.info["cause"] for o in outcomes] == [None] * len(outcomes)
    assert [o.done for o in outcomes] == [o.reward == 1 for o in outcomes]
    return [o.reward for o in outcomes]


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("world", WORLDS)
def test_the_plan_reaches_the_goal_and_not_before_its_progress_says_so(world, size):
    for problem in problems(world, size, 2):
        rewards = play(world, problem)
        assert rewards[-1] == 1
        assert rewards == sorted(rewards)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("world", WORLDS)
def test_the_plans_of_many_problems_reach_their_goals(world, size):
    for problem in problems(world, size, 20):
        assert play(world, problem)[-1] == 1


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("world", WORLDS)
def test_plans_fit_into_agentboards_turns_and_no_goal_holds_at_the_start(world, size):
    drawn = problems(world, size, 200)
    assert max(len(problem.plan) for problem in drawn) <= AGENTBOARD_TURNS
    assert all(set(problem.goal) - set(problem.initial) for problem in drawn)
    assert all(len(set(problem.goal)) == len(problem.goal) for problem in drawn)


def test_medium_plans_are_longer_than_small_ones():
    def mean(world, size):
        return sum(len(problem.plan) for problem in problems(world, size, 100)) / 100

    assert all(mean(world, "medium") > 1.4 * mean(world, "small") for world in WORLDS)


def test_a_plan_by_hand_of_two_balls_carried_at_once():
    # The first draw in which two balls make the same way: they are carried together.
    for problem in problems("gripper", "small", 50):
        ways = [(a.objects[0], a.objects[1]) for a in problem.plan if a.name == "move"]
        drops = [a for a in problem.plan if a.name == "drop"]
        if len(drops) == 2 and len(ways) == 1:
            picks = [a.objects[2] for a in problem.plan if a.name == "pick"]
            assert picks == ["left", "right"]
            return
    raise AssertionError("no draw of 50 carried two balls at once")
