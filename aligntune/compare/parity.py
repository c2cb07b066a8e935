"""Do both arms train the same model? Every number is held against what equal implementations differ by.

The yardstick is TRL with eager and with sdpa attention: the same function, rounded differently. What two of those
differ by on this data is what nobody can ask another implementation to be below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aligntune.compare import findings, gradients
from aligntune.compare.arm import PROBE
from aligntune.compare.findings import FAILED, Finding
from aligntune.compare.stats import mean_interval

FLOORS = {"fp32": 2e-6, "bf16": 5e-4, "fp16": 2e-4}
"""Relative difference of a mean token loss that rounding alone explains, whatever the yardstick says."""
GRADIENT_FLOORS = {"fp32": 5e-5, "bf16": 5e-3, "fp16": 2e-3}
KL_FLOORS = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 3e-4}
FIRST, WHOLE_RUN, DRIFT, GRADIENT, PARAMETER, KL = 4.0, 10.0, 3.0, 1.5, 4.0, 10.0
"""How many times the yardstick: at the first step; over the run, where small differences grow; for means; gradients."""
BANDS = ("reward", "kl", "entropy", "completions/mean_length")


@dataclass
class Check:
    """One thing that was judged.

    Args:
        name: "first loss", "drift", ...
        passed: whether `value` is at most `limit`.
        text: what was compared, for people.
    """

    name: str
    passed: bool
    value: float | None
    limit: float | None
    text: str

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


@dataclass
class Parity:
    """The judgement: `checks` and `findings` decide, the rest is shown."""

    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    losses: dict[str, Any] = field(default_factory=dict)
    gradients: list[dict[str, Any]] = field(default_factory=list)
    worst: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, Any] | None = None
    bands: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """None where nothing could be judged."""
        if any(one.severity == FAILED for one in self.findings):
            return False
        return all(check.passed for check in self.checks) if self.checks else None


def judge(results: Mapping[str, Sequence[dict[str, Any]]], data: findings.Data) -> Parity:
    """The whole judgement of two arms' runs."""
    parity = Parity()
    a, b = results["a"], results["b"]
    oracle = next((one for one in results["oracle"] if one["status"] == "ok"), None)
    yard = _yardstick(results)
    precision = _coarsest([*a, *b])
    floor = FLOORS[precision]
    if data.common_steps:
        _losses(parity, a, b, yard, data.common_steps, floor)
    parity.findings += [*findings.leaks(a[0], "a", floor), *findings.leaks(b[0], "b", floor)]
    if a[0]["online"]:
        parity.findings += findings.missing_kl(a[0], b[0], data.common_steps, 5 * floor * 0.01)
        _bands(parity, a, b)
    if data.common_steps:
        mine, theirs = losses(a[0])[: data.common_steps], losses(b[0])[: data.common_steps]
        tolerance = 10 * floor * max(_scale(a[0], data.common_steps), float(np.abs(mine).max()))
        hypotheses = oracle["hypotheses"] if oracle is not None else None
        parity.findings += findings.mask_mistake(a[0], b[0], hypotheses, tolerance)
        named = any(one.kind in ("kl-missing", "mask", "document-leak") for one in parity.findings)
        parity.findings += [] if named else findings.scaled_loss(mine, theirs, tolerance)
        _gradients(parity, results, oracle, yard, precision)
    _final(parity, a, b, yard, precision, judged=data.common_steps == len(a[0]["steps"]))
    return parity


def losses(result: Mapping[str, Any]) -> np.ndarray:
    """The loss of each step, fp64."""
    return np.array([step["loss"] for step in result["steps"]], dtype=np.float64)


def _coarsest(runs: Sequence[Mapping[str, Any]]) -> str:
    return max((one["precision"] for one in runs), key=lambda name: FLOORS[name])


def _yardstick(results: Mapping[str, Sequence[dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Two runs of equal implementations: two yardsticks, or one beside the first plain trl run."""
    ran = [one for one in results["yardstick"] if one["status"] == "ok"]
    if len(ran) >= 2:
        return ran[0], ran[1]
    planned = results["yardstick"]
    return (results["a"][0], ran[0]) if len(ran) == 1 and len(planned) == 1 else None


def _losses(
    parity: Parity, a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]],
    yard: tuple[dict[str, Any], dict[str, Any]] | None, common: int, floor: float,
) -> None:
    pairs = [losses(y)[:common] - losses(x)[:common] for x, y in zip(a, b, strict=True)]
    scale = _scale(a[0], common)
    everything = np.concatenate(pairs)
    if not np.isfinite(everything).all():
        parity.findings.append(Finding("non-finite", FAILED, "a loss is not a number"))
        return
    same = losses(yard[1])[:common] - losses(yard[0])[:common] if yard is not None else None
    drift = mean_interval(pairs)
    least = floor * scale
    first_limit = max(least, FIRST * abs(float(same[0])) if same is not None else 0.0)
    biggest = float(np.abs(everything).max())
    limit = WHOLE_RUN * max(least, float(np.abs(same).max()) if same is not None else 0.0)
    yard_mean = abs(mean_interval([same.tolist()]).value) if same is not None else 0.0
    drift_limit = max(least, DRIFT * yard_mean)
    first = float(np.abs([pair[0] for pair in pairs]).max())
    parity.losses = {
        "max_dloss": biggest, "first_dloss": first, "drift": drift.as_list(),
        "a_to_a": _between(a, common), "b_to_b": _between(b, common), "scale": scale, "steps": common,
        "yardstick_max": float(np.abs(same).max()) if same is not None else None,
        "yardstick_mean": float(same.mean()) if same is not None else None,
        "yardstick": same.tolist() if same is not None else None,
        "residuals": [pair.tolist() for pair in pairs],
    }
    parity.checks += [
        Check("first loss", first <= first_limit, first, first_limit, "difference of the first step's losses"),
        Check("losses", biggest <= limit, biggest, limit, f"largest difference of a step's losses over {common} steps"),
        Check("drift", abs(drift.value) <= drift_limit or drift.contains(0.0), abs(drift.value), drift_limit,
              "mean signed difference of the losses"),
    ]


def _scale(result: Mapping[str, Any], common: int) -> float:
    """What floors are relative to: the mean loss; for online methods, whose loss is a difference near 0, at least 0.01.

    A group's advantages are about 1 in size and cancel: what is left of them is rounding.
    """
    size = float(np.mean(np.abs(losses(result)[:common])))
    return max(size, 0.01) if result["online"] else size


def _between(runs: Sequence[dict[str, Any]], common: int) -> float | None:
    """The largest difference between repeats of one arm from one seed."""
    same = [one for one in runs[1:] if one["seed"] == runs[0]["seed"]]
    if not same:
        return None
    return max(float(np.abs(losses(one)[:common] - losses(runs[0])[:common]).max()) for one in same)


def _gradients(
    parity: Parity, results: Mapping[str, Sequence[dict[str, Any]]], oracle: dict[str, Any] | None,
    yard: tuple[dict[str, Any], dict[str, Any]] | None, precision: str,
) -> None:
    a, b = results["a"][0], results["b"][0]
    loaded = {"a": gradients.load(a), "b": gradients.load(b)}
    if oracle is not None and oracle["steps"][0]["data"]["ids"] == a["steps"][0]["data"]["ids"]:
        loaded["oracle"] = gradients.load(oracle)
    if yard is not None:
        loaded |= {"y1": gradients.load(yard[0]), "y2": gradients.load(yard[1])}
    floor = GRADIENT_FLOORS[precision]
    for step in gradients.steps_in(loaded["a"]):
        if step > len(b["steps"]) or a["steps"][step - 1]["data"]["ids"] != b["steps"][step - 1]["data"]["ids"]:
            continue
        together = gradients.whole(step, loaded)
        if not together:
            continue
        rows = gradients.parameter_table(step, a, b, {"oracle": oracle}, loaded)
        zero = sum(not row["norm_a"] and not row["norm_b"] for row in rows)
        parity.gradients.append({**together, "zero_in_both": zero})
        parity.worst += gradients.worst(rows)
        parity.findings += findings.zero_gradients(rows)
        if together["error_b"] is None:
            limit = 4 * floor
            parity.checks.append(Check(f"gradient, step {step}", together["relative"] <= limit, together["relative"],
                                       limit, "relative difference of the gradients (no oracle to hold them against)"))
            continue
        parity.checks += _to_oracle("b", step, together, rows, ("error_a", "error_y1", "error_y2"), floor)
        known = together["error_y1"] is not None or together["error_y2"] is not None
        if known and yard is not None and yard[0] is not a:  # a plain trl arm is one of the yardstick's two
            parity.checks += _to_oracle("a", step, together, rows, ("error_y1", "error_y2"), floor)


def _to_oracle(
    arm: str, step: int, together: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], held_to: Sequence[str],
    floor: float,
) -> list[Check]:
    """An arm's distance to the oracle beside that of those it is held to, as one vector and by parameter."""
    error, of = f"error_{arm}", "" if arm == "b" else " of a"
    limit = GRADIENT * _most(together, held_to) + floor
    checks = [Check(f"gradient{of}, step {step}", together[error] <= limit, together[error], limit,
                    f"relative distance of {arm}'s gradient to the oracle's")]
    over = []
    for row in rows:
        allowed = PARAMETER * _most(row, held_to) + 10 * floor
        known = any(row[name] is not None for name in held_to)
        if known and row[error] is not None and row[error] > allowed:
            over.append((row[error] / allowed, row[error], allowed, row["name"]))
    if over:
        _, value, allowed, name = max(over)
        checks.append(Check(f"parameters{of}, step {step}", False, value, allowed,
                            f"{len(over)} of {len(rows)} parameters are further from the oracle than equal "
                            f"implementations are, most of all {name}"))
    return checks


def _most(row: Mapping[str, Any], names: Sequence[str]) -> float:
    return max((row[name] for name in names if row[name] is not None), default=0.0)


def _final(
    parity: Parity, a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]],
    yard: tuple[dict[str, Any], dict[str, Any]] | None, precision: str, *, judged: bool,
) -> None:
    """KL and top-1 agreement of the final models on the probe rows."""
    from aligntune.compare.probes import divergence

    mine, theirs = _distribution(a[0]), _distribution(b[0])
    if mine is None or theirs is None or mine.shape != theirs.shape:
        return
    final: dict[str, Any] = dict(divergence(mine, theirs))
    least = KL_FLOORS[precision]
    pairs = [(yard[0], yard[1])] if yard is not None else []
    pairs += [(a[0], one) for one in a[1:] if one["seed"] == a[0]["seed"]]
    known = []
    for one, two in pairs:
        first, second = _distribution(one), _distribution(two)
        if first is not None and second is not None and first.shape == second.shape:
            known.append(divergence(first, second)["kl"])
    limit = max(least, KL * max(known, default=0.0))
    parity.final = {**final, "limit": limit, "yardstick": known[0] if known and yard is not None else None}
    if judged:
        parity.checks.append(Check("final model", final["kl"] <= limit, final["kl"], limit,
                                   "KL of the final models per token on the probe rows"))



def _distribution(result: Mapping[str, Any]) -> Any:
    path = Path(result["folder"]) / PROBE
    if not path.is_file():
        return None
    from safetensors.torch import load_file

    return load_file(path)["log_probs"]


def _bands(parity: Parity, a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> None:
    """Reward, KL, entropy and length of online methods: a band over the seeds, and the paired difference.

    Where a round of rollouts feeds several optimizer steps, what tells of rollouts is there at the first of them only.
    """
    for name in BANDS:
        count = min(len(one["steps"]) for one in (*a, *b))
        known = [index for index in range(count)
                 if all(one["steps"][index]["metrics"].get(name) is not None for one in (*a, *b))]
        if not known:
            continue
        curves = {label: [[one["steps"][index]["metrics"][name] for index in known] for one in runs]
                  for label, runs in (("a", a), ("b", b))}
        apart = [[y - x for x, y in zip(one, two, strict=True)]
                 for one, two in zip(curves["a"], curves["b"], strict=True)]
        difference = mean_interval(apart)
        means = [float(np.mean(curve)) for curve in curves["a"]]
        spread = max(means) - min(means) if len(means) > 1 else None
        size = float(np.mean(np.abs(means))) or 1.0
        limit = max(spread or 0.0, 0.02 * size)
        ok = difference.contains(0.0) or abs(difference.value) <= limit
        parity.bands[name] = {"a": curves["a"], "b": curves["b"], "steps": [index + 1 for index in known],
                              "difference": difference.as_list(), "spread_over_seeds": spread}
        parity.checks.append(Check(name, ok, abs(difference.value), limit, f"mean difference of {name} over the seeds"))
