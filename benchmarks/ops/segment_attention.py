"""Attention over segments end to end: forward, and with backward, beside the launches of torch that rows go through.

    python -m benchmarks.ops.segment_attention [--json FILE] [--sweep]

The other method is FlashAttention's variable-length launch, with the keys of a shared prompt copied for each row, as
padding-free batches call it; of rows of one length it is cuDNN's dense one. The bound is the products of visible pairs
at the speed of a large bf16 GEMM, or the bytes at the copy's: whichever takes longer. `--sweep` times tiles of each
direction, the others as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

from aligntune.backends.fast.ops.attention import attention, attention_reference
from aligntune.backends.fast.ops.segment_attention import (
    SharedPrompts,
    TileLaunch,
    attend_in_tiles,
    launch_for,
    segment_attention,
)
from benchmarks.ops._rows import Row, in_turn, main, measure
from benchmarks.ops.bench import ROTATE_OVER_BYTES, graph_ms

LLAMA_1B, QWEN_4B = (32, 8, 64), (32, 8, 128)


@dataclass(frozen=True)
class Case:
    """Segments of these lengths; the first `prompts` are each gone on from by `each` of the others, in turn."""

    shape: str
    lengths: tuple[int, ...]
    heads: tuple[int, int, int] = LLAMA_1B
    prompts: int = 0
    each: int = 0

    @property
    def group(self) -> list[int]:
        return [0] * self.prompts + [n // self.each for n in range(len(self.lengths) - self.prompts) if self.each]

    @property
    def before(self) -> list[int]:
        own = [self.lengths[group] for group in self.group[self.prompts :]]
        return [0] * self.prompts + own if self.prompts else [0] * len(self.lengths)

    @property
    def equal(self) -> bool:
        return not self.prompts and len(set(self.lengths)) == 1

    def flops(self) -> tuple[float, float]:
        """Of products, forward and backward, the backward's scores made again once."""
        pairs = sum(n * (n + 1) / 2 + n * m for n, m in zip(self.lengths, self.before, strict=True))
        return 4 * pairs * self.heads[0] * self.heads[2], 10 * pairs * self.heads[0] * self.heads[2]

    def moved(self) -> tuple[float, float]:
        """Bytes of q, k, v and out; of these, their gradients, and lse."""
        q_heads, k_heads, head_dim = self.heads
        tokens = sum(self.lengths)
        once = 2 * tokens * (2 * q_heads + 2 * k_heads) * head_dim + 4 * tokens * q_heads
        return once, 2 * once

    def options(self, device: str) -> dict[str, Any]:
        """What `segment_attention` is told."""
        def numbers(x: Any) -> torch.Tensor:
            return torch.tensor(x, dtype=torch.int32, device=device)

        shared = None
        if self.prompts:
            users = [range(self.prompts + p * self.each, self.prompts + (p + 1) * self.each)
                     for p in range(self.prompts)]
            shared = SharedPrompts(numbers(self.before), numbers(self.group), numbers([list(one) for one in users]))
        return {"cu_seqlens": numbers((0, *self.lengths)).cumsum(0).to(torch.int32), "shared": shared,
                "max_seqlen": max(self.lengths), "scale": self.heads[2] ** -0.5}  # fmt: skip


def seeded(count: int, draw: Callable[[random.Random], float], longest: int) -> tuple[int, ...]:
    generator = random.Random(0)
    return tuple(max(1, min(longest, round(draw(generator)))) for _ in range(count))


def documents(tokens: int) -> tuple[int, ...]:
    """Log-normal lengths until they fill `tokens`."""
    lengths: list[int] = []
    for length in seeded(tokens, lambda g: g.lognormvariate(5.8, 1.0), 2048):
        lengths.append(min(length, tokens - sum(lengths)))
        if sum(lengths) == tokens:
            break
    return tuple(lengths)


NEAR_265 = seeded(16, lambda g: g.gauss(265, 40), 2048)
RAGGED = (*seeded(15, lambda g: g.lognormvariate(5.3, 0.9), 2048), 2048)
LONG_ROWS = (8192, 3000, 1200, 4100)
PAIRS = (*(90,) * 8, *(175,) * 16)
GROUPS = (*(100,) * 8, *(256,) * 64)

CASES = (
    Case("16 rows of ~265", NEAR_265),
    Case("16 ragged rows, at most 2,048", RAGGED),
    Case("8,192 tokens of documents", documents(8192)),
    Case("8 pairs, 90 + 175 + 175", PAIRS, prompts=8, each=2),
    Case("8 prompts of 100, 8 x 256 each", GROUPS, prompts=8, each=8),
    Case("1 prompt of 100, 8 x 256", (100, *(256,) * 8), prompts=1, each=8),
    Case("4 rows of 2,048", (2048,) * 4),
    Case("4 ragged rows, at most 8,192", LONG_ROWS),
    Case("1 row of 16,384 beside short ones", (16384, 100, 60)),
    Case("16 rows of ~265, Qwen3 4B", NEAR_265, QWEN_4B),
    Case("16 ragged rows, at most 2,048, Qwen3 4B", RAGGED, QWEN_4B),
    Case("4 ragged rows, at most 8,192, Qwen3 4B", LONG_ROWS, QWEN_4B),
    Case("8 prompts of 100, 8 x 256 each, Qwen3 4B", GROUPS, QWEN_4B, prompts=8, each=8),
)


def inputs(case: Case, device: str) -> tuple[torch.Tensor, ...]:
    """q, k, v as views of projections' outputs, and the gradient of the result."""
    q_heads, k_heads, head_dim = case.heads
    made = [torch.randn(1, sum(case.lengths), n, head_dim, device=device).to(torch.bfloat16)
            for n in (q_heads, k_heads, k_heads, q_heads)]
    return *(x.transpose(1, 2).requires_grad_() for x in made[:3]), made[3]


def methods(case: Case, device: str) -> dict[str, Callable[..., torch.Tensor]]:
    """Functions of q, k and v."""
    options = case.options(device)
    longest, scale = options["max_seqlen"], options["scale"]
    ours = functools.partial(segment_attention, **options)
    if case.equal:
        return {"ours": ours, "cuDNN": functools.partial(attention, **options)}
    if device == "cpu":  # FlashAttention is the GPU's
        return {"ours": ours, "in torch": functools.partial(attention_reference, **options)}
    starts = [0, *itertools.accumulate(case.lengths)]
    keys, ends = [], [0]
    for start, length, before, group in zip(starts, case.lengths, case.before, case.group or case.before, strict=False):
        keys += [*range(starts[group], starts[group] + before), *range(start, start + length)]
        ends.append(len(keys))
    index = torch.tensor(keys, device=device)
    key_ends = torch.tensor(ends, dtype=torch.int32, device=device)
    most = max(after - before for before, after in itertools.pairwise(ends))

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if case.prompts:
            k, v = (x.index_select(2, index) for x in (k, v))
        rows = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
        out = varlen_attn(*rows, options["cu_seqlens"], key_ends, longest, most, scale=scale, window_size=(-1, 0))
        return out.unsqueeze(0)  # type: ignore[no-any-return]

    return {"ours": ours, "flash varlen, copies" if case.prompts else "flash varlen": flash}


def with_backward(
    fn: Callable[..., torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    out = fn(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), dout)


def forward(fn: Callable[..., torch.Tensor], q: Any, k: Any, v: Any, dout: Any) -> torch.Tensor:
    return fn(q, k, v)


def rows_of(
    case: Case, calls: dict[str, Callable[..., torch.Tensor]], rates: tuple[float, float],
    passes: tuple[str, ...] = ("forward", "forward and backward"),
) -> list[Row]:
    """A row a call and pass; `rates` are bytes and flops a second."""
    held = sum(case.moved())
    sets = [inputs(case, "cuda") for _ in range(max(2, -(-ROTATE_OVER_BYTES // int(held))))]
    rows = []
    for name, count in (("forward", 1), ("forward and backward", 2)):
        if name not in passes:
            continue
        moved, flops = (sum(x[:count]) for x in (case.moved(), case.flops()))
        bound = 1e3 * max(moved / rates[0], flops / rates[1])
        step = forward if count == 1 else with_backward
        steps = in_turn({key: functools.partial(step, fn) for key, fn in calls.items()}, sets)
        rows += measure(steps, bound_ms=bound, clear=lambda: None, op=name, shape=case.shape)
    return rows


# Rows, keys, warps, stages.
SWEEP = {
    64: {
        "forward": ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 4)),
        "dq": ((64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 4), (32, 32, 4, 3)),
        "dkv": ((64, 64, 4, 2), (128, 32, 4, 2), (128, 64, 4, 1), (128, 64, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2)),
    },
    128: {
        "forward": ((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 4)),
        "dq": ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3), (32, 32, 4, 3)),
        "dkv": ((32, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 1), (64, 64, 8, 2), (64, 128, 8, 2)),
    },
}  # fmt: skip


def variants(case: Case) -> Iterator[tuple[str, str, Any]]:
    """(name, pass that shows it, launches): one direction's tiles, then how programs find theirs."""
    q_heads, k_heads, head_dim = case.heads
    chosen = launch_for(head_dim, q_heads // k_heads, 2)
    for direction, tiles in SWEEP[head_dim].items():
        for tile in tiles:
            launches = dataclasses.replace(chosen, **{direction: TileLaunch(*tile)})
            yield f"{direction} {tile}", "forward" if direction == "forward" else "forward and backward", launches
    for compact in (False, True):
        yield f"compact {compact}", "forward and backward", dataclasses.replace(chosen, compact=compact)


def make_rows(bandwidth: float, sweep: bool) -> list[Row]:
    m, n = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(m)
    rates = bandwidth, 2 * 8192**3 / graph_ms([lambda: torch.mm(m, n, out=out)]) * 1e3
    if not sweep:
        return [row for case in CASES for row in rows_of(case, methods(case, "cuda"), rates)]
    rows = []
    for case in CASES:
        options = case.options("cuda")
        for name, shown, launches in variants(case):
            rows += rows_of(case, {name: functools.partial(attend_in_tiles, launches, **options)}, rates, (shown,))
    return rows


if __name__ == "__main__":
    main(__doc__, make_rows)
