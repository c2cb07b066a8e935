"""Causal attention over segments that lie end to end, a prompt that several go on from read where it lies.

    s_ij = scale q_i . k_j           j <= i, j > i - window, by positions: a segment's own begin behind its prompt's
    lse_i = log sum_j exp s_ij       out_i = sum_j exp(s_ij - lse_i) v_j
    p_ij = exp(s_ij - lse_i)         delta_i = dout_i . out_i          ds_ij = p_ij (dout_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j     dk_j = scale sum_i ds_ij q_i      dv_j = sum_i p_ij dout_i

(Dao 2023, FlashAttention-2, sections 3.1 and 3.2.) A tile's rows are tokens x the G query heads of one key head: 128
rows of G = 4 span 32 tokens, so that short rows waste little above the diagonal, keys are read once for the group, and
sums over its heads are part of the products. The backward is two launches, of queries and of keys. A prompt's keys are
summed over its own queries and then over those of each segment that goes on from it, in the order of `users`: there is
one order of sums, and no atomics.

Matrix products for V visible pairs of one query head and D: forward 4VD flops, backward 14VD (scores and dp are made in
both launches). Bytes: q, k, v and out once; backward q, k, v, out, dout, dq, dk, dv, with lse and delta (fp32) beside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from aligntune.backends.fast.ops import _runtime
from aligntune.backends.fast.ops._segment_kernels import (
    segment_attention_dkv,
    segment_attention_dq,
    segment_attention_forward,
)
from aligntune.errors import ConfigError

MAX_HEAD_DIM = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class SharedPrompts(NamedTuple):
    """Which of N segments go on from another, the first P of them from which others may; int32, on the device.

    `before` (N,): how many tokens of another segment, from its first on, come before a segment's own; 0 for a segment
    that others go on from. `group` (N,): that segment's number, anything where `before` is 0. `users` (P, M): the
    segments that go on from each, -1 where there are fewer than M.
    """

    before: torch.Tensor
    group: torch.Tensor
    users: torch.Tensor


@dataclass(frozen=True)
class TileLaunch:
    """Tiles of `rows` (tokens x query heads of one key head) against `keys`."""

    rows: int
    keys: int
    num_warps: int
    stages: int


@dataclass(frozen=True)
class Launches:
    """`compact` starts programs for tiles that there are, each of which searches for its own, and not for every
    segment's as if it were the longest; None: where these would be twice as many.
    """

    forward: TileLaunch
    dq: TileLaunch
    dkv: TileLaunch
    compact: bool | None = None


def launch_for(head_dim: int, group: int, itemsize: int, *, shared_memory: int = 227 * 1024) -> Launches:
    """Tiles whose accumulators stay in registers; products of fp32, which run on no tensor core, are small ones.

    `shared_memory`: bytes that a program may take; an sm_86 or sm_89, of 99 KiB, loads no wide tile ahead.

    At a head_dim of 256 keys and values spill 17 instructions, dq of fp32 200: less takes tiles that no wgmma does.
    """
    block_d, least = _block_d(head_dim), _runtime.next_power_of_2(group)

    def launches(*tiles: tuple[int, int, int, int]) -> Launches:
        forward, dq, dkv = (TileLaunch(max(rows, least), *rest) for rows, *rest in tiles)
        return Launches(forward, dq, dkv)

    if itemsize == 4:
        size = 32 if block_d <= 64 else 16
        return launches(*((size, size, 8, 1),) * 3)
    if block_d <= 128:
        # Of an H100's choice: these of 128 rows spill 70 instructions, with heads that are none 200.
        wide = block_d <= 64 and least == group
        dkv = (128, 64, 4, 2) if wide else (64, 64, 4, 2) if block_d <= 64 else (32, 64, 4, 2)
        return launches((64, 32, 4, 3), (64, 32, 4, 3), dkv)
    if shared_memory < 128 * 1024:
        return launches((128, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1))
    return launches((128, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2))


def _block_d(head_dim: int) -> int:
    return max(16, _runtime.next_power_of_2(head_dim))


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor,
        shared: SharedPrompts | None, max_seqlen: int, scale: float, window: int, launches: Launches,
    ) -> torch.Tensor:
        _, heads, tokens, head_dim = q.shape
        out = torch.empty((1, tokens, heads, head_dim), dtype=q.dtype, device=q.device)
        lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, *(shared or ()))
        ctx.options = max_seqlen, scale, window, launches
        before, group, _ = shared or (cu_seqlens,) * 3
        grid, runtime, constants = _arguments(q, k, cu_seqlens, shared, launches.forward, False, *ctx.options)
        with _runtime.on_device(q):
            segment_attention_forward[grid](
                *_strided(q, 2, 1), *_strided(k, 2, 1), *_strided(v, 2, 1), out, lse, cu_seqlens, before, group,
                *runtime, **constants, num_warps=launches.forward.num_warps,
            )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        q, k, v, out, lse, cu_seqlens, *rest = ctx.saved_tensors
        shared = SharedPrompts(*rest) if rest else None
        before, group, users = shared or (cu_seqlens,) * 3
        dout = dout if _runtime.has_rows(dout) else dout.contiguous()
        launches = ctx.options[-1]
        # Laid as the projections' views are, token by token.
        dq, dk, dv = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (q, k, v))
        delta = torch.empty_like(lse)
        factors = (*_strided(q, 2, 1), *_strided(k, 2, 1), *_strided(v, 2, 1))
        with _runtime.on_device(q):
            grid, runtime, constants = _arguments(q, k, cu_seqlens, shared, launches.dq, False, *ctx.options)
            segment_attention_dq[grid](
                *factors, out, *_strided(dout, 1, 2), lse, delta, dq, cu_seqlens, before, group, *runtime, **constants,
                num_warps=launches.dq.num_warps,
            )  # fmt: skip
            if any(ctx.needs_input_grad[1:3]):
                grid, runtime, constants = _arguments(q, k, cu_seqlens, shared, launches.dkv, True, *ctx.options)
                segment_attention_dkv[grid](
                    *factors, *_strided(dout, 1, 2), lse, delta, dk, dv, cu_seqlens, before, users, *runtime,
                    users.shape[1] if shared else 0, **constants, num_warps=launches.dkv.num_warps,
                )  # fmt: skip
        needed = zip((dq, dk, dv), ctx.needs_input_grad[:3], strict=True)
        return *(x.transpose(1, 2) if need else None for x, need in needed), *(None,) * 6


def _strided(x: torch.Tensor, token: int, head: int) -> tuple[torch.Tensor, int, int]:
    return x, x.stride(token), x.stride(head)


def _arguments(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor, shared: SharedPrompts | None, launch: TileLaunch,
    keys: bool, max_seqlen: int, scale: float, window: int, launches: Launches,
) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """Grid, numbers and constants that the three launches have in common; `keys` for tiles of keys."""
    _, heads, tokens, head_dim = q.shape
    k_heads, segments = k.shape[1], cu_seqlens.shape[0] - 1
    group = heads // k_heads
    g = _runtime.next_power_of_2(group)
    size = launch.keys if keys else launch.rows // g
    tiles = _runtime.cdiv(max_seqlen, size)
    # The most tiles that segments of so many tokens have: each can have one that is not full.
    slots = min(tokens // size + segments, tiles * segments)
    compact = launches.compact
    if compact is None:
        compact = shared is not None or tiles * segments > 2 * slots
    # Of few sizes: each is a compilation.
    block_s = 32
    while block_s < segments:
        block_s *= 4
    constants = {
        "SCALE": scale * math.log2(math.e), "HK": k_heads, "GROUP": group, "G": g, "D": head_dim, "WINDOW": window,
        "SHARED": shared is not None, "COMPACT": compact, "UPCAST": _runtime.interpreting(),
        "BLOCK_S": block_s if compact else 1, "BLOCK_M": launch.rows, "BLOCK_N": launch.keys,
        "BLOCK_D": _block_d(head_dim), "STAGES": launch.stages,
    }  # fmt: skip
    prompts = shared.users.shape[0] if shared else 0
    programs = slots if compact else tiles * segments
    return (programs * k_heads,), (segments, tokens, tiles, prompts), constants


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float,
    window: int | None, shared: SharedPrompts | None,
) -> None:
    if q.dim() != 4 or q.shape[0] != 1 or k.shape != v.shape or k.shape != (1, k.shape[1], *q.shape[2:]):
        raise ConfigError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (1, heads, T, "
                          "head_dim), of as many tokens and as wide")
    if not k.shape[1] or q.shape[1] % k.shape[1] or q.shape[3] > MAX_HEAD_DIM:
        raise ConfigError(f"{q.shape[1]} query heads of {q.shape[3]} over {k.shape[1]} key heads: the first must be a "
                          f"multiple of the second, and a head at most {MAX_HEAD_DIM} wide")
    if q.dtype not in (*_DTYPES, torch.float64) or not q.dtype == k.dtype == v.dtype:
        raise ConfigError(f"q, k and v in {q.dtype}, {k.dtype} and {v.dtype}: they must be of one type, bf16, fp16 or "
                          "fp32")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2:
        raise ConfigError(f"cu_seqlens {tuple(cu_seqlens.shape)} in {cu_seqlens.dtype} must be (segments + 1,) int32")
    segments = cu_seqlens.shape[0] - 1
    if segments * max_seqlen < q.shape[2]:
        raise ConfigError(f"{segments} segments of at most {max_seqlen} tokens cannot hold {q.shape[2]} tokens")
    if not scale > 0 or (window is not None and window < 1):
        raise ConfigError(f"scale {scale} and window {window} must be above 0")
    if shared is not None:
        before, group, users = shared
        if before.shape != (segments,) or group.shape != (segments,) or users.dim() != 2 or len(users) > segments:
            raise ConfigError(f"shared prompts of {segments} segments: before {tuple(before.shape)} and group "
                              f"{tuple(group.shape)} must have one number each, users {tuple(users.shape)} be (P, M) "
                              "with P no more than these")
        if any(x.dtype != torch.int32 or not x.is_contiguous() for x in shared):
            raise ConfigError(f"shared prompts in {', '.join(str(x.dtype) for x in shared)}: they must be contiguous "
                              "int32")


def segment_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, max_seqlen: int, scale: float,
    window: int | None = None, shared: SharedPrompts | None = None,
) -> torch.Tensor:
    """Causal attention within each segment, and over the shared prompt that it goes on from.

    Args:
        q: (1, query heads, T, head_dim), bf16, fp16 or fp32, any strides but the last, which is 1.
        k, v: (1, key heads, T, head_dim); query heads are a multiple of key heads.
        cu_seqlens: (N + 1,) int32, first 0 and last T; equal neighbours are empty segments.
        max_seqlen: no segment is longer.
        scale: what the scores are multiplied with, above 0.
        window: a token sees itself and the `window` - 1 before it, those of its prompt included; None sees all.
        shared: which segments go on from which.

    Returns:
        (1, T, query heads, head_dim), contiguous, in q's dtype. Gradients are summed in fp32, in one order.

    Raises:
        ConfigError: arguments that do not fit. BackendUnavailableError: tensors that no kernel can read.
    """
    return attend_in_tiles(None, q, k, v, cu_seqlens, max_seqlen=max_seqlen, scale=scale, window=window, shared=shared)


def attend_in_tiles(
    launches: Launches | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *,
    max_seqlen: int, scale: float, window: int | None = None, shared: SharedPrompts | None = None,
) -> torch.Tensor:
    """`segment_attention` with tiles of the caller's; None is `launch_for`'s choice."""
    _check(q, k, v, cu_seqlens, max_seqlen, scale, window, shared)
    _runtime.require_device(q, k, v, cu_seqlens, *(shared or ()))
    if not q.shape[2]:
        return q.transpose(1, 2).contiguous()
    if window is not None and window >= max_seqlen * (1 if shared is None else 2):
        window = None
    q, k, v = (x if _runtime.has_rows(x) else x.contiguous() for x in (q, k, v))
    launches = launches or launch_for(q.shape[3], q.shape[1] // k.shape[1], q.element_size(),
                                      shared_memory=_runtime.shared_memory(q))
    return _SegmentAttention.apply(  # type: ignore[no-any-return]
        q, k, v, cu_seqlens.contiguous(), shared, max_seqlen, float(scale), window or 0, launches)


def segment_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, max_seqlen: int, scale: float,
    window: int | None = None, shared: SharedPrompts | None = None,
) -> torch.Tensor:
    """`segment_attention` in torch, a segment at a time, also in fp64; it waits for the lengths."""
    _check(q, k, v, cu_seqlens, max_seqlen, scale, window, shared)
    ends, group = cu_seqlens.tolist(), q.shape[1] // k.shape[1]
    outs = [q[:, :, :0].transpose(1, 2)]
    for number, (start, stop) in enumerate(pairwise(ends)):
        before = int(shared.before[number]) if shared else 0
        prompt = ends[int(shared.group[number])] if shared and before else 0
        keys, values = (torch.cat((x[:, :, prompt : prompt + before], x[:, :, start:stop]), 2) for x in (k, v))
        scores = scale * q[:, :, start:stop] @ keys.repeat_interleave(group, 1).transpose(2, 3)
        back = torch.arange(before, before + stop - start, device=q.device)[:, None] - torch.arange(
            before + stop - start, device=q.device)
        seen = back >= 0 if window is None else (back >= 0) & (back < window)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outs.append((weights @ values.repeat_interleave(group, 1)).transpose(1, 2))
    return torch.cat(outs, 1)
