"""Every option that is not an algorithm's own, with its default, meaning and range: the documented table.

`algorithms/<name>.py` adds the options of its loss (section `loss`) and its own defaults for the options here.
Precedence: explicit argument > config > algorithm default > the default written here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, make_dataclass
from typing import Any

from aligntune.core.options import OptionInfo, infos, option


@dataclass
class RunSection:
    """Top-level scalars: they stand outside every section of the YAML."""

    algorithm: str = option("sft", "The algorithm; `aligntune.list_algorithms()` names them.")
    backend: str = option("auto", "The engine: 'trl', 'fast', or 'auto', which chooses and says why.")
    output_dir: str | None = option(
        None, "Folder of the run; null makes runs/<algorithm>-<model>-<time>. A folder with another run is an error."
    )
    seed: int = option(42, "Seed of weights, data order, dropout and sampling.", ge=0, le=2**32 - 1)
    overwrite: bool = option(False, "Remove what an earlier run left in output_dir (and nothing else) first.")
    resume: bool | str = option(
        False, "true continues from the newest complete checkpoint of output_dir; a path continues from that one."
    )


@dataclass
class ModelSection:
    model_name: str | None = option(
        None, "Hub id, local folder (of a run too), 'builtin:NAME', or a model object.", objects="a transformers model"
    )
    model_revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    tokenizer_name: str | None = option(
        None, "Tokenizer to use in place of the model's own.", objects="a transformers tokenizer"
    )
    precision: str = option(
        "auto", "Arithmetic of the training step; auto is bf16 on a GPU that has it, fp16 on older ones, fp32 on CPU.",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    model_dtype: str = option(
        "auto", "Storage of the loaded weights; auto follows precision under LoRA and is fp32 for full training "
        "except where the checkpoint asks otherwise.", choices=("auto", "bf16", "fp16", "fp32"),
    )
    quantization: str | None = option(
        "auto", "'nf4' loads the frozen base in 4 bits (QLoRA); null never; auto keeps what the checkpoint says.",
        choices=("auto", "nf4"),
    )
    base_precision: str | None = option(
        None, "'fp8': on fast under LoRA, the frozen base is multiplied in e4m3; auto: where the machine can; null: as "
        "loaded.", choices=("auto", "fp8"),
    )
    attn_implementation: str | None = option(
        None, "Attention of transformers ('eager', 'sdpa', 'flash_attention_2', ...); null is transformers' choice."
    )
    device: str = option("auto", "'cpu' keeps a run off the GPU.", choices=("auto", "cpu", "cuda"))
    trust_remote_code: bool = option(False, "Run Python code that comes with a hub model or dataset.")
    strict: bool = option(False, "On fast: a module that no kernel covers is an error, not an attestation line.")


@dataclass
class DataSection:
    dataset_name: str | None = option(
        None, "Hub id, local json/jsonl/csv/parquet file, folder, 'builtin:NAME', a datasets.Dataset or list of dicts.",
        objects="a datasets.Dataset or a list of dicts",
    )
    dataset_config: str | None = option(None, "Configuration name of a hub dataset ('main' of gsm8k).")
    split: str | None = option(None, "Split to train on, slices too ('train[:10%]'); null is train, or the only one.")
    max_samples: int | None = option(None, "Train on the first N rows (of the split); null is all.", ge=1)
    column_mapping: dict[str, Any] | None = option(None, "{column in the file: column that is meant}.")
    text_field: str | None = option(None, "The column that holds plain text, where it is not called 'text'.")
    system_prompt: str | None = option(None, "System turn put before rows that have none.")
    chat_template: str | None = option(None, "Path of a Jinja chat template to use in place of the tokenizer's own.")
    apply_chat_template: bool | None = option(
        None, "Whether prompts and completions that are plain strings become turns; null: questions and prompts of "
        "online methods do, pairs and completions stand as they are, a system_prompt makes them turns."
    )
    max_seq_length: int = option(1024, "Longest row in tokens, prompt and completion together.", ge=2)
    truncation: str = option(
        "right", "A row longer than max_seq_length: cut its end (counted in the report), or call it a bad row. Prompts "
        "of online methods are never cut.", choices=("right", "error"),
    )
    completion_only: bool | None = option(
        None, "Supervise completions (assistant turns) only; null: yes where a row has a prompt, else every token.",
        audience="sft",
    )
    assistant_turns: str = option(
        "all", "Which assistant turns of a conversation are trained; 'split' makes one row of each.",
        choices=("all", "last", "split"), audience="sft",
    )
    on_bad_row: str = option(
        "raise", "A row that cannot be trained: stop, leave it out and say so, or also write it to bad_rows.jsonl.",
        choices=("raise", "skip", "quarantine"),
    )
    packing: bool = option(
        False, "Fill sequences of max_seq_length with several rows; changes what one step contains.", audience="sft"
    )
    padding_free: bool | str = option(
        "auto", "Lay the rows of a micro-batch end to end instead of padding them; the same rows per step.",
        choices=("auto",), audience="offline",
    )


@dataclass
class LoraSection:
    use_peft: bool = option(False, "Train LoRA adapters instead of every weight.")
    lora_r: int = option(16, "Rank of the adapters.", ge=1)
    lora_alpha: float = option(32, "Scale of the adapters; the factor is lora_alpha / lora_r.", gt=0)
    lora_dropout: float = option(0.0, "Dropout on the adapters' input.", ge=0, lt=1)
    lora_target_modules: list[str] | str | None = option(
        "all-linear", "Modules that get an adapter; embed_tokens and lm_head among them are trained whole."
    )
    lora_bias: str = option("none", "Which biases train.", choices=("none", "all", "lora_only"))
    modules_to_save: list[str] | None = option(None, "Modules trained whole and saved with the adapters.")
    use_dora: bool = option(False, "Weight-decomposed adapters (DoRA, arXiv 2402.09353).")
    use_rslora: bool = option(False, "Factor lora_alpha / sqrt(lora_r) (rsLoRA, arXiv 2312.03732).")
    lora_init: str = option(
        "default", "How adapters start: B = 0, or from the base's weights (pissa: 2404.02948; olora: 2406.01775).",
        choices=("default", "gaussian", "pissa", "olora"),
    )


@dataclass
class TrainSection:
    num_epochs: float = option(1.0, "Passes over the data.", gt=0)
    max_steps: int = option(-1, "Optimizer steps, 1 or more; -1 leaves it to num_epochs.", ge=-1)
    batch_size: int = option(
        8, "Sequences per device and micro-step (completions, for online methods).", ge=1
    )
    gradient_accumulation_steps: int = option(1, "Micro-steps per optimizer step.", ge=1)
    learning_rate: float = option(2e-5, "Peak learning rate.", ge=0)
    embedding_learning_rate: float | None = option(
        None, "Own peak rate of embed_tokens and lm_head where they train; null is learning_rate.", ge=0
    )
    lr_scheduler: str = option(
        "linear", "Shape of the learning rate over the run; cosine_with_min_lr (min_lr_rate or min_lr) and "
        "warmup_stable_decay (num_decay_steps) want trainer_options={'lr_scheduler_kwargs': {...}}.",
        choices=("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt",
                 "cosine_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau"),
    )
    warmup_ratio: float = option(0.0, "Share of the steps over which the rate rises.", ge=0, lt=1)
    warmup_steps: int | None = option(None, "Steps over which the rate rises, in the place of warmup_ratio.", ge=0)
    optimizer: str = option(
        "adamw", "Optimizer; 8-bit and paged ones are bitsandbytes'.",
        choices=("adamw", "adamw_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd", "adafactor"),
    )
    weight_decay: float = option(0.0, "Decoupled weight decay (not on biases and norms).", ge=0)
    adam_beta1: float = option(0.9, "First-moment decay.", ge=0, lt=1)
    adam_beta2: float = option(0.999, "Second-moment decay.", ge=0, lt=1)
    adam_epsilon: float = option(1e-8, "Added to the root of the second moment.", gt=0)
    max_grad_norm: float = option(1.0, "Clip the gradient's global norm to this; 0 never clips.", ge=0)
    gradient_checkpointing: bool | str = option(
        "auto", "Recompute activations in the backward pass: in every layer; 'offload', with the layers' inputs in "
        "host memory (fast); 'auto', in as many as memory asks on fast, else on a GPU in every layer.",
        choices=("auto", "offload"),
    )
    memory_budget_gib: float | None = option(None, "GPU memory that fast may plan with; null is what is free.", gt=0)
    dataloader_num_workers: int = option(0, "Processes that load batches.", ge=0)
    trainer_options: dict[str, Any] = option(
        {}, "Fields of the underlying TRL/transformers config class, passed through as they are."
    )


@dataclass
class RolloutSection:
    num_generations: int = option(8, "Completions per prompt (the group size G).", ge=1, audience="online")
    max_completion_length: int = option(256, "Longest completion in tokens.", ge=1, audience="online")
    stop_strings: str | list[str] | None = option(
        None, "Texts that end a completion, beside the model's own end; the text stays in it. For the engines fast and "
        "vllm.", filled=True, audience="online")
    temperature: float = option(1.0, "Sampling temperature.", gt=0, audience="online")
    top_p: float = option(1.0, "Sample from the smallest set of tokens with this much probability.", gt=0, le=1,
                          audience="online")
    top_k: int = option(0, "Sample from the k likeliest tokens; 0 is all.", ge=0, audience="online")
    min_p: float | None = option(None, "Leave out tokens below this share of the likeliest one's probability.", ge=0,
                                 le=1, audience="online")
    repetition_penalty: float = option(1.0, "Penalty on tokens that occurred already; 1 is none.", gt=0,
                                       audience="online")
    num_iterations: int = option(1, "Optimizer passes over each batch of rollouts.", ge=1, audience="online")
    steps_per_generation: int | None = option(
        None, "Micro-steps that one round of generation feeds; null is gradient_accumulation_steps.", ge=1,
        audience="online",
    )
    rollout_engine: str = option("auto", "What generates: transformers' generate, our engine (fast), or vLLM.",
                                 choices=("auto", "hf", "fast", "vllm"), audience="online")
    rollout_memory_gib: float | None = option(
        None, "GiB for the fast engine's key/value cache; null takes what a round of completions needs, up to 30% of "
        "what is free.", gt=0, audience="online")
    log_completions: bool = option(False, "Keep sampled completions in the run folder.", audience="online")


@dataclass
class RewardsSection:
    reward_functions: list[Any] | str | None = option(
        None, "Names, callables f(prompts, completions, **columns) -> list[float], or {name, weight, options}.",
        objects="a callable", audience="online",
    )
    reward_function_weights: list[float] | None = option(None, "One weight a reward; null is 1 each.",
                                                         audience="online")
    reward_model_name: str | None = option(
        None, "A sequence-classification model that scores completions.", objects="a transformers model",
        audience="online",
    )


@dataclass
class EvaluationSection:
    eval_dataset_name: str | None = option(
        None, "Data to evaluate on; the same forms as dataset_name.", objects="a datasets.Dataset or a list of dicts"
    )
    eval_split: str | None = option(None, "Split to evaluate on, of eval_dataset_name or else of dataset_name.")
    max_eval_samples: int | None = option(None, "Evaluate on the first N rows.", ge=1)
    val_split_ratio: float | None = option(None, "Hold this share of the training rows out for evaluation.", gt=0, lt=1)
    eval_steps: int | None = option(None, "Evaluate every N optimizer steps during training; null never.", ge=1)
    eval_batch_size: int | None = option(None, "Sequences per device in evaluation; null is batch_size.", ge=1)
    stop_metric: str | None = option(
        None, "Stop training, with a checkpoint, once this metric of an evaluation during training reaches stop_value: "
        "'mean_token_accuracy', 'reward', or 'loss', which has to fall to it."
    )
    stop_value: float | None = option(None, "See stop_metric.")


@dataclass
class LoggingSection:
    logging_steps: int = option(10, "Log every N optimizer steps.", ge=1)
    save_steps: int | None = option(
        None, "Write a checkpoint every N optimizer steps; null at the end of the run only.", ge=1
    )
    save_total_limit: int | None = option(None, "Keep the newest N checkpoints.", ge=1)
    report_to: list[str] | str = option(
        ["tensorboard"], "Trackers of transformers: tensorboard, wandb, ...; or none, or all, alone."
    )
    run_name: str | None = option(None, "Name shown by trackers; null is the run folder's name.")
    progress: bool = option(True, "Show a progress bar on a terminal.")


SECTIONS: dict[str, type] = {
    "model": ModelSection, "data": DataSection, "lora": LoraSection, "train": TrainSection,
    "rollout": RolloutSection, "rewards": RewardsSection, "evaluation": EvaluationSection, "logging": LoggingSection,
}

YAML_ORDER = ("model", "data", "lora", "train", "loss", "rollout", "rewards", "evaluation", "logging")
"""Sections in the order they are written; `loss` holds the algorithm's own options."""


def common_options() -> list[OptionInfo]:
    """Every option that is not an algorithm's own."""
    rows = infos(RunSection, "")
    for section, cls in SECTIONS.items():
        rows += infos(cls, section)
    return rows


def structured_root(rows: Iterable[OptionInfo]) -> Any:
    """The structured OmegaConf config that holds the options `rows`, each at its default, in their sections."""
    from omegaconf import OmegaConf

    fields: dict[str, list[tuple[str, Any, Any]]] = {name: [] for name in ("", *YAML_ORDER)}
    for row in rows:
        # OmegaConf knows no union that holds a list or a mapping; our validator does.
        free = row.objects or ({list, dict} & set(row.kinds) and len(set(row.kinds) - {type(None)}) > 1)
        default: Any = field(default_factory=functools.partial(copy.copy, row.default))
        fields[row.section].append((row.name, Any if free else row.type, default))
    root = fields.pop("")
    for section, members in fields.items():
        if members:
            cls = make_dataclass(section.capitalize(), members)
            root.append((section, cls, field(default_factory=cls)))
    return OmegaConf.structured(make_dataclass("JobConfig", root))
