"""Cross-entropy on logits that somebody else made: one launch for the loss and its gradient.

For models whose projection cannot be taken over; where it can, `head` never builds the logits. The maths, and the
bytes of the pass, are in `_logits_pass`: with a gradient 4TV to 6TV bytes for T rows of V bf16 logits. The gradient is
written into a buffer of its own, because the logits belong to the model's output; the backward only scales that
buffer, and does not even read it where the loss arrives with a gradient of 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from aligntune.backends.fast.ops._logits_pass import LogitTransform, RowStatistics, multiply_in_place, run_loss
from aligntune.backends.fast.ops._runtime import as_rows, require_device


class Denominator:
    """The number that a sum of per-token losses is divided by, split so that no gradient underflows in fp16.

    With n = mantissa * 2^e, 1/mantissa in (1, 2] goes into the rows' gradients before they are rounded and 2^-e, which
    is exact in every float type, is applied afterwards: rows scaled by 1/8192 would lose all p_j < 5e-4 in fp16.
    Other types have the exponents of fp32 and take 1/n at once: then nothing is left to apply.
    """

    def __init__(self, n: torch.Tensor, dtype: torch.dtype) -> None:
        self.n = torch.where(n == 0, torch.ones_like(n), n)
        if dtype == torch.float16:
            mantissa = torch.frexp(self.n).mantissa
            self.row_scale, self.rest = 1 / mantissa, mantissa / self.n
        else:
            self.row_scale, self.rest = 1 / self.n, None

    def apply_rest(self, upstream: torch.Tensor) -> torch.Tensor:
        """The factor that the gradients still lack, given the gradient of the loss: fp32, one number."""
        upstream = upstream.float()
        return upstream if self.rest is None else upstream * self.rest


def denominator(
    targets: torch.Tensor,
    ignore_index: int,
    *,
    reduction: str,
    num_items_in_batch: int | float | torch.Tensor | None,
    dtype: torch.dtype,
) -> Denominator:
    """What `reduction` divides by: num_items_in_batch, else the rows that are not ignored ("mean") or 1 ("sum").

    0 counts as 1, so that a batch without a single target has loss 0 and gradient 0. Nothing waits for the GPU.

    Raises:
        ValueError: another reduction, or num_items_in_batch beside "sum".
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    if num_items_in_batch is not None and reduction == "sum":
        raise ValueError("reduction='sum' divides by nothing: leave num_items_in_batch out, or take reduction='mean'")
    if isinstance(num_items_in_batch, torch.Tensor):
        n = num_items_in_batch.to(targets.device, torch.float32, non_blocking=True).reshape(())
    elif num_items_in_batch is not None:
        n = torch.full((), float(num_items_in_batch), device=targets.device)
    elif reduction == "mean":
        n = (targets != ignore_index).sum().float()
    else:
        n = torch.ones((), device=targets.device)
    return Denominator(n, dtype)


class HandedOut:
    """Gradients that a forward made. Handing them out twice would need a copy of them, so it is refused."""

    def __init__(self, *gradients: torch.Tensor | None) -> None:
        self._gradients: tuple[torch.Tensor | None, ...] | None = gradients

    def scaled(self, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if self._gradients is None:
            raise RuntimeError(
                "backward a second time through a loss whose gradients are made in its forward: "
                "call the op again instead of backward(retain_graph=True)"
            )
        gradients, self._gradients = self._gradients, None
        return tuple(None if g is None else multiply_in_place(g, factor) for g in gradients)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        transform: LogitTransform,
        divide: Denominator,
        options: dict[str, Any],
        wants_grad: bool,
    ) -> torch.Tensor:
        stats = RowStatistics.empty(logits.shape[0], logits.device, ())
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if wants_grad else None
        scale = divide.row_scale if wants_grad else None
        run_loss(logits, targets, stats, transform, grad=grad, scale=scale, **options)
        ctx.gradients = HandedOut(grad)
        ctx.divide = divide
        return stats.loss.sum() / divide.n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = ctx.gradients.scaled(ctx.divide.apply_rest(upstream))
        return grad, None, None, None, None, None


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items_in_batch: int | float | torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross-entropy of logits (..., V) with int64 targets (...): one fp32 number, differentiable once.

    The transform and the loss are those of `_logits_pass`; label smoothing is that of
    `torch.nn.functional.cross_entropy`, z_loss adds z_loss * lse^2 a row (PaLM, arXiv 2204.02311, section 5). "mean"
    divides by num_items_in_batch, or by the number of rows that are not ignored. A target that is neither in 0..V-1
    nor ignore_index makes the loss NaN.

    Raises ValueError for shapes that do not fit or an unknown reduction, BackendUnavailableError without a GPU.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}")
    require_device(logits, targets)
    transform = LogitTransform(softcap, logit_scale, temperature)
    targets = targets.reshape(-1).contiguous()
    divide = denominator(
        targets, ignore_index, reduction=reduction, num_items_in_batch=num_items_in_batch, dtype=logits.dtype
    )
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    return _CrossEntropy.apply(as_rows(logits), targets, transform, divide, options, wants_grad)


# ----------------------------------------------------------------------------------------------------------- references


def transform_reference(
    logits: torch.Tensor, *, softcap: float | None = None, logit_scale: float = 1.0, temperature: float = 1.0
) -> torch.Tensor:
    """What lies between projection and softmax, in fp32 (or fp64 where the logits are)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def statistics_reference(
    z: torch.Tensor, targets: torch.Tensor, *, ignore_index: int = -100
) -> dict[str, torch.Tensor]:
    """Every statistic of `_logits_pass` from transformed logits (..., V): tensors (...), 0 on ignored rows."""
    valid = targets != ignore_index
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    labels = torch.where(valid, targets, 0)
    per_row = {
        "lse": torch.logsumexp(z, dim=-1),
        "log_probs": log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "entropy": -torch.where(p > 0, p * log_p, torch.zeros_like(p)).sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, dim=-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == labels,
    }
    return {name: torch.where(valid, value, torch.zeros_like(value)) for name, value in per_row.items()}


def loss_reference(
    stats: dict[str, torch.Tensor],
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items_in_batch: int | float | torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The reduced loss from `statistics_reference`."""
    rows = -(1 - label_smoothing) * stats["log_probs"] + label_smoothing * (stats["lse"] - stats["mean_logits"])
    total = (rows + z_loss * stats["lse"].square()).sum()
    if reduction == "sum":
        return total
    n = (targets != ignore_index).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return total / torch.where(n == 0, torch.ones_like(n), n)


def cross_entropy_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items_in_batch: int | float | torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """`cross_entropy` in plain torch."""
    z = transform_reference(logits, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    stats = statistics_reference(z, targets, ignore_index=ignore_index)
    return loss_reference(
        stats, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        num_items_in_batch=num_items_in_batch, reduction=reduction,
    )  # fmt: skip
