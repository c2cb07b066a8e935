"""How an op is measured: GPU time of a captured graph over rotating buffers, against the card's own ceilings.

A row is one op at one shape: eager, torch.compile, ours and the peers', forward and forward with backward. Inputs,
results and gradients of every call in the graph are its own, together more than three times a 50 MB L2, so that each
call reads from memory and writes to it. Time is GPU time: launches are replayed, so Python's share is not in it.
`error` is the largest relative error of any result or gradient against the same op in fp32: a fast row with a wrong
number is a wrong row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Shape = Mapping[str, int]
Tensors = tuple[torch.Tensor, ...]
ROTATE_OVER_BYTES = 160 * 2**20


@dataclass(frozen=True)
class Draw:
    """Random tensors of a row's dtype, on its device."""

    device: str
    dtype: torch.dtype
    generator: torch.Generator

    def __call__(self, *size: int, grad: bool = True, dtype: torch.dtype | None = None) -> torch.Tensor:
        x = torch.randn(*size, device=self.device, generator=self.generator).to(dtype or self.dtype)
        return x.requires_grad_(grad)


@dataclass(frozen=True)
class Row:
    """One op at one shape.

    `inputs` draws the arguments; `eager` and `ours` take them and return a tensor or a tuple. `peers` maps a name to a
    function that imports and returns the peer's op, or raises ImportError. `moved` gives the bytes that the forward and
    the backward must move for elements of so many bytes, `flops` the floating-point operations of matrix products.
    `toy` replaces sizes for `--smoke`.
    """

    name: str
    shape: Shape
    toy: Shape
    inputs: Callable[[Shape, Draw], Tensors]
    eager: Callable[..., Any]
    ours: Callable[..., Any]
    moved: Callable[[Shape, int], tuple[float, float]]
    peers: Mapping[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    flops: Callable[[Shape], tuple[float, float]] = lambda _: (0.0, 0.0)
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Ceilings:
    """What this card does: bytes a second of a large copy (read and written), flop/s of a large bf16 product."""

    bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measure(cls) -> Ceilings:
        m, n = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(m)
        product_ms = graph_ms([lambda: torch.mm(m, n, out=out)])
        return cls(copy_bandwidth(), 2 * 8192**3 / product_ms * 1e3)

    def bound_ms(self, moved: float, flops: float) -> float:
        """The least time for so many bytes and operations, whichever takes longer."""
        return 1e3 * max(moved / self.bytes_per_s, flops / self.flops_per_s)


def graph_ms(calls: Sequence[Callable[[], Any]], *, repeats: int = 20) -> float:
    """Median GPU milliseconds of one of `calls`, all captured in one graph that is replayed; keeps every result."""
    stream, kept = torch.cuda.Stream(), []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept += [call() for call in calls]
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            stop.record(stream)
            stop.synchronize()
            times.append(start.elapsed_time(stop) / len(calls))
    del graph, kept
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 1 GiB: the best of a copy and of an elementwise kernel.

    A captured copy is a node for the copy engine, which here is a fifth slower than a kernel that only moves.
    """
    a = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(graph_ms([lambda: b.copy_(a)]), graph_ms([lambda: torch.neg(a, out=b)])) * 1e3


def clock_ms(calls: Sequence[Callable[[], Any]]) -> float:
    """Milliseconds of one call by the clock: for `--smoke` only."""
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls) * 1e3


def as_tuple(out: Any) -> Tensors:
    """The tensors of a result."""
    return (out,) if isinstance(out, torch.Tensor) else tuple(t for t in out if t is not None)


def forward_and_backward(fn: Callable[..., Any], inputs: Tensors, grads: Tensors) -> Tensors:
    """Results and gradients of the inputs that take one."""
    out = as_tuple(fn(*inputs))
    wanted = [t for t in inputs if t.requires_grad]
    return out + torch.autograd.grad(out, wanted, grads, allow_unused=True)


def truth_of(row: Row, inputs: Tensors, grads: Tensors) -> Tensors:
    """The same in fp32."""
    wide = tuple(t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs)
    return forward_and_backward(row.eager, wide, tuple(g.float() for g in grads))


def worst_error(found: Tensors, truth: Tensors) -> float:
    """The largest relative Frobenius error over all results."""
    pairs = [(a.detach().float(), b.detach()) for a, b in zip(found, truth, strict=True) if b is not None]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def implementations(row: Row, *, smoke: bool) -> Iterator[tuple[str, Callable[..., Any]]]:
    """(name, op) of what can run here; a peer that is not installed is left out."""
    yield "eager", row.eager
    if not smoke:
        torch.compiler.reset()
        yield "torch.compile", torch.compile(row.eager, fullgraph=True, dynamic=False)
    yield "ours", row.ours
    if smoke:
        return
    for name, load in row.peers.items():
        try:
            yield name, load()
        except ImportError:
            continue


def measure(row: Row, ceilings: Ceilings | None, *, device: str, smoke: bool) -> list[dict[str, Any]]:
    """One entry for each implementation of `row`; `ceilings` None leaves the bounds out."""
    shape = {**row.shape, **row.toy} if smoke else row.shape
    draw = Draw(device, row.dtype, torch.Generator(device).manual_seed(0))
    first = row.inputs(shape, draw)
    grads = tuple(torch.randn_like(t) for t in as_tuple(row.eager(*first)))
    truth = truth_of(row, first, grads)
    held = sum(t.nbytes for t in first + grads)
    copies = 2 if smoke else max(2, -(-ROTATE_OVER_BYTES // held))
    sets = [row.inputs(shape, draw) for _ in range(copies)]
    grad_sets = [tuple(torch.randn_like(g) for g in grads) for _ in range(copies)]
    timed, entries = clock_ms if smoke else graph_ms, []
    for name, fn in implementations(row, smoke=smoke):
        fresh = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in first)
        error = worst_error(forward_and_backward(fn, fresh, grads), truth)
        forward = timed([lambda fn=fn, s=s: fn(*s) for s in sets])
        pairs = list(zip(sets, grad_sets, strict=True))
        both = timed([lambda fn=fn, s=s, g=g: forward_and_backward(fn, s, g) for s, g in pairs])
        entry = {
            "row": row.name,
            "shape": dict(shape),
            "dtype": str(row.dtype).removeprefix("torch."),
            "implementation": name,
            "error": error,
            "forward_ms": forward,
            "forward_backward_ms": both,
        }
        entries.append(entry | (bounds(row, shape, ceilings, forward, both) if ceilings else {}))
    return entries


def bounds(row: Row, shape: Shape, ceilings: Ceilings, forward: float, both: float) -> dict[str, float]:
    """The written bounds, and what share of the ceiling was reached; the backward is the difference of two timings."""
    moved, flops = row.moved(shape, row.dtype.itemsize), row.flops(shape)
    forward_bound, backward_bound = (ceilings.bound_ms(b, f) for b, f in zip(moved, flops, strict=True))
    return {
        "forward_bound_ms": forward_bound,
        "backward_bound_ms": backward_bound,
        "forward_of_ceiling": forward_bound / forward,
        "backward_of_ceiling": backward_bound / (both - forward) if both > forward else float("nan"),
        "both_of_ceiling": (forward_bound + backward_bound) / both,
    }
