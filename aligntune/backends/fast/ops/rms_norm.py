"""RMSNorm, with or without the residual add before it, forward and backward (Zhang and Sennrich 2019, eq. 4).

    h = x + residual                              (or h = x)
    rstd = 1 / sqrt(mean(h^2) + eps)
    y = w' * h * rstd                             w' = w, or 1 + w for gemma

    g = dy * w'
    dh = rstd * (g - n * mean(g * n)) + dh_out    n = h * rstd; dh_out is the gradient of the returned sum
    dw = sum over rows of dy * n

Rounding is transformers'. "llama" rounds n to h's dtype and multiplies by w after it, so the result has the promoted
dtype of h and w; "gemma" and "olmo2" multiply in fp32 and round once, to h's dtype.

Bytes that must move, T rows of H elements of b bytes: forward 2bTH, backward 3bTH; with the residual 4bTH and 4bTH.
Whoever saves y for its backward may save what `source_of(y)` holds in its place, which the norm saves anyway, and make
y again, the same bits, for 2bTH.
The weight gradient adds 4PH written and read again for P partial sums: P is a small multiple of the SM count, so
they stay in L2, and their order is fixed: the gradient is the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch.autograd.function import once_differentiable

from aligntune.backends.fast.ops import _runtime
from aligntune.errors import unknown

# convention -> (round n before the multiplication, what is added to the weight)
CONVENTIONS: dict[str, tuple[bool, float]] = {"llama": (True, 0.0), "gemma": (False, 1.0), "olmo2": (False, 0.0)}

MAX_WIDTH = 16384  # one row in the registers of 1024 threads


@dataclass(frozen=True)
class NormLaunch:
    """`programs` programs walk tiles of `block_rows` whole rows, padded to `block_cols`; `stages` tiles in flight."""

    block_rows: int
    block_cols: int
    num_warps: int
    programs: int
    stages: int = 1


def forward_launch(n_rows: int, width: int) -> NormLaunch:
    """One tile a program, 32 elements a thread: several 16-byte loads in flight each, and no loop to wait in.

    The backward of a frozen weight takes the same.
    """
    return _launch(n_rows, width, per_thread=32)


def weight_grad_launch(n_rows: int, width: int, *, sms: int) -> NormLaunch:
    """A persistent grid, for the backward that sums the weight's gradient.

    All warps share every row, so a tile's rows add up inside a thread and the running sum takes width/threads
    registers. The next tile is fetched while this one is reduced, so one or two programs an SM keep memory busy;
    more would only add partial sums.
    """
    launch = _launch(n_rows, width, per_thread=16)
    at_once = sms * (2 if launch.num_warps <= 8 else 1)
    rounds = _runtime.cdiv(launch.programs, at_once)
    programs = _runtime.cdiv(launch.programs, rounds)  # every program gets the same number of tiles, or one fewer
    stages = 2 if launch.block_cols <= 8192 else 1  # two tiles of 16384 fp32 exceed the shared memory
    return NormLaunch(launch.block_rows, launch.block_cols, launch.num_warps, programs, stages)


def _launch(n_rows: int, width: int, *, per_thread: int) -> NormLaunch:
    """Tiles of about 4096 elements; a quarter where rows are not aligned: scalar loads take 8 times the addresses."""
    tile, per_thread = (4096, per_thread) if width % 16 == 0 else (1024, 8)
    block_cols = _runtime.next_power_of_2(width)
    block_rows = max(1, min(tile // block_cols, _runtime.next_power_of_2(n_rows)))
    num_warps = min(32, max(1, block_rows * block_cols // (32 * per_thread)))
    return NormLaunch(block_rows, block_cols, num_warps, _runtime.cdiv(n_rows, block_rows))


@_runtime.kernel(do_not_specialize=["n_rows"])
def rms_norm_forward(
    x_ptr, x_row, residual_ptr, residual_row, w_ptr, h_ptr, y_ptr, rstd_ptr, n_rows,
    EPS: tl.constexpr, H: tl.constexpr, CAST_FIRST: tl.constexpr, OFFSET: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_H)
    in_rows = rows < n_rows
    in_cols = cols < H
    keep = in_rows[:, None] & in_cols[None, :]
    out = rows[:, None] * H + cols[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row + cols[None, :], keep, other=0.0).to(tl.float32)
    n_dtype = x_ptr.dtype.element_ty
    if HAS_RESIDUAL:
        n_dtype = h_ptr.dtype.element_ty
        residual = tl.load(residual_ptr + rows[:, None] * residual_row + cols[None, :], keep, other=0.0)
        h = (x + residual.to(tl.float32)).to(n_dtype)
        tl.store(h_ptr + out, h, keep)
        x = h.to(tl.float32)  # the norm of the sum as it was stored, which is what eager sees
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / H + EPS)
    w = tl.load(w_ptr + cols, in_cols, other=0.0).to(tl.float32) + OFFSET
    n = x * rstd[:, None]
    if CAST_FIRST:
        n = n.to(n_dtype).to(tl.float32)
    tl.store(y_ptr + out, (n * w[None, :]).to(y_ptr.dtype.element_ty), keep)
    tl.store(rstd_ptr + rows, rstd, in_rows)


@_runtime.kernel(do_not_specialize=["n_rows"])
def rms_norm_again(
    h_ptr, h_row, rstd_ptr, w_ptr, y_ptr, n_rows,
    H: tl.constexpr, CAST_FIRST: tl.constexpr, OFFSET: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_H)
    in_rows = rows < n_rows
    in_cols = cols < H
    keep = in_rows[:, None] & in_cols[None, :]
    h = tl.load(h_ptr + rows[:, None] * h_row + cols[None, :], keep, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + cols, in_cols, other=0.0).to(tl.float32) + OFFSET
    n = h * tl.load(rstd_ptr + rows, in_rows, other=0.0)[:, None]
    if CAST_FIRST:
        n = n.to(h_ptr.dtype.element_ty).to(tl.float32)
    y = (n * w[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * H + cols[None, :], y, keep)


@_runtime.kernel(do_not_specialize=["n_rows"])
def rms_norm_backward(
    dy_ptr, dy_row, dh_ptr, dh_row, h_ptr, h_row, w_ptr, rstd_ptr, dx_ptr, dw_ptr, n_rows,
    H: tl.constexpr, OFFSET: tl.constexpr, HAS_DH: tl.constexpr, HAS_DW: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    in_cols = cols < H
    w = tl.load(w_ptr + cols, in_cols, other=0.0).to(tl.float32) + OFFSET
    dw = tl.zeros([BLOCK_H], dtype=tl.float32)
    for start in tl.range(pid * BLOCK_R, n_rows, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_R).to(tl.int64)
        in_rows = rows < n_rows
        keep = in_rows[:, None] & in_cols[None, :]
        h = tl.load(h_ptr + rows[:, None] * h_row + cols[None, :], keep, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * dy_row + cols[None, :], keep, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, in_rows, other=0.0)
        n = h * rstd[:, None]
        if BLOCK_H > 8192:  # held across the loop, the weight would spill
            w = tl.load(w_ptr + cols, in_cols, other=0.0).to(tl.float32) + OFFSET
        if HAS_DW:
            dw += tl.sum(dy * n, axis=0)
        g = dy * w[None, :]
        dx = rstd[:, None] * (g - n * (tl.sum(g * n, axis=1) / H)[:, None])
        if HAS_DH:
            dx += tl.load(dh_ptr + rows[:, None] * dh_row + cols[None, :], keep, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows[:, None] * H + cols[None, :], dx.to(dx_ptr.dtype.element_ty), keep)
    if HAS_DW:
        tl.store(dw_ptr + pid * H + cols, dw, in_cols)


@_runtime.kernel(do_not_specialize=["n_partials"])
def norm_weight_grad(partials_ptr, dw_ptr, n_partials, H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_P, BLOCK_H], dtype=tl.float32)
    for start in range(0, n_partials, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        keep = (rows < n_partials)[:, None] & (cols < H)[None, :]
        total += tl.load(partials_ptr + rows[:, None] * H + cols[None, :], keep, other=0.0)
    tl.store(dw_ptr + cols, tl.sum(total, axis=0).to(dw_ptr.dtype.element_ty), cols < H)


def sum_partials(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum fp32 `(P, H)` over P, in a fixed order, and round to `dtype`: `(H,)`."""
    n_partials, width = partials.shape
    dw = torch.empty(width, dtype=dtype, device=partials.device)
    # 16 columns are two 32-byte sectors; with 128 rows in flight, P of ~264 takes three trips to L2.
    norm_weight_grad[(_runtime.cdiv(width, 16),)](partials, dw, n_partials, width, 128, 16, num_warps=4)
    return dw


def _forward(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float, convention: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h, rstd), flattened to rows; h is x itself where there is no residual."""
    cast_first, offset = CONVENTIONS[convention]
    rows = _runtime.as_rows(x)
    n_rows, width = rows.shape
    added = rows if residual is None else _runtime.as_rows(residual)
    h_dtype = torch.promote_types(rows.dtype, added.dtype)
    h = rows if residual is None else torch.empty(n_rows, width, dtype=h_dtype, device=x.device)
    y_dtype = torch.promote_types(h_dtype, weight.dtype) if cast_first else h_dtype
    y = torch.empty(n_rows, width, dtype=y_dtype, device=x.device)
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    if n_rows:
        launch = forward_launch(n_rows, width)
        with _runtime.on_device(x):
            rms_norm_forward[(launch.programs,)](
                rows, rows.stride(0), added, added.stride(0), weight, h, y, rstd, n_rows,
                eps, width, cast_first, offset, residual is not None, launch.block_rows, launch.block_cols,
                num_warps=launch.num_warps,
            )  # fmt: skip
    return y, h, rstd


def _backward(
    dy: torch.Tensor, dh: torch.Tensor | None, h: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor,
    convention: str, need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(gradient of h, gradient of the weight), the first flattened to rows."""
    _, offset = CONVENTIONS[convention]
    n_rows, width = h.shape
    if not n_rows:
        return torch.empty_like(h), torch.zeros_like(weight) if need_dw else None
    dy_rows = _runtime.as_rows(dy)
    dh_rows = dy_rows if dh is None else _runtime.as_rows(dh)
    if need_dw:
        launch = weight_grad_launch(n_rows, width, sms=_runtime.num_sms(h))
    else:
        launch = forward_launch(n_rows, width)
    dx = torch.empty(n_rows, width, dtype=h.dtype, device=h.device)
    partials = torch.empty(launch.programs, width, dtype=torch.float32, device=h.device) if need_dw else rstd
    with _runtime.on_device(h):
        rms_norm_backward[(launch.programs,)](
            dy_rows, dy_rows.stride(0), dh_rows, dh_rows.stride(0), h, h.stride(0), weight, rstd, dx, partials, n_rows,
            width, offset, dh is not None, need_dw, launch.block_rows, launch.block_cols,
            launch.stages, num_warps=launch.num_warps,
        )  # fmt: skip
        return dx, sum_partials(partials, weight.dtype) if need_dw else None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float, convention: str,
        keep: bool,
    ) -> Any:  # fmt: skip
        y, h, rstd = _forward(x, weight, residual, eps, convention)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, rstd)
        ctx.convention = convention
        ctx.x_like, ctx.residual_dtype = (x.shape, x.dtype), None if residual is None else residual.dtype
        ctx.mark_non_differentiable(rstd)
        return (y.view(x.shape), rstd, h.view(x.shape)) if keep or residual is not None else (y.view(x.shape), rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, _: None, dh: torch.Tensor | None = None) -> Any:
        h, weight, rstd = ctx.saved_tensors
        shape, dtype = ctx.x_like
        need_dw = ctx.needs_input_grad[1]
        if dy is None:  # only the sum was used: its gradient passes through untouched
            grad, dw = dh, torch.zeros_like(weight) if need_dw else None
        else:
            rows, dw = _backward(dy, dh, h, weight, rstd, ctx.convention, need_dw)
            grad = rows.view(shape)
        if grad is None:
            return None, dw, None, None, None, None
        residual_grad = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
        return grad.to(dtype), dw, residual_grad, None, None, None


@dataclass
class Recipe:
    """How a norm's output is made again; `reached` is called when it is, before anything is made."""

    convention: str
    dtype: torch.dtype
    reached: Callable[[], None] | None = None


@dataclass(frozen=True)
class Source:
    """What a norm's output was made of: h (..., H), rstd (T,) in fp32 and the weight (H,); none of them has a graph."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    recipe: Recipe


_SOURCE = "_made_of"


def source_of(y: torch.Tensor) -> Source | None:
    """Of what `rms_norm` made `y`; None where it did not, where no graph was built, or where y was written to."""
    version, source = getattr(y, _SOURCE, (None, None))
    return source if version == y._version else None


def made_again(recipe: Recipe, h: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The norm's output as rows (T, H), the same bits, from `Source.tensors`."""
    if recipe.reached is not None:
        recipe.reached()
    cast_first, offset = CONVENTIONS[recipe.convention]
    rows = _runtime.as_rows(h)
    n_rows, width = rows.shape
    y = torch.empty(n_rows, width, dtype=recipe.dtype, device=h.device)
    if n_rows:
        launch = forward_launch(n_rows, width)
        with _runtime.on_device(h):
            rms_norm_again[(launch.programs,)](
                rows, rows.stride(0), rstd, weight, y, n_rows, width, cast_first, offset,
                launch.block_rows, launch.block_cols, num_warps=launch.num_warps,
            )  # fmt: skip
    return y


def _check(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, convention: str) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(unknown("RMSNorm convention", convention, CONVENTIONS))
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: the weight has shape {tuple(weight.shape)}, x's rows have {x.shape[-1]} elements")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual {tuple(residual.shape)} and x {tuple(x.shape)} differ in shape")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"rms_norm: rows of {x.shape[-1]} elements; the kernel holds at most {MAX_WIDTH}")


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    convention: str = "llama",
    residual: torch.Tensor | None = None,
    keep: bool = False,
) -> Any:
    """RMSNorm of `x` over its last dimension, or of `x + residual`.

    `x` and `residual`: (..., H), bf16, fp16 or fp32, any row strides; `weight`: (H,), any of these dtypes.
    Returns y, (..., H); with `residual` (y, x + residual), and the gradient of the sum joins inside the backward; with
    `keep` (y, x) in the same way: whoever goes on with this x spares autograd the addition of two gradients.
    y has the dtype that transformers gives it: "llama" the promoted one of the input and the weight, "gemma" and
    "olmo2" the input's. A weight that needs no gradient gets none computed.

    Raises ValueError for shapes that do not fit, an unknown convention, or H > 16384; BackendUnavailableError off GPU.
    """
    _check(x, weight, residual, convention)
    _runtime.require_device(x, weight, residual)
    weight = weight.contiguous()
    y, rstd, *rest = _RMSNorm.apply(x, weight, residual, float(eps), convention, keep)
    if torch.is_grad_enabled():
        # Also where y has no gradient, as over a frozen embedding: what it goes to may train.
        h = (rest[0] if rest else x).detach()
        setattr(y, _SOURCE, (y._version, Source((h, rstd, weight.detach()), Recipe(convention, y.dtype))))
    return (y, rest[0]) if rest else y


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    convention: str = "llama",
    residual: torch.Tensor | None = None,
    keep: bool = False,
) -> Any:
    """What transformers computes, in torch: same arguments and results as `rms_norm`; float64 stays float64."""
    _check(x, weight, residual, convention)
    cast_first, offset = CONVENTIONS[convention]
    h = x if residual is None else residual + x
    wide = h if h.dtype == torch.float64 else h.float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast_first:
        y = weight * n.to(h.dtype)
    else:
        y = (n * (offset + weight.to(wide.dtype))).to(h.dtype)
    return (y, h) if keep or residual is not None else y
