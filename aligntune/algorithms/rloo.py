"""REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740, section 2.3): equation 7 with the
mean reward of a prompt's other completions for its baseline. The paper prints the estimator without a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligntune.algorithms.base import ONLINE_DEFAULTS, AlgorithmSpec
from aligntune.algorithms.policy_gradient import clipped_surrogate, kl_in_reward, leave_one_out_advantages, log_ratios
from aligntune.core.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RLOOOptions:
    beta: float = option(
        0.05, "Weight of the KL penalty against the reference model, taken from the reward; 0 keeps no reference.", ge=0
    )
    epsilon: float = option(
        0.2, "Clip range of the ratio of whole completions, below 1 (and above, unless epsilon_high is set); it acts "
        "only where a batch of rollouts is used for more than one step.", ge=0
    )
    epsilon_high: float | None = option(None, "Clip range above 1; null is epsilon.", ge=0)
    normalize_advantages: bool = option(False, "Bring the advantages of a batch to mean 0 and deviation 1.")
    reward_clip_range: list[float] | None = option(None, "Lower and upper bound of a completion's reward.")
    mask_truncated_completions: bool = option(
        False, "Leave completions that hit max_completion_length out of the loss."
    )
    sync_ref_model: bool = option(False, "Let the reference follow the policy slowly; not with LoRA (use_peft=False).")


def advantages(
    rewards: Tensor, num_generations: int, *, old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None, completion_mask: Tensor | None = None, options: RLOOOptions | None = None,
) -> Tensor:
    """Each completion's reward, its KL penalty taken off, less the mean of its group's others: (B,).

    Args:
        rewards: (B,).
        num_generations: completions a prompt.
        old_log_probs, ref_log_probs, completion_mask: (B, T), for beta above 0.
    """
    options = options or RLOOOptions()
    if options.reward_clip_range:
        rewards = rewards.clamp(*options.reward_clip_range)
    if options.beta:
        assert old_log_probs is not None and ref_log_probs is not None and completion_mask is not None
        rewards = kl_in_reward(rewards, old_log_probs, ref_log_probs, completion_mask, beta=options.beta)
    return leave_one_out_advantages(rewards, num_generations, normalize=options.normalize_advantages)


def loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, completion_mask: Tensor, *,
    options: RLOOOptions | None = None,
) -> Tensor:
    """The mean over completions of the clipped ratio of whole completions times the advantage.

    At ratio 1 its gradient is the paper's: the mean of - advantage x gradient of log p(completion).

    Args:
        log_probs, old_log_probs: (B, T), of policy and sampling policy.
        advantages: (B,).
        completion_mask: (B, T).
    """
    options = options or RLOOOptions()
    ratio = log_ratios(log_probs, old_log_probs, completion_mask, level="product").exp()
    return clipped_surrogate(ratio, advantages.unsqueeze(1), epsilon=options.epsilon,
                             epsilon_high=options.epsilon_high).mean()


SPEC = AlgorithmSpec(
    name="rloo",
    title="REINFORCE leave-one-out",
    paper="Ahmadian et al. 2024, arXiv 2402.14740, section 2.3: equation 7 with a leave-one-out baseline; the "
    "estimator is that of Kool et al. 2019",
    options=RLOOOptions,
    takes="prompts",
    defaults={**ONLINE_DEFAULTS, "num_generations": 4},
    online=True,
    needs_reward=True,
    reference=True,
    differs=(
        "4 completions a prompt, the larger of the paper's two settings (TRL's default is 2)",
        "of TRL and not of the paper: the ratio of whole completions, clipped to 0.8 and 1.2; at ratio 1, which is "
        "always where a batch of rollouts feeds one step, loss and gradient are those of REINFORCE",
    ),
)
