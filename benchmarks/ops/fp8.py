"""Rows of bf16 made e4m3 with a scale each: time and share of the bound, 3 bytes a number and 4 a row.

    python -m benchmarks.ops.fp8 [--json FILE]

Rows: eager, torch.compile, ours, for 8,192 tokens of the widths that a Llama 1B's linear layers take and give.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from aligntune.backends.fast.ops.fp8 import E4M3, quantize_rows, quantize_rows_reference
from benchmarks.ops._rows import Row, in_turn, main, measure
from benchmarks.ops.bench import ROTATE_OVER_BYTES

TOKENS = 8192
WIDTHS = (2048, 3072, 8192, 16384)


def moved(tokens: int, width: int) -> int:
    """Bytes that must move: bf16 read, e4m3 and the scales written."""
    return 3 * tokens * width + 4 * tokens


def rows_of(width: int, bandwidth: float) -> list[Row]:
    size = moved(TOKENS, width)
    sets = [(torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16),
             (torch.empty(TOKENS, width, device="cuda", dtype=E4M3), torch.empty(TOKENS, device="cuda")))
            for _ in range(max(2, -(-ROTATE_OVER_BYTES // size)))]
    calls = {"ours": quantize_rows, "eager": quantize_rows_reference,
             "torch.compile": torch.compile(quantize_rows_reference)}  # fmt: skip
    methods = in_turn({name: functools.partial(_into, call) for name, call in calls.items()}, sets)
    return measure(methods, bound_ms=size / bandwidth * 1e3, clear=lambda: None, op="quantize_rows",
                   shape=(TOKENS, width))


def _into(call: Callable[..., Any], x: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor]) -> Any:
    return call(x, out=out)


def make_rows(bandwidth: float, sweep: bool) -> list[Row]:
    if sweep:
        raise SystemExit("quantize_rows has no sweep: its launch follows from the width")
    return [row for width in WIDTHS for row in rows_of(width, bandwidth)]


if __name__ == "__main__":
    main(__doc__, make_rows)
