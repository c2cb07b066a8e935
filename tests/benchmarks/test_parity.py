"""The bounds of `benchmarks.parity` on made-up runs, and the committed figures."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aligntune.core.resolve import resolve
from benchmarks import bounds, jobs, parity, parity_parts, parity_runs, tables
from benchmarks.parity_parts import (
    ARMS,
    JUDGED,
    ONLINE,
    OPTIONS,
    PARTS,
    PREFERENCE,
    PROMPTS,
    SFT,
    TRUE_LOSS,
    Job,
    Plan,
    algorithm_of,
)
from benchmarks.parity_runs import Ran

RESULTS = tables.RESULTS / "parity.json"


def noise(size: float, seed: int, steps: int = 100) -> torch.Tensor:
    return size * torch.randn(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def trl() -> list[torch.Tensor]:
    return [5 - torch.linspace(0, 1, 100, dtype=torch.float64)]


def test_rounding_is_within_the_yardstick_and_a_drift_is_not(trl):
    other = [trl[0] + noise(1e-6, 1)]
    near, drifting = [trl[0] + noise(1e-6, 2)], [trl[0] + noise(1e-6, 2) + 5e-7]
    assert bounds.within_yardstick("x", trl, other, near)[0].holds
    largest, mean = bounds.within_yardstick("x", trl, other, drifting)
    error = float((other[0] - trl[0]).pow(2).mean().sqrt()) / 10
    assert largest.holds and not mean.holds
    assert largest.raw is None and largest.own == float((other[0] - trl[0]).abs().max())
    assert mean.bound == pytest.approx(2 * max(error, abs(float((other[0] - trl[0]).mean()))))
    centred = [other[0] - (other[0] - trl[0]).mean()]
    assert bounds.within_yardstick("x", trl, centred, near)[1].holds, "a mean of 0 by luck is no bound"
    assert not bounds.within_yardstick("x", trl, other, [trl[0] + noise(5e-6, 2)])[0].holds
    assert not any(check.holds for check in bounds.within_yardstick("x", trl, trl, trl)), "two runs that are one"
    assert not bounds.within_yardstick("x", trl, other, [trl[0] * float("nan")])[0].holds


def test_the_last_bit_of_two_runs_is_no_bound():
    """KTO's: losses near 0.5, where fp32 rounds to 6e-8, and two trl runs that differ in it now and then."""
    trl, bit = [torch.full((30,), 0.5, dtype=torch.float64)], 2.0**-24
    other, near = [trl[0].clone()], [trl[0].clone()]
    other[0][3] += bit
    near[0][::4] += bit * torch.tensor([3.0, -3, 1, -1, 3, -2, -1, 0])
    largest, mean = bounds.within_yardstick("x", trl, other, near)
    assert largest.holds and mean.holds
    assert largest.own == 2 * 2.0**-23 and largest.raw == bit and mean.raw < mean.own
    assert mean.raw == pytest.approx(bit / 30)
    own = f"{largest.own:.1e} ({bit:.1e})"
    assert f"| {own} |" in tables.parity({"rows": [asdict(largest) | {"holds": True}], "device": "x", "commit": "c",
                                          "command": "x", "versions": {}})
    near[0][5] += 9 * bit
    assert [check.holds for check in bounds.within_yardstick("x", trl, other, near)] == [False, True]
    assert [check.holds for check in bounds.within_yardstick("x", trl, other, [trl[0] + bit])] == [True, False]
    # A loss of 5 is rounded to ten times that.
    assert bounds.within_yardstick("x", [10 * trl[0]], [10 * other[0]], [10 * trl[0]])[0].own == 2 * 5 * 2.0**-23


def test_one_step_is_relative(trl):
    assert bounds.first_loss("x", trl, [trl[0] * (1 + 9e-7)], bounds.FIRST).holds
    assert not bounds.first_loss("x", trl, [trl[0] * (1 - 2e-6)], bounds.FIRST).holds


def test_distances_are_pooled_over_steps_and_seeds():
    truth = [torch.zeros(4, dtype=torch.float64)] * 2
    found = [torch.tensor([3.0, 0, 0, 0]).double(), torch.tensor([0, 0, 0, 4.0]).double()]
    check = bounds.distance("x", truth, [one / 2 for one in found], found, 1.25)
    assert check.value == pytest.approx((25 / 8) ** 0.5) and check.own == pytest.approx(check.value / 2)
    assert not check.holds and bounds.distance("x", truth, found, found, 1.25).holds
    assert bounds.distance("x", truth, found, found, 1.25, "against y").what == f"{check.what}, against y"


def test_a_ratio_s_interval_is_of_the_seeds():
    even = bounds.pooled("x", [1.0] * 8, [1.5] * 8, 1.5, steps=100, what="against y")
    assert even.interval == pytest.approx((1.5, 1.5)) and even.holds and even.what == "against y"
    # Seeds of which some are far off for both: drawn together, they leave the ratio where it is.
    own = [1.0, 1.0, 1.0, 20.0]
    assert bounds.pooled("x", own, [2 * one for one in own], 1.5, steps=1).interval == pytest.approx((2, 2))
    few, many = (bounds.pooled("x", [1.0, 1.0] * n, [1.0, 2.0] * n, 1.5, steps=1) for n in (2, 32))
    assert few.value == many.value == pytest.approx(2.5**0.5) and not few.holds
    for check in (few, many):
        low, high = check.interval
        assert 1 <= low < check.value < high <= 2
    assert few.interval[1] - few.interval[0] > 3 * (many.interval[1] - many.interval[0])
    assert bounds.pooled("x", [1.0], [1.0], 1.5, steps=1).interval is None


def ran(*losses: torch.Tensor, layout: str = "", keys: tuple[str, ...] = ("loss",), gradient: Any = None) -> Ran:
    return Ran(dict(zip(keys, losses, strict=True)), gradient or {}, layout)


def made_up(plan: Plan, part: str, loss_of: Any, apart: Any = None) -> tuple[list[bounds.Check], Any]:
    """`judged` of runs whose losses are `loss_of(arm, seed)`, and of gradients that are `apart`."""
    def later(job: Job) -> Any:
        return lambda: apart if job.still else [ran(*loss_of(name, job.seed)[:, :job.steps],
                                                    keys=JUDGED.get(algorithm_of(part), ("loss",)),
                                                    layout=f"of {name}",
                                                    gradient={"w": torch.ones(9) + 0.1 * ("bf16" in name)})
                                                for name in job.arms]

    return parity.judged(part, {job: later(job) for job in plan.jobs(part)}, plan, lambda line: None)


def apart(found: float, batches: int = 8) -> bounds.Apart:
    return bounds.Apart([{"a": 0.01, "b": 0.02}] * batches, [{"a": 0.01, "b": found}] * batches)


def losses(sizes: dict[str, float]) -> Any:
    """Losses that are `sizes` apart from trl's in fp32; seeds and arms differ."""
    true = 5 - torch.linspace(0, 1, 300, dtype=torch.float64)
    return lambda name, seed: (true + noise(sizes.get(name, 0.0), sum(map(ord, name)) + 1000 * seed, 300))[None]


QUIET = {"trl-eager": 1e-6, "fast": 1e-6, "trl-bf16": 1e-3, "fast-bf16": 1e-3, "fast-fp8": 1e-3}


@pytest.mark.parametrize(("part", "forced"), [("dr_grpo", ", forced rollouts"), ("dpo", "")])
def test_what_is_asked_of_a_method(part, forced):
    """Each fails alone: fp32 beyond the yardstick, losses or gradients in bf16 beyond trl's, two chaotic runs."""
    plan = Plan("", 300, 3)

    def fails(apart_=0.02, **sizes: float) -> list[str]:
        checks, _ = made_up(plan, part, losses(QUIET | sizes), apart(apart_))
        assert [check.part for check in checks] == [
            *[f"{part}, fp32{forced}"] * 2, *[f"{part}, bf16{forced}"] * 2, f"{part}, two trl runs in fp32"]
        assert [check.seeds for check in checks] == [3] * 5 and checks[0].steps == 50 and checks[3].steps == 8
        return [f"{check.part}: {check.what}" for check in checks if not check.holds]

    assert not fails()
    assert fails(fast=1e-5)[0] == f"{part}, fp32{forced}: max |loss difference|"
    assert fails(**{"fast-bf16": 4e-3}) == [f"{part}, bf16{forced}: rms of loss - fp32 loss"]
    # Twice as far is what online methods' seeds differ by themselves.
    assert bool(fails(**{"fast-bf16": 1.6e-3})) is (part == "dpo")
    assert fails(0.026) == [f"{part}, bf16{forced}: gradient of b, mean of batches"]
    assert fails(**{"trl-eager": 3e-4, "fast": 3e-4}) == [f"{part}, two trl runs in fp32: rms of loss - fp32 loss"]


def test_ppo_is_judged_by_both_its_losses():
    small = losses(QUIET)

    def both(name: str, seed: int) -> torch.Tensor:
        policy, value = small(name, seed), 20 * small(name, seed + 9)
        return torch.cat([policy, value + (name == "fast") * 1e-3])

    checks, _ = made_up(Plan("", 50, 2), "ppo", both, apart(0.02))
    whats = [check.what for check in checks]
    assert whats[:4] == ["max |loss difference|, loss/policy_avg", "|mean signed difference|, loss/policy_avg",
                         "max |loss difference|, loss/value_avg", "|mean signed difference|, loss/value_avg"]
    assert [what.rpartition(", ")[2] for what in whats[4:6]] == [what.rpartition(", ")[2] for what in whats[7:]] == [
        "loss/policy_avg", "loss/value_avg"]
    assert {what for what, check in zip(whats, checks, strict=True) if not check.holds} == set(whats[2:4])


def test_sft_s_parts(monkeypatch):
    """All have a first loss, yardsticks and gradients; the first alone has runs that learn, and fp8."""
    plan = Plan("", 300, 2, 3, 5)
    for part in SFT:
        checks, more = made_up(plan, part, losses(QUIET))
        told = [(check.part.removeprefix(f"{part}, "), check.what, check.steps, check.seeds) for check in checks]
        assert told[:5] == [("fp32", "loss of one step, relative", 1, 2), ("fp32", "max |loss difference|", 100, 2),
                            ("fp32", "|mean signed difference|", 100, 2), ("bf16", bounds.LOSS, 100, 5),
                            ("bf16", "first-step gradient of w", 1, 5)]
        assert more["layouts"]["fast-bf16"] == "of fast-bf16"
        if part == "sft":
            assert [one[0] for one in told[5:]] == ["bf16", "fp8 base", "fp8 base", "two trl runs in fp32"]
            assert {one[2:] for one in told[5:8]} == {(300, 3)} and told[8][2:] == (300, 1)
            assert len(more["losses"]["fast-fp8"]) == len(more["losses"]["trl"]) == 3
            assert len(more["losses"]["fast"]) == 2 and {len(run) for run in more["losses"]["trl"]} == {300}
        else:
            assert told[5:] == [("two trl runs in fp32", bounds.LOSS, 100, 2)] and set(more) == {"layouts"}
    options = {part: plan.jobs(part)[0].options for part in SFT}
    assert options["sft-full"]["use_peft"] is False and options["sft-nf4"] == {"quantization": "nf4"}


def test_all_seeds_have_the_same_arms_and_what_shares_rollouts_is_one_job():
    plan = Plan("", 300, 2, 3, 5)
    for part in PARTS:
        found = [(name, job.seed, job.steps) for job in plan.jobs(part) if not job.still for name in job.arms]
        assert len(set(found)) == len(found)
        short = {(name, seed) for name, seed, _ in found if seed <= 2}
        assert {(name, seed) for name in parity_parts.HELD for seed in (1, 2)} <= short
        assert [job.seed for job in plan.jobs(part) if job.still] == ([] if part in SFT else [1, 2])
        assert all(len(job.arms) == (5 if part in ONLINE else 1) for job in plan.jobs(part) if not job.still)
    still = [job.arms for part in ("grpo", "dpo") for job in plan.jobs(part) if job.still]
    assert still[0][0] == "fast" and set(still[-1]) == {"trl", "trl-bf16", "fast-bf16"}


@pytest.mark.parametrize(("part", "arms", "seeds"), [("grpo-sapo", 4, [1, 2]), ("dpo-js", 1, [1])])
def test_of_a_method_s_options_few_runs_decide(part, arms, seeds):
    """One seed of the yardstick and of trl in bf16, which tells that it is quiet; gradients of 32 batches."""
    plan = Plan("", 300, 3)
    found = plan.jobs(part)
    short = [job for job in found if not job.still]
    assert sorted(name for job in short for name in job.arms) == ["fast", "trl", "trl-bf16", "trl-eager"]
    assert {(job.seed, job.steps, len(job.arms)) for job in short} == {(1, 50, arms)}
    assert [job.seed for job in found if job.still] == seeds
    assert all(job.options == OPTIONS[part][1] for job in found)

    def fails(apart_: float = 0.02, **sizes: float) -> list[str]:
        checks, _ = made_up(plan, part, losses(QUIET | sizes), apart(apart_))
        assert [check.seeds for check in checks] == [1, 1, len(seeds), 1]
        return [f"{check.part.partition(', ')[2]}: {check.what}" for check in checks if not check.holds]

    told = ", forced rollouts" if arms > 1 else ""
    assert not fails()
    assert fails(fast=1e-5)[0] == f"fp32{told}: max |loss difference|"
    assert fails(0.026) == [f"bf16{told}: gradient of b, mean of batches"]
    assert fails(**{"trl-eager": 3e-4, "fast": 3e-4}) == ["two trl runs in fp32: rms of loss - fp32 loss"]
    more = replace(plan, option_seeds=4).jobs(part)
    assert sorted({job.seed for job in more if not job.still}) == [1, 2, 3, 4]
    assert [job.seed for job in more if job.still] == [*range(1, 4 * len(seeds) + 1)]


@pytest.mark.parametrize("asked", [["--again", "4"], ["--again", "1"]], ids=" ".join)
def test_where_one_seed_of_options_keeps_no_bound_several_decide(asked, monkeypatch, tmp_path, capsys):
    """Of three runs one is off, one at the first seed, whose two trl runs are near one another, and one not."""
    begun: list[tuple[str, int]] = []

    def done(job: Job) -> Any:
        begun.append((job.part, job.seed))
        off = {"dpo-js": {"fast": 1e-5}, "kto-weights": {"trl-eager": 2e-7} if job.seed == 1 else {}}
        sizes = losses(QUIET | {"trl-fp64": 1e-4} | off.get(job.part, {}))
        return apart(0.02) if job.still else [ran(sizes(name, job.seed)[0, :job.steps]) for name in job.arms]

    monkeypatch.setattr(parity, "done", done)
    monkeypatch.setattr(parity, "write_model", str)
    path = tmp_path / "found.json"
    parts = "dpo-hinge,dpo-js,kto-weights"
    parity.main(["--parts", parts, "--json", str(path), "--device", "cpu", "--commit", "c" * 40, *asked])
    report, several = json.loads(path.read_text()), int(asked[1])
    seeds = {row["part"].partition(",")[0]: row["seeds"] for row in report["rows"] if "max |loss" in row["what"]}
    assert seeds == {"dpo-hinge": 1, "dpo-js": several, "kto-weights": several}
    assert {part for part, seed in begun if seed > 1} == ({"dpo-js", "kto-weights"} if several > 1 else set())
    kept = {row["part"].partition(",")[0] for row in report["rows"]} - {
        row["part"].partition(",")[0] for row in report["rows"] if not row["holds"]}
    assert kept == ({"dpo-hinge", "kto-weights"} if several > 1 else {"dpo-hinge"})
    true = {row["part"] for row in report["rows"] if TRUE_LOSS in row["what"]}
    assert true == ({"dpo-js, fp32", "kto-weights, fp32"} if several > 1 else set())
    assert len(report["rows"]) == 4 * 3 + 2 * len(true) and set(report["layouts"]) == set(seeds)
    assert ("again, over 4 seeds: dpo-js, kto-weights" in capsys.readouterr().out) is (several > 1)


def test_options_are_asked_for_by_name(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(parity, "write_model", str)
    monkeypatch.setattr(parity, "judged", lambda part, *_: asked.append(part) or ([], {"layouts": {}}))
    for parts, expected in (("options", [*OPTIONS]), ("dpo-js,grpo", ["grpo", "dpo-js"]),
                            ("dpo,options", ["dpo", *OPTIONS])):
        assert parity.main(["--device", "cpu", "--parts", parts]) == 0 and asked == expected
        asked.clear()
    parity.main(["--device", "cpu"])
    assert asked == [*PARTS]
    with pytest.raises(SystemExit):
        parity.main(["--parts", "grpo-none"])


def test_options_are_those_of_their_method():
    """Each gets through the checks of a job, changes something, and no two are the same."""
    assert len({str(one) for one in OPTIONS.values()}) == len(OPTIONS)
    for name, (algorithm, options) in OPTIONS.items():
        assert name.partition("-")[0] == algorithm
        given = {"model_name": "x", "dataset_name": "y", "algorithm": algorithm, "backend": "fast",
                 "reward_functions": ["math"] if algorithm in ONLINE else None,
                 "num_generations": 4, **(ONLINE | PREFERENCE)[algorithm]}
        if algorithm not in ONLINE:
            given = {name: value for name, value in given.items() if value is not None and name != "num_generations"}
        plain, found = (vars(resolve(one).options) for one in (given, {**given, **options}))
        assert {name for name in found if found[name] != plain.get(name)} >= set(options), name


def test_the_gradients_of_batches_are_a_mean_that_one_batch_does_not_decide():
    one = apart(0.022)
    check = bounds.gradient_over_batches("x", [one, one])
    assert "of b" in check.what and check.value == pytest.approx(0.022) and check.own == pytest.approx(0.02)
    assert check.bound == pytest.approx(0.025) and check.holds and (check.steps, check.seeds) == (8, 2)
    assert check.interval == pytest.approx((1.1, 1.1))
    odd = bounds.Apart(one.own, [{"a": 0.01, "b": 0.6}, *one.found[1:]])
    moved = bounds.gradient_over_batches("x", [one, odd])
    assert moved.value / moved.own == pytest.approx(1.1 * (0.6 / 0.022) ** (1 / 16)) and moved.interval[0] < 1.25
    found = bounds.Apart.of([{"w": torch.ones(4)}] * 2, [{"w": torch.ones(4) * 1.1}] * 2,
                            [{"w": torch.ones(4) * 0.8}, {"w": torch.ones(4)}])
    assert [batch["w"] for batch in (*found.own, *found.found)] == pytest.approx([0.1, 0.1, 0.2, 0.0], abs=1e-6)


def sized(size: float, **more: Any) -> Job:
    return Job("dpo", ("trl",), 1, int(size), "", None, more)


class Pool:
    """An executor that runs what it is given at once, and keeps the order."""

    def __init__(self) -> None:
        self.begun: list[int] = []

    def submit(self, work: Any, function: Any, job: Job) -> Future:
        self.begun.append(job.steps)
        future: Future = Future()
        future.set_result(work(function, job))
        return future


def fail_at_two(job: Job) -> list[int]:
    if job.steps == 2:
        raise RuntimeError("the card is full\nat length")
    return [job.steps]


def test_a_pool_begins_with_the_longest_and_a_failure_is_its_job_s_alone(capsys):
    pool, given = Pool(), [sized(1), sized(2), sized(3)]
    found = jobs.begun(fail_at_two, given, pool)  # type: ignore[arg-type]
    assert pool.begun == [3, 2, 1]
    assert [found[job]() for job in (given[0], given[2])] == [[1], [3]]
    with pytest.raises(jobs.JobFailedError, match="^trl, seed 1: RuntimeError: the card is full$"):
        found[given[1]]()
    assert "fail_at_two" in capsys.readouterr().err, "where it failed is printed"
    # Without a pool nothing runs before it is asked for.
    with pytest.raises(RuntimeError, match="full"):
        jobs.begun(fail_at_two, given, None)[given[1]]()
    with pytest.raises(KeyboardInterrupt), jobs.Attempt():
        raise KeyboardInterrupt


def test_a_part_that_fails_is_a_row_and_the_others_are_written(monkeypatch, tmp_path, capsys):
    def done(job: Job) -> Any:
        if job.part == "kto" and "trl-eager" in job.arms:
            raise MemoryError("no room")
        sizes = losses(QUIET)
        return apart(0.02) if job.still else [ran(sizes(name, job.seed)[0, :job.steps]) for name in job.arms]

    monkeypatch.setattr(parity, "done", done)
    monkeypatch.setattr(parity, "write_model", str)
    path = tmp_path / "found.json"
    assert parity.main(["--parts", "kto,dpo", "--json", str(path), "--device", "cpu", "--commit", "c" * 40]) == 1
    report = json.loads(path.read_text())
    assert report["rows"][-1] == {"part": "kto", "failed": "MemoryError: no room", "holds": False}
    assert len(report["rows"]) == 6 and all(row["holds"] for row in report["rows"][:5])
    table = tables.parity(report)
    assert "| kto | failed: MemoryError: no room | - | - | - | - | - | - | **no** |" in table
    assert "kto" not in next(line for line in table.splitlines() if ": bf16 | not measured" in line)
    assert "fell" not in table, "the runs that learn were not asked for"
    assert "kto: failed: MemoryError: no room" in capsys.readouterr().out
    assert parity.main(["--parts", "dpo", "--device", "cpu"]) == 0


def test_parts_are_measured_in_turn_and_the_file_keeps_the_others(monkeypatch, tmp_path):
    """Each part is in the file as soon as it is judged, with the command and commit that measured it."""
    path, sizes, seen = tmp_path / "found.json", losses(QUIET), []

    def done(job: Job) -> Any:
        seen.append({row["part"].partition(",")[0] for row in json.loads(path.read_text())["rows"]}
                    if path.is_file() else set())
        if job.part == "orpo":
            raise MemoryError("no room")
        return apart(0.02) if job.still else [
            ran(sizes(name, job.seed)[0, :job.steps], layout=f"of {name}",
                gradient={"w": torch.ones(9) + 0.1 * ("16" in name) + 0.2 * ("8" in name)}) for name in job.arms]

    def run(parts: str, at: str) -> dict[str, Any]:
        seen.clear()
        parity.main(["--parts", parts, "--json", str(path), "--device", "cpu", "--commit", at * 40,
                     "--learn-seeds", "2"])
        return json.loads(path.read_text())

    monkeypatch.setattr(parity, "done", done)
    monkeypatch.setattr(parity, "write_model", str)
    first = run("dpo,sft,kto", "a")
    assert seen[0] == set() and seen[-1] == {"sft", "dpo"} and "earlier" not in first
    assert [*first["layouts"]] == ["sft", "dpo", "kto"] and first["parameters"] == 1
    then = run("kto,orpo", "b")
    assert then["commit"] == "b" * 40 and "--parts kto,orpo" in then["command"]
    assert [(one["parts"], one["commit"][0], "--parts dpo,sft,kto" in one["command"]) for one in then["earlier"]] == [
        (["sft", "dpo"], "a", True)]
    assert [*dict.fromkeys(row["part"].partition(",")[0] for row in then["rows"])] == ["sft", "dpo", "kto", "orpo"]
    assert {name: then[name] for name in ("fell", "losses", "apart")} == {
        name: first[name] for name in ("fell", "losses", "apart")}
    last = run("dpo,orpo", "c")
    assert [(one["parts"], one["commit"][0]) for one in last["earlier"]] == [(["sft"], "a"), (["kto"], "b")]
    *_, now, gap, before, _, kto = tables.parity(last).splitlines()
    assert f"commit {'c' * 12}" in now and not gap
    assert before.startswith("sft: ") and f"commit {'a' * 12}" in before
    assert kto.startswith("kto: ") and f"commit {'b' * 12}" in kto
    assert "earlier" not in run("sft,dpo,kto,orpo", "d")
    assert not [*tmp_path.glob("*.part")]


def test_a_device_without_nf4_says_so_and_leaves_the_part_out(monkeypatch, capsys):
    asked: list[str] = []
    monkeypatch.setattr(parity, "write_model", str)
    monkeypatch.setattr(parity, "judged", lambda part, *_: asked.append(part) or ([], {"layouts": {}}))
    assert parity.no_nf4_because("cpu") is None
    monkeypatch.setattr(parity, "no_nf4_because", lambda device: "ImportError: no bitsandbytes")
    parity.main(["--device", "cpu"])
    assert asked == [part for part in PARTS if part != "sft-nf4"]
    assert "sft-nf4 is left out: ImportError: no bitsandbytes" in capsys.readouterr().out
    asked.clear()
    parity.main(["--device", "cpu", "--parts", "sft-nf4"])
    assert asked == ["sft-nf4"], "asked for by name it is tried"


def test_why_nf4_cannot_be_made(monkeypatch):
    import bitsandbytes.functional

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", refuse)
    assert parity.no_nf4_because("cpu") == "RuntimeError: no kernel"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return parity_runs.write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.mark.slow
def test_fp32_on_nf4_is_fp32_in_its_adapters(source):
    toy = {"batch_size": 2, "max_seq_length": 32, "max_samples": 4, "device": "cpu", "quantization": "nf4"}
    for name, dtype in (("trl", torch.float32), ("trl-bf16", torch.bfloat16)):
        _, (gradient,), run = parity_runs.sft(ARMS[name], source, "builtin:pydoc", steps=1, **toy)
        assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {dtype}
        assert len(gradient) == 42 and any("Linear4bit" in type(module).__name__ for module in run.model.modules())


def test_ppo_s_gradients_are_the_policy_s_and_the_value_head_s(source, monkeypatch):
    """The head is drawn: from one of 0 no gradient of a value reaches the policy."""
    heads = []
    started = parity_runs.FirstGradients.on_pre_optimizer_step

    def read(self: Any, *args: Any, **kwargs: Any) -> None:
        heads.append([float(p.detach().norm()) for p in self.critic.parameters()])
        started(self, *args, **kwargs)

    monkeypatch.setattr(parity_runs.FirstGradients, "on_pre_optimizer_step", read)
    ((gradients, run),) = parity_runs.forced("ppo", source, PROMPTS[:8], [ARMS["trl"]], steps=1, kept=1,
                                        max_completion_length=4, device="cpu")
    assert 0.2 < heads[0][0] < 0.5 and heads[0][1] > 0, "256 numbers of N(0, 0.02), and one"
    assert gradients[0]["critic"].shape == (257,) and len(gradients[0]) == 43
    assert all(len(parity_runs.losses_of(run, key)) == 1 for key in JUDGED["ppo"])


def test_arms_train_the_same_micro_batches(source):
    """TRL shuffles a rollout into them by the generator that the first arm has sampled with."""
    drew, given = parity_runs.forced("grpo", source, PROMPTS[:8], [ARMS["trl"]] * 2, steps=2,
                                max_completion_length=4, device="cpu", **parity_parts.HALVES)
    assert torch.equal(parity_runs.losses_of(drew[1]), parity_runs.losses_of(given[1]))


def test_of_tokens_that_rounding_tells_apart_the_first_arm_s_are_learnt_from():
    """And an arm in fp32 whose entropies are others is caught."""
    def choose(entropies: torch.Tensor, mask: torch.Tensor, threshold: float) -> torch.Tensor:
        return (entropies >= torch.quantile(entropies[mask.bool()], threshold)) & mask.bool()

    def arm(*, first: bool = False, exact: bool = True) -> Any:
        trainer = SimpleNamespace(get_high_entropy_mask=choose)
        parity_runs.choose_as_first(trainer, chosen, first=first, exact=exact)
        return trainer.get_high_entropy_mask

    chosen: list[torch.Tensor] = []
    mask, wanted = torch.tensor([[1, 1, 1, 1, 0]]), [[False, False, True, True, False]]
    near, swapped, apart = (torch.tensor([[1.0, a, b, 4.0, 9.0]]) for a, b in (
        (3.0, 3.00001), (3.00001, 3.0), (3.01, 3.0)))
    drew = arm(first=True)
    assert [drew(near, mask, 0.5).tolist(), drew(near.flip(1), mask.flip(1), 0.5).tolist()] == [
        wanted, [wanted[0][::-1]]]
    assert choose(swapped, mask, 0.5).tolist() != wanted, "left alone this arm would take the other of two"
    other = arm()
    assert [other(swapped, mask, 0.5).tolist(), other(near.flip(1), mask.flip(1), 0.5).tolist()] == [
        wanted, [wanted[0][::-1]]]
    with pytest.raises(AssertionError, match="tokens of another entropy"):
        arm()(apart, mask, 0.5)
    assert arm(exact=False)(apart, mask, 0.5).tolist() == wanted, "what bf16 would choose is not asked"


def test_the_tokens_of_a_quantile_are_given_to_all_arms(source, monkeypatch):
    asked: list[Any] = []
    begun = parity_runs.choose_as_first

    def begin(trainer: Any, chosen: list[torch.Tensor], **how: bool) -> None:
        begun(trainer, chosen, **how)
        asked.append((how, len(chosen)))

    monkeypatch.setattr(parity_runs, "choose_as_first", begin)
    arms = [ARMS["trl"], ARMS["trl"], ARMS["trl-bf16"]]
    run = partial(parity_runs.forced, "grpo", source, PROMPTS[:8], steps=2, max_completion_length=4,
                  device="cpu")
    run(arms[:1])
    assert not asked, "without a quantile all tokens are learnt from"
    run(arms, top_entropy_quantile=0.5)
    assert asked == [({"first": True, "exact": True}, 0), ({"first": False, "exact": True}, 2),
                     ({"first": False, "exact": False}, 2)]


def test_a_reward_model_s_head_is_drawn(source):
    """Its scores are apart, and their loss is not log 2; the head's gradient is one of those compared."""
    (gradients,), run = parity_runs.preference("reward", source, "builtin:arithmetic-preference", ARMS["trl"],
                                          steps=1, kept=1, max_samples=16, device="cpu")
    head = run.model.get_base_model().score.modules_to_save["default"].weight
    assert float(head.detach().std()) == pytest.approx(parity_runs.SCORES, rel=0.2)
    assert abs(float(parity_runs.losses_of(run)[0]) - 0.6931) > 1e-3
    assert sum("score" in name for name in gradients) == 1 and len(gradients) == 43


def test_a_run_in_fp64_is_one_and_leaves_torch_as_it_was(source):
    """What is named fp32 within TRL's and transformers' code is fp64 there: the norms, the losses, Adam's states."""
    losses, runs = {}, {}
    kinds = torch.float32, torch.float, torch.Tensor.float, torch.get_default_dtype()
    eager = replace(ARMS["trl-eager"], fp64=True)
    for name, arm in {"trl": ARMS["trl"], "trl-fp64": ARMS["trl-fp64"], "eager": eager}.items():
        _, run = parity_runs.preference("cpo", source, "builtin:arithmetic-preference", arm, steps=3, batch_size=2,
                                   max_samples=16, device="cpu", **OPTIONS["cpo-hinge"][1])
        losses[name], runs[name] = parity_runs.losses_of(run), run
    assert (torch.float32, torch.float, torch.Tensor.float, torch.get_default_dtype()) == kinds
    wide = runs["trl-fp64"].trainer
    assert {p.dtype for p in wide.model.parameters()} == {torch.float64}
    assert {s["exp_avg"].dtype for s in wide.optimizer.state.values()} == {torch.float64}
    apart = (losses["trl"] - losses["trl-fp64"]).abs()
    assert 0 < float(apart.max()) < 1e-6 < float(losses["trl"].abs().min())
    assert 0 < float((losses["eager"] - losses["trl-fp64"]).abs().max()) < 1e-12, "something is rounded to fp32"


def test_a_run_in_fp64_has_a_process_of_its_own(monkeypatch):
    """What is first imported there takes fp64 for fp32: after one in a pool's process the next job failed."""
    plan = replace(Plan("", 50), truth=True)
    (wide,) = [job for job in plan.jobs("cpo-hinge") if job.arms == (parity_parts.TRUTH,)]
    begun: list[Any] = []

    class Alone:
        def __init__(self, workers: int, mp_context: Any) -> None:
            assert (workers, mp_context.get_start_method()) == (1, "spawn")

        def __enter__(self) -> Alone:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def submit(self, *given: Any) -> Future[Any]:
            begun.append(given)
            future: Future[Any] = Future()
            future.set_result("ran there")
            return future

    monkeypatch.setattr(parity_runs, "ProcessPoolExecutor", Alone)
    monkeypatch.setattr(parity_runs, "runs_of", lambda job: "ran here")
    assert parity_runs.done(wide) == "ran there" and begun == [(parity_runs.runs_of, wide)]
    assert parity_runs.done(replace(wide, arms=("trl",))) == "ran here"
    assert not [job for job in plan.jobs("grpo-cispo") if parity_parts.TRUTH in job.arms], "online methods have none"


def test_the_worst_parameter_is_named():
    true = {"a": torch.ones(10_000).double(), "b": torch.ones(10_000).double()}
    own = {"a": true["a"] * 1.01, "b": true["b"] * 1.02}
    found = {"a": true["a"] * 1.013, "b": true["b"] * 1.02}
    first, second = bounds.gradients_apart("x", [true], [own], [found])
    assert "of a" in first.what and not first.holds and second.holds
    assert first.value == pytest.approx(0.013) and first.own == pytest.approx(0.01)
    assert first.bound == pytest.approx(1.25 * 0.01 * 1.03), "three standard deviations of a ratio over 10,000 numbers"
    with pytest.raises(AssertionError, match="gradient of a is 0"):
        bounds.gradient_distances([true | {"a": torch.zeros(10_000)}], [found])


def test_the_table_shows_what_does_not_hold():
    checks = [bounds.Check("sft", "x", 1e-3, 1e-3, 2e-3, 100, 2), bounds.Check("sft", "y", 3e-6, None, 1e-6, 1, 2)]
    report = {"rows": [{**asdict(check), "holds": check.holds} for check in checks], "fell": [6.0, 5.0],
              "device": "card", "versions": {}, "commit": "c" * 40, "command": "x"}  # fmt: skip
    lines = tables.parity(report).splitlines()
    assert lines[2].endswith("| 1.0e-03 | 1.0e-03 | 1.00 | 2.0e-03 | yes |")
    assert lines[3].endswith("| - | - | 1.0e-06 | **no** |")
    assert "fell from 6.00 to 5.00" in lines[-1]
    report["rows"][0]["interval"] = [0.8, 1.4]
    assert "| 1.00 [0.80, 1.40] | 2.0e-03 | yes |" in tables.parity(report)
    report["rows"][0]["interval"] = [0.8, 2.4]
    assert "| 1.00 [0.80, 2.40] | 2.0e-03 | yes, not settled |" in tables.parity(report)
    report["rows"][0] |= {"value": 2.2e-3, "holds": False}
    assert "| 2.20 [0.80, 2.40] | 2.0e-03 | **no**, not settled |" in tables.parity(report)
    report["rows"][0]["interval"] = [2.1, 2.4]
    assert "| 2.20 [2.10, 2.40] | 2.0e-03 | **no** |" in tables.parity(report)
    # What this run has no row of is said to be missing.
    names = ", ".join(PARTS)
    for what in ("fp32", "bf16", "two trl runs in fp32"):
        assert f"| {names}: {what} | not measured yet |" in tables.parity(report)
    report["rows"][0]["part"] = "sft, fp32"
    assert f"| {names.removeprefix('sft, ')}: fp32 | not measured yet |" in tables.parity(report)
    assert f"| {names}: two trl runs in fp32 | not measured yet |" in tables.parity(report)
    report["rows"][0]["what"] = "max |loss difference|"
    assert r"| max \|loss difference\| |" in tables.parity(report), "a bar within a cell would end it"


def test_the_table_of_options_has_a_row_each():
    def rows(name: str, fast: float = 1.0, gradient: float = 1.0, two: float = 0.01) -> list[dict[str, Any]]:
        checks = [bounds.Check(f"{name}, fp32", "max |loss difference|", one, 1.0, 2.0, 50, 1) for one in (0.5, fast)]
        checks += [bounds.Check(f"{name}, fp32", "|mean signed difference|", 0.25, 1.0, 2.0, 50, 1),
                   bounds.Check(f"{name}, bf16", "gradient of a, mean of batches", gradient, 1.0, 1.25, 32, 1,
                                (gradient - 0.1, gradient + 0.1)),
                   bounds.Check(f"{name}, two trl runs in fp32", bounds.LOSS, two, 1.0, 0.1, 50, 1)]
        return [{**asdict(check), "holds": check.holds} for check in checks]

    report = {"device": "card", "versions": {}, "commit": "c" * 40, "command": "x", "rows": [
        *rows("grpo-bnpo"), *rows("grpo-cispo", fast=2.5), *rows("grpo-sapo", gradient=1.2), *rows("dpo-ld", two=0.2),
        {"part": "dpo-js", "failed": "MemoryError: no room", "holds": False}]}  # fmt: skip
    for own, run in ((2.0, ""), (4.0, ", against trl, eager")):
        what = f"{TRUE_LOSS}{run}"
        check = bounds.Check("grpo-sapo, fp32", what, 1.0, own, 1.25 * own, 50, 6, (0.1, 0.6))
        report["rows"].append({**asdict(check), "holds": check.holds})
    *lines, _, true, _, _ = tables.parity_options(report).splitlines()
    found = {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}
    assert true == (f"`grpo-sapo`, {TRUE_LOSS}, fp32: fast 1.0e+00, 0.50 [0.10, 0.60] times as far as "
                    "trl's 2.0e+00 with sdpa, 0.25 [0.10, 0.60] times as far as trl's 4.0e+00 with eager attention.")
    assert [*found] == [*OPTIONS]
    assert found["grpo-bnpo"].endswith("_steps 2 | 1 | 1.00 | 0.25 | 1.00 [0.90, 1.10] | 0.01 | yes |")
    assert "| 2.50 | 0.25 |" in found["grpo-cispo"] and found["grpo-cispo"].endswith("| **no** |")
    assert found["grpo-sapo"].endswith("| yes, not settled |")
    assert "| ld_alpha 0.4 |" in found["dpo-ld"] and found["dpo-ld"].endswith("| 0.20 | **no** |")
    assert found["dpo-js"].endswith("| failed: MemoryError: no room | - | - | - | - | **no** |")
    assert found["dpo-hinge"] == "| dpo-hinge | loss_type hinge | not measured yet | - | - | - | - | - |"


@pytest.mark.skipif(not RESULTS.exists(), reason="not measured yet")
def test_the_committed_figures_hold():
    report = json.loads(RESULTS.read_text())
    rows = report["rows"]
    assert all(row["holds"] is (row["value"] <= row["bound"]) for row in rows)
    assert all(row["holds"] for row in rows)
    assert all(set(row) >= {"value", "bound"} for row in rows), "none failed"
    assert {row["part"].partition(",")[0] for row in rows} == set(PARTS)
    assert {row["seeds"] for row in rows if row["part"] == "sft-nf4, bf16"} == {16}
    assert {row["steps"] for row in rows if "fp8" in row["part"]} == {300}
    assert min(row["steps"] for row in rows if "max |loss" in row["what"] and "sft" in row["part"]) >= 100
    assert min(row["steps"] for row in rows if "forced" in row["part"] and "loss" in row["what"]) >= 50
    assert report["fell"][0] - report["fell"][1] > 0.3, "nothing was learnt"
    assert {len(run) for run in report["losses"]["fast-fp8"]} == {300}
    for row, backend in zip((row for row in rows if "fp8" in row["part"]), ("trl", "fast"), strict=True):
        found = bounds.pooled(row["part"], report["apart"][f"{backend}-bf16"], report["apart"]["fast-fp8"], bounds.FP8,
                              steps=300, what=f"{bounds.LOSS}, against bf16 on {backend}")
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
@pytest.mark.parametrize("part", ["sft", "grpo,ppo", "dpo", "reward,rloo-clip", "sft-full,sft-nf4"])
def test_toy_runs_end_to_end(part, tmp_path):
    """Three steps judge nothing, and their bounds are not asserted: the command runs, and one step is one step."""
    path = tmp_path / "parity.json"
    parity.main(["--device", "cpu", "--steps", "3", "--seeds", "1", "--learn-seeds", "1", "--bf16-seeds", "1",
                 "--parts", part, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    count = {"sft": 9, "grpo,ppo": 5 + 9, "dpo": 5, "reward,rloo-clip": 5 + 4, "sft-full,sft-nf4": 2 * 6}[part]
    assert len(rows) == count and all(row["value"] >= 0 for row in rows)
    assert all(row["holds"] for row in rows if "one step" in row["what"])
