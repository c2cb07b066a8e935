"""Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417): the terms L_prefer (equation 3) and L_NLL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.algorithms.log_probs import halves, mean_over_tokens, pair_metrics, sequence_log_probs
from aligntune.core.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class CPOOptions:
    beta: float = option(0.1, "Scale of the margin between chosen and rejected log-probs.", gt=0)
    cpo_alpha: float = option(1.0, "Weight of the likelihood of the chosen answers.", ge=0)
    loss_type: str = option(
        "sigmoid", "Form of the contrastive term; 'sigmoid' is the paper's, 'ipo' reads log-probs per token.",
        choices=("sigmoid", "hinge", "ipo"),
    )
    label_smoothing: float = option(
        0.0, "Share of pairs assumed to be labelled the wrong way round; only 'sigmoid' reads it.", ge=0, lt=0.5
    )


def smoothed_log_sigmoid(margin: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - s) log sigmoid(m) - s log sigmoid(-m): the loss where a share s of the labels is flipped."""
    import torch

    log_sigmoid = torch.nn.functional.logsigmoid
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def chosen_nll(log_probs: Tensor, mask: Tensor) -> Tensor:
    """-log p of the chosen answers, the mean over the batch's tokens."""
    return mean_over_tokens(-halves(log_probs)[0], halves(mask)[0])


def cpo_loss(
    log_probs: Tensor, mask: Tensor, *, beta: float = 0.1, cpo_alpha: float = 1.0, loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of -log sigmoid(beta (log pi(y_w|x) - log pi(y_l|x))) (L_prefer, equation 3: DPO with a uniform
    reference), plus alpha times the negative log-likelihood of y_w (L_NLL).

    Args:
        log_probs: (2 x pairs, T) of the policy, chosen rows first.
        mask: (2 x pairs, T), 1 on tokens of answers.
        cpo_alpha: weight of the likelihood; the paper's is 1. It is a mean over tokens here and in TRL; the paper's
            L_NLL sums over an answer.
        loss_type: "sigmoid", "hinge" or "ipo" (log-probs per token).

    Returns:
        The loss, and `rewards/...` (beta times log-probs), `logps/...`, `nll_loss`.
    """
    log_probs_B = sequence_log_probs(log_probs, mask, average=loss_type == "ipo")
    chosen, rejected = halves(log_probs_B)
    margin = chosen - rejected
    if loss_type == "hinge":
        losses = (1 - beta * margin).relu()
    elif loss_type == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    else:
        losses = smoothed_log_sigmoid(beta * margin, label_smoothing)
    nll = chosen_nll(log_probs, mask) if cpo_alpha else log_probs.new_zeros(())
    metrics = pair_metrics(beta * chosen, beta * rejected, log_probs_B) | {"nll_loss": nll.detach()}
    return losses.mean() + cpo_alpha * nll, metrics


SPEC = AlgorithmSpec(
    name="cpo",
    title="Contrastive preference optimisation",
    paper="Xu et al. 2024, arXiv 2401.08417, L_prefer (equation 3) and L_NLL",
    options=CPOOptions,
    takes="preference",
    defaults={"learning_rate": 1e-6, "batch_size": 8, "max_seq_length": 1024},
    differs=(
        "the likelihood term is a mean over the batch's tokens, as in TRL; the paper's L_NLL sums over an answer. "
        "On the batch of the parity test that is a term of 6.280 where the paper prints 21.980",
    ),
)
