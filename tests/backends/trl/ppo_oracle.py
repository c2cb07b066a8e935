"""Models and completions that TRL 1.12's PPO and ours are compared on; needs torch and transformers only.

Weights follow from a formula, not from a random generator, so that they are the same with every version of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

PAD, BOS, EOS = 0, 1, 2
PROMPT, LENGTH, ROWS = 5, 7, 8
SETTINGS: dict[str, Any] = {"cliprange": 0.1, "cliprange_value": 0.05, "vf_coef": 0.3, "gamma": 0.97, "lam": 0.9,
                            "kl_coef": 0.2, "num_ppo_epochs": 3}
LEARNING_RATE = 0.2
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "whitened": {"whiten_rewards": True, "kl_estimator": "k3"},
    "ragged": {"missing_eos_penalty": 0.75},
}
"""`ragged` has completions that end early; in the others every one fills its LENGTH tokens."""


def config(labels: int = 1) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        tie_word_embeddings=False, num_labels=labels, attn_implementation="eager",
    )


def fill(model: Any, phase: float) -> Any:
    """Every weight a sine of its place; `phase` tells the models apart."""
    with torch.no_grad():
        for index, (_, value) in enumerate(sorted(model.named_parameters())):
            place = torch.arange(value.numel(), dtype=torch.float64).reshape(value.shape)
            wave = torch.sin(place * (1.3 + 0.37 * index) + index + phase)
            value.copy_((1 + 0.1 * wave if value.dim() == 1 else 0.25 * wave).to(value.dtype))
    return model


def models() -> dict[str, Any]:
    return {
        "policy": fill(LlamaForCausalLM(config()), 0.0), "reference": fill(LlamaForCausalLM(config()), 0.02),
        "value": fill(LlamaForSequenceClassification(config()), 1.0),
        "reward": fill(LlamaForSequenceClassification(config()), 2.0),
    }


def rows(run: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (8, 5) and completions (8, 7)."""
    place = torch.arange(ROWS * (PROMPT + LENGTH)).reshape(ROWS, -1)
    ids = 3 + (place * place * 31 + place * 7 + 11) % 250
    prompts, completions = ids[:, :PROMPT], ids[:, PROMPT:].clone()
    if run == "ragged":
        for row, length in enumerate((7, 3, 1, 6, 7, 2, 5, 4)):
            if row != 4:  # that one is cut off, and pays for it
                completions[row, length - 1] = EOS
            completions[row, length:] = PAD
    return prompts, completions


def outputs(policy: Any, backbone: Any, head: Any) -> dict[str, list[float]]:
    """Some log-probs and values, which sum up all weights."""
    ids = torch.cat(rows("full"), dim=1)[:2]
    with torch.no_grad():
        hidden = backbone(input_ids=ids).last_hidden_state
        return {"log_probs": policy(input_ids=ids).logits[:, -3:, :40:7].log_softmax(-1).flatten().tolist(),
                "values": head(hidden)[:, -5:].flatten().tolist()}
