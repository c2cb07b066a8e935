"""AdamW with global-norm clipping over flat buffers: one pass reads the gradient for its norm, one makes the step.

Loshchilov & Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2, as torch.optim.AdamW:

    c  = min(1, max_norm / (||g|| + 1e-6))                       torch.nn.utils.clip_grad_norm_
    p <- p - lr wd p
    m <- m + (1 - beta1) (c g - m)
    v <- beta2 v + (1 - beta2) (c g)^2
    p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Everything that changes from step to step (lr, weight decay, t, the norm) is read from the device and t is advanced
there, so a captured CUDA graph replays the step. A norm that is NaN or infinite skips the update, t included, and is
reported on the device: no host sync.

Bytes a parameter (fp32): 28 for the step (p, m, v read and written, g read) and 4 for the norm's pass; + 2 for a
bf16 copy of the parameters; 24 with bf16 parameters and fp32 gradient. The norm is deterministic: a fixed grid, summed
in a fixed order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aligntune.backends.fast.ops._philox import random_u16
from aligntune.backends.fast.ops._runtime import (
    cdiv,
    kernel,
    next_power_of_2,
    num_sms,
    on_device,
    require_device,
)
from aligntune.errors import ConfigError

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    """`block` elements a program; the norm runs `norm_programs` a multiprocessor, each with several blocks in flight.

    8 fp32 elements a thread are two 16-byte loads from each of the four buffers.
    """

    block: int = 1024
    num_warps: int = 4
    norm_block: int = 4096
    norm_programs: int = 4


LAUNCH = Launch()


class StepResult(NamedTuple):
    """What a step leaves on the device: the gradient's norm before clipping (fp32), and whether it was skipped."""

    grad_norm: torch.Tensor
    skipped: torch.Tensor


@kernel
def adamw_norm_kernel(grad_ptr, partial_ptr, numel, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(program * BLOCK, numel, step):
        index = start + lane
        grad = tl.load(grad_ptr + index, mask=index < numel, other=0.0).to(tl.float32)
        total += grad * grad
    tl.store(partial_ptr + program, tl.sum(total))


@triton.jit
def adamw_update(
    param, grad, exp_avg, exp_avg_sq, lr, decay, inverse_correction1, root_correction2, one_minus_beta1, beta2,
    one_minus_beta2, eps,
):  # fmt: skip
    """(parameter, exp_avg, exp_avg_sq) after the step, in fp32."""
    param *= 1.0 - lr * decay
    exp_avg += one_minus_beta1 * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq * beta2 + one_minus_beta2 * grad * grad
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), root_correction2) + eps
    param -= lr * inverse_correction1 * tl.div_rn(exp_avg, denominator)
    return param, exp_avg, exp_avg_sq


@triton.jit
def adamw_corrections(step, log_beta1, log_beta2):
    """1 / (1 - beta1^t) and sqrt(1 - beta2^t) in fp32, for t >= 1."""
    # 1 - beta^t cancels in fp32: at beta2 = 0.999 and t = 1 it would be wrong by 3e-5.
    exponent = step.to(tl.float64)
    correction1 = 1.0 - tl.exp(exponent * log_beta1)
    correction2 = 1.0 - tl.exp(exponent * log_beta2)
    return (1.0 / correction1).to(tl.float32), tl.sqrt(correction2).to(tl.float32)


@kernel
def adamw_prepare_kernel(
    partial_ptr, norm_ptr, skipped_ptr, step_ptr, scalars_ptr, num_partials, max_norm, log_beta1, log_beta2,
    REDUCE: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if REDUCE:
        index = tl.arange(0, BLOCK)
        norm = tl.sqrt_rn(tl.sum(tl.load(partial_ptr + index, mask=index < num_partials, other=0.0)))
        tl.store(norm_ptr, norm)
    else:
        norm = tl.load(norm_ptr)
    finite = norm < float("inf")  # false for NaN too
    coefficient = norm * 0 + 1.0
    if CLIP:
        coefficient = tl.minimum(max_norm / (norm + 1e-6), 1.0)
    step = tl.load(step_ptr) + finite.to(tl.int64)
    inverse_correction1, root_correction2 = adamw_corrections(tl.maximum(step, 1), log_beta1, log_beta2)
    tl.store(scalars_ptr, coefficient)
    tl.store(scalars_ptr + 1, inverse_correction1)
    tl.store(scalars_ptr + 2, root_correction2)
    tl.store(step_ptr, step)
    tl.store(skipped_ptr, 1 - finite.to(tl.int32))


@kernel
def adamw_step_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, scalars_ptr, skipped_ptr, step_ptr,
    lr_ptr, decay_ptr, start_ptr, seed_ptr, numel, one_minus_beta1, beta2, one_minus_beta2, eps,
    SEGMENTS: tl.constexpr, COPY: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    index = program * BLOCK + tl.arange(0, BLOCK)
    # A skipped step loads and stores nothing. (Triton 3.9's interpreter takes no mask that a scalar was and-ed into.)
    mask = index < tl.where(tl.load(skipped_ptr) == 0, numel, 0)
    coefficient = tl.load(scalars_ptr)
    inverse_correction1 = tl.load(scalars_ptr + 1)
    root_correction2 = tl.load(scalars_ptr + 2)
    lr = tl.load(lr_ptr)
    decay = tl.load(decay_ptr)
    if SEGMENTS > 1:
        lr = tl.full((BLOCK,), 0.0, tl.float32) + lr
        decay = tl.full((BLOCK,), 0.0, tl.float32) + decay
        for segment in tl.static_range(1, SEGMENTS):
            past = index >= tl.load(start_ptr + segment)
            lr = tl.where(past, tl.load(lr_ptr + segment), lr)
            decay = tl.where(past, tl.load(decay_ptr + segment), decay)
    param = tl.load(param_ptr + index, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + index, mask=mask, other=0.0).to(tl.float32) * coefficient
    exp_avg = tl.load(exp_avg_ptr + index, mask=mask, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + index, mask=mask, other=0.0).to(tl.float32)
    param, exp_avg, exp_avg_sq = adamw_update(
        param, grad, exp_avg, exp_avg_sq, lr, decay, inverse_correction1, root_correction2, one_minus_beta1, beta2,
        one_minus_beta2, eps,
    )  # fmt: skip
    tl.store(exp_avg_ptr + index, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq_ptr + index, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
    if STOCHASTIC:
        # Adding uniform bits below the ones that are kept, then cutting them off, rounds up as often as the cut-off
        # part is large: the expectation is the fp32 value (arXiv 1502.02551, eq. 1).
        group = program * (BLOCK // 8) + tl.arange(0, BLOCK // 8)  # one Philox call for 8 parameters
        step = tl.load(step_ptr)
        noise = random_u16(tl.load(seed_ptr), group.to(tl.int32), (group >> 32).to(tl.int32), step.to(tl.int32))
        kept = (param.to(tl.int32, bitcast=True) + noise) & -65536
        # A carry out of the largest exponent is infinity, as rounding to nearest would give; NaN must stay NaN.
        param = tl.where(param == param, kept.to(tl.float32, bitcast=True), param)
    tl.store(param_ptr + index, param.to(param_ptr.dtype.element_ty), mask=mask)
    if COPY:
        tl.store(copy_ptr + index, param.to(copy_ptr.dtype.element_ty), mask=mask)


def adamw_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: torch.Tensor,
    lr: float | torch.Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | torch.Tensor = 0.01,
    max_norm: float | None = None,
    grad_norm: torch.Tensor | None = None,
    segment_starts: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> StepResult:
    """One AdamW step in place over flat buffers `(n,)`; three launches, no host sync.

    `param`, `exp_avg`, `exp_avg_sq` (fp32, bf16 or fp16 each; all arithmetic is fp32) are updated, `grad` is read.
    `step` is an int64 scalar on the device, the number of updates made so far; it is advanced unless the update is
    skipped. `lr` and `weight_decay` are numbers or fp32 device tensors `(S,)`, one entry a segment; segment s begins
    at `segment_starts[s]` (int64, ascending, first 0) and is a parameter group's slice of the flat buffer.

    The gradient is scaled to norm `max_norm` if its norm is larger (None: no clipping). `grad_norm` gives the norm
    (fp32 scalar on the device: sharded buffers reduce it themselves); otherwise it is computed. Not finite: the update
    is skipped. `copy (n,)` receives the new parameters in its dtype: the model's bf16 beside fp32 masters. `seed`
    (int64 scalar on the device, bf16 `param` only) rounds stochastically; the noise depends on seed, step and place.

    The writes go past autograd: version counters of the tensors given are advanced, those of `.data` views are not.
    Raises ConfigError for buffers that do not fit together, BackendUnavailableError off the GPU.
    """
    segments = 1 if segment_starts is None else segment_starts.numel()
    _check(param, grad, exp_avg, exp_avg_sq, copy, step=step, seed=seed, grad_norm=grad_norm)
    rates = _per_segment(lr, segments, param, "lr")
    decays = _per_segment(weight_decay, segments, param, "weight_decay")
    require_device(param, grad, exp_avg, exp_avg_sq, step, rates, decays, grad_norm, segment_starts, copy, seed)
    numel = param.numel()
    with on_device(param):
        partials = _partial_norms(grad) if grad_norm is None else None
        norm = param.new_empty((), dtype=torch.float32) if grad_norm is None else grad_norm
        scalars = param.new_empty(3, dtype=torch.float32)
        skipped = param.new_empty((), dtype=torch.int32)
        num_partials = partials.numel() if partials is not None else 0
        adamw_prepare_kernel[(1,)](
            partials if partials is not None else norm, norm, skipped, step, scalars, num_partials,
            0.0 if max_norm is None else max_norm, _log(beta1), _log(beta2),
            REDUCE=partials is not None, CLIP=max_norm is not None, BLOCK=next_power_of_2(num_partials),
            num_warps=LAUNCH.num_warps,
        )  # fmt: skip
        if numel:
            adamw_step_kernel[(cdiv(numel, LAUNCH.block),)](
                param, grad, exp_avg, exp_avg_sq, param if copy is None else copy, scalars, skipped, step,
                rates, decays, step if segment_starts is None else segment_starts, step if seed is None else seed,
                numel, 1.0 - beta1, beta2, 1.0 - beta2, eps,
                SEGMENTS=segments, COPY=copy is not None, STOCHASTIC=seed is not None, BLOCK=LAUNCH.block,
                num_warps=LAUNCH.num_warps,
            )  # fmt: skip
    for written in (param, exp_avg, exp_avg_sq, step, copy):
        if written is not None:
            torch.autograd.graph.increment_version(written)
    return StepResult(norm, skipped)


def _partial_norms(grad: torch.Tensor) -> torch.Tensor:
    programs = min(cdiv(grad.numel(), LAUNCH.norm_block), num_sms(grad) * LAUNCH.norm_programs)
    partials = grad.new_empty(programs, dtype=torch.float32)
    if programs:
        adamw_norm_kernel[(programs,)](
            grad, partials, grad.numel(), BLOCK=LAUNCH.norm_block, num_warps=2 * LAUNCH.num_warps
        )
    return partials


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _per_segment(value: float | torch.Tensor, segments: int, like: torch.Tensor, what: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        return like.new_full((segments,), value, dtype=torch.float32)
    if value.numel() != segments or value.dtype != torch.float32 or not value.is_contiguous():
        raise ConfigError(f"{what} has {value.numel()} {value.dtype} entries for {segments} segments; wants fp32")
    return value


def _check(
    param: torch.Tensor,
    *buffers: torch.Tensor | None,
    step: torch.Tensor,
    seed: torch.Tensor | None,
    grad_norm: torch.Tensor | None,
) -> None:
    """Raise ConfigError for whatever the kernels would read or write wrongly."""
    faults = []
    for name, buffer in zip(("param", "grad", "exp_avg", "exp_avg_sq", "copy"), (param, *buffers), strict=True):
        if buffer is None:
            continue
        if buffer.shape != (param.numel(),) or not buffer.is_contiguous():
            faults.append(f"{name} is {tuple(buffer.shape)}, not a contiguous ({param.numel()},)")
        if buffer.dtype not in PARAM_DTYPES:
            faults.append(f"{name} is {buffer.dtype}; fp32, bf16 and fp16 are supported")
    scalars = (("step", step, torch.int64), ("seed", seed, torch.int64), ("grad_norm", grad_norm, torch.float32))
    for name, scalar, dtype in scalars:
        if scalar is not None and (scalar.numel() != 1 or scalar.dtype != dtype):
            faults.append(f"{name} is {tuple(scalar.shape)} {scalar.dtype}, not one {dtype} on the device")
    if seed is not None and param.dtype != torch.bfloat16:
        faults.append(f"stochastic rounding (seed=) is for bf16 parameters, not {param.dtype}")
    if faults:
        raise ConfigError.from_faults(faults, where="an AdamW step")


def adamw_step_reference_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: torch.Tensor,
    lr: float | torch.Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | torch.Tensor = 0.01,
    max_norm: float | None = None,
    grad_norm: torch.Tensor | None = None,
    segment_starts: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> StepResult:
    """`adamw_step_` in plain torch, host syncs included; `seed` rounds to nearest: noise has no torch twin."""
    segments = 1 if segment_starts is None else segment_starts.numel()
    _check(param, grad, exp_avg, exp_avg_sq, copy, step=step, seed=seed, grad_norm=grad_norm)
    starts = segment_starts if segment_starts is not None else step.new_zeros(1)
    lengths = torch.diff(starts, append=starts.new_tensor([param.numel()]))
    rate = _per_segment(lr, segments, param, "lr").repeat_interleave(lengths)
    decay = _per_segment(weight_decay, segments, param, "weight_decay").repeat_interleave(lengths)
    norm = grad.float().norm() if grad_norm is None else grad_norm
    if not bool(torch.isfinite(norm)):
        return StepResult(norm, torch.ones((), dtype=torch.int32, device=param.device))
    step += 1
    clip = 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    scaled = grad.float() * clip
    first = exp_avg.float() + (1 - beta1) * (scaled - exp_avg.float())
    second = exp_avg_sq.float() * beta2 + (1 - beta2) * scaled.square()
    denominator = second.sqrt() / math.sqrt(1 - beta2 ** int(step)) + eps
    new = param.float() * (1 - rate * decay) - rate / (1 - beta1 ** int(step)) * first / denominator
    for target, value in ((param, new), (exp_avg, first), (exp_avg_sq, second), (copy, new)):
        if target is not None:
            target.copy_(value)
    return StepResult(norm, torch.zeros((), dtype=torch.int32, device=param.device))
