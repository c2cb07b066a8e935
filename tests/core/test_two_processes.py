"""Two processes: one folder, one writer, evaluation over all rows, and a Ctrl-C that only one of them heard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from aligntune.core.run_dir import RunDir
from tests.core import tiny

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, os, pathlib, signal, sys
import torch.distributed as dist
from aligntune.core.run_dir import RunDir
from aligntune.core.trainer import AlignTrainer
from aligntune.errors import AlignTuneError
from tests.core import tiny
from tests.core.test_trainer import At

os.chdir(sys.argv[1])
rank = int(os.environ["RANK"])
folder = RunDir.create(algorithm="sft", model_name="tiny")
found = {"folder": str(folder.path)}

def make(path):
    trainer = tiny.sft(path, eval_rows=tiny.text_rows(7), per_device_eval_batch_size=2, save_steps=100,
                       per_device_train_batch_size=1)
    return trainer, AlignTrainer(trainer, config={}, run_dir=RunDir(path), tokenizer=trainer.processing_class,
                                 backend="trl", algorithm="sft", progress=False)

trainer, run = make(folder.path)
if rank == 1:
    trainer.callback_handler.callbacks.insert(0, At(2, lambda control: os.kill(os.getpid(), signal.SIGINT)))
found["metrics"] = run.evaluate()
try:
    run.train()
except KeyboardInterrupt as stop:
    found["stopped"] = str(stop)
trainer, run = make(folder.path)
found["steps"] = run.train(resume_from_checkpoint=True).global_step
run.save_model(folder.path / "model")
dist.barrier()
found["weight"] = float(sum(value.double().sum() for value in trainer.model.parameters()))
try:
    RunDir.create(folder.path, algorithm="sft", model_name="tiny")
except AlignTuneError as error:
    found["refused"] = str(error)
pathlib.Path(f"rank{rank}.json").write_text(json.dumps(found))
dist.barrier()  # a process that leaves while the other still speaks to it is aborted by gloo
dist.destroy_process_group()
"""


@pytest.mark.dist
@pytest.mark.skipif(Version(torch.__version__) < Version("2.12"),
                    reason="torch 2.11 restores no optimizer's state on 'cpu:0'")
def test_two_processes_share_one_run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    folder = Path(first["folder"])
    assert first["folder"] == second["folder"] and list((tmp_path / "runs").iterdir()) == [folder]
    assert "stopped at step 2 of 6" in first["stopped"] and first["stopped"] == second["stopped"]
    assert first["steps"] == second["steps"] == 6 and first["weight"] == second["weight"]
    assert "holds another run" in first["refused"] and first["refused"] == second["refused"]
    assert [record["step"] for record in RunDir(folder).read_metrics()] == [0, 1, 2, 3, 4, 5, 6]
    assert (folder / "model/model.safetensors").is_file()
    assert done.stderr.count("step 3/6") == 1

    # The seven rows, once each, weighted by their tokens.
    trainer = tiny.sft(tmp_path / "alone", eval_rows=tiny.text_rows(7))
    total, count = 0.0, 0
    with torch.no_grad():
        for row in trainer.eval_dataset:
            ids = torch.tensor([row["input_ids"]])
            scores = torch.log_softmax(trainer.model(ids).logits[0, :-1], dim=-1)
            total -= float(scores.gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
    assert first["metrics"]["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert first["metrics"]["eval_loss"] == second["metrics"]["eval_loss"]
