"""What the op benchmarks share: rows of one op, printed and written as JSON beside the card's measured ceilings."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops.__main__ import commit, versions
from benchmarks.ops.bench import copy_bandwidth, graph_ms
from benchmarks.ops.head import peak_gib

Row = dict[str, Any]
Method = Callable[[], Any]


def measure(
    methods: dict[str, Method | list[Method]], *, bound_ms: float, clear: Method, calls: int = 1, **common: Any
) -> list[Row]:
    """A row a method: GPU milliseconds of a captured call, the bound's share, GiB allocated above what was there.

    A list of callables does the same work on different memory. `calls` of them, in turn, make the graph: enough for a
    small op to be longer than its events, and to find nothing of the last round in L2.
    """
    rows = []
    for name, method in methods.items():
        steps = method if isinstance(method, list) else [method]
        try:
            ms = graph_ms((steps * calls)[: max(calls, len(steps))])
            clear()
            gib = peak_gib(steps[0], clear)
        except torch.OutOfMemoryError:
            rows.append({**common, "method": name, "failed": "out of memory"})
            continue
        clear()
        rows.append({**common, "method": name, "ms": ms, "of_bound": bound_ms / ms, "peak_gib": gib})
    return rows


def in_turn(calls: Mapping[str, Callable[..., Any]], sets: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """The methods of `measure`: each call on every set of arguments."""
    return {name: [functools.partial(call, *one) for one in sets] for name, call in calls.items()}


def main(description: str | None, make_rows: Callable[[float, bool], list[Row]]) -> None:
    """Parse the arguments, run `make_rows(bytes per second, sweep)`, print its rows and write them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time every launch that the table could hold")
    parser.add_argument("--json", type=Path, help="write versions, card, commit, command, ceiling and rows here")
    parser.add_argument("--commit", help="the commit, where this tree is not a checkout")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1" or not torch.cuda.is_available():
        sys.exit("a benchmark needs an NVIDIA GPU, and TRITON_INTERPRET unset")
    bandwidth = copy_bandwidth()
    rows = make_rows(bandwidth, args.sweep)
    for row in rows:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    if args.json:
        report = {
            "command": " ".join((f"python -m {sys.modules['__main__'].__spec__.name}", *sys.argv[1:])),  # type: ignore[union-attr]
            "commit": args.commit or commit(),
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
            "copy_bytes_per_s": bandwidth,
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
