"""What a report.json of this version holds, and a check of it: for readers that are programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NUMBER = (int, float)
_OPTIONAL = type(None)

_SPEED_ARM: dict[str, Any] = {
    "tokens_per_second": NUMBER, "slots_per_second": NUMBER, "step_seconds": {"p10": NUMBER, "p50": NUMBER,
                                                                               "p90": NUMBER},
    "seconds": [NUMBER], "phases": dict, "cold_start": list, "warmup_extra": [NUMBER], "time_to_target": list,
    "mfu": (*NUMBER, _OPTIONAL), "tflops": (*NUMBER, _OPTIONAL),
}
_MEMORY_ARM: dict[str, Any] = {
    "peak": (*NUMBER, _OPTIONAL), "peak_is": str, "peak_allocated": (*NUMBER, _OPTIONAL),
    "peak_reserved": (*NUMBER, _OPTIONAL), "cpu_rss_bytes": (*NUMBER, _OPTIONAL), "weights": (*NUMBER, _OPTIONAL),
    "gradients": (*NUMBER, _OPTIONAL), "optimizer": (*NUMBER, _OPTIONAL), "activations": (*NUMBER, _OPTIONAL),
    "head": (*NUMBER, _OPTIONAL),
}
_ARM: dict[str, Any] = {
    "label": str, "backend": str, "options": dict, "precision": str, "config_digest": str, "attestation": dict,
    "packages": dict, "command": [str],
}
_CURVE: dict[str, Any] = {"step": [int], "loss": list, "seconds": list, "tokens": [int], "repeat": int, "seed": int}
_COST_ARM: dict[str, Any] = {"per_million_tokens": (*NUMBER, _OPTIONAL), "per_run": (*NUMBER, _OPTIONAL),
                             "joules_per_token": (*NUMBER, _OPTIONAL)}

FIELDS: dict[str, Any] = {
    "schema": str, "verdict": str, "valid": bool, "recipe": str, "algorithm": str, "online": bool, "created": str,
    "command": [str], "overrides": dict,
    "protocol": {"order": str, "repeats": int, "warmup": int, "steps": int, "seeds": [int]},
    "arms": {"a": _ARM, "b": _ARM}, "data": {"same": bool, "common_steps": int},
    "findings": [{"kind": str, "severity": str, "text": str}],
    "speed": ({"ratio": [NUMBER], "noise": (*NUMBER, _OPTIONAL), "significant": bool, "steps": int, "a": _SPEED_ARM,
               "b": _SPEED_ARM}, _OPTIONAL),
    "memory": {"a": _MEMORY_ARM, "b": _MEMORY_ARM, "peak_ratio": (*NUMBER, _OPTIONAL), "fits": (dict, _OPTIONAL)},
    "parity": {"passed": (bool, _OPTIONAL), "checks": [{"name": str, "passed": bool, "text": str}], "losses": dict,
               "gradients": list, "worst": list, "final": (dict, _OPTIONAL), "bands": dict},
    "cost": {"price_per_hour": (*NUMBER, _OPTIONAL), "a": _COST_ARM, "b": _COST_ARM}, "machine": dict,
    "curves": {"a": [_CURVE], "b": [_CURVE], "yardstick": [_CURVE]},
    "assertions": [{"text": str, "holds": bool, "found": str}], "baseline": (dict, _OPTIONAL),
}
"""A type, a tuple of alternatives, a list of what every item is, or a mapping of required keys."""


def faults_of(report: Any) -> list[str]:
    """Every way in which `report` is not a report of this schema version; empty for a good one."""
    from aligntune.compare.report import SCHEMA

    if not isinstance(report, Mapping):
        return ["a report is a mapping"]
    if report.get("schema") != SCHEMA:
        return [f"schema is {report.get('schema')!r}; this version reads {SCHEMA!r}"]
    return _faults(report, FIELDS, "report")


def _faults(value: Any, wanted: Any, where: str) -> list[str]:
    if isinstance(wanted, Mapping):
        if not isinstance(value, Mapping):
            return [f"{where}: a mapping is wanted"]
        missing = [f"{where}.{name}: missing" for name in wanted if name not in value]
        return missing + [fault for name, inner in wanted.items() if name in value
                          for fault in _faults(value[name], inner, f"{where}.{name}")]
    if isinstance(wanted, list):
        if not isinstance(value, (list, tuple)):
            return [f"{where}: a list is wanted"]
        return [fault for number, item in enumerate(value) for fault in _faults(item, wanted[0], f"{where}[{number}]")]
    if isinstance(wanted, tuple) and any(isinstance(option, (Mapping, list)) for option in wanted):
        if value is None and _OPTIONAL in wanted:
            return []
        return _faults(value, next(option for option in wanted if isinstance(option, (Mapping, list))), where)
    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
    good = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
    return [] if good else [f"{where} = {str(value)[:60]!r}: {' or '.join(kind.__name__ for kind in kinds)} is wanted"]
