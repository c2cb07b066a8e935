"""Group-relative policy optimisation (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300, equations 3 and 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligntune.algorithms.base import ONLINE_DEFAULTS, AlgorithmSpec
from aligntune.algorithms.policy_gradient import LOSS_TYPES, policy_loss
from aligntune.core.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class GroupOptions:
    """Options that every group-relative method has."""

    epsilon: float = option(0.2, "Clip range of the ratio, below 1 (and above, unless epsilon_high is set).", ge=0)
    epsilon_high: float | None = option(None, "Clip range above 1; null is epsilon.", ge=0)
    delta: float | None = option(
        None, "Upper bound of the ratio where the advantage is negative too (two-sided clip, arXiv 2505.07291); above "
        "1 + epsilon_high.", gt=1
    )
    beta: float = option(0.0, "Weight of the KL penalty against the reference model; 0 keeps no reference.", ge=0)
    scale_rewards: str = option(
        "group", "Divide advantages by the standard deviation of the group, of the batch, or not at all.",
        choices=("group", "batch", "none"),
    )
    top_entropy_quantile: float = option(
        1.0, "Share of tokens, those of highest entropy, that the policy term trains (arXiv 2506.01939); 1 is all.",
        gt=0, le=1,
    )
    mask_truncated_completions: bool = option(
        False, "Leave completions that hit max_completion_length out of the loss."
    )
    sync_ref_model: bool = option(False, "Let the reference follow the policy slowly; not with LoRA (use_peft=False).")


@dataclass
class GRPOOptions(GroupOptions):
    beta: float = option(0.04, "Weight of the KL penalty against the reference model; 0 keeps no reference.", ge=0)
    loss_type: str = option(
        "grpo", "Normalisation of the loss; 'grpo' is the paper's: the mean over a completion's tokens, then over "
        "completions.", choices=LOSS_TYPES,
    )
    importance_sampling_level: str = option(
        "token", "The ratio of each token, or one of the whole sequence.", choices=("token", "sequence")
    )


def group_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, completion_mask: Tensor, options: GroupOptions, *,
    loss_type: str, level: str, ref_log_probs: Tensor | None = None, max_completion_length: int | None = None,
    num_items_in_batch: Tensor | float | None = None, token_filter: Tensor | None = None,
) -> Tensor:
    """The loss of a group-relative method with these options; see `policy_gradient.policy_loss`."""
    return policy_loss(
        log_probs, old_log_probs, advantages, completion_mask, loss_type=loss_type, level=level,
        epsilon=options.epsilon, epsilon_high=options.epsilon_high, delta=options.delta, beta=options.beta,
        ref_log_probs=ref_log_probs, max_completion_length=max_completion_length, token_filter=token_filter,
        num_items_in_batch=num_items_in_batch)


def loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, completion_mask: Tensor, *,
    ref_log_probs: Tensor | None = None, options: GRPOOptions | None = None, max_completion_length: int | None = None,
    num_items_in_batch: Tensor | float | None = None, token_filter: Tensor | None = None,
) -> Tensor:
    """Equation 3: clipped ratios of tokens less beta times k3 (equation 4), the mean of each completion, their mean.

    Args:
        log_probs, old_log_probs, ref_log_probs: (B, T), of policy, sampling policy and reference.
        advantages: (B,), from `policy_gradient.group_advantages`.
        completion_mask: (B, T).
        options: the published constants if None.
        max_completion_length, num_items_in_batch, token_filter: for other loss types; see `policy_loss`.
    """
    options = options or GRPOOptions()
    return group_loss(
        log_probs, old_log_probs, advantages, completion_mask, options, loss_type=options.loss_type,
        level=options.importance_sampling_level, ref_log_probs=ref_log_probs, token_filter=token_filter,
        max_completion_length=max_completion_length, num_items_in_batch=num_items_in_batch)


SPEC = AlgorithmSpec(
    name="grpo",
    title="Group-relative policy optimisation",
    paper="Shao et al. 2024, DeepSeekMath, arXiv 2402.03300, equations 3 and 4",
    options=GRPOOptions,
    takes="prompts",
    defaults=ONLINE_DEFAULTS,
    online=True,
    needs_reward=True,
    reference=True,
    differs=(
        "loss_type 'grpo' (TRL's default is 'dapo')",
        "beta 0.04 (TRL's default is 0)",
        "the KL estimator is the paper's k3 without an importance ratio (TRL multiplies by the ratio by default)",
        "of TRL and not of the paper: 0.0001 is added to the deviation, which is the sample's (n - 1); with one right "
        "answer in 8 its advantage is 2.4742, where the population's deviation would give 2.6458",
    ),
)
