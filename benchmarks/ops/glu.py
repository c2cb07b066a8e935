"""SwiGLU and GEGLU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from aligntune.backends.fast.ops.glu import glu, glu_reference
from benchmarks.ops.bench import Draw, Row, Shape, Tensors


def inputs(shape: Shape, draw: Draw) -> Tensors:
    return draw(shape["tokens"], shape["ffn"]), draw(shape["tokens"], shape["ffn"])


def moved(shape: Shape, itemsize: int) -> tuple[float, float]:
    once = itemsize * shape["tokens"] * shape["ffn"]
    return 3 * once, 5 * once


def liger(activation: str) -> Callable[..., Any]:
    """liger's function; its backward writes over gate and up."""
    if activation == "silu":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply


def row(tokens: int, ffn: int, activation: str) -> Row:
    return Row(
        name=f"glu {activation} {ffn}",
        shape={"tokens": tokens, "ffn": ffn},
        toy={"tokens": 3, "ffn": 96},
        inputs=inputs,
        eager=partial(glu_reference, activation=activation),
        ours=partial(glu, activation=activation),
        moved=moved,
        peers={} if activation == "gelu" else {"liger": partial(liger, activation)},
    )


ROWS = [
    *(row(8192, ffn, "silu") for ffn in (8192, 9728, 14336)),
    row(8192, 10240, "gelu_tanh"),
    row(8192, 8192, "gelu"),
]
