"""Decoupled clip and dynamic sampling policy optimisation (Yu et al. 2025, arXiv 2503.14476, equations 8 to 13)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligntune.algorithms.base import ONLINE_DEFAULTS, AlgorithmSpec
from aligntune.algorithms.grpo import GroupOptions, group_loss
from aligntune.core.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class DAPOOptions(GroupOptions):
    epsilon_high: float | None = option(0.28, "Clip range above 1: clip-higher (section 3.1).", ge=0)
    dynamic_sampling: bool = option(
        True, "Replace prompts whose completions all earn the same reward by fresh ones, until the batch is full "
        "(section 3.2, equation 11)."
    )
    max_resample_rounds: int = option(
        10, "Rounds of fresh prompts for one batch at most; then groups without spread stay in it.", ge=0
    )
    overlong_buffer_len: int | None = option(
        None, "Last tokens of max_completion_length in which a punishment grows from 0 to -1 (equation 13); null is a "
        "fifth of it, the paper's 4096 of 20480; 0 punishes nothing.", ge=0
    )
    overlong_penalty_factor: float = option(1.0, "Weight of that punishment among the rewards.", ge=0)
    mask_truncated_completions: bool = option(
        False, "Overlong filtering (section 3.4): completions that hit max_completion_length stay out of the loss. It "
        "overlaps with the punishment, which then moves nothing of what it punishes most."
    )


def overlong_buffer(overlong_buffer_len: int | None, max_completion_length: int) -> int:
    """Tokens of the buffer of the soft overlong punishment, where None is the published share."""
    return max(1, max_completion_length // 5) if overlong_buffer_len is None else overlong_buffer_len


def loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, completion_mask: Tensor, *,
    ref_log_probs: Tensor | None = None, options: DAPOOptions | None = None,
    num_items_in_batch: Tensor | float | None = None, token_filter: Tensor | None = None,
) -> Tensor:
    """Equation 8: clipped ratios of tokens, 0.2 below and 0.28 above 1, over all tokens of the batch (equation 12).

    Args:
        log_probs, old_log_probs, ref_log_probs: (B, T), of policy, sampling policy and reference.
        advantages: (B,), from `policy_gradient.group_advantages` (equation 9).
        completion_mask: (B, T).
        options: the published constants if None.
        num_items_in_batch: tokens of the whole batch; None: of these completions.
        token_filter: see `policy_loss`.
    """
    return group_loss(
        log_probs, old_log_probs, advantages, completion_mask, options or DAPOOptions(), loss_type="dapo",
        level="token", ref_log_probs=ref_log_probs, num_items_in_batch=num_items_in_batch, token_filter=token_filter)


SPEC = AlgorithmSpec(
    name="dapo",
    title="Decoupled clip and dynamic sampling policy optimisation",
    paper="Yu et al. 2025, arXiv 2503.14476, equations 8 to 13",
    options=DAPOOptions,
    takes="prompts",
    defaults=ONLINE_DEFAULTS,
    online=True,
    needs_reward=True,
    reference=True,
    differs=(
        "clip range 0.2 below and 0.28 above 1 (TRL's default is 0.2 both ways)",
        "dynamic sampling, which TRL does not have: groups without a spread of rewards are replaced by fresh prompts, "
        "for at most max_resample_rounds; the authors' code then stops with an error, here they stay in the batch",
        "the soft overlong punishment is one of the rewards (TRL leaves it to the user); a group's spread is judged "
        "without it",
        "overlong filtering is off, as in the authors' best run: it would take the most punished completions out",
        "the loss divides by the tokens of the accumulation window, of all its prompts, as in TRL and in the authors' "
        "code; equation 12 as printed divides within the group of one prompt",
        "where one round of rollouts feeds more than one optimizer step, TRL divides by the mean of these windows' "
        "tokens; where a step takes several rounds, each round by its own tokens, then by their number. On the "
        "documentation's batch of 8 and 4 tokens two steps of one round have losses of -0.6667 and 0.3333, by their "
        "own tokens -0.5 and 0.5; one step of two rounds has 0, by its own tokens -0.1667",
        "with beta above 0 the KL is k3 without an importance ratio (TRL multiplies by the ratio by default)",
    ),
)
