"""Every algorithm on the GPU, on both backends: full in bf16, LoRA, QLoRA; trained, evaluated, generating, resumed.

`ALIGNTUNE_GPU_RUNS=cpu` runs the same cases on a CPU, in fp32, to try the test itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from aligntune import ConfigError, create_reward_trainer, create_rl_trainer, create_sft_trainer
from aligntune.algorithms import ALGORITHMS
from tests.backends.trl.test_quantized import plain  # noqa: F401  a model wide enough for 4 bits
from tests.core.test_trainer import lines, weights

ON_CPU = os.environ.get("ALIGNTUNE_GPU_RUNS") == "cpu"
pytestmark: Any = [] if ON_CPU else pytest.mark.gpu
DEVICE, DTYPE = ("cpu", torch.float32) if ON_CPU else ("cuda", torch.bfloat16)

MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"use_peft": True, "lora_r": 4},
    "qlora": {"quantization": "nf4", "use_peft": True, "lora_r": 4},
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"conversations": [{"from": "human", "value": f"say {i}"}, {"from": "gpt", "value": f"{i} " * (i % 3 + 1)}]}
            for i in range(8)],
    "preference": [{"prompt": f"say {i}", "chosen": f" {i}" * (i % 3 + 1), "rejected": " no" * (i % 2 + 1)}
                   for i in range(8)],
    "unpaired": [{"prompt": f"say {i}", "completion": f" {i}" * (i % 3 + 1), "label": i % 2 == 0} for i in range(8)],
    "prompts": [{"prompt": f"count to {i}:"} for i in range(8)],
}
ROWS["reward"] = ROWS["preference"]


def letters(completions: list[Any], **columns: Any) -> list[float]:
    """Different for all completions of a prompt: of equal rewards nothing would be learnt."""
    return [len(set(str(text))) + place / 64 for place, text in enumerate(completions)]


CASES = [(backend, algorithm) for backend in ("trl", "fast") for algorithm in ALGORITHMS.names()
         if (backend, algorithm) != ("fast", "gspo")]  # which it refuses


def make(backend: str, algorithm: str, mode: str, source: str, path: Path, **more: Any) -> Any:
    spec = ALGORITHMS.load(algorithm)
    rows = ROWS[spec.takes]
    options: dict[str, Any] = {
        "backend": backend, "output_dir": str(path), "max_steps": 2, "batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": "none", "max_seq_length": 64, "eval_dataset_name": rows[:4],
        "eval_batch_size": 4, **MODES[mode], **more,
    }
    if spec.online:
        options |= {"reward_functions": [letters], "max_completion_length": 6}
        options |= {"num_generations": 4} if spec.groups else {}
    if algorithm == "gspo":
        options["steps_per_generation"] = 1  # else a rollout, and the checkpoint within it, is longer than this run
    if algorithm == "sft":
        return create_sft_trainer(source, rows, **options)
    if algorithm == "reward":
        return create_reward_trainer(source, rows, **options)
    return create_rl_trainer(source, rows, algorithm=algorithm, **options)


def assert_fast(told: dict[str, Any], *, online: bool, quantised: bool) -> None:
    """What a run on backend fast attests: our kernels ran as promised, our engine drew, the base stayed in 4 bits."""
    assert told["step"]["ok"], told["step"]["problems"]
    assert ("rollouts: our engine" in told["layout"]) == online
    assert bool(told["step"]["kernels"].get("nf4_dequant_kernel")) == quantised


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("backend", "algorithm"), CASES)
def test_it_trains_evaluates_and_generates(
    backend: str, algorithm: str, mode: str, plain: str, tmp_path: Path  # noqa: F811
) -> None:
    trainer = make(backend, algorithm, mode, plain, tmp_path / "run")
    assert {value.device.type for value in trainer.model.parameters()} == {DEVICE}
    assert trainer.trainer.args.bf16 == (not ON_CPU)
    quantised = [module for module in trainer.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert bool(quantised) == (mode == "qlora")
    assert all(module.compute_dtype == DTYPE for module in quantised)
    before = weights(trainer.trainer)
    assert trainer.train().global_step == 2
    records = [record for record in lines(tmp_path / "run") if record["kind"] == "train"]
    assert [record["step"] for record in records] == [1, 2]
    assert all(0 < record["grad_norm"] < 1e6 for record in records)
    moved = {name for name, value in weights(trainer.trainer).items() if not torch.equal(value, before[name])}
    heads = ("score", "critic.head")
    assert moved and all(mode == "full" or "lora_" in name or any(head in name for head in heads) for name in moved)
    online = ALGORITHMS.load(algorithm).online
    if backend == "fast":
        assert_fast(trainer.attestation(), online=online, quantised=mode == "qlora")
    metrics = trainer.evaluate()
    assert ("eval_rollout/seconds" in metrics) == (online and backend == "fast")
    wanted = "eval_reward" if online else "eval_loss"
    assert metrics[wanted] == pytest.approx(metrics[wanted]) and metrics[wanted] != 0  # no NaN
    if algorithm == "reward":
        with pytest.raises(ConfigError, match="does not generate"):
            trainer.generate(["say 3"])
    else:
        texts = trainer.generate(["say 3", "count to 12:"], max_new_tokens=5)
        assert len(texts) == 2 and any(texts)
    if mode == "lora":
        resumed = make(backend, algorithm, mode, plain, tmp_path / "run", resume=True, max_steps=3)
        assert resumed.train().global_step == 3


@pytest.mark.skipif("__import__('torch').cuda.device_count() < 2", reason="needs two GPUs")
@pytest.mark.parametrize("algorithm", ["sft", "simpo", "dpo", "grpo", "rloo", "ppo"])
@pytest.mark.parametrize("backend", ["trl", "fast"])
def test_one_process_that_sees_two_gpus_trains_on_the_first(
    backend: str, algorithm: str, plain: str, tmp_path: Path  # noqa: F811
) -> None:
    kl = {"beta": 0.1} if algorithm in ("dpo", "grpo", "rloo") else {}
    trainer = make(backend, algorithm, "full", plain, tmp_path / "run", **kl)
    assert trainer.train().global_step == 2
    models = [trainer.model, getattr(trainer.trainer, "ref_model", None)]
    assert (models[1] is not None) == (algorithm not in ("sft", "simpo"))
    assert {p.device.index for model in models if model is not None for p in model.parameters()} == {0}
