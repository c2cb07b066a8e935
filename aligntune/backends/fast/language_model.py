"""`FastLanguageModel`: load a model, put adapters on it, have it attached; call shapes that users of Unsloth know."""

from __future__ import annotations

import logging
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aligntune.backends.fast.attachment import attach, base_model
from aligntune.backends.fast.recompute import install
from aligntune.backends.fast.unsloth_arguments import unknown_arguments, without_idle
from aligntune.backends.loading import ADAPTERS, differences, keep_tied, must_have
from aligntune.builtin import is_builtin, model_path
from aligntune.core.inference import must_be_whole
from aligntune.errors import ConfigError

logger = logging.getLogger("aligntune")

LINEARS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj",
)  # fmt: skip
_OFFLOAD = ("offload", "unsloth")
_WHOLE = ("embed_tokens", "lm_head")
_SOURCE = ("revision", "token", "cache_dir", "local_files_only")
_LOADING = (
    "state_dict", "proxies", "output_loading_info", "dtype", "torch_dtype", "device_map", "max_memory",
    "offload_folder", "offload_buffers", "quantization_config", "subfolder", "variant", "adapter_kwargs",
    "adapter_name", "generation_config", "gguf_file", "distributed_config", "device_mesh", "tp_plan", "tp_size",
    "trust_remote_code", "code_revision", "allow_all_kernels", "use_kernels", "kernel_config", "key_mapping",
    "attn_implementation", "experts_implementation", "tqdm_class",
)  # fmt: skip
"""What transformers' loader takes beside the arguments that it names."""
_SHAPE = [field for field in ADAPTERS.values() if field != "init_lora_weights"]


class FastLanguageModel:
    """Two steps to a model that trains on our kernels, under any trainer."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        *,
        max_seq_length: int | None = None,
        dtype: torch.dtype | None = None,
        load_in_4bit: bool = False,
        full_finetuning: bool = False,
        trust_remote_code: bool = False,
        strict: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """`(model, tokenizer)`: the causal language model `model_name`, attached, in eval mode.

        Args:
            model_name: hub id, local path or `builtin:NAME`. Of adapters: the base that they name, under a
                `PeftModel` on which training goes on.
            max_seq_length: longest sequence in tokens; becomes the tokenizer's limit, and `model.max_seq_length`, which
                `FastSFTTrainer` reads. None: the model's own.
            dtype: None is bfloat16, or float16 on GPUs without it, or float32 on a CPU.
            load_in_4bit: quantise the linears to NF4 with double quantisation. A checkpoint that is quantised already
                loads as it is either way.
            full_finetuning: train every parameter; with `load_in_4bit` an error.
            kwargs: for transformers' `from_pretrained` (`revision`, `token`, `device_map`, ...). `revision` is that of
                `model_name`; adapters name their base's. Those of Unsloth that ask for nothing here are left out.
        Raises:
            BackendUnavailableError: no CUDA device.
            ConfigError: options that contradict each other or the adapters, a length that the model has no positions
                for, an argument that nothing takes, or a model that lacks weights.
        """
        from transformers import AutoTokenizer

        kwargs = without_idle(kwargs)
        if is_builtin(model_name):
            model_name = str(model_path(model_name))
        if load_in_4bit and full_finetuning:
            raise ConfigError("full_finetuning=True trains the weights, which load_in_4bit=True freezes: choose one")
        if dtype is None:
            dtype = _default_dtype()
        if load_in_4bit:
            kwargs.setdefault("quantization_config", _nf4(dtype))
        if torch.cuda.is_available():
            kwargs.setdefault("device_map", {"": torch.cuda.current_device()})
        source = {name: kwargs[name] for name in _SOURCE if name in kwargs}
        tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=trust_remote_code, **source)
        model = _load(model_name, source, whole=full_finetuning, dtype=dtype, trust_remote_code=trust_remote_code,
                      **kwargs)
        if max_seq_length is not None:
            _check_length(model, max_seq_length)
            tokenizer.model_max_length = model.max_seq_length = max_seq_length
        attach(model, strict=strict)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: nn.Module,
        *,
        r: int = 16,
        target_modules: list[str] | str | None = None,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = False,
        random_state: int = 3407,
        use_rslora: bool = False,
        modules_to_save: list[str] | None = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The model under LoRA adapters, attached anew; adapters of this shape that it was loaded with stay.

        Args:
            r: rank. `lora_alpha`: the update is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
            target_modules: names of linears; None is every projection of attention and MLP that the model has.
                `embed_tokens` and `lm_head` among them are trained whole (`modules_to_save`), and it is said.
            use_gradient_checkpointing: recompute every layer in the backward. "offload", for which "unsloth" is another
                name: the layers' inputs wait in pinned host memory, under any trainer.
            random_state: seed of the adapters' initial weights; the global random state is left as it was.
            kwargs: for `peft.LoraConfig`. Those of Unsloth that ask for nothing here are left out.
        Raises:
            ConfigError: `target_modules` or `modules_to_save` name a module that the model lacks (peft would leave it
                out); the model has adapters of another shape; another `use_gradient_checkpointing`; an argument that
                nothing takes.
        """
        from peft import LoraConfig, get_peft_model

        kwargs = without_idle(kwargs)
        strange = [name for name in kwargs if name not in signature(LoraConfig).parameters]
        if strange:
            raise unknown_arguments(strange, FastLanguageModel.get_peft_model, LoraConfig)
        offload = isinstance(use_gradient_checkpointing, str)
        if offload and use_gradient_checkpointing not in _OFFLOAD:
            raise ConfigError(
                f"use_gradient_checkpointing={use_gradient_checkpointing!r}: valid are True, False and 'offload' "
                "(or 'unsloth', the same)"
            )
        if target_modules is None:
            target_modules = _present_linears(model)
        if not isinstance(target_modules, str):
            whole = [name for name in target_modules if name in _WHOLE]
            if whole:
                logger.info("target_modules %s are trained whole, as modules_to_save", ", ".join(whole))
                modules_to_save = [*(modules_to_save or []), *(n for n in whole if n not in (modules_to_save or []))]
                target_modules = [name for name in target_modules if name not in _WHOLE]
        # A pattern, "all-linear" too, is peft's to read.
        must_have(model, {"target_modules": None if isinstance(target_modules, str) else target_modules,
                          "modules_to_save": modules_to_save})
        config = LoraConfig(
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,  # type: ignore[arg-type]
            use_rslora=use_rslora,
            # A list of its own: peft writes the name of a tied module into it.
            modules_to_save=list(modules_to_save) if modules_to_save else None,
            **{"task_type": "CAUSAL_LM", **kwargs},
        )
        if hasattr(model, "peft_config"):
            _must_be_of_shape(model, config)
            peft_model = model
        else:
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(random_state)
                peft_model = get_peft_model(model, keep_tied(config, model))  # type: ignore[arg-type]
        if use_gradient_checkpointing:
            # Without reentrance no input needs a gradient for the adapters to get theirs.
            model.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            if offload and install(base_model(model), offload=True) is None:
                raise ConfigError(f"use_gradient_checkpointing={use_gradient_checkpointing!r}: {type(model).__name__} "
                                  "has no layers that ask how to run; True recomputes with torch's function")
        attach(peft_model, strict=strict)
        return peft_model

    @staticmethod
    def for_inference(model: Any) -> Any:
        """The model in eval mode, with its key-value cache on; it stays attached."""
        model.eval()
        model.config.use_cache = True
        return model

    @staticmethod
    def for_training(model: Any) -> Any:
        """The model in train mode, without a key-value cache; it stays attached."""
        model.train()
        model.config.use_cache = False
        return model


def _load(name: str, source: dict[str, Any], *, whole: bool, **kwargs: Any) -> Any:
    """The model `name`; of adapters, the model that they name and the adapters on it, which train.

    transformers alone would load adapters too, but frozen.
    """
    from peft import PeftConfig, PeftModel
    from transformers.utils import find_adapter_config_file

    found = find_adapter_config_file(name, **source)
    if found is None:
        model, info = _whole(name, **kwargs | {"output_loading_info": True})
        must_be_whole(repr(name), model, info["missing_keys"])
        return model
    if whole:
        raise ConfigError(f"full_finetuning=True, but {name!r} holds adapters, whose base is frozen: merge them first "
                          "(aligntune.core.saving.save, merge_adapters=True), or leave it out")
    if (Path(name) / "config.json").is_file():  # a whole model beside its adapters: transformers puts the two together
        model = _whole(name, **kwargs)
        model.set_adapter(model.active_adapters())
        return model
    config = PeftConfig.from_pretrained(str(Path(found).parent))
    if not config.base_model_name_or_path:
        raise ConfigError(f"{name!r} holds adapters that name no model under them (base_model_name_or_path)")
    base = _whole(
        config.base_model_name_or_path, **kwargs | {"revision": config.revision or "main"}
    )
    # eval: what is loaded is in eval mode, and peft's own modules are not.
    return PeftModel.from_pretrained(base, name, config=config, is_trainable=True, **source).eval()


def _whole(name: str, **kwargs: Any) -> Any:
    """transformers' model, once each argument is known to be one of its loader or its config."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

    loading = {*signature(PreTrainedModel.from_pretrained).parameters, *_LOADING}
    strange = [name for name in kwargs if name not in loading]
    if strange and not kwargs["trust_remote_code"]:  # a model's own code may take what it likes
        known = {key: value for key, value in kwargs.items() if key in strange or key in _SOURCE}
        _, unused = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **known)
        strange = [name for name in strange if name in unused]
        if strange:
            raise unknown_arguments(strange, FastLanguageModel.from_pretrained, PreTrainedModel.from_pretrained,
                                    *_LOADING)
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def _must_be_of_shape(model: Any, wanted: Any) -> None:
    """That the adapters on a model are those that a config describes."""
    faults = [f"{name}={ours!r}, but the model has adapters of {theirs!r}: train on these without get_peft_model, or "
              "merge them first (model.merge_and_unload())"
              for name, ours, theirs in differences(model, {name: getattr(wanted, name) for name in _SHAPE})]
    if faults:
        raise ConfigError.from_faults(faults, "the adapters")


def _default_dtype() -> torch.dtype:
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _nf4(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _check_length(model: Any, max_seq_length: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_seq_length > limit:
        raise ConfigError(
            f"max_seq_length={max_seq_length}, but the model's positions end at {limit}; "
            "give a smaller one, or load a config with RoPE scaling"
        )


def _present_linears(model: nn.Module) -> list[str]:
    """The names in `LINEARS` that this model has."""
    present = {path.rpartition(".")[2] for path, module in model.named_modules() if hasattr(module, "in_features")}
    found = [name for name in LINEARS if name in present]
    if not found:
        raise ConfigError("the model has no linears of the usual names; give target_modules")
    return found
