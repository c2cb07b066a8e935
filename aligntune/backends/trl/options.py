"""From our options to the fields of TRL's config classes: one table, and what an algorithm fixes."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import TYPE_CHECKING, Any

from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, RLOOConfig, SFTConfig

from aligntune.backends._compat import config_kwargs
from aligntune.backends.trl.generation_kwargs import generation_faults, with_stops
from aligntune.backends.trl.offline import CPOConfig, ORPOConfig
from aligntune.backends.trl.ppo_config import UNREAD, PPOConfig
from aligntune.core.rules import world_size
from aligntune.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aligntune.backends.loading import Precision
    from aligntune.core.resolve import Job

CONFIGS: dict[str, type] = {
    "sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ipo": DPOConfig, "kto": KTOConfig,
    "orpo": ORPOConfig, "simpo": CPOConfig, "cpo": CPOConfig,
    "rloo": RLOOConfig, "grpo": GRPOConfig, "gspo": GRPOConfig,
    "dapo": GRPOConfig, "dr_grpo": GRPOConfig, "ppo": PPOConfig,
}

SAME_FIELD: dict[str, str] = {
    "output_dir": "output_dir", "seed": "seed", "num_epochs": "num_train_epochs", "max_steps": "max_steps",
    "batch_size": "per_device_train_batch_size", "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "learning_rate", "lr_scheduler": "lr_scheduler_type", "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1", "adam_beta2": "adam_beta2", "adam_epsilon": "adam_epsilon",
    "max_grad_norm": "max_grad_norm", "dataloader_num_workers": "dataloader_num_workers",
    "logging_steps": "logging_steps", "save_total_limit": "save_total_limit", "report_to": "report_to",
    "run_name": "run_name", "trust_remote_code": "trust_remote_code",
    # an algorithm's own
    "beta": "beta", "loss_type": "loss_type", "label_smoothing": "label_smoothing", "loss_weights": "loss_weights",
    "precompute_ref_log_probs": "precompute_ref_log_probs", "use_weighting": "use_weighting",
    "epsilon": "epsilon", "epsilon_high": "epsilon_high", "scale_rewards": "scale_rewards",
    "importance_sampling_level": "importance_sampling_level", "sync_ref_model": "sync_ref_model",
    "mask_truncated_completions": "mask_truncated_completions", "delta": "delta",
    "top_entropy_quantile": "top_entropy_quantile", "normalize_advantages": "normalize_advantages",
    "reward_clip_range": "reward_clip_range",
    "center_rewards_coefficient": "center_rewards_coefficient", "desirable_weight": "desirable_weight",
    "undesirable_weight": "undesirable_weight", "cpo_alpha": "cpo_alpha", "simpo_gamma": "simpo_gamma",
    **{name: name for name in (
        "num_ppo_epochs", "num_mini_batches", "cliprange", "cliprange_value", "vf_coef", "entropy_coef", "gamma", "lam",
        "kl_coef", "kl_estimator", "kl_control", "kl_goal", "kl_gain", "target_kl", "whiten_rewards",
        "whiten_advantages", "missing_eos_penalty", "value_learning_rate",
    )},
    # rollouts
    "num_generations": "num_generations", "max_completion_length": "max_completion_length",
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "num_iterations": "num_iterations",
    "steps_per_generation": "steps_per_generation", "reward_function_weights": "reward_weights",
}

MADE_OF: dict[str, tuple[str, ...]] = {
    "bf16": ("precision",), "fp16": ("precision",), "use_cpu": ("device",), "optim": ("optimizer",),
    "gradient_checkpointing": ("gradient_checkpointing",), "activation_checkpointing": ("gradient_checkpointing",),
    "warmup_steps": ("warmup_steps", "warmup_ratio"), "warmup_ratio": ("warmup_ratio", "warmup_steps"),
    "save_strategy": ("save_steps",), "save_steps": ("save_steps",), "resume_from_checkpoint": ("resume",),
    "eval_strategy": ("eval_steps",), "eval_steps": ("eval_steps",), "per_device_eval_batch_size": ("eval_batch_size",),
    "logging_strategy": ("logging_steps",),
    "logging_first_step": (), "disable_tqdm": (), "remove_unused_columns": (),  # ours whatever the options say
    # rows, which are read, cut and marked before TRL sees them
    "max_length": ("max_seq_length",), "truncation_mode": ("truncation",), "packing": ("packing",),
    "padding_free": ("padding_free",), "dataset_kwargs": (), "dataset_text_field": ("text_field",),
    "completion_only_loss": ("completion_only",), "chat_template_path": ("chat_template",),
    # rollouts
    "use_vllm": ("rollout_engine",), "log_completions": ("log_completions",), "num_generations_eval": (),
    "generation_batch_size": ("steps_per_generation",), "disable_dropout": ("lora_dropout",),
}
"""Fields that are made of our options, or decided by them, under another name or in another form; () of none."""

FIXED: dict[str, dict[str, Any]] = {
    "ipo": {"loss_type": ["ipo"]},
    "simpo": {"loss_type": "simpo"},
    "grpo": {"use_bias_correction_kl": False},
    # "grpo" counts each sequence once, as GSPO's equation 5 does; TRL's default would weight it by its length.
    "gspo": {"importance_sampling_level": "sequence", "loss_type": "grpo", "use_bias_correction_kl": False},
    "dapo": {"loss_type": "dapo", "use_bias_correction_kl": False},
    "dr_grpo": {"loss_type": "dr_grpo", "use_bias_correction_kl": False},
}
"""What makes the algorithm that algorithm: no option of ours changes it, `trainer_options` may not either."""

OPTIMIZERS = {"adamw": "adamw_torch", "adamw_fused": "adamw_torch_fused"}
_NEVER = 10**9


def trl_config(job: Job, precision: Precision, *, eval_rows: int, fields: Mapping[str, Any] | None = None) -> Any:
    """The TRL config object of a job.

    Args:
        job: the job.
        precision: what it computes in, and where.
        eval_rows: rows of evaluation data.
        fields: in the place of those that our options make; `trainer_options` come after them.

    Raises:
        ConfigError: `trainer_options` holds a field that the class lacks or that another option already sets; or
            `generation_kwargs` something that nothing reads, or that is an option here; or `stop_strings` are asked
            for where nothing ends completions at them.
    """
    options, name = job.options, job.spec.name
    cls = CONFIGS[name]
    names = {item.name for item in dataclasses.fields(cls)}
    values = vars(options)
    kwargs = {field: values[ours] for ours, field in SAME_FIELD.items() if ours in values and field in names}
    kwargs |= _shared(job, precision, eval_rows)
    if name == "sft":
        # Rows are cut in preparation. A number here would make TRL refuse padding_free; the collator cuts nothing.
        kwargs |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "packing": options.packing,
                   "padding_free": options.padding_free is True}
        if options.packing:
            kwargs["max_length"] = options.max_seq_length
    elif not job.spec.online:
        if options.padding_free is True and job.backend == "trl":
            raise ConfigError(f"data.padding_free = True: TRL's {name} pads all the same; leave it at 'auto'")
        kwargs["max_length"] = options.max_seq_length
        if name == "dpo":
            loss = options.loss_type
            kwargs["loss_type"] = [loss] if isinstance(loss, str) else list(loss)
        if cls in (ORPOConfig, CPOConfig):
            kwargs["remove_unused_columns"] = False  # their collator picks; they would set it and complain
    else:
        kwargs |= _rollout(job)
    if "disable_dropout" in names and options.use_peft and options.lora_dropout:
        kwargs["disable_dropout"] = False  # it would turn off the dropout that was asked for
    kwargs |= {**FIXED.get(name, {}), **(fields or {})}
    _pass_through(job, cls, names, kwargs)
    try:
        args = cls(**config_kwargs(cls, kwargs))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{cls.__name__}: {error}") from error
    if getattr(args, "activation_offloading", False) and precision.device == "cpu":
        raise ConfigError("trainer_options activation_offloading=True: no GPU is used here whose memory it would spare")
    if job.spec.online:
        if faults := generation_faults(job, args):
            raise ConfigError.from_faults(faults, "generation_kwargs")
        batch, group = args.per_device_eval_batch_size * world_size(), args.num_generations_eval or args.num_generations
        if eval_rows and batch % group:
            raise ConfigError(f"train.trainer_options.num_generations_eval = {group}: an evaluation batch of {batch} "
                              "rows holds no whole groups of it; leave it out, or change evaluation.eval_batch_size")
        args.generation_kwargs = with_stops(job, args)
    return args


def _shared(job: Job, precision: Precision, eval_rows: int) -> dict[str, Any]:
    options = job.options
    checkpointing = options.gradient_checkpointing
    evaluating = options.eval_steps is not None and eval_rows > 0
    kwargs: dict[str, Any] = {
        "bf16": precision.name == "bf16", "fp16": precision.name == "fp16", "use_cpu": precision.device == "cpu",
        "gradient_checkpointing": precision.device == "cuda" if checkpointing == "auto" else bool(checkpointing),
        # transformers reads a number below 1 as a share of the steps.
        "warmup_steps": options.warmup_steps if options.warmup_steps is not None else options.warmup_ratio,
        "optim": OPTIMIZERS.get(options.optimizer, options.optimizer),
        # "steps" with a number that is never reached still saves at the end of training; "no" would not.
        "save_strategy": "steps", "save_steps": options.save_steps or _NEVER,
        "eval_strategy": "steps" if evaluating else "no",
        "per_device_eval_batch_size": options.eval_batch_size or options.batch_size,
        "logging_first_step": True, "logging_strategy": "steps", "disable_tqdm": True,
    }
    if evaluating:
        kwargs["eval_steps"] = options.eval_steps
    if isinstance(options.report_to, str):
        kwargs["report_to"] = [options.report_to]
    return kwargs


def _rollout(job: Job) -> dict[str, Any]:
    options = job.options
    bounds = vars(options).get("reward_clip_range")
    if bounds is not None and (len(bounds) != 2 or bounds[0] > bounds[1]):
        raise ConfigError(f"loss.reward_clip_range = {bounds!r}: must be two numbers, the lower bound first")
    evaluation_batch = (options.eval_batch_size or options.batch_size) * world_size()
    return {
        # TRL wants whole groups in an evaluation batch too.
        "num_generations_eval": math.gcd(evaluation_batch, options.num_generations),
        "use_vllm": options.rollout_engine == "vllm", "log_completions": options.log_completions,
    }


def _pass_through(job: Job, cls: type, fields: set[str], kwargs: dict[str, Any]) -> None:
    """Add `trainer_options`, after checking each against the real config class and against our own options."""
    name = job.spec.name
    ours = MADE_OF | {field: (option,) for option, field in SAME_FIELD.items()}
    faults = []
    kinds = typing.get_type_hints(cls)
    for field, value in job.options.trainer_options.items():
        path = f"train.trainer_options.{field}"
        given = [option for option in ours.get(field, ()) if option in vars(job.options) and job.given(option)]
        if field not in fields:
            close = nearest(field, fields)
            faults.append(f"{path}: {cls.__name__} has no such field" + (f"; did you mean {close!r}?" if close else ""))
        elif cls is PPOConfig and field in UNREAD:
            faults.append(f"{path}: PPO does not read it; {UNREAD[field]}")
        elif field in FIXED.get(name, {}) and FIXED[name][field] != value:
            faults.append(f"{path} = {value!r}: {name} is defined by {FIXED[name][field]!r}; another algorithm fits")
        elif field == "model_init_kwargs" and value is not None:
            faults.append(f"{path}: TRL gets a model that is loaded already: model_revision, model_dtype, "
                          "quantization, attn_implementation and trust_remote_code say how")
        elif given:
            faults.append(f"{path}: {given[0]} is given too; give one of the two")
        elif not _fits(value, kinds[field]):
            faults.append(f"{path} = {value!r}: must be a {_words(kinds[field])}")
        else:
            kwargs[field] = value
    if faults:
        raise ConfigError.from_faults(faults, "trainer_options")


def _members(kind: Any) -> list[Any]:
    """The types of a union, or the one type."""
    united = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return [member for one in typing.get_args(kind) for member in _members(one)] if united else [kind]


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is None or of the declared type of a field; transformers and TRL do not look."""
    if value is None:  # also of fields that are declared without it (no max_grad_norm clips nothing)
        return True
    for member in _members(kind):
        plain = typing.get_origin(member) or member
        if member is Any or (plain is typing.Literal and value in typing.get_args(member)):
            return True
        if isinstance(value, bool):
            fits = member is bool
        elif member is float:
            fits = isinstance(value, int | float)
        elif plain is tuple:
            fits = isinstance(value, list | tuple)
        else:
            fits = isinstance(plain, type) and isinstance(value, plain)
        if fits:
            return True
    return False


def _words(kind: Any) -> str:
    names = ["None" if member is type(None) else getattr(typing.get_origin(member) or member, "__name__", str(member))
             for member in _members(kind)]
    return " or ".join(sorted(set(names), key=lambda name: (name == "None", names.index(name))))
