"""Attention of one new token a row over a paged key/value cache, and the write that fills the cache.

    out_h = softmax_j(cap(scale * q_h . k_j)) v_j        j in [max(0, n - window), n), n = lengths[row]

with cap(s) = softcap * tanh(s / softcap), or s. Query heads h share the key head h // (Hq / Hk).

The cache of a layer is `(pages, Hk, page, D)` for keys and for values; `table[row, i]` is the page that holds the row's
tokens i * page ... A key head of a page is one contiguous piece of page * D elements.

Bytes that must move: each visible key and value once, 2 b Hk D for each token of each row; q and out beside it are
nothing. One program reads a key head's tokens for all query heads that share it, in tiles of `block_n`, with a running
softmax. Where rows x key heads are fewer than the GPU's processors, a row's tokens are cut in `splits` pieces and a
second kernel sums them (Dao et al. 2023, flash-decoding). Lengths and tables are read from device memory, so a captured
launch serves rows of any length; so is the place of the pages, where they may come to lie elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from aligntune.backends.fast.ops import _runtime
from aligntune.errors import ConfigError

_MOST_SPLITS = 32


@dataclass(frozen=True)
class Place:
    """Where pages lie now that are given back and allocated anew: a captured launch reads it, and follows them.

    anchor: of the pages' dtype, aligned to 16 elements; stays at its address.
    elements: (2,) int64 on the device, how many elements behind the anchor keys and values begin (before it, where
        negative); multiples of 16.
    """

    anchor: torch.Tensor
    elements: torch.Tensor


@dataclass(frozen=True)
class DecodeLaunch:
    """`block_g` query heads (16 is the least that `tl.dot` takes) against `block_n` tokens at a time."""

    block_g: int
    block_d: int
    block_n: int
    splits: int
    num_warps: int = 4
    stages: int = 3


def launch_for(
    rows: int, q_heads: int, k_heads: int, head_dim: int, most_tokens: int, *, sms: int, itemsize: int = 2
) -> DecodeLaunch:
    """Pieces enough for two programs a processor; none shorter than two tiles of the longest row.

    Tiles of up to 16 KiB of keys: with four programs a processor that keeps memory busy. fp32 at head_dim 256 spills
    4,000 instructions with tiles of 32 tokens, and none with 16.
    """
    block_d = max(16, _runtime.next_power_of_2(head_dim))
    block_n = max(16, min(64, 16384 // (block_d * itemsize)))
    wanted = _runtime.next_power_of_2(_runtime.cdiv(2 * sms, max(1, rows * k_heads)))
    longest = _runtime.next_power_of_2(max(1, most_tokens // (2 * block_n)))
    splits = max(1, min(wanted, longest, _MOST_SPLITS))
    return DecodeLaunch(max(16, _runtime.next_power_of_2(q_heads // k_heads)), block_d, block_n, splits)


@triton.jit
def _capped(s, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores in units of log 2, after the cap."""
    s = s * SCALE
    if SOFTCAP > 0:
        s = SOFTCAP * (2.0 * tl.sigmoid(s * (2.0 / SOFTCAP)) - 1.0)
    return s * 1.4426950408889634


@triton.jit
def _placed(k_ptr, v_ptr, elements_ptr, MOVES: tl.constexpr):
    """The first elements of keys and values; where they move, both pointers are the anchor."""
    if MOVES:
        k_ptr += tl.multiple_of(tl.load(elements_ptr), 16)
        v_ptr += tl.multiple_of(tl.load(elements_ptr + 1), 16)
    return k_ptr, v_ptr


@_runtime.kernel
def decode_attention_kernel(
    q_ptr, q_row, q_head, k_ptr, v_ptr, elements_ptr, table_ptr, table_row, lengths_ptr, out_ptr, partial_ptr,
    stats_ptr, MOVES: tl.constexpr,
    SCALE: tl.constexpr, HK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLITS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    keep_g, keep_d = g < GROUP, d < D
    keep_q = keep_g[:, None] & keep_d[None, :]
    q_heads = head * GROUP + g
    k_ptr, v_ptr = _placed(k_ptr, v_ptr, elements_ptr, MOVES)
    q = tl.load(q_ptr + row * q_row + q_heads[:, None] * q_head + d[None, :], keep_q, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    length = tl.load(lengths_ptr + row)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else length * 0
    tiles = (length - first + BLOCK_N - 1) // BLOCK_N
    share = (tiles + SPLITS - 1) // SPLITS * BLOCK_N
    start = first + split * share
    stop = tl.minimum(start + share, length)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    table = table_ptr + row * table_row
    n = start + tl.arange(0, BLOCK_N)
    page = tl.load(table + n // PAGE, n < stop, other=0)
    for _ in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        keep_n = n < stop
        # int64: a cache of 40 GiB has more elements than int32 counts.
        at = ((page.to(tl.int64) * HK + head) * PAGE + n % PAGE) * D
        keep_kv = keep_n[:, None] & keep_d[None, :]
        k = tl.load(k_ptr + at[:, None] + d[None, :], keep_kv, other=0.0)
        v = tl.load(v_ptr + at[:, None] + d[None, :], keep_kv, other=0.0)
        n += BLOCK_N  # the next tile's pages are on their way while this one is multiplied
        page = tl.load(table + n // PAGE, n < stop, other=0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        s = _capped(tl.dot(q, tl.trans(k), input_precision="ieee"), SCALE, SOFTCAP)
        s = tl.where(keep_n[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    at_out = row * HK * GROUP + q_heads
    if SPLITS == 1:
        # A row without tokens sums to 0.
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + at_out[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), keep_q)
    else:
        piece = at_out * SPLITS + split
        tl.store(partial_ptr + piece[:, None] * D + d[None, :], acc, keep_q)
        tl.store(stats_ptr + piece * 2, top, keep_g)
        tl.store(stats_ptr + piece * 2 + 1, total, keep_g)


@_runtime.kernel
def decode_attention_sum(
    partial_ptr, stats_ptr, out_ptr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    top = tl.load(stats_ptr + (at * SPLITS + s) * 2)
    total = tl.load(stats_ptr + (at * SPLITS + s) * 2 + 1)
    highest = tl.max(top, axis=0)
    weight = tl.where(total > 0, tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest)), 0.0)
    acc = tl.load(partial_ptr + (at * SPLITS + s)[:, None] * D + d[None, :], (d < D)[None, :], other=0.0)
    whole = tl.sum(total * weight, axis=0)
    out = tl.sum(acc * weight[:, None], axis=0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out_ptr + at * D + d, out.to(out_ptr.dtype.element_ty), d < D)


@_runtime.kernel
def write_kv_kernel(
    k_ptr, k_token, k_head, v_ptr, v_token, v_head, slots_ptr, k_pages, v_pages, elements_ptr, MOVES: tl.constexpr,
    HK: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    k_pages, v_pages = _placed(k_pages, v_pages, elements_ptr, MOVES)
    keep = (h < tl.where(slot >= 0, HK, 0))[:, None] & (d < D)[None, :]
    to = ((slot // PAGE * HK + h) * PAGE + slot % PAGE)[:, None] * D + d[None, :]
    k = tl.load(k_ptr + token * k_token + h[:, None] * k_head + d[None, :], keep, other=0.0)
    v = tl.load(v_ptr + token * v_token + h[:, None] * v_head + d[None, :], keep, other=0.0)
    tl.store(k_pages + to, k.to(k_pages.dtype.element_ty), keep)
    tl.store(v_pages + to, v.to(v_pages.dtype.element_ty), keep)


def _pointers(
    k_pages: torch.Tensor, v_pages: torch.Tensor, place: Place | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """What `_placed` is given."""
    if place is None:
        return k_pages, v_pages, k_pages, False
    if place.anchor.dtype != k_pages.dtype:
        raise ConfigError(f"an anchor in {place.anchor.dtype} of pages in {k_pages.dtype}")
    _runtime.require_device(place.anchor, place.elements)
    return place.anchor, place.anchor, place.elements, True


def _check(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, table: torch.Tensor) -> None:
    rows, q_heads, head_dim = q.shape
    if k_pages.shape != v_pages.shape or not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ConfigError(f"key pages {tuple(k_pages.shape)} and value pages {tuple(v_pages.shape)} must be contiguous "
                          "and of one shape")
    if k_pages.shape[3] != head_dim or q_heads % k_pages.shape[1] or table.shape[0] < rows:
        raise ConfigError(f"q {tuple(q.shape)} does not fit pages {tuple(k_pages.shape)} and table "
                          f"{tuple(table.shape)}")


def decode_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, *,
    scale: float, window: int | None = None, softcap: float | None = None, place: Place | None = None,
) -> torch.Tensor:
    """Attention of one query token a row.

    Args:
        q: (rows, query heads, head_dim), any strides but the last, which is 1.
        k_pages, v_pages: (pages, key heads, page, head_dim), contiguous; query heads are a multiple of key heads.
        table: (rows or more, pages a row) int32 page numbers; beyond a row's length they may be anything.
        lengths: (rows or more,) int32, tokens that the row's query sees, itself (already written) included; a row of
            length 0 gives 0.
        scale: what the scores are multiplied with.
        window: the query sees itself and the `window` - 1 tokens before it; None sees all.
        softcap: scores become softcap * tanh(score / softcap).
        place: where the pages are read from; None is where `k_pages` and `v_pages` lie.

    Returns:
        (rows, query heads, head_dim), contiguous, in q's dtype.

    Raises:
        ConfigError: shapes that do not fit. BackendUnavailableError: tensors that no kernel can read.
    """
    _check(q, k_pages, v_pages, table)
    _runtime.require_device(q, k_pages, v_pages, table, lengths)
    q = q if _runtime.has_rows(q) else q.contiguous()
    rows, q_heads, head_dim = q.shape
    k_heads, page = k_pages.shape[1:3]
    most = min(table.shape[1] * page, window or 1 << 30)
    launch = launch_for(rows, q_heads, k_heads, head_dim, most, sms=_runtime.num_sms(q),
                        itemsize=k_pages.element_size())
    out = torch.empty((rows, q_heads, head_dim), dtype=q.dtype, device=q.device)
    if not rows:
        return out
    partial = stats = out
    if launch.splits > 1:
        partial = torch.empty((rows, q_heads, launch.splits, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((rows, q_heads, launch.splits, 2), dtype=torch.float32, device=q.device)
    keys, values, elements, moves = _pointers(k_pages, v_pages, place)
    with _runtime.on_device(q):
        decode_attention_kernel[(rows, k_heads, launch.splits)](
            q, q.stride(0), q.stride(1), keys, values, elements, table, table.stride(0), lengths, out, partial, stats,
            moves, float(scale), k_heads, q_heads // k_heads, head_dim, page, window or 0, float(softcap or 0.0),
            launch.splits, _runtime.interpreting(), launch.block_g, launch.block_d, launch.block_n, launch.stages,
            num_warps=launch.num_warps,
        )  # fmt: skip
        if launch.splits > 1:
            decode_attention_sum[(rows * q_heads,)](
                partial, stats, out, head_dim, launch.splits, launch.block_d, num_warps=2
            )
    return out


def decode_attention_reference(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, *,
    scale: float, window: int | None = None, softcap: float | None = None, place: Place | None = None,
) -> torch.Tensor:
    """`decode_attention` in torch; the arguments are the same. Rounds where transformers' eager attention does.

    It reads `k_pages` and `v_pages`, whatever `place` says.
    """
    _check(q, k_pages, v_pages, table)
    rows, q_heads, head_dim = q.shape
    k_heads, page = k_pages.shape[1:3]
    lengths = lengths[:rows]
    most = table.shape[1] if not rows or lengths.is_cuda else max(1, -(-int(lengths.max()) // page))
    pages = table[:rows, :most].long().clamp(0, k_pages.shape[0] - 1)
    # (rows, pages, heads, page, D) -> (rows, heads, tokens, D)
    k, v = (x[pages].transpose(1, 2).reshape(rows, k_heads, most * page, head_dim) for x in (k_pages, v_pages))
    at = torch.arange(most * page, device=q.device)
    seen = at < lengths[:, None]
    if window is not None:
        seen = seen & (at >= lengths[:, None] - window)
    grouped = q.reshape(rows, k_heads, q_heads // k_heads, head_dim)
    scores = torch.matmul(grouped, k.to(q.dtype).transpose(2, 3)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen[:, None, None, :], float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).nan_to_num(0.0).to(q.dtype)
    # Beyond a row's end the cache may hold anything; 0 times a NaN is a NaN.
    v = v.to(q.dtype).masked_fill(~seen[:, None, :, None], 0.0)
    return torch.matmul(weights, v).reshape(rows, q_heads, head_dim)


def write_kv(
    k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *,
    place: Place | None = None,
) -> None:
    """Put keys and values of T tokens where they belong in the cache, in one launch.

    Args:
        k, v: (T, key heads, head_dim), any strides but the last, which is 1.
        slots: (T,) int64, page number * page size + place in the page; a negative one is left out.
        k_pages, v_pages: (pages, key heads, page, head_dim), contiguous; written in place.
        place: where the pages are; None is where `k_pages` and `v_pages` lie.
    """
    _runtime.require_device(k, v, slots, k_pages, v_pages)
    tokens, heads, head_dim = k.shape
    k, v = (x if _runtime.has_rows(x) else x.contiguous() for x in (k, v))
    if not tokens:
        return
    block_h, block_d = _runtime.next_power_of_2(heads), _runtime.next_power_of_2(head_dim)
    keys, values, elements, moves = _pointers(k_pages, v_pages, place)
    with _runtime.on_device(k):
        write_kv_kernel[(tokens,)](
            k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1), slots, keys, values, elements, moves,
            heads, head_dim, k_pages.shape[2], block_h, block_d,
            num_warps=max(1, min(8, block_h * block_d // 256)),
        )  # fmt: skip


def write_kv_reference(
    k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *,
    place: Place | None = None,
) -> None:
    """`write_kv` in torch; the arguments are the same. It writes to `k_pages` and `v_pages`, whatever `place` says."""
    page = k_pages.shape[2]
    kept = slots >= 0
    slots = slots[kept]
    for new, pages in ((k, k_pages), (v, v_pages)):
        pages[slots // page, :, slots % page] = new[kept].to(pages.dtype)
