"""What each arm costs: tokens a second, time by phase, memory by category, money and energy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aligntune.compare.flops import peak_of, step_flops
from aligntune.compare.stats import percentiles, throughput_ratio

PHASES = ("data", "rollout", "reward", "prepare", "forward", "backward", "optimizer")
_SMOOTH = 5

Runs = Sequence[Mapping[str, Any]]


def timed_steps(a: Runs, b: Runs, warmup: int) -> list[int]:
    """Indices of the steps that speed is taken from: after the warm-up, timed in every run, traced in none.

    A run of fewer steps than the warm-up keeps its last half.
    """
    count = min(len(one["steps"]) for one in (*a, *b))
    skip = warmup if count >= warmup + 2 else count // 2
    return [index for index in range(skip, count)
            if all(one["steps"][index]["seconds"] and not one["steps"][index]["traced"]
                   and one["steps"][index]["tokens"] for one in (*a, *b))]


def speed(a: Runs, b: Runs, *, warmup: int, target_loss: float | None) -> dict[str, Any] | None:
    """The comparison of speeds; None where no step can be timed."""
    steps = timed_steps(a, b, warmup)
    if not steps:
        return None
    ratio = throughput_ratio(*([log_costs(one, steps) for one in runs] for runs in (a, b)))
    target = target_loss if target_loss is not None else _end_of(a)
    return {
        "ratio": ratio.ratio.as_list(), "noise": ratio.noise, "significant": ratio.significant, "steps": len(steps),
        "first_step": steps[0] + 1, "target_loss": target,
        "a": arm_speed(a, steps, target), "b": arm_speed(b, steps, target),
    }


def log_costs(run: Mapping[str, Any], steps: Sequence[int]) -> list[float]:
    """Logarithms of the seconds that a token of each step took."""
    return [math.log(run["steps"][i]["seconds"] / run["steps"][i]["tokens"]) for i in steps]


def arm_speed(runs: Runs, steps: Sequence[int], target: float | None = None) -> dict[str, Any]:
    """What one arm's runs cost over the timed steps (indices, of `timed_steps`)."""
    taken = [one["steps"][i] for one in runs for i in steps]
    seconds, tokens = sum(step["seconds"] for step in taken), sum(step["tokens"] for step in taken)
    found: dict[str, Any] = {
        "tokens_per_second": tokens / seconds, "slots_per_second": sum(step["slots"] for step in taken) / seconds,
        "step_seconds": percentiles([step["seconds"] for step in taken]),
        "seconds": [step["seconds"] for step in taken],
        "phases": _phases(taken), "cold_start": [one["cold_start"] for one in runs],
        "warmup_extra": _warmup_extra(runs, steps), "capture_seconds": [one.get("capture_seconds") for one in runs],
        "rehearsal_seconds": [one.get("rehearsal_seconds") for one in runs],
        "time_to_target": [_time_to(one, target) for one in runs], "mfu": None, "tflops": None,
    }
    work, online = runs[0].get("work"), runs[0]["online"]
    if work and not online:
        rate = sum(step_flops(work, step["tokens"], step["squared"]) for step in taken) / seconds
        found["tflops"] = rate / 1e12
        cards = runs[0]["environment"].get("gpus") or []
        peak = peak_of(cards[0]["name"]) if cards and runs[0]["precision"] != "fp32" else None
        found["mfu"] = rate / 1e12 / peak if peak else None
    return found


def _phases(taken: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean seconds a step by phase; what is in none is "other"."""
    totals = {name: sum(step["phases"].get(name, 0.0) for step in taken) / len(taken) for name in PHASES}
    whole = sum(step["seconds"] for step in taken) / len(taken)
    shown = {name: value for name, value in totals.items() if value > 0}
    return {**shown, "other": max(0.0, whole - sum(shown.values()))}


def _warmup_extra(runs: Runs, steps: Sequence[int]) -> list[float]:
    """Seconds that the steps before the timed ones took beyond as many usual ones: compilation, capture, caches.

    With those of a pass before the first step, which is where fast compiles.
    """
    found = []
    for one in runs:
        usual = float(np.median([one["steps"][i]["seconds"] for i in steps]))
        early = [step["seconds"] for step in one["steps"][: steps[0]] if step["seconds"] and not step["traced"]]
        found.append(max(0.0, sum(early) - usual * len(early)) + _before(one))
    return found


def _before(run: Mapping[str, Any]) -> float:
    """Seconds of training before the first step."""
    return run.get("rehearsal_seconds") or 0.0


def _smoothed(run: Mapping[str, Any]) -> np.ndarray:
    values = np.array([step["loss"] for step in run["steps"]])
    width = min(_SMOOTH, len(values))
    return np.convolve(values, np.ones(width) / width, mode="valid")


def _end_of(runs: Runs) -> float | None:
    """A smoothed loss near the runs' end, the worst of them; None for online methods, whose loss tells nothing.

    A hundredth of the way down is left: an arm of the same model that rounds otherwise ends a hair above or below.
    """
    if runs[0]["online"]:
        return None
    ends = []
    for one in runs:
        smooth = _smoothed(one)
        end = float(smooth[-1])
        ends.append(end + max(0.01 * (float(smooth[0]) - end), 1e-4 * abs(end)))
    return max(ends) if all(math.isfinite(end) for end in ends) else None


def _time_to(run: Mapping[str, Any], target: float | None) -> float | None:
    """Training seconds until the smoothed loss first is at or below the target; None if it never is."""
    if target is None:
        return None
    smooth = _smoothed(run)
    hits = np.flatnonzero(smooth <= target * (1 + 1e-9) if target >= 0 else smooth <= target)
    if not len(hits):
        return None
    last = int(hits[0]) + len(run["steps"]) - len(smooth)
    return _before(run) + float(sum(step["seconds"] or 0.0 for step in run["steps"][: last + 1]))


def memory(a: Runs, b: Runs) -> dict[str, Any]:
    """Bytes of each arm, the largest of its repeats: peaks, and what they hold."""
    return {"a": arm_memory(a), "b": arm_memory(b), **_peak_ratio(arm_memory(a), arm_memory(b))}


def arm_memory(runs: Runs) -> dict[str, Any]:
    """Bytes of one arm, the largest of its repeats."""
    def most(name: str) -> int | None:
        values = [one["memory"].get(name) for one in runs if one["memory"].get(name) is not None]
        return max(values) if values else None

    found = {name: most(name) for name in ("peak_allocated", "peak_reserved", "cpu_rss_bytes", "weights", "reference",
                                           "gradients", "optimizer", "head")}
    allocated = found["peak_allocated"]
    held = sum(found[name] or 0 for name in ("weights", "reference", "gradients", "optimizer"))
    # Without a card nothing counts what is allocated: the process's resident set has the interpreter in it too.
    found["activations"] = None if allocated is None else max(0, allocated - held - (found["head"] or 0))
    found["peak"] = found["cpu_rss_bytes"] if allocated is None else allocated
    return {**found, "peak_is": "resident set of the process (no card)" if allocated is None else
            "GPU memory allocated"}


def _peak_ratio(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    known = a["peak"] and b["peak"] and a["peak_is"] == b["peak_is"]
    return {"peak_ratio": b["peak"] / a["peak"] if known else None}


def cost(a: Runs, b: Runs, rates: Mapping[str, Any] | None, price: float | None) -> dict[str, Any]:
    """Money at `price` an hour, and energy where the card tells; None where it is not known."""
    found: dict[str, Any] = {"price_per_hour": price}
    for label, runs in (("a", a), ("b", b)):
        rate = rates[label]["tokens_per_second"] if rates else None
        walls = [one["train_window"][1] - one["train_window"][0] for one in runs]
        joules = [(one.get("machine") or {}).get("energy_j") for one in runs]
        tokens = [sum(step["tokens"] for step in one["steps"]) for one in runs]
        known = [j / t for j, t in zip(joules, tokens, strict=True) if j is not None and t]
        found[label] = {
            "per_million_tokens": price / 3600 * 1e6 / rate if price is not None and rate else None,
            "per_run": price / 3600 * float(np.mean(walls)) if price is not None else None,
            "run_seconds": float(np.mean(walls)),
            "joules_per_token": float(np.mean(known)) if known else None,
        }
    return found
