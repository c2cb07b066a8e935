"""Distances between gradients, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from aligntune.compare import gradients

A = {"1/x": np.array([3.0, 4.0]), "1/y": np.array([1.0, 0.0]), "3/x": np.array([1.0, 1.0]), "1/only_a": np.ones(2)}
B = {"1/x": np.array([6.0, 8.0]), "1/y": np.array([0.0, 2.0]), "3/x": np.array([1.0, 2.0])}
ORACLE = {"1/x": np.array([3.0, 0.0]), "1/y": np.array([1.0, 0.0])}


def norms(found: dict[str, np.ndarray]) -> dict[str, Any]:
    return {"norms": {name: float(np.linalg.norm(value)) for name, value in found.items()}}


def test_distance_and_angle() -> None:
    assert gradients.relative(np.array([3.0, 0.0]), np.array([0.0, 4.0])) == pytest.approx(5 / 4)
    assert gradients.relative(np.zeros(2), np.zeros(2)) == 0 and gradients.relative(np.ones(2), np.zeros(2)) == math.inf
    assert gradients.cosine(np.array([3.0, 4.0]), np.array([0.0, 2.0])) == pytest.approx(0.8)
    assert gradients.cosine(np.array([3.0, 4.0]), np.array([-6.0, -8.0])) == pytest.approx(-1)
    assert gradients.cosine(np.zeros(2), np.ones(2)) is None


def test_a_row_a_parameter_of_the_step() -> None:
    loaded = {"a": A, "b": B, "oracle": ORACLE, "y1": {"1/x": np.array([3.0, 3.0])}}
    x, y = gradients.parameter_table(1, norms(A), norms(B), {}, loaded)
    assert (x["name"], y["name"], x["step"]) == ("x", "y", 1)
    assert (x["norm_a"], x["norm_b"], x["norm_ratio"]) == (5.0, 10.0, 2.0)
    assert x["cosine"] == pytest.approx(1) and x["relative"] == pytest.approx(1) and y["cosine"] == 0
    assert x["error_a"] == pytest.approx(4 / 3) and x["error_b"] == pytest.approx(math.hypot(3, 8) / 3)
    assert x["error_y1"] == pytest.approx(1) and x["error_y2"] is None and y["error_y1"] is None
    (later,) = gradients.parameter_table(3, norms(A), norms(B), {}, {"a": A, "b": B})
    assert later["name"] == "x" and later["relative"] == pytest.approx(1 / math.sqrt(2)) and later["error_a"] is None
    dead = gradients.parameter_table(1, {"norms": {}}, norms(B), {}, {"a": A, "b": B})[0]
    assert dead["norm_a"] == 0 and dead["norm_ratio"] is None


def test_the_gradient_as_one_vector() -> None:
    found = gradients.whole(1, {"a": A, "b": B, "oracle": ORACLE, "y1": {"1/x": np.ones(2)}})
    assert found["parameters"] == 2 and found["relative"] == pytest.approx(math.sqrt((25 + 5) / 26))
    assert found["cosine"] == pytest.approx(50 / math.sqrt(26 * 104))
    assert found["error_a"] == pytest.approx(4 / math.sqrt(10))
    assert found["error_b"] == pytest.approx(math.sqrt((9 + 64 + 1 + 4) / 10)) and found["error_y1"] is None
    assert gradients.whole(2, {"a": A, "b": B}) == {} and gradients.whole(3, {"a": A, "b": B})["error_a"] is None


def test_the_worst_are_the_furthest_of_those_that_are_not_0_in_both() -> None:
    rows = [{"name": str(n), "relative": float(n), "norm_a": 1.0, "norm_b": float(n % 2)} for n in range(14)]
    rows.append({"name": "dead", "relative": 99.0, "norm_a": 0.0, "norm_b": 0.0})
    assert [row["name"] for row in gradients.worst(rows, 3)] == ["13", "12", "11"]
    assert len(gradients.worst(rows)) == 10


def test_what_a_run_kept(tmp_path: Path) -> None:
    assert gradients.load({"folder": str(tmp_path)}) == {}
    save_file({"3/x": np.ones(2, np.float32), "1/x": np.zeros(2, np.float32)}, tmp_path / "gradients.safetensors")
    found = gradients.load({"folder": str(tmp_path)})
    assert found["3/x"].dtype == np.float64 and gradients.steps_in(found) == [1, 3]
