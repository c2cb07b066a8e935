"""The parts of policy-gradient losses for language models, each once: advantages, ratios, clips, KL, normalisations.

Shapes: B completions of up to T tokens. `log_probs`, `old_log_probs` (of the policy that sampled) and `ref_log_probs`
are (B, T); `completion_mask` is (B, T), 1 on tokens that count; `advantages` is (B,) or (B, T). Completions of one
prompt are neighbours. Everything works in the dtype it is given.

Papers: PPO arXiv 1707.06347, DeepSeekMath (GRPO) 2402.03300, RLOO 2402.14740, DAPO 2503.14476, Dr. GRPO 2503.20783,
GSPO 2507.18071, CISPO 2506.13585, SAPO 2511.20347, LUSPO 2602.05261, VESPO 2602.10693, two-sided clip 2505.07291.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

STD_EPSILON = 1e-4
"""Added to every standard deviation that divides, as TRL does; the papers divide by the deviation alone."""

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


# Advantages


def _std(values: Tensor, dim: int | None = None) -> Tensor:
    """Sample standard deviation (n - 1) without NaNs; NaN where fewer than two values are left."""
    import torch

    mean = torch.nanmean(values, dim=dim, keepdim=True)
    count = (~torch.isnan(values)).sum(dim=dim, keepdim=True)
    squares = torch.nansum((values - mean) ** 2, dim=dim, keepdim=True)
    return torch.where(count > 1, squares / (count - 1), torch.nan).sqrt()


def group_advantages(
    rewards: Tensor, num_generations: int, *, scale_rewards: str = "group", epsilon: float = STD_EPSILON
) -> Tensor:
    """Rewards less their group's mean, divided by a deviation: the group's, the batch's, or none.

    "group" is GRPO (DeepSeekMath section 4.1.2) and DAPO equation 9; "none" is Dr. GRPO (section 3.2).

    Args:
        rewards: (B,); NaN where no reward applies: out of means and deviations, advantage 0.
        num_generations: completions a prompt, the group size G; B divides by it.
        scale_rewards: "group", "batch" or "none".
        epsilon: added to the deviation.

    Returns:
        (B,)
    """
    import torch

    groups = rewards.view(-1, num_generations)
    advantages = groups - torch.nanmean(groups, dim=1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (_std(groups, dim=1) + epsilon)
    elif scale_rewards == "batch":
        advantages = advantages / (_std(rewards.reshape(-1)) + epsilon)
    return torch.nan_to_num(advantages.reshape(-1), nan=0.0)


def leave_one_out_advantages(
    rewards: Tensor, num_generations: int, *, normalize: bool = False, epsilon: float = STD_EPSILON
) -> Tensor:
    """Each reward less the mean of its group's other rewards (RLOO section 2.3): G / (G - 1) times the centred reward.

    Args:
        rewards: (B,), the KL penalty already in them; NaN where no reward applies.
        num_generations: completions a prompt.
        normalize: bring the batch's advantages to mean 0 and deviation 1.
        epsilon: added to that deviation.

    Returns:
        (B,)
    """
    import torch

    groups = rewards.view(-1, num_generations)
    others = torch.nansum(groups, dim=1, keepdim=True) - groups
    count = (~torch.isnan(groups)).sum(dim=1, keepdim=True) - 1
    advantages = (groups - others / count).reshape(-1)
    if normalize:
        advantages = (advantages - torch.nanmean(advantages)) / (_std(advantages) + epsilon)
    return torch.nan_to_num(advantages, nan=0.0, posinf=0.0, neginf=0.0)


def kl_in_reward(
    rewards: Tensor, old_log_probs: Tensor, ref_log_probs: Tensor, completion_mask: Tensor, *, beta: float
) -> Tensor:
    """Rewards less beta times the log-ratio of whole completions to the reference (RLOO, PPO); (B,)."""
    return rewards - beta * (kl_k1(old_log_probs, ref_log_probs) * completion_mask).sum(-1)


# Ratios, clips, KL


def log_ratios(log_probs: Tensor, old_log_probs: Tensor, completion_mask: Tensor, *, level: str = "token") -> Tensor:
    """Log of the importance ratio to the policy that sampled.

    Args:
        level: "token": (B, T), of each token (DAPO equation 9); "sequence": (B, 1), the mean over a completion's
            tokens (GSPO equation 7); "product": (B, 1), the sum, which is the ratio of whole completions (RLOO).
    """
    ratio = log_probs - old_log_probs
    if level == "token":
        return ratio
    total = (ratio * completion_mask).sum(-1, keepdim=True)
    return total if level == "product" else total / completion_mask.sum(-1, keepdim=True).clamp(min=1)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """- min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A): PPO equation 7, clip-higher as DAPO equation 8.

    Args:
        ratio, advantages: broadcast against each other.
        epsilon_high: the range above 1; None: epsilon.
        delta: an upper bound of the unclipped ratio too, so that a negative advantage cannot push without end
            (two-sided clip, arXiv 2505.07291).
    """
    import torch

    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def kl_k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """log p - log p_ref: unbiased for KL(policy || reference), and of either sign."""
    return log_probs - ref_log_probs


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """p_ref / p - log(p_ref / p) - 1 >= 0: unbiased for KL(policy || reference) (DeepSeekMath equation 4)."""
    ratio = ref_log_probs - log_probs
    return ratio.exp() - ratio - 1


def high_entropy_mask(entropies: Tensor, completion_mask: Tensor, *, top_quantile: float) -> Tensor:
    """The `top_quantile` share of the counted tokens with the highest entropy, as a boolean (B, T) (2506.01939)."""
    import torch

    counted = entropies[completion_mask.bool()]
    if not counted.numel():
        return torch.zeros_like(entropies, dtype=torch.bool)
    return (entropies >= torch.quantile(counted, 1 - top_quantile)) & completion_mask.bool()


# The loss


def token_losses(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, completion_mask: Tensor, *, loss_type: str = "grpo",
    level: str = "token", epsilon: float = 0.2, epsilon_high: float | None = None, delta: float | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    vespo: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0),
) -> Tensor:
    """The policy term of each token, without KL: (B, T), or (B, 1) where one ratio serves a sequence.

    Args:
        loss_type: one of LOSS_TYPES. "cispo" weighs log-probs by the ratio cut at `epsilon_high` (no 1 is added);
            "sapo" puts a sigmoid in place of the clip; "vespo" weighs log-probs by a gamma function of the whole
            completion's ratio; the others are `clipped_surrogate` and differ in `aggregate`.
        level: as in `log_ratios`.
        sapo_temperatures: for positive advantages and for the others.
        vespo: (k, lambda) for advantages >= 0, then for the others.
    """
    import torch

    advantages = advantages if advantages.dim() > 1 else advantages.unsqueeze(1)
    ratio = log_ratios(log_probs, old_log_probs, completion_mask, level=level).exp()
    if loss_type == "cispo":
        top = epsilon if epsilon_high is None else epsilon_high
        return -ratio.clamp(max=top).detach() * advantages * log_probs
    if loss_type == "sapo":
        temperature = torch.where(advantages > 0, *sapo_temperatures)
        return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages
    if loss_type == "vespo":
        return -_gamma_weight(log_probs, old_log_probs, advantages, completion_mask, vespo) * advantages * log_probs
    return clipped_surrogate(ratio, advantages, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta)


def _gamma_weight(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, completion_mask: Tensor,
    shape: tuple[float, float, float, float],
) -> Tensor:
    """w^k exp(lambda (1 - w)) of the whole completion's ratio w, without gradient: (B, 1)."""
    import torch

    k_pos, lambda_pos, k_neg, lambda_neg = shape
    log_w = ((log_probs - old_log_probs).detach().clamp(-20, 20) * completion_mask).sum(-1, keepdim=True)
    log_w = log_w.clamp(math.log(1e-8), 20)
    k, rate = torch.where(advantages >= 0, k_pos, k_neg), torch.where(advantages >= 0, lambda_pos, lambda_neg)
    return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0)


def aggregate(
    losses: Tensor, completion_mask: Tensor, *, loss_type: str, max_completion_length: int | None = None,
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """One number from the losses of tokens; what the published methods differ in most.

    | loss_type | divides by |
    |---|---|
    | grpo, sapo | each completion's own tokens, then the completions (DeepSeekMath equation 3) |
    | bnpo | the tokens of these completions |
    | dapo, cispo, vespo | the tokens of the whole accumulation window (DAPO equation 12) |
    | dr_grpo | completions x max_completion_length, a constant (Dr. GRPO section 3.2) |
    | luspo | the completions; each weighs as much as it is long |

    Args:
        losses: (B, T), or (B, 1) that stands for every token.
        max_completion_length: for dr_grpo.
        num_items_in_batch: tokens of the window, for dapo, cispo and vespo; None: these completions are all of it.
    """
    total = losses * completion_mask
    if loss_type in ("grpo", "sapo"):
        return (total.sum(-1) / completion_mask.sum(-1).clamp(min=1)).mean()
    if loss_type == "luspo":
        return total.sum(-1).mean()
    if loss_type == "dr_grpo":
        assert max_completion_length is not None
        return total.sum() / (total.shape[0] * max_completion_length)
    if loss_type == "bnpo" or num_items_in_batch is None:
        num_items_in_batch = completion_mask.sum().clamp(min=1)
    return total.sum() / num_items_in_batch


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, completion_mask: Tensor, *, loss_type: str,
    level: str = "token", epsilon: float = 0.2, epsilon_high: float | None = None, delta: float | None = None,
    beta: float = 0.0, ref_log_probs: Tensor | None = None, kl_times_ratio: bool = False,
    token_filter: Tensor | None = None, max_completion_length: int | None = None,
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """The loss of a batch: `aggregate(token_losses + beta * kl_k3)`, a scalar.

    Args:
        beta, ref_log_probs: weight of the KL to the reference and the reference's log-probs; beta 0 needs none.
        kl_times_ratio: multiply the KL by the importance ratio (arXiv 2512.02556), which changes its gradient even
            where the ratio is 1.
        token_filter: (B, T), 1 on tokens whose policy term counts (`high_entropy_mask`); KL counts everywhere.
        The rest as in `token_losses` and `aggregate`.
    """
    losses = token_losses(
        log_probs, old_log_probs, advantages, completion_mask, loss_type=loss_type, level=level, epsilon=epsilon,
        epsilon_high=epsilon_high, delta=delta)
    if token_filter is not None:
        losses = losses * token_filter
    if beta:
        assert ref_log_probs is not None
        kl = kl_k3(log_probs, ref_log_probs)
        if kl_times_ratio:
            kl = kl * log_ratios(log_probs, old_log_probs, completion_mask, level=level).exp()
        losses = losses + beta * kl
    return aggregate(losses, completion_mask, loss_type=loss_type, max_completion_length=max_completion_length,
                     num_items_in_batch=num_items_in_batch)


def soft_overlong_punishment(
    lengths: Sequence[int], *, max_completion_length: int, overlong_buffer_len: int
) -> list[float]:
    """0 up to the buffer, then linearly down to -1 at the longest completion (DAPO equation 13).

    Args:
        lengths: tokens of each completion.
        max_completion_length: L_max, the buffer included.
        overlong_buffer_len: L_cache, the last tokens in which the punishment grows; 0: only beyond L_max.
    """
    start = max_completion_length - overlong_buffer_len
    return [
        -1.0 if length > max_completion_length else min(0.0, (start - length) / overlong_buffer_len)
        if overlong_buffer_len else 0.0 for length in lengths
    ]
