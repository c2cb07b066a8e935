"""e4m3 matrix products with a scale for each row, and the pass that makes the rows (Micikevicius et al., 2209.05433).

    scale[t] = max_h |x[t, h]| / 448        (1 for a row of zeros)          q[t, h] = e4m3(x[t, h] / scale[t])
    x w^T    ~ scale_x[t] scale_w[n] sum_h q_x[t, h] q_w[n, h]              summed in fp32, scaled, rounded once

448 is the largest e4m3 number, so a row's largest element keeps its place and nothing saturates. Rounding to 3 mantissa
bits costs 2^-4 of an element at most, 2^-5.3 in the mean square. Products are taken along rows of both factors, so a
frozen weight W (N, H) is held twice: by rows of W for x W^T, by rows of W^T for dout W.

Layers on one input have one gradient of it, sum_i dout_i W_i. Their columns may lie side by side (`SideBySide`), with a
scale for each row of all of them; their dout_i are then quantised into one row each token (`quantize_rows_together`),
and the sum is one product along sum_i N_i, rounded once, instead of several that are rounded and added. A scale that
rows share costs the smaller ones nothing but numbers 2^-14 below the largest: the exponent is e4m3's own.

Bytes: `quantize_rows` reads x once and writes a byte an element (rows past 16,384 are read twice, the second time from
L2). A weight takes 2 bytes, beside whatever else holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@triton.jit
def _scale_of(bits, BLOCK_R: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr):
    """(scale, 1 / scale) of rows whose largest magnitude has these bits."""
    amax = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full([BLOCK_R], LARGEST, tl.float32))
    scale = tl.where(scale < TINY, TINY, scale)
    scale = tl.where(amax == 0, 1.0, scale)
    # |x / scale| is 448 but for rounding, and the first number that would not round to 448 is 464: no clamp, so that
    # NaN (and infinity, by inf * 0) stays NaN.
    return scale, tl.div_rn(tl.full([BLOCK_R], 1.0, tl.float32), scale)[:, None]


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
    scale, inverse = _scale_of(tl.max(bits, axis=1), BLOCK_R, LARGEST, TINY)
    tl.store(scale_ptr + rows, scale, in_rows)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_rows + cols[None, :], _e4m3(x.to(tl.float32) * inverse, dtype, ROUND_FIRST), keep)
    if WIDE:
        for start in range(BLOCK_H, H, BLOCK_H):
            part = in_rows[:, None] & (start + cols < H)[None, :]
            x = tl.load(x_rows + start + cols[None, :], part, other=0.0)
            tl.store(out_rows + start + cols[None, :], _e4m3(x.to(tl.float32) * inverse, dtype, ROUND_FIRST), part)


@triton.jit
def _store_part(out_ptr, rows, x, inverse, WIDTH: tl.constexpr, AT: tl.constexpr, N: tl.constexpr, in_rows,
                ROUND_FIRST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    values = _e4m3(x.to(tl.float32) * inverse, out_ptr.dtype.element_ty, ROUND_FIRST)
    tl.store(out_ptr + rows[:, None] * WIDTH + AT + cols[None, :], values, in_rows[:, None] & (cols < N)[None, :])


@triton.jit
def _load_part(x_ptr, x_row, rows, in_rows, N: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    return tl.load(x_ptr + rows[:, None] * x_row + cols[None, :], in_rows[:, None] & (cols < N)[None, :], other=0.0)


@kernel(do_not_specialize=["n_rows"])
def quantize_rows_together_kernel(
    a_ptr, a_row, b_ptr, b_row, c_ptr, c_row, out_ptr, scale_ptr, n_rows,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr,
    ROUND_FIRST: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = rows < n_rows
    a = _load_part(a_ptr, a_row, rows, in_rows, A, BLOCK_A)
    b = _load_part(b_ptr, b_row, rows, in_rows, B, BLOCK_B)
    bits = tl.maximum(tl.max(_magnitude(a), axis=1), tl.max(_magnitude(b), axis=1))
    if C > 0:
        c = _load_part(c_ptr, c_row, rows, in_rows, C, BLOCK_C)
        bits = tl.maximum(bits, tl.max(_magnitude(c), axis=1))
    scale, inverse = _scale_of(bits, BLOCK_R, LARGEST, TINY)
    tl.store(scale_ptr + rows, scale, in_rows)
    _store_part(out_ptr, rows, a, inverse, A + B + C, 0, A, in_rows, ROUND_FIRST, BLOCK_A)
    _store_part(out_ptr, rows, b, inverse, A + B + C, A, B, in_rows, ROUND_FIRST, BLOCK_B)
    if C > 0:
        _store_part(out_ptr, rows, c, inverse, A + B + C, A + B, C, in_rows, ROUND_FIRST, BLOCK_C)


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


def together(widths: Sequence[int]) -> bool:
    """Whether rows of these widths can be quantised together: two or three, within one program's registers."""
    return 2 <= len(widths) <= 3 and sum(next_power_of_2(width) for width in widths) <= 2 * MAX_TILE


def launch_together(n_rows: int, widths: Sequence[int]) -> tuple[Launch, tuple[int, ...]]:
    """As `launch_of`, 16 elements a thread of the widest part; and the columns of each part."""
    blocks = tuple(next_power_of_2(width) for width in widths)
    block_rows = max(1, min(4096 // next_power_of_2(sum(blocks)), next_power_of_2(n_rows)))
    num_warps = min(32, max(1, block_rows * max(blocks) // (32 * 16)))
    return Launch(block_rows, max(blocks), num_warps, cdiv(n_rows, block_rows)), blocks


def quantize_rows_together(xs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of two or three xs (T, N_i), all in one dtype, side by side in e4m3 (T, sum N_i), one fp32 scale (T,) a row.

    In one launch. Raises ConfigError for other shapes, dtypes and widths (`together`), BackendUnavailableError off the
    GPU.
    """
    values, scale = _outputs_together(xs)
    require_device(*xs, values, scale)
    if values.shape[0] == 0:
        return values, scale
    rows = [as_rows(x) for x in xs]
    widths = [x.shape[1] for x in rows]
    launch, blocks = launch_together(values.shape[0], widths)
    a, b, c = (*rows, rows[0])[:3]
    third = widths[2] if len(rows) == 3 else 0
    with on_device(values):
        quantize_rows_together_kernel[(launch.programs,)](
            a, a.stride(0), b, b.stride(0), c, c.stride(0), values, scale, values.shape[0],
            A=widths[0], B=widths[1], C=third, LARGEST=LARGEST, TINY=TINY, ROUND_FIRST=interpreting(),
            BLOCK_R=launch.block_rows, BLOCK_A=blocks[0], BLOCK_B=blocks[1], BLOCK_C=blocks[2] if third else 1,
            num_warps=launch.num_warps,
        )  # fmt: skip
    return values, scale


def quantize_rows_together_reference(xs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows_together` in plain torch."""
    values, scale = _outputs_together(xs)
    return quantize_rows_reference(torch.cat(list(xs), dim=1), out=(values, scale))


def _outputs_together(xs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = all(x.dim() == 2 and x.shape[1] > 0 and x.dtype in IN_DTYPES for x in xs)
    if not rows or len({(x.shape[0], x.dtype) for x in xs}) != 1 or not together([x.shape[1] for x in xs]):
        raise ConfigError("rows of two or three tensors (T, N_i) in one dtype of fp32, bf16 or fp16 are made e4m3 "
                          f"together; got {', '.join(f'{tuple(x.shape)} of {x.dtype}' for x in xs)}")  # fmt: skip
    tokens, width = xs[0].shape[0], sum(x.shape[1] for x in xs)
    return (torch.empty((tokens, width), dtype=E4M3, device=xs[0].device),
            xs[0].new_empty(tokens, dtype=torch.float32))


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


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Columns of several weights (N_i, H) on one input: `columns` (H, sum N_i) with one `scale` (H,), e4m3 and fp32."""

    columns: torch.Tensor
    scale: torch.Tensor
    widths: tuple[int, ...]

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor]) -> SideBySide:
        return cls(*quantize_rows(_columns_of(weights)), tuple(weight.shape[0] for weight in weights))

    def renew_(self, weights: Sequence[torch.Tensor]) -> None:
        """Quantise weights of the same shapes again, into the same memory."""
        quantize_rows(_columns_of(weights), out=(self.columns, self.scale))


def _columns_of(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([weight.detach().t() for weight in weights], dim=1)


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A frozen weight (N, H) in e4m3, by its rows for x W^T and by those of its transpose for dout W.

    `rows` (N, H) with `row_scale` (N,); `columns` (H, N) with `column_scale` (H,). `source_dtype`: what it was made of.
    `beside`, where there is one, holds these columns with those of other weights, of which this one is number `place`.
    """

    rows: torch.Tensor
    row_scale: torch.Tensor
    columns: torch.Tensor
    column_scale: torch.Tensor
    source_dtype: torch.dtype
    beside: SideBySide | None = None
    place: int = 0

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape

    @classmethod
    def of(cls, weight: torch.Tensor) -> Fp8Weight:
        """Quantise `weight` (N, H), which is left as it is. Raises ConfigError unless `fits(weight.shape)`."""
        _check(weight)
        detached = weight.detach()
        return cls(*quantize_rows(detached), *quantize_rows(_columns_of([weight])), weight.dtype)

    @classmethod
    def of_several(cls, weights: Sequence[torch.Tensor]) -> list[Fp8Weight]:
        """Quantise weights (N_i, H) of layers on one input, their columns side by side. Raises ConfigError as `of`."""
        for weight in weights:
            _check(weight)
        beside = SideBySide.of(weights)
        parts = beside.columns.split(beside.widths, dim=1)
        return [cls(*quantize_rows(weight.detach()), part, beside.scale, weight.dtype, beside, place)
                for place, (weight, part) in enumerate(zip(weights, parts, strict=True))]

    def renew_(self, weight: torch.Tensor, others: Sequence[torch.Tensor] = ()) -> None:
        """Quantise `weight` of the same shape and device again, into the same memory: captured graphs read it there.

        Args:
            others: all weights that lie side by side, this one among them.
        """
        quantize_rows(weight.detach(), out=(self.rows, self.row_scale))
        if self.beside is not None:
            self.beside.renew_(others)
        else:
            quantize_rows(_columns_of([weight]), out=(self.columns, self.column_scale))

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (N, H) that the forward multiplies by."""
        return (self.rows.float() * self.row_scale[:, None]).to(dtype)

    def dequantized_columns(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (N, H) that the backward multiplies by: rounded with other scales than the forward's."""
        return (self.columns.float() * self.column_scale[:, None]).t().to(dtype)


def _check(weight: torch.Tensor) -> None:
    if not fits(weight.shape):
        raise ConfigError(f"an fp8 weight has two dimensions, multiples of {MULTIPLE}; got {tuple(weight.shape)}")


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
