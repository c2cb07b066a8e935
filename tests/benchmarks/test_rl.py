"""The RL benchmark: what an arm is told, what is measured of steps and rollouts, what fails, and the table of it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from aligntune.compare.protocol import in_a_fresh_process
from aligntune.errors import ComparisonError
from benchmarks import tables
from benchmarks.rl import __main__ as benchmark
from benchmarks.rl.rewards import drawn
from benchmarks.rl.workloads import WORKLOADS, recipe, rows_of, write_policy
from benchmarks.sft.workloads import MODELS
from tests.compare import made_up

SPEED = {"trl": 0.5, "trl-gc": 0.25, "fast": 2.0, "trl-cb": 1.0}


def runner(calls: list[Any], folder: Path) -> Any:
    """Made-up runs: 400 tokens a step, 300 of them drawn in half of its time; all but the last two steps are slow."""

    def run(spec: Any, arm: Any) -> dict[str, Any]:
        calls.append((arm.label, spec.repeat, spec))
        if arm.label == "fast-gc":
            raise ComparisonError("arm 'fast-gc' ended; log.txt:\n  the last words")
        if arm.label == "unsloth-gc":
            return {"status": "out of memory", "kind": "OutOfMemoryError", "message": "no room"}
        online = spec.config["algorithm"] != "dpo"
        found = made_up.result(folder / arm.label, label=arm.label, repeat=spec.repeat, speed=SPEED[arm.label],
                               online=online)
        found["steps"] = found["steps"][: spec.config["max_steps"]]
        for number, step in enumerate(found["steps"]):
            if number < spec.config["max_steps"] - 2:
                step["seconds"] *= 50
            if online:
                step["phases"] = {"rollout": step["seconds"] / 2}
        if arm.label == "fast":
            log = Path(spec.folder) / "run" / "metrics.jsonl"
            log.parent.mkdir(parents=True)
            lines = [{"step": n, "loss": 0.1, "rollout/seconds": 9.0 if n < 5 else 0.02,
                      "sampling/sampling_logp_difference/max": 0.1 * n} for n in range(1, 7)]
            log.write_text("\n".join(map(json.dumps, [*lines, {"step": 6, "train_runtime": 3.0}])))
        return found | {"trace": None, "machine": {"card": "a card"}}

    return run


def test_arms_run_their_own_numbers_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "missing", lambda arm: "not here" if arm.label == "unsloth" else None)
    calls: list[Any] = []
    out = tmp_path / "new" / "out.json"
    arms = "fast,trl,trl-gc,fast-gc,unsloth,unsloth-gc"
    assert benchmark.main(["smoke-grpo", "--arms", arms, "--limit", "7", "--json", str(out)],
                          runner(calls, tmp_path)) == 0
    assert [(label, repeat) for label, repeat, _ in calls] == [
        ("fast", 0), ("trl", 0), ("trl-gc", 0), ("fast-gc", 0), ("unsloth-gc", 0), ("trl-gc", 1), ("trl", 1),
        ("fast", 1)]
    assert [spec.config["max_steps"] for _, _, spec in calls[:3]] == [6, 3, 3]
    assert "at most 70 s: 5 arms x 2 runs x 7 s" in capsys.readouterr().out
    rows = {row["arm"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["fast-gc"]["why"] == "failed: the last words" and rows["unsloth"]["why"] == "not here"
    assert rows["unsloth-gc"]["why"] == "failed: OutOfMemoryError: no room"
    assert "over_this" not in rows["fast"] and "max_dloss" not in rows["trl"]
    # What the arms pair are the last two steps of six and of three, none of the slow ones before them.
    for arm, ratio in (("trl", 4.0), ("trl-gc", 8.0)):
        over = rows[arm]["over_this"]
        assert over["ratio"][0] == pytest.approx(ratio, rel=0.05) and over["pairs"] == 4 and over["significant"] is True
        assert rows[arm]["data"] == "the same"
    fast = rows["fast"]
    assert fast["step_ms"]["p50"] == pytest.approx(50, rel=0.03)
    assert fast["step_ms"]["p10"] < fast["step_ms"]["p50"] < fast["step_ms"]["p90"] < 60
    assert (fast["steps"], fast["measured"]) == (6, 2) and (rows["trl"]["steps"], rows["trl"]["measured"]) == (3, 2)
    assert fast["tokens_per_s"] == pytest.approx(8000, rel=0.03) and fast["tokens_per_step"] == 400
    rollout = fast["rollout"]
    assert rollout["seconds"] == pytest.approx(0.025, rel=0.03) and rollout["mean_length"] == 75
    assert rollout["tokens_per_s"] == pytest.approx(12_000, rel=0.03)
    # Its own log, of the measured steps only: the mean of seconds, the largest of what is a maximum.
    assert rollout["logged"] == {"seconds": pytest.approx(0.02), "log_prob_difference_max": pytest.approx(0.6)}
    assert rows["trl"]["rollout"]["logged"] == {}


def test_of_unequal_numbers_of_measured_steps_the_last_are_paired(tmp_path: Path) -> None:
    runs, reference = ([made_up.result(tmp_path / name, speed=speed)] for name, speed in (("one", 1.0), ("two", 3.0)))
    for step in reference[0]["steps"][:17]:
        step["seconds"] = 9.0
    found: dict[str, Any] = {}
    benchmark.against(found, runs, reference, warmup=(17, 10), online=True)
    assert found["over_this"]["ratio"][0] == pytest.approx(3, rel=0.05) and found["over_this"]["pairs"] == 3


def test_no_failure_of_an_arm_ends_the_run(tmp_path: Path) -> None:
    out, run = tmp_path / "out.json", runner([], tmp_path)

    def other(spec: Any, arm: Any) -> dict[str, Any]:
        if arm.label == "unsloth":  # the folder that was given is none
            return in_a_fresh_process(spec, arm, limit=5)
        found = run(spec, arm)
        for step in found["steps"]:
            step["traced"] = arm.label == "trl"
        return found

    there = ["--site-unsloth", str(tmp_path / "nowhere")]
    assert benchmark.main(["smoke-grpo", "--arms", "trl,trl-gc,unsloth", *there, "--json", str(out)], other) == 0
    first, second, third = json.loads(out.read_text())["rows"]
    assert first["why"] == "failed: no step is left to be timed"
    assert "over_this" not in second and second["step_ms"]["p50"] > 0
    assert third["why"].startswith("failed: arm 'unsloth': ") and "cannot be started" in third["why"]


def test_what_was_measured_is_written_after_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, run, seen = tmp_path / "out.json", runner([], tmp_path), []

    def other(spec: Any, arm: Any) -> dict[str, Any]:
        seen.append([(row["arm"], row.get("why", "ok")) for row in json.loads(out.read_text())["rows"]]
                    if out.exists() else None)
        return run(spec, arm) | {"laps": {"imports": 7.25}}

    assert benchmark.main(["smoke-grpo", "--arms", "trl,fast-gc,fast", "--repeats", "1", "--json", str(out)],
                          other) == 0
    cut = "not run: the command ended before"
    assert seen == [None, [("trl", "ok"), ("fast-gc", cut), ("fast", cut)],
                    [("trl", "ok"), ("fast-gc", "failed: the last words"), ("fast", cut)]]
    assert [row["arm"] for row in json.loads(out.read_text())["rows"]] == ["trl", "fast-gc", "fast"]
    assert not list(tmp_path.glob("*.part")) and "(imports 7.2)" in capsys.readouterr().out


def test_a_folder_gets_a_file_a_row(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert benchmark.main(["smoke-grpo", "smoke-dpo", "--arms", "trl,fast-gc", "--json", str(out)],
                          runner([], tmp_path)) == 0
    assert sorted(path.name for path in out.iterdir()) == ["smoke-dpo.json", "smoke-grpo.json"]
    for path in out.iterdir():
        rows = json.loads(path.read_text())["rows"]
        assert [(row["row"], row["arm"]) for row in rows] == [(path.stem, "trl"), (path.stem, "fast-gc")]


def test_losses_of_pairs_are_held_side_by_side(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run = runner([], tmp_path)

    def other(spec: Any, arm: Any) -> dict[str, Any]:
        found = run(spec, arm)
        if arm.label == "trl":
            found["steps"][3]["loss"] += 0.25
        if arm.label == "trl-gc":
            found["steps"][2]["data"] = {"ids": ["x"], "labels": ["x"], "prompts": ["x"]}
        return found

    assert benchmark.main(["smoke-dpo", "--arms", "fast,trl,trl-gc,trl-cb", "--json", str(out)], other) == 0
    rows = {row["arm"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["trl"]["max_dloss"] == pytest.approx(0.25) and rows["trl"]["data"] == "the same"
    assert "max_dloss" not in rows["trl-gc"] and "step 3" in rows["trl-gc"]["data"]
    assert rows["trl-cb"]["why"] == "dpo generates nothing" and "rollout" not in rows["fast"]
    assert rows["trl"]["over_this"]["pairs"] == 4
    table = tables.rl(json.loads(out.read_text())).splitlines()
    assert "losses apart" in table[0] and "rollout" not in table[0]
    assert table[2].startswith("| fast | 50 (") and "| - |" in table[2]
    assert "| 2.5e-01 |" in table[3] and "| 4.0" in table[3]
    assert rows["trl-gc"]["data"] in table[4]
    assert table[5] == "| trl-cb | dpo generates nothing | - | - | - | - | - | - |"


def test_a_table_of_rollouts() -> None:
    entry = {"row": "grpo-1b", "arm": "fast", "step_ms": {"p50": 1234.4, "p10": 1200.0, "p90": 1300.0},
             "tokens_per_s": 20_000.0, "peak_gib": 10.0, "reserved_gib": 12.0, "first_step_s": 20.0,
             "rollout": {"seconds": 0.5, "tokens_per_s": 32_768.0, "logged": {"log_prob_difference_mean": 0.0021}},
             "versions": {"trl": "1.16"}}  # fmt: skip
    over = {"ratio": [9.0, 8.0, 10.0], "noise": 0.01, "significant": True, "pairs": 4}
    peer = entry | {"arm": "unsloth", "over_this": over, "data": "the same", "versions": {"trl": "1.15"},
                    "rollout": entry["rollout"] | {"logged": {}}}
    report = {"device": "card", "commit": "c" * 40, "command": "x",
              "rows": [entry, peer, {"row": "grpo-1b", "arm": "trl", "why": "failed: x"}]}
    table = tables.rl(report).splitlines()
    assert table[0].startswith("| arm | step ms (p10, p90) | fast over it | tokens/s | rollout s | rollout tokens/s | "
                               "log-probs apart |")
    assert table[2] == "| fast | 1,234 (1,200, 1,300) | - | 20,000 | 0.50 | 32,768 | 2.1e-03 | 10.00 | 12.00 | 20 |"
    assert "| unsloth | 1,234 (1,200, 1,300) | 9.00x [8.00, 10.00] | 20,000 |" in table[3]
    assert "| 32,768 | - | 10.00 |" in table[3]
    assert table[4] == "| trl | failed: x | - | - | - | - | - | - | - | - |"
    assert "trl 1.16, unsloth's trl 1.15" in table[6]
    over["pairs"] = 1
    assert "| 9.00x, one step |" in tables.rl(report)


def test_every_arm_of_every_row_resolves(tmp_path: Path) -> None:
    """Options of rows and arms are options of aligntune; rollouts are not traced, and no option of SFT stays."""
    from aligntune.core.resolve import resolve

    seen = 0
    for workload in WORKLOADS.values():
        for arm in benchmark.ARMS.values():
            if (why := benchmark.unfit(workload, arm)) is not None and "is not installed" not in why:
                continue
            spec = benchmark.spec_for(workload, arm, 0, model=Path("builtin:tiny"), rows=tmp_path, folder=tmp_path,
                                      precision="fp32")
            job = resolve(spec.overrides, spec.config)
            steps, measured = workload.steps_of(arm.label)
            # A step of grpo-4b with continuous batching is minutes long: its only one is measured.
            assert steps > measured > 0 or (workload.stops == 297 and arm.label == "trl-cb" and steps == measured == 1)
            assert job.options.max_steps == steps
            assert (spec.role == "a") == (not workload.online) and spec.draw_adapters and not spec.probe
            recomputes = arm.label.endswith("-gc") or arm.label == "trl-cb"
            checkpointing = "auto" if arm.label in ("unsloth-gc", "fast-8gib") else recomputes
            assert job.options.gradient_checkpointing == checkpointing
            if arm.backend == "fast":
                # The traced step is not a measured one.
                assert steps - measured > 3
            seen += 1
    assert seen == 8 * 7 + 8 * 8 - 2 * 3, "pairs have no continuous batching; unsloth has neither PPO nor reward"


def test_arms_that_have_nothing_to_measure() -> None:
    arms = benchmark.ARMS
    assert benchmark.unfit(WORKLOADS["grpo-1b"], arms["trl-cb"]) is None
    assert benchmark.unfit(WORKLOADS["kto-1b"], arms["trl-cb"]) == "kto generates nothing"
    assert benchmark.unfit(WORKLOADS["ppo-1b"], arms["unsloth-gc"]) == "unsloth: it has no PPO with a critic"
    assert "scores no sequences" in str(benchmark.unfit(WORKLOADS["reward-1b"], arms["unsloth"]))
    assert benchmark.unfit(WORKLOADS["grpo-1b"], arms["unsloth"]) == "unsloth is not installed (--site-unsloth)"


def test_rows_are_enough_and_as_long_as_they_say() -> None:
    for workload in WORKLOADS.values():
        rows = rows_of(workload)
        assert len(rows) > workload.prompts * max(steps for steps, _ in workload.steps.values())
        assert set(rows[0]) == ({"prompt"} if workload.online else {"prompt", "chosen", "rejected"})
    lengths = [len(row["prompt"].split()) for row in rows_of(WORKLOADS["dpo-1b"])]
    assert min(lengths) == 30 and max(lengths) == 70
    assert WORKLOADS["grpo-1b"].prompts == WORKLOADS["grpo-4b"].prompts == 8
    job = recipe(WORKLOADS["grpo-4b"], "m", "r", "bf16", steps=2)
    assert job["batch_size"] * job["gradient_accumulation_steps"] == 64 and job["max_completion_length"] == 1024


def test_the_reward_spreads_every_group_and_is_no_accident() -> None:
    found = drawn(completion_ids=[[1, 2, index] for index in range(64)], prompts=["x"] * 64)
    assert len(set(found)) == 64 and min(found) < 0.1 and max(found) > 0.9 and drawn([[1, 2, 0]]) == found[:1]


def test_the_checkpoint_lists_what_ends_a_completion(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    from aligntune.builtin import load_tokenizer

    tokenizer = load_tokenizer("builtin:tiny")
    workload = WORKLOADS["smoke-grpo"]
    write_policy(workload, tmp_path, tokenizer, device="cpu")
    ends = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert ends[0] == tokenizer.eos_token_id and len(set(ends)) == workload.stops + 1
    assert min(ends[1:]) >= len(tokenizer) and max(ends) == MODELS["smoke"][1]["vocab_size"] - 1
    long = WORKLOADS["grpo-4b"]
    assert MODELS[long.model][1]["vocab_size"] / long.stops == pytest.approx(512, rel=0.01)


@pytest.mark.slow
def test_the_smallest_rows_in_real_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "out.json"
    run = functools.partial(in_a_fresh_process, limit=300)
    assert benchmark.main(["smoke-dpo", "smoke-grpo", "--arms", "trl,fast", "--repeats", "1", "--json", str(out)],
                          run) == 0
    pairs, others, generate, engine = json.loads(out.read_text())["rows"]
    assert others["data"] == "the same" and others["max_dloss"] < 1e-4
    assert len(pairs["losses"]) == 6 and pairs["losses"][0] == pytest.approx(0.6931, abs=1e-4) != pairs["losses"][-1]
    assert engine["data"] == "the same" and (generate["steps"], engine["steps"]) == (3, 6)
    for one in (generate, engine):
        # One token in eight ends a completion, and the eighth is the last.
        assert 3 < one["rollout"]["mean_length"] < 7 and one["rollout"]["tokens"] <= 128
        assert one["metrics"][0]["reward_std"] > 0.1
    assert engine["rollout"]["logged"]["log_prob_difference_max"] < 1e-4
    assert 0 < engine["rollout"]["logged"]["seconds"] <= engine["rollout"]["seconds"] * 1.1
