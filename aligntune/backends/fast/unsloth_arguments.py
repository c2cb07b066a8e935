"""Arguments of Unsloth's `FastLanguageModel` that have nothing to say here, and names that nothing takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

from aligntune.errors import ConfigError, unknown

ANY = object()
_VLLM = "for its vLLM, which `fast_inference` asks for"

ARGUMENTS: dict[str, tuple[Any, str]] = {
    "load_in_8bit": (False, "`load_in_4bit=True` is the one kind of quantisation here"),
    "load_in_16bit": (ANY, "weights are in 16 bits on a GPU unless `dtype` or `load_in_4bit` say otherwise"),
    "load_in_fp8": (False, "`base_precision=\"fp8\"` of `FastTrainingArguments`, or of the factories, multiplies the "
                           "base in fp8"),
    "qat_scheme": (None, "quantisation-aware training is not here"),
    "fast_inference": (False, "`create_rl_trainer` generates with our engine, or with vLLM"),
    "gpu_memory_utilization": (ANY, _VLLM),
    "max_lora_rank": (ANY, _VLLM),
    "float8_kv_cache": (ANY, _VLLM),
    "disable_log_stats": (ANY, _VLLM),
    "use_gradient_checkpointing": (False, "give it to `get_peft_model`, or `gradient_checkpointing` to the trainer's "
                                          "arguments"),
    "unsloth_tiled_mlp": (ANY, "recomputed layers run by tiles where rows are many"),
    "offload_embedding": (False, "embeddings stay with the model"),
    "float32_mixed_precision": (None, "`dtype` says how weights are stored, `bf16` of the trainer's arguments how they "
                                      "are computed with"),
    "resize_model_vocab": (None, "call `model.resize_token_embeddings(n)` before `get_peft_model`"),
    "rope_scaling": (None, "`config=` takes a config of transformers with other `rope_parameters`"),
    "fix_tokenizer": (ANY, "tokenizers are taken as they are"),
    "use_exact_model_name": (ANY, "names are taken as they are"),
    "random_state": (ANY, "nothing is drawn in loading; `get_peft_model` takes it"),
    "max_seq_length": (ANY, "`from_pretrained` takes it"),
    "temporary_location": (ANY, "nothing is put there"),
}
"""Name -> the value that asks for nothing (`ANY`: whatever it is), and why, or what is said of another value."""


def without_idle(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments without those of `ARGUMENTS`.

    Raises:
        ConfigError: one asks for something; says how that is had.
    """
    faults = [f"{name}={arguments[name]!r}: {why}" for name, (idle, why) in ARGUMENTS.items()
              if name in arguments and idle is not ANY and arguments[name] != idle]
    if faults:
        raise ConfigError.from_faults(faults, "the arguments")
    return {name: value for name, value in arguments.items() if name not in ARGUMENTS}


def unknown_arguments(names: Iterable[str], *takers: Callable[..., Any] | str) -> ConfigError:
    """The error for arguments that none of `takers` has; with the nearest of theirs, and of names of their own."""
    known = {name for one in takers for name in ([one] if isinstance(one, str) else signature(one).parameters)}
    choices = {*known, *ARGUMENTS} - {"kwargs", "model_args"}
    return ConfigError.from_faults([unknown("argument", name, choices, list_all=False) for name in names],
                                   "the arguments")
