"""RoPE on q and k, and with the norm of each head before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from aligntune.backends.fast.ops.rope import qk_norm_rope, qk_norm_rope_reference, rope, rope_reference
from benchmarks.ops.bench import Draw, Row, Shape, Tensors

EPS = 1e-6


def inputs(shape: Shape, draw: Draw, *, norm: bool, trained: bool) -> Tensors:
    """q and k as projections give them, then the norm's weights, cos and sin."""
    batch, seq, dim = shape["batch"], shape["seq"], shape["head_dim"]
    q, k = (
        draw(batch, seq, shape[heads], dim, grad=False).transpose(1, 2).requires_grad_()
        for heads in ("q_heads", "k_heads")
    )
    weights = tuple(draw(dim, grad=trained) for _ in range(2)) if norm else ()
    half = draw(1, seq, dim // 2, grad=False, dtype=torch.float32) * 3
    angles = torch.cat((half, half), dim=-1)
    return (q, k, *weights, angles.cos().to(draw.dtype), angles.sin().to(draw.dtype))


def moved(shape: Shape, itemsize: int, *, norm: bool) -> tuple[float, float]:
    tokens = shape["batch"] * shape["seq"]
    once = itemsize * tokens * (shape["q_heads"] + shape["k_heads"]) * shape["head_dim"]
    tables = 2 * itemsize * shape["seq"] * shape["head_dim"]
    return 2 * once + tables, (3 if norm else 2) * once + tables


def liger() -> Callable[..., Any]:
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply


def row(kind: str, q_heads: int, k_heads: int, head_dim: int, *, norm: bool = False, trained: bool = False) -> Row:
    ours, eager = (qk_norm_rope, qk_norm_rope_reference) if norm else (rope, rope_reference)
    options = {"eps": EPS} if norm else {}
    return Row(
        name=f"{kind} {q_heads}+{k_heads} x {head_dim}",
        shape={"batch": 4, "seq": 2048, "q_heads": q_heads, "k_heads": k_heads, "head_dim": head_dim},
        toy={"batch": 2, "seq": 3, "q_heads": 4, "k_heads": 2, "head_dim": 16},
        inputs=partial(inputs, norm=norm, trained=trained),
        eager=partial(eager, **options),
        ours=partial(ours, **options),
        moved=partial(moved, norm=norm),
        peers={} if norm else {"liger": liger},
    )


ROWS = [
    row("rope", 32, 8, 64),
    row("rope", 32, 8, 128),
    row("qk_norm_rope frozen", 32, 8, 128, norm=True),
    row("qk_norm_rope trained", 32, 8, 128, norm=True, trained=True),
]
