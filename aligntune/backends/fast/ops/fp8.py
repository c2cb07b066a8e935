"""e4m3 matrix products with a scale for each row, and the pass that makes the rows (Micikevicius et al., 2209.05433).

    scale[t] = max_h |x[t, h]| / 448        (1 for a row of zeros)          q[t, h] = e4m3(x[t, h] / scale[t])
    x w^T    ~ scale_x[t] scale_w[n] sum_h q_x[t, h] q_w[n, h]              summed in fp32, scaled, rounded once

448 is the largest e4m3 number, so a row's largest element keeps its place and nothing saturates. Rounding to 3 mantissa
bits costs 2^-4 of an element at most, 2^-5.3 in the mean square. Products are taken along rows of both factors, so a
frozen weight W (N, H) is held twice: by rows of W for x W^T, by rows of W^T for dout W.

Bytes: `quantize_rows` reads x once and writes a byte an element (rows past 16,384 are read twice, the second time from
L2). A weight takes 2 bytes, beside whatever else holds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from aligntune.backends.fast.ops._runtime import (
    as_rows,
    cdiv,
    interpreting,
    kernel,
    next_power_of_2,
    on_device,
    require_device,
)
from aligntune.errors import ConfigError

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
TINY = 2.0**-126  # the smallest scale: 1 / scale must be finite
IN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TILE = 16384  # one row in the registers of 1024 threads; a longer one is walked twice
MULTIPLE = 16  # what the product asks of N and H: rows of both factors start at 16-byte addresses

# Hopper sums e4m3 products with about 14 bits; without the fast sum it moves to fp32 every 128 products. What the fast
# sum loses (2^-14 a step of 32 products) is below what rounding the factors to 4 bits costs (2^-5 an element), and the
# slow one gives back a large part of the speed that fp8 is for.
FAST_ACCUM = True


@dataclass(frozen=True)
class Launch:
    """Whole rows, `block_rows` a program, 16 elements a thread: a 16-byte store each."""

    block_rows: int
    block_cols: int
    num_warps: int
    programs: int


def launch_of(n_rows: int, width: int) -> Launch:
    block_cols = min(next_power_of_2(width), MAX_TILE)
    block_rows = max(1, min(4096 // block_cols, next_power_of_2(n_rows)))
    num_warps = min(32, max(1, block_rows * block_cols // (32 * 16)))
    return Launch(block_rows, block_cols, num_warps, cdiv(n_rows, block_rows))


@triton.jit
def _magnitude(x):
    # As integers: a maximum of floats would pass NaN by, and here NaN is larger than infinity.
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _e4m3(x, dtype: tl.constexpr, ROUND_FIRST: tl.constexpr):
    if ROUND_FIRST:
        # Triton's interpreter loses the carry where rounding reaches the next power of two (124 would become 64): it
        # is given numbers that need no rounding. 2^-6 is the smallest normal e4m3 number, 2^-9 the step below it.
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        small = tl.where(x < 0, -((-x + 16384.0) - 16384.0), (x + 16384.0) - 16384.0)
        x = tl.where(x == x, tl.where(tl.abs(x) < 0.015625, small, normal), x)
    return x.to(dtype)


@kernel(do_not_specialize=["n_rows"])
def quantize_rows_kernel(
    x_ptr, x_row, out_ptr, scale_ptr, n_rows,
    H: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr, WIDE: tl.constexpr,
    ROUND_FIRST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_H)
    in_rows = rows < n_rows
    keep = in_rows[:, None] & (cols < H)[None, :]
    x_rows, out_rows = x_ptr + rows[:, None] * x_row, out_ptr + rows[:, None] * H
    x = tl.load(x_rows + cols[None, :], keep, other=0.0)
    bits = _magnitude(x)
    if WIDE:
        for start in range(BLOCK_H, H, BLOCK_H):
            part = in_rows[:, None] & (start + cols < H)[None, :]
            bits = tl.maximum(bits, _magnitude(tl.load(x_rows + start + cols[None, :], part, other=0.0)))
    amax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full([BLOCK_R], LARGEST, tl.float32))
    scale = tl.where(scale < TINY, TINY, scale)
    scale = tl.where(amax == 0, 1.0, scale)
    tl.store(scale_ptr + rows, scale, in_rows)
    # |x / scale| is 448 but for rounding, and the first number that would not round to 448 is 464: no clamp, so that
    # NaN (and infinity, by inf * 0) stays NaN.
    inverse = tl.div_rn(tl.full([BLOCK_R], 1.0, tl.float32), scale)[:, None]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_rows + cols[None, :], _e4m3(x.to(tl.float32) * inverse, dtype, ROUND_FIRST), keep)
    if WIDE:
        for start in range(BLOCK_H, H, BLOCK_H):
            part = in_rows[:, None] & (start + cols < H)[None, :]
            x = tl.load(x_rows + start + cols[None, :], part, other=0.0)
            tl.store(out_rows + start + cols[None, :], _e4m3(x.to(tl.float32) * inverse, dtype, ROUND_FIRST), part)


def quantize_rows(
    x: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, H) in fp32, bf16 or fp16 as e4m3 (T, H) and scales (T,) in fp32, in one launch.

    Rows may lie any stride apart. A row with a NaN or an infinity has that for its scale, so that products
    show it. `out`: the two contiguous tensors to write into. Raises ConfigError for other shapes and dtypes,
    BackendUnavailableError off the GPU.
    """
    values, scale = _outputs(x, out)
    require_device(x, values, scale)
    if x.numel() == 0:
        scale.fill_(1.0)
        return values, scale
    rows = as_rows(x)
    launch = launch_of(*rows.shape)
    with on_device(rows):
        quantize_rows_kernel[(launch.programs,)](
            rows, rows.stride(0), values, scale, rows.shape[0], H=rows.shape[1], LARGEST=LARGEST, TINY=TINY,
            WIDE=rows.shape[1] > launch.block_cols, ROUND_FIRST=interpreting(), BLOCK_R=launch.block_rows,
            BLOCK_H=launch.block_cols, num_warps=launch.num_warps,
        )  # fmt: skip
    return values, scale


def quantize_rows_reference(
    x: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` in plain torch."""
    values, scale = _outputs(x, out)
    wide = x.float()
    amax = wide.abs().amax(1) if x.numel() else wide.new_zeros(x.shape[0])
    quotient = amax / torch.full_like(amax, LARGEST)  # by a number, CUDA multiplies with its inverse
    quotient = torch.where(quotient < TINY, TINY, quotient)
    scale.copy_(torch.where(amax == 0, 1.0, quotient))
    values.copy_((wide * (1 / scale)[:, None]).to(E4M3))
    return values, scale


def _outputs(x: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor]:
    if x.dim() != 2 or x.dtype not in IN_DTYPES:
        raise ConfigError(f"rows of fp32, bf16 or fp16 are made e4m3, (T, H); got {tuple(x.shape)} of {x.dtype}")
    if out is None:
        return torch.empty(x.shape, dtype=E4M3, device=x.device), x.new_empty(x.shape[0], dtype=torch.float32)
    values, scale = out
    fits = values.shape == x.shape and values.dtype == E4M3 and scale.shape == x.shape[:1]
    if not (fits and scale.dtype == torch.float32 and values.is_contiguous() and scale.is_contiguous()):
        raise ConfigError(
            f"out is {tuple(values.shape)} {values.dtype} and {tuple(scale.shape)} {scale.dtype}; wanted contiguous "
            f"{tuple(x.shape)} {E4M3} and {tuple(x.shape[:1])} torch.float32"
        )
    return values, scale


@dataclass(frozen=True)
class Fp8Weight:
    """A frozen weight (N, H) in e4m3, by its rows for x W^T and by those of its transpose for dout W.

    `rows` (N, H) with `row_scale` (N,); `columns` (H, N) with `column_scale` (H,). `source_dtype`: what it was made of.
    """

    rows: torch.Tensor
    row_scale: torch.Tensor
    columns: torch.Tensor
    column_scale: torch.Tensor
    source_dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape

    @classmethod
    def of(cls, weight: torch.Tensor) -> Fp8Weight:
        """Quantise `weight` (N, H), which is left as it is. Raises ConfigError unless `fits(weight.shape)`."""
        if not fits(weight.shape):
            raise ConfigError(f"an fp8 weight has two dimensions, multiples of {MULTIPLE}; got {tuple(weight.shape)}")
        detached = weight.detach()
        return cls(*quantize_rows(detached), *quantize_rows(detached.t().contiguous()), weight.dtype)

    def renew_(self, weight: torch.Tensor) -> None:
        """Quantise `weight` of the same shape and device again, into the same memory: captured graphs read it there."""
        detached = weight.detach()
        quantize_rows(detached, out=(self.rows, self.row_scale))
        quantize_rows(detached.t().contiguous(), out=(self.columns, self.column_scale))

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (N, H) that the forward multiplies by."""
        return (self.rows.float() * self.row_scale[:, None]).to(dtype)

    def dequantized_columns(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (N, H) that the backward multiplies by: rounded with other scales than the forward's."""
        return (self.columns.float() * self.column_scale[:, None]).t().to(dtype)


def fits(shape: torch.Size) -> bool:
    """Whether a weight of this shape can be multiplied in fp8."""
    return len(shape) == 2 and all(size > 0 and size % MULTIPLE == 0 for size in shape)


def fp8_mm(
    x8: torch.Tensor,
    scale_x: torch.Tensor,
    w8: torch.Tensor,
    scale_w: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x8 (T, K) times the transpose of w8 (N, K), both e4m3 with a scale for each row, plus bias (N,): (T, N).

    On a GPU `torch._scaled_mm`, whose row scales give bf16: another `out_dtype` is cast from that. T is free, N and K
    are multiples of 16. Elsewhere the reference. With a bias two roundings to `out_dtype`: the product, then the sum.
    """
    if not x8.is_cuda:
        return fp8_mm_reference(x8, scale_x, w8, scale_w, out_dtype, bias)
    if x8.shape[0] == 0:
        return x8.new_empty((0, w8.shape[0]), dtype=out_dtype)
    # The bias apart: cuBLASLt has no product with one for some T (1 and 17 by 2048 x 8192 on an H100).
    out = torch._scaled_mm(
        x8, w8.t(), scale_x[:, None], scale_w[None, :], out_dtype=torch.bfloat16, use_fast_accum=FAST_ACCUM
    ).to(out_dtype)
    return out if bias is None else out.add_(bias)


def fp8_mm_reference(
    x8: torch.Tensor,
    scale_x: torch.Tensor,
    w8: torch.Tensor,
    scale_w: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fp8_mm` in plain torch: the product in fp32, scaled, rounded once; a bias is added to that."""
    out = (torch.mm(x8.float(), w8.float().t()) * scale_x[:, None] * scale_w[None, :]).to(out_dtype)
    return out if bias is None else out.add_(bias)
