"""`decode_linear` over weights in NF4: a decode step reads their codes, and writes no unpacked copy.

    out_i = X W_i^T + b_i + (X A_i^T) B_i^T          W_i[n, k] = round(code[nibble[n, k]] * absmax[(n K + k) // block])

The codes, both levels of block scales and their rounding to X's dtype are `nf4`'s, so that a product here is one with
`dequantize_nf4(W_i, dtype=x.dtype)`, up to the order of its sum; the rest is `decode_linear`'s. A row has to begin with
a block: K is a multiple of the block size.

Bytes a weight: 1/2 (code) + 1/64 (absmax) + 4/16384 (nested) = 0.52 at block sizes 64 and 256, where unpacking writes 2
more and reads them again, 4.52. Codes are loaded 16 bytes, 32 weights, at a time. What bounds the loop is arithmetic:
some 7 instructions a weight (shift, mask, look-up in shared memory, product, half a cast), counted in the code for
sm_90, so 16 weights a cycle and SM at the most, where memory gives 25.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from aligntune.backends.fast.ops import _runtime
from aligntune.backends.fast.ops import decode_linear as plain
from aligntune.backends.fast.ops.decode_linear import MAX_LAYERS, DecodeLaunch, _finish, _operand, _place, _rounded
from aligntune.backends.fast.ops.nf4 import NF4Weight, dequantize_nf4_reference
from aligntune.errors import ConfigError


def launch_for(rows: int, inner: int, widths: Sequence[int], sms: int) -> DecodeLaunch:
    """Two programs an SM: bound by arithmetic, one alone would leave it waiting. 4 KiB of codes a tile and stage.

    Tiles have 64 rows, however few there are, and so wgmma: with 16 a launch of 8 rows took up to 1.4 times as long as
    one of 64 (H100).
    """
    block_m = 64
    columns, depth = 64, 128
    tiles = sum(_runtime.cdiv(width, columns) for width in widths) * _runtime.cdiv(rows, block_m)
    most = max(1, inner // (2 * depth))
    splits = 1
    while splits < most and tiles * splits <= sms:
        splits *= 2
    return DecodeLaunch(block_m, columns, depth, splits, 4, 4)


@triton.jit
def _both(a, b):
    """(N, 2 W) of a0, b0, a1, b1, .. of each row of two (N, W)."""
    return tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))


@_runtime.kernel(do_not_specialize=["m"])
def decode_linear_nf4_kernel(
    x_ptr, x_row, packed0_ptr, packed1_ptr, packed2_ptr, absmax0_ptr, absmax1_ptr, absmax2_ptr,
    code0_ptr, code1_ptr, code2_ptr, nested_absmax0_ptr, nested_absmax1_ptr, nested_absmax2_ptr,
    nested_code0_ptr, nested_code1_ptr, nested_code2_ptr, offset0_ptr, offset1_ptr, offset2_ptr,
    down_ptr, up_ptr, bias_ptr, out_ptr, out_row, part_ptr, count_ptr, m,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = tl.cdiv(N0, BLOCK_N) + tl.cdiv(N1, BLOCK_N) + tl.cdiv(N2, BLOCK_N)
    WORDS: tl.constexpr = BLOCK_K // 8
    SCALES: tl.constexpr = max(1, BLOCK_K // BLOCKSIZE)  # of a row in a tile; a longer block covers several tiles
    program = tl.program_id(0)
    blocks = tl.cdiv(m, BLOCK_M)
    block = program % blocks
    tile = program // blocks % TILES
    split = program // blocks // TILES
    layer, width, first, number = _place(tile, N0, N1, N2, BLOCK_N)
    packed_ptr, absmax_ptr, code_ptr = packed0_ptr, absmax0_ptr, code0_ptr
    nested_absmax_ptr, nested_code_ptr, offset_ptr = nested_absmax0_ptr, nested_code0_ptr, offset0_ptr
    if layer == 1:
        packed_ptr, absmax_ptr, code_ptr = packed1_ptr, absmax1_ptr, code1_ptr
        nested_absmax_ptr, nested_code_ptr, offset_ptr = nested_absmax1_ptr, nested_code1_ptr, offset1_ptr
    if layer == 2:
        packed_ptr, absmax_ptr, code_ptr = packed2_ptr, absmax2_ptr, code2_ptr
        nested_absmax_ptr, nested_code_ptr, offset_ptr = nested_absmax2_ptr, nested_code2_ptr, offset2_ptr
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = number * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < m, cols < width
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    PART: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    begin = split * PART
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rank = tl.arange(0, max(RANK, 16))
    s = tl.zeros((BLOCK_M, max(RANK, 16)), tl.float32)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_row
    packed_rows = packed_ptr + cols.to(tl.int64)[:, None] * (K // 8)
    block_rows = cols.to(tl.int64)[:, None] * (K // BLOCKSIZE)
    down_rows = down_ptr + (layer * RANK + rank).to(tl.int64)[:, None] * K
    code = tl.load(code_ptr + tl.arange(0, 16))
    if NESTED:
        offset = tl.load(offset_ptr)
    for at in range(0, PART, BLOCK_K):
        inner = begin + at + tl.arange(0, BLOCK_K)
        in_k = (inner < K)[None, :]
        x = _operand(tl.load(x_rows + inner[None, :], in_rows[:, None] & in_k, other=0.0), UPCAST)
        words = (begin + at) // 8 + tl.arange(0, WORDS)
        word = tl.load(packed_rows + words[None, :], in_cols[:, None] & (words < K // 8)[None, :], other=0)
        scales = (begin + at) // BLOCKSIZE + tl.arange(0, SCALES)
        in_blocks = in_cols[:, None] & (scales < K // BLOCKSIZE)[None, :]
        scale_at = block_rows + scales[None, :]
        scale = tl.load(absmax_ptr + scale_at, in_blocks, other=0)
        if NESTED:
            nested = tl.load(nested_absmax_ptr + scale_at // NESTED_BLOCKSIZE, in_blocks, other=0.0)
            # Launched without fp fusion: an fma here rounds once where `nf4` rounds twice.
            scale = tl.load(nested_code_ptr + scale.to(tl.int32)) * nested + offset
        # Bytes in the order of memory, the high nibble of each first.
        half = _both(word, word >> 16)
        byte = _both(half, half >> 8)
        nibble = _both(byte >> 4, byte) & 15
        value = tl.gather(code, tl.reshape(nibble, (BLOCK_N * BLOCK_K,)), 0)
        value = tl.reshape(value, (BLOCK_N, SCALES, BLOCK_K // SCALES)) * scale[:, :, None]
        w = _operand(tl.reshape(_rounded(value, dtype, UPCAST), (BLOCK_N, BLOCK_K)), UPCAST)
        acc = tl.dot(x, tl.trans(w), acc)
        if RANK > 0:
            a = _operand(tl.load(down_rows + inner[None, :], in_k, other=0.0), UPCAST)
            s = tl.dot(x, tl.trans(a), s)
    _finish(acc, s, up_ptr, bias_ptr, out_ptr, out_row, part_ptr, count_ptr, rows, in_rows, first + cols, in_cols,
            tile * blocks + block, split, RANK, HAS_BIAS, BLOCK_M, BLOCK_N, SPLITS, UPCAST)  # fmt: skip


def _form(weight: NF4Weight) -> tuple[Any, ...]:
    """What a launch has one of."""
    return weight.shape[1:], weight.blocksize, weight.nested_absmax is not None, weight.nested_blocksize


def unreadable_because(weights: Sequence[NF4Weight]) -> str | None:
    """Why one launch cannot read these weights as they are packed, or None where it can."""
    if len({_form(weight) for weight in weights}) != 1:
        return "their blocks or their scales differ"
    if any(len(weight.shape) != 2 or weight.shape[1] % weight.blocksize for weight in weights):
        return f"rows of {weights[0].shape[-1]} do not begin with a block of {weights[0].blocksize}"
    if any(not weight.packed.is_contiguous() or weight.packed.data_ptr() % 4 for weight in weights):
        return "their codes do not lie in words one after the other"
    return None


def decode_linear_nf4(
    x: torch.Tensor,
    weights: Sequence[NF4Weight],
    *,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Outputs of up to three layers side by side, (M, sum of N_i), outside autograd.

    Args:
        x: (M, K) of bf16 or fp16, 1 <= M <= MAX_ROWS; weights: (N_i, K) each, all with blocks of one size.
        down, up, bias, counts: as `decode_linear` takes them.

    Raises:
        ConfigError: what does not fit; BackendUnavailableError: off the GPU.
    """
    rank = _check(x, weights, down, up, bias)
    nested = weights[0].nested_absmax is not None
    # By kind, then by layer: a kind that there is none of takes any pointer.
    kinds = [[weight.packed.detach().view(-1).view(torch.int32) for weight in weights],
             [weight.absmax for weight in weights], [weight.code for weight in weights]]  # fmt: skip
    for name in ("nested_absmax", "nested_code", "offset"):
        kinds.append([getattr(weight, name) if nested else weight.code for weight in weights])
    _runtime.require_device(x, *(part for kind in kinds for part in kind), down, up, bias)
    x = _runtime.as_rows(x)
    widths = [weight.shape[0] for weight in weights]
    rows, inner = x.shape
    launch = launch_for(rows, inner, widths, _runtime.num_sms(x))
    out, parts, counts, programs = plain.buffers(x, widths, launch, counts)
    three = [part for kind in kinds for part in (*kind, *[kind[0]] * (MAX_LAYERS - len(weights)))]
    sizes = [*widths, *[0] * (MAX_LAYERS - len(weights))]
    with _runtime.on_device(x):
        decode_linear_nf4_kernel[(programs,)](
            x, x.stride(0), *three, x if down is None else down, x if up is None else up.contiguous(),
            x if bias is None else bias, out, out.stride(0), parts, counts, rows, inner,
            *sizes, rank, bias is not None, weights[0].blocksize, nested, weights[0].nested_blocksize,
            launch.rows, launch.columns, launch.depth, launch.splits, _runtime.interpreting(),
            num_warps=launch.num_warps, num_stages=launch.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _check(
    x: torch.Tensor, weights: Sequence[NF4Weight], down: torch.Tensor | None, up: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> int:
    """The rank R, 0 without adapters; raises ConfigError."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"decode_linear_nf4: x is {x.dtype}; it is multiplied in bf16 or fp16")
    for weight in weights:
        weight.check()
    why = unreadable_because(weights)
    if why is not None:
        raise ConfigError(f"decode_linear_nf4: the weights are {[tuple(weight.shape) for weight in weights]}: {why}")
    return plain.check(x, weights, down, up, bias)


def decode_linear_nf4_reference(
    x: torch.Tensor,
    weights: Sequence[NF4Weight],
    *,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """`decode_linear_nf4` in plain torch: each weight unpacked in x's dtype."""
    _check(x, weights, down, up, bias)
    whole = [dequantize_nf4_reference(weight, dtype=x.dtype) for weight in weights]
    return plain.decode_linear_reference(x, whole, down=down, up=up, bias=bias)
