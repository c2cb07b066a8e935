"""SFT on one GPU: backend "fast" beside trl, trl with liger, and unsloth, each at its best setting.

python -m benchmarks.sft --json FILE                        every row
python -m benchmarks.sft lora-1b qlora-8b --json FILE       some
python -m benchmarks.sft lora-1b --arms fast,fast-gc        some arms
python -m benchmarks.sft smoke --arms trl,fast              toy sizes, any machine; the times mean nothing

A peer lives in a folder of its own, where `pip install --target` put it: --site-liger DIR, --site-unsloth DIR.
One that is not given is skipped with a line. Every arm is a fresh process that starts from one seed checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ops.__main__ import commit
from benchmarks.sft.workloads import MODELS, WORKLOADS, Workload, write_model, write_rows

# arm -> (backend, options, environment, site)
ARMS: dict[str, tuple[str, dict[str, Any], dict[str, str], str | None]] = {
    "trl": ("trl", {"gradient_checkpointing": False}, {}, None),
    "trl-gc": ("trl", {"gradient_checkpointing": True}, {}, None),
    "liger": ("trl", {"gradient_checkpointing": False, "trainer_options": {"use_liger_kernel": True}}, {}, "liger"),
    "liger-gc": ("trl", {"gradient_checkpointing": True, "trainer_options": {"use_liger_kernel": True}}, {}, "liger"),
    "unsloth": ("unsloth", {"gradient_checkpointing": False}, {}, "unsloth"),
    "unsloth-compiled": ("unsloth", {"gradient_checkpointing": False}, {"UNSLOTH_PADDING_CHOICE": "padded"}, "unsloth"),
    "unsloth-gc": ("unsloth", {"gradient_checkpointing": "unsloth"}, {}, "unsloth"),
    "fast": ("fast", {"gradient_checkpointing": False}, {}, None),
    "fast-gc": ("fast", {"gradient_checkpointing": True}, {}, None),
}
UNSLOTH = {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": "/tmp/unsloth-compiled"}


def run_arm(name: str, workload: Workload, seed: Path, rows: Path, sites: dict[str, Path | None], precision: str,
            limit_s: int, profile: bool, logs: Path | None) -> dict[str, Any]:  # fmt: skip
    """What the arm's process wrote, or {"failed": why}, or {"skipped": why}."""
    backend, options, env, site = ARMS[name]
    if site is not None and sites[site] is None:
        return {"skipped": f"{site} is not installed (--site-{site})"}
    with tempfile.TemporaryDirectory() as folder:
        spec = {
            "backend": backend, "options": options | workload.options, "model": str(seed), "rows": str(rows),
            "output": f"{folder}/run", "log_each": workload.measured <= 8, "precision": precision,
            "profile": profile,
            **{k: v for k, v in asdict(workload).items() if k not in ("model", "options", "lengths")},
        }  # fmt: skip
        Path(folder, "spec.json").write_text(json.dumps(spec))
        environment = os.environ | env | {"BENCHMARK_STARTED": str(time.time()), "HF_HUB_OFFLINE": "1"}
        if site == "unsloth":
            environment |= UNSLOTH
            libraries = next(Path(str(sites[site])).rglob("libcudart.so.12"), None)
            folders = [str(libraries.parent)] if libraries else []
            environment["LD_LIBRARY_PATH"] = ":".join((*folders, os.environ.get("LD_LIBRARY_PATH", "")))
            environment["PYTHONPATH"] = f"{sites[site]}:{Path.cwd()}"
        elif site is not None:
            environment["PYTHONPATH"] = f"{os.environ.get('PYTHONPATH', '')}:{sites[site]}"
        command = [sys.executable, "-m", "benchmarks.sft.arm", f"{folder}/spec.json", f"{folder}/result.json"]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {limit_s} s"}
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
            (logs / f"{seed.name}-{name}.txt").write_text(done.stdout + done.stderr)
        if done.returncode or not Path(folder, "result.json").exists():
            return {"failed": (done.stderr.strip() or "no result").splitlines()[-1][:300], "tail": done.stderr[-2000:]}
        return json.loads(Path(folder, "result.json").read_text()) | {"options": options}


def summary(workload: Workload, result: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second and milliseconds a step over the measured steps."""
    seconds, steps, per_step = result["measured_s"], workload.measured, workload.batch_size
    tokens = sum(result["rows_seen"][(workload.steps - steps) * per_step : workload.steps * per_step])
    return {"tokens_per_s": tokens / seconds, "step_ms": seconds / steps * 1e3, "tokens_per_step": tokens / steps,
            "loss_first": result["losses"][0],
            "loss_last": result["losses"][-1]}  # fmt: skip


def line(arm: str, entry: dict[str, Any]) -> str:
    """One line of the printed table."""
    for word in ("skipped", "failed"):
        if word in entry:
            return f"  {arm:18} {word}: {entry[word]}"
    return (f"  {arm:18} {entry['tokens_per_s']:9,.0f} tok/s {entry['step_ms']:8.1f} ms "
            f"{entry.get('peak_gib', float('nan')):6.2f} GiB (reserved {entry.get('reserved_gib', float('nan')):6.2f}) "
            f"first step {entry['first_step_s']:5.1f} s  loss {entry['loss_first']:.4f} -> {entry['loss_last']:.4f}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(WORKLOADS)}; all but smoke by default")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--json", type=Path, help="write versions, card, commit, command, ceilings and rows here")
    parser.add_argument("--site-liger", type=Path)
    parser.add_argument("--site-unsloth", type=Path)
    parser.add_argument("--commit", help="the commit, where this tree is not a checkout")
    parser.add_argument("--limit", type=int, default=240, help="seconds an arm may take")
    parser.add_argument("--logs", type=Path, help="keep what every arm printed, here")
    parser.add_argument("--profile", action="store_true", help="three more steps under the profiler")
    args = parser.parse_args(argv)
    args.rows = args.rows or [name for name in WORKLOADS if name != "smoke"]
    args.arms = args.arms.split(",")
    for given, known in ((args.rows, WORKLOADS), (args.arms, ARMS)):
        if strange := sorted(set(given) - set(known)):
            parser.error(f"unknown: {', '.join(strange)}; there are {', '.join(known)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
    if not gpu and args.rows != ["smoke"]:
        print("benchmarks need an NVIDIA GPU, and TRITON_INTERPRET unset; 'smoke' runs anywhere", file=sys.stderr)
        return 1
    from aligntune.builtin import load_tokenizer

    report: dict[str, Any] = {
        "command": " ".join(("python -m benchmarks.sft", *(sys.argv[1:] if argv is None else argv))),
        "commit": args.commit or commit(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "rows": [],
    }
    if gpu:
        from benchmarks.ops.bench import Ceilings

        report["ceilings"] = asdict(Ceilings.measure())
        torch.cuda.empty_cache()
    sites = {"liger": args.site_liger, "unsloth": args.site_unsloth}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows:
            workload = WORKLOADS[name]
            seed, rows = Path(folder, workload.model), Path(folder, f"{name}.jsonl")
            if not seed.exists():
                assert workload.model in MODELS
                # in a process of its own: this one must hold nothing on the GPU while arms are measured
                write_model(workload.model, seed, load_tokenizer("builtin:tiny"), device="cuda" if gpu else "cpu")
                if gpu:
                    torch.cuda.empty_cache()
            write_rows(workload, rows)
            print(f"{name}: {workload}", flush=True)
            for arm in args.arms:
                found = run_arm(arm, workload, seed, rows, sites, "bf16" if gpu else "fp32", args.limit,
                                args.profile and gpu, args.logs)
                entry = {"row": name, "arm": arm, **found}
                if "measured_s" in found:
                    entry |= summary(workload, found)
                    del entry["rows_seen"]
                report["rows"].append(entry)
                print(line(arm, entry), flush=True)
                if args.json:
                    args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
