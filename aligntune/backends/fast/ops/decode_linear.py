"""Linear layers with LoRA on one input of few rows, in one launch: what a decode step is made of.

    out_i = X W_i^T + b_i + (X A_i^T) B_i^T          X (M, K), W_i (N_i, K), A_i (R, K), B_i (N_i, R)

Hu et al. (arXiv 2106.09685), eq. 3, the scaling inside B. With M of a batch the products are bound by reading the
weights once: 2 K N bytes in 16 bits. Apart, a group of n layers under adapters takes n + 2 launches, each of which
costs a few microseconds whatever it reads; here a program that holds a tile of X takes its product with W_i and with
A_i from the same loads. S_i is never stored.

fp32 weights beside X of 16 bits (full fine-tuning under autocast) are rounded in registers as a cast would round them:
4 K N bytes, where a cast in memory reads these, writes 2 K N more and reads them again.

Few tiles of N do not fill a GPU: K is split among programs, each of which adds its own part of X A_i^T B_i^T; the last
one of a tile to arrive adds all parts up, always in the same order, so that results repeat bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from aligntune.backends.fast.ops import _runtime
from aligntune.backends.fast.ops.nf4 import NF4Weight
from aligntune.errors import ConfigError

MAX_LAYERS = 3
MAX_RANK = 64
MAX_PLACES = 1024  # tiles of an output whose inner dimension is split: `launch_for` splits none that fill the SMs
MAX_ROWS = 64  # one tile: with 256 rows, on an H100, cuBLAS's four launches take 0.88 times as long


@dataclass(frozen=True)
class DecodeLaunch:
    """Tiles of `rows` x `columns`, the inner dimension `depth` at a time and in `splits` parts."""

    rows: int
    columns: int
    depth: int
    splits: int
    num_warps: int
    stages: int


def launch_for(
    rows: int, inner: int, widths: Sequence[int], sms: int, *, element_size: int = 2, weight_size: int | None = None
) -> DecodeLaunch:
    """As many programs as SMs, no more: with fewer some idle, and every split reads X and adds a part.

    X of fp32 is multiplied in three passes, each with operands in registers: larger tiles would spill. Beside X of 16
    bits a tile of fp32 weights is half as deep: as many bytes on their way, 48 KiB with four stages.
    """
    block_m = min(64 if element_size == 2 else 16, max(16, _runtime.next_power_of_2(rows)))
    columns, depth = (64, 256 // (weight_size or element_size)) if element_size == 2 else (32, 32)
    tiles = sum(_runtime.cdiv(width, columns) for width in widths) * _runtime.cdiv(rows, block_m)
    most = max(1, inner // (2 * depth))  # two loads at least to overlap
    splits = 1
    while splits < most and tiles * splits * 2 <= sms:
        splits *= 2
    return DecodeLaunch(block_m, columns, depth, splits, 4, 4)


@triton.jit
def _operand(x, UPCAST: tl.constexpr):
    """The interpreter multiplies bf16 as integers."""
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _rounded(x, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    """fp32 in `dtype`, to the nearest and ties to even, as torch casts; the interpreter cuts bits off for bf16."""
    if BY_HAND and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _place(tile, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile: its layer, that layer's width, its first column among the outputs, and the tile's number in it."""
    T0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    T1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    layer, width, first, number = 0, N0, 0, tile
    if tile >= T0:
        layer, width, first, number = 1, N1, N0, tile - T0
    if tile >= T0 + T1:
        layer, width, first, number = 2, N2, N0 + N1, tile - T0 - T1
    return layer, width, first, number


@triton.jit
def _finish(
    acc, s, up_ptr, bias_ptr, out_ptr, out_row, part_ptr, count_ptr, rows, in_rows, cols, in_cols, place, split,
    RANK: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add s B^T and the bias to a tile, up the splits, and store it; `cols` are those among all outputs."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if RANK > 0:
        rank = tl.arange(0, RANK)
        b = tl.load(up_ptr + cols.to(tl.int64)[:, None] * RANK + rank[None, :], in_cols[:, None], other=0.0)
        s = _operand(_rounded(s, dtype, UPCAST), UPCAST)
        acc = tl.dot(s, tl.trans(_operand(b, UPCAST)), acc, input_precision="tf32x3")
    out_at = out_ptr + rows.to(tl.int64)[:, None] * out_row + cols[None, :]
    keep = in_rows[:, None] & in_cols[None, :]
    if SPLITS == 1:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + cols, in_cols, other=0.0).to(tl.float32)[None, :]
        tl.store(out_at, _rounded(acc, dtype, UPCAST), keep)
    else:
        inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        parts = part_ptr + place.to(tl.int64) * SPLITS * BLOCK_M * BLOCK_N + inside
        tl.store(parts + split * BLOCK_M * BLOCK_N, acc)
        tl.debug_barrier()  # every thread's part is on its way before the count says so
        if tl.atomic_add(count_ptr + place, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for each in range(SPLITS):
                total += tl.load(parts + each * BLOCK_M * BLOCK_N, cache_modifier=".cg")
            if HAS_BIAS:
                total += tl.load(bias_ptr + cols, in_cols, other=0.0).to(tl.float32)[None, :]
            tl.store(out_at, _rounded(total, dtype, UPCAST), keep)
            tl.store(count_ptr + place, 0)  # for the next launch


@_runtime.kernel(do_not_specialize=["m"])
def decode_linear_kernel(
    x_ptr, x_row, w0_ptr, w1_ptr, w2_ptr, w0_row, w1_row, w2_row, down_ptr, up_ptr, bias_ptr, out_ptr, out_row,
    part_ptr, count_ptr, m,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = tl.cdiv(N0, BLOCK_N) + tl.cdiv(N1, BLOCK_N) + tl.cdiv(N2, BLOCK_N)
    program = tl.program_id(0)
    # Neighbours share a tile of the weight, if there are several tiles of rows: the first reads it from memory.
    blocks = tl.cdiv(m, BLOCK_M)
    block = program % blocks
    tile = program // blocks % TILES
    split = program // blocks // TILES
    layer, width, first, number = _place(tile, N0, N1, N2, BLOCK_N)
    w_ptr, w_row = w0_ptr, w0_row
    if layer == 1:
        w_ptr, w_row = w1_ptr, w1_row
    if layer == 2:
        w_ptr, w_row = w2_ptr, w2_row
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = number * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < m, cols < width
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    # Each split a whole number of blocks: 16-byte loads stay aligned.
    PART: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    begin = split * PART
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rank = tl.arange(0, max(RANK, 16))
    s = tl.zeros((BLOCK_M, max(RANK, 16)), tl.float32)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_row
    w_rows = w_ptr + cols.to(tl.int64)[:, None] * w_row
    down_rows = down_ptr + (layer * RANK + rank).to(tl.int64)[:, None] * K
    for at in range(0, PART, BLOCK_K):
        inner = begin + at + tl.arange(0, BLOCK_K)
        in_k = (inner < K)[None, :]
        x = _operand(tl.load(x_rows + inner[None, :], in_rows[:, None] & in_k, other=0.0), UPCAST)
        w = tl.load(w_rows + inner[None, :], in_cols[:, None] & in_k, other=0.0)
        if w0_ptr.dtype.element_ty != dtype:
            w = _rounded(w, dtype, UPCAST)
        w = _operand(w, UPCAST)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="tf32x3")
        if RANK > 0:
            a = _operand(tl.load(down_rows + inner[None, :], in_k, other=0.0), UPCAST)
            s = tl.dot(x, tl.trans(a), s, input_precision="tf32x3")
    _finish(acc, s, up_ptr, bias_ptr, out_ptr, out_row, part_ptr, count_ptr, rows, in_rows, first + cols, in_cols,
            tile * blocks + block, split, RANK, HAS_BIAS, BLOCK_M, BLOCK_N, SPLITS, UPCAST)  # fmt: skip


def fits(rows: int, layers: int, rank: int) -> bool:
    """Whether the kernel takes so many rows, layers on one input, and this rank."""
    return 0 < rows <= MAX_ROWS and 0 < layers <= MAX_LAYERS and rank <= MAX_RANK


def padded_rank(rank: int) -> int:
    """Tensor cores multiply no less than 16."""
    return max(16, _runtime.next_power_of_2(rank)) if rank else 0


def check(
    x: torch.Tensor, weights: Sequence[torch.Tensor | NF4Weight], down: torch.Tensor | None, up: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> int:
    """The rank R, 0 without adapters; raises ConfigError."""
    total = sum(weight.shape[0] for weight in weights)
    rank = 0 if up is None else up.shape[1]
    faults = []
    whole = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    if (x.dim() != 2 or not fits(x.shape[0], len(weights), rank)
            or any(weight.shape[1:] != x.shape[1:] for weight in weights)
            or {weight.dtype for weight in whole} not in (set(), {x.dtype}, {torch.float32})
            or not all(_runtime.has_rows(weight) for weight in whole)):  # fmt: skip
        found = [f"{tuple(weight.shape)} {weight.dtype}" for weight in weights]
        faults.append(f"x is {tuple(x.shape)} {x.dtype}, the weights {', '.join(found)}")
    if (down is None) != (up is None):
        faults.append("A without B, or B without A")
    elif down is not None and up is not None and (
        up.shape != (total, rank) or down.shape != (len(weights) * rank, x.shape[1]) or rank != padded_rank(rank)
        or not down.dtype == up.dtype == x.dtype
    ):  # fmt: skip
        faults.append(f"the factors are {tuple(down.shape)} {down.dtype} and {tuple(up.shape)} {up.dtype}")
    if bias is not None and (bias.shape != (total,) or bias.dtype != x.dtype):
        faults.append(f"the bias is {tuple(bias.shape)} {bias.dtype}, and there are {total} columns of {x.dtype}")
    if faults:
        raise ConfigError.from_faults(faults, where="decode_linear")
    return rank


def buffers(
    x: torch.Tensor, widths: Sequence[int], launch: DecodeLaunch, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """The output, what splits leave and count in (anything where there is one), and how many programs run.

    Raises:
        ConfigError: `counts` holds fewer tiles than the launch has.
    """
    out = torch.empty((x.shape[0], sum(widths)), dtype=x.dtype, device=x.device)
    places = sum(_runtime.cdiv(width, launch.columns) for width in widths) * _runtime.cdiv(x.shape[0], launch.rows)
    if launch.splits == 1:
        return out, x, out if counts is None else counts, places
    parts = torch.empty(places * launch.splits * launch.rows * launch.columns, dtype=torch.float32, device=x.device)
    if counts is None:
        counts = torch.zeros(places, dtype=torch.int32, device=x.device)
    if counts.numel() < places:
        raise ConfigError(f"decode_linear: counts holds {counts.numel()} tiles of {places}")
    return out, parts, counts, places * launch.splits


def decode_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Outputs of up to three layers side by side, (M, sum of N_i), outside autograd.

    Args:
        x: (M, K), 1 <= M <= MAX_ROWS; weights: (N_i, K) each, any row strides; all of x's dtype, or all fp32, and
            then they are rounded to x's dtype, as a cast would.
        down: A_i one below the other, (layers x R, K); up: B_i one below the other, scaling inside, (sum of N_i, R).
            R is 16, 32 or 64; a smaller rank is padded with zeros.
        bias: (sum of N_i,).
        counts: int32 zeros, (MAX_PLACES,) always do, which every launch leaves zero; made anew by default.

    Raises:
        ConfigError: what does not fit; BackendUnavailableError: off the GPU.
    """
    rank = check(x, weights, down, up, bias)
    _runtime.require_device(x, *weights, down, up, bias)
    x = _runtime.as_rows(x)
    widths = [weight.shape[0] for weight in weights]
    rows, inner = x.shape
    launch = launch_for(rows, inner, widths, _runtime.num_sms(x), element_size=x.element_size(),
                        weight_size=weights[0].element_size())
    out, parts, counts, programs = buffers(x, widths, launch, counts)
    three = [*weights, *[weights[0]] * (MAX_LAYERS - len(weights))]
    sizes = [*widths, *[0] * (MAX_LAYERS - len(weights))]
    with _runtime.on_device(x):
        decode_linear_kernel[(programs,)](
            x, x.stride(0), *three, *(weight.stride(0) for weight in three), x if down is None else down,
            x if up is None else up.contiguous(), x if bias is None else bias, out, out.stride(0), parts, counts, rows,
            inner, *sizes, rank, bias is not None, launch.rows, launch.columns, launch.depth, launch.splits,
            _runtime.interpreting(), num_warps=launch.num_warps, num_stages=launch.stages,
        )  # fmt: skip
    return out


def decode_linear_reference(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """`decode_linear` in plain torch: each weight cast to x's dtype, S rounded as a stored tensor would be."""
    rank = check(x, weights, down, up, bias)
    outs, column = [], 0
    for number, weight in enumerate(weights):
        b = None if bias is None else bias[column : column + weight.shape[0]]
        out = torch.nn.functional.linear(x, weight.to(x.dtype), b)
        if down is not None and up is not None:
            s = x @ down[number * rank : (number + 1) * rank].t()
            out = out + s @ up[column : column + weight.shape[0]].t()
        outs.append(out)
        column += weight.shape[0]
    return torch.cat(outs, dim=1)
