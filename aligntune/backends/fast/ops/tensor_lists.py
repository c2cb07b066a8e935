"""Clipping and AdamW of many tensors where they lie, each in as many launches as of one.

LoRA trains some hundred small tensors, and an optimizer that goes through them in groups launches for longer than it
computes: of a 1B model's 224 factors torch's clipping and fused AdamW take 0.43 ms, three times what their bytes do.
Here a table on the device says where each tensor lies, and a program finds its own part of one in it:

    n = sqrt(sum_i ||g_i||^2)        one launch, and one that sums what its programs found, in a fixed order
    g_i <- min(1, max_norm / (n + 1e-6)) g_i             one launch; it reads and writes nothing where the factor is 1
    AdamW (`ops.adamw`, the same arithmetic)             one launch, and torch's that advance the steps

Bytes a number: the norm reads g, clipping reads and writes it, AdamW reads p, g, m, v and writes p, m, v: in bf16 2, 4
and 14. A table is made when the tensors' places change, and takes 12 bytes for each `SPAN` numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from aligntune.backends.fast.ops._runtime import cdiv, kernel, on_device, require_device
from aligntune.backends.fast.ops.adamw import PARAM_DTYPES, adamw_corrections, adamw_update
from aligntune.errors import ConfigError

SPAN = 8192
"""Numbers of one tensor that a program takes. 11 million in LoRA's factors then make 10 programs a multiprocessor."""
WIDE = 8
"""Tensors that all begin at multiples of so many of their numbers, and hold multiples of it, are read 16 bytes wide."""


@dataclass(frozen=True)
class Launch:
    """Numbers that a program has in flight at a time, and its warps: of the norm and of clipping, and of the step."""

    norm_block: int = 4096
    norm_warps: int = 8
    block: int = 1024
    num_warps: int = 4
    reduce_block: int = 4096


LAUNCH = Launch()


@triton.jit
def place(table_ptr, programs_ptr, num_tensors, num_programs, SPAN: tl.constexpr, ALIGNED: tl.constexpr):
    """(number of the program's tensor, first of its numbers, how many the tensor has)."""
    program = tl.program_id(0).to(tl.int64)
    which = tl.load(programs_ptr + program).to(tl.int64)
    start = tl.load(programs_ptr + num_programs + program).to(tl.int64) * SPAN
    numel = tl.load(table_ptr + which)
    if ALIGNED:
        numel = tl.multiple_of(numel, 8)
    return which, start, numel


@triton.jit
def begin(table_ptr, column: tl.constexpr, which, num_tensors, ALIGNED: tl.constexpr):
    """Where the tensor begins, in numbers behind the first one of its column."""
    found = tl.load(table_ptr + column * num_tensors + which)
    if ALIGNED:
        found = tl.multiple_of(found, 8)
    return found


@kernel(do_not_specialize=["num_tensors", "num_programs"])
def tensors_norm_kernel(
    grad_ptr, table_ptr, programs_ptr, partial_ptr, num_tensors, num_programs,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    which, start, numel = place(table_ptr, programs_ptr, num_tensors, num_programs, SPAN, ALIGNED)
    grads = grad_ptr + begin(table_ptr, 1, which, num_tensors, ALIGNED)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in tl.static_range(SPAN // BLOCK):
        index = start + block * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grads + index, mask=index < numel, other=0.0).to(tl.float32)
        total += grad * grad
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total))


@kernel(do_not_specialize=["num_partials"])
def tensors_clip_kernel(partial_ptr, norm_ptr, coefficient_ptr, num_partials, max_norm, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_partials, BLOCK):
        total += tl.load(partial_ptr + start + lane, mask=start + lane < num_partials, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total))
    coefficient = max_norm / (norm + 1e-6)
    # Of a norm that is no number it is none either, as torch has it; a minimum would drop it.
    coefficient = tl.where(coefficient > 1.0, 1.0, coefficient)
    tl.store(norm_ptr, norm)
    tl.store(coefficient_ptr, coefficient)


@kernel(do_not_specialize=["num_tensors", "num_programs"])
def tensors_scale_kernel(
    grad_ptr, table_ptr, programs_ptr, coefficient_ptr, num_tensors, num_programs,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    coefficient = tl.load(coefficient_ptr)
    if coefficient != 1.0:  # also where it is no number
        which, start, numel = place(table_ptr, programs_ptr, num_tensors, num_programs, SPAN, ALIGNED)
        grads = grad_ptr + begin(table_ptr, 1, which, num_tensors, ALIGNED)
        for block in tl.static_range(SPAN // BLOCK):
            index = start + block * BLOCK + tl.arange(0, BLOCK)
            grad = tl.load(grads + index, mask=index < numel, other=0.0).to(tl.float32) * coefficient
            tl.store(grads + index, grad.to(grad_ptr.dtype.element_ty), mask=index < numel)


@kernel(do_not_specialize=["num_tensors", "num_programs"])
def tensors_adamw_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, step_ptr, table_ptr, programs_ptr, num_tensors, num_programs,
    lr, decay, log_beta1, log_beta2, one_minus_beta1, beta2, one_minus_beta2, eps,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    which, start, numel = place(table_ptr, programs_ptr, num_tensors, num_programs, SPAN, ALIGNED)
    params = param_ptr + begin(table_ptr, 1, which, num_tensors, ALIGNED)
    grads = grad_ptr + begin(table_ptr, 2, which, num_tensors, ALIGNED)
    exp_avgs = exp_avg_ptr + begin(table_ptr, 3, which, num_tensors, ALIGNED)
    exp_avg_sqs = exp_avg_sq_ptr + begin(table_ptr, 4, which, num_tensors, ALIGNED)
    step = tl.load(step_ptr + begin(table_ptr, 5, which, num_tensors, False))
    inverse_correction1, root_correction2 = adamw_corrections(step, log_beta1, log_beta2)
    for block in tl.static_range(SPAN // BLOCK):
        index = start + block * BLOCK + tl.arange(0, BLOCK)
        mask = index < numel
        param = tl.load(params + index, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grads + index, mask=mask, other=0.0).to(tl.float32)
        exp_avg = tl.load(exp_avgs + index, mask=mask, other=0.0).to(tl.float32)
        exp_avg_sq = tl.load(exp_avg_sqs + index, mask=mask, other=0.0).to(tl.float32)
        param, exp_avg, exp_avg_sq = adamw_update(
            param, grad, exp_avg, exp_avg_sq, lr, decay, inverse_correction1, root_correction2, one_minus_beta1, beta2,
            one_minus_beta2, eps,
        )  # fmt: skip
        tl.store(exp_avgs + index, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=mask)
        tl.store(exp_avg_sqs + index, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
        tl.store(params + index, param.to(param_ptr.dtype.element_ty), mask=mask)


Column = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Table:
    """Where the tensors of some columns lie, K of them in each, in int64 (1 + columns, K): sizes, then beginnings.

    `programs`: int32 (2, P), the tensor of each program and which of its spans. `lowest`: of each column the number of
    the tensor that lies first, from which the others are counted. No tensor is kept: gradients come and go.
    """

    addresses: list[list[int]]
    lowest: list[int]
    table: torch.Tensor
    programs: torch.Tensor
    aligned: bool

    @property
    def counts(self) -> tuple[int, int]:
        """(K, P)."""
        return self.table.shape[1], self.programs.shape[1]


@dataclass
class Tables:
    """Tables that were made, by what they are for: one is made anew where a tensor lies elsewhere than before."""

    made: dict[tuple[object, ...], Table] = field(default_factory=dict)

    def of(
        self, name: tuple[object, ...], columns: Mapping[str, Column], scalars: Mapping[str, Column] | None = None
    ) -> tuple[Table, list[torch.Tensor]]:
        """The table of `columns`, each of tensors of one dtype, as long as the first's, and of `scalars`, of one number
        each; and the tensor of each column that lies first.

        Raises ConfigError for tensors that do not fit, BackendUnavailableError off the GPU: told as a table is made.
        """
        scalars = scalars or {}
        every = [*columns.values(), *scalars.values()]
        addresses = [[tensor.data_ptr() for tensor in column] for column in every]
        sizes = [tensor.numel() for tensor in every[0]]
        found = self.made.get(name)
        if found is None or found.addresses != [sizes, *addresses]:
            _check(columns, scalars)
            require_device(*(tensor for column in every for tensor in column))
            programs = None if found is None or found.addresses[0] != sizes else found.programs
            found = self.made[name] = _table(every, len(columns), sizes, addresses, programs)
        return found, [column[number] for column, number in zip(every, found.lowest, strict=True)]


def _table(
    every: list[Column], wide: int, sizes: list[int], addresses: list[list[int]], programs: torch.Tensor | None
) -> Table:
    """`wide`: so many of the first columns are read as wide as their places allow. `programs`: as sizes make them."""
    lowest, rows = [], [sizes]
    aligned = all(size % WIDE == 0 for size in sizes)
    for number, (column, places) in enumerate(zip(every, addresses, strict=True)):
        lowest.append(min(range(len(column)), key=places.__getitem__))
        width = column[0].element_size()
        rows.append([(place - places[lowest[-1]]) // width for place in places])
        aligned = aligned and (number >= wide or all(place % (WIDE * width) == 0 for place in places))
    device = every[0][0].device
    if programs is None:
        counts = np.array([cdiv(size, SPAN) for size in sizes])
        which = np.arange(len(sizes)).repeat(counts)
        spans = np.arange(len(which)) - (counts.cumsum() - counts)[which]
        programs = _sent(torch.from_numpy(np.stack([which, spans]).astype(np.int32)), device)
    return Table([sizes, *addresses], lowest, _sent(torch.tensor(rows), device), programs, aligned)


def _sent(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without a wait."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


# ------------------------------------------------------------------------------------------------------------- clipping


def clip_grads_(grads: Column, max_norm: float, *, tables: Tables | None = None) -> torch.Tensor:
    """Scale gradients in place to the norm `max_norm` if theirs, of all together, is larger; returns theirs.

    Args:
        grads: contiguous tensors of any shapes, fp32, bf16 or fp16 (they may differ), on one device.
        max_norm: infinity: none is scaled, if the norm is finite.
        tables: keeps what says where they lie, for the next call, which has to give contiguous tensors of these shapes
            wherever it gives the same places.

    Returns:
        The norm before, an fp32 scalar on the device; nothing waits for it. Where it is not finite the gradients become
        what torch.nn.utils.clip_grad_norm_ (whose norm is in the gradients' dtype) makes of them: NaN, or 0 for finite
        ones beside an infinite one under a finite `max_norm`.

    Raises ConfigError for tensors that do not fit, BackendUnavailableError off the GPU.
    """
    tables = Tables() if tables is None else tables
    _one_device(grads)
    parts = [tables.of(("clip", dtype), {"gradients": own}) for dtype, own in _by_dtype(grads)]
    device = grads[0].device if grads else torch.device("cpu")
    norm, coefficient = torch.zeros(2, dtype=torch.float32, device=device)
    partials = torch.empty(sum(table.counts[1] for table, _ in parts), dtype=torch.float32, device=device)
    if not partials.numel():
        return norm
    with on_device(partials):
        done = 0
        for table, bases in parts:
            tensors, programs = table.counts
            if programs:
                tensors_norm_kernel[(programs,)](
                    *bases, table.table, table.programs, partials[done:], tensors, programs,
                    SPAN=SPAN, BLOCK=LAUNCH.norm_block, ALIGNED=table.aligned, num_warps=LAUNCH.norm_warps,
                )  # fmt: skip
            done += programs
        tensors_clip_kernel[(1,)](partials, norm, coefficient, done, float(max_norm), BLOCK=LAUNCH.reduce_block,
                                  num_warps=LAUNCH.norm_warps)  # fmt: skip
        for table, bases in parts:
            tensors, programs = table.counts
            if programs:
                tensors_scale_kernel[(programs,)](
                    *bases, table.table, table.programs, coefficient, tensors, programs,
                    SPAN=SPAN, BLOCK=LAUNCH.norm_block, ALIGNED=table.aligned, num_warps=LAUNCH.norm_warps,
                )  # fmt: skip
    torch.autograd.graph.increment_version(grads)
    return norm


def clip_grads_reference_(grads: Column, max_norm: float, *, tables: Tables | None = None) -> torch.Tensor:
    """`clip_grads_` in plain torch; `tables` says nothing to it."""
    _one_device(grads)
    _check({"gradients": grads}, {})
    norm = torch.stack([grad.float().norm() for grad in grads]).norm() if grads else torch.zeros(())
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.copy_(grad.float() * coefficient)
    return norm


# ---------------------------------------------------------------------------------------------------------------- AdamW


def adamw_tensors_(
    params: Column,
    grads: Column,
    exp_avgs: Column,
    exp_avg_sqs: Column,
    steps: Column,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    tables: Tables | None = None,
) -> None:
    """One step of AdamW, in place, of tensors of any shapes, as torch.optim.AdamW with `fused=True` makes it.

    Args:
        params: contiguous tensors, fp32, bf16 or fp16, on one device.
        grads, exp_avgs, exp_avg_sqs: of the same shapes; dtypes may differ from tensor to tensor. All arithmetic is
            fp32, and what is stored is rounded once. `grads` are read.
        steps: fp32 scalars on the device, the updates that each parameter has had; they are advanced.
        tables: as for `clip_grads_`.

    Raises ConfigError for tensors that do not fit, BackendUnavailableError off the GPU.
    """
    tables = Tables() if tables is None else tables
    _as_many(params, grads, exp_avgs, exp_avg_sqs, steps)
    _one_device(params)
    parts = []
    for dtypes, *own, counts in _by_dtype(params, grads, exp_avgs, exp_avg_sqs, steps):
        parts.append(tables.of(("adamw", dtypes), dict(zip(_COLUMNS, own, strict=True)), {"steps": counts}))
    if not parts:
        return
    torch._foreach_add_(list(steps), 1)
    with on_device(params[0]):
        for table, bases in parts:
            tensors, programs = table.counts
            if programs:
                tensors_adamw_kernel[(programs,)](
                    *bases, table.table, table.programs, tensors, programs,
                    float(lr), float(weight_decay), _log(beta1), _log(beta2), 1.0 - beta1, beta2, 1.0 - beta2, eps,
                    SPAN=SPAN, BLOCK=LAUNCH.block, ALIGNED=table.aligned, num_warps=LAUNCH.num_warps,
                )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])


def adamw_tensors_reference_(
    params: Column,
    grads: Column,
    exp_avgs: Column,
    exp_avg_sqs: Column,
    steps: Column,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    tables: Tables | None = None,
) -> None:
    """`adamw_tensors_` in plain torch, which waits for the steps; `tables` says nothing to it."""
    _as_many(params, grads, exp_avgs, exp_avg_sqs, steps)
    _one_device(params)
    _check(dict(zip(_COLUMNS, (params, grads, exp_avgs, exp_avg_sqs), strict=True)), {"steps": steps})
    for param, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        first = exp_avg.float() + (1 - beta1) * (grad.float() - exp_avg.float())
        second = exp_avg_sq.float() * beta2 + (1 - beta2) * grad.float().square()
        denominator = second.sqrt() / math.sqrt(1 - beta2 ** int(step)) + eps
        new = param.float() * (1 - lr * weight_decay) - lr / (1 - beta1 ** int(step)) * first / denominator
        for target, value in ((param, new), (exp_avg, first), (exp_avg_sq, second)):
            target.copy_(value)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _by_dtype(*columns: Column) -> list[tuple[Any, ...]]:
    """(dtypes, the columns' tensors of these dtypes) for each set of dtypes; of one column, its dtype."""
    found: dict[tuple[torch.dtype, ...], list[tuple[torch.Tensor, ...]]] = {}
    for row in zip(*columns, strict=True):
        found.setdefault(tuple(tensor.dtype for tensor in row), []).append(row)
    return [(dtypes, *map(list, zip(*rows, strict=True))) for dtypes, rows in found.items()]


_COLUMNS = ("parameters", "gradients", "exp_avgs", "exp_avg_sqs")


def _as_many(*columns: Column) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ConfigError(f"an AdamW step over lists of {lengths} tensors: of parameters, gradients, exp_avgs, "
                          "exp_avg_sqs and steps there must be as many")


def _one_device(tensors: Column) -> None:
    if len({tensor.device for tensor in tensors}) > 1:
        raise ConfigError("tensors of an optimizer's step are on several devices: those of each are a call of its own")


def _check(columns: Mapping[str, Column], scalars: Mapping[str, Column]) -> None:
    """Raise ConfigError for whatever the kernels would read or write wrongly."""
    faults = []
    first = next(iter(columns.values()))
    for name, column in columns.items():
        for number, (tensor, like) in enumerate(zip(column, first, strict=True)):
            if tensor.shape != like.shape or not tensor.is_contiguous():
                faults.append(f"{name}[{number}] is {tuple(tensor.shape)} with strides {tensor.stride()}, "
                              f"not a contiguous {tuple(like.shape)}")
            if tensor.dtype not in PARAM_DTYPES:
                faults.append(f"{name}[{number}] is {tensor.dtype}; fp32, bf16 and fp16 are supported")
            if tensor.device != like.device:
                faults.append(f"{name}[{number}] is on {tensor.device}, what it belongs to on {like.device}")
    for name, column in scalars.items():
        for number, (scalar, like) in enumerate(zip(column, first, strict=True)):
            if scalar.numel() != 1 or scalar.dtype != torch.float32 or scalar.device != like.device:
                faults.append(f"{name}[{number}] is {tuple(scalar.shape)} {scalar.dtype} on {scalar.device}, "
                              f"not one torch.float32 on {like.device}")
    if faults:
        raise ConfigError.from_faults(faults, where="tensors of an optimizer's step")
