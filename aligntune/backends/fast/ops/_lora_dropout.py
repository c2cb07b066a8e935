"""Dropout on the way into a LoRA factor, made in the kernels that use it: no mask is stored.

With keep_j(t, h) from Philox at (seed, t, h, j) and q_j = 1 / (1 - p_j), for adapter j of a group on X (T, H):

    S_j   = q_j (keep_j * X) A_j^T                     lora_dropout_down_kernel
    dA_j  = q_j dS_j^T (keep_j * X)                    lora_dropout_grad_a_kernel, split over T and summed in order
    dX   += sum_j q_j keep_j * (dS_j A_j)              lora_dropout_grad_x_kernel

One mask per adapter, as PEFT draws one per projection. p is taken in steps of 2^-16 and q from that p, so the mean is
preserved exactly. The products dropped-X and keep * (dS A) are not rounded on the way, as eager's are.

Bytes (bf16): 2TH, 2TH and 4TH, the factors apart; X is read once for all adapters, from L2 after the first. Integer
work: about 10 operations a number and adapter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from aligntune.backends.fast.ops._philox import random_u16
from aligntune.backends.fast.ops._runtime import (
    cdiv,
    interpreting,
    kernel,
    next_power_of_2,
    num_sms,
    on_device,
    require_device,
)

STEPS = 65536  # of p, and of the 16-bit numbers it is compared with


@dataclass(frozen=True)
class Launch:
    """Tiles of `rows` by `columns` of X, and `block_r` of the rank at a time, so that no rank spills.

    Eight warps: with four, the masks of a tile take 177 registers.
    """

    rows: int = 64
    columns: int = 64
    max_block_r: int = 64
    num_warps: int = 8


LAUNCH = Launch()


@triton.jit
def _keep(seed, row, first_column, adapter, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which of (ROWS, COLUMNS) entries survive: the counter is (column // 8, row, adapter)."""
    group = first_column // 8 + tl.arange(0, COLUMNS // 8)
    group = tl.broadcast_to(group[None, :].to(tl.int32), (ROWS, COLUMNS // 8))
    return random_u16(seed, group, row.to(tl.int32)[:, None], adapter.to(tl.int32)) >= threshold


@triton.jit
def _inverse_keep(threshold):
    """1 / (1 - p); at p = 1 nothing is kept and 0 stands for what is multiplied by nothing."""
    kept = 65536 - threshold
    return tl.where(kept > 0, 65536.0 / tl.maximum(kept, 1).to(tl.float32), 0.0)


@triton.jit
def _operand(x, UPCAST: tl.constexpr):
    """The interpreter multiplies bf16 as integers."""
    return x.to(tl.float32) if UPCAST else x


@kernel
def lora_dropout_down_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr, threshold_ptr, num_rows, hidden, x_stride, first_adapter,
    WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    # Neighbours share a tile of X: the first reads it from memory, the others from L2.
    part = program % (WIDTH // BLOCK_R)
    adapter = part * BLOCK_R // RANK
    row = program // (WIDTH // BLOCK_R) * ROWS + tl.arange(0, ROWS)
    rank = part * BLOCK_R + tl.arange(0, BLOCK_R)
    seed = tl.load(seed_ptr)
    threshold = tl.load(threshold_ptr + adapter)
    in_rows = (row < num_rows)[:, None]
    total = tl.zeros((ROWS, BLOCK_R), tl.float32)
    for start in range(0, hidden, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        in_columns = (column < hidden)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=in_rows & in_columns, other=0.0)
        keep = _keep(seed, row, start, first_adapter + adapter, threshold, ROWS, COLUMNS)
        a = tl.load(a_ptr + rank[:, None] * hidden + column[None, :], mask=in_columns, other=0.0)
        dropped = _operand(tl.where(keep, x, 0.0), UPCAST)
        total = tl.dot(dropped, tl.trans(_operand(a, UPCAST)), total, input_precision="tf32x3")
    s_at = s_ptr + row[:, None] * WIDTH + rank[None, :]
    tl.store(s_at, (total * _inverse_keep(threshold)).to(s_ptr.dtype.element_ty), mask=in_rows)


@kernel
def lora_dropout_grad_a_kernel(
    x_ptr, ds_ptr, partial_ptr, seed_ptr, threshold_ptr, num_rows, hidden, x_stride, first_adapter, rows_per_split,
    WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    part = program % (WIDTH // BLOCK_R)
    adapter = part * BLOCK_R // RANK
    blocks = tl.cdiv(hidden, COLUMNS)
    first_column = program // (WIDTH // BLOCK_R) % blocks * COLUMNS
    split = program // (WIDTH // BLOCK_R) // blocks
    column = first_column + tl.arange(0, COLUMNS)
    rank = part * BLOCK_R + tl.arange(0, BLOCK_R)
    seed = tl.load(seed_ptr)
    threshold = tl.load(threshold_ptr + adapter)
    in_columns = (column < hidden)[None, :]
    total = tl.zeros((BLOCK_R, COLUMNS), tl.float32)
    for start in range(0, rows_per_split, ROWS):
        row = split * rows_per_split + start + tl.arange(0, ROWS)
        in_rows = (row < num_rows)[:, None]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=in_rows & in_columns, other=0.0)
        keep = _keep(seed, row, first_column, first_adapter + adapter, threshold, ROWS, COLUMNS)
        ds = tl.load(ds_ptr + row[:, None] * WIDTH + rank[None, :], mask=in_rows, other=0.0)
        dropped = _operand(tl.where(keep, x, 0.0), UPCAST)
        total = tl.dot(tl.trans(_operand(ds, UPCAST)), dropped, total, input_precision="tf32x3")
    partial_at = partial_ptr + (split * WIDTH + rank)[:, None] * hidden + column[None, :]
    tl.store(partial_at, total * _inverse_keep(threshold), mask=in_columns)


@kernel
def lora_dropout_grad_x_kernel(
    dx_ptr, ds_ptr, a_ptr, seed_ptr, threshold_ptr, num_rows, hidden, first_adapter,
    WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(hidden, COLUMNS)
    first_column = program % blocks * COLUMNS
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    seed = tl.load(seed_ptr)
    in_rows, in_columns = (row < num_rows)[:, None], (column < hidden)[None, :]
    dx_at = dx_ptr + row[:, None] * hidden + column[None, :]
    total = tl.load(dx_at, mask=in_rows & in_columns, other=0.0).to(tl.float32)
    for adapter in range(0, WIDTH // RANK):
        threshold = tl.load(threshold_ptr + adapter)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, RANK, BLOCK_R):
            rank = adapter * RANK + start + tl.arange(0, BLOCK_R)
            ds = tl.load(ds_ptr + row[:, None] * WIDTH + rank[None, :], mask=in_rows, other=0.0)
            a = tl.load(a_ptr + rank.to(tl.int64)[:, None] * hidden + column[None, :], mask=in_columns, other=0.0)
            product = tl.dot(_operand(ds, UPCAST), _operand(a, UPCAST), product, input_precision="tf32x3")
        keep = _keep(seed, row, first_column, first_adapter + adapter, threshold, ROWS, COLUMNS)
        total += tl.where(keep, product * _inverse_keep(threshold), 0.0)
    tl.store(dx_at, total.to(dx_ptr.dtype.element_ty), mask=in_rows & in_columns)


def threshold_of(p: float) -> int:
    """Of 65536 equally likely numbers, how many drop an entry."""
    return round(p * STEPS)


@functools.lru_cache(maxsize=256)
def _thresholds(ps: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([threshold_of(p) for p in ps], dtype=torch.int32, device=device)


def padded_rank(rank: int) -> int:
    """The rank that the kernels want: 16, 32 or a multiple of 64; tensor cores multiply no less than 16."""
    return next_power_of_2(max(rank, 16)) if rank <= LAUNCH.max_block_r else cdiv(rank, 64) * 64


def _constants(width: int, adapters: int) -> dict[str, Any]:
    rank = width // adapters
    return {
        "WIDTH": width,
        "RANK": rank,
        "BLOCK_R": min(rank, LAUNCH.max_block_r),
        "ROWS": LAUNCH.rows,
        "COLUMNS": LAUNCH.columns,
        "UPCAST": interpreting(),
        "num_warps": LAUNCH.num_warps,
    }


@dataclass(frozen=True)
class Dropout:
    """The masks of one call: `ps` one probability an adapter, `seed` an int64 scalar on the device.

    `first` is the number of the group's first adapter: groups under one seed take different masks by it.
    """

    ps: tuple[float, ...]
    seed: torch.Tensor
    first: int = 0

    def down(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """S (T, n R) of x (T, H), row-strided, and the factors stacked and padded to one rank, a (n R, H)."""
        require_device(x, a, self.seed)
        rows, hidden = x.shape
        s = torch.empty((rows, a.shape[0]), dtype=a.dtype, device=x.device)
        constants = _constants(a.shape[0], len(self.ps))
        if rows:
            with on_device(x):
                lora_dropout_down_kernel[(cdiv(rows, LAUNCH.rows) * a.shape[0] // constants["BLOCK_R"],)](
                    x, a, s, self.seed, _thresholds(self.ps, x.device), rows, hidden, x.stride(0), self.first,
                    **constants,
                )  # fmt: skip
        return s

    def grad_a(self, x: torch.Tensor, ds: torch.Tensor) -> torch.Tensor:
        """dA (n R, H) in fp32 from dS (T, n R)."""
        rows, hidden = x.shape
        constants = _constants(ds.shape[1], len(self.ps))
        blocks = cdiv(hidden, LAUNCH.columns) * ds.shape[1] // constants["BLOCK_R"]
        # About three programs a multiprocessor; each split costs one more (n R, H) to sum.
        splits = max(1, min(cdiv(3 * num_sms(x), blocks), cdiv(rows, 4 * LAUNCH.rows)))
        rows_per_split = cdiv(cdiv(rows, splits), LAUNCH.rows) * LAUNCH.rows
        partial = torch.empty((splits, ds.shape[1], hidden), dtype=torch.float32, device=x.device)
        with on_device(x):
            lora_dropout_grad_a_kernel[(blocks * splits,)](
                x, ds, partial, self.seed, _thresholds(self.ps, x.device), rows, hidden, x.stride(0), self.first,
                rows_per_split, **constants,
            )  # fmt: skip
        return partial[0] if splits == 1 else partial.sum(0)

    def add_grad_x_(self, dx: torch.Tensor, ds: torch.Tensor, a: torch.Tensor) -> None:
        """Add the adapters' share to dX (T, H), contiguous, in place."""
        rows, hidden = dx.shape
        if rows:
            with on_device(dx):
                lora_dropout_grad_x_kernel[(cdiv(rows, LAUNCH.rows) * cdiv(hidden, LAUNCH.columns),)](
                    dx, ds, a, self.seed, _thresholds(self.ps, dx.device), rows, hidden, self.first,
                    **_constants(a.shape[0], len(self.ps)),
                )  # fmt: skip


def keep_reference(seed: torch.Tensor, adapter: int, rows: int, hidden: int, p: float) -> torch.Tensor:
    """The boolean mask (rows, hidden) that the kernels draw for an adapter, by Philox4x32-7 in int64 tensors."""
    low, device = 0xFFFFFFFF, seed.device
    key = seed.reshape(()).to(torch.int64)
    k0, k1 = key & low, (key >> 32) & low
    groups = cdiv(hidden, 8)
    c0 = torch.arange(groups, device=device).expand(rows, groups)
    c1 = torch.arange(rows, device=device)[:, None].expand(rows, groups)
    c2, c3 = torch.full_like(c0, adapter), torch.zeros_like(c0)
    for _ in range(7):
        # int64 wraps at 2^64, so the low 64 bits of the product are right though their sign is not.
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack((c0, c1, c2, c3), dim=-1)
    numbers = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(rows, 8 * groups)
    return numbers[:, :hidden] >= threshold_of(p)
