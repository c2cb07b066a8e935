"""Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, equation 17)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.algorithms.dpo import dpo_loss
from aligntune.algorithms.log_probs import halves, pair_metrics, sequence_log_probs
from aligntune.core.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class IPOOptions:
    beta: float = option(
        0.1, "The paper's tau: the gap between the log-ratios of chosen and rejected is pulled to 1 / (2 beta).", gt=0
    )
    ref_model_name: str | None = option(
        None, "Reference model; null is the starting model (under LoRA: the base with adapters off).",
        objects="a transformers model",
    )
    precompute_ref_log_probs: bool = option(False, "Compute the reference's log-probs once, before training.")


def ipo_loss(
    log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, *, beta: float = 0.1, per_token: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of (h - 1 / (2 tau))^2, h the chosen less the rejected log-ratio to the reference (equation 17).

    Args:
        log_probs, ref_log_probs: (2 x pairs, T) of policy and reference, chosen rows first.
        mask: (2 x pairs, T), 1 on tokens of answers.
        beta: tau.
        per_token: log-ratios per token, as TRL trains (and, TRL says, as the authors did); False is equation 17 as it
            is printed, on sums.

    Returns:
        The loss, and `rewards/...` (beta times the summed log-ratios), `logps/...`.
    """
    if per_token:
        return dpo_loss(log_probs, ref_log_probs, mask, beta=beta, loss_type="ipo")
    chosen, rejected = halves(sequence_log_probs(log_probs - ref_log_probs, mask))
    loss = ((chosen - rejected - 1 / (2 * beta)) ** 2).mean()
    return loss, pair_metrics(beta * chosen, beta * rejected, sequence_log_probs(log_probs, mask))


SPEC = AlgorithmSpec(
    name="ipo",
    title="Identity preference optimisation",
    paper="Azar et al. 2023, arXiv 2310.12036, equation 17",
    options=IPOOptions,
    takes="preference",
    defaults={"learning_rate": 1e-6, "batch_size": 8, "max_seq_length": 1024},
    reference=True,
    differs=(
        "log-ratios are divided by the answer's tokens, as TRL does; equation 17 has their sums. On the batch of the "
        "parity test with beta 0.3 that is a loss of 4.133 where the paper prints 13.813",
        "loss_type 'ipo' of TRL's DPOTrainer (its default is 'sigmoid')",
        "rows whose prompt alone fills max_seq_length are reported (TRL drops them without a word)",
        "the reference of an in-memory model is a copy from memory (TRL reads the hub again)",
    ),
)
