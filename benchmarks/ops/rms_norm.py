"""RMSNorm: frozen and trained weights, with and without the residual add."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from aligntune.backends.fast.ops.rms_norm import rms_norm, rms_norm_reference
from benchmarks.ops.bench import Draw, Row, Shape, Tensors

EPS = 1e-6


def inputs(shape: Shape, draw: Draw, *, trained: bool, residual: bool) -> Tensors:
    x, weight = draw(shape["tokens"], shape["hidden"]), draw(shape["hidden"], grad=trained)
    return (x, weight, draw(shape["tokens"], shape["hidden"])) if residual else (x, weight)


def moved(shape: Shape, itemsize: int, *, residual: bool) -> tuple[float, float]:
    once = itemsize * shape["tokens"] * shape["hidden"]
    return (4 * once, 4 * once) if residual else (2 * once, 3 * once)


def call(fn: Callable[..., Any], convention: str, x: Any, weight: Any, residual: Any = None) -> Any:
    return fn(x, weight, eps=EPS, convention=convention, residual=residual)


def liger(convention: str, *, residual: bool) -> Callable[..., Any]:
    """liger's function, told to leave incoming gradients alone, as ours does."""
    offset = 1.0 if convention == "gemma" else 0.0
    if residual:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda x, w, r: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, offset, convention, False)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, offset, convention, False)


def row(tokens: int, hidden: int, *, trained: bool, residual: bool = False, convention: str = "llama") -> Row:
    words = ["rms_norm", str(hidden), "+add" * residual, "trained" if trained else "frozen", convention]
    return Row(
        name=" ".join(word for word in words if word and word != "llama"),
        shape={"tokens": tokens, "hidden": hidden},
        toy={"tokens": 6, "hidden": 128},
        inputs=partial(inputs, trained=trained, residual=residual),
        eager=partial(call, rms_norm_reference, convention),
        ours=partial(call, rms_norm, convention),
        moved=partial(moved, residual=residual),
        peers={"liger": partial(liger, convention, residual=residual)},
    )


ROWS = [
    *(row(8192, hidden, trained=trained) for hidden in (2048, 2560, 4096, 8192) for trained in (False, True)),
    *(row(8192, hidden, trained=trained, residual=True) for hidden in (2048, 4096) for trained in (False, True)),
    row(8192, 2560, trained=False, convention="gemma"),
]
