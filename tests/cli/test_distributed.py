"""Two processes, started as users start them: the losses are those of one process, and the ranks stay equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from aligntune.cli.training import _leave_group
from aligntune.core.recipe_run import run_recipe
from tests import small_jobs

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

GRPO = """
import gc, json, os, pathlib, sys
import torch
import torch.distributed as dist
from aligntune import create_rl_trainer

shop, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
seen = []

def reward(prompts, completions, **columns):
    seen.extend(columns["answer"])
    return [float(len(completion[0]["content"]) + 7 * index) for index, completion in enumerate(completions)]

trainer = create_rl_trainer(
    str(shop / "model"), str(shop / "graded.jsonl"), algorithm="grpo", backend="trl", device="cpu", max_steps=3,
    batch_size=2, num_generations=4, max_completion_length=6, max_seq_length=64, learning_rate=1e-2, beta=0.1,
    reward_functions=[reward], output_dir=str(shop / "grpo"), report_to="none")
before = sum(value.double().sum() for value in trainer.model.parameters())
trainer.train()
flat = torch.cat([value.detach().reshape(-1) for value in trainer.model.parameters()])
everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
dist.all_gather(everyone, flat)
found = {"world": dist.get_world_size(), "apart": float((everyone[0] - everyone[1]).abs().max()),
         "moved": abs(float(flat.double().sum() - before)), "seen": seen}
(shop / f"grpo-rank{rank}.json").write_text(json.dumps(found))
del trainer
gc.collect()  # the group's threads end with the last model that holds it
dist.barrier()  # a process that leaves while the other still speaks to it is aborted by gloo
dist.destroy_process_group()
"""


def start(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    return subprocess.run([sys.executable, *TORCHRUN, *arguments], cwd=cwd, env=environment, text=True,
                          capture_output=True, timeout=400)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("shop"))


def filled(folder: Path) -> Path:
    """The folder with a model, data, a reward and a recipe of sft and dpo."""
    model = small_jobs.model_folder(folder / "model")
    chat, pairs = small_jobs.alpaca(folder / "chat.jsonl", 32), small_jobs.pairs(folder / "pairs.jsonl", 32)
    graded = small_jobs.graded(folder / "graded.jsonl")
    small_jobs.write(folder / "recipe.yaml", {
        "defaults": {
            "backend": "trl", "model": {"model_name": model, "device": "cpu"}, "data": {"max_seq_length": 64},
            "train": {"batch_size": 4, "max_steps": 3, "learning_rate": 1e-2},
            "logging": {"report_to": "none", "logging_steps": 1},
        },
        "stages": [{"algorithm": "sft", "data": {"dataset_name": chat}},
                   {"algorithm": "dpo", "data": {"dataset_name": pairs}}],
        "probe": {"dataset_name": graded, "max_samples": 5, "max_new_tokens": 4,
                  "reward": f"{folder / 'r.py'}:letters"},
    })
    (folder / "r.py").write_text(
        "def letters(completions, answer, **columns):\n"
        "    return [len(turns[0]['content']) + 10 * int(a) for turns, a in zip(completions, answer)]\n")
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_like_one_with_the_same_global_batch(shop: Path) -> None:
    done = start("-m", "aligntune", "train", "recipe.yaml", "output_dir=two", "batch_size=2", cwd=shop)
    assert done.returncode == 0, done.stderr
    one = run_recipe(shop / "recipe.yaml", {"output_dir": str(shop / "one")})
    state = json.loads((shop / "two" / "recipe.json").read_text())["stages"]
    for number, name in enumerate(("1-sft", "2-dpo")):
        environment = json.loads((shop / "two" / name / "environment.json").read_text())
        assert environment["flags"]["WORLD_SIZE"] == "2"
        alone, together = metrics(shop / "one" / name), metrics(shop / "two" / name)
        assert len(alone) == len(together) == 3
        for mine, theirs in zip(alone, together, strict=True):
            assert mine["loss"] > 0.1
            assert theirs["loss"] == pytest.approx(mine["loss"], abs=1e-5)
            assert theirs["num_tokens"] == mine["num_tokens"]
        assert alone[0]["loss"] != alone[2]["loss"]
        probed = state[number]["result"]
        assert probed["probe_after"] == pytest.approx(one[number].probe_after, abs=1e-9)
        assert one[number].probe_after > 30  # the mean over all 5 prompts, not over one process's
    # One process talks: each of these lines is there once.
    for text, count in (("Data for sft", 1), ("step 3/3", 2), ("before 1-sft", 1)):
        assert done.stderr.count(text) == count, done.stderr
    assert done.stdout.count("2-dpo: ") == 1


def test_where_nothing_was_trained_no_group_is_made_to_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda: pytest.fail("a group would be made"))
    _leave_group()


def test_an_error_of_all_processes_is_a_message(shop: Path) -> None:
    done = start("-m", "aligntune", "train", "recipe.yaml", "output_dir=three", "lernin_rate=1", cwd=shop)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr.partition("torch/distributed/elastic")[0]
    assert "lernin_rate: unknown option" in done.stderr
    assert not (shop / "three").exists()


def test_online_methods_run_and_the_ranks_stay_equal(shop: Path) -> None:
    (shop / "grpo.py").write_text(GRPO)
    done = start("grpo.py", str(shop), cwd=shop)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((shop / f"grpo-rank{rank}.json").read_text()) for rank in (0, 1)]
    for found in ranks:
        assert found["world"] == 2
        assert found["apart"] == 0.0
        assert found["moved"] > 1e-3, "nothing was trained"
        assert len(found["seen"]) == 6
    assert len({json.dumps(found["moved"]) for found in ranks}) == 1


@pytest.mark.gpu
@pytest.mark.skipif("__import__('torch').cuda.device_count() < 2", reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["trl", "fast"])
def test_accelerate_launches_two_gpus(backend: str, tmp_path: Path) -> None:
    """sft and dpo as one process with the same global batch; then GRPO from the recipe's third stage."""
    shop = filled(tmp_path)
    recipe = yaml.safe_load((shop / "recipe.yaml").read_text())
    recipe["defaults"]["model"] |= {"device": "cuda", "precision": "fp32"}
    recipe["stages"].append({
        "algorithm": "grpo", "data": {"dataset_name": str(shop / "graded.jsonl")},
        "rollout": {"num_generations": 4, "max_completion_length": 6},
        "rewards": {"reward_functions": [f"{shop / 'r.py'}:letters"]}})
    small_jobs.write(shop / "recipe.yaml", recipe)
    arguments = ("-m", "aligntune", "train", "recipe.yaml", f"backend={backend}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    accelerate = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                  "--mixed_precision", "no", "--dynamo_backend", "no")
    runs = (((), ("output_dir=one",), "0"), (accelerate, ("output_dir=two", "batch_size=2"), "0,1"))
    for command, extra, gpus in runs:
        done = subprocess.run(
            [sys.executable, *command, *arguments, *extra], cwd=shop, text=True, capture_output=True, timeout=300,
            env={**environment, "CUDA_VISIBLE_DEVICES": gpus})  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    for name in ("1-sft", "2-dpo"):
        told = json.loads((shop / "two" / name / "environment.json").read_text())
        assert told["flags"]["WORLD_SIZE"] == "2"
        alone, together = metrics(shop / "one" / name), metrics(shop / "two" / name)
        assert len(alone) == len(together) == 3 and alone[0]["loss"] != alone[2]["loss"]
        for mine, theirs in zip(alone, together, strict=True):
            assert mine["loss"] > 0.1 and theirs["loss"] == pytest.approx(mine["loss"], abs=2e-5)
            assert theirs["num_tokens"] == mine["num_tokens"]
    online = metrics(shop / "two" / "3-grpo")
    assert len(online) == 3 and all(line["reward"] > 1 for line in online)
