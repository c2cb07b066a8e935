"""Mini models of every family in the table: random weights, odd sizes, two layers; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB = 101

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 44,
    "intermediate_size": 70,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

# name -> (class, config class, settings beside _SMALL)
MINIS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": _LLAMA3}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 5}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"rope_parameters": _YARN}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"sliding_window": 5, "query_pre_attn_scalar": 12, "tie_word_embeddings": True, "attn_implementation": "eager"},
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"sliding_window": 5, "query_pre_attn_scalar": 12, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        {"residual_multiplier": 0.7, "logits_scaling": 3.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": [0]},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        # Rows of 16 bytes: torch's grouped matmul asks for them.
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 72},
    ),
}


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A mini model in train mode whose every weight (norms and biases too) is random."""
    model_class, config_class, settings = MINIS[family]
    config = getattr(transformers, config_class)(**(_SMALL | settings | overrides))
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, model_class)(config)
    spread = config.hidden_size**-0.5  # keeps activations, and so rounding, of one size whatever the width
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norm weights sit at 1 (Llama) or 0 (Gemma), where a wrong convention would not show.
            parameter.add_(0.2 * noise) if parameter.dim() == 1 else parameter.copy_(spread * noise)
    return model.to(dtype).train()


def batch(*, seed: int = 0, rows: int = 2, length: int = 11, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Right-padded rows; the first tokens of the first row and all padding are not scored."""
    generator = torch.Generator().manual_seed(1000 + seed)
    input_ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, length - 3 :] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, :4] = -100
    both = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in both.items()}
