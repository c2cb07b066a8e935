"""The lowest score inside the nucleus of each row, without sorting it.

    floor = min { x_v : sum of softmax(x)_w over w with x_w > x_v  <  top_p }        (Holtzman et al. 2019, section 3.1)

Tokens at or above the floor are the nucleus; equal scores are in or out together. Sorting 64 rows of 128,256 takes
longer than the model's step. Here the floor is found by bisection over the scores' bit patterns, which order as whole
numbers do: 32 passes end at the exact number. A row's half megabyte is read from the L2 cache each time, one program a
row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aligntune.backends.fast.ops import _runtime

_BLOCK, _WARPS = 8192, 16


@triton.jit
def _ordered(x):
    """fp32 as int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@_runtime.kernel
def nucleus_floor_kernel(scores_ptr, row_stride, top_p_ptr, floor_ptr, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = scores_ptr + row * row_stride
    cols = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        top = tl.maximum(top, tl.load(base + start + cols, start + cols < vocab, other=float("-inf")))
    highest = tl.max(top, axis=0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(base + start + cols, start + cols < vocab, other=float("-inf"))
        total += tl.exp(x - highest)
    wanted = tl.load(top_p_ptr) * tl.sum(total, axis=0)
    # The mass above `high` is below `wanted`, that above `low` is not; the highest score is always in.
    high = _ordered(highest).to(tl.int64)
    low = tl.full((), -2147483648, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        above = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            x = tl.load(base + start + cols, start + cols < vocab, other=float("-inf"))
            above += tl.where(_ordered(x) > middle, tl.exp(x - highest), 0.0)
        inside = tl.sum(above, axis=0) < wanted
        high = tl.where(inside, middle, high)
        low = tl.where(inside, low, middle)
    key = high.to(tl.int32)
    tl.store(floor_ptr + row, (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True))


def nucleus_floor(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The lowest score that top-p sampling keeps; between it and the next lower score there may be any number.

    Args:
        scores: (rows, V) fp32, -inf where a token is out already; rows at any stride.
        top_p: () fp32 in (0, 1], read on the device.

    Returns:
        (rows, 1) fp32; a token is in the nucleus if its score is not below it.

    Raises:
        BackendUnavailableError: tensors that no kernel can read.
    """
    _runtime.require_device(scores, top_p)
    scores = scores if _runtime.has_rows(scores) else scores.contiguous()
    floor = torch.empty((scores.shape[0], 1), dtype=torch.float32, device=scores.device)
    if scores.shape[0]:
        with _runtime.on_device(scores):
            nucleus_floor_kernel[(scores.shape[0],)](
                scores, scores.stride(0), top_p, floor, scores.shape[1], _BLOCK, num_warps=_WARPS
            )
    return floor


def nucleus_floor_reference(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """`nucleus_floor` in torch, by sorting; the arguments are the same."""
    ordered = scores.sort(dim=1, descending=True).values
    probabilities = ordered.softmax(dim=1)
    kept = probabilities.cumsum(dim=1) - probabilities < top_p
    kept[:, 0] = True
    return ordered.masked_fill(~kept, float("inf")).min(dim=1, keepdim=True).values
