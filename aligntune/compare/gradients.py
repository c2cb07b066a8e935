"""Gradients of the arms, parameter by parameter, against an fp32 oracle and two implementations known to be equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aligntune.compare.arm import GRADIENTS

Gradients = Mapping[str, np.ndarray]


def load(result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The kept gradients of a run, "step/name" to a flat fp64 array (a sample of large ones)."""
    path = Path(result["folder"]) / GRADIENTS
    if not path.is_file():
        return {}
    from safetensors.numpy import load_file

    return {name: value.astype(np.float64) for name, value in load_file(path).items()}


def steps_in(found: Gradients) -> list[int]:
    return sorted({int(name.partition("/")[0]) for name in found})


def relative(x: np.ndarray, y: np.ndarray) -> float:
    """|x - y| / |y|; 0 where both are 0, infinite where only y is."""
    apart, size = float(np.linalg.norm(x - y)), float(np.linalg.norm(y))
    return apart / size if size else (0.0 if not apart else float("inf"))


def cosine(x: np.ndarray, y: np.ndarray) -> float | None:
    """None where either is 0."""
    size = float(np.linalg.norm(x)) * float(np.linalg.norm(y))
    return float(x @ y) / size if size else None


def parameter_table(
    step: int, a: Mapping[str, Any], b: Mapping[str, Any], others: Mapping[str, Mapping[str, Any] | None],
    loaded: Mapping[str, Gradients],
) -> list[dict[str, Any]]:
    """One row a parameter of `step`: A against B, and each against the oracle where there is one.

    Args:
        others: results by "oracle" and "yardstick", None where one did not run.
        loaded: gradients by "a", "b", "oracle", "y1", "y2".
    """
    rows = []
    prefix = f"{step}/"
    for name in sorted(loaded["a"].keys() & loaded["b"].keys()):
        if not name.startswith(prefix):
            continue
        x, y = loaded["a"][name], loaded["b"][name]
        row: dict[str, Any] = {
            "name": name.removeprefix(prefix), "step": step, "norm_a": a["norms"].get(name, 0.0),
            "norm_b": b["norms"].get(name, 0.0), "cosine": cosine(x, y), "relative": relative(y, x),
        }
        row["norm_ratio"] = row["norm_b"] / row["norm_a"] if row["norm_a"] else None
        truth = loaded.get("oracle", {}).get(name)
        for label in ("a", "b", "y1", "y2"):
            mine = loaded.get(label, {}).get(name)
            row[f"error_{label}"] = relative(mine, truth) if truth is not None and mine is not None else None
        rows.append(row)
    return rows


def whole(step: int, loaded: Mapping[str, Gradients]) -> dict[str, Any]:
    """The gradient as one vector: distances to the oracle, and between A and B."""
    prefix = f"{step}/"
    names = sorted(name for name in loaded["a"].keys() & loaded["b"].keys() if name.startswith(prefix))
    if not names:
        return {}
    flat = {label: np.concatenate([found[name] for name in names]) for label, found in loaded.items()
            if all(name in found for name in names)}
    result: dict[str, Any] = {"step": step, "parameters": len(names), "cosine": cosine(flat["a"], flat["b"]),
                              "relative": relative(flat["b"], flat["a"])}
    for label in ("a", "b", "y1", "y2"):
        known = "oracle" in flat and label in flat
        result[f"error_{label}"] = relative(flat[label], flat["oracle"]) if known else None
    return result


def worst(rows: Sequence[Mapping[str, Any]], count: int = 10) -> list[dict[str, Any]]:
    """The parameters where B is furthest from A, gradients that are 0 in both left out."""
    alive = [dict(row) for row in rows if row["norm_a"] or row["norm_b"]]
    return sorted(alive, key=lambda row: -row["relative"])[:count]
