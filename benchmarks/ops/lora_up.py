"""dS and dB of a LoRA layer from one reading of the gradient of its output, beside two matrix products.

    python -m benchmarks.ops.lora_up [--json FILE] [--sweep]

The bound is the bytes of dout, B, S, dS and dB, once, at the speed of a copy. Parts of S and dS lie side by side, as
those of a group of layers do. `--sweep` times tiles.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from aligntune.backends.fast.ops._runtime import cdiv, num_sms
from aligntune.backends.fast.ops.lora_up import UpLaunch, launch_for, lora_up_grads
from benchmarks.ops._rows import Row, in_turn, main, measure
from benchmarks.ops.bench import ROTATE_OVER_BYTES

# Tokens, width, rank: layers of a Llama 1B (q and o, k and v, gate and up) and of a Qwen3 4B (q, k and v, o and down,
# gate and up).
CASES = ((8192, 2048, 16), (8192, 512, 16), (8192, 8192, 16), (4096, 2048, 16), (4096, 8192, 16), (8192, 8192, 32),
         (8192, 2048, 32), (8192, 8192, 64), (8192, 4096, 16), (8192, 1024, 16), (8192, 2560, 16),
         (8192, 9728, 16), (2048, 512, 16), (1024, 2048, 16), (512, 8192, 16))  # fmt: skip
TILES = ((64, 256, 4, 3), (64, 256, 4, 2), (64, 256, 8, 3), (64, 512, 8, 2), (64, 128, 4, 3), (128, 256, 8, 2),
         (128, 128, 4, 3))  # fmt: skip


def inputs(tokens: int, width: int, rank: int, device: str = "cuda") -> tuple[torch.Tensor, ...]:
    """dout, B, S and where dS goes."""
    dout, up, s, ds = (torch.randn(shape, device=device).to(torch.bfloat16)
                       for shape in ((tokens, width), (width, rank), (tokens, 3 * rank), (tokens, 3 * rank)))
    return dout, up, s[:, rank : 2 * rank], ds[:, rank : 2 * rank]


def ours(
    launch: UpLaunch | None, dout: torch.Tensor, up: torch.Tensor, s: torch.Tensor, ds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return lora_up_grads(dout, up, s, scaling=2.0, ds=ds, launch=launch)


def two_products(
    dout: torch.Tensor, up: torch.Tensor, s: torch.Tensor, ds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    ds.addmm_(dout, up, beta=0, alpha=2.0)
    if dout.is_cuda:
        return ds, torch.mm(dout.t(), s, out_dtype=torch.float32).mul_(2.0)
    return ds, torch.mm(dout.t().float(), s.float()).mul_(2.0)


def launches(tokens: int, width: int, rank: int, sms: int) -> Iterator[tuple[str, UpLaunch]]:
    """Tiles, and one, two and four programs an SM."""
    chosen = launch_for(tokens, width, rank, sms)
    for rows, columns, warps, stages in TILES:
        for each in (1, 2, 4):
            runs = max(1, min(cdiv(tokens, rows), cdiv(each * sms, cdiv(width, columns))))
            launch = dataclasses.replace(chosen, rows=rows, columns=columns, runs=runs, num_warps=warps, stages=stages)
            yield f"{rows} x {columns}, {warps} warps, {stages} stages, {each} an SM", launch


def make_rows(bandwidth: float, sweep: bool) -> list[Row]:
    rows = []
    for tokens, width, rank in CASES:
        moved = 2 * (tokens * width + width * rank + 2 * tokens * rank) + 4 * width * rank
        sets = [inputs(tokens, width, rank) for _ in range(max(2, cdiv(ROTATE_OVER_BYTES, moved)))]
        calls: dict[str, Callable[..., Any]] = {"ours": functools.partial(ours, None), "two products": two_products}
        if sweep:
            calls = {name: functools.partial(ours, launch)
                     for name, launch in launches(tokens, width, rank, num_sms(sets[0][0]))}
        rows += measure(in_turn(calls, sets), bound_ms=1e3 * moved / bandwidth, clear=lambda: None,
                        shape=f"{tokens} x {width}, rank {rank}")
    return rows


if __name__ == "__main__":
    main(__doc__, make_rows)
