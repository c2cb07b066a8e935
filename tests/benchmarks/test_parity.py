"""The bounds of `benchmarks.parity` on made-up runs, and the committed figures."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import parity, tables

RESULTS = tables.RESULTS / "parity.json"


def noise(size: float, seed: int, steps: int = 100) -> torch.Tensor:
    return size * torch.randn(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def trl() -> list[torch.Tensor]:
    return [5 - torch.linspace(0, 1, 100, dtype=torch.float64)]


def test_rounding_is_within_the_yardstick_and_a_drift_is_not(trl):
    other = [trl[0] + noise(1e-6, 1)]
    near, drifting = [trl[0] + noise(1e-6, 2)], [trl[0] + noise(1e-6, 2) + 5e-7]
    assert parity.within_yardstick("x", trl, other, near)[0].holds
    largest, mean = parity.within_yardstick("x", trl, other, drifting)
    error = float((other[0] - trl[0]).pow(2).mean().sqrt()) / 10
    assert largest.holds and not mean.holds
    assert mean.bound == pytest.approx(2 * max(error, abs(float((other[0] - trl[0]).mean()))))
    centred = [other[0] - (other[0] - trl[0]).mean()]
    assert parity.within_yardstick("x", trl, centred, near)[1].holds, "a mean of 0 by luck is no bound"
    assert not parity.within_yardstick("x", trl, other, [trl[0] + noise(5e-6, 2)])[0].holds
    assert not any(check.holds for check in parity.within_yardstick("x", trl, trl, trl)), "two runs that are one"
    assert not parity.within_yardstick("x", trl, other, [trl[0] * float("nan")])[0].holds


def test_one_step_is_relative(trl):
    assert parity.first_loss("x", trl, [trl[0] * (1 + 9e-7)]).holds
    assert not parity.first_loss("x", trl, [trl[0] * (1 - 2e-6)]).holds


def test_distances_are_pooled_over_steps_and_seeds():
    truth = [torch.zeros(4, dtype=torch.float64)] * 2
    found = [torch.tensor([3.0, 0, 0, 0]).double(), torch.tensor([0, 0, 0, 4.0]).double()]
    check = parity.distance("x", truth, [one / 2 for one in found], found, 1.25)
    assert check.value == pytest.approx((25 / 8) ** 0.5) and check.own == pytest.approx(check.value / 2)
    assert not check.holds and parity.distance("x", truth, found, found, 1.25).holds


def test_the_worst_parameter_is_named():
    true = {"a": torch.ones(10_000).double(), "b": torch.ones(10_000).double()}
    own = {"a": true["a"] * 1.01, "b": true["b"] * 1.02}
    found = {"a": true["a"] * 1.013, "b": true["b"] * 1.02}
    first, second = parity.gradients_apart("x", [true], [own], [found])
    assert "of a" in first.what and not first.holds and second.holds
    assert first.value == pytest.approx(0.013) and first.own == pytest.approx(0.01)
    assert first.bound == pytest.approx(1.25 * 0.01 * 1.03), "three standard deviations of a ratio over 10,000 numbers"
    with pytest.raises(AssertionError, match="gradient of a is 0"):
        parity.gradient_distances([true | {"a": torch.zeros(10_000)}], [found])


def test_the_table_shows_what_does_not_hold():
    checks = [parity.Check("sft", "x", 1e-3, 1e-3, 2e-3, 100, 2), parity.Check("sft", "y", 3e-6, None, 1e-6, 1, 2)]
    report = {"rows": [{**asdict(check), "holds": check.holds} for check in checks], "fell": [6.0, 5.0],
              "device": "card", "versions": {}, "commit": "c" * 40, "command": "x"}  # fmt: skip
    lines = tables.parity(report).splitlines()
    assert lines[2].endswith("| 1.0e-03 | 1.0e-03 | 2.0e-03 | yes |") and lines[3].endswith("| - | 1.0e-06 | **no** |")
    assert "fell from 6.00 to 5.00" in lines[5]
    report["rows"][0]["what"] = "max |loss difference|"
    assert r"| max \|loss difference\| |" in tables.parity(report), "a bar within a cell would end it"


@pytest.mark.skipif(not RESULTS.exists(), reason="not measured yet")
def test_the_committed_figures_hold():
    report = json.loads(RESULTS.read_text())
    rows = report["rows"]
    assert all(row["holds"] and row["value"] <= row["bound"] for row in rows)
    assert {row["part"].partition(",")[0] for row in rows} == {"sft", *parity.ONLINE}
    assert {row["steps"] for row in rows if "fp8" in row["part"]} == {300}
    assert min(row["steps"] for row in rows if "max |loss" in row["what"] and "sft" in row["part"]) >= 100
    assert min(row["steps"] for row in rows if "forced" in row["part"]) >= 50
    assert report["fell"][0] - report["fell"][1] > 0.3, "nothing was learnt"
    assert {len(run) for run in report["losses"]["fast-fp8"]} == {300}
    assert {row["seeds"] for row in rows if "fp8" in row["part"]} == {len(report["losses"]["fast-fp8"])}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["sft", "grpo,ppo"])
def test_toy_runs_end_to_end(part, tmp_path):
    """Three steps judge nothing, and their bounds are not asserted: the command runs, and one step is one step."""
    path = tmp_path / "parity.json"
    parity.main(["--device", "cpu", "--steps", "3", "--seeds", "1", "--learn-seeds", "1", "--parts", part,
                 "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == (8 if part == "sft" else 4) and all(row["value"] >= 0 for row in rows)
    if part == "sft":
        assert rows[0]["holds"], rows[0]
