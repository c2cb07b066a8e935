"""Measure the fast backend's ops.

python -m benchmarks.ops                                  every row
python -m benchmarks.ops rms_norm rope --json FILE        some, written to FILE
python -m benchmarks.ops --site-liger DIR                 liger from DIR, where pip's --target put it
python -m benchmarks.ops --smoke                          toy sizes, any machine; the times mean nothing
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.ops import MODULES


def commit() -> str | None:
    """The commit of this tree, "+" after it where tracked files differ; None outside a checkout."""

    def git(*command: str) -> str:
        return subprocess.run(
            ("git", *command), capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()

    head = git("rev-parse", "HEAD")
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if head else None


def versions() -> dict[str, str]:
    """Python, and the packages that a time depends on."""
    found = {"python": sys.version.split()[0]}
    for package in ("torch", "triton", "liger-kernel"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(entries: list[dict[str, Any]]) -> str:
    """Short lines: times in microseconds, shares of the ceiling in percent."""
    lines = [f"{'row':34} {'':14} {'fwd us':>9} {'f+b us':>9} {'fwd %':>6} {'bwd %':>6} {'f+b %':>6} {'error':>8}"]
    for e in entries:
        shares = " ".join(
            f"{100 * e[key]:6.1f}" if key in e else f"{'-':>6}"
            for key in ("forward_of_ceiling", "backward_of_ceiling", "both_of_ceiling")
        )
        times = f"{1e3 * e['forward_ms']:9.1f} {1e3 * e['forward_backward_ms']:9.1f}"
        lines.append(f"{e['row']:34} {e['implementation']:14} {times} {shares} {e['error']:8.1e}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(MODULES)}; all by default")
    parser.add_argument("--json", type=Path, help="write versions, card, commit, command, ceilings and rows here")
    parser.add_argument("--site-liger", type=Path, help="a directory that holds liger_kernel")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--commit", help="the commit, where this tree is not a checkout")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on any machine; writes nothing")
    args = parser.parse_args(argv)
    if strange := sorted(set(args.names) - set(MODULES)):
        parser.error(f"unknown: {', '.join(strange)}; there are {', '.join(MODULES)}")
    if args.smoke and args.json:
        parser.error("--smoke writes nothing: its times mean nothing")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
    if not gpu and not args.smoke:
        print("benchmarks need an NVIDIA GPU, and TRITON_INTERPRET unset; --smoke runs toys anywhere", file=sys.stderr)
        return 1
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before the ops import Triton
    if args.site_liger:
        sys.path.append(str(args.site_liger))
    from benchmarks.ops.bench import Ceilings, measure

    modules = [importlib.import_module(f"benchmarks.ops.{name}") for name in args.names or MODULES]
    rows = [row for module in modules for row in module.ROWS if args.only in row.name]
    ceilings = None if args.smoke else Ceilings.measure()
    if ceilings:
        print(f"{torch.cuda.get_device_name()}: copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, "
              f"bf16 product {ceilings.flops_per_s / 1e12:.0f} TFLOP/s")  # fmt: skip
    else:
        print("smoke: toy sizes; these times mean nothing")
    entries: list[dict[str, Any]] = []
    for row in rows:
        entries += measure(row, ceilings, device="cuda" if gpu else "cpu", smoke=args.smoke)
    print(table(entries))
    if args.json and ceilings:
        report = {
            "command": " ".join(("python -m benchmarks.ops", *(sys.argv[1:] if argv is None else argv))),
            "commit": args.commit or commit(),
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
            "copy_bytes_per_s": ceilings.bytes_per_s,
            "bf16_flops_per_s": ceilings.flops_per_s,
            "rows": entries,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
