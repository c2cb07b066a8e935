"""A decode step's ops: a group of adapted layers, attention over the paged cache, drawing a token.

    python -m benchmarks.ops.decode [--json FILE]

Rows are those of a Llama 1B's step at several batch sizes; the bound is the bytes that must move, at the card's copy
bandwidth: the weights and factors read once, the cache of every row read once, the logits read once. `products apart`
is what adapted layers cost with one launch a product, as cuBLAS runs them, weights of fp32 and of NF4 cast and unpacked
before theirs; `unpacked` is the kernel over an unpacked copy. `eager` of attention gathers the pages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from aligntune.backends.fast.ops import decode_linear as linear
from aligntune.backends.fast.ops import decode_linear_nf4 as packed
from aligntune.backends.fast.ops.decode_attention import decode_attention, decode_attention_reference
from aligntune.backends.fast.ops.nf4 import NF4Weight, dequantize_nf4
from aligntune.backends.fast.ops.sample import FIELDS, Outputs, sample_step
from benchmarks.ops._rows import Row, in_turn, main, measure
from benchmarks.ops.bench import ROTATE_OVER_BYTES

DTYPE = torch.bfloat16
RANK = 16
HEADS, KEY_HEADS, HEAD_DIM, PAGE = 32, 8, 64, 16
VOCAB = 128_256
ROOM = 4096
GROUPS = {"q, k, v": (2048, (2048, 512, 512)), "o": (2048, (2048,)), "gate, up": (2048, (8192, 8192)),
          "down": (8192, (2048,))}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An op at one shape: `arguments` draws one set of a call's inputs, `methods` take them, `moved` counts bytes."""

    op: str
    shape: str
    moved: float
    arguments: Callable[[str], tuple[Any, ...]]
    methods: Mapping[str, Callable[..., Any]]


BYTES = {"bf16": 2.0, "fp32": 4.0, "nf4": 1 / 2 + 1 / 64 + 4 / 16384}
"""Of a weight; NF4's with its scales, in blocks of 64 and these in blocks of 256."""


def in_nf4(weight: torch.Tensor) -> NF4Weight:
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return NF4Weight.from_param(SimpleNamespace(data=codes, quant_state=state))


def linear_case(group: str, rows: int, inner: int, widths: Sequence[int], base: str = "bf16") -> Case:
    """The layers of a group under adapters of rank 16 on (rows, inner); `base` is one of BYTES."""
    layers = len(widths)

    def arguments(device: str) -> tuple[Any, ...]:
        draw = functools.partial(torch.randn, device=device)
        up = draw(sum(widths), RANK) * 0.1
        diagonal = torch.zeros(sum(widths), layers * RANK, device=device)
        column = 0
        for number, width in enumerate(widths):
            diagonal[column : column + width, number * RANK : (number + 1) * RANK] = up[column : column + width]
            column += width
        made = (draw(rows, inner), draw(layers * RANK, inner) * inner**-0.5, up, diagonal)
        weights: list[Any] = [draw(width, inner) * inner**-0.5 for width in widths]
        if base != "fp32":
            weights = [weight.to(DTYPE) for weight in weights]
        if base == "nf4":
            weights = [in_nf4(weight) for weight in weights]
        return (*(x.to(DTYPE) for x in made), weights,
                torch.zeros(linear.MAX_PLACES, dtype=torch.int32, device=device))  # fmt: skip

    kernel, reference = (linear.decode_linear, linear.decode_linear_reference) if base != "nf4" else (
        packed.decode_linear_nf4, packed.decode_linear_nf4_reference)

    def whole(weight: Any) -> torch.Tensor:
        return dequantize_nf4(weight, dtype=DTYPE) if base == "nf4" else weight.to(DTYPE)

    def ours(x: Any, down: Any, up: Any, diagonal: Any, weights: Any, counts: Any) -> Any:
        return kernel(x, weights, down=down, up=up, counts=counts)

    def unpacked(x: Any, down: Any, up: Any, diagonal: Any, weights: Any, counts: Any) -> Any:
        return linear.decode_linear(x, [whole(weight) for weight in weights], down=down, up=up, counts=counts)

    def apart(x: Any, down: Any, up: Any, diagonal: Any, weights: Any, counts: Any) -> Any:
        out = torch.empty((rows, sum(widths)), dtype=x.dtype, device=x.device)
        for weight, part in zip(weights, out.split(list(widths), dim=1), strict=True):
            torch.mm(x, whole(weight).t(), out=part)
        return out.addmm_(torch.mm(x, down.t()), diagonal.t())

    def eager(x: Any, down: Any, up: Any, diagonal: Any, weights: Any, counts: Any) -> Any:
        return reference(x, weights, down=down, up=up)

    numbers = rows * inner + sum(widths) * (RANK + rows) + layers * RANK * inner
    methods = {"ours": ours, **({} if base == "bf16" else {"unpacked": unpacked}), "products apart": apart,
               "eager": eager}  # fmt: skip
    name = "decode_linear" if base == "bf16" else f"decode_linear, {base}"
    moved = 2 * numbers + BYTES[base] * sum(widths) * inner
    return Case(name, f"{group}, {rows} rows", moved, arguments, methods)


def attention_case(rows: int, tokens: int) -> Case:
    """One query a row over `tokens` cached ones, pages in any order."""
    each = -(-tokens // PAGE)

    def arguments(device: str) -> tuple[Any, ...]:
        cache = [torch.randn(rows * each, KEY_HEADS, PAGE, HEAD_DIM, device=device).to(DTYPE) for _ in range(2)]
        table = torch.randperm(rows * each, device=device).to(torch.int32).view(rows, each)
        lengths = torch.full((rows,), tokens, dtype=torch.int32, device=device)
        return (torch.randn(rows, HEADS, HEAD_DIM, device=device).to(DTYPE), *cache, table, lengths)

    moved = 2 * (rows * tokens * KEY_HEADS * HEAD_DIM * 2 + 2 * rows * HEADS * HEAD_DIM)
    methods = {name: functools.partial(call, scale=HEAD_DIM**-0.5) for name, call in
               (("ours", decode_attention), ("eager", decode_attention_reference))}  # fmt: skip
    return Case("decode_attention", f"{rows} rows of {tokens:,} tokens", moved, arguments, methods)


def sample_case(rows: int, vocab: int = VOCAB) -> Case:
    """Softmax at a temperature, a draw and its log-prob, far fewer times than a row has room for.

    `eager` draws with exponential noise, as torch.multinomial does, which waits for the GPU and cannot be captured.
    """

    def arguments(device: str) -> tuple[Any, ...]:
        state = torch.zeros((rows, len(FIELDS)), dtype=torch.int32, device=device)
        for name, value in (("limit", ROOM), ("active", 1)):
            state[:, FIELDS.index(name)] = value
        state[:, FIELDS.index("row_id")] = torch.arange(rows, device=device)
        outputs = Outputs(torch.zeros((rows, ROOM), dtype=torch.int32, device=device),
                          torch.zeros((rows, ROOM), device=device))  # fmt: skip
        return (torch.randn(rows, vocab, device=device).to(DTYPE), state, outputs,
                torch.tensor(1, device=device), torch.tensor(0.8, device=device),
                torch.full((1,), -1, dtype=torch.int32, device=device))  # fmt: skip

    def ours(logits: Any, state: Any, outputs: Any, seed: Any, temperature: Any, stops: Any) -> Any:
        sample_step(logits, state, outputs, seed=seed, temperature=temperature, stops=stops, greedy=False)

    def eager(logits: Any, state: Any, outputs: Any, seed: Any, temperature: Any, stops: Any) -> Any:
        log_probs = torch.log_softmax(logits.float() / temperature, dim=1)
        token = (log_probs.exp() / torch.empty_like(log_probs).exponential_()).argmax(dim=1, keepdim=True)
        return token, log_probs.gather(1, token)

    return Case("sample", f"{rows} x {vocab:,}", 2 * rows * vocab, arguments, {"ours": ours, "eager": eager})


CASES = (
    *(linear_case(group, rows, *shape, base) for base in BYTES for rows in (8, 64) for group, shape in GROUPS.items()),
    *(attention_case(*shape) for shape in ((8, 512), (64, 512), (256, 512), (64, 4096))),
    *(sample_case(rows) for rows in (8, 64, 256)),
)


def rows_of(case: Case, bandwidth: float, device: str = "cuda") -> list[Row]:
    sets = [case.arguments(device) for _ in range(max(2, -(-ROTATE_OVER_BYTES // int(case.moved))))]
    calls = {**case.methods, "torch.compile": torch.compile(case.methods["eager"])}
    bound = case.moved / bandwidth * 1e3
    return measure(in_turn(calls, sets), bound_ms=bound, clear=lambda: None, op=case.op, shape=case.shape)


def make_rows(bandwidth: float, sweep: bool) -> list[Row]:
    if sweep:
        raise SystemExit("these ops have no sweep: decode_linear.launch_for and decode_attention.launch_for choose")
    return [row for case in CASES for row in rows_of(case, bandwidth)]


if __name__ == "__main__":
    main(__doc__, make_rows)
