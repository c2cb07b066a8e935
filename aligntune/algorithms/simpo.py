"""Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734, equation 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.algorithms.cpo import chosen_nll, smoothed_log_sigmoid
from aligntune.algorithms.log_probs import halves, pair_metrics, sequence_log_probs
from aligntune.core.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class SimPOOptions:
    beta: float = option(2.0, "Scale of the reward, a mean log-prob per token; the authors use 2 to 10.", gt=0)
    simpo_gamma: float = option(
        1.0, "Margin by which the chosen answer's reward should be larger; the authors tune it as 0 to 1 times beta.",
        ge=0,
    )
    cpo_alpha: float = option(
        0.0, "Weight of the likelihood of the chosen answers; the paper has none (CPO-SimPO has).", ge=0
    )
    label_smoothing: float = option(0.0, "Share of pairs assumed to be labelled the wrong way round.", ge=0, lt=0.5)


def simpo_loss(
    log_probs: Tensor, mask: Tensor, *, beta: float = 2.0, simpo_gamma: float = 1.0, cpo_alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of -log sigmoid(beta / |y_w| log pi(y_w|x) - beta / |y_l| log pi(y_l|x) - gamma) (equation 6).

    Args:
        log_probs: (2 x pairs, T) of the policy, chosen rows first.
        mask: (2 x pairs, T), 1 on tokens of answers.
        simpo_gamma: gamma, in the unit of the reward.
        cpo_alpha: weight of the chosen answers' negative log-likelihood, a mean over tokens.

    Returns:
        The loss, and `rewards/...` (beta times log-probs per token), `logps/...` (per token), `nll_loss`.
    """
    means = sequence_log_probs(log_probs, mask, average=True)
    chosen, rejected = halves(means)
    losses = smoothed_log_sigmoid(beta * (chosen - rejected) - simpo_gamma, label_smoothing)
    nll = chosen_nll(log_probs, mask) if cpo_alpha else log_probs.new_zeros(())
    metrics = pair_metrics(beta * chosen, beta * rejected, means) | {"nll_loss": nll.detach()}
    return losses.mean() + cpo_alpha * nll, metrics


SPEC = AlgorithmSpec(
    name="simpo",
    title="Simple preference optimisation",
    paper="Meng et al. 2024, arXiv 2405.14734, equation 6",
    options=SimPOOptions,
    takes="preference",
    defaults={"learning_rate": 1e-6, "batch_size": 8, "max_seq_length": 1024},
    differs=(
        "loss_type 'simpo' and cpo_alpha 0 of TRL's CPOTrainer (its defaults are 'sigmoid' and 1)",
        "beta 2 and gamma 1, the authors' for Llama 3 Base (TRL's defaults are 0.1 and 0.5)",
    ),
)
