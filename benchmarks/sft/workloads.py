"""What is trained: random weights of real shapes, random words, the same rows in the same order for every arm.

Imported in the peers' interpreters too: it needs transformers only.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORDS = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "python", "list", "dict", "the", "of", "and",
         "return", "value", "raise", "error"]

LLAMA3 = {
    "vocab_size": 128_256, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072, "rope_theta": 500_000.0,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "liger-kernel", "unsloth")


def versions_of(environment: dict[str, Any]) -> dict[str, str]:
    """Of an arm's environment: Python's version, and of the packages that steps run through those that are there."""
    found = {name: version for name in PACKAGES if (version := environment["packages"].get(name)) is not None}
    return {"python": environment["python"], **found}


def _rope(factor: float) -> dict[str, Any]:
    return {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip


# name -> (model type of transformers, its configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-1b": ("llama", {
        **LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, "rope_parameters": _rope(32.0),
    }),
    "llama-8b": ("llama", {
        **LLAMA3, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "rope_parameters": _rope(8.0),
    }),
    "qwen3-4b": ("qwen3", {
        "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40_960, "rope_theta": 1e6, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }),
    "smoke": ("llama", {
        "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    `lengths`: "full" rows are cut at `max_seq_length`; "ragged" ones are log-normal, median 200 tokens. `packing` fills
    sequences of max_seq_length, `batch_size` of them a step. `mode`: lora, full or qlora. `options` go to every arm.
    """

    model: str
    mode: str = "lora"
    batch_size: int = 4
    max_seq_length: int = 2048
    lengths: str = "full"
    packing: bool = False
    steps: int = 24
    measured: int = 12
    options: dict[str, Any] = field(default_factory=dict)


WORKLOADS = {
    "lora-1b": Workload("llama-1b"),
    "lora-1b-ragged": Workload("llama-1b", batch_size=16, lengths="ragged", steps=160, measured=60),
    "lora-1b-packed": Workload("llama-1b", lengths="ragged", packing=True, steps=40, measured=20),
    "lora-1b-16k": Workload("llama-1b", batch_size=1, max_seq_length=16_384, steps=16, measured=8),
    "full-1b": Workload("llama-1b", mode="full", steps=20, measured=10),
    "lora-4b": Workload("qwen3-4b", steps=16, measured=8),
    "qlora-8b": Workload("llama-8b", mode="qlora", batch_size=2, steps=14, measured=7),
    "smoke": Workload("smoke", batch_size=2, max_seq_length=64, lengths="ragged", steps=8, measured=2),
}
MODES: dict[str, dict[str, Any]] = {
    "lora": {"use_peft": True, "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "optimizer": "adamw_fused"},
    "qlora": {"use_peft": True, "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "quantization": "nf4",
              "optimizer": "adamw_8bit"},
    "full": {"model_dtype": "bf16", "optimizer": "adamw_fused"},
}


def recipe(workload: Workload, model: str, rows: str, precision: str) -> dict[str, Any]:
    """The job of a workload, for every arm."""
    return {
        "algorithm": "sft", "model_name": model, "dataset_name": rows, "max_seq_length": workload.max_seq_length,
        "batch_size": workload.batch_size, "gradient_accumulation_steps": 1, "max_steps": workload.steps,
        "learning_rate": 1e-4, "lr_scheduler": "constant", "precision": precision, "packing": workload.packing,
        # A log waits for the GPU: a short run logs each step, a longer one every fifth.
        "logging_steps": 1 if workload.measured <= 8 else 5, **MODES[workload.mode], **workload.options,
    }


def texts(workload: Workload) -> list[str]:
    """Rows of words; about 1.75 tokens each with the tokenizer that is used here."""
    draw = random.Random(0)
    per_step = workload.batch_size
    if workload.packing:
        per_step *= math.ceil(workload.max_seq_length / 220)
    count = per_step * (workload.steps + 3)
    if workload.lengths == "full":
        words = [math.ceil(workload.max_seq_length / 1.4)] * count
    else:
        longest = workload.max_seq_length - 1
        tokens = [min(longest, max(8, int(draw.lognormvariate(math.log(200), 0.9)))) for _ in range(count)]
        words = [max(4, int(n / 1.75)) for n in tokens]
    return [" ".join(draw.choices(WORDS, k=n)) for n in words]


def write_rows(workload: Workload, path: Path) -> None:
    """One {"text": ...} a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(workload)))


def write_model(name: str, folder: Path, tokenizer: Any, *, device: str, **changed: Any) -> None:
    """A seed checkpoint in bf16, with the tokenizer, that every arm starts from; `changed` goes over its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, options = MODELS[name]
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**options, **changed}))
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
