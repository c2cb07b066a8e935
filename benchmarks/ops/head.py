"""The head and the cross-entropy on logits: time over the bare products, bandwidth of the passes, peak memory.

    python -m benchmarks.ops.head [--sweep] [--json FILE] [--site-liger DIR]

Rows: bare GEMMs (the products alone, in one piece), eager, torch.compile, ours, liger's fused linear cross-entropy
where it is installed, TRL's chunked head. Each runs forward and backward, with the hidden states and (trained) the
weight taking gradients. "over_gemms" is time / bare - 1; peak memory is what a step allocates above its inputs and the
weight; "error" is the largest relative error of dX and dW against the same loss in fp32.

`--sweep` times the pass alone for every launch the table could hold, and whole steps for several chunk sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from aligntune.backends.fast.ops import _logits_pass, head
from aligntune.backends.fast.ops._logits_pass import STATISTICS, Launch, LogitTransform, RowStatistics, run_loss
from aligntune.backends.fast.ops.cross_entropy import cross_entropy
from benchmarks.ops.__main__ import commit, versions
from benchmarks.ops.bench import copy_bandwidth

SHAPES = [(8192, 2048, 128_256), (8192, 4096, 151_936)]
GIB = 2**30


def time_ms(step: Callable[[], Any], *, warmup: int = 3, repeats: int = 10) -> float:
    """Median milliseconds of `step` on the GPU."""
    for _ in range(warmup):
        step()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def peak_gib(step: Callable[[], Any], clear: Callable[[], None]) -> float:
    """GiB that one `step` allocates above what was there before it."""
    clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


# --------------------------------------------------------------------------------------------------------- the rows


def eager_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def ours(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = head.linear_cross_entropy(x, weight, targets).loss
    assert loss is not None
    return loss


def ours_with_metrics(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = head.linear_cross_entropy(x, weight, targets, outputs=("log_probs", "entropy", "is_top1")).loss
    assert loss is not None
    return loss


def ours_log_probs(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    log_probs = head.token_log_probs(x, weight, targets, outputs=("log_probs", "entropy")).log_probs
    assert log_probs is not None
    return -log_probs.mean()


def trl_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return -ChunkedLogProbFunction.apply(x, weight, None, targets, 1.0, 32_768, None, 1.0, ("entropy",))[0].mean()


def head_methods() -> dict[str, Callable[..., torch.Tensor]]:
    methods: dict[str, Callable[..., torch.Tensor]] = {
        "eager": eager_loss,
        "torch.compile": torch.compile(eager_loss),
        "ours": ours,
        "ours, with entropy and top-1": ours_with_metrics,
        "ours, log-probs first": ours_log_probs,
        "trl chunked": trl_loss,
    }
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        methods["liger fused"] = lambda x, weight, targets: liger(weight, x, targets)
    return methods


def bare_gemms_ms(x: torch.Tensor, weight: torch.Tensor, *, trained: bool) -> float:
    """The products alone, in one piece: logits, dX, and dW where the weight trains."""
    logits = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    grad_x = torch.empty_like(x)
    grad_weight = torch.empty_like(weight) if trained else None

    def step() -> None:
        torch.mm(x, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_x)
        if grad_weight is not None:
            torch.mm(logits.t(), x, out=grad_weight)

    with torch.no_grad():
        return time_ms(step)


def head_rows(shape: tuple[int, int, int], *, trained: bool) -> list[dict[str, Any]]:
    tokens, hidden, vocab = shape
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(vocab, hidden, device="cuda", dtype=torch.bfloat16).normal_(std=0.02).requires_grad_(trained)
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    bare = bare_gemms_ms(x.detach(), weight.detach(), trained=trained)
    flops = (6 if trained else 4) * tokens * hidden * vocab
    common = {"op": "head", "tokens": tokens, "hidden": hidden, "vocab": vocab, "trained": trained}
    rows = [common | {"method": "bare GEMMs", "ms": bare, "tflops": flops / bare / 1e9}]
    wanted = [t for t in (x, weight) if t.requires_grad]
    truth = fp32_gradients(x, weight, targets)

    def clear() -> None:
        x.grad = weight.grad = None

    for name, method in head_methods().items():

        def step(method: Callable[..., torch.Tensor] = method) -> None:
            clear()
            method(x, weight, targets).backward()

        try:
            ms, gib = time_ms(step), peak_gib(step, clear)
        except torch.OutOfMemoryError:
            rows.append(common | {"method": name, "failed": "out of memory"})
            continue
        clear()
        loss = method(x, weight, targets)
        found = torch.autograd.grad(loss, wanted)
        rows.append(common | {
            "method": name, "ms": ms, "over_gemms": ms / bare - 1, "peak_gib": gib, "loss": loss.item(),
            "error": max(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)),
        })  # fmt: skip
    return rows


def fp32_gradients(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """dX, and dW where the weight trains, of the same loss in fp32."""
    wide = [t.detach().float().requires_grad_(t.requires_grad) for t in (x, weight)]
    return torch.autograd.grad(eager_loss(wide[0], wide[1], targets), [t for t in wide if t.requires_grad])


def cross_entropy_rows(tokens: int, vocab: int, bandwidth: float) -> list[dict[str, Any]]:
    """Loss and gradient on ready logits; the bound is one read and one write of them."""
    logits = torch.randn(tokens, vocab, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    bound = 2 * logits.nbytes / bandwidth * 1e3

    def eager(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), targets)

    methods: dict[str, Callable[..., torch.Tensor]] = {
        "eager": eager,
        "torch.compile": torch.compile(eager),
        "ours": cross_entropy,
    }
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        # it writes the gradient over the logits, so what it reads from the second call on is a gradient: same bytes
        methods["liger"] = LigerCrossEntropyLoss()

    def clear() -> None:
        logits.grad = None

    rows = []
    for name, method in methods.items():

        def step(method: Callable[..., torch.Tensor] = method) -> None:
            clear()
            method(logits, targets).backward()

        ms = time_ms(step)
        rows.append({
            "op": "cross_entropy", "tokens": tokens, "vocab": vocab, "method": name, "ms": ms,
            "of_bound": bound / ms, "peak_gib": peak_gib(step, clear),
        })  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------------------- sweep


def pass_rows(vocab: int, bandwidth: float, *, rows: int = 2048) -> list[dict[str, Any]]:
    """The in-place pass alone, for every launch: bytes as 4TV with a gradient, 2TV without."""
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, vocab, (rows,), device="cuda")
    one, found = torch.ones((), device="cuda"), []
    kept = _logits_pass.LIGHT, _logits_pass.HEAVY
    for outputs in ((), ("entropy", "is_top1"), STATISTICS):
        stats = RowStatistics.empty(rows, logits.device, outputs)
        for grad in (True, False):
            for launch in (Launch(block, stages) for block in (2048, 4096, 8192) for stages in (1, 2, 3, 4)):
                _logits_pass.LIGHT = _logits_pass.HEAVY = launch

                def step(stats: RowStatistics = stats, grad: bool = grad) -> None:
                    run_loss(
                        logits, targets, stats, LogitTransform(),
                        grad=logits if grad else None, scale=one if grad else None,
                    )  # fmt: skip

                ms = time_ms(step)
                bound = logits.nbytes * (2 if grad else 1) / bandwidth * 1e3
                found.append({
                    "op": "pass", "vocab": vocab, "outputs": len(outputs), "grad": grad, "block": launch.block,
                    "stages": launch.stages, "ms": ms, "of_bound": bound / ms,
                })  # fmt: skip
    _logits_pass.LIGHT, _logits_pass.HEAVY = kept
    return found


def chunk_rows(shape: tuple[int, int, int], *, trained: bool) -> list[dict[str, Any]]:
    """Whole steps for fixed chunk sizes, to check the plan against."""
    tokens, hidden, vocab = shape
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(vocab, hidden, device="cuda", dtype=torch.bfloat16).normal_(std=0.02).requires_grad_(trained)
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    planned, found = head.plan_rows, []

    def step() -> None:
        x.grad = weight.grad = None
        ours(x, weight, targets).backward()

    for size in (None, 1024, 1536, 2048, 2560, 2816, 3072, 4096):
        head.plan_rows = planned if size is None else lambda *_, size=size: size  # type: ignore[assignment]
        found.append(
            {"op": "chunks", "shape": shape, "trained": trained, "rows": size or "planned", "ms": time_ms(step)}
        )
    head.plan_rows = planned
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--site-liger", type=Path, help="a directory that holds liger_kernel")
    parser.add_argument("--commit", help="the commit, where this tree is not a checkout")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1" or not torch.cuda.is_available():
        sys.exit("a benchmark needs an NVIDIA GPU, and TRITON_INTERPRET unset")
    if args.site_liger:
        sys.path.append(str(args.site_liger))
    bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for trained in (False, True):
            rows += chunk_rows(shape, trained=trained) if args.sweep else head_rows(shape, trained=trained)
        rows += pass_rows(shape[2], bandwidth) if args.sweep else cross_entropy_rows(shape[0], shape[2], bandwidth)
    for row in rows:
        print(
            "  ".join(
                f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
            )
        )
    if args.json:
        report = {
            "command": " ".join(("python -m benchmarks.ops.head", *sys.argv[1:])),
            "commit": args.commit or commit(),
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
            "copy_bytes_per_s": bandwidth,
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
