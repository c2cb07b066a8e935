"""NF4 dequantisation to bf16: time and share of the bound, 2.52 bytes a weight at the card's copy bandwidth.

    python -m benchmarks.ops.nf4 [--sweep] [--json FILE]

Rows: eager, torch.compile, bitsandbytes, ours, for the weights of an 8B model. `--sweep` times other launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from aligntune.backends.fast.ops import nf4
from aligntune.backends.fast.ops.nf4 import NF4Weight, dequantize_nf4, dequantize_nf4_reference
from benchmarks.ops._rows import Method, Row, main, measure
from benchmarks.ops.bench import ROTATE_OVER_BYTES

DEVICE = "cuda"
SHAPES = [(1024, 4096), (4096, 4096), (14336, 4096)]


def weight_bytes(weight: NF4Weight) -> int:
    """Bytes that must move: the packed weight and its scales read, the bf16 weight written."""
    parts = (weight.packed, weight.absmax, weight.nested_absmax)
    return 2 * weight.numel + sum(part.nbytes for part in parts if part is not None)


def rows_of(shape: tuple[int, int], bandwidth: float, sweep: bool) -> list[Row]:
    import bitsandbytes

    sets = []
    for _ in range(max(2, -(-ROTATE_OVER_BYTES // (2 * shape[0] * shape[1])))):
        packed, state = bitsandbytes.functional.quantize_4bit(
            torch.randn(shape, device=DEVICE, dtype=torch.bfloat16), quant_type="nf4", compress_statistics=True
        )
        weight = NF4Weight.from_param(SimpleNamespace(data=packed, quant_state=state))
        sets.append((weight, torch.empty(shape, device=DEVICE, dtype=torch.bfloat16), packed, state))
    compiled = torch.compile(dequantize_nf4_reference)

    def each(call: Callable[..., Any]) -> list[Method]:
        return [functools.partial(call, *one) for one in sets]

    methods: dict[str, Method | list[Method]] = {
        "ours": each(lambda weight, out, packed, state: dequantize_nf4(weight, out=out))
    }
    if sweep:
        for units, warps in [(128, 4), (256, 4), (512, 4), (256, 8), (512, 8), (1024, 8), (512, 16)]:
            launch = nf4.Launch(units, warps)
            methods[f"ours, {units} units, {warps} warps"] = each(
                lambda weight, out, packed, state, launch=launch: _with(launch, weight, out)
            )
    else:
        methods |= {
            "eager": each(lambda weight, out, packed, state: dequantize_nf4_reference(weight, out=out)),
            "torch.compile": each(lambda weight, out, packed, state: compiled(weight, out=out)),
            "bitsandbytes": each(
                lambda weight, out, packed, state: bitsandbytes.functional.dequantize_4bit(packed, state, out=out)
            ),
        }
    bound = weight_bytes(sets[0][0]) / bandwidth * 1e3
    return measure(methods, bound_ms=bound, clear=lambda: None, op="nf4", shape=shape)


def _with(launch: nf4.Launch, weight: NF4Weight, out: torch.Tensor) -> None:
    kept, nf4.LAUNCH = nf4.LAUNCH, launch
    dequantize_nf4(weight, out=out)
    nf4.LAUNCH = kept


def make_rows(bandwidth: float, sweep: bool) -> list[Row]:
    return [row for shape in SHAPES for row in rows_of(shape, bandwidth, sweep)]


if __name__ == "__main__":
    main(__doc__, make_rows)
