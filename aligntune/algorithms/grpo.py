"""Group-relative policy optimisation (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300, equations 3 and 4)."""

from __future__ import annotations

from dataclasses import dataclass

from aligntune.algorithms.base import ONLINE_DEFAULTS, AlgorithmSpec
from aligntune.core.options import option


@dataclass
class GroupOptions:
    """Options that every group-relative method has."""

    epsilon: float = option(0.2, "Clip range of the ratio, below 1 (and above, unless epsilon_high is set).", ge=0)
    epsilon_high: float | None = option(None, "Clip range above 1; null is epsilon.", ge=0)
    beta: float = option(0.0, "Weight of the KL penalty against the reference model; 0 keeps no reference.", ge=0)
    scale_rewards: str = option(
        "group", "Divide advantages by the standard deviation of the group, of the batch, or not at all.",
        choices=("group", "batch", "none"),
    )
    mask_truncated_completions: bool = option(
        False, "Leave completions that hit max_completion_length out of the loss."
    )
    sync_ref_model: bool = option(False, "Let the reference follow the policy slowly.")


@dataclass
class GRPOOptions(GroupOptions):
    beta: float = option(0.04, "Weight of the KL penalty against the reference model; 0 keeps no reference.", ge=0)
    loss_type: str = option(
        "grpo", "Normalisation of the loss; 'grpo' is the paper's: the mean over a completion's tokens, then over "
        "completions.", choices=("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    )
    importance_sampling_level: str = option(
        "token", "The ratio of each token, or one of the whole sequence.", choices=("token", "sequence")
    )


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
    ),
)
