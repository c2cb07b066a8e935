r"""The passes over a block of logits: statistics of every row, and the gradient written in place of the logits.

With a row's raw logits a_j, the model's distribution is the softmax of

    z_j = softcap * tanh(logit_scale * a_j / softcap) / temperature       (logit_scale * a_j / temperature uncapped)

and, p_j being that softmax and y the target, the statistics are

    lse = log sum_j exp z_j            log_prob = z_y - lse               entropy = -sum_j p_j log p_j
    log_sum_sq_probs = log sum_j p_j^2     mean_logits = sum_j z_j / V
    is_top1: no z_j exceeds z_y, and none before y equals it (so y is what argmax returns)
    loss = -(1 - e) log_prob + e (lse - mean_logits) + z_loss * lse^2     with e the label smoothing

    d loss / d z_j     = (1 + 2 z_loss lse) p_j - e / V - (1 - e) [j = y]
    d log_prob / d z_j = [j = y] - p_j
    d entropy / d z_j  = -p_j (log p_j + entropy)

p_y - 1 cancels for confident tokens, so the sum of the others' exponentials is kept by itself: p_y - 1 = -others / all,
and log_prob = -log1p(others / exp(z_y - max)). Entropy is summed as sum_j e_j (z_j - max) for the same reason.

Bytes. T rows of V logits of 2 bytes: statistics read 2TV; a gradient from known statistics moves 4TV; both in one
launch move 4TV if the second read of a row comes from the L2 cache and 6TV if not. A row (256 KB and more) fits neither
in registers nor in shared memory, and 132 rows at once (40 MB at V = 152k) only just fit in L2: so one program of 1024
threads owns an SM and a row, and the second sweep runs backwards, beginning with what was read last. One program a row
needs no second launch and no atomics, and gives the same bits every time; with fewer rows than SMs the projection,
which reads the whole weight, hides the idle ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from aligntune.backends.fast.ops._runtime import cdiv, kernel, next_power_of_2, on_device, require_device

STATISTICS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True)
class LogitTransform:
    """What lies between the projection and the softmax; `z` in the module's docstring."""

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive or None, not {self.softcap}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    def kernel_args(self) -> dict[str, float | bool]:
        return {
            "logit_scale": float(self.logit_scale),
            "softcap": float(self.softcap or 1.0),
            "inv_t": 1.0 / self.temperature,
            "SOFTCAP": self.softcap is not None,
            "SCALED": self.logit_scale != self.temperature,
        }


@dataclass(frozen=True)
class Launch:
    """One program walks its row `block` logits at a time, its loads `stages` steps ahead."""

    block: int
    stages: int = 3

    @property
    def num_warps(self) -> int:
        # 8 logits a thread: one 128-bit load of bf16, and sums that fit the 64 registers which 32 warps leave a thread
        return max(1, self.block // 256)

    def shrunk(self, n_cols: int) -> Launch:
        """The same for a vocabulary smaller than a block."""
        return Launch(max(128, min(self.block, next_power_of_2(n_cols))), self.stages)


LIGHT = Launch(8192)
HEAVY = Launch(4096)


def choose_launch(n_cols: int, strides: tuple[int, ...], *, many_sums: bool = False) -> Launch:
    """LIGHT where its 64 registers a thread suffice.

    Softcap, the mean and the squared sum take up to 128, and so do rows that do not begin or end at a multiple of 16
    logits, where accesses are one logit wide: 32 warps would spill there, 16 do not.
    """
    heavy = many_sums or any(length % 16 for length in (n_cols, *strides))
    return (HEAVY if heavy else LIGHT).shrunk(n_cols)


# ------------------------------------------------------------------------------------------------------- device helpers


@triton.jit
def _log1p(u):
    # log(1 + u) in fp32 loses u below 6e-8 altogether; u >= 0 here
    v = tl.minimum(u, 0.1)
    series = v * (1 - v * (1 / 2 - v * (1 / 3 - v * (1 / 4 - v * (1 / 5 - v * (1 / 6 - v / 7))))))
    return tl.where(u < 0.1, series, tl.log(1 + u))


@triton.jit
def _expm1(x):
    # x <= 0 here; above -0.3 exp(x) - 1 would lose digits
    v = tl.maximum(x, -0.3)
    series = v * (1 + v / 2 * (1 + v / 3 * (1 + v / 4 * (1 + v / 5 * (1 + v / 6 * (1 + v / 7))))))
    return tl.where(x > -0.3, series, tl.exp(x) - 1)


@triton.jit
def _transform(a, logit_scale, softcap, inv_t, SOFTCAP: tl.constexpr, SCALED: tl.constexpr):
    """z of raw logits a (fp32)."""
    if SOFTCAP:
        u = a * (logit_scale / softcap)
        # libdevice's tanh does not run in the interpreter; with e = exp(-2|u|) nothing overflows
        e = tl.exp(-2 * tl.abs(u))
        t = (1 - e) / (1 + e)
        return tl.where(u < 0, -t, t) * (softcap * inv_t)
    elif SCALED:
        return a * (logit_scale * inv_t)
    else:
        return a


@triton.jit
def _through_transform(grad, a, logit_scale, softcap, inv_t, SOFTCAP: tl.constexpr, SCALED: tl.constexpr):
    """grad * dz/da; 1 - tanh^2 is written 4e / (1 + e)^2, which does not cancel where the cap saturates."""
    if SOFTCAP:
        e = tl.exp(-2 * tl.abs(a * (logit_scale / softcap)))
        return grad * (4 * e / ((1 + e) * (1 + e)) * (logit_scale * inv_t))
    elif SCALED:
        return grad * (logit_scale * inv_t)
    else:
        return grad


@triton.jit
def _fold(
    z, offsets, n_cols, target, holds_target, m, arg, others, xs, sq, zs,
    ENTROPY: tl.constexpr, LOG_SUM_SQ: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Take one block of z, less the target, into the running sums.

    Every lane has its own maximum, so that the loop holds no reduction and no barrier, and needs one exp an element.
    """
    if MEAN:
        zs += tl.where(offsets < n_cols, z, 0.0) if TAIL else z
    if TAIL:
        z = tl.where(offsets < n_cols, z, -float("inf"))
    if holds_target:
        z = tl.where(offsets == target, -float("inf"), z)
    above = z > m
    gap = -tl.abs(z - m)
    # either the old sums shrink by exp(gap) and the new term is 1, or they stay and the new term is exp(gap)
    shrink = tl.exp(gap)
    rescale = tl.where(above, shrink, 1.0)
    e = tl.where(above, 1.0, shrink)
    if ENTROPY:
        # clamped: a logit of -inf must add finite * 0
        xs = rescale * xs + tl.maximum(gap, -1e30) * shrink * tl.where(above, others, 1.0)
    if LOG_SUM_SQ:
        sq = rescale * rescale * sq + e * e
    if TOP1:
        arg = tl.where(above, offsets, arg)
    return tl.maximum(m, z), arg, rescale * others + e, xs, sq, zs


# -------------------------------------------------------------------------------------------------------------- kernels


@kernel
def logits_loss(
    logits_ptr, grad_ptr, targets_ptr, scale_ptr, loss_ptr, lse_ptr, log_prob_ptr, entropy_ptr, log_sum_sq_ptr,
    mean_ptr, top1_ptr, logits_stride, grad_stride, n_cols, ignore_index,
    logit_scale, softcap, inv_t, smoothing, z_loss,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, ENTROPY: tl.constexpr, LOG_SUM_SQ: tl.constexpr, MEAN: tl.constexpr,
    TOP1: tl.constexpr, SMOOTHING: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row: its statistics and loss, then (GRAD) scale * d loss / d logits, in place if grad_ptr is logits_ptr."""
    # torch.compile hands Python floats over as fp64 before torch 2.15
    logit_scale = tl.cast(logit_scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    inv_t = tl.cast(inv_t, tl.float32)
    smoothing = tl.cast(smoothing, tl.float32)
    z_loss = tl.cast(z_loss, tl.float32)
    # 8192 rows x 262,144 logits are 2^31: the offset of a row does not fit in 32 bits
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    out_ptr = grad_ptr + row * grad_stride
    lanes = tl.arange(0, BLOCK)
    n_full = n_cols // BLOCK
    target_64 = tl.load(targets_ptr + row)
    if target_64 == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(log_prob_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        if LOG_SUM_SQ:
            tl.store(log_sum_sq_ptr + row, 0.0)
        if MEAN:
            tl.store(mean_ptr + row, 0.0)
        if TOP1:
            tl.store(top1_ptr + row, 0)
        if GRAD:
            zero = tl.zeros((BLOCK,), tl.float32).to(grad_ptr.dtype.element_ty)
            for block in range(0, n_full):
                tl.store(out_ptr + block * BLOCK + lanes, zero)
            tl.store(out_ptr + n_full * BLOCK + lanes, zero, mask=n_full * BLOCK + lanes < n_cols)
        return
    target = target_64.to(tl.int32)

    # a target outside the vocabulary makes the loss NaN instead of reading another row's memory
    known = (target_64 >= 0) & (target_64 < n_cols)
    a_target = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    z_target = _transform(a_target, logit_scale, softcap, inv_t, SOFTCAP, SCALED)
    m = tl.full((BLOCK,), -1e30, tl.float32)
    arg = tl.zeros((BLOCK,), tl.int32)
    others = tl.zeros((BLOCK,), tl.float32)
    xs = tl.zeros((BLOCK,), tl.float32)
    sq = tl.zeros((BLOCK,), tl.float32)
    zs = tl.zeros((BLOCK,), tl.float32)
    for block in tl.range(0, n_full, num_stages=STAGES):
        offsets = block * BLOCK + lanes
        z = _transform(tl.load(row_ptr + offsets).to(tl.float32), logit_scale, softcap, inv_t, SOFTCAP, SCALED)
        m, arg, others, xs, sq, zs = _fold(
            z, offsets, n_cols, target, block == target // BLOCK, m, arg, others, xs, sq, zs,
            ENTROPY, LOG_SUM_SQ, MEAN, TOP1, False,
        )  # fmt: skip
    tail = n_full * BLOCK + lanes
    if n_full * BLOCK < n_cols:
        a = tl.load(row_ptr + tail, mask=tail < n_cols, other=0.0).to(tl.float32)
        z = _transform(a, logit_scale, softcap, inv_t, SOFTCAP, SCALED)
        m, arg, others, xs, sq, zs = _fold(
            z, tail, n_cols, target, n_full == target // BLOCK, m, arg, others, xs, sq, zs,
            ENTROPY, LOG_SUM_SQ, MEAN, TOP1, True,
        )  # fmt: skip

    m_others = tl.max(m, axis=0)
    base = tl.maximum(m_others, z_target)
    below = m - base
    share = tl.exp(below)
    others_sum = tl.sum(others * share, axis=0)
    e_target = tl.exp(z_target - base)
    total = others_sum + e_target
    log_total = tl.log(total)
    lse = base + log_total
    ratio = others_sum / e_target
    log_prob = tl.where(ratio < 0.1, -_log1p(ratio), z_target - base - log_total)
    tl.store(lse_ptr + row, lse)
    tl.store(log_prob_ptr + row, log_prob)
    if ENTROPY:
        xs_sum = tl.sum(share * (xs + below * others), axis=0) + e_target * tl.maximum(z_target - base, -1e30)
        tl.store(entropy_ptr + row, log_total - xs_sum / total)
    if LOG_SUM_SQ:
        tl.store(log_sum_sq_ptr + row, tl.log(tl.sum(share * share * sq, axis=0) + e_target * e_target) - 2 * log_total)
    if TOP1:
        # each lane kept the first of its maxima; among equals argmax takes the first
        rival = tl.min(tl.where(m == m_others, arg, 2147483647), axis=0)
        first = (z_target > m_others) | ((z_target == m_others) & (target < rival))
        tl.store(top1_ptr + row, first.to(top1_ptr.dtype.element_ty))
    loss = -log_prob
    if MEAN:
        mean = tl.sum(zs, axis=0) / n_cols
        tl.store(mean_ptr + row, mean)
    if SMOOTHING:
        loss = (1 - smoothing) * loss + smoothing * (lse - mean)
    tl.store(loss_ptr + row, loss + z_loss * lse * lse)

    if GRAD:
        weight = tl.load(scale_ptr).to(tl.float32)
        pull = 1 + 2 * z_loss * lse
        spread = smoothing / n_cols
        factor = weight * pull / total
        # (p_y - 1) without the subtraction, and what label smoothing and z-loss add to it
        at_target = weight * (-pull * (others_sum / total) + (pull - 1) + smoothing - spread)
        uniform = weight * spread
        if n_full * BLOCK < n_cols:
            a = tl.load(row_ptr + tail, mask=tail < n_cols, other=0.0).to(tl.float32)
            p = tl.exp(_transform(a, logit_scale, softcap, inv_t, SOFTCAP, SCALED) - base)
            grad = tl.where(tail == target, at_target, factor * p - uniform)
            grad = _through_transform(grad, a, logit_scale, softcap, inv_t, SOFTCAP, SCALED)
            tl.store(out_ptr + tail, grad.to(grad_ptr.dtype.element_ty), mask=tail < n_cols)
        for back in tl.range(0, n_full, num_stages=STAGES):
            offsets = (n_full - 1 - back) * BLOCK + lanes
            a = tl.load(row_ptr + offsets).to(tl.float32)
            p = tl.exp(_transform(a, logit_scale, softcap, inv_t, SOFTCAP, SCALED) - base)
            grad = tl.where(offsets == target, at_target, factor * p - uniform)
            grad = _through_transform(grad, a, logit_scale, softcap, inv_t, SOFTCAP, SCALED)
            tl.store(out_ptr + offsets, grad.to(grad_ptr.dtype.element_ty))


@triton.jit
def _token_grad(
    a, offsets, target, lse, at_target, g_log_prob, g_entropy, entropy, logit_scale, softcap, inv_t,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, G_ENTROPY: tl.constexpr,
):  # fmt: skip
    log_p = _transform(a, logit_scale, softcap, inv_t, SOFTCAP, SCALED) - lse
    p = tl.exp(log_p)
    grad = tl.where(offsets == target, at_target, -g_log_prob * p)
    if G_ENTROPY:
        grad -= tl.where(p > 0, g_entropy * p * (log_p + entropy), 0.0)
    return _through_transform(grad, a, logit_scale, softcap, inv_t, SOFTCAP, SCALED)


@kernel
def logits_grad(
    logits_ptr, targets_ptr, lse_ptr, log_prob_ptr, entropy_ptr, g_log_prob_ptr, g_entropy_ptr, logits_stride, n_cols,
    ignore_index, logit_scale, softcap, inv_t, SOFTCAP: tl.constexpr, SCALED: tl.constexpr, G_LOG_PROB: tl.constexpr,
    G_ENTROPY: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row, in place: g_log_prob * dlog_prob/dlogits + g_entropy * dentropy/dlogits, from known statistics."""
    logit_scale = tl.cast(logit_scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    inv_t = tl.cast(inv_t, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    lanes = tl.arange(0, BLOCK)
    n_full = n_cols // BLOCK
    tail = n_full * BLOCK + lanes
    target_64 = tl.load(targets_ptr + row)
    if target_64 == ignore_index:
        zero = tl.zeros((BLOCK,), tl.float32).to(logits_ptr.dtype.element_ty)
        for block in range(0, n_full):
            tl.store(row_ptr + block * BLOCK + lanes, zero)
        tl.store(row_ptr + tail, zero, mask=tail < n_cols)
        return
    target = target_64.to(tl.int32)
    lse = tl.load(lse_ptr + row)
    g_log_prob = 0.0
    g_entropy = 0.0
    entropy = 0.0
    if G_LOG_PROB:
        g_log_prob = tl.load(g_log_prob_ptr + row)
    if G_ENTROPY:
        g_entropy = tl.load(g_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    at_target = -g_log_prob * _expm1(tl.load(log_prob_ptr + row))
    for block in tl.range(0, n_full, num_stages=STAGES):
        offsets = block * BLOCK + lanes
        a = tl.load(row_ptr + offsets).to(tl.float32)
        grad = _token_grad(
            a, offsets, target, lse, at_target, g_log_prob, g_entropy, entropy, logit_scale, softcap, inv_t,
            SOFTCAP, SCALED, G_ENTROPY,
        )  # fmt: skip
        tl.store(row_ptr + offsets, grad.to(logits_ptr.dtype.element_ty))
    if n_full * BLOCK < n_cols:
        a = tl.load(row_ptr + tail, mask=tail < n_cols, other=0.0).to(tl.float32)
        grad = _token_grad(
            a, tail, target, lse, at_target, g_log_prob, g_entropy, entropy, logit_scale, softcap, inv_t,
            SOFTCAP, SCALED, G_ENTROPY,
        )  # fmt: skip
        tl.store(row_ptr + tail, grad.to(logits_ptr.dtype.element_ty), mask=tail < n_cols)


@kernel
def scale_in_place(x_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    """x *= factor, a number on the device; a factor of 1 (no loss scaling) leaves x unread."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < numel).to(tl.float32)
    tl.store(x_ptr + offsets, (x * factor).to(x_ptr.dtype.element_ty), mask=offsets < numel)


# ------------------------------------------------------------------------------------------------------------ launchers


@dataclass
class RowStatistics:
    """Per-row results, fp32 of shape (T,), 0 (False) where the target is ignored; None where not asked for."""

    loss: torch.Tensor
    lse: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None

    @classmethod
    def empty(cls, rows: int, device: torch.device, outputs: tuple[str, ...]) -> RowStatistics:
        """Buffers for `rows` rows; `outputs` are names among STATISTICS."""
        unknown = [name for name in outputs if name not in STATISTICS]
        if unknown:
            raise ValueError(f"unknown outputs {unknown}; known are {list(STATISTICS)}")
        optional = {
            name: torch.empty(rows, device=device, dtype=torch.bool if name == "is_top1" else torch.float32)
            for name in STATISTICS[1:]
            if name in outputs
        }
        loss, lse, log_probs = torch.empty(3, rows, device=device, dtype=torch.float32)
        return cls(loss, lse, log_probs, **optional)

    def rows(self, start: int, stop: int) -> RowStatistics:
        """The same buffers, rows start..stop."""
        parts = {name: value[start:stop] for name, value in vars(self).items() if value is not None}
        return RowStatistics(**parts)


def run_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    stats: RowStatistics,
    transform: LogitTransform,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    grad: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> None:
    """Fill `stats` from logits (T, V) and targets (T,); with `grad` also write scale * dloss/dlogits there.

    `grad` may be `logits` itself. `scale` is one fp32 number on the device.
    """
    require_device(logits, targets, grad)
    n_rows, n_cols = logits.shape
    if n_rows == 0:
        return
    assert logits.stride(-1) == 1 or n_cols == 1
    assert (grad is None) == (scale is None)
    assert targets.is_contiguous() or n_rows == 1
    out = logits if grad is None else grad
    mean = stats.mean_logits
    if mean is None and label_smoothing != 0:
        mean = torch.empty_like(stats.loss)
    many_sums = mean is not None or stats.log_sum_sq_probs is not None or transform.softcap is not None
    launch = choose_launch(n_cols, (logits.stride(0), out.stride(0)), many_sums=many_sums)
    unused = stats.loss
    with on_device(logits):
        logits_loss[(n_rows,)](
            logits, out, targets, unused if scale is None else scale, stats.loss, stats.lse, stats.log_probs,
            unused if stats.entropy is None else stats.entropy,
            unused if stats.log_sum_sq_probs is None else stats.log_sum_sq_probs,
            unused if mean is None else mean, unused if stats.is_top1 is None else stats.is_top1.view(torch.uint8),
            logits.stride(0), out.stride(0), n_cols, ignore_index,
            smoothing=float(label_smoothing), z_loss=float(z_loss),
            ENTROPY=stats.entropy is not None, LOG_SUM_SQ=stats.log_sum_sq_probs is not None,
            MEAN=mean is not None, TOP1=stats.is_top1 is not None,
            SMOOTHING=label_smoothing != 0, GRAD=grad is not None,
            BLOCK=launch.block, STAGES=launch.stages, num_warps=launch.num_warps, **transform.kernel_args(),
        )  # fmt: skip


def run_token_grad(
    logits: torch.Tensor,
    targets: torch.Tensor,
    stats: RowStatistics,
    transform: LogitTransform,
    *,
    grad_log_probs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> None:
    """Overwrite logits (T, V) with the gradient of sum(grad_log_probs * log_probs + grad_entropy * entropy).

    The gradients are fp32 of shape (T,), contiguous; `stats` is what `run_loss` found on the same logits.
    """
    require_device(logits, targets)
    n_rows, n_cols = logits.shape
    if n_rows == 0:
        return
    assert grad_entropy is None or stats.entropy is not None
    launch = choose_launch(n_cols, (logits.stride(0),))
    with on_device(logits):
        logits_grad[(n_rows,)](
            logits, targets, stats.lse, stats.log_probs, stats.lse if stats.entropy is None else stats.entropy,
            stats.lse if grad_log_probs is None else grad_log_probs,
            stats.lse if grad_entropy is None else grad_entropy, logits.stride(0), n_cols, ignore_index,
            G_LOG_PROB=grad_log_probs is not None, G_ENTROPY=grad_entropy is not None,
            BLOCK=launch.block, STAGES=launch.stages, num_warps=launch.num_warps, **transform.kernel_args(),
        )  # fmt: skip


def multiply_in_place(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x *= factor for a contiguous x that nobody else holds and one number `factor` on its device; returns x."""
    assert x.is_contiguous() and factor.numel() == 1
    if x.numel():
        require_device(x, factor)
        with on_device(x):
            scale_in_place[(cdiv(x.numel(), 4096),)](x, factor, x.numel(), BLOCK=4096, num_warps=8)
    return x
