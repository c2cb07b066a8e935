"""Rotary position embedding of q and k in one launch, alone or after each head's RMSNorm (Su et al. 2021, eq. 34).

    x = [x1, x2, rest]                     x1, x2: the first R/2 and the next R/2 of the D dimensions of a head
    y = [x1 c1 - x2 s1, x2 c2 + x1 s2, rest]        c = [c1, c2], s = [s1, s2]: cos and sin as the model computes them
    dx = [dy1 c1 + dy2 s2, dy2 c2 - dy1 s1, drest]

With the norm (Qwen3, Gemma 3), x is first RMSNorm(x) over D, as in `rms_norm`; its rstd is recomputed in the backward,
where the head is read anyway. Positions and scaling (Llama-3, YaRN) are in cos and sin. Every product is rounded where
transformers rounds it, so the rotation equals eager's to the bit: launches forbid the compiler to fuse products with
sums, which on bf16 makes one fma of the two and drops the product's rounding (23% of the results would differ).

Bytes that must move, T tokens of N = Hq + Hk heads of D elements of b bytes: 2bTND each way, with the norm 3bTND in the
backward; and 2bTR for cos and sin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch.autograd.function import once_differentiable

from aligntune.backends.fast.ops import _runtime
from aligntune.backends.fast.ops._rotary import halves, rotate_token, store_partial, unrotate
from aligntune.backends.fast.ops.rms_norm import CONVENTIONS, rms_norm_reference, sum_partials
from aligntune.errors import unknown


@dataclass(frozen=True)
class RopeLaunch:
    """A program takes a token at a time, `block_q` and `block_k` heads at once, `block_half` of R/2 dimensions."""

    block_q: int
    block_k: int
    block_half: int
    block_rest: int
    programs: int
    num_warps: int


def launch_for(
    tokens: int, q_heads: int, k_heads: int, head_dim: int, rotary_dim: int, *, sms: int | None = None
) -> RopeLaunch:
    """Tiles of up to 2048 elements a half, 8 a thread: one 16-byte load of each half.

    With `sms` (norm weights train) a persistent grid of 16 warps an SM; else a program for each token.
    """
    half, rest = _runtime.next_power_of_2(rotary_dim // 2), _runtime.next_power_of_2(head_dim - rotary_dim)
    widest = max(half, rest)
    block_q, block_k = (min(max(1, 2048 // widest), _runtime.next_power_of_2(n)) for n in (q_heads, k_heads))
    num_warps = max(1, min(8, block_q * widest // 256))
    programs = tokens if sms is None else min(tokens, sms * 16 // num_warps)
    return RopeLaunch(block_q, block_k, half, rest, programs, num_warps)


@_runtime.kernel(do_not_specialize=["n_seq"])
def rope_forward(
    q_ptr, q_b, q_s, q_h, k_ptr, k_b, k_s, k_h, q_out, qo_b, qo_s, qo_h, k_out, ko_b, ko_s, ko_h,
    cos_ptr, sin_ptr, cos_b, cos_s, n_seq,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    rotate_token(q_ptr, q_b, q_s, q_h, k_ptr, k_b, k_s, k_h, q_out, qo_b, qo_s, qo_h, k_out, ko_b, ko_s, ko_h,
                 q_ptr, k_ptr, cos_ptr, sin_ptr, cos_b, cos_s, n_seq, HQ, HK, D, R, ROUND, False,
                 False, 0.0, False, 0.0, False, BLOCK_Q, BLOCK_K, BLOCK_HALF, BLOCK_REST)  # fmt: skip


@_runtime.kernel(do_not_specialize=["n_seq"])
def rope_backward(
    q_ptr, q_b, q_s, q_h, k_ptr, k_b, k_s, k_h, q_out, qo_b, qo_s, qo_h, k_out, ko_b, ko_s, ko_h,
    cos_ptr, sin_ptr, cos_b, cos_s, n_seq,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    rotate_token(q_ptr, q_b, q_s, q_h, k_ptr, k_b, k_s, k_h, q_out, qo_b, qo_s, qo_h, k_out, ko_b, ko_s, ko_h,
                 q_ptr, k_ptr, cos_ptr, sin_ptr, cos_b, cos_s, n_seq, HQ, HK, D, R, ROUND, True,
                 False, 0.0, False, 0.0, False, BLOCK_Q, BLOCK_K, BLOCK_HALF, BLOCK_REST)  # fmt: skip


@_runtime.kernel(do_not_specialize=["n_seq"])
def qk_norm_rope_forward(
    q_ptr, q_b, q_s, q_h, k_ptr, k_b, k_s, k_h, q_out, qo_b, qo_s, qo_h, k_out, ko_b, ko_s, ko_h,
    qw_ptr, kw_ptr, cos_ptr, sin_ptr, cos_b, cos_s, n_seq,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROUND: tl.constexpr,
    EPS: tl.constexpr, CAST_FIRST: tl.constexpr, OFFSET: tl.constexpr, ROUND_NORM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    rotate_token(q_ptr, q_b, q_s, q_h, k_ptr, k_b, k_s, k_h, q_out, qo_b, qo_s, qo_h, k_out, ko_b, ko_s, ko_h,
                 qw_ptr, kw_ptr, cos_ptr, sin_ptr, cos_b, cos_s, n_seq, HQ, HK, D, R, ROUND, False,
                 True, EPS, CAST_FIRST, OFFSET, ROUND_NORM, BLOCK_Q, BLOCK_K, BLOCK_HALF, BLOCK_REST)  # fmt: skip


@_runtime.kernel(do_not_specialize=["n_tokens", "n_seq"])
def qk_norm_rope_backward(
    dq_ptr, dq_b, dq_s, dq_h, dk_ptr, dk_b, dk_s, dk_h, q_ptr, q_b, q_s, q_h, k_ptr, k_b, k_s, k_h,
    q_out, qo_b, qo_s, qo_h, k_out, ko_b, ko_s, ko_h,
    qw_ptr, kw_ptr, cos_ptr, sin_ptr, cos_b, cos_s, partials_ptr, n_tokens, n_seq,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    EPS: tl.constexpr, OFFSET: tl.constexpr, HAS_DW: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    qw1, qw2, qw3 = (tl.zeros([BLOCK_Q, BLOCK_HALF], tl.float32), tl.zeros([BLOCK_Q, BLOCK_HALF], tl.float32),
                     tl.zeros([BLOCK_Q, BLOCK_REST], tl.float32))  # fmt: skip
    kw1, kw2, kw3 = (tl.zeros([BLOCK_K, BLOCK_HALF], tl.float32), tl.zeros([BLOCK_K, BLOCK_HALF], tl.float32),
                     tl.zeros([BLOCK_K, BLOCK_REST], tl.float32))  # fmt: skip
    for token in range(pid, n_tokens, tl.num_programs(0)):
        b, s = (token // n_seq).to(tl.int64), (token % n_seq).to(tl.int64)
        c1, c2 = halves(cos_ptr, b * cos_b + s * cos_s, R, BLOCK_HALF)
        s1, s2 = halves(sin_ptr, b * cos_b + s * cos_s, R, BLOCK_HALF)
        qw1, qw2, qw3 = unrotate(
            dq_ptr + b * dq_b + s * dq_s, dq_h, q_ptr + b * q_b + s * q_s, q_h, q_out + b * qo_b + s * qo_s, qo_h,
            qw_ptr, c1, c2, s1, s2, qw1, qw2, qw3, HQ, D, R, EPS, OFFSET, BLOCK_Q, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
        kw1, kw2, kw3 = unrotate(
            dk_ptr + b * dk_b + s * dk_s, dk_h, k_ptr + b * k_b + s * k_s, k_h, k_out + b * ko_b + s * ko_s, ko_h,
            kw_ptr, c1, c2, s1, s2, kw1, kw2, kw3, HK, D, R, EPS, OFFSET, BLOCK_K, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    if HAS_DW:
        store_partial(partials_ptr + pid * 2 * D, qw1, qw2, qw3, D, R, BLOCK_HALF, BLOCK_REST)
        store_partial(partials_ptr + pid * 2 * D + D, kw1, kw2, kw3, D, R, BLOCK_HALF, BLOCK_REST)


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if _runtime.has_rows(x) else x.contiguous()


@dataclass(frozen=True)
class _Shapes:
    """What a launch needs to know of (q, k, cos, sin); strides are (batch, seq, head)."""

    batch: int
    seq: int
    q_heads: int
    k_heads: int
    head_dim: int
    rotary_dim: int
    seq_dim: int

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int) -> _Shapes:
        if unsqueeze_dim not in (1, 2):
            raise ValueError(f"rope: unsqueeze_dim is 1 (heads before seq) or 2 (after it), not {unsqueeze_dim}")
        if q.dim() != 4 or k.dim() != 4:
            raise ValueError(f"rope: q {tuple(q.shape)} and k {tuple(k.shape)} must have 4 dimensions")
        seq_dim = 3 - unsqueeze_dim
        batch, seq, head_dim, rotary_dim = q.shape[0], q.shape[seq_dim], q.shape[3], cos.shape[-1]
        if (k.shape[0], k.shape[seq_dim], k.shape[3]) != (batch, seq, head_dim) or k.dtype != q.dtype:
            raise ValueError(
                f"rope: q {tuple(q.shape)} {q.dtype} and k {tuple(k.shape)} {k.dtype} differ in more than their heads"
            )
        if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != seq:
            raise ValueError(
                f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit: batch {batch} (or 1), seq {seq}"
            )
        if rotary_dim % 2 or rotary_dim > head_dim:
            raise ValueError(f"rope: {rotary_dim} rotary dimensions of a head of {head_dim}")
        if cos.requires_grad or sin.requires_grad:
            raise ValueError("rope: cos and sin take no gradient")
        return cls(batch, seq, q.shape[unsqueeze_dim], k.shape[unsqueeze_dim], head_dim, rotary_dim, seq_dim)

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    def strides(self, x: torch.Tensor) -> tuple[int, int, int]:
        return x.stride(0), x.stride(self.seq_dim), x.stride(3 - self.seq_dim)

    def empty(self, like: torch.Tensor, heads: int) -> torch.Tensor:
        """A result laid out (batch, seq, heads, dim) in memory, as projections and attention kernels want it."""
        out = torch.empty(self.batch, self.seq, heads, self.head_dim, dtype=like.dtype, device=like.device)
        return out.transpose(1, 2) if self.seq_dim == 2 else out


def _tables(cos: torch.Tensor, sin: torch.Tensor, shapes: _Shapes) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """cos and sin, and the one pair of strides (batch, seq) for both."""
    if cos.stride() != sin.stride() or not _runtime.has_rows(cos):
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0) if cos.shape[0] == shapes.batch else 0, cos.stride(1)


def rotate_into(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_out: torch.Tensor, k_out: torch.Tensor,
    *, unsqueeze_dim: int = 1, backward: bool = False,
) -> None:  # fmt: skip
    """Rotate q and k (backward: their gradients, the other way) into given tensors, outside autograd.

    Shapes as in `rope`, any strides with the last 1. The outputs may be q and k themselves.

    Raises:
        ValueError: shapes that do not fit, or outputs that cannot be written.
        ConfigError: float64; BackendUnavailableError: off the GPU.
    """
    shapes = _Shapes.of(q, k, cos, sin, unsqueeze_dim)
    _runtime.require_device(q, k, cos, sin, q_out, k_out)
    if q_out.shape != q.shape or k_out.shape != k.shape or not (_runtime.has_rows(q_out) and _runtime.has_rows(k_out)):
        raise ValueError(f"rope: results {tuple(q_out.shape)}, {tuple(k_out.shape)} cannot be written")
    if not shapes.tokens:
        return
    q, k = _last_contiguous(q), _last_contiguous(k)
    cos, sin, cos_b, cos_s = _tables(cos, sin, shapes)
    launch = launch_for(shapes.tokens, shapes.q_heads, shapes.k_heads, shapes.head_dim, shapes.rotary_dim)
    # With fp32 tables (OLMo 2) eager adds unrounded products, but its backward rounds each to q's dtype.
    rounds = q.dtype != torch.float32 and (backward or q.dtype == cos.dtype)
    with _runtime.on_device(q):
        (rope_backward if backward else rope_forward)[(launch.programs,)](
            q, *shapes.strides(q), k, *shapes.strides(k), q_out, *shapes.strides(q_out), k_out, *shapes.strides(k_out),
            cos, sin, cos_b, cos_s, shapes.seq,
            shapes.q_heads, shapes.k_heads, shapes.head_dim, shapes.rotary_dim, rounds,
            launch.block_q, launch.block_k, launch.block_half, launch.block_rest, num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int
    ) -> Any:
        shapes = _Shapes.of(q, k, cos, sin, unsqueeze_dim)
        ctx.save_for_backward(cos, sin)
        ctx.shapes, ctx.unsqueeze_dim = shapes, unsqueeze_dim
        q_out, k_out = shapes.empty(q, shapes.q_heads), shapes.empty(k, shapes.k_heads)
        rotate_into(q, k, cos, sin, q_out, k_out, unsqueeze_dim=unsqueeze_dim)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        shapes = ctx.shapes
        q_grad, k_grad = shapes.empty(dq, shapes.q_heads), shapes.empty(dk, shapes.k_heads)
        rotate_into(dq, dk, cos, sin, q_grad, k_grad, unsqueeze_dim=ctx.unsqueeze_dim, backward=True)
        return q_grad, k_grad, None, None, None


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k as transformers' `apply_rotary_pos_emb` (halves, not pairs), partial rotary included.

    `q`: (batch, q_heads, seq, head_dim), `k`: (batch, k_heads, seq, head_dim), one dtype, any strides with the last 1;
    with `unsqueeze_dim=2` (batch, seq, heads, head_dim). `cos`, `sin`: (batch or 1, seq, R), R <= head_dim, any float
    dtype: fp32 ones are multiplied in fp32 and the result rounded once. Dimensions from R on pass through.
    Returns tensors of the same shapes and of q's dtype, laid out (batch, seq, heads, head_dim) in memory.

    Raises ValueError for shapes that do not fit; BackendUnavailableError off GPU.
    """
    _Shapes.of(q, k, cos, sin, unsqueeze_dim)
    _runtime.require_device(q, k, cos, sin)
    return _Rope.apply(q, k, cos, sin, unsqueeze_dim)


def rope_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers computes, in torch: same arguments and results as `rope`."""
    rotary_dim = _Shapes.of(q, k, cos, sin, unsqueeze_dim).rotary_dim
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        x1, x2 = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-x2, x1), dim=-1) * sin
        return torch.cat((turned.to(x.dtype), rest), dim=-1)

    return rotate(q), rotate(k)


def _check_norm(q: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, convention: str) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(unknown("RMSNorm convention", convention, CONVENTIONS))
    for name, weight in (("q", q_weight), ("k", k_weight)):
        if weight.shape != q.shape[-1:]:
            raise ValueError(f"qk_norm_rope: {name}'s weight has shape {tuple(weight.shape)}, its heads {q.shape[-1]}")
    if q_weight.dtype != k_weight.dtype:
        raise ValueError(f"qk_norm_rope: q's weight is {q_weight.dtype}, k's {k_weight.dtype}")


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor,
        cos: torch.Tensor, sin: torch.Tensor, eps: float, convention: str, unsqueeze_dim: int,
    ) -> Any:  # fmt: skip
        shapes = _Shapes.of(q, k, cos, sin, unsqueeze_dim)
        cast_first, offset = CONVENTIONS[convention]
        q, k = _last_contiguous(q), _last_contiguous(k)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.shapes, ctx.eps, ctx.offset = shapes, eps, offset
        q_out, k_out = shapes.empty(q, shapes.q_heads), shapes.empty(k, shapes.k_heads)
        if shapes.tokens:
            launch = launch_for(shapes.tokens, shapes.q_heads, shapes.k_heads, shapes.head_dim, shapes.rotary_dim)
            cos, sin, cos_b, cos_s = _tables(cos, sin, shapes)
            normed = torch.promote_types(q.dtype, q_weight.dtype) if cast_first else q.dtype
            with _runtime.on_device(q):
                qk_norm_rope_forward[(launch.programs,)](
                    q, *shapes.strides(q), k, *shapes.strides(k), q_out, *shapes.strides(q_out),
                    k_out, *shapes.strides(k_out), q_weight, k_weight, cos, sin, cos_b, cos_s, shapes.seq,
                    shapes.q_heads, shapes.k_heads, shapes.head_dim, shapes.rotary_dim,
                    normed == cos.dtype and normed != torch.float32, eps, cast_first, offset, normed == q.dtype,
                    launch.block_q, launch.block_k, launch.block_half, launch.block_rest, num_warps=launch.num_warps,
                    enable_fp_fusion=False,
                )  # fmt: skip
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        shapes: _Shapes = ctx.shapes
        need_q, need_k = ctx.needs_input_grad[2:4]
        q_grad, k_grad = shapes.empty(q, shapes.q_heads), shapes.empty(k, shapes.k_heads)
        dw = torch.zeros(2 * shapes.head_dim, dtype=q_weight.dtype, device=q.device) if need_q or need_k else None
        if shapes.tokens:
            dq, dk = _last_contiguous(dq), _last_contiguous(dk)
            cos, sin, cos_b, cos_s = _tables(cos, sin, shapes)
            launch = launch_for(
                shapes.tokens, shapes.q_heads, shapes.k_heads, shapes.head_dim, shapes.rotary_dim,
                sms=None if dw is None else _runtime.num_sms(q),
            )  # fmt: skip
            partials = q_weight
            if dw is not None:
                partials = torch.empty(launch.programs, dw.numel(), dtype=torch.float32, device=q.device)
            with _runtime.on_device(q):
                qk_norm_rope_backward[(launch.programs,)](
                    dq, *shapes.strides(dq), dk, *shapes.strides(dk), q, *shapes.strides(q), k, *shapes.strides(k),
                    q_grad, *shapes.strides(q_grad), k_grad, *shapes.strides(k_grad),
                    q_weight, k_weight, cos, sin, cos_b, cos_s, partials, shapes.tokens, shapes.seq,
                    shapes.q_heads, shapes.k_heads, shapes.head_dim, shapes.rotary_dim,
                    ctx.eps, ctx.offset, dw is not None,
                    launch.block_q, launch.block_k, launch.block_half, launch.block_rest, num_warps=launch.num_warps,
                )  # fmt: skip
                dw = None if dw is None else sum_partials(partials, dw.dtype)
        dw_q, dw_k = (None, None) if dw is None else dw.chunk(2)
        return q_grad, k_grad, dw_q if need_q else None, dw_k if need_k else None, *(None,) * 5


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    convention: str = "llama",
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of every head of q and k over head_dim, then `rope`; shapes and strides as there.

    `q_weight`, `k_weight`: (head_dim,), of one dtype; `eps` and `convention` as in `rms_norm`. Weights that need no
    gradient get none computed. The norm's input is all that is saved.

    Raises ValueError for shapes that do not fit or an unknown convention; BackendUnavailableError off GPU.
    """
    _Shapes.of(q, k, cos, sin, unsqueeze_dim)
    _check_norm(q, q_weight, k_weight, convention)
    _runtime.require_device(q, k, q_weight, k_weight, cos, sin)
    weights = q_weight.contiguous(), k_weight.contiguous()
    return _QKNormRope.apply(q, k, *weights, cos, sin, float(eps), convention, unsqueeze_dim)


def qk_norm_rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    convention: str = "llama",
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers computes, in torch: same arguments and results as `qk_norm_rope`."""
    _check_norm(q, q_weight, k_weight, convention)
    q_normed = rms_norm_reference(q, q_weight, eps=eps, convention=convention)
    k_normed = rms_norm_reference(k, k_weight, eps=eps, convention=convention)
    q_out, k_out = rope_reference(q_normed, k_normed, cos, sin, unsqueeze_dim=unsqueeze_dim)
    return q_out.to(q.dtype), k_out.to(k.dtype)
