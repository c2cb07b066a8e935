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


def test_the_last_bit_of_two_runs_is_no_bound():
    """KTO's: losses near 0.5, where fp32 rounds to 6e-8, and two trl runs that differ in it now and then."""
    trl, bit = [torch.full((30,), 0.5, dtype=torch.float64)], 2.0**-24
    other, near = [trl[0].clone()], [trl[0].clone()]
    other[0][3] += bit
    near[0][::4] += bit * torch.tensor([3.0, -3, 1, -1, 3, -2, -1, 0])
    assert all(check.holds for check in parity.within_yardstick("x", trl, other, near))
    near[0][5] += 9 * bit
    assert [check.holds for check in parity.within_yardstick("x", trl, other, near)] == [False, True]
    assert [check.holds for check in parity.within_yardstick("x", trl, other, [trl[0] + bit])] == [True, False]
    # A loss of 5 is rounded to ten times that.
    assert parity.within_yardstick("x", [10 * trl[0]], [10 * other[0]], [10 * trl[0]])[0].own == 2 * 5 * 2.0**-23


def test_one_step_is_relative(trl):
    assert parity.first_loss("x", trl, [trl[0] * (1 + 9e-7)]).holds
    assert not parity.first_loss("x", trl, [trl[0] * (1 - 2e-6)]).holds


def test_distances_are_pooled_over_steps_and_seeds():
    truth = [torch.zeros(4, dtype=torch.float64)] * 2
    found = [torch.tensor([3.0, 0, 0, 0]).double(), torch.tensor([0, 0, 0, 4.0]).double()]
    check = parity.distance("x", truth, [one / 2 for one in found], found, 1.25)
    assert check.value == pytest.approx((25 / 8) ** 0.5) and check.own == pytest.approx(check.value / 2)
    assert not check.holds and parity.distance("x", truth, found, found, 1.25).holds
    assert parity.distance("x", truth, found, found, 1.25, "against y").what == f"{check.what}, against y"


def test_a_ratio_s_interval_is_of_the_seeds():
    even = parity.pooled("x", [1.0] * 8, [1.5] * 8, 1.5, steps=100, whose="against y")
    assert even.interval == pytest.approx((1.5, 1.5)) and even.holds and even.what.endswith(", against y")
    # Seeds of which some are far off for both: drawn together, they leave the ratio where it is.
    own = [1.0, 1.0, 1.0, 20.0]
    assert parity.pooled("x", own, [2 * one for one in own], 1.5, steps=1, whose="").interval == pytest.approx((2, 2))
    few, many = (parity.pooled("x", [1.0, 1.0] * n, [1.0, 2.0] * n, 1.5, steps=1, whose="") for n in (2, 32))
    assert few.value == many.value == pytest.approx(2.5**0.5) and not few.holds
    for check in (few, many):
        low, high = check.interval
        assert 1 <= low < check.value < high <= 2
    assert few.interval[1] - few.interval[0] > 3 * (many.interval[1] - many.interval[0])
    assert parity.pooled("x", [1.0], [1.0], 1.5, steps=1, whose="").interval is None


def test_an_online_method_s_runs_may_not_be_chaotic(monkeypatch, trl):
    """Two trl runs 1e-6 apart beside 1e-3 of bf16; then 3e-4, within whose twice fast would hold."""
    low = trl[0] + noise(1e-3, 3)

    def checks(size: float) -> list[parity.Check]:
        found = [trl[0] + noise(size, 2), trl[0], trl[0] + noise(size, 1), low]
        monkeypatch.setattr(parity, "_held_job", lambda job: found)
        return parity.rl_checks("", steps=100, algorithms=["dr_grpo", "dpo"], say=lambda line: None)

    quiet, chaotic = checks(1e-6), checks(3e-4)
    assert [check.part for check in quiet] == [
        *["dr_grpo, fp32, forced rollouts"] * 2, "dr_grpo, two trl runs in fp32", *["dpo, fp32"] * 2,
        "dpo, two trl runs in fp32"]
    assert all(check.holds for check in quiet)
    assert [check.part for check in chaotic if not check.holds] == [
        "dr_grpo, two trl runs in fp32", "dpo, two trl runs in fp32"]
    assert quiet[2].bound == pytest.approx(0.1 * float((low - trl[0]).pow(2).mean().sqrt()))


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
    assert lines[2].endswith("| 1.0e-03 | 1.0e-03 | 1.00 | 2.0e-03 | yes |")
    assert lines[3].endswith("| - | - | 1.0e-06 | **no** |")
    assert "fell from 6.00 to 5.00" in lines[-1]
    report["rows"][0]["interval"] = [0.8, 1.4]
    assert "| 1.00 [0.80, 1.40] |" in tables.parity(report)
    # What this run has no row of is said to be missing.
    names = ", ".join(parity.PARTS)
    for what in ("fp32", "two trl runs in fp32"):
        assert f"| {names}: {what} | not measured yet |" in tables.parity(report)
    report["rows"][0]["part"] = "sft, fp32"
    assert f"| {names.removeprefix('sft, ')}: fp32 | not measured yet |" in tables.parity(report)
    assert f"| {names}: two trl runs in fp32 | not measured yet |" in tables.parity(report)
    report["rows"][0]["what"] = "max |loss difference|"
    assert r"| max \|loss difference\| |" in tables.parity(report), "a bar within a cell would end it"


@pytest.mark.skipif(not RESULTS.exists(), reason="not measured yet")
def test_the_committed_figures_hold():
    report = json.loads(RESULTS.read_text())
    rows = report["rows"]
    assert all(row["holds"] is (row["value"] <= row["bound"]) for row in rows)
    # Of an e4m3 base the table says what is beyond its bound; of all else nothing may be.
    assert all(row["holds"] for row in rows if "fp8" not in row["part"])
    assert {"sft", "grpo", "ppo"} <= {row["part"].partition(",")[0] for row in rows} <= set(parity.PARTS)
    assert {row["steps"] for row in rows if "fp8" in row["part"]} == {300}
    assert min(row["steps"] for row in rows if "max |loss" in row["what"] and "sft" in row["part"]) >= 100
    assert min(row["steps"] for row in rows if "forced" in row["part"]) >= 50
    assert report["fell"][0] - report["fell"][1] > 0.3, "nothing was learnt"
    assert {len(run) for run in report["losses"]["fast-fp8"]} == {300}
    for row, backend in zip((row for row in rows if "fp8" in row["part"]), ("trl", "fast"), strict=True):
        found = parity.pooled(row["part"], report["apart"][f"{backend}-bf16"], report["apart"]["fast-fp8"], parity.FP8,
                              steps=300, whose=f"against bf16 on {backend}")
        assert (row["what"], row["holds"]) == (found.what, found.holds)
        assert [row["value"], row["bound"], *row["interval"]] == pytest.approx([
            found.value, found.bound, *found.interval], rel=1e-9)
        assert row["seeds"] == len(report["losses"]["fast-fp8"]) >= 4


def test_an_array_of_numbers_is_one_line():
    found = {"losses": {"a": [[1.0, -2e-06], [None, 3]]}, "name": "[1, 2]", "none": [], "kept": ["a [", "b ]"]}
    text = parity.written(found)
    assert json.loads(text) == found
    assert "\n   [1.0, -2e-06],\n   [null, 3]\n  ]\n" in text
    assert RESULTS.read_text() == parity.written(json.loads(RESULTS.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["sft", "grpo,ppo", "dpo"])
def test_toy_runs_end_to_end(part, tmp_path):
    """Three steps judge nothing, and their bounds are not asserted: the command runs, and one step is one step."""
    path = tmp_path / "parity.json"
    parity.main(["--device", "cpu", "--steps", "3", "--seeds", "1", "--learn-seeds", "1", "--parts", part,
                 "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == {"sft": 9, "grpo,ppo": 6, "dpo": 3}[part] and all(row["value"] >= 0 for row in rows)
    if part == "sft":
        assert rows[0]["holds"], rows[0]
