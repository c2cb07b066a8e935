"""Reward model on pairs (Bradley-Terry; Ouyang et al. 2022, InstructGPT, arXiv 2203.02155, equation 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.core.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RewardOptions:
    center_rewards_coefficient: float | None = option(
        None, "Weight of the squared sum of a pair's scores, which keeps scores near 0 (arXiv 2312.09244; 0.01 is "
        "usual); null leaves them free.", ge=0,
    )


def reward_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, margin: Tensor | None = None,
    center_rewards_coefficient: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of -log sigmoid(r(x, y_w) - r(x, y_l) - m) (InstructGPT equation 1; m: the margin loss of
    Llama 2, arXiv 2307.09288), plus c times the mean of (r(x, y_w) + r(x, y_l))^2 (Eisenstein et al. 2023,
    arXiv 2312.09244, equation 2).

    Args:
        chosen_rewards, rejected_rewards: (pairs,) scores.
        margin: (pairs,) m, how much better the chosen answer is; None is 0.
        center_rewards_coefficient: c; None is 0.

    Returns:
        The loss, and `accuracy`, `margin`, `min_reward`, `mean_reward`, `max_reward`.
    """
    import torch

    delta = chosen_rewards - rejected_rewards
    loss = -torch.nn.functional.logsigmoid(delta if margin is None else delta - margin).mean()
    if center_rewards_coefficient is not None:
        loss = loss + center_rewards_coefficient * ((chosen_rewards + rejected_rewards) ** 2).mean()
    every = torch.cat([chosen_rewards, rejected_rewards]).detach()
    metrics = {
        "accuracy": (delta > 0).to(delta.dtype).mean(), "margin": delta.detach().mean(),
        "min_reward": every.min(), "mean_reward": every.mean(), "max_reward": every.max(),
    }
    return loss, metrics


SPEC = AlgorithmSpec(
    name="reward",
    title="Reward model",
    paper="Ouyang et al. 2022, InstructGPT, arXiv 2203.02155, equation 1",
    options=RewardOptions,
    takes="reward",
    defaults={"learning_rate": 1e-5, "batch_size": 8, "max_seq_length": 1024},
    differs=(
        "rows longer than max_seq_length are reported (TRL drops them without a word)",
        "learning_rate 1e-5 (TRL's default is 1e-4, which suits adapters)",
        "InstructGPT compares all pairs of K ranked answers and divides by their number; here each pair is a row",
    ),
)
