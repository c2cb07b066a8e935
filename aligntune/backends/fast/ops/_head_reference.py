"""The head in plain torch: all logits at once, every gradient by autograd. The same arguments as in `head`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from aligntune.backends.fast.ops.cross_entropy import loss_reference, statistics_reference, transform_reference


def _scored(targets: torch.Tensor, kept: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """The targets, with those of rows that `kept` does not name ignored."""
    if kept is None:
        return targets
    named = torch.zeros(targets.numel() + 1, dtype=torch.bool, device=targets.device)
    named[torch.where(kept < 0, targets.numel(), kept)] = True
    return torch.where(named[:-1].view(targets.shape), targets, ignore_index)


def _statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    fp32_logits: bool,
    transform: dict[str, Any],
) -> dict[str, torch.Tensor]:
    if fp32_logits:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    else:
        logits = F.linear(hidden, weight, bias)
    return statistics_reference(transform_reference(logits, **transform), targets, ignore_index=ignore_index)


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items_in_batch: int | float | torch.Tensor | None = None,
    reduction: str = "mean",
    outputs: tuple[str, ...] = (),
    kept: torch.Tensor | None = None,
    memory_budget: int | None = None,
    fp32_logits: bool = False,
) -> dict[str, torch.Tensor]:
    """`head.linear_cross_entropy`: a dict with "loss" and every name in `outputs`."""
    transform = {"softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}
    scored = _scored(targets, kept, ignore_index)
    stats = _statistics(hidden, weight, scored, bias, ignore_index, fp32_logits, transform)
    loss = loss_reference(
        stats, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        num_items_in_batch=num_items_in_batch, reduction=reduction,
    )  # fmt: skip
    return {"loss": loss} | {name: stats[name].detach() for name in outputs}


def token_log_probs_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs",),
    kept: torch.Tensor | None = None,
    memory_budget: int | None = None,
    fp32_logits: bool = False,
) -> dict[str, torch.Tensor]:
    """`head.token_log_probs`: a dict with every name in `outputs`."""
    transform = {"softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}
    scored = _scored(targets, kept, ignore_index)
    stats = _statistics(hidden, weight, scored, bias, ignore_index, fp32_logits, transform)
    return {name: stats[name] for name in outputs}


def token_loss_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    loss_fn: Callable[..., Any],
    *,
    per_token: Mapping[str, torch.Tensor] | None = None,
    entropy: bool = False,
    denominator: int | float | torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs",),
    kept: torch.Tensor | None = None,
    memory_budget: int | None = None,
    fp32_logits: bool = False,
) -> dict[str, Any]:
    """`head.token_loss`: a dict with "loss", "metrics" and every name in `outputs`."""
    transform = {"softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}
    scored = _scored(targets, kept, ignore_index)
    stats = _statistics(hidden, weight, scored, bias, ignore_index, fp32_logits, transform)
    result = loss_fn(stats["log_probs"], stats["entropy"] if entropy else None, **(per_token or {}))
    loss, metrics = result if isinstance(result, tuple) else (result, {})
    valid = scored != ignore_index
    n = (targets != ignore_index).sum() if denominator is None else torch.as_tensor(denominator)
    return {
        "loss": torch.where(valid, loss, torch.zeros_like(loss)).sum() / torch.where(n == 0, torch.ones_like(n), n),
        "metrics": {name: torch.where(valid, value.detach(), 0) for name, value in metrics.items()},
    } | {name: stats[name].detach() for name in outputs}
