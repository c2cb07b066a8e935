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

from benchmarks.bounds import gradient_distances
from tests.backends.fast.two_processes import ROWS, train

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.dist

# job -> (the one that takes the same rows a step in one process, without accumulation; trained parameters).
# Of grpo each process draws completions of its own: no run of one process has them.
ALONE = {"sft": ("sft", 14), "sft-full": ("sft-full", 12), "sft-accumulated": ("sft-full", 12), "dpo": ("dpo", 14)}


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


def assert_like_one(name: str, two: dict[str, Any], alone: dict[str, Any]) -> None:
    """The first step's gradient of every parameter to 1e-5; losses of three steps."""
    like, parameters = ALONE[name]
    one = alone[like]
    assert (two["processes"], one["processes"], one["accumulation"]) == (2, 1, 1) and two["apart"] == 0.0
    apart = gradient_distances(one["gradients"], two["gradients"])
    worst = max(apart, key=lambda name: apart[name])
    assert len(apart) == parameters and apart[worst] < 1e-5, f"{name}: {worst}: {apart[worst]:.1e}"
    assert min(float(gradient.norm()) for gradient in one["gradients"][0].values()) > 1e-2
    assert len(set(one["losses"].tolist())) == 3
    assert two["losses"][:1].tolist() == pytest.approx(one["losses"][:1].tolist(), rel=2e-6)
    assert two["losses"].tolist() == pytest.approx(one["losses"].tolist(), rel=1e-4)


def check(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for name, two in found.items():
        assert two["layout"].startswith("rows: end to end") and two["apart"] == 0.0, name
        assert all(float(value.norm()) > 1e-3 for value in two["weights"].values())
        assert two["gradients"] and all(float(g.norm()) > 0 for g in two["gradients"][0].values())
        assert two["accumulation"] == (2 if name == "sft-accumulated" else 1)
        if name in ALONE:
            assert_like_one(name, two, alone)


def jobs_alone(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of one process that `names` are held against, each once."""
    return tuple(dict.fromkeys(ALONE[name][0] for name in names if name in ALONE))


@pytest.mark.parametrize(
    "names",
    [("sft", "sft-accumulated"), *(pytest.param(names, marks=pytest.mark.slow)
                                   for names in (("sft-full",), ("dpo", "grpo")))],
    ids="+".join,
)
def test_two_processes_train_like_one(names: tuple[str, ...], tmp_path: Path) -> None:
    check(together(tmp_path, names), {name: train(name, tmp_path, world=1) for name in jobs_alone(names)})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_like_one(tmp_path: Path) -> None:
    names = tuple(ROWS)
    (tmp_path / "one").mkdir()
    # A process that sees two GPUs would split its batches over both.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    alone = together(tmp_path / "one", jobs_alone(names), processes=1, CUDA_VISIBLE_DEVICES=first)
    found = together(tmp_path, names)
    assert {two["device"] for two in found.values()} == {"cuda:0"}
    check(found, alone)
