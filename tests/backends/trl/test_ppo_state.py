"""PPO checkpoints: a run killed between two minibatches of a rollout goes on bit for bit; two processes are one run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

from aligntune.errors import CheckpointError
from tests.backends.trl.ppo_cases import job, moved, weights
from tests.core import tiny
from tests.core.test_trainer import At, give_up, lines

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("save", "position"), [(3, 2), (5, 1)], ids=["between passes", "inside a pass"])
@pytest.mark.parametrize("critic", [None, pytest.param("policy", marks=pytest.mark.slow)])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_resumed_between_minibatches_bit_for_bit(
    save: int, position: int, critic: str | None, adapters: bool, tmp_path: Any
) -> None:
    """A rollout of the job is two passes of two steps: 4 steps. The cut is after step 6 or 5."""
    last = 6 // save * save
    options: dict[str, Any] = {
        "value_model_name": critic, "save_steps": save, "max_steps": 10, "kl_control": "adaptive", "kl_goal": 0.1,
        "warmup_steps": 4, **({"use_peft": True, "lora_r": 4, "lora_dropout": 0.1} if adapters else {}),
    }
    whole = job(tmp_path / "whole", **options)
    whole.train()
    broken = job(tmp_path / "run", **options)
    broken.trainer.add_callback(At(last + 1, give_up))
    with pytest.raises(RuntimeError, match="power cut"):
        broken.train()
    state = torch.load(tmp_path / f"run/checkpoint-{last}/ppo_state_0.pt", weights_only=True)
    assert state["position"] == position and state["rollout"] is not None, "the step lies within a rollout"
    resumed = job(tmp_path / "run", resume=True, **options)
    out = resumed.train()
    assert out.global_step == 10
    assert not moved(weights(whole.trainer), weights(resumed.trainer))
    assert lines(tmp_path / "whole") == lines(tmp_path / "run")
    assert whole.trainer.kl_coef == resumed.trainer.kl_coef != 0.05


def test_resumed_at_the_end_of_a_rollout_and_within_skipped_steps(tmp_path: Any) -> None:
    options = {"save_steps": 1, "max_steps": 9, "target_kl": 1e-6}
    whole = job(tmp_path / "whole", **options)
    whole.train()
    for step in (3, 4, 6):  # steps 3 and 4 are left out, 4 ends a rollout
        shutil.copytree(tmp_path / "whole", tmp_path / str(step))
        run = job(tmp_path / str(step), resume=str(tmp_path / str(step) / f"checkpoint-{step}"), **options)
        assert run.train().global_step == 9
        assert not moved(weights(whole.trainer), weights(run.trainer)), step


def test_a_checkpoint_holds_what_the_critic_learnt(tmp_path: Any) -> None:
    run = job(tmp_path, value_model_name="policy", use_peft=True, lora_r=4, max_steps=2)
    run.train()
    saved = load_file(tmp_path / "checkpoint-2/critic.safetensors")
    assert {"head.weight", "head.bias"} < saved.keys()
    assert all("lora_" in name for name in saved if not name.startswith("head."))
    assert all(torch.equal(saved[name], value) for name, value in run.trainer.critic.trainable().items())


def test_another_critic_is_refused(tmp_path: Any) -> None:
    job(tmp_path, max_steps=2).train()
    with pytest.raises(CheckpointError, match="the critic of the checkpoint is another one"):
        job(tmp_path, max_steps=3, value_model_name="policy", resume=True).train()
    (tmp_path / "checkpoint-2/critic.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no PPO state"):
        job(tmp_path, max_steps=3, resume=True).train()


GREEDY: dict[str, Any] = {
    "max_steps": 2, "num_mini_batches": 1, "num_ppo_epochs": 2, "optimizer": "sgd", "max_grad_norm": 0.0,
    "lr_scheduler": "constant", "learning_rate": 1e-2, "trainer_options": {"generation_kwargs": {"do_sample": False}},
}
"""A rollout without chance: two processes with a row each must take the step that one takes with both."""

SCRIPT = """
import json, os, pathlib, sys
import torch, torch.distributed as dist
from tests.backends.trl.ppo_cases import job, weights
from tests.backends.trl.test_ppo_state import GREEDY
from tests.core.test_trainer import At, give_up

folder = pathlib.Path(sys.argv[1])
rank = int(os.environ["RANK"])
options = {"save_steps": 3, "max_steps": 6, "batch_size": 1, "kl_control": "adaptive"}
if sys.argv[2]:
    options |= {"value_model_name": sys.argv[2], "use_peft": True, "lora_r": 4}
whole = job(folder / "whole", **options)
whole.train()
broken = job(folder / "run", **options)
broken.trainer.add_callback(At(5, give_up))
try:
    broken.train()
except RuntimeError:
    dist.barrier()
resumed = job(folder / "run", resume=True, **options)
resumed.train()
greedy = job(folder / "greedy", **{**options, **GREEDY})
greedy.train()
if rank == 0:
    torch.save(weights(greedy.trainer), folder / "greedy.pt")
ends = [weights(run.trainer) for run in (whole, resumed)]
same = all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
rollout = whole.trainer._rollout
mask = rollout["loss_mask"].bool()
found = {"same": same, "sum": float(sum(v.double().sum() for v in ends[0].values())),
         "critic": float(sum(v.double().abs().sum() for n, v in ends[0].items() if n.startswith("critic."))),
         "advantages": rollout["advantages"][mask].tolist(),
         "logged": [{key: value for key, value in entry.items() if "time" not in key and "second" not in key}
                    for entry in whole.trainer.state.log_history if "objective/kl" in entry]}
(folder / f"rank{rank}.json").write_text(json.dumps(found))
dist.barrier()  # a process that leaves while the other still speaks to it is aborted by gloo
dist.destroy_process_group()
"""


@pytest.mark.dist
@pytest.mark.skipif(Version(torch.__version__) < Version("2.12"),
                    reason="torch 2.11 restores no optimizer's state on 'cpu:0'")
@pytest.mark.slow
@pytest.mark.parametrize("critic", ["", "policy"])
def test_two_processes_are_one_run(critic: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script), str(tmp_path), critic]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["same"] and second["same"]
    assert first["sum"] == second["sum"] and first["critic"] == second["critic"] > 0
    assert first["logged"] == second["logged"] and len(first["logged"]) == 2
    both = torch.tensor([*first["advantages"], *second["advantages"]])
    assert both.mean().item() == pytest.approx(0, abs=1e-5) and both.std().item() == pytest.approx(1, abs=1e-4)
    mine = torch.tensor(first["advantages"])
    assert abs(mine.mean().item()) > 1e-3, "whitened over all processes, not over each"
    lora: dict[str, Any] = {"value_model_name": critic, "use_peft": True, "lora_r": 4} if critic else {}
    alone = job(tmp_path / "alone", batch_size=2, kl_control="adaptive", **lora, **GREEDY)
    before = weights(alone.trainer)
    alone.train()
    after, theirs = weights(alone.trainer), torch.load(tmp_path / "greedy.pt", weights_only=True)
    assert {"critic.head.weight"} < moved(before, after)
    for name, value in after.items():
        torch.testing.assert_close(theirs[name] - before[name], value - before[name], atol=2e-6, rtol=1e-3)


def test_qlora_on_cpu(tmp_path: Any) -> None:
    folder = tmp_path / "model"
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    for critic in (None, "policy"):
        run = job(tmp_path / str(critic), str(folder), quantization="nf4", use_peft=True, lora_r=4, max_steps=3,
                  value_model_name=critic)
        part = run.trainer.model if critic is None else run.trainer.critic
        assert "Linear4bit" in {type(module).__name__ for module in part.modules()}
        before = weights(run.trainer)
        assert run.train().global_step == 3
        changed = moved(before, weights(run.trainer))
        assert changed and all("lora_" in name or name.startswith("critic.head") for name in changed)
        assert bool({name for name in changed if name.startswith("critic.backbone")}) == (critic is not None)
