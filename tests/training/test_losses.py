"""The loss against numbers on paper, a slow twin written as loops, and what must not change it."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from latentmem.training.losses import LossType, group_advantages, importance_weights, lmpo_loss

TYPES: tuple[LossType, ...] = ("grpo", "bnpo", "dapo", "dr_grpo")
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
PLUS_MINUS = torch.tensor([1.0, -1.0])


def loss_of(logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **kwargs) -> Tensor:
    return lmpo_loss(logps, old, advantages, mask, **{"max_response_tokens": 4, **kwargs})[0]


def with_ratios(ratios: list[list[float]]) -> tuple[Tensor, Tensor]:
    """logps and old_logps [B, T] float64 of these ratios."""
    wanted = torch.tensor(ratios, dtype=torch.float64)
    old = torch.linspace(-2, -1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    return (old + wanted.log()).requires_grad_(), old


def random_batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """B=5 messages of 1 to 6 tokens, T=6; ratios on both sides of every edge, none near one."""
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.tensor([-0.9, -0.4, -0.1, 0.0, 0.1, 0.4, 0.9], dtype=dtype)
    lengths = torch.tensor([6, 1, 3, 5, 2])
    mask = torch.arange(6) < lengths[:, None]
    old = -3 * torch.rand(5, 6, generator=generator, dtype=dtype)
    logps = old + gaps[torch.randint(7, (5, 6), generator=generator)]
    reference = old + 0.3 * torch.randn(5, 6, generator=generator, dtype=dtype)
    advantages = torch.tensor([1.5, -0.7, 0.2, -1.1, 0.9], dtype=dtype)
    sampled = old + 0.4 * torch.randn(5, 6, generator=generator, dtype=dtype)
    return {
        "logps": logps, "old": old, "advantages": advantages, "mask": mask, "reference": reference, "sampled": sampled
    }  # fmt: skip


def slow_twin(
    batch: dict[str, Tensor],
    loss_type: str,
    low: float,
    high: float,
    delta: float | None,
    beta: float,
    limit: int,
    cap: float | None = None,
) -> float:
    """Section 3 of the specification, token by token."""
    message_means, total, num_tokens = [], 0.0, 0
    for i in range(len(batch["logps"])):
        losses = []
        for t in range(batch["logps"].shape[1]):
            if not batch["mask"][i, t]:
                continue
            logp, advantage = float(batch["logps"][i, t]), float(batch["advantages"][i])
            ratio = math.exp(logp - float(batch["old"][i, t]))
            inside = min(max(ratio, 1 - low), 1 + high)
            outside = ratio if delta is None else min(ratio, delta)
            loss = -min(outside * advantage, inside * advantage)
            if beta:
                gap = float(batch["reference"][i, t]) - logp
                loss += beta * (math.exp(gap) - gap - 1)
            if cap is not None:
                loss *= min(math.exp(float(batch["old"][i, t]) - float(batch["sampled"][i, t])), cap)
            losses.append(loss)
        message_means.append(sum(losses) / len(losses))
        total += sum(losses)
        num_tokens += len(losses)
    if loss_type == "grpo":
        return sum(message_means) / len(message_means)
    return total / (len(message_means) * limit if loss_type == "dr_grpo" else num_tokens)


@pytest.mark.parametrize(("loss_type", "expected"), [("grpo", 0.0), ("bnpo", -0.5), ("dapo", -0.5), ("dr_grpo", -0.25)])
def test_two_messages_of_three_and_one_tokens_give_the_numbers_on_paper(loss_type: LossType, expected: float) -> None:
    logps = torch.full((2, 4), -1.3)
    assert_close(loss_of(logps, logps, PLUS_MINUS, MASK, loss_type=loss_type), torch.tensor(expected))


def test_counts_of_the_whole_step_divide_a_micro_batch() -> None:
    logps = torch.full((2, 4), -1.3)
    whole = {"num_messages": 8, "num_tokens": 40}
    # token losses sum to -3 + 1; message means to -1 + 1
    assert_close(loss_of(logps, logps, PLUS_MINUS, MASK, loss_type="dapo", **whole), torch.tensor(-2 / 40))
    assert_close(loss_of(logps, logps, PLUS_MINUS, MASK, loss_type="dr_grpo", **whole), torch.tensor(-2 / 32))
    up = torch.tensor([1.0, 3.0])
    assert_close(loss_of(logps, logps, up, MASK, loss_type="grpo", **whole), torch.tensor(-4 / 8))
    assert_close(loss_of(logps, logps, up, MASK, loss_type="bnpo", **whole), torch.tensor(-6 / 4))


@pytest.mark.parametrize(
    ("loss_type", "counts"),
    [("grpo", [[6, 6, 6], [2]]), ("bnpo", [[4, 4, 4], [4]]), ("dapo", [[4, 4, 4], [4]]), ("dr_grpo", [[8] * 3, [8]])],
)
def test_gradient_at_ratio_one_is_minus_a_over_n_and_exactly_zero_in_padding(
    loss_type: LossType, counts: list[list[int]]
) -> None:
    logps = torch.full((2, 4), -1.3, requires_grad=True)
    loss_of(logps, logps.detach(), PLUS_MINUS, MASK, loss_type=loss_type).backward()
    expected = torch.zeros(2, 4)
    for i, row in enumerate(counts):
        for t, n in enumerate(row):
            expected[i, t] = -PLUS_MINUS[i] / n
    assert_close(logps.grad, expected)
    assert (logps.grad[~MASK] == 0).all()


# Rows: ratio below, inside and above the band 0.8 to 1.3. The minimum keeps the gradient wherever the ratio has moved
# against the advantage.
@pytest.mark.parametrize(
    ("advantage", "ratio", "flows", "loss"),
    [
        (2.0, 0.5, True, -1.0),
        (2.0, 1.1, True, -2.2),
        (2.0, 1.7, False, -2.6),
        (-2.0, 0.5, False, 1.6),
        (-2.0, 1.1, True, 2.2),
        (-2.0, 1.7, True, 3.4),
    ],
)
def test_in_which_of_the_six_cells_gradient_flows(advantage: float, ratio: float, flows: bool, loss: float) -> None:
    logps, old = with_ratios([[ratio]])
    value, stats = lmpo_loss(
        logps, old, torch.tensor([advantage]), torch.tensor([[True]]), epsilon_low=0.2, epsilon_high=0.3
    )
    value.backward()
    assert float(value.detach()) == pytest.approx(loss, abs=1e-12)
    assert logps.grad.item() == pytest.approx(-advantage * ratio if flows else 0.0, abs=1e-12)
    assert int(stats["clipped"]) == (not flows)


def test_delta_bounds_the_loss_of_a_negative_advantage_and_stops_its_gradient() -> None:
    logps, old = with_ratios([[1.9, 2.6]])
    one = torch.tensor([-2.0])
    value, stats = lmpo_loss(logps, old, one, torch.tensor([[True, True]]), delta=2.0)
    value.backward()
    assert float(value.detach()) == pytest.approx((2 * 1.9 + 2 * 2.0) / 2)
    assert_close(logps.grad, torch.tensor([[1.9, 0.0]], dtype=torch.float64))
    assert int(stats["clipped"]) == 1
    assert float(loss_of(logps.detach(), old, -one, torch.tensor([[True, True]]), delta=2.0)) == pytest.approx(-2 * 1.2)


def test_kl_term_is_exp_r_minus_r_minus_one_and_its_gradient_pulls_back() -> None:
    logps = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-1.5, -1.6]], dtype=torch.float64)
    zero, mask = torch.zeros(1, dtype=torch.float64), torch.tensor([[True, True]])
    value, stats = lmpo_loss(logps, logps.detach(), zero, mask, beta=0.5, ref_logps=reference)
    value.backward()
    kl = [math.exp(-0.5) + 0.5 - 1, math.exp(0.4) - 0.4 - 1]
    assert float(stats["kl"]) == pytest.approx(sum(kl))
    assert float(value.detach()) == pytest.approx(0.5 * sum(kl) / 2)
    # Above the reference the descent direction is down, below it is up.
    assert_close(logps.grad, torch.tensor([[0.25 * (1 - math.exp(-0.5)), 0.25 * (1 - math.exp(0.4))]]).double())


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("delta", [None, 1.9])
@pytest.mark.parametrize("loss_type", TYPES)
def test_equals_the_slow_twin_and_its_gradient_the_finite_differences(
    loss_type: LossType, delta: float | None, beta: float
) -> None:
    batch = random_batch()

    def fast(logps: Tensor) -> Tensor:
        return loss_of(
            logps,
            batch["old"],
            batch["advantages"],
            batch["mask"],
            loss_type=loss_type,
            epsilon_low=0.2,
            epsilon_high=0.25,
            delta=delta,
            beta=beta,
            ref_logps=batch["reference"] if beta else None,
            max_response_tokens=7,
        )

    expected = slow_twin(batch, loss_type, 0.2, 0.25, delta, beta, 7)
    assert float(fast(batch["logps"])) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(fast, batch["logps"].clone().requires_grad_())


@pytest.mark.parametrize("loss_type", TYPES)
def test_weighed_loss_equals_the_slow_twin_and_its_gradient_the_finite_differences(loss_type: LossType) -> None:
    batch = random_batch()
    weights = importance_weights(batch["old"], batch["sampled"], 1.3)
    assert (weights == 1.3).sum() > 3
    assert (weights < 1).sum() > 3

    def fast(logps: Tensor) -> Tensor:
        return loss_of(
            logps,
            batch["old"],
            batch["advantages"],
            batch["mask"],
            loss_type=loss_type,
            delta=1.9,
            beta=0.3,
            ref_logps=batch["reference"],
            weights=weights,
            max_response_tokens=7,
        )

    expected = slow_twin(batch, loss_type, 0.2, 0.2, 1.9, 0.3, 7, cap=1.3)
    assert float(fast(batch["logps"])) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(fast, batch["logps"].clone().requires_grad_())


def test_weights_on_paper_are_exp_of_the_gap_up_to_the_cap_and_carry_no_gradient() -> None:
    scored = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    sampled = scored.detach() - torch.tensor([[0.5, 2.0, 0.25]]).log()
    weights = importance_weights(scored, sampled, 1.5)
    assert_close(weights, torch.tensor([[0.5, 1.5, 0.25]]))
    assert not weights.requires_grad


def test_a_weight_multiplies_the_loss_and_the_gradient_of_its_token_and_no_count() -> None:
    logps = torch.full((2, 4), -1.3, requires_grad=True)
    weights = torch.tensor([[0.5, 2.0, 1.0, 9.0], [0.25, 9.0, 9.0, 9.0]])
    value, stats = lmpo_loss(logps, logps.detach(), PLUS_MINUS, MASK, weights=weights)
    value.backward()
    assert_close(value.detach(), torch.tensor((-3.5 + 0.25) / 4))
    assert_close(logps.grad, torch.tensor([[-0.5, -2.0, -1.0, 0.0], [0.25, 0.0, 0.0, 0.0]]) / 4)
    assert (int(stats["tokens"]), float(stats["ratio_max"])) == (4, 1.0)


@pytest.mark.parametrize("poison", [1e4, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("loss_type", TYPES)
def test_poison_in_padding_moves_nothing(loss_type: LossType, poison: float) -> None:
    batch = random_batch()

    def value_gradient_stats(**changed: Tensor) -> list[Tensor]:
        now = {**batch, **changed}
        logps = now["logps"].clone().requires_grad_()
        loss, stats = lmpo_loss(
            logps,
            now["old"],
            now["advantages"],
            now["mask"],
            loss_type=loss_type,
            beta=0.2,
            delta=1.5,
            ref_logps=now["reference"],
            weights=importance_weights(now["old"], now["sampled"], 1.4),
            max_response_tokens=6,
        )
        loss.backward()
        return [loss.detach(), logps.grad, *stats.values()]

    clean = value_gradient_stats()
    for names in (["logps"], ["old"], ["reference"], ["sampled"], ["logps", "old", "reference", "sampled"]):
        poisoned = {name: torch.where(batch["mask"], batch[name], poison) for name in names}
        for found, expected in zip(value_gradient_stats(**poisoned), clean, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("loss_type", TYPES)
def test_more_padding_and_another_order_of_rows_change_nothing(loss_type: LossType) -> None:
    batch = random_batch()
    arguments = [batch[name] for name in ("logps", "old", "advantages", "mask")]
    expected = loss_of(*arguments, loss_type=loss_type)
    wider = [torch.nn.functional.pad(x, (0, 3)) if x.ndim == 2 else x for x in arguments]
    assert_close(loss_of(*wider, loss_type=loss_type), expected, rtol=1e-14, atol=0)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert_close(loss_of(*[x[order] for x in arguments], loss_type=loss_type), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss_type", TYPES)
def test_micro_batches_accumulate_to_the_whole_except_for_bnpo(loss_type: LossType) -> None:
    batch = random_batch()
    whole = {"num_messages": 5, "num_tokens": int(batch["mask"].sum())}

    def gradient(cuts: list[int]) -> Tensor:
        logps = batch["logps"].clone().requires_grad_()
        parts = list(pairwise(cuts))
        for start, end in parts:
            rows = slice(start, end)
            loss = loss_of(
                logps[rows],
                batch["old"][rows],
                batch["advantages"][rows],
                batch["mask"][rows],
                loss_type=loss_type,
                **whole,
            )
            (loss / len(parts) if loss_type == "bnpo" else loss).backward()
        return logps.grad

    once, split = gradient([0, 5]), gradient([0, 1, 3, 5])
    if loss_type == "bnpo":
        assert (once - split).abs().max() > 1e-2
    else:
        assert_close(split, once, rtol=1e-13, atol=0)


def test_stats_count_tokens_and_the_largest_ratio() -> None:
    logps, old = with_ratios([[1.5, 0.4, 9.0], [0.9, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    _, stats = lmpo_loss(logps, old, PLUS_MINUS, mask)
    assert {key: round(float(value), 9) for key, value in stats.items()} == {
        "tokens": 3,
        "clipped": 1,
        "kl": 0,
        "ratio_max": 1.5,
    }
    assert not any(value.requires_grad for value in stats.values())


def test_advantages_by_hand() -> None:
    # mean 0.5, sample deviations sqrt(1/3) and 1/2
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.25, 0.0, 1.25, 0.5]])
    first = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    deviation = math.sqrt((0.25**2 + 0.5**2 + 0.75**2) / 3)
    second = [x / (deviation + 1e-4) for x in (-0.25, -0.5, 0.75, 0.0)]
    assert_close(group_advantages(rewards), torch.tensor([[first, -first, -first, first], second]))
    assert_close(group_advantages(rewards, scale=False)[1], torch.tensor([-0.25, -0.5, 0.75, 0.0]))


@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_give_exactly_zero_even_where_their_mean_rounds(scale: bool) -> None:
    rewards = torch.tensor([[0.1] * 7, [0.3] * 7, [1.0] * 7])
    assert (group_advantages(rewards, scale) == 0).all()


def test_wrong_shapes_are_told_with_what_was_found() -> None:
    two = torch.zeros(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"advantages \[B\], found \[2, 3\], \[2, 3\], \[2, 3\] and \[3\]"):
        lmpo_loss(two, two, torch.zeros(3), mask)
    with pytest.raises(ValueError, match=r"expected weights \[2, 3\] as the logps, found \[3\]"):
        lmpo_loss(two, two, torch.zeros(2), mask, weights=torch.zeros(3))
    with pytest.raises(ValueError, match=r"bool mask, found torch.float32"):
        lmpo_loss(two, two, torch.zeros(2), mask.float())
    with pytest.raises(ValueError, match="needs ref_logps"):
        lmpo_loss(two, two, torch.zeros(2), mask, beta=0.1)
    with pytest.raises(ValueError, match="needs max_response_tokens"):
        lmpo_loss(two, two, torch.zeros(2), mask, loss_type="dr_grpo")
    with pytest.raises(ValueError, match=r"G >= 2\], found \[4, 1\]"):
        group_advantages(torch.zeros(4, 1))
