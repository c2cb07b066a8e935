"""The card while an arm runs: clocks, temperature, power, throttling, who else is on it; read from nvidia-smi outside.

Without nvidia-smi every field is None and `note` says so: nothing is guessed.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIELDS = ("timestamp", "name", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu",
          "memory.used", "clocks_event_reasons.active")
_OLD = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}  # before driver 535
EVERY_MS = 500
SHARED_MIB = 300
"""Memory in use on the card before an arm starts, above which somebody else is on it; an idle driver holds less."""

THROTTLE = {0x8: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
            0x80: "power brake", 0x4: "power cap"}
_SERIOUS = 0x8 | 0x20 | 0x40 | 0x80


class Watch:
    """Reads the card twice a second from `start` to `stop`.

    Args:
        folder: where nvidia-smi's lines are kept while it runs.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "nvidia-smi.csv"
        self._process: subprocess.Popen[bytes] | None = None
        self._others: list[str] = []
        self._own = 0.0
        self._load: tuple[float, ...] = ()

    def start(self) -> None:
        """Begin; does nothing where there is no nvidia-smi."""
        self._load = os.getloadavg()
        tool = shutil.which("nvidia-smi")
        if tool is None:
            return
        device = ["-i", card()]
        self._others, self._own = _compute_apps(tool, device)
        fields = ",".join(FIELDS)
        if _asked(tool, device, f"--query-gpu={fields}") is None:
            for new, old in _OLD.items():
                fields = fields.replace(new, old)
        with self._path.open("wb") as file:
            self._process = subprocess.Popen(
                [tool, *device, f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-lms",
                 str(EVERY_MS)], stdout=file, stderr=subprocess.DEVNULL)
        time.sleep(2 * EVERY_MS / 1e3)  # a reading of the card before the arm is on it

    def stop(self) -> list[str]:
        """End; returns the lines that were read."""
        if self._process is None:
            return []
        self._process.terminate()
        self._process.wait(timeout=30)
        tool = shutil.which("nvidia-smi")
        if tool is not None:  # the arm is gone: who is there now came while it ran
            self._others += [one for one in _compute_apps(tool, ["-i", card()])[0] if one not in self._others]
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        self._path.unlink()
        return lines

    def summary(self, lines: Sequence[str], window: Sequence[float] | None) -> dict[str, Any]:
        """What the report holds of one arm's run; `window` is when it trained (`time.time()`)."""
        samples = [sample for line in lines if (sample := parse(line)) is not None]
        load = {"load_before": list(self._load), "load_after": list(os.getloadavg()), "cpus": os.cpu_count()}
        if not samples:
            why = "is not here" if self._process is None else "reads nothing"
            return {"card": None, "note": f"no card: nvidia-smi {why}", **load}
        inside = samples if window is None else [s for s in samples if window[0] <= s["time"] <= window[1]] or samples
        bits = 0
        for sample in inside:
            bits |= sample["throttle"]
        before = (samples[0]["used"] or 0.0) - self._own
        return {
            "card": samples[0]["name"], "note": None, "samples": len(inside), **load,
            "sm_clock_mhz": _range(inside, "sm"), "memory_clock_mhz": _range(inside, "mem"),
            "temperature_c": _range(inside, "temperature"), "power_w": _range(inside, "power"),
            "utilization": _range(inside, "utilization"), "energy_j": energy(inside),
            "throttled": [text for bit, text in THROTTLE.items() if bits & bit & _SERIOUS],
            "power_capped": bool(bits & 0x4), "memory_before_mib": before,
            "shared": before > SHARED_MIB or bool(self._others), "others": self._others,
        }


def parse(line: str) -> dict[str, Any] | None:
    """One line of nvidia-smi's answer to `FIELDS`; None for a half-written or foreign one."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(FIELDS):
        return None
    try:
        stamp, _, fraction = parts[0].partition(".")
        seconds = time.mktime(time.strptime(stamp, "%Y/%m/%d %H:%M:%S")) + float(f"0.{fraction or 0}")
    except ValueError:
        return None
    sm, mem, temperature, power, utilization, used = (_number(part) for part in parts[2:8])
    try:
        throttle = int(parts[8], 16)
    except ValueError:
        throttle = 0
    return {"time": seconds, "name": parts[1], "sm": sm, "mem": mem, "temperature": temperature, "power": power,
            "utilization": utilization, "used": used, "throttle": throttle}


def energy(samples: Sequence[dict[str, Any]]) -> float | None:
    """Joules: power over time by the trapezoid rule; None where the card does not tell its power."""
    if len(samples) < 2 or any(sample["power"] is None for sample in samples):
        return None
    return sum((after["time"] - before["time"]) * (after["power"] + before["power"]) / 2
               for before, after in zip(samples, samples[1:], strict=False))


def _range(samples: Sequence[dict[str, Any]], name: str) -> dict[str, float] | None:
    values = [sample[name] for sample in samples if sample[name] is not None]
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None  # "[N/A]"


def card() -> str:
    """The one card that arms run on: the first that this process may use, as nvidia-smi numbers them."""
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]


def _asked(tool: str, device: list[str], query: str) -> list[str] | None:
    """nvidia-smi's lines, None where it refuses."""
    done = subprocess.run([tool, *device, query, "--format=csv,noheader,nounits"], capture_output=True, text=True,
                          timeout=30, check=False)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else None


def _compute_apps(tool: str, device: list[str]) -> tuple[list[str], float]:
    """Who else computes on the card, and the MiB that this process and those it started hold there: asking torch for a
    card's name can leave a context on it, and so can the imports of an arm that waits."""
    lines = _asked(tool, device, "--query-compute-apps=pid,process_name,used_memory") or []
    own = [line for line in lines if _ours(line.partition(",")[0].strip())]
    return [line for line in lines if line not in own], sum(_number(line.rpartition(",")[2]) or 0.0 for line in own)


def _ours(pid: str) -> bool:
    """Whether a process is this one, or one that this one started."""
    if pid == str(os.getpid()):
        return True
    try:
        status = Path("/proc", pid, "stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[1] == str(os.getpid())  # "pid (its name) state parent ..."
