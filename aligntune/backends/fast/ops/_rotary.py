"""Device functions of `rope`: one token's heads, normed and rotated, and the way back.

A head of D numbers is [x1, x2, rest]: two halves of R/2 that turn together, and D - R that pass through. Everything is
computed in fp32 registers; `heads` are rows of a tile, so that a norm's sum stays inside it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(base_ptr, row, R: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Both halves of a row of R numbers, in fp32."""
    cols = tl.arange(0, BLOCK_HALF)
    keep = cols < R // 2
    first = tl.load(base_ptr + row + cols, keep, other=0.0).to(tl.float32)
    return first, tl.load(base_ptr + row + R // 2 + cols, keep, other=0.0).to(tl.float32)


@triton.jit
def normed(x, rstd, w, DTYPE: tl.constexpr, CAST_FIRST: tl.constexpr, ROUND_NORM: tl.constexpr):
    n = x * rstd
    if CAST_FIRST:
        n = n.to(DTYPE).to(tl.float32)
    n = n * w[None, :]
    if ROUND_NORM:
        n = n.to(DTYPE).to(tl.float32)
    return n


@triton.jit
def rotate(
    x_ptr, x_head, y_ptr, y_head, w_ptr, c1, c2, s1, s2,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROUND: tl.constexpr, BACKWARD: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, CAST_FIRST: tl.constexpr, OFFSET: tl.constexpr, ROUND_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """(Norm and) rotate one token's heads. All loads of a head are above its stores: y may be x itself."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    cols = tl.arange(0, BLOCK_HALF)
    rest = R + tl.arange(0, BLOCK_REST)
    for start in tl.static_range(0, HEADS, BLOCK_N):
        heads = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]  # 64 heads x 262,144 x 128 is 2^31
        keep = (heads < HEADS) & (cols < R // 2)[None, :]
        keep_rest = (heads < HEADS) & (rest < D)[None, :]
        at = x_ptr + heads * x_head + cols[None, :]
        x1 = tl.load(at, keep, other=0.0).to(tl.float32)
        x2 = tl.load(at + R // 2, keep, other=0.0).to(tl.float32)
        if R < D:
            x3 = tl.load(x_ptr + heads * x_head + rest[None, :], keep_rest, other=0.0).to(tl.float32)
        if NORM:
            squares = tl.sum(x1 * x1 + x2 * x2, axis=1)
            if R < D:
                squares += tl.sum(x3 * x3, axis=1)
            rstd = tl.rsqrt(squares / D + EPS)[:, None]
            w1, w2 = halves(w_ptr, 0, R, BLOCK_HALF)
            x1 = normed(x1, rstd, w1 + OFFSET, dtype, CAST_FIRST, ROUND_NORM)
            x2 = normed(x2, rstd, w2 + OFFSET, dtype, CAST_FIRST, ROUND_NORM)
            if R < D:
                w3 = tl.load(w_ptr + rest, rest < D, other=0.0).to(tl.float32)
                x3 = normed(x3, rstd, w3 + OFFSET, dtype, CAST_FIRST, ROUND_NORM)
        if BACKWARD:
            a1, b1, a2, b2 = x1 * c1[None, :], x2 * s2[None, :], x2 * c2[None, :], -x1 * s1[None, :]
        else:
            a1, b1, a2, b2 = x1 * c1[None, :], -x2 * s1[None, :], x2 * c2[None, :], x1 * s2[None, :]
        if ROUND:  # cos and sin are of x's half-precision dtype: eager rounds each product before adding
            a1, b1 = a1.to(dtype).to(tl.float32), b1.to(dtype).to(tl.float32)
            a2, b2 = a2.to(dtype).to(tl.float32), b2.to(dtype).to(tl.float32)
        out = y_ptr + heads * y_head + cols[None, :]
        tl.store(out, (a1 + b1).to(y_ptr.dtype.element_ty), keep)
        tl.store(out + R // 2, (a2 + b2).to(y_ptr.dtype.element_ty), keep)
        if R < D:
            tl.store(y_ptr + heads * y_head + rest[None, :], x3.to(y_ptr.dtype.element_ty), keep_rest)


@triton.jit
def rotate_token(
    q_ptr, q_b, q_s, q_h, k_ptr, k_b, k_s, k_h, q_out, qo_b, qo_s, qo_h, k_out, ko_b, ko_s, ko_h,
    qw_ptr, kw_ptr, cos_ptr, sin_ptr, cos_b, cos_s, n_seq,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROUND: tl.constexpr, BACKWARD: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, CAST_FIRST: tl.constexpr, OFFSET: tl.constexpr, ROUND_NORM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, s = token // n_seq, token % n_seq
    c1, c2 = halves(cos_ptr, b * cos_b + s * cos_s, R, BLOCK_HALF)
    s1, s2 = halves(sin_ptr, b * cos_b + s * cos_s, R, BLOCK_HALF)
    rotate(
        q_ptr + b * q_b + s * q_s, q_h, q_out + b * qo_b + s * qo_s, qo_h, qw_ptr, c1, c2, s1, s2,
        HQ, D, R, ROUND, BACKWARD, NORM, EPS, CAST_FIRST, OFFSET, ROUND_NORM, BLOCK_Q, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    rotate(
        k_ptr + b * k_b + s * k_s, k_h, k_out + b * ko_b + s * ko_s, ko_h, kw_ptr, c1, c2, s1, s2,
        HK, D, R, ROUND, BACKWARD, NORM, EPS, CAST_FIRST, OFFSET, ROUND_NORM, BLOCK_K, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip


@triton.jit
def unrotate(
    dy_ptr, dy_head, x_ptr, x_head, dx_ptr, dx_head, w_ptr, c1, c2, s1, s2, dw1, dw2, dw3,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Back through rotation and norm of one token's heads; returns the running sums of the weight's gradient."""
    cols = tl.arange(0, BLOCK_HALF)
    rest = R + tl.arange(0, BLOCK_REST)
    w1, w2 = halves(w_ptr, 0, R, BLOCK_HALF)
    w3 = tl.load(w_ptr + rest, rest < D, other=0.0).to(tl.float32)
    for start in tl.static_range(0, HEADS, BLOCK_N):
        heads = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]  # 64 heads x 262,144 x 128 is 2^31
        keep = (heads < HEADS) & (cols < R // 2)[None, :]
        keep_rest = (heads < HEADS) & (rest < D)[None, :]
        at, dy_at = x_ptr + heads * x_head + cols[None, :], dy_ptr + heads * dy_head + cols[None, :]
        n1 = tl.load(at, keep, other=0.0).to(tl.float32)
        n2 = tl.load(at + R // 2, keep, other=0.0).to(tl.float32)
        dy1 = tl.load(dy_at, keep, other=0.0).to(tl.float32)
        dy2 = tl.load(dy_at + R // 2, keep, other=0.0).to(tl.float32)
        g1, g2 = dy1 * c1[None, :] + dy2 * s2[None, :], dy2 * c2[None, :] - dy1 * s1[None, :]
        squares = tl.sum(n1 * n1 + n2 * n2, axis=1)
        if R < D:
            n3 = tl.load(x_ptr + heads * x_head + rest[None, :], keep_rest, other=0.0).to(tl.float32)
            g3 = tl.load(dy_ptr + heads * dy_head + rest[None, :], keep_rest, other=0.0).to(tl.float32)
            squares += tl.sum(n3 * n3, axis=1)
        rstd = tl.rsqrt(squares / D + EPS)[:, None]
        n1, n2 = n1 * rstd, n2 * rstd
        dw1, dw2 = dw1 + g1 * n1, dw2 + g2 * n2
        g1, g2 = g1 * (w1 + OFFSET)[None, :], g2 * (w2 + OFFSET)[None, :]
        dot = tl.sum(g1 * n1 + g2 * n2, axis=1)
        if R < D:
            n3 = n3 * rstd
            dw3 += g3 * n3
            g3 = g3 * (w3 + OFFSET)[None, :]
            dot += tl.sum(g3 * n3, axis=1)
            dot = (dot / D)[:, None]
            out3 = dx_ptr + heads * dx_head + rest[None, :]
            tl.store(out3, (rstd * (g3 - n3 * dot)).to(dx_ptr.dtype.element_ty), keep_rest)
        else:
            dot = (dot / D)[:, None]
        out = dx_ptr + heads * dx_head + cols[None, :]
        tl.store(out, (rstd * (g1 - n1 * dot)).to(dx_ptr.dtype.element_ty), keep)
        tl.store(out + R // 2, (rstd * (g2 - n2 * dot)).to(dx_ptr.dtype.element_ty), keep)
    return dw1, dw2, dw3


@triton.jit
def store_partial(
    ptr, dw1, dw2, dw3, D: tl.constexpr, R: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr
):
    cols = tl.arange(0, BLOCK_HALF)
    tl.store(ptr + cols, tl.sum(dw1, axis=0), cols < R // 2)
    tl.store(ptr + R // 2 + cols, tl.sum(dw2, axis=0), cols < R // 2)
    if R < D:
        rest = R + tl.arange(0, BLOCK_REST)
        tl.store(ptr + rest, tl.sum(dw3, axis=0), rest < D)
