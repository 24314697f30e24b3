"""What rollouts teach: advantages by hand and against a slow version, of the team and of single roles."""

import logging
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmem.processes import Processes
from latentmem.training.losses import group_advantages
from latentmem.training.signal import SILENT_STEPS, TEAM, Silence, measure, signal_of
from latentmem.trajectory import Message, Recalled, Step, Task, Trajectory


def message(role):
    return Message(
        role=role, system="s", user="u", response=role, token_ids=(5, 2), logps=(-0.5, -0.1), finish="stop",
        temperature=1.0, num_prompt_tokens=3, recalled=Recalled(kind="none"),
    )  # fmt: skip


def episode(reward, roles=("a", "b"), error=None, **rewards):
    return Trajectory(
        task=Task(id="1", domain="d", text="t"),
        team="x",
        model="m",
        steps=(Step(messages=tuple(map(message, roles)), action="", observation="", info={"extracted": "x"}),),
        reward=reward,
        success=reward == 1,
        error=error,
        seed=0,
        rewards=rewards,
    )


def taught(group, scale=True):
    """Role and advantage of each message that teaches something, rounded."""
    return [(m.role, round(a, 3)) for found in signal_of([group], scale) for m, a in found.messages()]


def test_by_hand_the_team_s_reward_is_that_of_all_roles():
    # Rewards 1 and 0: mean 0.5, deviation 0.7071; 0.5 / 0.7072 = 0.707.
    assert taught([episode(1.0), episode(0.0)]) == [("a", 0.707), ("b", 0.707), ("a", -0.707), ("b", -0.707)]
    assert taught([episode(1.0), episode(0.0)], scale=False) == [("a", 0.5), ("b", 0.5), ("a", -0.5), ("b", -0.5)]


def test_by_hand_a_role_s_own_reward_stands_in_place_of_the_team_s():
    # Role a: 0.2, 1.0 -> mean 0.6. Role b has the team's: 1, 0.
    assert taught([episode(1.0, a=0.2), episode(0.0, a=1.0)], scale=False) == [
        ("a", -0.4), ("b", 0.5), ("a", 0.4), ("b", -0.5)
    ]  # fmt: skip


def test_by_hand_where_only_some_rollouts_tell_a_role_s_reward_the_others_have_the_team_s():
    # Role a: 0.2, and the team's 0 -> mean 0.1.
    assert taught([episode(1.0, a=0.2), episode(0.0)], scale=False) == [
        ("a", 0.1), ("b", 0.5), ("a", -0.1), ("b", -0.5)
    ]  # fmt: skip


def test_a_group_carries_signal_if_any_role_s_rewards_differ_and_only_that_role_learns():
    assert taught([episode(0.0, b=1.0), episode(0.0, b=0.5)], scale=False) == [("b", 0.25), ("b", -0.25)]
    assert taught([episode(1.0, a=0.5, b=0.5), episode(0.0, a=0.5, b=0.5)]) == []
    assert taught([episode(0.0), episode(0.0)]) == []


def test_a_rollout_in_which_a_role_is_silent_is_no_rival_of_its_others():
    # Role a spoke in two rollouts: 0.4 and 0.8; the third one's 0 is the team's and not a's.
    group = [episode(0.0, a=0.4), episode(0.0, a=0.8), episode(0.0, ("b",))]
    assert taught(group, scale=False) == [("a", -0.2), ("a", 0.2)]


def test_failed_episodes_are_no_rivals():
    assert taught([episode(1.0), episode(0.0, error="program: exit status 1"), episode(1.0)]) == []


def slow(group):
    """As the formulas say: for each message, its role's reward against those of the role in the other rollouts."""
    fair = [t for t in group if t.error is None]
    result = []
    for trajectory in fair:
        for said in trajectory.messages:
            told = any(said.role in t.rewards for t in fair)
            rivals = [t for t in fair if not told or any(m.role == said.role for m in t.messages)]
            returns = [t.rewards.get(said.role, t.reward) for t in rivals]
            if len(set(returns)) > 1:
                mine = trajectory.rewards.get(said.role, trajectory.reward)
                result.append((said.role, (mine - fmean(returns)) / (stdev(returns) + 1e-4)))
    return result


NUMBERS = st.sampled_from([0.0, 0.25, 0.5, 1.0])
EPISODES = st.builds(
    lambda reward, roles, failed, rewards: episode(reward, roles, "e" if failed else None, **rewards),
    NUMBERS,
    st.lists(st.sampled_from("abc"), max_size=4),
    st.integers(0, 4).map(lambda n: n == 0),
    st.dictionaries(st.sampled_from("ab"), NUMBERS),
)


@settings(deadline=None)
@given(st.lists(EPISODES, min_size=1, max_size=5))
def test_advantages_are_those_of_the_slow_version(group):
    found = [(m.role, a) for kept in signal_of([group], scale=True) for m, a in kept.messages()]
    expected = slow(group)
    assert [role for role, _ in found] == [role for role, _ in expected]
    assert [a for _, a in found] == pytest.approx([a for _, a in expected], abs=1e-4)


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=2, max_size=6), st.booleans())
def test_without_rewards_of_roles_advantages_are_the_group_s_to_the_last_bit(rewards, scale):
    (found,) = signal_of([[episode(r) for r in rewards]], scale) or [None]
    if found is None:
        assert len(set(rewards)) == 1
        return
    assert [only[TEAM] for only in found.advantages] == group_advantages(torch.tensor([rewards]), scale)[0].tolist()


def test_metrics_bear_groups_in_which_nobody_spoke():
    failed = [episode(0.0, (), "program: crashed")] * 2
    metrics = measure([failed], [], Processes())
    assert (metrics["errors"], metrics["truncated"], metrics["response_tokens"]) == (2, 0, 0)


def test_many_steps_without_signal_are_told_once(caplog):
    silence = Silence("lmpo")
    nothing, something = ({"signal_groups": n, "reward": 0.5, "errors": 3} for n in (0, 1))
    with caplog.at_level(logging.WARNING):
        for metrics in [nothing] * (SILENT_STEPS - 1) + [something] + [nothing] * (SILENT_STEPS - 1):
            silence.note(metrics)
        assert not caplog.records
        for _ in range(3 * SILENT_STEPS):
            silence.note(nothing)
    (record,) = caplog.records
    assert "no group had rewards that differ" in record.message
    assert "3 of its episodes ended in an error" in record.message


def without_tokens(trajectory):
    silent = [m.model_copy(update={"token_ids": (), "logps": ()}) for m in trajectory.messages]
    step = trajectory.steps[0].model_copy(update={"messages": (*silent, message("c"))})
    return trajectory.model_copy(update={"steps": (step,)})


def test_messages_without_tokens_teach_nothing_and_are_told_once(caplog):
    group = [without_tokens(episode(1.0)), without_tokens(episode(0.0))]
    found = signal_of([group], scale=False)
    assert [(m.role, a) for m, a in found[0].messages()] == [("c", 0.5), ("c", -0.5)]
    metrics = measure([group], found, Processes())
    assert metrics["without_tokens"] == pytest.approx(4 / 6)
    wholly = [
        t.model_copy(update={"steps": (t.steps[0].model_copy(update={"messages": t.messages[:2]}),)}) for t in group
    ]
    assert signal_of([wholly], scale=False) == []
    silence = Silence("lmpo")
    with caplog.at_level(logging.WARNING):
        silence.note(metrics)
        silence.note(metrics)
    (record,) = caplog.records
    assert "lmpo: 67% of a step's messages have no token ids" in record.message
    assert "nothing is learned from them" in record.message


def test_messages_that_a_text_to_stop_at_cut_teach_as_others_do():
    cut = [
        t.model_copy(update={"steps": (t.steps[0].model_copy(update={"messages": tuple(
            m.model_copy(update={"finish": "cut"}) for m in t.messages)}),)})
        for t in (episode(1.0), episode(0.0))
    ]  # fmt: skip
    assert taught(cut) == taught([episode(1.0), episode(0.0)])
    assert measure([cut], signal_of([cut], scale=True), Processes())["truncated"] == 0
