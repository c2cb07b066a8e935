"""Two processes on backend fast: the gradients of one with the same global batch, and ranks that stay equal.

gloo under the interpreter; on two GPUs the same jobs over NCCL.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parity import gradient_distances
from tests.backends.fast.two_processes import train

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.dist


def together(folder: Path, names: tuple[str, ...], processes: int = 2, **environment: str) -> dict[str, Any]:
    """What the processes found, by job."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
               str(ROOT / "tests/backends/fast/two_processes.py"), str(folder), *names]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
             "OMP_NUM_THREADS": "1", **environment})  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: torch.load(folder / f"{name}.pt") for name in names}


def assert_like_one(two: dict[str, Any], one: dict[str, Any]) -> None:
    """The first step's gradient of every parameter to 1e-5; losses of three steps."""
    assert (two["processes"], one["processes"]) == (2, 1) and two["apart"] == 0.0
    apart = gradient_distances(one["gradients"], two["gradients"])
    worst = max(apart, key=lambda name: apart[name])
    assert len(apart) == 14 and apart[worst] < 1e-5, f"{worst}: {apart[worst]:.1e}"
    assert len(set(one["losses"].tolist())) == 3
    assert two["losses"][:1].tolist() == pytest.approx(one["losses"][:1].tolist(), rel=2e-6)
    assert two["losses"].tolist() == pytest.approx(one["losses"].tolist(), rel=1e-4)


def check(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for name, two in found.items():
        assert two["layout"].startswith("rows: end to end") and two["apart"] == 0.0, name
        assert all(float(value.norm()) > 1e-3 for value in two["weights"].values())
        assert two["gradients"] and all(float(g.norm()) > 0 for g in two["gradients"][0].values())
        if name in alone:
            assert_like_one(two, alone[name])


# Of grpo each process draws completions of its own: no run of one process has them.
@pytest.mark.parametrize("names", [("sft",), pytest.param(("dpo", "grpo"), marks=pytest.mark.slow)], ids="+".join)
def test_two_processes_train_like_one(names: tuple[str, ...], tmp_path: Path) -> None:
    check(together(tmp_path, names), {name: train(name, tmp_path, world=1) for name in names if name != "grpo"})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_like_one(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    # A process that sees two GPUs would split its batches over both.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    alone = together(tmp_path / "one", ("sft", "dpo"), processes=1, CUDA_VISIBLE_DEVICES=first)
    found = together(tmp_path, ("sft", "dpo", "grpo"))
    assert {two["device"] for two in found.values()} == {"cuda:0"}
    check(found, alone)
