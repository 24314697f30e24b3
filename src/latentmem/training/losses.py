"""The mathematics of LMPO (Fu et al. 2026, arXiv 2602.03036, section 4) as functions of tensors: no model, no state."""

from typing import Literal

import torch
from torch import Tensor

from latentmem.config import LMPOSection

DEFAULTS = LMPOSection()
LossType = Literal["grpo", "bnpo", "dapo", "dr_grpo"]


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """Return rewards relative to their group: (R - mean) / (std + 1e-4), std with Bessel's correction.

    Args:
        rewards: [groups, G] float32, G >= 2.
        scale: whether to divide by the standard deviation.

    Returns:
        [groups, G] float32; exactly 0 for a group whose rewards are all equal.

    Raises:
        ValueError: a group has fewer than two rewards.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"expected rewards [groups, G >= 2], found {list(rewards.shape)}")
    rewards = rewards.float()
    centred = rewards - rewards.mean(1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    if scale:
        centred = centred / (rewards.std(1, keepdim=True) + 1e-4)
    return torch.where(equal, torch.zeros_like(centred), centred)  # the mean of equal numbers may be rounded


def importance_weights(scored_logps: Tensor, sampled_logps: Tensor, cap: float) -> Tensor:
    """Return truncated importance weights: min(exp(scored_logps - sampled_logps), cap).

    They correct for tokens that were sampled with slightly other probabilities than training computes for the same
    weights, for example in low precision or by another engine (Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"). Truncation bounds the effect of a rare token, at the price of a bias (Ionides
    2008, "Truncated importance sampling").

    Args:
        scored_logps: of any shape, from the forward pass that training uses, before any update.
        sampled_logps: of the same shape, from sampling.
        cap: the largest weight.

    Returns:
        A tensor of the same shape, without gradient.
    """
    return (scored_logps - sampled_logps).detach().exp().clamp(max=cap)


def lmpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: LossType = DEFAULTS.loss_type,
    epsilon_low: float = DEFAULTS.epsilon_low,
    epsilon_high: float = DEFAULTS.epsilon_high,
    delta: float | None = DEFAULTS.delta,
    beta: float = DEFAULTS.beta,
    ref_logps: Tensor | None = None,
    weights: Tensor | None = None,
    max_response_tokens: int | None = None,
    num_messages: int | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the clipped objective of LMPO, summed over a micro-batch and divided by N.

    A token's loss is -min(ratio * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A) with the
    ratio = exp(logps - old_logps), plus its KL term, all of it times the token's weight.
    N by `loss_type`: `grpo` is the mean over each message's tokens, then over messages; `bnpo` the response tokens of
    this micro-batch; `dapo` those of the whole optimizer step; `dr_grpo` messages x `max_response_tokens`.

    Args:
        logps: [B, T], under the present parameters.
        old_logps: [B, T], at sampling.
        advantages: [B], one per message.
        mask: [B, T] bool, True on response tokens, the closing EOS included.
        loss_type: which N.
        epsilon_low: the ratio is clipped from below at 1 - epsilon_low.
        epsilon_high: the ratio is clipped from above at 1 + epsilon_high.
        delta: upper bound of the unclipped ratio; None for no bound. (Two-sided clip: with a negative advantage, the
            minimum alone bounds nothing.)
        beta: weight of the KL divergence to `ref_logps`, estimated per token as exp(r) - r - 1, r = ref_logps - logps.
        ref_logps: [B, T], under the initial composer; needed if beta > 0.
        weights: [B, T], one per token, taken as constants: `importance_weights` if the tokens were sampled with other
            probabilities than exp(old_logps). None gives every token weight 1.
        max_response_tokens: needed by `dr_grpo`.
        num_messages: messages of the whole optimizer step, over all micro-batches and processes; default B.
        num_tokens: response tokens of the whole optimizer step, for `dapo`; default those of this batch.

    Returns:
        The scalar loss; and statistics of this micro-batch, detached: the number of `tokens` and of those `clipped`,
        the summed `kl` and the largest ratio `ratio_max`.

    Raises:
        ValueError: shapes do not fit, the mask is not bool, `loss_type` is unknown, or a needed argument is missing.
    """
    if not (logps.shape == old_logps.shape == mask.shape) or advantages.shape != logps.shape[:1]:
        raise ValueError(
            "expected logps, old_logps and mask [B, T] and advantages [B], found "
            f"{list(logps.shape)}, {list(old_logps.shape)}, {list(mask.shape)} and {list(advantages.shape)}"
        )
    if weights is not None and weights.shape != logps.shape:
        raise ValueError(f"expected weights {list(logps.shape)} as the logps, found {list(weights.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a bool mask, found {mask.dtype}")
    if beta and ref_logps is None:
        raise ValueError("beta > 0 needs ref_logps")
    zero = torch.zeros((), dtype=logps.dtype, device=logps.device)
    # Padding is cleaned before exp; afterwards 0 * inf would be nan, in the gradient too.
    ratio = torch.where(mask, logps - old_logps, zero).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    advantage = advantages.to(logps.dtype)[:, None]
    token_loss = -torch.minimum(bounded * advantage, clipped * advantage)
    kl = torch.zeros_like(token_loss)
    if ref_logps is not None:
        gap = torch.where(mask, ref_logps - logps, zero)
        kl = gap.exp() - gap - 1
        token_loss = token_loss + beta * kl
    if weights is not None:
        token_loss = token_loss * weights.detach()
    token_loss = torch.where(mask, token_loss, zero)

    counts = mask.sum(1)
    if loss_type == "grpo":
        loss = (token_loss.sum(1) / counts.clamp(min=1)).sum() / (num_messages or len(logps))
    elif loss_type == "bnpo":
        loss = token_loss.sum() / counts.sum().clamp(min=1)
    elif loss_type == "dapo":
        loss = token_loss.sum() / (num_tokens or int(counts.sum().clamp(min=1)))
    elif loss_type == "dr_grpo":
        if max_response_tokens is None:
            raise ValueError("dr_grpo needs max_response_tokens")
        loss = token_loss.sum() / ((num_messages or len(logps)) * max_response_tokens)
    else:
        raise ValueError(f"unknown loss_type {loss_type!r}; known: bnpo, dapo, dr_grpo, grpo")

    with torch.no_grad():
        binds = ((ratio < 1 - epsilon_low) & (advantage < 0)) | ((ratio > 1 + epsilon_high) & (advantage > 0))
        if delta is not None:
            binds = binds | ((ratio > delta) & (advantage < 0))
        stats = {
            "tokens": counts.sum(),
            "clipped": (binds & mask).sum(),
            "kl": torch.where(mask, kl, zero).sum(),
            "ratio_max": torch.where(mask, ratio, zero).max(),
        }
    return loss, stats
