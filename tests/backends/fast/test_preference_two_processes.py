"""Preference methods in two processes: the history that both backends log is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

SCRIPT = """
import json, os, pathlib, sys
import torch.distributed as dist
from tests.backends.fast.preference_steps import built_of, pairs
from tests.backends.fast.test_preference_reward import scored, scorer
from tests.backends.fast.test_preference_unpaired import unpaired

folder, found = pathlib.Path(sys.argv[1]), {}
for algorithm in ("dpo", "kto", "simpo", "reward"):
    for backend in ("trl", "fast"):
        rows = {"kto": unpaired, "reward": scored}.get(algorithm, pairs)()
        options = {"model_name": scorer()} if algorithm == "reward" else {"use_peft": True, "beta": 0.3}
        trainer = built_of(backend, algorithm, folder, rows, batch_size=2, max_steps=2, **options).trainer
        trainer.train()
        found[f"{algorithm} {backend}"] = trainer.state.log_history[:2]
if os.environ["RANK"] == "0":
    (folder / "found.json").write_text(json.dumps(found))
dist.barrier()  # a process that leaves while the other still speaks to it is aborted by gloo
dist.destroy_process_group()
"""


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_log_what_trl_logs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for algorithm in ("dpo", "kto", "simpo", "reward"):
        for ours, theirs in zip(found[f"{algorithm} fast"], found[f"{algorithm} trl"], strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                if algorithm != "simpo" or not name.startswith("logits/"):
                    assert ours[name] == pytest.approx(value, rel=2e-3, abs=2e-4), (algorithm, name)
            assert theirs["grad_norm"] > 1e-3 and theirs.get("num_tokens", 99) > 30  # TRL counts none in simpo
