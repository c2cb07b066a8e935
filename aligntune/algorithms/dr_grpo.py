"""GRPO done right (Liu et al. 2025, arXiv 2503.20783, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from aligntune.algorithms.base import ONLINE_DEFAULTS, AlgorithmSpec
from aligntune.algorithms.grpo import GroupOptions
from aligntune.core.options import option


@dataclass
class DrGRPOOptions(GroupOptions):
    scale_rewards: str = option(
        "none", "Advantages are rewards less the group's mean; dividing by a deviation would bring the difficulty "
        "bias back.", choices=("none", "group", "batch"),
    )


SPEC = AlgorithmSpec(
    name="dr_grpo",
    title="GRPO done right",
    paper="Liu et al. 2025, arXiv 2503.20783, section 3.2",
    options=DrGRPOOptions,
    takes="prompts",
    defaults=ONLINE_DEFAULTS,
    online=True,
    needs_reward=True,
    reference=True,
    differs=(
        "the loss divides by the constant max_completion_length (TRL's default 'dapo' divides by the tokens)",
        "advantages are not divided by a standard deviation (TRL leaves that on, with loss_type 'dr_grpo' too)",
    ),
)
