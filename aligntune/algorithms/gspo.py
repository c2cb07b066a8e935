"""Group sequence policy optimisation (Zheng et al. 2025, arXiv 2507.18071, equations 5 to 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligntune.algorithms.base import ONLINE_DEFAULTS, AlgorithmSpec
from aligntune.algorithms.grpo import GroupOptions, group_loss
from aligntune.core.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class GSPOOptions(GroupOptions):
    epsilon: float = option(3e-4, "Clip range of the sequence ratio below 1 (section 5.1 of the paper).", ge=0)
    epsilon_high: float | None = option(4e-4, "Clip range above 1 (section 5.1 of the paper).", ge=0)


def loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, completion_mask: Tensor, *,
    ref_log_probs: Tensor | None = None, options: GSPOOptions | None = None, token_filter: Tensor | None = None,
) -> Tensor:
    """Equation 5: the clipped ratio of each sequence (equation 7: the mean over its tokens, in logs), their mean.

    Args:
        log_probs, old_log_probs, ref_log_probs: (B, T), of policy, sampling policy and reference.
        advantages: (B,), from `policy_gradient.group_advantages` (equation 6).
        completion_mask: (B, T).
        options: the published constants if None.
        token_filter: see `policy_loss`.
    """
    return group_loss(
        log_probs, old_log_probs, advantages, completion_mask, options or GSPOOptions(), loss_type="grpo",
        level="sequence", ref_log_probs=ref_log_probs, token_filter=token_filter)


SPEC = AlgorithmSpec(
    name="gspo",
    title="Group sequence policy optimisation",
    paper="Zheng et al. 2025, arXiv 2507.18071, equations 5 to 7",
    options=GSPOOptions,
    takes="prompts",
    defaults={**ONLINE_DEFAULTS, "steps_per_generation": 4},
    online=True,
    needs_reward=True,
    reference=True,
    differs=(
        "one ratio a sequence: importance_sampling_level 'sequence' (TRL's default is 'token')",
        "loss_type 'grpo', each sequence counted once (TRL's default 'dapo' would weight sequences by length)",
        "clip range 3e-4 below and 4e-4 above 1 (TRL's default is 0.2)",
        "each round of rollouts feeds 4 micro-steps, so that ratios leave 1 (the paper splits rollouts into 4)",
        "with beta above 0 the KL is k3 of tokens without an importance ratio (TRL multiplies by the ratio by "
        "default); the paper leaves KL out, and so does beta 0",
    ),
)
