"""The card as nvidia-smi tells it, by a stand-in that answers like it; and nothing invented where there is none."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from aligntune.compare import machine
from aligntune.compare.flops import peak_of, step_flops

LINE = "2026/11/20 10:00:0{s}.000, NVIDIA H100 80GB HBM3, {sm}, 2619, {t}, {p}, 97, {used}, {bits}"
FAKE = """#!/bin/sh
case "$*" in *compute-apps*) {apps}; exit 0;; *{unknown}*) echo "Field is not valid"; exit 2;; esac
case "$*" in *-lms*) ;; *) echo once; exit 0;; esac
while true; do
  echo "$(date '+%Y/%m/%d %H:%M:%S.500'), NVIDIA H100 80GB HBM3, 1755, 2619, 61, 640.5, 98, {used}, {bits}"
  sleep 0.1
done
"""


def sample(second: int, *, sm: int = 1980, t: int = 50, p: str = "700.0", used: int = 0,
           bits: str = "0x0000000000000000") -> str:
    return LINE.format(s=second, sm=sm, t=t, p=p, used=used, bits=bits)


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, used: int = 4, bits: str = "0x0", apps: str = ":",
         unknown: str = "throttle_reasons") -> None:
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(FAKE.format(used=used, bits=bits, apps=apps, unknown=unknown))
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")


def test_a_line() -> None:
    found = machine.parse(sample(3, bits="0x0000000000000020"))
    assert found is not None
    assert (found["sm"], found["temperature"], found["power"], found["throttle"]) == (1980, 50, 700.0, 0x20)
    assert machine.parse("half a line, of") is None
    unknown = machine.parse(sample(3, p="[N/A]"))
    assert unknown is not None and unknown["power"] is None


def test_energy_is_power_over_time() -> None:
    samples = [machine.parse(sample(second, p=power)) for second, power in ((1, "100"), (3, "300"), (4, "300"))]
    assert machine.energy([one for one in samples if one]) == pytest.approx(400 + 300)
    assert machine.energy([one for one in [machine.parse(sample(1, p="[N/A]"))] * 2 if one]) is None


def test_without_a_card_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    watch = machine.Watch(tmp_path)
    watch.start()
    found = watch.summary(watch.stop(), None)
    assert found["card"] is None and "no card" in found["note"] and len(found["load_before"]) == 3
    assert "energy_j" not in found


def test_a_quiet_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch)
    watch = machine.Watch(tmp_path)
    watch.start()
    time.sleep(1.2)
    found = watch.summary(watch.stop(), None)
    assert found["card"] == "NVIDIA H100 80GB HBM3" and found["samples"] > 3
    assert found["throttled"] == [] and found["shared"] is False and found["power_capped"] is False
    assert found["temperature_c"]["max"] == 61 and found["power_w"]["median"] == 640.5
    assert not list(tmp_path.glob("*.csv"))


def test_a_shared_and_throttling_card_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, used=20_000, bits="0x0000000000000028", apps="echo '123, python, 20000 MiB'")
    watch = machine.Watch(tmp_path)
    watch.start()
    found = watch.summary(watch.stop(), None)
    assert found["shared"] is True and found["others"] == ["123, python, 20000 MiB"]
    assert found["throttled"] == ["hardware slowdown", "software thermal slowdown"]


def test_who_comes_while_an_arm_runs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, apps=f"test -e {tmp_path}/came && echo '123, python, 5'")
    watch = machine.Watch(tmp_path)
    watch.start()
    (tmp_path / "came").touch()
    found = watch.summary(watch.stop(), None)
    assert found["shared"] is True and found["others"] == ["123, python, 5"] and found["memory_before_mib"] == 4


def test_what_this_process_itself_holds_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, used=530, apps=f"echo '{os.getpid()}, python, 520'")
    watch = machine.Watch(tmp_path)
    watch.start()
    found = watch.summary(watch.stop(), None)
    assert found["shared"] is False and found["others"] == [] and found["memory_before_mib"] == 10


def test_older_drivers_have_another_name_for_throttling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, unknown="event_reasons", bits="0x80")
    watch = machine.Watch(tmp_path)
    watch.start()
    assert watch.summary(watch.stop(), None)["throttled"] == ["power brake"]


def test_a_tool_that_reads_nothing_is_not_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, unknown="-")
    watch = machine.Watch(tmp_path)
    watch.start()
    assert watch.summary(watch.stop(), None)["note"] == "no card: nvidia-smi reads nothing"


def test_arms_run_on_the_card_that_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.card() == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert machine.card() == "3"


def test_peaks_and_arithmetic() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == 989.4 and peak_of("NVIDIA H100 PCIe") == 756.0
    assert peak_of("NVIDIA Something New") is None and peak_of(None) is None
    sizes = {"linear": 1000, "trained": 1000, "attention": 10}
    # 6 N T, and for one row of T tokens 3 x 2 T^2 x width: 12 T^2 width without causality, half of it with.
    assert step_flops(sizes, 5, 25) == 6 * 1000 * 5 + 6 * 25 * 10
    assert step_flops({**sizes, "trained": 0}, 5, 25) == 4 * 1000 * 5 + 6 * 25 * 10
