"""What must hold between options: required ones, contradictions, and the arithmetic of online batches."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.core.config import TrainSection
from aligntune.core.options import infos
from aligntune.errors import ConfigError, nearest

Values = dict[str, Any]
Origin = dict[str, str]

VLLM_STOPS = "stop_strings: TRL counts a completion that vLLM ends at one as cut off (completions/clipped_ratio)"
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
"""TRL's values of `f_divergence_type`, which it looks at in the first step."""
NOT_BOTH = "resume and overwrite: give one of the two; overwrite removes what resume continues from"
NO_EVALUATION = (
    "Give eval_dataset_name (with eval_split, max_eval_samples), eval_split of the training dataset, or "
    "val_split_ratio to hold out a part of it"
)
_SORTING = ("aot", "aot_unpaired")
_SMOOTHED = {"dpo": ("robust", "exo_pair", *_SORTING), "cpo": ("sigmoid",)}
"""The forms of a loss that read label_smoothing."""
_SCHEDULES: dict[str, dict[str, float]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1, "min_lr": 1e-6}, "warmup_stable_decay": {"num_decay_steps": 100},
}
"""What transformers' schedules want one of, with examples: it says so when training begins."""
_IDLE: dict[tuple[str, Any], tuple[str, ...]] = {
    ("kl_control", "fixed"): ("kl_goal", "kl_gain"), ("dynamic_sampling", False): ("max_resample_rounds",),
}
"""An algorithm's option and its value -> options of its loss that nothing reads then."""
VLLM_CHOICES = {
    "vllm_mode": ("colocate", "server"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
"""TRL's values of fields that it looks at when the model is loaded, and when the first rollout is done."""
ONLINE_CHOICES = {
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
"""TRL's values of fields that it looks at in the first step, where they are no option of the algorithm."""
TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "neptune", "trackio", "swanlab", "clearml", "codecarbon",
            "dagshub", "dvclive", "azure_ml", "flyte", "kubeflow")
"""Trackers of transformers, which looks at the names when its trainer is made; a later version may know more."""
_ALONE = ("none", "all")
"""What `report_to` takes in the place of trackers."""
GENERATE_FIELDS: Mapping[str, Any] = {
    "cache_implementation": None, "ds3_gather_for_generation": True, "use_transformers_continuous_batching": False,
    "transformers_continuous_batching_config": None, "use_transformers_paged": False,
}
"""Fields of TRL's online configs that only its rollouts by transformers read, with TRL's defaults."""


def asked(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with the fields of `trainer_options` over them: a value reaches TRL by either way."""
    fields = options.get("trainer_options")
    return {**options, **(fields if isinstance(fields, Mapping) else {})}


def _path(values: Mapping[str, Any], section: str, name: str) -> str:
    """The option's path, or that of the field of `trainer_options` that stands over it."""
    fields = values.get("trainer_options")
    return f"train.trainer_options.{name}" if isinstance(fields, Mapping) and name in fields else f"{section}.{name}"


def world_size() -> int:
    """Processes of this run, as the launcher set them."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() and int(text) > 0 else 1


def evaluates(values: Mapping[str, Any]) -> bool:
    """Whether the options name evaluation data."""
    return any(values[name] is not None for name in ("eval_dataset_name", "eval_split", "val_split_ratio"))


def check_names(values: Values, faults: list[str]) -> None:
    """Add every unknown name of a backend, tracker or reward to `faults`, whatever else is wrong; nothing is loaded."""
    _backend(values, faults)
    _trackers(values, faults)
    entries = values.get("reward_functions")
    for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
        name = entry.get("name") if isinstance(entry, dict) else entry
        if isinstance(name, str) and ":" not in name:
            from aligntune.rewards import REWARDS

            try:
                REWARDS.resolve(name)
            except ConfigError as error:
                faults.append(f"rewards.reward_functions: {error}")


def check(values: Values, origin: Origin, spec: AlgorithmSpec, faults: list[str], notices: list[str]) -> None:
    """Add every contradiction to `faults`; settle what may be settled and say so in `notices`."""
    if faults:  # values may have the wrong types; what is wrong already is told first
        return
    _required(values, spec, faults)
    if values["resume"] and values["overwrite"] and (origin["overwrite"], origin["resume"]) != ("config", "argument"):
        # A run's own config.yaml keeps its `overwrite`; who resumes that run says so beside it.
        faults.append(NOT_BOTH)
    if values["backend"] == "fast" and values["device"] == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        faults.append("model.device = 'cpu' with backend = 'fast': its kernels run on an NVIDIA GPU; backend='trl' "
                      "trains on a CPU")
    _lora(values, origin, faults, notices)
    _data(values, faults, notices)
    _loss(values, spec, faults, notices)
    _loss_weights(values, spec, faults)
    _steps(values, origin, spec, faults, notices)
    _schedule(values, origin, faults)
    _evaluation(values, faults, notices)
    if spec.online:
        _lengths(values, origin, faults, notices)
        if spec.groups:
            _batch(values, origin, faults, notices, world_size())
        else:
            _rollout(values, faults, world_size())
        _rewards(values, faults)
        _vllm(values, origin, faults, notices)
        _engine(values, notices)
        if values["rollout_memory_gib"] is not None and values["rollout_engine"] in ("hf", "vllm"):
            notices.append(f"rollout_engine is {values['rollout_engine']!r}: nothing reads rollout_memory_gib")


def _required(values: Values, spec: AlgorithmSpec, faults: list[str]) -> None:
    for name in ("model_name", "dataset_name"):
        if values[name] is None or (isinstance(values[name], str) and not values[name].strip()):
            faults.append(f"{name}: none given; a hub id, a local path, 'builtin:NAME' or an object is wanted")
    if spec.needs_reward and not values["reward_functions"] and values["reward_model_name"] is None:
        faults.append(f"rewards: {spec.name} needs reward_functions or reward_model_name")


def _backend(values: Values, faults: list[str]) -> None:
    from aligntune.backends import BACKENDS

    name = getattr(values["backend"], "value", values["backend"])
    if name == "unsloth":
        faults.append("backend = 'unsloth': aligntune's own fast engine is backend='fast'")
    elif name != "auto":
        try:
            values["backend"] = BACKENDS.resolve(name)
        except ConfigError as error:
            faults.append(f"backend: {error} 'auto' chooses.")


def _trackers(values: Values, faults: list[str]) -> None:
    wanted, path = asked(values)["report_to"], _path(values, "logging", "report_to")
    if isinstance(wanted, str):
        names = [name.strip() for name in wanted.split(",")]
    elif isinstance(wanted, list | tuple) and all(isinstance(name, str) for name in wanted):
        names = list(wanted)
    else:
        return  # of a wrong type, which is told as of any option
    known = (*TRACKERS, *_ALONE)
    strange = [name for name in names if name not in known]
    alone = [name for name in _ALONE if name in names]
    for name in strange:  # one that is like none of them may be a later version's, which transformers tells
        if difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75):
            _one_of(path, name, known, faults)
    if alone and len(names) > 1:
        faults.append(f"{path} = {wanted!r}: {alone[0]!r} stands alone; leave it out, or the others")
    elif isinstance(wanted, str) and len(names) > 1 and not strange:
        faults.append(f"{path} = {wanted!r}: several trackers are a list: [{', '.join(names)}]")


def _lora(values: Values, origin: Origin, faults: list[str], notices: list[str]) -> None:
    if hasattr(values["model_name"], "peft_config"):
        if not values["use_peft"] and origin["use_peft"] in ("argument", "config"):
            faults.append("lora.use_peft = False, but the model object has adapters, and they alone would train: merge "
                          "them first (model.merge_and_unload()), or leave the option out")
        values["use_peft"] = True
    if values["quantization"] == "nf4" and not values["use_peft"]:
        if origin["use_peft"] in ("argument", "config"):
            faults.append("lora.use_peft = False with quantization = 'nf4': a 4-bit base cannot be trained whole; "
                          "use_peft=True trains adapters on it")
        else:
            values["use_peft"] = True
            notices.append("quantization 'nf4': LoRA is turned on (a 4-bit base cannot be trained whole)")
    if values["base_precision"] == "fp8" and not values["use_peft"]:
        faults.append("model.base_precision = 'fp8': only a frozen base is quantised: pass use_peft=True, or null for "
                      "weights that train")
    if values["base_precision"] == "fp8" and values["quantization"] == "nf4":
        faults.append("model.base_precision = 'fp8' with quantization = 'nf4': a 4-bit base is not quantised again; "
                      "leave one out")
    targets = values["lora_target_modules"]
    whole = [name for name in ("embed_tokens", "lm_head") if isinstance(targets, list) and name in targets]
    if values["use_peft"] and whole:
        values["lora_target_modules"] = [name for name in targets if name not in whole]
        values["modules_to_save"] = [*(values["modules_to_save"] or []), *whole]
        origin["modules_to_save"] = origin["lora_target_modules"]
        notices.append(f"{' and '.join(whole)} in lora_target_modules: trained whole, as modules_to_save")
    idle = [name for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora",
                              "lora_init", "lora_bias", "modules_to_save")
            if origin.get(name) in ("argument", "config")]
    if idle and not values["use_peft"]:
        if origin["use_peft"] in ("argument", "config"):
            notices.append(f"use_peft is false: {', '.join(idle)} {'is' if len(idle) == 1 else 'are'} not used")
        else:
            faults.append(f"lora.{idle[0]} is given and lora.use_peft is not: pass use_peft=True for LoRA, or "
                          "use_peft=False for full training")


def _data(values: Values, faults: list[str], notices: list[str]) -> None:
    """Options of rows and of the hub that have no effect beside others."""
    if values.get("completion_only") is False and values.get("assistant_turns") == "last":
        faults.append("data.completion_only = False and data.assistant_turns = 'last': every token of a row trains, "
                      "those of earlier turns too; leave one of the two out")
    names = [values[name] for name in ("dataset_name", "eval_dataset_name") if values[name] is not None]
    if values["dataset_config"] is not None and not any(_on_hub(name) for name in names):
        notices.append("no dataset of the hub: nothing reads dataset_config")
    model = values["model_name"]
    if values["model_revision"] is not None and isinstance(model, str) and not _on_hub(model):
        notices.append(f"model_name is {model!r}: nothing reads model_revision")


def _on_hub(name: Any) -> bool:
    """Whether this is neither an object, nor built in, nor a file or folder here."""
    return isinstance(name, str) and not name.startswith("builtin:") and not os.path.exists(os.path.expanduser(name))


def _loss(values: Values, spec: AlgorithmSpec, faults: list[str], notices: list[str]) -> None:
    """What TRL finds out when its trainer is made, in the first step, or never."""
    if not isinstance(values["trainer_options"], Mapping):
        faults.append(f"train.trainer_options: a mapping is wanted, not a {type(values['trainer_options']).__name__}")
        return
    given, fields = asked(values), values["trainer_options"]
    path = partial(_path, values, "loss")
    if given.get("sync_ref_model") is True and values["use_peft"]:
        faults.append(f"{path('sync_ref_model')} = True with LoRA: the reference is the base with adapters off, which "
                      "no copy follows; use_peft=False trains and follows the whole model")
    forms = given.get("loss_type")
    if isinstance(forms, list | tuple) and not forms:
        faults.append(f"{path('loss_type')} = {forms!r}: at least one form is wanted")
    forms = forms if isinstance(forms, list | tuple) else [forms]
    sorting = [form for form in forms if form in _SORTING]
    if given.get("use_weighting") is True and sorting:
        faults.append(f"{path('use_weighting')} = True with loss_type {sorting[0]!r}: it sorts what is weighted by "
                      "pair; leave one out")
    readers = _SMOOTHED.get(spec.name, ())
    if readers and given.get("label_smoothing") and not any(form in readers for form in forms):
        notices.append(f"loss_type is {', '.join(map(repr, forms))}: label_smoothing is not used (it is by "
                       f"{', '.join(map(repr, readers))})")
    defaults = {row.name: row.default for row in infos(spec.options, "loss")} | dict(spec.defaults)
    for (name, value), others in _IDLE.items():
        # One at its default is no wish: a run's own config.yaml has every option.
        idle = [other for other in others if other in defaults and given[other] != defaults[other]]
        if idle and given[name] == value:
            notices.append(f"{name} is {value!r}: nothing reads {' and '.join(idle)}")
    choices = ONLINE_CHOICES | {row.name: row.choices for row in infos(spec.options, "loss") if row.choices}
    for name in choices if spec.online else ():
        if isinstance(fields.get(name), str):
            _one_of(path(name), fields[name], choices[name], faults)
    kind = given.get("f_divergence_type")
    if kind is not None:
        _one_of(path("f_divergence_type"), kind, DIVERGENCES, faults)


def _loss_weights(values: Values, spec: AlgorithmSpec, faults: list[str]) -> None:
    given = asked(values)
    forms, weights = given.get("loss_type"), given.get("loss_weights")
    count = len(forms) if isinstance(forms, list | tuple) else 1
    if spec.name in ("dpo", "ipo") and isinstance(weights, list | tuple) and count and len(weights) != count:
        faults.append(f"{_path(values, 'loss', 'loss_weights')}: {len(weights)} weights for {count} "
                      f"{'form' if count == 1 else 'forms'} of loss_type")


def _steps(values: Values, origin: Origin, spec: AlgorithmSpec, faults: list[str], notices: list[str]) -> None:
    """How long to train: by steps, or by passes over the data."""
    given = asked(values)
    steps = given["max_steps"]
    if not isinstance(steps, int):  # a field of a wrong type, which is told as of any field
        return
    if steps == 0:
        faults.append(f"{_path(values, 'train', 'max_steps')} = 0: must be an integer >= 1, or -1, which leaves it to "
                      "num_epochs")
    # One of a config at its default is no wish: a run's own config.yaml has every option.
    default = spec.defaults.get("num_epochs", TrainSection.num_epochs)
    wish = origin["num_epochs"] == "argument" or (origin["num_epochs"] == "config" and values["num_epochs"] != default)
    idle = "num_train_epochs" if "num_train_epochs" in given else "num_epochs" if wish else None
    if steps > 0 and idle:
        notices.append(f"max_steps is {steps}: {idle} is not used")


def _schedule(values: Values, origin: Origin, faults: list[str]) -> None:
    # A ratio of 0 is no second wish: a run's own config.yaml has every option.
    given = origin["warmup_ratio"] in ("argument", "config") and values["warmup_ratio"] > 0
    if values["warmup_steps"] is not None and given:
        faults.append("train.warmup_steps and train.warmup_ratio: give one of the two")
    numbers = asked(values).get("lr_scheduler_kwargs")
    wanted = _SCHEDULES.get(values["lr_scheduler"])
    if wanted is None or isinstance(numbers, str):  # JSON, which transformers reads
        return
    numbers = numbers if isinstance(numbers, Mapping) else {}
    if sum(numbers.get(name) is not None for name in wanted) != 1:
        ways = " or ".join(f"{{'lr_scheduler_kwargs': {{{name!r}: {number:g}}}}}" for name, number in wanted.items())
        faults.append(f"train.lr_scheduler = {values['lr_scheduler']!r}: it wants {' or '.join(wanted)}, and one of "
                      f"them alone: pass trainer_options={ways}")


def _one_of(path: str, value: Any, choices: tuple[str, ...], faults: list[str]) -> None:
    if value not in choices:
        close = nearest(value, choices) if isinstance(value, str) else None
        faults.append(f"{path} = {value!r}: must be one of {', '.join(map(repr, choices))}"
                      + (f"; did you mean {close!r}?" if close else ""))


def _vllm(values: Values, origin: Origin, faults: list[str], notices: list[str]) -> None:
    """Fields of vLLM: nothing reads them where something else generates."""
    fields = values["trainer_options"] if isinstance(values["trainer_options"], Mapping) else {}
    for name, choices in VLLM_CHOICES.items():
        if name in fields:
            _one_of(f"train.trainer_options.{name}", fields[name], choices, faults)
    idle = sorted(name for name in fields if str(name).startswith("vllm_"))
    if not idle or values["rollout_engine"] == "vllm" or fields.get("use_vllm"):
        return
    if origin["rollout_engine"] in ("argument", "config"):
        notices.append(f"rollout_engine is {values['rollout_engine']!r}: nothing reads {', '.join(idle)} of "
                       "trainer_options")
    else:
        faults.append(f"train.trainer_options.{idle[0]} is given and rollout.rollout_engine is not: pass "
                      "rollout_engine='vllm' to generate with it")


def _engine(values: Values, notices: list[str]) -> None:
    """What another engine than transformers' `generate` does not read, or counts otherwise."""
    fields = values["trainer_options"] if isinstance(values["trainer_options"], Mapping) else {}
    engine = "vllm" if fields.get("use_vllm") is True else values["rollout_engine"]
    idle = unread(fields)
    if idle and engine in ("fast", "vllm"):
        notices.append(f"rollout_engine is {engine!r}: nothing reads {', '.join(idle)} of trainer_options")
    if values["stop_strings"] and engine == "vllm":
        notices.append(VLLM_STOPS)


def unread(fields: Mapping[str, Any]) -> list[str]:
    """Which of these fields of `trainer_options` only transformers' `generate` reads; at TRL's default none counts."""
    return sorted(name for name, value in fields.items()
                  if name in GENERATE_FIELDS and value not in (None, GENERATE_FIELDS[name]))


def _evaluation(values: Values, faults: list[str], notices: list[str]) -> None:
    sources = [name for name in ("eval_dataset_name", "eval_split") if values[name] is not None]
    if values["val_split_ratio"] is not None and sources:
        faults.append(f"evaluation.val_split_ratio and evaluation.{sources[0]}: give one source of evaluation data")
    if values["eval_steps"] is not None and not evaluates(values):
        faults.append("evaluation.eval_steps: no evaluation data: eval_dataset_name, eval_split or val_split_ratio")
    idle = [name for name in ("max_eval_samples", "eval_batch_size") if values[name] is not None]
    if idle and not evaluates(values):
        notices.append(f"no evaluation data: nothing reads {' and '.join(idle)}")
    if (values["stop_metric"] is None) != (values["stop_value"] is None):
        faults.append("evaluation.stop_metric and evaluation.stop_value: give both or neither")
    elif values["stop_metric"] is not None and values["eval_steps"] is None:
        faults.append("evaluation.stop_metric: it is read when training evaluates: give eval_steps")


def _lengths(values: Values, origin: Origin, faults: list[str], notices: list[str]) -> None:
    total, completion = values["max_seq_length"], values["max_completion_length"]
    if completion < total:
        return
    given = {name for name in ("max_seq_length", "max_completion_length") if origin[name] in ("argument", "config")}
    if given == {"max_seq_length"}:
        values["max_completion_length"] = max(1, total // 2)
        notices.append(f"max_seq_length {total} holds the prompt too: max_completion_length becomes {total // 2}")
    elif given == {"max_completion_length"}:
        values["max_seq_length"] = completion + 1024
        notices.append(f"max_completion_length {completion}: max_seq_length becomes {completion + 1024}")
    else:
        faults.append(f"rollout.max_completion_length = {completion}: must be below data.max_seq_length = {total}, "
                      "which holds prompt and completion")


def _batch(values: Values, origin: Origin, faults: list[str], notices: list[str], processes: int) -> None:
    """batch_size x accumulation x processes must divide by num_generations (one group is never split)."""
    batch, group = values["batch_size"], values["num_generations"]
    if group < 2:
        faults.append(f"rollout.num_generations = {group}: must be an integer >= 2, for completions of one prompt are "
                      "compared")
        return
    # What one round of generation makes: steps_per_generation micro-steps, by default one optimizer step's.
    steps_name = "steps_per_generation" if values["steps_per_generation"] else "gradient_accumulation_steps"
    steps = values[steps_name]
    product = batch * steps * processes
    if product % group == 0:
        return
    names = ("batch_size", "num_generations", steps_name)
    explicit = {name for name in names if origin[name] in ("argument", "config")}
    if "num_generations" in explicit and "batch_size" not in explicit:
        values["batch_size"] = group
        notices.append(f"num_generations {group}: batch_size becomes {group}")
    elif "num_generations" not in explicit:
        divisor = next((g for g in range(min(8, product), 1, -1) if product % g == 0), None)
        if divisor:
            values["num_generations"] = divisor
            notices.append(f"batch_size {batch} x {steps_name} {steps} x processes {processes} = {product} does not "
                           f"divide by {group}: num_generations becomes {divisor}")
        elif steps_name not in explicit:
            values[steps_name] = 8
            notices.append(f"batch_size {batch} x processes {processes} holds no group: {steps_name} becomes 8")
        else:
            faults.append(_pairs(batch, steps, processes, group, steps_name))
    else:
        faults.append(_pairs(batch, steps, processes, group, steps_name))


def _rollout(values: Values, faults: list[str], processes: int) -> None:
    """Where completions stand alone, a rollout still holds every completion of its prompts."""
    count = values["batch_size"] * values["gradient_accumulation_steps"] * values["num_mini_batches"] * processes
    if count % values["num_generations"]:
        faults.append(f"rollout.num_generations = {values['num_generations']}: must divide the {count} completions of "
                      "a rollout (batch_size x gradient_accumulation_steps x num_mini_batches x processes)")


def _pairs(batch: int, steps: int, processes: int, group: int, steps_name: str) -> str:
    product = batch * steps * processes
    groups = [g for g in range(2, product + 1) if product % g == 0]
    near_group = min(groups, key=lambda g: (abs(g - group), g), default=None)
    unit = steps * processes
    batches = [b for b in range(1, batch + group + 1) if b * unit % group == 0]
    near_batch = min(batches, key=lambda b: (abs(b - batch), b), default=group)
    near = ([f"batch_size {batch} with num_generations {near_group}"] if near_group else [])
    near.append(f"batch_size {near_batch} with num_generations {group}")
    return (f"train.batch_size = {batch} and rollout.num_generations = {group}: batch_size x {steps_name} x processes "
            f"({batch} x {steps} x {processes} = {product}) must divide by num_generations; "
            f"nearest: {' or '.join(near)}")


def _rewards(values: Values, faults: list[str]) -> None:
    functions, weights = values["reward_functions"], values["reward_function_weights"]
    if functions is not None and not isinstance(functions, (list, tuple)):
        values["reward_functions"] = functions = [functions]
    if weights is not None:
        # A reward model is one more reward, after the functions.
        count = len(functions or []) + (values["reward_model_name"] is not None)
        if len(weights) != count:
            faults.append(f"rewards.reward_function_weights: {len(weights)} weights for {count} rewards")
