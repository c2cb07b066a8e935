"""Decoupled clip and dynamic sampling policy optimisation (Yu et al. 2025, arXiv 2503.14476, equations 8 to 12)."""

from __future__ import annotations

from dataclasses import dataclass

from aligntune.algorithms.base import ONLINE_DEFAULTS, AlgorithmSpec
from aligntune.algorithms.grpo import GroupOptions
from aligntune.core.options import option


@dataclass
class DAPOOptions(GroupOptions):
    epsilon_high: float | None = option(0.28, "Clip range above 1: clip-higher (section 3.1).", ge=0)
    mask_truncated_completions: bool = option(
        True, "Overlong filtering (section 3.4): completions that hit max_completion_length stay out of the loss."
    )


SPEC = AlgorithmSpec(
    name="dapo",
    title="Decoupled clip and dynamic sampling policy optimisation",
    paper="Yu et al. 2025, arXiv 2503.14476, equations 8 to 12",
    options=DAPOOptions,
    takes="prompts",
    defaults=ONLINE_DEFAULTS,
    online=True,
    needs_reward=True,
    reference=True,
    differs=(
        "clip range 0.2 below and 0.28 above 1 (TRL's default is 0.2 both ways)",
        "overlong completions are masked (TRL's default keeps them)",
        "dynamic sampling, equation 11, is not done: prompts whose group has no reward spread stay in the batch with "
        "zero advantage",
    ),
)
