"""The next arm imports while one trains: it waits for its turn, its waiting is in no figure; none is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aligntune.compare import machine
from aligntune.compare.arm import GO, RESULT, ArmSpec
from aligntune.compare.protocol import in_a_fresh_process, start
from aligntune.compare.settings import Arm
from aligntune.errors import ComparisonError
from benchmarks import ahead as module
from benchmarks.ahead import Ahead
from benchmarks.sft import __main__ as sft

FAST = Arm("fast", "fast")


def spec(folder: Path, name: str) -> ArmSpec:
    return ArmSpec(name, "a", 0, {"algorithm": "sft"}, {}, str(folder / name), 0)


class Process:
    """Stands for an arm's process."""

    def __init__(self, name: str) -> None:
        self.name, self.ended = name, False

    def kill(self) -> None:
        self.ended = True

    def wait(self) -> int:
        return 0


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was started, and what was run with which process."""
    lines: list[str] = []

    def begin(spec: ArmSpec, arm: Arm) -> Any:
        assert spec.waits == os.getpid()
        lines.append(f"start {spec.label}")
        return Process(spec.label)

    def run(spec: ArmSpec, arm: Arm, *, limit: float | None, process: Any) -> dict[str, Any]:
        assert limit == 9 and bool(spec.waits) == (process is not None)
        lines.append(f"run {spec.label} in {process.name if process else 'a new one'}")
        return {"status": "ok"}

    monkeypatch.setattr(module, "start", begin)
    monkeypatch.setattr(module, "in_a_fresh_process", run)
    return lines


def test_the_next_one_is_started_before_one_is_run(tmp_path: Path, said: list[str]) -> None:
    jobs = [(spec(tmp_path, name), FAST) for name in "abc"]
    with Ahead(9) as runner:
        runner.plan(jobs)
        for job in jobs:
            runner(*job)
    assert said == ["start a", "start b", "run a in a", "start c", "run b in b", "run c in c"]


def test_one_that_is_skipped_is_ended_and_one_that_was_not_planned_is_run(tmp_path: Path, said: list[str],
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(module, "end", lambda process: ended.append(process.name))
    jobs = [(spec(tmp_path, name), FAST) for name in "abcd"]
    with Ahead(9) as runner:
        runner.plan(jobs)
        runner(*jobs[0])
        runner(*jobs[2])
        assert ended == ["b"]
        runner(spec(tmp_path, "x"), FAST)
    assert said == ["start a", "start b", "run a in a", "start d", "run c in a new one", "run x in a new one"]
    assert ended == ["b", "d"]


def until_idle(pid: int) -> None:
    """Wait for a process that has begun to compute to have done nothing for a second."""
    def ticks() -> int:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    for _ in range(120):
        before = ticks()
        time.sleep(1)
        if before > 200 and ticks() - before <= 2:
            return
    pytest.fail("the arm does not come to rest")


@pytest.mark.slow
def test_a_waiting_arm_trains_when_its_turn_comes(tmp_path: Path) -> None:
    """In real processes: what it waited is a lap of its own, and no part of its cold start."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {number} of one two three"}) + "\n" for number in range(8)))
    config = {"algorithm": "sft", "model_name": "builtin:tiny", "dataset_name": str(rows), "max_steps": 1,
              "batch_size": 2, "max_seq_length": 16, "backend": "trl", "report_to": "none", "precision": "fp32",
              "output_dir": str(tmp_path / "one" / "run")}
    one = ArmSpec("one", "timed", 0, config, {}, str(tmp_path / "one"), 0, gradient_steps=[], probe=False,
                  waits=os.getpid())
    process = start(one, Arm("one", "trl"))
    until_idle(process.pid)
    assert process.poll() is None and not (tmp_path / "one" / RESULT).exists()
    begun = time.monotonic()
    found = in_a_fresh_process(one, Arm("one", "trl"), limit=200, process=process)
    took = time.monotonic() - begun
    assert found["status"] == "ok", found
    laps = found["laps"]
    assert laps["imports"] > 1 and laps["waited"] > 0.9
    assert laps["build"] + laps["train"] < took
    assert found["cold_start"] < laps["imports"] + laps["build"] + laps["train"] + 0.5


def test_an_arm_whose_starter_is_gone_does_not_wait(tmp_path: Path) -> None:
    """kill -9 of the command leaves no process behind on the card."""
    waiter_code = ("import sys; from pathlib import Path; from aligntune.compare.arm import wait_for; "
                   "wait_for(Path('nowhere'), int(sys.argv[1]))")
    code = (f"import os, subprocess, sys, time\ncode = {waiter_code!r}\n"
            "waiter = subprocess.Popen([sys.executable, '-c', code, str(os.getpid())])\n"
            "print(waiter.pid, flush=True)\ntime.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    waiter = int(parent.stdout.readline())
    os.kill(waiter, 0)
    parent.kill()
    parent.wait()
    for _ in range(200):
        stat = Path("/proc", str(waiter), "stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the arm still waits")


def test_what_this_process_started_is_nobody_else_on_the_card() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert machine._ours(str(child.pid)) and machine._ours(str(os.getpid()))
        assert not machine._ours("1") and not machine._ours("0") and not machine._ours("not a number")
    finally:
        child.communicate(b"\n")


def test_a_run_in_its_own_process_does_not_wait_for_a_go(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="not done after 0.2 s"):
        in_a_fresh_process(spec(tmp_path, "slow"), FAST, limit=0.2)
    assert (tmp_path / "slow" / GO).exists()


def test_the_time_to_the_first_step_is_not_measured_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.parse(["smoke", "--ahead"]).ahead and not sft.parse(["smoke"]).ahead
    with pytest.raises(SystemExit):
        sft.parse(["smoke", "--ahead", "--arms", "fast-cold,fast"])
    assert "imports included" in capsys.readouterr().err
