"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1, equation 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.algorithms.log_probs import sequence_log_probs
from aligntune.core.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class KTOOptions:
    beta: float = option(0.1, "Strength of the pull to the reference model.", ge=0)
    loss_type: str = option(
        "kto", "kto: the paper's; apo_zero_unpaired: without its KL term (arXiv 2408.06266, equation 7).",
        choices=("kto", "apo_zero_unpaired"),
    )
    desirable_weight: float = option(
        1.0, "Weight of good completions. The paper keeps (weight x number) of good ones at 1 to 4/3 times that of "
        "bad ones.", ge=0,
    )
    undesirable_weight: float = option(1.0, "Weight of bad completions.", ge=0)
    ref_model_name: str | None = option(
        None, "Reference model; null is the starting model (under LoRA: the base with adapters off).",
        objects="a transformers model",
    )
    precompute_ref_log_probs: bool = option(False, "Compute the reference's log-probs once, before training.")


def kl_reference_point(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """z_0: how far the policy is from the reference on mismatched pairs of prompt and completion, at least 0.

    Section 4.1 of the paper: the batch mean of log pi(y'|x) - log pi_ref(y'|x), where y' is another row's completion.
    It has no gradient.

    Args:
        log_probs, ref_log_probs: (B, T) of y' after x.
        mask: (B, T), 1 on tokens of y'.
    """
    ratios = sequence_log_probs(log_probs.detach() - ref_log_probs, mask)
    return ratios.mean().clamp(min=0)


def kto_loss(
    log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, labels: Tensor, *, kl: Tensor | float = 0.0,
    beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, loss_type: str = "kto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of w_y - v(x, y) (equation 7): w_D (1 - sigmoid(beta (r - z_0))) for good completions and
    w_U (1 - sigmoid(beta (z_0 - r))) for bad ones, with r = log pi(y|x) - log pi_ref(y|x).

    Args:
        log_probs, ref_log_probs: (B, T) of policy and reference.
        mask: (B, T), 1 on tokens of completions.
        labels: (B,), true for good completions.
        kl: z_0, from `kl_reference_point`.
        loss_type: "kto", or "apo_zero_unpaired", which reads no `kl`.

    Returns:
        The loss, and `kl`, `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `logps/chosen`, `logps/rejected`;
        those of a side that the batch lacks are left out.
    """
    import torch

    labels = labels.bool()
    sums = sequence_log_probs(log_probs, mask)
    ratios = sums - sequence_log_probs(ref_log_probs, mask)
    point = torch.as_tensor(kl if loss_type == "kto" else 0.0, dtype=ratios.dtype, device=ratios.device)
    sign = labels.to(ratios.dtype) * 2 - 1
    weights = torch.where(labels, desirable_weight, undesirable_weight).to(ratios.dtype)
    losses = weights * (1 - torch.sigmoid(sign * beta * (ratios - point)))
    metrics = {"kl": point.detach()}
    for name, rows in (("chosen", labels), ("rejected", ~labels)):
        if rows.any():
            metrics[f"rewards/{name}"] = beta * ratios.detach()[rows].mean()
            metrics[f"logps/{name}"] = sums.detach()[rows].mean()
    if labels.any() and not labels.all():
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return losses.mean(), metrics


SPEC = AlgorithmSpec(
    name="kto",
    title="Kahneman-Tversky optimisation",
    paper="Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1, equation 7",
    options=KTOOptions,
    takes="unpaired",
    defaults={"learning_rate": 5e-6, "batch_size": 8, "max_seq_length": 1024},
    reference=True,
    differs=(
        "rows are shuffled once, those of evaluation too, with the seed (TRL trains them in the order of the file, and "
        "of pairs the good completions of 1,000 rows before their bad ones)",
        "in evaluation, completions are mismatched within evaluation batches (TRL: within batches of the training's "
        "size)",
        "rows whose prompt alone fills max_seq_length are reported (TRL drops them without a word)",
        "the reference of an in-memory model is a copy from memory (TRL reads the hub again)",
        "learning_rate 5e-6, which the paper recommends (TRL's default is 1e-6)",
    ),
)
