"""A random Llama and a byte-level tokenizer, built in code: nothing is downloaded."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

# Every training starts with a full collection: without this each one walks a million objects of imported modules.
gc.freeze()

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(*, template: str | None = TEMPLATE) -> Any:
    """One id per byte, with pad, bos and eos of their own."""
    specials = ["<pad>", "<bos>", "<eos>"]
    vocab = {token: index for index, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    built = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    built.chat_template = template
    return built


def llama(*, seed: int = 0, dropout: float = 0.0, **overrides: Any) -> LlamaForCausalLM:
    """About 40,000 parameters, every one of them a function of `seed`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(_config(dropout, overrides))


def scorer(*, seed: int = 0, **overrides: Any) -> LlamaForSequenceClassification:
    """The same size with a score head in place of logits."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_config(0.0, {"num_labels": 1} | overrides))


def _config(dropout: float, overrides: dict[str, Any]) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "attention_dropout": dropout, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.2, "tie_word_embeddings": False,
    }
    return LlamaConfig(**(settings | overrides))


def text_rows(count: int = 16) -> Dataset:
    """Ragged language-modelling rows, all different."""
    return Dataset.from_list([{"text": f"row {i}: " + "ab" * (i % 5 + 1) + f" = {i * i}"} for i in range(count)])


def pairs(count: int = 8) -> Dataset:
    """Preference rows; lengths differ so that batches are padded."""
    return Dataset.from_list(
        [{"prompt": f"say {i}", "chosen": f" {i}" * (i % 3 + 1), "rejected": " no" * (i % 2 + 1)} for i in range(count)]
    )


def prompts(count: int = 8) -> Dataset:
    """Prompt-only rows for online methods."""
    return Dataset.from_list([{"prompt": f"count to {i}:"} for i in range(count)])


def sft_args(path: Path | str, **overrides: Any) -> Any:
    """SFTConfig for CPU: fp32, no recompute, one optimizer step is two rows."""
    settings: dict[str, Any] = {
        "output_dir": str(path), "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2,
        "logging_steps": 1, "save_steps": 2, "bf16": False, "use_cpu": True, "gradient_checkpointing": False,
        "report_to": "none", "seed": 3, "max_length": 64, "dataset_num_proc": None, "disable_tqdm": True,
        "per_device_eval_batch_size": 4,
    }
    return SFTConfig(**(settings | overrides))


def sft(path: Path | str, *, model: Any = None, rows: Any = None, eval_rows: Any = None, peft_config: Any = None,
        tokens: Any = None, **overrides: Any) -> Any:
    """A plain TRL SFTTrainer on the tiny model."""
    return SFTTrainer(
        model=model if model is not None else llama(), args=sft_args(path, **overrides),
        train_dataset=rows if rows is not None else text_rows(), eval_dataset=eval_rows,
        processing_class=tokens if tokens is not None else tokenizer(), peft_config=peft_config,
    )


def lora(**overrides: Any) -> Any:
    """A LoRA of rank 4 on the attention projections."""
    from peft import LoraConfig

    settings: dict[str, Any] = {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**(settings | overrides))
