"""What is trained: random weights of real shapes on random words, pairs of them or prompts for rollouts.

A random model of 128,256 tokens draws the one that ends a completion once in that many: of completions of 256 tokens
one in 500 ends early. Where lengths are to be uneven, the checkpoint's generation_config lists many token ids as such
ends (`stops`): lengths are then geometric with mean vocabulary / stops, cut at `new_tokens`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.sft.workloads import MODELS, WORDS, write_model

GROUP = 8


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    `batch_size`: pairs, or completions, of a micro-step; `accumulation` micro-steps are a step. `prompt`, `answer`:
    least and most words. `new_tokens`: longest completion; 0 where nothing is generated. `steps`: by the arm's whole
    name or first word, how many steps it runs and how many of them, at the end, are measured; "" is of every other
    arm. `limit`: seconds that a run may take.
    """

    model: str
    algorithm: str
    steps: dict[str, tuple[int, int]]
    batch_size: int = 64
    accumulation: int = 1
    max_seq_length: int = 1024
    prompt: tuple[int, int] = (60, 60)
    answer: tuple[int, int] = (60, 140)
    new_tokens: int = 0
    stops: int = 0
    limit: float = 150
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def online(self) -> bool:
        return self.new_tokens > 0

    @property
    def prompts(self) -> int:
        """Rows of the dataset that a step takes."""
        return self.batch_size * self.accumulation // (GROUP if self.online else 1)

    def steps_of(self, arm: str) -> tuple[int, int]:
        """(steps, measured) of an arm: what waits for seconds for each step runs few of them."""
        return self.steps.get(arm) or self.steps.get(arm.partition("-")[0]) or self.steps[""]


# The fourth step of fast is traced, unsloth compiles in its first ones; a step of trl is about 10 s, one of unsloth
# 8 s, one with continuous batching 20 s; of 1,024 new tokens it is minutes long, beside which what the first step
# compiles is nothing.
ROLLOUTS = {"fast": (8, 4), "trl-cb": (2, 1), "trl": (3, 2), "unsloth": (7, 4)}
LONG_ROLLOUTS = {"fast": (6, 2), "trl-cb": (1, 1), "": (2, 1)}


def _pairs(algorithm: str, **options: Any) -> Workload:
    """8 pairs a step: KTO has rows, two of each. Lengths are uneven: by the last third every shape has come often."""
    return Workload("llama-1b", algorithm, {"": (120, 40)}, batch_size=16 if algorithm == "kto" else 8, prompt=(30, 70),
                    options={"learning_rate": 1e-4, **options})


WORKLOADS = {
    "dpo-1b": _pairs("dpo", beta=0.1),
    **{f"{name}-1b": _pairs(name) for name in ("ipo", "kto", "orpo", "simpo", "cpo", "reward")},
    **{f"{name}-1b": Workload("llama-1b", name, ROLLOUTS, new_tokens=256, options={"beta": 0.0})
       for name in ("grpo", "rloo", "dr_grpo")},
    "ppo-1b": Workload("llama-1b", "ppo", ROLLOUTS, new_tokens=256,
                       options={"num_ppo_epochs": 1, "num_mini_batches": 1, "kl_coef": 0.05}),
    "dapo-1b": Workload("llama-1b", "dapo", ROLLOUTS, new_tokens=256,
                        options={"dynamic_sampling": True, "max_resample_rounds": 2}),
    "grpo-4b": Workload("qwen3-4b", "grpo", LONG_ROLLOUTS, batch_size=8, accumulation=8, max_seq_length=2048,
                        new_tokens=1024, stops=297, limit=300, options={"beta": 0.0}),
    "smoke-dpo": Workload("smoke", "dpo", {"": (6, 2)}, batch_size=2, max_seq_length=128, prompt=(3, 5),
                          answer=(3, 9), options={"beta": 0.1, "learning_rate": 1e-3}),
    "smoke-grpo": Workload("smoke", "grpo", {"fast": (6, 2), "": (3, 2)}, batch_size=8, accumulation=2,
                           max_seq_length=64, prompt=(3, 5), new_tokens=8, stops=512, options={"beta": 0.0}),
    "smoke-ppo": Workload("smoke", "ppo", {"fast": (6, 2), "": (3, 2)}, batch_size=8, max_seq_length=64, prompt=(3, 5),
                          new_tokens=8, stops=512,
                          options={"num_ppo_epochs": 1, "num_mini_batches": 1, "kl_coef": 0.05}),
}  # fmt: skip


def recipe(workload: Workload, model: str, rows: str, precision: str, *, steps: int) -> dict[str, Any]:
    """The job of a workload, for every arm."""
    job = {
        "algorithm": workload.algorithm, "model_name": model, "dataset_name": rows, "precision": precision,
        "max_seq_length": workload.max_seq_length, "batch_size": workload.batch_size,
        "gradient_accumulation_steps": workload.accumulation, "max_steps": steps, "learning_rate": 1e-5,
        "lr_scheduler": "constant", "optimizer": "adamw_fused", "use_peft": True, "lora_r": 16, "lora_alpha": 16,
        "lora_dropout": 0.0,
        # A log waits for the GPU: a step of a second may, one of a tenth of it may not.
        "logging_steps": 1 if workload.online else 5, **workload.options,
    }  # fmt: skip
    if workload.online:
        reward = f"{Path(__file__).resolve().with_name('rewards.py')}:drawn"
        job |= {"num_generations": GROUP, "max_completion_length": workload.new_tokens, "temperature": 1.0,
                "reward_functions": [reward]}
    return job


def rows_of(workload: Workload) -> list[dict[str, str]]:
    """Rows of words, about 1.75 tokens each with the tokenizer that is used here; more than the longest run takes."""
    draw = random.Random(0)
    columns = {"prompt": workload.prompt}
    if not workload.online:
        columns |= {"chosen": workload.answer, "rejected": workload.answer}
    most = max(steps for steps, _ in workload.steps.values())
    count = workload.prompts * (most + 3)
    return [{name: " ".join(draw.choices(WORDS, k=draw.randint(*words))) for name, words in columns.items()}
            for _ in range(count)]


def write_rows(workload: Workload, path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(workload)))


def write_policy(workload: Workload, folder: Path, tokenizer: Any, *, device: str) -> None:
    """The seed checkpoint that every arm starts from, with the token ids that end a completion."""
    from transformers import GenerationConfig

    write_model(workload.model, folder, tokenizer, device=device)
    if workload.stops:
        vocab = MODELS[workload.model][1]["vocab_size"]
        config = GenerationConfig.from_pretrained(folder)
        # The highest ids: no word of the tokenizer's, so that no prompt holds one.
        config.eos_token_id = [tokenizer.eos_token_id, *range(vocab - workload.stops, vocab)]
        config.save_pretrained(folder)
