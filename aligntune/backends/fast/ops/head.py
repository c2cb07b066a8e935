"""The head: loss or token log-probs from hidden states, without ever holding the logits of all tokens.

T tokens, H hidden, V vocabulary. Chunks of 2-4k rows go through `torch.mm(out=)` into one reused buffer, one pass in
place (`_logits_pass`: the maths and the bytes), and the products with the gradient (`_projection`). Per call:

| entry | frozen weight | trained weight |
|---|---|---|
| `linear_cross_entropy`, `token_loss`: known token by token, gradients are made in the forward | 4THV | 6THV |
| `token_log_probs`: any function of the log-probs, also of whole sequences (DPO, KTO) | 4THV | 6THV or 8THV |

A token's log-prob depends on its own hidden state only, so d log_prob_t / d x_t = W^T (onehot - p_t) can be made in the
forward, when the logits are there; the backward multiplies row t by its upstream gradient. That is what
`token_log_probs` does where the weight is frozen. Where it trains, dW needs the upstream gradients first: the logits
are kept if they fit the budget (6THV), or made again (8THV).

Nothing waits for the GPU: no `.item()`, no boolean mask. Ignored rows are left out by `kept`, an index made where the
labels were made; without it they are computed and get gradient 0.

The numbers of a fused head (TRL's contract) from these: `log_probs`, `entropy`, `log_sum_sq_probs`, `mean_logits` and
`is_top1` are those of `_logits_pass`, shaped like the targets and 0 (False) where ignored, all after temperature;
`label_mask` is targets != ignore_index; its loss is `linear_cross_entropy(..., num_items_in_batch=...)`; only
`log_probs` and `entropy` carry a gradient. A sharded weight is gathered by the caller, once, around the call (and
around the backward of `token_log_probs` with a trained weight, which reads it again).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from aligntune.backends.fast.ops._head_reference import (
    linear_cross_entropy_reference,
    token_log_probs_reference,
    token_loss_reference,
)
from aligntune.backends.fast.ops._logits_pass import (
    STATISTICS,
    LogitTransform,
    RowStatistics,
    run_loss,
    run_token_grad,
)
from aligntune.backends.fast.ops._projection import (
    MEMORY_BUDGET,
    LogitsBuffer,
    Precision,
    Projection,
    Rows,
    WeightGradient,
    logits_row_bytes,
    plan_rows,
    precision_of,
)
from aligntune.backends.fast.ops._runtime import as_rows, num_sms, require_device
from aligntune.backends.fast.ops.cross_entropy import Denominator, HandedOut
from aligntune.backends.fast.ops.cross_entropy import denominator as make_denominator

__all__ = [
    "HeadOutput",
    "keeps_logits",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "token_log_probs",
    "token_log_probs_reference",
    "token_loss",
    "token_loss_reference",
]

# (log_probs (n,), entropy (n,) or None, **per_token (n,)) -> loss (n,), or that and named (n,) metrics
TokenLossFn = Callable[..., "torch.Tensor | tuple[torch.Tensor, Mapping[str, torch.Tensor]]"]
Gradients = tuple["torch.Tensor | None", "torch.Tensor | None", "torch.Tensor | None"]


class HeadOutput(NamedTuple):
    """What a head returns: loss () fp32, and per token, shaped like the targets, what was asked for (else None).

    `log_probs`, `entropy`, `log_sum_sq_probs`, `mean_logits` are fp32, `is_top1` is bool; all are 0 on ignored rows.
    `metrics` are those that a `token_loss` function returned beside its loss.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] | None = None


@dataclass
class _Job:
    """What the entry points share: the rows, the transform, the precision and the budget."""

    rows: Rows
    transform: LogitTransform
    precision: Precision
    budget: int
    ignore_index: int
    outputs: tuple[str, ...]
    needs: tuple[bool, bool, bool] = (False, False, False)

    def sweep(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        run_chunk: Callable[[torch.Tensor, int, int], None],
        needs: tuple[bool, bool, bool],
        *,
        whole: bool = False,
        logits: torch.Tensor | None = None,
    ) -> Gradients:
        """`run_chunk(logits, start, stop)` on every chunk; it leaves dloss/dlogits there for what `needs` asks.

        `needs` names hidden, weight, bias. `whole`: all rows are one chunk; `logits` (count, V): it exists already.
        """
        rows, projection = self.rows, Projection(weight, bias, precision=self.precision)
        grad_hidden = rows.gradient(hidden) if needs[0] else None
        grad_weight = WeightGradient(weight, weight.dtype) if needs[1] else None
        grad_bias = torch.zeros(weight.shape[0], device=weight.device) if needs[2] else None
        row_bytes = logits_row_bytes(weight.shape[0], self.precision)
        step = plan_rows(rows.count, weight.shape[1], row_bytes, self.budget, num_sms(hidden), needs[1])
        buffer = projection.buffer(rows.count if whole else min(step, rows.count)) if logits is None else logits
        for start in range(0, rows.count, buffer.shape[0] or 1):
            stop = min(start + buffer.shape[0], rows.count)
            x = rows.take(hidden, start, stop).to(self.precision.gemm)
            chunk = buffer[: stop - start]
            if logits is None:
                projection.logits(x, chunk)
            run_chunk(chunk, start, stop)
            if any(needs):
                projection.backward(chunk, x, rows, start, grad_hidden, grad_weight, grad_bias)
        return (
            None if grad_hidden is None else grad_hidden[: rows.total],
            None if grad_weight is None else grad_weight.finish(),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )

    def fits(self, weight: torch.Tensor) -> bool:
        """Whether the logits of all rows are within the budget."""
        return self.rows.count * logits_row_bytes(weight.shape[0], self.precision) <= self.budget

    def statistics(self, device: torch.device, outputs: tuple[str, ...]) -> RowStatistics:
        return RowStatistics.empty(self.rows.count, device, outputs)

    def spread(self, stats: RowStatistics) -> list[torch.Tensor | None]:
        """The statistics in the order of STATISTICS, (T,) each; None for those that were not asked for."""
        found = [getattr(stats, name) if name in self.outputs else None for name in STATISTICS]
        return [None if value is None else self.rows.spread(value) for value in found]


def _job(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    kept: torch.Tensor | None,
    ignore_index: int,
    transform: LogitTransform,
    outputs: tuple[str, ...],
    memory_budget: int | None,
    fp32_logits: bool,
) -> tuple[torch.Tensor, _Job]:
    """Check the arguments; the hidden states as rows, and the job."""
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1] or weight.dim() != 2:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} "
            "do not fit: (..., H), (V, H) and (...) are wanted"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    unknown = [name for name in outputs if name not in STATISTICS]
    if unknown:
        raise ValueError(f"unknown outputs {unknown}; known are {list(STATISTICS)}")
    require_device(hidden, weight, bias, targets, kept)
    x = as_rows(hidden)
    rows = Rows(x, targets.reshape(-1), kept, ignore_index)
    grad = torch.is_grad_enabled()
    needs = tuple(grad and t is not None and t.requires_grad for t in (x, weight, bias))
    return x, _Job(
        rows=rows,
        transform=transform,
        precision=precision_of(x, weight, fp32_logits=fp32_logits),
        budget=MEMORY_BUDGET if memory_budget is None else memory_budget,
        ignore_index=ignore_index,
        outputs=tuple(outputs),
        needs=needs,  # type: ignore[arg-type]
    )


def _shaped(per_token: list[torch.Tensor | None], targets: torch.Tensor) -> dict[str, torch.Tensor | None]:
    return {
        name: None if value is None else value.view(targets.shape)
        for name, value in zip(STATISTICS, per_token, strict=True)
    }


def _gemms_as_given(tensor: torch.Tensor) -> torch.autocast:
    """The precision is chosen in `precision_of`; autocast must not change it again on the way."""
    return torch.autocast(tensor.device.type, enabled=False)


# --------------------------------------------------------------------------------------- gradients made in the forward


class _LossInForward(torch.autograd.Function):
    """sum(row_losses) / divide.n; chunk by chunk, `run` fills row_losses and leaves the gradient in the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        job: _Job,
        run: Callable[[torch.Tensor, int, int], None],
        row_losses: torch.Tensor,
        divide: Denominator,
    ) -> torch.Tensor:
        with _gemms_as_given(hidden):
            ctx.gradients = HandedOut(*job.sweep(hidden, weight, bias, run, job.needs))
        ctx.divide = divide
        return row_losses.sum() / divide.n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        return *ctx.gradients.scaled(ctx.divide.apply_rest(upstream)), None, None, None, None


def linear_cross_entropy(
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
) -> HeadOutput:
    """Cross-entropy of hidden (..., H) projected by weight (V, H), with int64 targets (...): `.loss`, fp32.

    The loss is `cross_entropy`'s. `outputs` names per-token statistics to return with it, without gradient. `kept` (K,)
    int64 holds the flat numbers of the rows to score, -1 where it is padded, and must hold every row that is not
    ignored. `memory_budget` bounds the logits' buffer, in bytes. `fp32_logits` is the head in fp32 of half-precision
    inputs. The loss can be differentiated once.

    Raises ValueError for shapes that do not fit or unknown names, BackendUnavailableError without a GPU.
    """
    x, job = _job(
        hidden, weight, bias, targets, kept=kept, ignore_index=ignore_index,
        transform=LogitTransform(softcap, logit_scale, temperature), outputs=outputs, memory_budget=memory_budget,
        fp32_logits=fp32_logits,
    )  # fmt: skip
    divide = make_denominator(
        targets, ignore_index, reduction=reduction, num_items_in_batch=num_items_in_batch, dtype=job.precision.gemm
    )
    stats = job.statistics(x.device, outputs)
    scale = divide.row_scale if any(job.needs) else None

    def run(logits: torch.Tensor, start: int, stop: int) -> None:
        run_loss(
            logits, job.rows.targets[start:stop], stats.rows(start, stop), job.transform, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, grad=None if scale is None else logits, scale=scale,
        )  # fmt: skip

    loss = _LossInForward.apply(x, weight, bias, job, run, stats.loss, divide)
    return HeadOutput(loss, **_shaped(job.spread(stats), targets))


def token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    loss_fn: TokenLossFn,
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
) -> HeadOutput:
    """The loss sum_t loss_fn(log_prob_t, entropy_t, constants_t) / denominator of a token-level objective.

    `loss_fn(log_probs, entropy, **per_token)` is an elementwise torch function: it gets a chunk's log-probs (n,) fp32,
    their entropy (n,) or None (`entropy=True` asks for it, and differentiates through it), and the same rows of the
    tensors in `per_token`, which are shaped like the targets (old_log_probs, advantages, weights). It returns the loss
    (n,), or that and a dict of (n,) metrics. It is called once a chunk, ignored rows included: what it gives for those
    is dropped. `denominator` defaults to the number of rows that are not ignored. The other arguments are those of
    `linear_cross_entropy`.

    Raises ValueError for shapes that do not fit or unknown names, BackendUnavailableError without a GPU.
    """
    x, job = _job(
        hidden, weight, bias, targets, kept=kept, ignore_index=ignore_index,
        transform=LogitTransform(softcap, logit_scale, temperature), outputs=outputs, memory_budget=memory_budget,
        fp32_logits=fp32_logits,
    )  # fmt: skip
    constants = {name: value.reshape(-1) for name, value in (per_token or {}).items()}
    wrong = {name: value.numel() for name, value in constants.items() if value.numel() != targets.numel()}
    if wrong:
        raise ValueError(f"per_token tensors must be shaped like the targets {tuple(targets.shape)}: {wrong} elements")
    divide = make_denominator(
        targets, ignore_index, reduction="mean", num_items_in_batch=denominator, dtype=job.precision.gemm
    )
    run = _TokenRule(job, x.device, loss_fn, constants, entropy, divide.row_scale)
    loss = _LossInForward.apply(x, weight, bias, job, run, run.losses, divide)
    metrics = {name: job.rows.spread(torch.cat(parts)).view(targets.shape) for name, parts in run.metrics.items()}
    return HeadOutput(loss, **_shaped(job.spread(run.stats), targets), metrics=metrics)


class _TokenRule:
    """One chunk of `token_loss`: statistics, the loss function and its derivatives, the gradient in place."""

    def __init__(
        self,
        job: _Job,
        device: torch.device,
        loss_fn: TokenLossFn,
        constants: dict[str, torch.Tensor],
        entropy: bool,
        row_scale: torch.Tensor,
    ) -> None:
        self.job, self.loss_fn, self.constants, self.row_scale = job, loss_fn, constants, row_scale
        self.stats = job.statistics(device, (*job.outputs, "entropy") if entropy else job.outputs)
        self.entropy = entropy
        self.losses = torch.empty(job.rows.count, device=device)
        self.metrics: dict[str, list[torch.Tensor]] = {}

    def __call__(self, logits: torch.Tensor, start: int, stop: int) -> None:
        job, stats = self.job, self.stats.rows(start, stop)
        targets = job.rows.targets[start:stop]
        run_loss(logits, targets, stats, job.transform, ignore_index=job.ignore_index)
        inputs = [stats.log_probs.detach().requires_grad_()]
        if self.entropy and stats.entropy is not None:
            inputs.append(stats.entropy.detach().requires_grad_())
        with torch.enable_grad():
            constants = {name: job.rows.take(value, start, stop) for name, value in self.constants.items()}
            result = self.loss_fn(inputs[0], inputs[1] if self.entropy else None, **constants)
            loss, metrics = result if isinstance(result, tuple) else (result, {})
            if loss.shape != targets.shape:
                raise ValueError(f"loss_fn gave shape {tuple(loss.shape)} for {targets.shape[0]} tokens")
            loss = torch.where(targets != job.ignore_index, loss, torch.zeros_like(loss))
            found: list[torch.Tensor | None] = [None] * len(inputs)
            if any(job.needs) and loss.requires_grad:
                found = list(torch.autograd.grad(loss.sum(), inputs, allow_unused=True))
        self.losses[start:stop].copy_(loss.detach())
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(
                torch.where(targets != job.ignore_index, value.detach(), torch.zeros_like(value))
            )
        if not any(job.needs):
            return
        scaled = [None if g is None else g.float().contiguous() * self.row_scale for g in found]
        run_token_grad(
            logits, targets, stats, job.transform, grad_log_probs=scaled[0],
            grad_entropy=scaled[1] if self.entropy else None, ignore_index=job.ignore_index,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- log-probs first


def keeps_logits(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, kept: torch.Tensor | None = None,
    memory_budget: int | None = None, fp32_logits: bool = False, **_: Any,
) -> bool:
    """Whether `token_log_probs` of these arguments keeps the logits for its backward, where the weight trains."""
    rows = targets.numel() if kept is None else kept.numel()
    row_bytes = logits_row_bytes(weight.shape[0], precision_of(hidden, weight, fp32_logits=fp32_logits))
    return rows * row_bytes <= (MEMORY_BUDGET if memory_budget is None else memory_budget)


def logits_buffer(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, kept: torch.Tensor | None = None,
    fp32_logits: bool = False, **_: Any,
) -> LogitsBuffer:
    """What the logits of a head of these arguments take, by rows and budget."""
    row_bytes = logits_row_bytes(weight.shape[0], precision_of(hidden, weight, fp32_logits=fp32_logits))
    rows = targets.numel() if kept is None else kept.numel()
    return LogitsBuffer(rows, weight.shape[1], row_bytes, num_sms(hidden), weight.requires_grad)


class _TokenLogProbs(torch.autograd.Function):
    """(hidden, weight, bias, job) -> the statistics in the order of STATISTICS."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, job: _Job
    ) -> tuple[torch.Tensor | None, ...]:
        # entropy is often asked for to be logged: without this it would arrive in backward with a gradient of zeros
        ctx.set_materialize_grads(False)
        stats = job.statistics(hidden.device, job.outputs)
        only_hidden = job.needs == (True, False, False)
        unit = torch.full((), -1.0, device=hidden.device) if only_hidden else None
        keep = any(job.needs) and not only_hidden and job.fits(weight)
        logits: list[torch.Tensor] = []

        def run(chunk: torch.Tensor, start: int, stop: int) -> None:
            run_loss(
                chunk, job.rows.targets[start:stop], stats.rows(start, stop), job.transform,
                ignore_index=job.ignore_index, grad=chunk if only_hidden else None, scale=unit,
            )  # fmt: skip
            if keep:
                logits.append(chunk)

        with _gemms_as_given(hidden):
            # -1 times the gradient of the loss -log_prob: that of log_prob itself, for an upstream gradient of 1
            ctx.unit_grad = job.sweep(hidden, weight, bias, run, (only_hidden, False, False), whole=keep)[0]
        ctx.save_for_backward(hidden, weight, bias)
        ctx.job, ctx.stats, ctx.logits = job, stats, logits
        # copies: an output that hangs on ctx would keep the whole graph alive
        per_token = tuple(None if value is None else value.clone() for value in job.spread(stats))
        ctx.mark_non_differentiable(*(value for value in per_token[2:] if value is not None))
        return per_token

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias = ctx.saved_tensors
        job: _Job = ctx.job
        # sum().backward() expands one number: contiguous() writes it out
        grads = [None if g is None else g.float().contiguous() for g in upstream[:2]]
        if all(g is None for g in grads):
            return None, None, None, None
        direct = None
        if ctx.unit_grad is not None and grads[0] is not None:
            direct = torch.mul(ctx.unit_grad, grads[0].unsqueeze(1), out=torch.empty_like(ctx.unit_grad))
            grads[0] = None
            if grads[1] is None:
                return direct, None, None, None
        per_row = [None if g is None else job.rows.take(g, 0, job.rows.count) for g in grads]

        def run(chunk: torch.Tensor, start: int, stop: int) -> None:
            of_log_probs, of_entropy = (None if g is None else g[start:stop] for g in per_row)
            run_token_grad(
                chunk, job.rows.targets[start:stop], ctx.stats.rows(start, stop), job.transform,
                grad_log_probs=of_log_probs, grad_entropy=of_entropy, ignore_index=job.ignore_index,
            )  # fmt: skip

        # the pass overwrites kept logits, so a second backward makes them again
        kept = ctx.logits.pop() if ctx.logits else None
        with _gemms_as_given(hidden):
            grad_hidden, *others = job.sweep(hidden, weight, bias, run, job.needs, logits=kept)
        if direct is not None:
            grad_hidden = direct.add_(grad_hidden)
        return grad_hidden, *others, None


def token_log_probs(
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
) -> HeadOutput:
    """Per-token statistics of hidden (..., H) projected by weight (V, H), for int64 targets (...); `.loss` is None.

    `outputs` are names among log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1. `log_probs` and `entropy` are
    differentiable; with a frozen weight a gradient of entropy costs 4THV flops more, one of log_probs nothing. Where
    the weight trains and the logits of all rows fit `memory_budget`, they are kept for the backward. The other
    arguments are those of `linear_cross_entropy`.

    Raises ValueError for shapes that do not fit or unknown names, BackendUnavailableError without a GPU.
    """
    x, job = _job(
        hidden, weight, bias, targets, kept=kept, ignore_index=ignore_index,
        transform=LogitTransform(softcap, logit_scale, temperature), outputs=outputs, memory_budget=memory_budget,
        fp32_logits=fp32_logits,
    )  # fmt: skip
    return HeadOutput(None, **_shaped(list(_TokenLogProbs.apply(x, weight, bias, job)), targets))
