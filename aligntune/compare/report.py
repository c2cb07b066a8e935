"""The report: one dictionary of a versioned schema, from which every other output is drawn; the verdict line first."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aligntune.compare import findings, measure
from aligntune.compare.findings import INVALID, Data, Finding
from aligntune.compare.parity import Parity, judge
from aligntune.compare.settings import Arm, Assertion, Settings

SCHEMA = "aligntune.compare/1"


@dataclass
class Report:
    """The outcome of a comparison.

    Args:
        data: what report.json holds.
        folder: where the outputs lie.
    """

    data: dict[str, Any]
    folder: Path

    @property
    def verdict(self) -> str:
        """One line: speed, memory, parity, noise."""
        return self.data["verdict"]

    @property
    def valid(self) -> bool:
        """Whether the arms can be compared at all."""
        return self.data["valid"]

    @property
    def failed(self) -> list[str]:
        """The assertions that do not hold, and what the baseline holds against this run; in words."""
        broken = [f"{one['text']}: {one['found']}" for one in self.data["assertions"] if not one["holds"]]
        return broken + list((self.data.get("baseline") or {}).get("worse", []))

    @property
    def exit_code(self) -> int:
        """0 compared and every assertion holds; 9 an assertion does not; 10 the arms cannot be compared."""
        return 10 if not self.valid else 9 if self.failed else 0

    def __repr__(self) -> str:
        return f"Report({self.verdict!r}, {str(self.folder)!r})"


def build(
    settings: Settings, results: Mapping[str, Sequence[dict[str, Any]]], *, command: Sequence[str],
    baseline: Mapping[str, Any] | None = None, fits: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report of finished runs."""
    a, b = results["a"], results["b"]
    online = bool(a[0]["online"])
    data, found = _check(settings, results, online)
    parity = judge(results, data) if data.same else Parity()
    found += parity.findings
    invalid = any(one.severity == INVALID for one in found)
    rates = measure.speed(a, b, warmup=settings.warmup, target_loss=settings.target_loss)
    report: dict[str, Any] = {
        "schema": SCHEMA, "verdict": "", "valid": not invalid, "recipe": settings.recipe,
        "algorithm": a[0]["algorithm"], "online": online, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": list(command), "overrides": _plain(settings.overrides),
        "protocol": _protocol(settings, results),
        "arms": {"a": _arm(settings.a, a), "b": _arm(settings.b, b)},
        "data": {"same": data.same, "common_steps": data.common_steps},
        "findings": [one.as_dict() for one in found], "speed": rates, "memory": measure.memory(a, b) | {"fits": fits},
        "parity": _parity(parity, valid=not invalid, judged=settings.oracle),
        "cost": measure.cost(a, b, rates, settings.price),
        "machine": {role: [one.get("machine") for one in results[role]] for role in ("a", "b")},
        "curves": _curves(results), "assertions": [], "baseline": None,
    }
    report["verdict"] = verdict(report)
    if baseline is not None:
        report["baseline"] = against(report, baseline)
        report["findings"] += [one.as_dict() for one in other_job(report, baseline)]
    report["assertions"] = [check(one, report) for one in settings.asserts]
    return report


def _check(
    settings: Settings, results: Mapping[str, Sequence[dict[str, Any]]], online: bool
) -> tuple[Data, list[Finding]]:
    a, b = results["a"], results["b"]
    repacked = a[0]["config"].get("data", {}).get("packing") != b[0]["config"].get("data", {}).get("packing")
    found: list[Finding] = []
    datas = []
    for x, y in zip(a, b, strict=True):
        datas.append(findings.compare_data(x, y, online=online, repacked=repacked))
        found += [one for one in datas[-1].findings if one not in found]
    found += findings.compare_starts(a[0], b[0])
    for name, arm, runs in (("a", settings.a, a), ("b", settings.b, b)):
        for run in runs:
            found += [one for one in findings.attested(run, name, arm.backend, arm.peer) if one not in found]
    found += findings.machine_findings(results)
    same, common = all(one.same for one in datas), min(one.common_steps for one in datas)
    return Data(same, common, ()), found


def _protocol(settings: Settings, results: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    from aligntune.compare.protocol import order

    return {
        "order": " ".join(f"{name.upper()}{repeat + 1}" for name, repeat in order(settings.repeats)),
        "repeats": settings.repeats, "warmup": settings.warmup, "steps": len(results["a"][0]["steps"]),
        "seeds": [one["seed"] for one in results["a"]],
        "oracle": results["oracle"][0]["status"] if results["oracle"] else "not asked for",
        "yardstick": [one.get("label", one["status"]) for one in results["yardstick"]],
    }


def _arm(arm: Arm, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    environment = first["environment"]
    return {
        "label": arm.label, "backend": arm.backend, "options": _plain(arm.options), "peer": arm.peer,
        "python": arm.python, "setup": arm.setup, "precision": first["precision"],
        "config_digest": first["config_digest"], "config": first["config"], "attestation": first["attestation"],
        "trace": first.get("trace"),
        "packages": environment["packages"], "gpus": environment["gpus"], "git": environment["git"],
        "python_version": environment["python"], "command": environment["command_line"], "flags": environment["flags"],
        "cpus": environment["cpu_count"],
    }


def _parity(parity: Parity, *, valid: bool, judged: bool) -> dict[str, Any]:
    passed = parity.passed if valid else None
    return {
        "passed": passed, "checks": [one.as_dict() for one in parity.checks], "losses": parity.losses,
        "gradients": parity.gradients, "worst": parity.worst, "final": parity.final, "bands": parity.bands,
        "oracle": judged,
    }


def _curves(results: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Per-step values of every run that the plots and the CSV draw."""
    names = ("step", "loss", "grad_norm", "seconds", "tokens", "slots", "learnt", "documents", "traced",
             "learning_rate")
    return {role: [{name: [step[name] for step in one["steps"]] for name in names}
                   | {"repeat": one["repeat"] + 1, "seed": one["seed"],
                      "metrics": {key: [step["metrics"].get(key) for step in one["steps"]]
                                  for key in sorted({key for step in one["steps"] for key in step["metrics"]})}}
                   for one in results[role] if one["status"] == "ok" and one["steps"]]
            for role in ("a", "b", "yardstick")}


# ---------------------------------------------------------------------------------------------------------- the verdict


def verdict(report: Mapping[str, Any]) -> str:
    """The line that comes first."""
    b = report["arms"]["b"]["label"]
    if not report["valid"]:
        reasons = [one["text"] for one in report["findings"] if one["severity"] == INVALID]
        return f"{b}: NOT COMPARABLE: {'; '.join(reasons)}"
    return f"{b}: {', '.join([_speed_words(report), _memory_words(report), _parity_words(report), _noise(report)])}"


def _speed_words(report: Mapping[str, Any]) -> str:
    speed = report["speed"]
    if speed is None:
        return "speed not measured"
    ratio, low, high = speed["ratio"]
    text = f"{ratio:.2f}x tokens/s [{low:.2f}, {high:.2f}]"
    return text if speed["significant"] else f"no significant difference in speed ({text})"


def _memory_words(report: Mapping[str, Any]) -> str:
    memory = report["memory"]
    a, b = memory["a"]["peak"], memory["b"]["peak"]
    if memory["peak_ratio"] is None:
        return "peak not comparable"
    return f"peak{'' if report['arms']['b']['gpus'] else ' RSS'} {a / 2**30:.1f} -> {b / 2**30:.1f} GiB"


def _parity_words(report: Mapping[str, Any]) -> str:
    parity = report["parity"]
    if parity["passed"] is None:
        return "parity not judged"
    named = [one["text"] for one in report["findings"] if one["severity"] == findings.FAILED]
    broken = [f"{one['name']} {one['value']:.2g} > {one['limit']:.2g}" for one in parity["checks"] if not one["passed"]]
    if not parity["passed"]:
        return f"parity FAIL ({'; '.join(named or broken)})"
    losses = parity["losses"]
    if not losses:
        return "parity PASS"
    return f"parity PASS (max |dloss| {losses['max_dloss']:.1e}, drift {losses['drift'][0]:.0e})"


def _noise(report: Mapping[str, Any]) -> str:
    speed = report["speed"]
    if speed is None or speed["noise"] is None:
        return "noise not measured (one repeat)"
    return f"noise {speed['noise']:.1%}"


# ------------------------------------------------------------------------------------------------ assertions, baselines


def numbers(report: Mapping[str, Any]) -> dict[str, tuple[float, float, float] | None]:
    """What assertions on numbers read: (value, low, high), None where it was not measured."""
    def one(value: Any) -> tuple[float, float, float] | None:
        return None if value is None else (float(value), float(value), float(value))

    speed, parity = report["speed"], report["parity"]
    losses, final = parity["losses"], parity["final"] or {}
    baseline = (report.get("baseline") or {}).get("speedup")
    drift = losses.get("drift")
    return {
        "speedup": tuple(speed["ratio"]) if speed else None, "peak_ratio": one(report["memory"]["peak_ratio"]),
        "max_dloss": one(losses.get("max_dloss")), "drift": one(abs(drift[0])) if drift else None,
        "kl": one(final.get("kl")), "top1": one(final.get("top1")),
        "tokens_per_second": one(speed["b"]["tokens_per_second"]) if speed else None,
        "cold_start": one(max(speed["b"]["cold_start"])) if speed else None, "baseline_speedup": one(baseline),
    }


def check(assertion: Assertion, report: Mapping[str, Any]) -> dict[str, Any]:
    """Whether an assertion holds. A number with an interval must hold at the interval's worse end; what was not
    measured holds never."""
    if not assertion.relation:
        state = {
            "parity": report["valid"] and report["parity"]["passed"] is True, "data": report["data"]["same"],
            "attestation": not any(one["kind"] == "eager" for one in report["findings"]),
            "significant": bool(report["speed"] and report["speed"]["significant"]),
        }[assertion.name]
        words = {"parity": ("passed", "failed or was not judged"), "data": ("the same", "not the same"),
                 "attestation": ("as promised", "something fell back"),
                 "significant": ("a significant difference", "no significant difference")}[assertion.name]
        return {"text": assertion.text, "holds": bool(state), "found": words[0] if state else words[1]}
    known = numbers(report)[assertion.name]
    if known is None:
        return {"text": assertion.text, "holds": False, "found": f"{assertion.name} was not measured"}
    value, low, high = known
    end = low if assertion.relation.startswith(">") else high
    holds = {">=": end >= assertion.bound, ">": end > assertion.bound, "<=": end <= assertion.bound,
             "<": end < assertion.bound}[assertion.relation]
    interval = f" [{low:.4g}, {high:.4g}]" if low != high else ""
    return {"text": assertion.text, "holds": holds, "found": f"{assertion.name} is {value:.4g}{interval}"}


def against(report: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """This report beside an earlier one: what became worse beyond both intervals."""
    worse = []
    now, then = report["speed"], baseline["speed"]
    found: dict[str, Any] = {"verdict": baseline["verdict"], "created": baseline["created"], "speedup": None}
    if now and then:
        found["speedup"] = now["ratio"][0] / then["ratio"][0]
        if now["ratio"][2] < then["ratio"][1]:
            worse.append(f"speedup fell from {_ratio(then)} to {_ratio(now)}")
    if baseline["parity"]["passed"] and not report["parity"]["passed"]:
        worse.append("parity passed in the baseline and does not now")
    now, then = report["memory"]["b"], baseline["memory"]["b"]
    mine, theirs = now["peak"], then["peak"]
    if mine and theirs and now["peak_is"] == then["peak_is"] and mine > 1.05 * theirs:
        worse.append(f"b's peak grew from {theirs / 2**30:.2f} to {mine / 2**30:.2f} GiB")
    return {**found, "worse": worse}


def other_job(report: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[Finding]:
    """What the earlier report measured otherwise: then its numbers are no measure of this one's."""
    def told(one: Mapping[str, Any]) -> dict[str, str]:
        cards = {role: ", ".join(card["name"] for card in one["arms"][role].get("gpus") or []) or "no card"
                 for role in ("a", "b")}
        return {"recipe": one["recipe"], "algorithm": one["algorithm"], "options": json.dumps(one["overrides"]),
                **{f"arm {role}": one["arms"][role]["label"] for role in cards}, "card": cards["b"]}

    now, then = told(report), told(baseline)
    apart = [f"{name} {then[name]}, here {now[name]}" for name in now if now[name] != then[name]]
    return [Finding("baseline", findings.SAID, f"the baseline is of another job: {'; '.join(apart)}")] if apart else []


def _ratio(speed: Mapping[str, Any]) -> str:
    ratio, low, high = speed["ratio"]
    return f"{ratio:.2f} [{low:.2f}, {high:.2f}]"


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(options), default=str))


def settings_dict(settings: Settings) -> dict[str, Any]:
    """The settings as plain values."""
    return _plain(asdict(settings))
