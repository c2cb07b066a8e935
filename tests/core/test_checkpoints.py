"""Which checkpoints are complete, also after a process was killed while it saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aligntune.core import checkpoints
from aligntune.core.run_dir import RunDir
from aligntune.core.trainer import AlignTrainer
from aligntune.errors import CheckpointError
from tests.core import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with the complete checkpoints 2 and 4, written by transformers."""
    path = tmp_path_factory.mktemp("saved")
    trainer = tiny.sft(path, max_steps=4)
    trainer.train()
    return path


@pytest.fixture
def run(saved, tmp_path):
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_complete_ones_are_found_by_number(run):
    (run / "checkpoint-10").mkdir()
    (run / "checkpoint-x").mkdir()
    (run / "checkpoint-3").write_text("a file")
    assert [path.name for path in checkpoints.all_checkpoints(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    assert checkpoints.newest_complete(run).name == "checkpoint-4"
    assert checkpoints.step_of(run / "checkpoint-4") == 4
    assert checkpoints.all_checkpoints(run / "nowhere") == []


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_seen(run, name, share):
    path = run / "checkpoint-4" / name
    os.truncate(path, int(path.stat().st_size * share))
    assert name in checkpoints.fault(run / "checkpoint-4")
    assert checkpoints.newest_complete(run).name == "checkpoint-2"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_missing_file_is_seen(run, name):
    (run / "checkpoint-4" / name).unlink()
    assert checkpoints.fault(run / "checkpoint-4")
    assert checkpoints.newest_complete(run).name == "checkpoint-2"


def test_a_missing_shard_is_seen(run):
    folder = run / "checkpoint-4"
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoints.fault(folder) == "model-2.safetensors is missing"


def test_weights_alone_are_no_checkpoint_but_stay(run):
    (run / "checkpoint-4/optimizer.pt").unlink()
    assert "save_only_model" in checkpoints.fault(run / "checkpoint-4")
    checkpoints.clear_after(run, 10)
    assert (run / "checkpoint-4").is_dir()


def test_none_left_says_what_is_there(run):
    for step in (2, 4):
        (run / f"checkpoint-{step}/trainer_state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"checkpoint-2 \(no readable trainer_state.json.*checkpoint-4"):
        checkpoints.newest_complete(run)


def test_what_resume_can_mean(run, monkeypatch):
    assert checkpoints.resolve(None, run) is None and checkpoints.resolve(False, run) is None
    assert checkpoints.resolve(True, run) == run / "checkpoint-4"
    assert checkpoints.resolve("checkpoint-2", run) == run / "checkpoint-2"
    assert checkpoints.resolve(str(run), run / "other") == run / "checkpoint-4"
    with pytest.raises(CheckpointError, match="complete ones in .*checkpoint-2, checkpoint-4"):
        checkpoints.resolve("checkpoint-7", run)
    os.truncate(run / "checkpoint-2/optimizer.pt", 10)
    with pytest.raises(CheckpointError, match="optimizer.pt is cut short"):
        checkpoints.resolve(run / "checkpoint-2", run)


def test_clearing_deletes_the_unfinished_and_renames_the_later(run):
    (run / "checkpoint-9").mkdir()
    (run / "old-checkpoint-4").mkdir()
    said = checkpoints.clear_after(run, 2)
    assert len(said) == 2
    assert sorted(path.name for path in run.glob("*checkpoint-*")) == [
        "checkpoint-2", "old-checkpoint-4", "old-checkpoint-4-2"]
    assert checkpoints.fault(run / "old-checkpoint-4-2") is None


def test_our_state_is_empty_for_plain_trl(run):
    assert checkpoints.our_state(run / "checkpoint-4") == {}


KILLED = """
import os, signal, sys
import torch
from aligntune.core.run_dir import RunDir
from aligntune.core.trainer import AlignTrainer
from tests.core import tiny

plain = torch.save
def half(value, path, *rest, **options):
    plain(value, path, *rest, **options)
    if str(path).endswith(os.path.join("checkpoint-4", sys.argv[2])):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
trainer = tiny.sft(sys.argv[1], logging_steps=1)
AlignTrainer(trainer, config={}, run_dir=RunDir(sys.argv[1]), tokenizer=trainer.processing_class, backend="trl",
             algorithm="sft", progress=False).train()
"""


@pytest.mark.parametrize("file", ["optimizer.pt", pytest.param("rng_state.pth", marks=pytest.mark.slow)])
def test_a_run_killed_in_a_save_resumes_from_the_one_before(tmp_path, file):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run"), file], env=environment, cwd=ROOT,
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "run/checkpoint-4").is_dir() and not (tmp_path / "run/summary.json").exists()

    whole = tiny.sft(tmp_path / "whole", logging_steps=1)
    whole.train()
    trainer = tiny.sft(tmp_path / "run", logging_steps=1)
    run = AlignTrainer(trainer, config={}, run_dir=RunDir(tmp_path / "run"), tokenizer=trainer.processing_class,
                       backend="trl", algorithm="sft", progress=False)
    assert run.train(resume_from_checkpoint=True).global_step == 6
    assert run.run_dir.read_json("summary.json")["resumed_from"].endswith("checkpoint-2")
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.named_parameters())
    steps = [record["step"] for record in run.run_dir.read_metrics()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert checkpoints.newest_complete(tmp_path / "run").name == "checkpoint-6"
    assert checkpoints.fault(tmp_path / "run/checkpoint-4") is None
