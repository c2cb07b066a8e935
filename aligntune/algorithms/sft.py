"""Supervised fine-tuning: the negative log-likelihood of the supervised tokens; DFT (Wu et al. 2025, arXiv 2508.05629,
equations 7 to 9).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.algorithms.log_probs import mean_over_tokens
from aligntune.core.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from aligntune.algorithms.log_probs import TokenStats


@dataclass
class SFTOptions:
    loss_type: str = option(
        "nll", "nll: -log p, the mean over supervised tokens; dft: each token weighted by its own probability "
        "(arXiv 2508.05629).", choices=("nll", "dft"),
    )


def sft_loss(
    stats: TokenStats, *, loss_type: str = "nll", num_tokens: Tensor | float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of -log p(y_t | y_<t) over supervised tokens; DFT (equations 7 to 9 of its paper) weights each by p,
    without its gradient.

    Args:
        stats: (B, T) of the policy.
        loss_type: "nll" or "dft".
        num_tokens: supervised tokens of the whole optimizer step, where it has several micro-batches; None is this
            batch's own.

    Returns:
        The loss in nats, and `entropy`, `mean_token_accuracy`.
    """
    nll = -stats.log_probs
    if loss_type == "dft":
        nll = nll * stats.log_probs.detach().exp()
    metrics = {
        "entropy": mean_over_tokens(stats.entropy, stats.mask),
        "mean_token_accuracy": mean_over_tokens(stats.is_top1.to(nll.dtype), stats.mask),
    }
    return mean_over_tokens(nll, stats.mask, num_tokens=num_tokens), metrics


SPEC = AlgorithmSpec(
    name="sft",
    title="Supervised fine-tuning",
    paper="the maximum-likelihood objective; DFT: arXiv 2508.05629, equations 7 to 9",
    options=SFTOptions,
    takes="sft",
    defaults={"learning_rate": 2e-5},
    differs=(
        "of conversations the assistant's turns alone are supervised (TRL supervises every token of them, unless "
        "assistant_only_loss is set)",
    ),
)
