"""Results of arms as a run would give them, made up: for tests of what is concluded from them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

STEPS = 20
KERNELS = {"kernels": {"rms_norm_forward": 5}, "promised": {"rms_norm_forward": 5}, "problems": []}


def step(number: int, loss: float, *, seconds: float = 0.1, rows: int = 4, metrics: dict[str, float] | None = None
         ) -> dict[str, Any]:
    names = [f"{number:02d}-{row}" for row in range(rows)]
    return {
        "step": number, "loss": loss, "grad_norm": 1.0, "seconds": seconds, "traced": False, "learning_rate": 1e-3,
        "rows": rows, "slots": 500, "phases": {"forward": seconds / 3, "backward": seconds / 2}, "tokens": 400,
        "documents": rows, "squared": 40_000, "learnt": 300, "metrics": dict(metrics or {}),
        "data": {"ids": names, "labels": names, "prompts": names},
    }


def result(folder: Path, role: str = "a", *, label: str = "trl", repeat: int = 0, speed: float = 1.0,
           noise: float = 0.0, backend: str = "trl", online: bool = False, gradient: float = 0.0) -> dict[str, Any]:
    """An arm's result; `noise` is added to its losses, `gradient` is the relative error of its gradients."""
    generator = np.random.default_rng(repeat + 10 * (role == "b"))
    place = folder / f"{role}-{repeat}"
    place.mkdir(parents=True, exist_ok=True)
    truth = torch.Generator().manual_seed(0)
    grads, norms = {}, {}
    for name in ("layers.0.mlp.weight", "layers.1.mlp.weight"):
        clean = torch.randn(64, generator=truth)
        grads[f"1/{name}"] = clean * (1 + gradient)
        norms[f"1/{name}"] = float(grads[f"1/{name}"].norm())
    save_file(grads, place / "gradients.safetensors")
    logits = torch.randn(10, 7, generator=truth)
    save_file({"log_probs": (logits + noise).log_softmax(-1)}, place / "probe.safetensors")
    steps = [step(n, 3.0 - 0.05 * n + noise * n,
                  seconds=0.1 / speed * float(np.exp(generator.normal(0, 0.01)))) for n in range(1, STEPS + 1)]
    attestation = {"backend": backend, "trainer": "trl.SFTTrainer", "model": "LlamaForCausalLM"}
    if backend == "fast":
        attestation |= {"step": copy.deepcopy(KERNELS), "eager": [], "layout": "rows: end to end"}
    return {
        "status": "ok", "label": label, "role": role, "repeat": repeat, "seed": 42, "algorithm": "sft",
        "online": online, "steps": steps, "norms": norms, "shifted": {}, "precision": "fp32", "round": 1,
        "weights": {"trained": "1", "frozen": "2", "dtypes": ["float32"]},
        "memory": {"cpu_rss_bytes": 2**30, "weights": 2**20, "gradients": 2**20, "optimizer": 2**21,
                   "peak_allocated": 2**33 if role == "a" else 2**32, "peak_reserved": 2**33},
        "cold_start": 9.0, "train_window": [0.0, 36.0], "capture_seconds": None, "attestation": attestation,
        "environment": {"packages": {"torch": "2.13.0"}, "git": None, "python": "3.12", "command_line": ["x"],
                        "flags": {}, "cpu_count": 2,
                        "gpus": [{"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 1, "compute_capability": "9.0"}]},
        "config": {"data": {"packing": False}}, "config_digest": "abc", "work": None, "interpreter": False, "beta": 0.0,
        "load": [0, 0, 0], "leak": None, "hypotheses": None, "machine": None, "folder": str(place),
    }


def results(folder: Path, *, b: dict[str, Any] | None = None, repeats: int = 2) -> dict[str, list[dict[str, Any]]]:
    """A fast arm 1.8 times as quick as trl, an oracle and a yardstick."""
    settings = {"label": "fast", "backend": "fast", "speed": 1.8, "noise": 1e-8, "gradient": 1e-6, **(b or {})}
    return {
        "a": [result(folder, "a", repeat=repeat) for repeat in range(repeats)],
        "b": [result(folder, "b", repeat=repeat, **settings) for repeat in range(repeats)],
        "oracle": [result(folder, "oracle", gradient=3e-7)],
        "yardstick": [result(folder, "yardstick", noise=1e-8, gradient=8e-7)],
    }
