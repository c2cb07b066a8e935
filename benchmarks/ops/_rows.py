"""What the op benchmarks share: rows of one op, printed and written as JSON beside the card's measured ceilings."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops.head import copy_bandwidth, peak_gib, time_ms

Row = dict[str, Any]
Method = Callable[[], Any]


def measure(methods: dict[str, Method], *, bound_ms: float, clear: Method, **common: Any) -> list[Row]:
    """A row a method: milliseconds, the bound's share of them, and GiB allocated above what was there."""
    rows = []
    for name, step in methods.items():
        try:
            ms, gib = time_ms(step), peak_gib(step, clear)
        except torch.OutOfMemoryError:
            rows.append({**common, "method": name, "failed": "out of memory"})
            continue
        clear()
        rows.append({**common, "method": name, "ms": ms, "of_bound": bound_ms / ms, "peak_gib": gib})
    return rows


def main(description: str | None, make_rows: Callable[[float, bool], list[Row]]) -> None:
    """Parse the arguments, run `make_rows(bytes per second, sweep)`, print its rows and write them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time every launch that the table could hold")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1" or not torch.cuda.is_available():
        sys.exit("a benchmark needs an NVIDIA GPU, and TRITON_INTERPRET unset")
    bandwidth = copy_bandwidth()
    rows: list[Row] = [
        {"op": "copy", "device": torch.cuda.get_device_name(), "torch": torch.__version__, "tb_per_s": bandwidth / 1e12}
    ]
    rows += make_rows(bandwidth, args.sweep)
    for row in rows:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
