"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7) and the losses of its form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.algorithms.log_probs import halves, mean_over_tokens, pair_metrics, sequence_log_probs
from aligntune.core.options import option

if TYPE_CHECKING:
    from torch import Tensor

LOSS_TYPES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
              "aot_unpaired", "discopop", "apo_zero", "apo_down", "sft", "sigmoid_norm")


@dataclass
class DPOOptions:
    beta: float = option(0.1, "Strength of the pull to the reference model.", ge=0)
    loss_type: list[str] | str = option(
        "sigmoid", "Form of the loss ('sigmoid' is the paper's), or a list of forms to sum.", choices=LOSS_TYPES
    )
    label_smoothing: float = option(
        0.0, "Share of pairs assumed to be labelled the wrong way round, in the forms robust, exo_pair, aot and "
        "aot_unpaired; the others do not read it.", ge=0, lt=0.5
    )
    ref_model_name: str | None = option(
        None, "Reference model; null is the starting model (under LoRA: the base with adapters off).",
        objects="a transformers model",
    )
    precompute_ref_log_probs: bool = option(False, "Compute the reference's log-probs once, before training.")
    loss_weights: list[float] | None = option(None, "Weights where loss_type is a list; null is 1 each.")
    use_weighting: bool = option(False, "Weight pairs by their probability under the policy (WPO, arXiv 2406.11827).")


DISCOPOP_TAU = 0.05
"""Temperature of DiscoPOP's mixture (arXiv 2406.08414, equation 5)."""


@dataclass(frozen=True)
class Pairs:
    """What a form reads; (pairs,) each. h = chosen - rejected log-ratios is the implicit margin.

    Args:
        chosen, rejected: log-ratios of policy and reference (or f'(ratio), for another divergence than reverse KL).
        chosen_length, rejected_length: tokens of the answers, at least 1.
        log_ratios, ref_log_ratios: chosen less rejected log-probs of the policy, of the reference.
        chosen_nll: () mean over the tokens of all chosen answers.
        smoothing: share of flipped labels.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    log_ratios: Tensor
    ref_log_ratios: Tensor
    chosen_nll: Tensor
    beta: float
    smoothing: float
    discopop_tau: float = DISCOPOP_TAU

    @property
    def h(self) -> Tensor:
        return self.chosen - self.rejected

    @property
    def h_per_token(self) -> Tensor:
        return self.chosen / self.chosen_length - self.rejected / self.rejected_length


def _log_sigmoid(value: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.logsigmoid(value)


def _sigmoid(p: Pairs) -> Tensor:
    """DPO equation 7."""
    return -_log_sigmoid(p.beta * p.h)


def _sigmoid_norm(p: Pairs) -> Tensor:
    """DPO with log-ratios per token (Tulu 3, arXiv 2411.15124, equation 6)."""
    return -_log_sigmoid(p.beta * p.h_per_token)


def _hinge(p: Pairs) -> Tensor:
    """The hinge of SLiC (arXiv 2305.10425, section 2) on DPO's margin: RSO's hinge-norm (arXiv 2309.06657, equation
    10)."""
    return (1 - p.beta * p.h).relu()


def _ipo(p: Pairs) -> Tensor:
    """IPO equation 17 (arXiv 2310.12036), beta its tau, on log-ratios per token."""
    return (p.h_per_token - 1 / (2 * p.beta)) ** 2


def _exo_pair(p: Pairs) -> Tensor:
    """KL(softmax(beta log-ratios) || (1 - eps, eps)) over the pair (EXO, arXiv 2402.00856, equation 16)."""
    import math

    win, lose = _log_sigmoid(p.beta * p.h), _log_sigmoid(-p.beta * p.h)
    return win.exp() * (win - math.log1p(-p.smoothing)) + lose.exp() * (lose - math.log(p.smoothing))


def _nca_pair(p: Pairs) -> Tensor:
    """NCA on a pair (arXiv 2402.05369, section 4.1)."""
    good, bad = p.beta * p.chosen, p.beta * p.rejected
    return -_log_sigmoid(good) - 0.5 * _log_sigmoid(-good) - 0.5 * _log_sigmoid(-bad)


def _robust(p: Pairs) -> Tensor:
    """Unbiased where a share of labels is flipped (robust DPO, arXiv 2403.00409, section 3.1)."""
    right, flipped = -_log_sigmoid(p.beta * p.h), -_log_sigmoid(-p.beta * p.h)
    return ((1 - p.smoothing) * right - p.smoothing * flipped) / (1 - 2 * p.smoothing)


def _bco_pair(p: Pairs) -> Tensor:
    """A binary classifier on rewards (BCO, arXiv 2404.04656, section 4), without the shift of the reward."""
    return -_log_sigmoid(p.beta * p.chosen) - _log_sigmoid(-p.beta * p.rejected)


def _sppo_hard(p: Pairs) -> Tensor:
    """SPPO (arXiv 2405.00675, equation 4.7) with a preference of 1 for the winner and 0 for the loser."""
    return (p.chosen - 0.5 / p.beta) ** 2 + (p.rejected + 0.5 / p.beta) ** 2


def _smoothed(p: Pairs, delta: Tensor) -> Tensor:
    return -(1 - p.smoothing) * _log_sigmoid(p.beta * delta) - p.smoothing * _log_sigmoid(-p.beta * delta)


def _aot(p: Pairs) -> Tensor:
    """Optimal transport over the batch: the i-th smallest margin of the policy against the reference's i-th smallest
    (AOT, arXiv 2406.05882, section 3, paired)."""
    return _smoothed(p, p.log_ratios.sort().values - p.ref_log_ratios.sort().values)


def _aot_unpaired(p: Pairs) -> Tensor:
    """The same between the sorted log-ratios of chosen and of rejected answers (AOT, section 3, unpaired)."""
    return _smoothed(p, p.chosen.sort().values - p.rejected.sort().values)


def _apo_zero(p: Pairs) -> Tensor:
    """Chosen up, rejected down (APO-zero, arXiv 2408.06266, equation 7)."""
    return 1 - (p.beta * p.chosen).sigmoid() + (p.beta * p.rejected).sigmoid()


def _apo_down(p: Pairs) -> Tensor:
    """Both down, rejected faster (APO-down, arXiv 2408.06266, equation 8)."""
    return (p.beta * p.chosen).sigmoid() + 1 - (p.beta * p.h).sigmoid()


def _discopop(p: Pairs) -> Tensor:
    """A logistic and an exponential loss mixed by the margin (DiscoPOP, arXiv 2406.08414, equation 5)."""
    margin = p.beta * p.h
    share = (margin / p.discopop_tau).sigmoid()
    return -_log_sigmoid(margin) * (1 - share) + (-margin).exp() * share


def _sft(p: Pairs) -> Tensor:
    """The likelihood of the chosen answers, a mean over the batch's tokens (the maximum-likelihood objective: of no
    paper's equation)."""
    return p.chosen_nll.expand(len(p.chosen))


FORMS: Mapping[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo, "exo_pair": _exo_pair, "nca_pair": _nca_pair, "robust": _robust,
    "bco_pair": _bco_pair, "sppo_hard": _sppo_hard, "aot": _aot, "aot_unpaired": _aot_unpaired, "discopop": _discopop,
    "apo_zero": _apo_zero, "apo_down": _apo_down, "sft": _sft, "sigmoid_norm": _sigmoid_norm,
}


def _pairs(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, beta: float, smoothing: float) -> Pairs:
    sums, ref_sums = sequence_log_probs(log_probs, mask), sequence_log_probs(ref_log_probs, mask)
    (chosen, rejected), (ref_chosen, ref_rejected) = halves(sums), halves(ref_sums)
    chosen_length, rejected_length = halves(mask.sum(-1).clamp(min=1))
    return Pairs(
        chosen - ref_chosen, rejected - ref_rejected, chosen_length, rejected_length, chosen - rejected,
        ref_chosen - ref_rejected, mean_over_tokens(-halves(log_probs)[0], halves(mask)[0]), beta, smoothing,
    )


def wpo_weights(log_probs: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """How likely each pair is under the policy (WPO, arXiv 2406.11827, equation 2, sampled alignment); (pairs,).

    Args:
        log_probs, log_sum_sq_probs: (2 x pairs, T) of the policy.
        mask: (2 x pairs, T), 1 on tokens of answers.
    """
    aligned = (log_probs - log_sum_sq_probs).detach()
    chosen, rejected = halves(sequence_log_probs(aligned, mask, average=True).exp())
    return chosen * rejected


def dpo_loss(
    log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, *, beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid", loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0, log_sum_sq_probs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of -log sigmoid(beta h), h the chosen less the rejected log-ratio to the reference (equation 7), or
    another of `FORMS`, or a weighted sum of several.

    Args:
        log_probs, ref_log_probs: (2 x pairs, T) of policy and reference, chosen rows first.
        mask: (2 x pairs, T), 1 on tokens of answers.
        loss_type: one of LOSS_TYPES or several.
        loss_weights: one a form; None is 1 each.
        label_smoothing: share of flipped labels; exo_pair needs one above 0.
        log_sum_sq_probs: (2 x pairs, T) of the policy; given, pairs are weighted as in WPO.

    Returns:
        The loss, and `rewards/...` (beta times the log-ratios), `logps/...`.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    pairs = _pairs(log_probs, ref_log_probs, mask, beta, label_smoothing)
    share = 1.0 if log_sum_sq_probs is None else wpo_weights(log_probs, log_sum_sq_probs, mask)
    loss = sum((weight * (FORMS[name](pairs) * share).mean() for name, weight in zip(names, weights, strict=True)),
               start=log_probs.new_zeros(()))
    return loss, pair_metrics(beta * pairs.chosen, beta * pairs.rejected, sequence_log_probs(log_probs, mask))


SPEC = AlgorithmSpec(
    name="dpo",
    title="Direct preference optimisation",
    paper="Rafailov et al. 2023, arXiv 2305.18290, equation 7",
    options=DPOOptions,
    takes="preference",
    defaults={"learning_rate": 1e-6, "batch_size": 8, "max_seq_length": 1024},
    reference=True,
    differs=(
        "rows whose prompt alone fills max_seq_length are reported (TRL drops them without a word)",
        "the reference of an in-memory model is a copy from memory (TRL reads the hub again)",
    ),
)
