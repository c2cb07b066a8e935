"""Group sequence policy optimisation (Zheng et al. 2025, arXiv 2507.18071, equations 5 to 7)."""

from __future__ import annotations

from dataclasses import dataclass

from aligntune.algorithms.base import ONLINE_DEFAULTS, AlgorithmSpec
from aligntune.algorithms.grpo import GroupOptions
from aligntune.core.options import option


@dataclass
class GSPOOptions(GroupOptions):
    epsilon: float = option(3e-4, "Clip range of the sequence ratio below 1 (section 5.1 of the paper).", ge=0)
    epsilon_high: float | None = option(4e-4, "Clip range above 1 (section 5.1 of the paper).", ge=0)


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
    ),
)
