"""What a process of a test of two does: `torchrun ... two_processes.py FOLDER NAME ...` trains jobs on backend fast.

Each job is trained by the public factory with the same rows a step as one process takes alone; rank 0 writes losses,
first gradients and weights, and how far apart the ranks are.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aligntune import create_rl_trainer, create_sft_trainer
from benchmarks import parity_runs
from tests.backends.fast.minis import build
from tests.core import tiny

# Of uneven lengths: a mean of micro-batches' means is another loss.
TEXTS = [{"text": f"{i * i}:" + "ab" * (i % 4) + "c" * (i % 2)} for i in range(8)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": TEXTS,
    "sft-full": TEXTS,
    "sft-accumulated": TEXTS,
    "dpo": [{"prompt": f"say {i}", "chosen": f" {i}" * (i % 3 + 1), "rejected": " no" * (i % 2 + 1)} for i in range(8)],
    "grpo": [{"prompt": f"count to {i}:"} for i in range(8)],
}
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 3, "lora_dropout": 0.0}
FULL: dict[str, Any] = {"use_peft": False}
MORE: dict[str, dict[str, Any]] = {
    "sft": LORA,
    "sft-full": FULL,
    "sft-accumulated": FULL | {"gradient_accumulation_steps": 2},
    "dpo": LORA,
    "grpo": LORA
    | {"reward_functions": [parity_runs.letters], "num_generations": 4, "max_completion_length": 5, "beta": 0.1},
}


def train(name: str, folder: Path, *, world: int) -> dict[str, Any]:
    """{losses, gradients, weights, layout, accumulation} of three steps of 4 rows, over `world` processes."""
    gradients = parity_runs.FirstGradients()
    given = {**parity_runs.COMMON, "backend": "fast", "precision": "fp32", "tokenizer_name": tiny.tokenizer(),
             "batch_size": 4 // world // MORE[name].get("gradient_accumulation_steps", 1), "max_steps": 3,
             "learning_rate": 1e-2, "max_seq_length": 64,
             "output_dir": str(folder / f"{name}-{world}"), "callbacks": [gradients], **MORE[name]}  # fmt: skip
    model = build("llama", vocab_size=259, max_position_embeddings=256, num_hidden_layers=1)
    with parity_runs.no_tf32():
        if name.startswith("sft"):
            run = create_sft_trainer(model, ROWS[name], **given)
        else:
            run = create_rl_trainer(model, ROWS[name], algorithm=name, **given)
        parity_runs.draw_adapters(run.trainer.model)
        run.train()
    weights = {key: p.detach().cpu() for key, p in run.trainer.model.named_parameters() if p.requires_grad}
    return {"losses": parity_runs.losses_of(run), "gradients": gradients.found, "weights": weights,
            "layout": run.attestation()["layout"], "processes": run.trainer.accelerator.num_processes,
            "accumulation": run.trainer.args.gradient_accumulation_steps, "device": str(run.trainer.accelerator.device)}


def spread(weights: dict[str, torch.Tensor], device: str) -> float:
    """The largest difference of any weight between two ranks."""
    flat = torch.cat([value.flatten() for value in weights.values()]).to(device)
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    return max(float((other - everyone[0]).abs().max()) for other in everyone)


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        found = train(name, folder, world=int(os.environ["WORLD_SIZE"]))
        found["apart"] = spread(found["weights"], found["device"])
        if os.environ["RANK"] == "0":
            torch.save(found, folder / f"{name}.pt")
    dist.barrier()  # a process that leaves while the other still speaks to it is aborted by gloo
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
