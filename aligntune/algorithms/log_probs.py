"""Log-probabilities of tokens and sequences, and the metrics that every method on fixed data logs: each once.

Shapes: B rows of up to T predicted tokens. `log_probs` is (B, T), `mask` is (B, T) and 1 on tokens that count; where
logits (B, T + 1, V) are given, position t predicts token t + 1, so one position is lost. Rows of pairs are stacked:
the chosen ones first, then the rejected ones in the same order (B = 2 x pairs), as TRL's collators stack them.
Everything works in the dtype it is given; which side is padded does not matter, since only `mask` counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The label of a token that no loss counts."""


@dataclass(frozen=True)
class TokenStats:
    """What one forward pass says of each predicted token; every field is (B, T), 0 (or False) where `mask` is 0.

    Args:
        log_probs: log-probability of the label, in nats; the only field with a gradient.
        mask: 1 where the label counts.
        entropy: of the predicted distribution, in nats.
        is_top1: whether the label is the likeliest token.
        mean_logits: the mean over the vocabulary.
        log_sum_sq_probs: log of the sum of squared probabilities over the vocabulary.
    """

    log_probs: Tensor
    mask: Tensor
    entropy: Tensor
    is_top1: Tensor
    mean_logits: Tensor
    log_sum_sq_probs: Tensor


def token_stats(logits: Tensor, labels: Tensor) -> TokenStats:
    """The log-probability of each label and what is logged beside it.

    Args:
        logits: (B, T + 1, V).
        labels: (B, T + 1), `IGNORED` on tokens that do not count.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    mask = labels != IGNORED
    every = logits.log_softmax(-1)
    log_probs = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    fixed = every.detach()
    return TokenStats(
        log_probs=log_probs.masked_fill(~mask, 0.0),
        mask=mask.to(log_probs.dtype),
        entropy=-(fixed.exp() * fixed).sum(-1).masked_fill(~mask, 0.0),
        is_top1=(fixed.argmax(-1) == labels) & mask,
        mean_logits=logits.detach().mean(-1).masked_fill(~mask, 0.0),
        log_sum_sq_probs=(2 * fixed).logsumexp(-1).masked_fill(~mask, 0.0),
    )


def sequence_log_probs(log_probs: Tensor, mask: Tensor, *, average: bool = False) -> Tensor:
    """Log-probability of each row's counted tokens: their sum, or (average) the mean over them; (B,)."""
    total = (log_probs * mask).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if average else total


def mean_over_tokens(values: Tensor, mask: Tensor, *, num_tokens: Tensor | float | None = None) -> Tensor:
    """The sum of counted `values` (B, T) over their number, or over `num_tokens` (of a whole optimizer step)."""
    return (values * mask).sum() / (mask.sum().clamp(min=1) if num_tokens is None else num_tokens)


def halves(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) of stacked pairs."""
    assert len(stacked) % 2 == 0, "stacked pairs have as many chosen as rejected rows"
    chosen, rejected = stacked.chunk(2)
    return chosen, rejected


def pair_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor, log_probs: Tensor) -> dict[str, Tensor]:
    """What TRL logs of every method on pairs; scalars without a gradient.

    Args:
        chosen_rewards, rejected_rewards: (pairs,) implicit rewards.
        log_probs: (2 x pairs,) of the sequences, as the loss reads them.
    """
    chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
    chosen_log_probs, rejected_log_probs = halves(log_probs.detach())
    return {
        "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype).mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": chosen_log_probs.mean(), "logps/rejected": rejected_log_probs.mean(),
    }
