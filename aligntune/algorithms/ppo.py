"""Proximal policy optimisation with a critic and a KL penalty in the reward, as in Ziegler et al. 2019.

Shapes: B completions of up to T tokens, padded on the right. `log_probs`, `values`, `rewards` and `advantages` are
(B, T); entry t belongs to the t-th token of the completion, and `values[:, t]` is the critic's estimate before that
token is chosen. `completion_mask` is (B, T), 1 on the tokens that count. Everything works in the dtype it is given.

Papers: PPO (Schulman et al. 2017) arXiv 1707.06347, GAE (Schulman et al. 2016) 1506.02438, Ziegler et al. 2019
1909.08593, InstructGPT (Ouyang et al. 2022) 2203.02155.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from aligntune.algorithms.base import ONLINE_DEFAULTS, AlgorithmSpec
from aligntune.algorithms.policy_gradient import kl_k1, kl_k3
from aligntune.core.options import option

if TYPE_CHECKING:
    from torch import Tensor

WHITEN_EPSILON = 1e-8
KL_ERROR_LIMIT = 0.2
"""The proportional error of the adaptive KL coefficient is cut to this, as Ziegler et al. do."""


@dataclass
class PPOOptions:
    num_ppo_epochs: int = option(4, "Passes over each batch of rollouts.", ge=1)
    num_mini_batches: int = option(
        1, "Optimizer steps in a pass; a rollout has batch_size x gradient_accumulation_steps x processes x this many "
        "completions.", ge=1
    )
    cliprange: float = option(0.2, "Clip range of the probability ratio around 1.", gt=0)
    cliprange_value: float | None = option(
        0.2, "Clip range of a value around the rollout's; null does not clip.", gt=0
    )
    vf_coef: float = option(0.1, "Weight of the value loss.", ge=0)
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.", ge=0)
    gamma: float = option(1.0, "Discount of a token's reward, per token.", gt=0, le=1)
    lam: float = option(0.95, "Lambda of the generalised advantage estimate.", ge=0, le=1)
    kl_coef: float = option(
        0.05, "Weight of the KL penalty in the reward (its start, where adaptive); 0 keeps no reference.", ge=0
    )
    kl_estimator: str = option("k1", "Estimate of a token's KL: k1 is log p - log p_ref; k3 is never negative.",
                               choices=("k1", "k3"))
    kl_control: str = option("fixed", "Keep kl_coef, or move it so that the KL of completions comes to kl_goal.",
                             choices=("fixed", "adaptive"))
    kl_goal: float = option(6.0, "KL of a completion, in nats, that an adaptive kl_coef aims at.", gt=0)
    kl_gain: float = option(0.1, "How fast an adaptive kl_coef moves: K_beta of the paper.", gt=0)
    target_kl: float | None = option(
        None, "End a rollout's passes once the approximate KL of the policy to the one that sampled is above this; "
        "null never does.", gt=0
    )
    whiten_rewards: bool = option(False, "Scale rewards to deviation 1 before advantages are estimated.")
    whiten_advantages: bool = option(True, "Bring a rollout's advantages to mean 0 and deviation 1.")
    missing_eos_penalty: float | None = option(
        None, "Taken off the score of a completion that does not end by itself.", ge=0
    )
    value_model_name: str | None = option(
        None, "The critic. null: a value head on the policy's own trunk; 'policy' or 'reward': a model of its own that "
        "starts as a copy of that one; else the model to load.", objects="a transformers model"
    )
    value_learning_rate: float | None = option(None, "Peak learning rate of the critic; null is learning_rate.", ge=0)


SPEC = AlgorithmSpec(
    name="ppo",
    title="Proximal policy optimisation",
    paper="Schulman et al. 2017, arXiv 1707.06347, equations 7, 9 and 11; Ziegler et al. 2019, arXiv 1909.08593",
    options=PPOOptions,
    takes="prompts",
    defaults=MappingProxyType({**ONLINE_DEFAULTS, "learning_rate": 3e-6, "num_generations": 1}),
    online=True,
    needs_reward=True,
    reference=True,
    groups=False,
    without=("num_iterations", "steps_per_generation"),
    differs=(
        "TRL has no PPO since 1.13; names and defaults of the loss are those of its last one (1.12), which sampled 53 "
        "tokens at temperature 0.7, where temperature is 1 here; below, TRL's defaults are those of what it still has",
        "the score stands at the last token of a completion and the state after it is worth 0 (TRL 1.12 put the score "
        "one position later, in a padding token whose value it trained too)",
        "whitening and means go over the tokens of all processes and micro-steps (TRL 1.12: of each process)",
    ),
)


# Rewards


def token_kl(log_probs: Tensor, ref_log_probs: Tensor, *, estimator: str = "k1") -> Tensor:
    """The KL to the reference at each token, estimated from that token: (B, T)."""
    return (kl_k1 if estimator == "k1" else kl_k3)(log_probs, ref_log_probs)


def token_rewards(scores: Tensor, kl: Tensor, completion_mask: Tensor, *, kl_coef: float) -> Tensor:
    """- kl_coef KL at each token, plus the score at the last one (InstructGPT equation 2, after Ziegler et al.).

    Args:
        scores: (B,), of whole completions; that of an empty completion has no token to stand at.
        kl: (B, T), as from `token_kl`.

    Returns:
        (B, T), 0 where the mask is.
    """
    import torch

    lengths = completion_mask.sum(-1, keepdim=True)
    last = torch.arange(1, completion_mask.shape[1] + 1, device=kl.device) == lengths
    penalty = torch.where(completion_mask.bool(), -kl_coef * kl, torch.zeros_like(kl))
    return penalty + last * scores.unsqueeze(-1)


def next_kl_coef(kl_coef: float, kl: float, *, goal: float, gain: float = 0.1) -> float:
    """The adaptive coefficient after a rollout whose completions had the KL `kl` (the controller of Ziegler et al.).

    The error (kl - goal) / goal is cut to +-0.2; the coefficient grows by `gain` times it.
    """
    error = min(max(kl / goal - 1, -KL_ERROR_LIMIT), KL_ERROR_LIMIT)
    return kl_coef * (1 + gain * error)


# Advantages


def generalized_advantages(
    rewards: Tensor, values: Tensor, completion_mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantages and the returns that the critic learns (PPO equations 11 and 12; GAE equation 16).

    The end of a completion is terminal, however it came: the state after the last token is worth 0.

    Returns:
        Advantages and returns (advantages + values), both (B, T) and 0 where the mask is.
    """
    import torch

    mask = completion_mask.to(values.dtype)
    values, rewards = torch.where(mask > 0, values, 0.0), torch.where(mask > 0, rewards, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * following - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, :1]).sum(1)
    for t in reversed(range(deltas.shape[1])):
        running = (deltas[:, t] + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def whiten(
    values: Tensor, completion_mask: Tensor, *, shift_mean: bool = True,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """The counted entries with deviation 1 (sample deviation, n - 1), and mean 0 if `shift_mean`.

    Args:
        reduce: sums a tensor over all processes.

    Returns:
        Like `values`, 0 where the mask is. Fewer than two entries in all have no deviation: they are only shifted.
    """
    import torch

    kept = torch.where(completion_mask.bool(), values, 0.0)
    total, count = reduce(torch.stack([kept.sum(), completion_mask.sum().to(values.dtype)]))
    mean = total / count.clamp(min=1)
    centred = torch.where(completion_mask.bool(), values - mean, 0.0)
    # Of the centred values: sums of raw squares would lose the deviation of values far from 0.
    squares = reduce(centred.square().sum().reshape(1))[0]
    scale = torch.where(count > 1, torch.rsqrt(squares / (count - 1).clamp(min=1) + WHITEN_EPSILON), 1.0)
    whitened = centred * scale
    return whitened if shift_mean else torch.where(completion_mask.bool(), whitened + mean, 0.0)


# Losses of the critic and of both


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """Half the squared error of each value, the larger of that before and after a clip around the old value.

    PPO's equation 9 has the squared error L^VF alone; the clip is of the code that came with it.

    Returns:
        Losses (B, T), and a boolean (B, T): where the clipped error is the larger one.
    """
    import torch

    error = (values - returns).square()
    if cliprange is None:
        return error / 2, torch.zeros_like(error, dtype=torch.bool)
    clipped = (old_values + (values - old_values).clamp(-cliprange, cliprange) - returns).square()
    return torch.maximum(error, clipped) / 2, clipped > error


def ppo_loss(
    policy_losses: Tensor, value_losses: Tensor, entropies: Tensor, completion_mask: Tensor, *, vf_coef: float,
    entropy_coef: float = 0.0, num_items: Tensor | float | None = None,
) -> Tensor:
    """L^CLIP + vf_coef L^VF - entropy_coef S as one number to be minimised (PPO equation 9, signs turned).

    Args:
        policy_losses: (B, T), `policy_gradient.clipped_surrogate`.
        num_items: tokens to divide by, where these completions are a part of the batch; None: their own.
    """
    import torch

    each = policy_losses + vf_coef * value_losses
    if entropy_coef:  # a gradient of zeros to the entropies would cost a head two products a token all the same
        each = each - entropy_coef * entropies
    total = torch.where(completion_mask.bool(), each, 0.0).sum()
    return total / (completion_mask.sum().clamp(min=1) if num_items is None else num_items)


def approx_kl(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """KL(old policy || policy) at each token, never negative: ratio - 1 - log ratio."""
    return kl_k3(old_log_probs, log_probs)
