"""The longest row that an arm trains within the card's memory: batch 1, rows of random tokens, a process a probe.

Lengths are doubled until one does not fit, then halved in between to within 2%. Peaks grow by the token: two probes
that fitted tell where the card ends, and the next length is no guess. A probe is two optimizer steps, so that the
second finds the optimizer's state there (or one, where a step takes minutes); its seconds are those of a step. A length
that did not fit says why: the card or the host was full, or there was no time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from aligntune.compare.protocol import Run, in_a_fresh_process, spec_of
from aligntune.compare.settings import Arm, Settings
from aligntune.errors import ComparisonError
from benchmarks.sft.workloads import WORKLOADS, recipe, versions_of, write_model

TOLERANCE = 0.02
ROUND = 256
FILLED = 0.97
"""Of the card's memory, what the search expects to be usable; what it finds decides."""

Probe = dict[str, Any]


def following(probes: list[Probe], *, start: int, most: int, memory: float | None) -> int | None:
    """The next length to try, or None when the longest is known to within `TOLERANCE`."""
    fitted = sorted((one for one in probes if one["fits"]), key=lambda one: one["tokens"])
    low = fitted[-1]["tokens"] if fitted else 0
    high = min((one["tokens"] for one in probes if not one["fits"]), default=None)
    if not probes:
        return start
    if not low:
        assert high is not None
        return high // 2 if high // 2 >= ROUND else None
    near = max(ROUND, int(low * TOLERANCE))
    if high is None:
        wanted = min(2 * low, most, max(_end(fitted, memory, otherwise=2 * low), low + near))
        return wanted if wanted > low else None
    if high - low <= near:
        return None
    wanted = _end(fitted, memory, otherwise=(low + high) // 2)
    wanted = min(max(wanted, low + near // 2), high - near // 2)
    # A third that ends where the second did tells nothing: halve then.
    halved = (low + high) // 2
    tried = sum(not one["fits"] for one in probes) > 1
    return _rounded(halved if tried else wanted, low, high)


def _rounded(wanted: int, low: int, high: int) -> int | None:
    found = round(wanted / ROUND) * ROUND
    return found if low < found < high else (wanted if low < wanted < high else None)


def _end(fitted: list[Probe], memory: float | None, *, otherwise: int) -> int:
    """Where a line through the last two peaks meets the card's memory."""
    if memory is None or len(fitted) < 2:
        return otherwise
    (short, first), (long, second) = ((one["tokens"], one["peak_bytes"]) for one in fitted[-2:])
    if second <= first:
        return otherwise
    return int(long + (FILLED * memory - second) * (long - short) / (second - first)) // ROUND * ROUND


def probe(spec: Any, arm: Arm, runner: Callable[..., Probe]) -> Probe:
    """One length: whether it trains, and what that took."""
    tokens, begun = int(spec.overrides["max_seq_length"]), time.monotonic()
    try:
        result = runner(spec, arm)
    except ComparisonError as error:  # the host's memory was full, or the time was over
        result = {"status": "failed", "kind": "ComparisonError", "message": str(error).splitlines()[-1].strip()}
    found: Probe = {"tokens": tokens, "fits": result["status"] == "ok", "process_s": time.monotonic() - begun}
    if not found["fits"]:
        return found | {"why": f"{result['status']}: {result['kind']}: {result['message']}"[:400]}
    memory, steps = result["memory"], result["steps"]
    seconds = [step["seconds"] for step in steps if step["seconds"]]
    return found | {
        "peak_bytes": memory.get("peak_allocated") or 0, "reserved_bytes": memory.get("peak_reserved") or 0,
        "step_s": min(seconds) if seconds else None, "steps_s": seconds, "losses": [step["loss"] for step in steps],
        "tokens_per_step": steps[-1]["tokens"], "attestation": result["attestation"],
        "versions": versions_of(result["environment"]),
    }


def longest(
    name: str, arm: Arm, folder: Path, args: argparse.Namespace, *, gpu: bool,
    runner: Callable[..., Probe] | None = None, keep: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> dict[str, Any]:
    """The entry of one arm: the longest length, its peak and seconds a step, and every probe."""
    from aligntune.builtin import load_tokenizer

    workload = replace(WORKLOADS[name], batch_size=1, packing=False, steps=args.probe_steps, measured=1)
    model, rows = folder / f"{workload.model}-long", folder / "long.jsonl"
    memory = _card() if gpu else None
    if not model.exists():
        # Rotary tables of any length; the rows are of random tokens, and nothing is learnt from where they lie.
        write_model(workload.model, model, load_tokenizer("builtin:tiny"), device="cuda" if gpu else "cpu",
                    max_position_embeddings=args.most)
        if gpu:
            import torch

            torch.cuda.empty_cache()
    rows.write_text('{"text": "a row whose place is taken"}\n' * (args.probe_steps + 1))
    probes: list[Probe] = []
    ends, stopped = time.monotonic() + 60 * args.minutes, None

    def entry() -> dict[str, Any]:
        best = max((one for one in probes if one["fits"]), key=lambda one: one["tokens"], default=None)
        return {"row": f"{name}, longest", "arm": arm.label, "options": dict(arm.options),
                "longest": best["tokens"] if best else None, "peak_gib": best["peak_bytes"] / 2**30 if best else None,
                "step_s": best["step_s"] if best else None, "card_gib": memory / 2**30 if memory else None,
                "steps": args.probe_steps, "stopped": stopped, "probes": probes}

    while (tokens := following(probes, start=args.start, most=args.most, memory=memory)) is not None:
        left = ends - time.monotonic()
        fitted = [one for one in probes if one["fits"]]
        # Attention is quadratic in the length, the rest of a probe is not: at least so long.
        expected = fitted[-1]["process_s"] * tokens / fitted[-1]["tokens"] if fitted else 0
        if left < max(expected, 1):
            stopped = f"no time for {tokens:,} tokens: {left:.0f} s left"
            break
        settings = Settings("benchmark", recipe(replace(workload, max_seq_length=tokens), str(model), str(rows),
                                                "bf16" if gpu else "fp32"), {}, a=arm, b=arm)
        spec = spec_of(settings, Run("a", len(probes), arm), (args.keep or folder) / f"{arm.label}-longest", seed=1,
                       online=False, peft=False)
        overrides = {**spec.overrides, "max_seq_length": tokens}
        spec = replace(spec, probe=False, gradient_steps=[], fill=True, overrides=overrides)
        run = runner or (lambda spec, arm, left=left: in_a_fresh_process(spec, arm, limit=left))
        probes.append(probe(spec, arm, run))
        print(line(probes[-1]), flush=True)
        keep(entry())
    found = entry()
    print(f"  {arm.label}: {found['longest']} tokens" + (f" ({stopped})" if stopped else ""), flush=True)
    return found


def line(one: Probe) -> str:
    """One printed line of a probe."""
    if not one["fits"]:
        return f"  {one['tokens']:9,} tokens: {one['why']}"
    step = "untimed" if one["step_s"] is None else f"{one['step_s']:.1f} s a step"
    return (f"  {one['tokens']:9,} tokens: {one['peak_bytes'] / 2**30:.2f} GiB "
            f"(reserved {one['reserved_bytes'] / 2**30:.2f}), {step}, {one['process_s']:.0f} s in all")


def _card() -> float:
    import torch

    return float(torch.cuda.mem_get_info()[1])
