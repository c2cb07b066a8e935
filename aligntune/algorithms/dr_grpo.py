"""GRPO done right (Liu et al. 2025, arXiv 2503.20783, section 3.2): GRPO without two of its divisions, which is the
PPO objective of the paper's equation 2 with a reward less its group's mean for an advantage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligntune.algorithms.base import ONLINE_DEFAULTS, AlgorithmSpec
from aligntune.algorithms.grpo import GroupOptions, group_loss
from aligntune.core.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class DrGRPOOptions(GroupOptions):
    scale_rewards: str = option(
        "none", "Advantages are rewards less the group's mean; dividing by a deviation would bring the difficulty "
        "bias back.", choices=("none", "group", "batch"),
    )


def loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, completion_mask: Tensor, *,
    max_completion_length: int, ref_log_probs: Tensor | None = None, options: DrGRPOOptions | None = None,
    token_filter: Tensor | None = None,
) -> Tensor:
    """Section 3.2: clipped ratios of tokens, summed, over a constant: completions x max_completion_length.

    Args:
        log_probs, old_log_probs, ref_log_probs: (B, T), of policy, sampling policy and reference.
        advantages: (B,), from `policy_gradient.group_advantages(..., scale_rewards="none")`.
        completion_mask: (B, T).
        options: the published constants if None.
        token_filter: see `policy_loss`.
    """
    return group_loss(
        log_probs, old_log_probs, advantages, completion_mask, options or DrGRPOOptions(), loss_type="dr_grpo",
        level="token", ref_log_probs=ref_log_probs, max_completion_length=max_completion_length,
        token_filter=token_filter)


SPEC = AlgorithmSpec(
    name="dr_grpo",
    title="GRPO done right",
    paper="Liu et al. 2025, arXiv 2503.20783, section 3.2: equation 2 with centred rewards as advantages",
    options=DrGRPOOptions,
    takes="prompts",
    defaults=ONLINE_DEFAULTS,
    online=True,
    needs_reward=True,
    reference=True,
    differs=(
        "loss_type 'dr_grpo': the loss divides by the constant max_completion_length (TRL's default 'dapo' divides by "
        "the tokens)",
        "advantages are not divided by a standard deviation (TRL leaves that on, with loss_type 'dr_grpo' too: with "
        "one right answer in 8 its advantage would be 2.4742 in place of 0.875)",
        "with beta above 0 the KL is k3 without an importance ratio (TRL multiplies by the ratio by default)",
    ),
)
