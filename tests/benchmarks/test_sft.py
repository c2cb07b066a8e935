"""The SFT benchmark drives compare's arms: order, repeats, what failed, and the ratio to the reference."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from aligntune.compare.protocol import in_a_fresh_process
from aligntune.errors import ComparisonError, ConfigError
from benchmarks import tables
from benchmarks.ops import bench
from benchmarks.rl import __main__ as rl
from benchmarks.sft import __main__ as benchmark
from benchmarks.sft.workloads import WORKLOADS, recipe
from tests.compare import made_up

SPEED = {"trl": 1.0, "trl-gc": 0.8, "fast": 2.0}


def runner(calls: list[tuple[str, int]], folder: Path) -> Any:
    def run(spec: Any, arm: Any) -> dict[str, Any]:
        calls.append((arm.label, spec.repeat))
        if arm.label == "fast-gc":
            raise ComparisonError("arm 'fast-gc' ended; log.txt:\n  the last words")
        if arm.label == "liger":
            return {"status": "out of memory", "kind": "OutOfMemoryError", "message": "no room"}
        found = made_up.result(folder / arm.label, arm.label, label=arm.label, repeat=spec.repeat,
                               speed=SPEED[arm.label])
        return found | {"trace": None, "machine": {"card": "a card"}}

    return run


def test_orders_failures_and_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "missing", lambda arm: "not here" if arm.peer == "unsloth" else None)
    calls: list[tuple[str, int]] = []
    out = tmp_path / "out.json"
    arms = "fast,trl,trl-gc,fast-gc,liger,unsloth"
    assert benchmark.main(["smoke", "--arms", arms, "--json", str(out)], runner(calls, tmp_path)) == 0
    assert calls == [("fast", 0), ("trl", 0), ("trl-gc", 0), ("fast-gc", 0), ("liger", 0),
                     ("trl-gc", 1), ("trl", 1), ("fast", 1)]
    rows = {row["arm"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["fast-gc"]["why"] == "failed: the last words" and rows["unsloth"]["why"] == "not here"
    assert rows["liger"]["why"] == "failed: OutOfMemoryError: no room"
    assert "over_this" not in rows["fast"] and rows["trl"]["data"] == "the same" and rows["trl"]["max_dloss"] == 0
    for arm, ratio in (("trl", 2.0), ("trl-gc", 2.5)):
        found = rows[arm]["over_this"]
        assert found["ratio"][0] == pytest.approx(ratio, rel=0.05) and found["significant"] is True
        assert found["ratio"][1] < ratio * 1.05 and found["ratio"][2] > ratio * 0.95 and found["noise"] > 0
    # 400 tokens in 0.1 s / 2
    assert rows["fast"]["tokens_per_s"] == pytest.approx(8000, rel=0.03)
    assert rows["fast"]["step_ms"] == pytest.approx(50, rel=0.03) and rows["fast"]["tokens_per_step"] == 400
    assert rows["fast"]["first_step_s"] == 9.0 and len(rows["fast"]["losses"]) == made_up.STEPS
    assert [one["card"] for one in rows["trl"]["machine"]] == ["a card", "a card"]


def test_what_was_measured_is_on_disk_after_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    seen: list[list[tuple[str, bool]]] = []
    inner = runner([], tmp_path)

    def run(spec: Any, arm: Any) -> dict[str, Any]:
        assert spec.probe is False and spec.gradient_steps == []
        rows = json.loads(out.read_text())["rows"] if out.exists() else []
        seen.append([(row["arm"], "over_this" in row) for row in rows])
        if len(seen) == 4:
            raise KeyboardInterrupt
        return inner(spec, arm) | {"laps": {"imports": 2.0, "train": 3.5}}

    with pytest.raises(KeyboardInterrupt):
        benchmark.main(["smoke", "--arms", "fast,fast-gc,trl", "--json", str(out)], run)
    assert seen == [[], *[[("fast", False), ("fast-gc", False), ("trl", trl)] for trl in (False, False, True)]]
    rows = {row["arm"]: row for row in json.loads(out.read_text())["rows"]}
    assert "why" in rows["fast-gc"] and rows["trl"]["laps_s"] == [{"imports": 2.0, "train": 3.5}]
    assert not list(tmp_path.glob("*.part"))
    printed = capsys.readouterr().out
    assert "fast 1: ok in 0.0 s (imports 2.0, train 3.5)" in printed
    assert "fast-gc 1: failed: the last words in 0.0 s\n" in printed


def test_a_folder_gets_a_file_a_row(tmp_path: Path) -> None:
    """And what was there of other rows stays."""
    out = tmp_path / "results"
    out.mkdir()
    (out / "earlier.json").write_text("{}")
    assert benchmark.main(["smoke", "--arms", "trl,fast-gc", "--json", str(out)], runner([], tmp_path)) == 0
    report = json.loads((out / "smoke.json").read_text())
    assert [row["arm"] for row in report["rows"]] == ["trl", "fast-gc"] and report["command"].startswith("python -m")
    assert sorted(path.name for path in out.iterdir()) == ["earlier.json", "smoke.json"]


def test_arms_are_held_against_fast_where_none_are_named() -> None:
    """As the docs' tables are: the first arm is what the others are compared with."""
    for parse in (benchmark.parse, rl.parse):
        assert parse(["smoke-dpo" if parse is rl.parse else "smoke"]).arms[0] == "fast"


def test_bounds_are_told_where_a_step_of_fast_was_traced() -> None:
    report = json.loads((tables.RESULTS / "sft" / "lora-1b.json").read_text())
    (fast, *others) = benchmark.bounds([one for one in report["rows"] if one["arm"] in ("fast", "fast-auto", "trl")],
                                       report["ceilings"])
    assert fast.startswith("  fast: products ") and " of " in fast and fast.endswith(" ms")
    assert all(text.startswith("  fast-auto: ") for text in others)
    untraced = [{"arm": "fast", "why": "failed"}, {"arm": "fast", "trace": None}]
    assert benchmark.bounds(untraced, report["ceilings"]) == []
    assert benchmark.bounds(report["rows"], None) == []


def test_unsloth_s_two_layouts_are_forced() -> None:
    for label, wanted in (("unsloth", "padding_free"), ("unsloth-gc", "padding_free"), ("unsloth-compiled", "padded")):
        arm = benchmark.ARMS[label]
        assert arm.environment == {"UNSLOTH_PADDING_CHOICE": wanted} and "padding_free" not in arm.options


def test_a_cold_arm_s_runs_have_a_cache_of_their_own_each(tmp_path: Path) -> None:
    caches: list[str | None] = []
    inner = runner([], tmp_path)

    def run(spec: Any, arm: Any) -> dict[str, Any]:
        caches.append(arm.environment.get("TRITON_CACHE_DIR"))
        return inner(spec, benchmark.ARMS["trl"])

    benchmark.main(["smoke", "--arms", "fast-cold,trl"], run)
    assert caches[0] and caches[3] and caches[0] != caches[3] and caches[1] is caches[2] is None
    assert not any(Path(cache).exists() for cache in caches if cache)
    assert "fast-cold" not in benchmark.parse([]).arms


def test_beside_a_cold_arm_fast_reads_the_cache_that_the_first_cold_run_filled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    caches: list[tuple[str, str | None]] = []
    inner = runner([], tmp_path)

    def run(spec: Any, arm: Any) -> dict[str, Any]:
        caches.append((arm.label, arm.environment.get("TRITON_CACHE_DIR")))
        return inner(spec, benchmark.ARMS["trl"])

    benchmark.main(["smoke", "--arms", "trl,fast-cold,fast"], run)
    assert [label for label, _ in caches] == ["trl", "fast-cold", "fast", "fast", "fast-cold", "trl"]
    first = caches[1][1]
    assert first and [cache for _, cache in caches] == [None, first, first, first, caches[4][1], None]
    assert caches[4][1] not in (None, first)
    with pytest.raises(SystemExit):
        benchmark.parse(["smoke", "--arms", "fast,fast-cold"])
    assert "fast-cold comes before fast" in capsys.readouterr().err


def test_only_the_steps_after_the_warm_up_are_measured(tmp_path: Path) -> None:
    runs = [made_up.result(tmp_path, repeat=repeat) for repeat in range(2)]
    for one in runs:
        one |= {"trace": None, "machine": None}
        for number, step in enumerate(one["steps"]):
            step["seconds"] = 9.0 if number < 15 else 0.2
    found = benchmark.entry("smoke", benchmark.ARMS["trl"], runs, None, warmup=15)
    assert found["step_ms"] == pytest.approx(200) and found["tokens_per_s"] == pytest.approx(2000)


def test_other_data_has_no_difference_of_losses(tmp_path: Path) -> None:
    runs, reference = ([made_up.result(tmp_path / name)] for name in ("one", "two"))
    for one in (*runs, *reference):
        one |= {"trace": None, "machine": None}
    reference[0]["steps"][3]["data"] = {"ids": ["x"], "labels": ["x"], "prompts": ["x"]}
    found = benchmark.entry("smoke", benchmark.ARMS["trl"], runs, reference, warmup=5)
    assert "step 4" in found["data"] and "max_dloss" not in found and "over_this" in found


def test_a_command_that_names_nothing_writes_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    assert benchmark.parse([]).json == tables.RESULTS / "sft" and rl.parse([]).json == tables.RESULTS / "rl"
    for named in (["lora-1b"], ["--arms", "fast,trl"], ["--longest", "lora-1b"]):
        args = benchmark.parse(named)
        assert args.json is None and not args.all, "one row of some arms is not what is committed"
    elsewhere = benchmark.parse(["--json", "x.json"])
    assert str(elsewhere.json) == "x.json" and not elsewhere.all


def test_a_command_that_names_nothing_measures_starts_and_the_longest_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it says of the machine; each of the commands that follow is one that a user can give."""
    args = benchmark.parse(["--site-unsloth", "here", "--commit", "c" * 40, "--repeats", "1"])
    start, longest = [benchmark.parse([*command, *benchmark.also_given(args)]) for command in benchmark.also(args.json)]
    assert (start.rows, start.arms, start.json.name) == (["lora-1b"], ["trl", "fast-cold", "fast"], "start.json")
    assert (longest.longest, longest.arms, longest.json.name) == ("qlora-8b", ["fast-offload"], "longest.json")
    for one in (start, longest):
        assert (str(one.site_unsloth), one.commit, one.repeats, one.all) == ("here", "c" * 40, 1, False)
        assert one.limit == args.limit and one.site_liger is None
    ran: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench.Ceilings, "measure", staticmethod(lambda: bench.Ceilings(1.0, 1.0)))
    monkeypatch.setattr(benchmark, "of_row", lambda name, *_, **__: ran.append([name]) or [])
    monkeypatch.setattr(benchmark, "write_report", lambda *_: None)
    monkeypatch.setattr(benchmark, "longest", lambda row, *_, **__: ran.append(["longest", row]) or {})
    monkeypatch.setattr(tables, "main", lambda: ran.append(["tables"]) or 0)
    assert benchmark.main([]) == 0
    assert ran[-3:] == [["lora-1b"], ["longest", "qlora-8b"], ["tables"]]
    assert [name for name, in ran[:-3]] == [name for name in WORKLOADS if name != "smoke"]


@pytest.mark.parametrize("path", sorted([*tables.RESULTS.glob("sft/**/*.json"), *tables.RESULTS.glob("rl/*.json")]),
                         ids=lambda path: path.stem)
def test_every_arm_that_a_committed_command_names_has_an_entry(path: Path) -> None:
    report = json.loads(path.read_text())
    named = re.search(r"--arms (\S+)", report["command"])
    if named:  # several rows of one command have a file each
        assert [row["arm"] for row in report["rows"]] == named[1].split(",")


def test_every_arm_resolves(tmp_path: Path) -> None:
    """Options of arms and workloads are options of aligntune."""
    from aligntune.compare.protocol import Run, spec_of
    from aligntune.compare.settings import Settings
    from aligntune.core.resolve import resolve

    for workload in WORKLOADS.values():
        config = recipe(workload, "builtin:tiny", "builtin:arithmetic", "fp32")
        for arm in benchmark.ARMS.values():
            spec = spec_of(Settings("x", config, {}, a=arm, b=arm), Run("a", 0, arm), tmp_path, seed=1, online=False,
                           peft=False)
            if arm.label == "fast-fp8" and workload.mode != "lora":
                with pytest.raises(ConfigError, match="base_precision"):
                    resolve(spec.overrides, spec.config)
                continue
            job = resolve(spec.overrides, spec.config)
            assert job.options.max_steps == workload.steps and job.options.packing is workload.packing
            planned = dict.fromkeys(("unsloth-gc", "fast-auto", "fast-6gib"), "auto") | {"fast-offload": "offload"}
            checkpointing = planned.get(arm.label, arm.label.endswith("-gc"))
            assert job.options.gradient_checkpointing == checkpointing
            assert job.options.memory_budget_gib == (6.0 if arm.label == "fast-6gib" else None)
    assert job.options.padding_free == "auto"


def test_a_peer_that_is_not_here_is_skipped() -> None:
    assert benchmark.missing(benchmark.ARMS["trl"]) is None
    assert benchmark.missing(benchmark.ARMS["unsloth"]) == "unsloth is not installed (--site-unsloth)"


def test_a_run_that_is_not_done_in_time(tmp_path: Path) -> None:
    from aligntune.compare.arm import ArmSpec

    spec = ArmSpec("slow", "a", 0, {"algorithm": "sft"}, {}, str(tmp_path), 0)
    with pytest.raises(ComparisonError, match=r"not done after 0.2 s"):
        in_a_fresh_process(spec, benchmark.ARMS["trl"], limit=0.2)


@pytest.mark.slow
def test_the_smallest_row_in_real_processes(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run = functools.partial(in_a_fresh_process, limit=300)
    assert benchmark.main(["smoke", "--arms", "trl,trl-gc", "--repeats", "1", "--json", str(out)], run) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["data"] for row in rows[1:]] == ["the same"] and rows[1]["max_dloss"] < 1e-4
    assert rows[0]["losses"][-1] < rows[0]["losses"][0] and len(rows[0]["losses"]) == 8
