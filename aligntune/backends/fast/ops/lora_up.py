"""Both gradients that LoRA's B gives, reading the gradient of the layer's output once.

    out += c S B^T        dS = c dout B  (T, r)        dB = c dout^T S  (N, r)        c: alpha / r or alpha / sqrt(r)

(Hu et al. 2022, equation 3, with S = X A^T.) As two matrix products dout (T, N), by far the largest of the four, is
read twice: they are as slow as memory. A program takes BLOCK_N columns over a run of rows: of each tile of rows it sums
dS over its columns, and keeps dB's columns in registers. Both are parts of a sum, in fp32, which a second launch adds
up in one order: no atomics, the same bits every time.

Bytes: 2TN (dout) + 2Nr + 2Tr (B, S) + 2Tr + 4Nr (dS, dB), and the parts, written and read, R of them for r, which is
rounded up to 16 or more: 8TR N / BLOCK_N + 8NR RUNS.
Flops: 4TNr.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from aligntune.backends.fast.ops import _runtime
from aligntune.errors import ConfigError

MAX_RANK = 64
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SUMMED_ROWS, _SUMMED_PARTS = 16, 8


@dataclass(frozen=True)
class UpLaunch:
    """Tiles of `rows` x `columns`; a program takes `columns` over one of `runs` parts of the rows."""

    rows: int
    columns: int
    runs: int
    num_warps: int = 4
    stages: int = 3


def launch_for(tokens: int, width: int, rank: int, sms: int) -> UpLaunch:
    """As many programs as SMs, or twice or three times as many where each then still has some eight tiles of rows.

    The wider the rank, the fewer columns: dB's are kept in registers, at most 32 of them a thread. Measured on an H100
    at rank 16, widths of 512 to 9,728.
    """
    rows, tiles = 64, 8
    columns = 128 if width <= 1024 else 256 if width < 8192 else 512
    columns = max(32, columns * 16 // max(16, _runtime.next_power_of_2(rank)))
    parts = _runtime.cdiv(width, columns)
    an_sm = max(1, round(parts * _runtime.cdiv(tokens, rows * tiles) / sms))
    runs = max(1, min(_runtime.cdiv(tokens, rows), an_sm * sms // parts))
    return UpLaunch(rows, columns, runs, num_warps=4 if width < 8192 else 8, stages=2 if columns == 512 else 3)


@_runtime.kernel(do_not_specialize=["tokens", "run"])
def lora_up_parts_kernel(
    dout_ptr, dout_row, up_ptr, s_ptr, s_row, ds_part_ptr, up_part_ptr, tokens, run,
    N: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    part, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    up = tl.load(up_ptr + n[:, None] * R + r[None, :], (n < N)[:, None] & (r < R)[None, :], other=0.0)
    if UPCAST:  # the interpreter multiplies bf16 as integers
        up = up.to(tl.float32)
    grad = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    first = chunk * run
    for further in tl.range(0, run, BLOCK_T, num_stages=STAGES):
        t = first + further + tl.arange(0, BLOCK_T)
        there = (t < tokens)[:, None]
        dout = tl.load(dout_ptr + t[:, None] * dout_row + n[None, :], there & (n < N)[None, :], other=0.0)
        s = tl.load(s_ptr + t[:, None] * s_row + r[None, :], there & (r < R)[None, :], other=0.0)
        if UPCAST:
            dout, s = dout.to(tl.float32), s.to(tl.float32)
        # In this order: the other way about ptxas waits for each product of the tile before it begins the next.
        grad = tl.dot(tl.trans(dout), s, grad, input_precision="ieee")
        ds = tl.dot(dout, up, input_precision="ieee")
        tl.store(ds_part_ptr + (part * tokens + t[:, None]) * BLOCK_R + r[None, :], ds, there)
    tl.store(up_part_ptr + (chunk * N + n[:, None]) * BLOCK_R + r[None, :], grad, (n < N)[:, None])


@triton.jit
def _summed(part_ptr, parts, rows, first, R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr):
    """Rows from `first` on of the sum of `parts` tensors (rows, R), eight at a time."""
    p, t, r = tl.arange(0, BLOCK_P), first + tl.arange(0, BLOCK_T), tl.arange(0, R)
    total = tl.zeros([BLOCK_T, R], tl.float32)
    for start in range(0, parts, BLOCK_P):
        which = start + p
        at = (which[:, None, None].to(tl.int64) * rows + t[None, :, None]) * R + r[None, None, :]
        keep = (which < parts)[:, None, None] & (t < rows)[None, :, None] & (r < R)[None, None, :]
        total += tl.sum(tl.load(part_ptr + at, keep, other=0.0), axis=0)
    return total


@_runtime.kernel(do_not_specialize=["tokens", "ds_parts", "up_parts"])
def lora_up_sum_kernel(
    ds_part_ptr, up_part_ptr, ds_ptr, ds_row, grad_ptr, tokens, ds_parts, up_parts, scaling,
    N: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    blocks = tl.cdiv(N, BLOCK_T)
    if program < blocks:
        first = program * BLOCK_T
        t = first + tl.arange(0, BLOCK_T)
        x = _summed(up_part_ptr, up_parts, N, first, BLOCK_R, BLOCK_P, BLOCK_T) * scaling
        keep = (t < N)[:, None] & (r < R)[None, :]
        tl.store(grad_ptr + t.to(tl.int64)[:, None] * R + r[None, :], x.to(grad_ptr.dtype.element_ty), keep)
    else:
        first = (program - blocks) * BLOCK_T
        t = first + tl.arange(0, BLOCK_T)
        x = _summed(ds_part_ptr, ds_parts, tokens, first, BLOCK_R, BLOCK_P, BLOCK_T) * scaling
        keep = (t < tokens)[:, None] & (r < R)[None, :]
        tl.store(ds_ptr + t.to(tl.int64)[:, None] * ds_row + r[None, :], x.to(ds_ptr.dtype.element_ty), keep)


def _check(dout: torch.Tensor, up: torch.Tensor, s: torch.Tensor, ds: torch.Tensor | None) -> None:
    if dout.dim() != 2 or up.dim() != 2 or up.shape[0] != dout.shape[1] or s.shape != (dout.shape[0], up.shape[1]):
        raise ConfigError(f"dout {tuple(dout.shape)}, up {tuple(up.shape)} and s {tuple(s.shape)} must be (T, N), "
                          "(N, r) and (T, r)")
    if not 1 <= up.shape[1] <= MAX_RANK:
        raise ConfigError(f"a rank of {up.shape[1]}: it must be from 1 to {MAX_RANK}")
    if dout.dtype not in (*_DTYPES, torch.float64) or not dout.dtype == up.dtype == s.dtype:
        raise ConfigError(f"dout, up and s in {dout.dtype}, {up.dtype} and {s.dtype}: they must be of one type, bf16, "
                          "fp16 or fp32")
    if ds is not None and (ds.shape != s.shape or ds.dtype != s.dtype or not _runtime.has_rows(ds)):
        raise ConfigError(f"ds {tuple(ds.shape)} in {ds.dtype} must be as s is, {tuple(s.shape)} in {s.dtype}, with "
                          "rows of stride 1")


def lora_up_grads(
    dout: torch.Tensor, up: torch.Tensor, s: torch.Tensor, *, scaling: float = 1.0, ds: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32, launch: UpLaunch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dS and dB of one adapter, from one reading of the gradient of the layer's output.

    Args:
        dout: (T, N) bf16, fp16 or fp32, rows at any stride.
        up: (N, r) B in dout's dtype; r is at most `MAX_RANK`.
        s: (T, r) X A^T in dout's dtype, rows at any stride.
        scaling: what the adapter's output was multiplied with.
        ds: (T, r) of dout's dtype, rows at any stride, to write dS into.
        dtype: of dB.
        launch: None is `launch_for`'s.

    Returns:
        dS (T, r) in dout's dtype, `ds` if that was given, and dB (N, r) in `dtype`; both are summed in fp32 and rounded
        once.

    Raises:
        ConfigError: arguments that do not fit. BackendUnavailableError: tensors that no kernel can read.
    """
    _check(dout, up, s, ds)
    _runtime.require_device(dout, up, s, ds)
    (tokens, width), rank = dout.shape, up.shape[1]
    ds = torch.empty((tokens, rank), dtype=dout.dtype, device=dout.device) if ds is None else ds
    if not tokens or not width:
        return ds.zero_(), torch.zeros((width, rank), dtype=dtype, device=dout.device)
    grad = torch.empty((width, rank), dtype=dtype, device=dout.device)
    dout, s = (x if _runtime.has_rows(x) else x.contiguous() for x in (dout, s))
    launch = launch or launch_for(tokens, width, rank, _runtime.num_sms(dout))
    block_r = max(16, _runtime.next_power_of_2(rank))
    tiles = _runtime.cdiv(tokens, launch.rows)
    run = _runtime.cdiv(tiles, launch.runs) * launch.rows
    grid = _runtime.cdiv(width, launch.columns), _runtime.cdiv(tokens, run)
    ds_parts = torch.empty((grid[0], tokens, block_r), dtype=torch.float32, device=dout.device)
    up_parts = torch.empty((grid[1], width, block_r), dtype=torch.float32, device=dout.device)
    with _runtime.on_device(dout):
        lora_up_parts_kernel[grid](
            dout, dout.stride(0), up.contiguous(), s, s.stride(0), ds_parts, up_parts, tokens, run,
            width, rank, launch.rows, launch.columns, block_r, launch.stages, _runtime.interpreting(),
            num_warps=launch.num_warps,
        )  # fmt: skip
        lora_up_sum_kernel[(_runtime.cdiv(tokens, _SUMMED_ROWS) + _runtime.cdiv(width, _SUMMED_ROWS),)](
            ds_parts, up_parts, ds, ds.stride(0), grad, tokens, grid[0], grid[1], float(scaling),
            width, rank, block_r, _SUMMED_PARTS, _SUMMED_ROWS, num_warps=4,
        )  # fmt: skip
    return ds, grad


def lora_up_grads_reference(
    dout: torch.Tensor, up: torch.Tensor, s: torch.Tensor, *, scaling: float = 1.0, ds: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32, launch: UpLaunch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lora_up_grads` as two products; the arguments are the same, `launch` says nothing here."""
    _check(dout, up, s, ds)
    wide = torch.promote_types(dout.dtype, torch.float32)
    found = (dout.to(wide) @ up.to(wide) * scaling).to(dout.dtype)
    ds = found if ds is None else ds.copy_(found)
    return ds, (dout.to(wide).t() @ s.to(wide) * scaling).to(dtype)
