"""The kernels of `segment_attention`: which tile a program takes, and the launches of the forward, dq, and dk with dv.

SCALE is in units of log 2. A tile's rows are BLOCK_M // G tokens x G query heads of one key head, token by token; heads
beyond GROUP are none.

Loops run from 0: where one begins at a number that a search or a sum found, Triton (3.7) knows nothing of the alignment
of what it addresses, and loads nothing ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aligntune.backends.fast.ops import _runtime


@triton.jit
def _above(level, counts, floor):
    """How many tiles lie at `level` or above: segment n's at floor[n] ... floor[n] + counts[n] - 1."""
    return tl.sum(tl.minimum(tl.maximum(counts + floor - level, 0), counts), axis=0)


@triton.jit
def _place(
    slot, ends_ptr, before_ptr, segments, tiles, prompts, SIZE: tl.constexpr, KEYS: tl.constexpr,
    SHARED: tl.constexpr, COMPACT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The segment and the tile of the `slot`-th program: those that see most come first.

    Of queries these are the last, of keys the first, prompts' before all others. Beyond the last tile, one that no
    segment has.
    """
    if COMPACT:
        n = tl.arange(0, BLOCK_S)
        inside = n < segments
        lengths = tl.load(ends_ptr + n + 1, inside, other=0) - tl.load(ends_ptr + n, inside, other=0)
        counts = (lengths + SIZE - 1) // SIZE
        floor = n * 0
        if SHARED:
            if KEYS:
                floor = tl.where(n < prompts, tiles, 0)
            else:
                floor = tl.load(before_ptr + n, inside, other=0) // SIZE
        # All tiles at `low` and above are more than `slot`, those at `high` and above are not.
        low = 0 * slot
        high = low + 2 * tiles + 1
        while high - low > 1:
            middle = (low + high) // 2
            more = _above(middle, counts, floor) > slot
            low = tl.where(more, middle, low)
            high = tl.where(more, high, middle)
        rank = slot - _above(low + 1, counts, floor)
        here = (low >= floor) & (low < floor + counts)
        its = here & (tl.cumsum(here.to(tl.int32), axis=0) - 1 == rank)
        segment = tl.sum(tl.where(its, n, 0), axis=0)
        tile = tl.sum(tl.where(its, counts - 1 - (low - floor) if KEYS else low - floor, 0), axis=0)
        tile = tl.where(tl.sum(its.to(tl.int32), axis=0) > 0, tile, 2 * tiles)
    else:
        segment = slot % segments
        tile = slot // segments
        if not KEYS:
            tile = tiles - 1 - tile
    return segment, tile


@triton.jit
def _segment(segment, ends_ptr, before_ptr, group_ptr, SHARED: tl.constexpr):
    """First token and length of a segment, tokens before it and the first of these."""
    start = tl.load(ends_ptr + segment)
    length = tl.load(ends_ptr + segment + 1) - start
    before = length * 0
    prompt = before
    if SHARED:
        before = tl.load(before_ptr + segment)
        prompt = tl.load(ends_ptr + tl.load(group_ptr + segment, before > 0, other=0))
    return start, length, before, prompt


@triton.jit
def _token(j, start, before, prompt, SHARED: tl.constexpr):
    """The tokens at positions j."""
    token = start + j - before
    if SHARED:
        token = tl.where(j < before, prompt + j, token)
    return token.to(tl.int64)


@triton.jit
def _tile(ptr, at, keep, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of D at `at`, zeros where not `keep`."""
    d = tl.arange(0, BLOCK_D)
    if BLOCK_D == D:
        x = tl.load(ptr + at[:, None] + d[None, :], keep[:, None], other=0.0)
    else:
        x = tl.load(ptr + at[:, None] + d[None, :], keep[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:  # the interpreter multiplies bf16 as integers
        x = x.to(tl.float32)
    return x


@triton.jit
def _put(ptr, at, x, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    tl.store(ptr + at[:, None] + d[None, :], x.to(ptr.dtype.element_ty), keep[:, None] & (d < D)[None, :])


@triton.jit
def _seen(key, query, WINDOW: tl.constexpr):
    seen = key <= query
    if WINDOW > 0:
        seen = seen & (query - key < WINDOW)
    return seen


@triton.jit
def _span(first, before, length, TOKENS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile of queries from `first` on: where its keys begin, where they end."""
    low = first * 0
    if WINDOW > 0:
        low = tl.maximum(before + first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    return low, before + tl.minimum(first + TOKENS, length)


@triton.jit
def _softmax_over(
    acc, top, total, q, position, low, stop, k_ptr, k_token, v_ptr, v_token, start, before, prompt,
    SCALE: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, SHARED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for further in tl.range(0, stop - low, BLOCK_N, num_stages=STAGES):
        j = low + further + tl.arange(0, BLOCK_N)
        at = _token(j, start, before, prompt, SHARED)
        k = _tile(k_ptr, at * k_token, j < stop, D, BLOCK_D, UPCAST)
        v = _tile(v_ptr, at * v_token, j < stop, D, BLOCK_D, UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.where(_seen(j[None, :], position[:, None], WINDOW), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1) * SCALE)
        shift = new_top
        if WINDOW > 0:  # a row may have seen no key yet
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s * SCALE - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        top = new_top
    return acc, top, total


@_runtime.kernel(do_not_specialize=["segments", "tokens", "tiles", "prompts"])
def segment_attention_forward(
    q_ptr, q_token, q_head, k_ptr, k_token, k_head, v_ptr, v_token, v_head, out_ptr, lse_ptr, ends_ptr, before_ptr,
    group_ptr, segments, tokens, tiles, prompts,
    SCALE: tl.constexpr, HK: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, SHARED: tl.constexpr, COMPACT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BLOCK_M // G
    pid = tl.program_id(0)
    head = (pid % HK).to(tl.int64)
    segment, tile = _place(pid // HK, ends_ptr, before_ptr, segments, tiles, prompts, TOKENS, False, SHARED, COMPACT,
                           BLOCK_S)  # fmt: skip
    start, length, before, prompt = _segment(segment, ends_ptr, before_ptr, group_ptr, SHARED)
    first = tile * TOKENS
    if first >= length:
        return
    row = tl.arange(0, BLOCK_M)
    own, q_heads = first + row // G, head * GROUP + row % G
    keep = (own < length) & (row % G < GROUP)
    at_q = (start + own).to(tl.int64)
    q = _tile(q_ptr, at_q * q_token + q_heads * q_head, keep, D, BLOCK_D, UPCAST)
    k_ptr += head * k_head
    v_ptr += head * v_head
    position = before + own
    low, stop = _span(first, before, length, TOKENS, WINDOW, BLOCK_N)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc, top, total = _softmax_over(
        acc, top, total, q, position, low, stop, k_ptr, k_token, v_ptr, v_token, start, before, prompt, SCALE, D,
        WINDOW, SHARED, UPCAST, BLOCK_N, BLOCK_D, STAGES)  # fmt: skip
    total = tl.where(keep, total, 1.0)
    _put(out_ptr, (at_q * (HK * GROUP) + q_heads) * D, acc * (1.0 / total)[:, None], keep, D, BLOCK_D)
    tl.store(lse_ptr + q_heads * tokens + at_q, top + tl.log2(total), keep)


@triton.jit
def _dq_over(
    dq, q, dout, lse, delta, position, low, stop, k_ptr, k_token, v_ptr, v_token, start, before, prompt,
    SCALE: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, SHARED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for further in tl.range(0, stop - low, BLOCK_N, num_stages=STAGES):
        j = low + further + tl.arange(0, BLOCK_N)
        at = _token(j, start, before, prompt, SHARED)
        k = _tile(k_ptr, at * k_token, j < stop, D, BLOCK_D, UPCAST)
        v = _tile(v_ptr, at * v_token, j < stop, D, BLOCK_D, UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        p = tl.exp2(s * SCALE - lse[:, None])
        p = tl.where(_seen(j[None, :], position[:, None], WINDOW), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@_runtime.kernel(do_not_specialize=["segments", "tokens", "tiles", "prompts"])
def segment_attention_dq(
    q_ptr, q_token, q_head, k_ptr, k_token, k_head, v_ptr, v_token, v_head, out_ptr, dout_ptr, dout_token, dout_head,
    lse_ptr, delta_ptr, dq_ptr, ends_ptr, before_ptr, group_ptr, segments, tokens, tiles, prompts,
    SCALE: tl.constexpr, HK: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, SHARED: tl.constexpr, COMPACT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BLOCK_M // G
    pid = tl.program_id(0)
    head = (pid % HK).to(tl.int64)
    segment, tile = _place(pid // HK, ends_ptr, before_ptr, segments, tiles, prompts, TOKENS, False, SHARED, COMPACT,
                           BLOCK_S)  # fmt: skip
    start, length, before, prompt = _segment(segment, ends_ptr, before_ptr, group_ptr, SHARED)
    first = tile * TOKENS
    if first >= length:
        return
    row = tl.arange(0, BLOCK_M)
    own, q_heads = first + row // G, head * GROUP + row % G
    keep = (own < length) & (row % G < GROUP)
    at_q = (start + own).to(tl.int64)
    at_out = (at_q * (HK * GROUP) + q_heads) * D
    out = _tile(out_ptr, at_out, keep, D, BLOCK_D, UPCAST)
    dout = _tile(dout_ptr, at_q * dout_token + q_heads * dout_head, keep, D, BLOCK_D, UPCAST)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    at_row = q_heads * tokens + at_q
    tl.store(delta_ptr + at_row, delta, keep)
    lse = tl.load(lse_ptr + at_row, keep, other=float("inf"))
    q = _tile(q_ptr, at_q * q_token + q_heads * q_head, keep, D, BLOCK_D, UPCAST)
    k_ptr += head * k_head
    v_ptr += head * v_head
    position = before + own
    low, stop = _span(first, before, length, TOKENS, WINDOW, BLOCK_N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _dq_over(
        dq, q, dout, lse, delta, position, low, stop, k_ptr, k_token, v_ptr, v_token, start, before, prompt, SCALE, D,
        WINDOW, SHARED, UPCAST, BLOCK_N, BLOCK_D, STAGES)  # fmt: skip
    # SCALE is in units of log 2.
    _put(dq_ptr, at_out, dq * (SCALE * 0.6931471805599453), keep, D, BLOCK_D)


@triton.jit
def _dkv_over(
    dk, dv, k, v, key, low, high, q_ptr, q_token, q_head, dout_ptr, dout_token, dout_head, lse_ptr, delta_ptr, tokens,
    start, length, before, SCALE: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK_M)
    g = (row % G).to(tl.int64)
    for further in tl.range(0, high - low, BLOCK_M // G, num_stages=STAGES):
        own = low + further + row // G
        keep = (own < length) & (g < GROUP)
        at = (start + own).to(tl.int64)
        q = _tile(q_ptr, at * q_token + g * q_head, keep, D, BLOCK_D, UPCAST)
        dout = _tile(dout_ptr, at * dout_token + g * dout_head, keep, D, BLOCK_D, UPCAST)
        # What is no row has no weight.
        lse = tl.load(lse_ptr + g * tokens + at, keep, other=float("inf"))
        delta = tl.load(delta_ptr + g * tokens + at, keep, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.exp2(s * SCALE - lse[None, :])
        p = tl.where(_seen(key[:, None], (before + own)[None, :], WINDOW), p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@_runtime.kernel(do_not_specialize=["segments", "tokens", "tiles", "prompts", "most"])
def segment_attention_dkv(
    q_ptr, q_token, q_head, k_ptr, k_token, k_head, v_ptr, v_token, v_head, dout_ptr, dout_token, dout_head,
    lse_ptr, delta_ptr, dk_ptr, dv_ptr, ends_ptr, before_ptr, users_ptr, segments, tokens, tiles, prompts, most,
    SCALE: tl.constexpr, HK: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, SHARED: tl.constexpr, COMPACT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BLOCK_M // G
    pid = tl.program_id(0)
    head = (pid % HK).to(tl.int64)
    segment, tile = _place(pid // HK, ends_ptr, before_ptr, segments, tiles, prompts, BLOCK_N, True, SHARED, COMPACT,
                           BLOCK_S)  # fmt: skip
    key_start = tl.load(ends_ptr + segment)
    keys = tl.load(ends_ptr + segment + 1) - key_start
    first = tile * BLOCK_N
    if first >= keys:
        return
    j = first + tl.arange(0, BLOCK_N)
    keep = j < keys
    at = (key_start + j).to(tl.int64)
    k = _tile(k_ptr, at * k_token + head * k_head, keep, D, BLOCK_D, UPCAST)
    v = _tile(v_ptr, at * v_token + head * v_head, keep, D, BLOCK_D, UPCAST)
    q_ptr += head * GROUP * q_head
    dout_ptr += head * GROUP * dout_head
    lse_ptr += head * GROUP * tokens
    delta_ptr += head * GROUP * tokens
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    end = tl.minimum(first + BLOCK_N, keys)
    # Positions count from the first key: of the segment's own queries first, then of those that go on from it.
    parts = 1
    if SHARED:
        parts = tl.where(segment < prompts, most + 1, 1)
    for part in tl.range(0, parts):
        start, length, before, key = key_start, keys, keys * 0, j
        low = first // TOKENS * TOKENS
        if SHARED:  # noqa: SIM102 - a condition of both would be one of the device
            if part > 0:
                user = tl.load(users_ptr + segment * most + part - 1)
                there = user >= 0
                start = tl.load(ends_ptr + user, there, other=0)
                length = tl.load(ends_ptr + user + 1, there, other=0) - start
                before = tl.load(before_ptr + user, there, other=0)
                key = tl.where(j < before, j, 2147483647)
                length = tl.where(first < before, length, 0)
                low = first * 0
        high = length
        if WINDOW > 0:
            high = tl.minimum(length, end - 1 + WINDOW - before)
        dk, dv = _dkv_over(
            dk, dv, k, v, key, low, high, q_ptr, q_token, q_head, dout_ptr, dout_token, dout_head, lse_ptr, delta_ptr,
            tokens, start, length, before, SCALE, GROUP, G, D, WINDOW, UPCAST, BLOCK_M, BLOCK_D, STAGES)  # fmt: skip
    to = (at * HK + head) * D
    _put(dk_ptr, to, dk * (SCALE * 0.6931471805599453), keep, D, BLOCK_D)
    _put(dv_ptr, to, dv, keep, D, BLOCK_D)
