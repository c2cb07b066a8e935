"""Small PPO jobs for the tests: a random Llama of 40,000 parameters, prompts that ask for nothing."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaForSequenceClassification

from aligntune import create_rl_trainer
from tests.core import tiny

PROMPTS = [{"prompt": f"count to {i}:", "answer": str(i)} for i in range(16)]
SMALL: dict[str, Any] = {
    "algorithm": "ppo", "backend": "trl", "batch_size": 2, "num_mini_batches": 2, "num_ppo_epochs": 2, "max_steps": 6,
    "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "max_completion_length": 6, "max_seq_length": 64,
    "progress": False,
}


def distinct(prompts: list, completions: list, **columns: Any) -> list[float]:
    """Different for most completions, so that advantages are not all zero."""
    return [len(set(_text(completion))) / 2 for completion in completions]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def reward_model(seed: int = 7, labels: int = 1, **overrides: Any) -> Any:
    """A random sequence classifier on the tiny model's vocabulary."""
    torch.manual_seed(seed)
    config = tiny.llama(num_labels=labels, **overrides).config
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config)


def job(path: Any, model: Any = None, rows: Any = None, **options: Any) -> Any:
    """An AlignTrainer; 16 prompts, one reward function unless told otherwise."""
    given = {**SMALL, "output_dir": str(path), "tokenizer_name": tiny.tokenizer(template=None)}
    if "reward_model_name" not in options:
        given["reward_functions"] = [distinct]
    return create_rl_trainer(model if model is not None else tiny.llama(), rows or PROMPTS, **{**given, **options})


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Policy and critic."""
    both = [*trainer.model.named_parameters(), *((f"critic.{n}", p) for n, p in trainer.critic.named_parameters())]
    return {name: value.detach().clone() for name, value in both}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}
