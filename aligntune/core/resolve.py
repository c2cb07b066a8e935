"""From what the user said to one resolved, validated job.

Layers, strongest first: explicit arguments, the config (YAML path, mapping or OmegaConf), the algorithm's defaults,
the defaults of `core.config`. The raw layers are walked before anything is merged, and every fault is collected:
OmegaConf alone stops at the first one, takes 7 for a bool and "8" for an int, and lets NaN pass.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aligntune.algorithms import ALGORITHMS
from aligntune.algorithms.base import AlgorithmSpec
from aligntune.core import rules
from aligntune.core.config import SECTIONS, common_options, structured_root
from aligntune.core.options import UNSET, OptionInfo, infos
from aligntune.errors import ConfigError, nearest

OLD_NAMES: Mapping[str, str] = {
    "tokenizer": "tokenizer_name", "processing_class": "tokenizer_name", "model": "model_name",
    "model_name_or_path": "model_name", "train_dataset": "dataset_name", "dataset": "dataset_name",
    "eval_dataset": "eval_dataset_name", "dataset_text_field": "text_field", "max_length": "max_seq_length",
    "num_train_epochs": "num_epochs", "epochs": "num_epochs", "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size", "lr": "learning_rate", "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer", "r": "lora_r", "lora_rank": "lora_r", "target_modules": "lora_target_modules",
    "use_lora": "use_peft", "reward_funcs": "reward_functions", "reward_weights": "reward_function_weights",
    "reward_model": "reward_model_name", "ref_model": "ref_model_name", "dataset_split": "split",
    "load_in_4bit": "quantization", "attn_impl": "attn_implementation",
    "use_gradient_checkpointing": "gradient_checkpointing",
}
"""Names of users' old scripts that have one clear meaning here."""

OLD_VALUES: Mapping[str, Mapping[str, Any]] = {
    "optimizer": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw_fused", "adamw_bnb_8bit": "adamw_8bit",
                  "paged_adamw": "paged_adamw_32bit"},
    "gradient_checkpointing": {"unsloth": "offload"},
}
"""Values of users' old scripts, under our names."""

_FIELD = "trainer_options={{{0!r}: ...}}"
INSTEAD: Mapping[str, str] = {
    "bf16": "precision='bf16'", "fp16": "precision='fp16'", "use_cpu": "device='cpu'", "no_cuda": "device='cpu'",
    "dtype": "precision, or model_dtype for how weights are stored",
    "torch_dtype": "precision, or model_dtype for how weights are stored",
    "load_in_8bit": "quantization='nf4', the one kind there is", "full_finetuning": "use_peft=False",
    "peft_config": "use_peft=True with lora_r, lora_alpha, lora_dropout and lora_target_modules",
    "lora_config": "use_peft=True with lora_r, lora_alpha, lora_dropout and lora_target_modules",
    "random_state": "seed", "max_new_tokens": "max_completion_length", "use_vllm": "rollout_engine='vllm'",
    "stop": "stop_strings", "stop_sequences": "stop_strings",
    "max_prompt_length": "max_seq_length, which counts prompt and completion",
    "group_size": "num_generations", "save_strategy": "save_steps",
    "eval_strategy": "eval_steps", "evaluation_strategy": "eval_steps",
    "assistant_only_loss": "completion_only", "completion_only_loss": "completion_only",
    "train_on_responses_only": "completion_only",
    "args": "one option for each field, or fields of trainer_options",
    "deepspeed": "`aligntune launch --accelerate-config`", "fsdp": "`aligntune launch --accelerate-config`",
    **{name: _FIELD.format(name) for name in (
        "data_seed", "neftune_noise_alpha", "load_best_model_at_end", "metric_for_best_model", "torch_compile",
        "activation_offloading", "use_liger_kernel", "dataloader_pin_memory",
    )},
    "group_by_length": "trainer_options={'train_sampling_strategy': 'group_by_length'}",
}
"""Names of users' old scripts that are said in another way here, and how."""

ABSENT: Mapping[str, Mapping[str, str]] = {
    "lora_init": {"loftq": "not here. 'pissa' and 'olora' start from the weights of a base in 16 bits; peft's "
                           "replace_lora_weights_loftq(model) fits the adapters of a 4-bit one, which then goes in as "
                           "model_name"},
}
"""Values of users' old scripts that are not here, and what is to be done instead."""

_PLAIN = (str, int, float, bool, type(None))


@dataclass
class Job:
    """One resolved job.

    Args:
        spec: the algorithm.
        options: flat names to values, Python objects included.
        origin: flat names to the layer that set them: "argument", "config", "algorithm default" or "default".
        notices: choices and changes made on the user's behalf, in words.
    """

    spec: AlgorithmSpec
    options: SimpleNamespace
    origin: dict[str, str]
    notices: list[str] = field(default_factory=list)
    _config: Any = field(default=None, repr=False)

    @property
    def config(self) -> Any:
        """The OmegaConf tree as config.yaml shows it, read-only; Python objects stand there by their labels."""
        if self._config is None:
            self._config = _tree(vars(self.options), option_table(self.spec.name))
        return self._config

    @property
    def objects(self) -> dict[str, Any]:
        """The options whose values are Python objects; a run with any cannot be re-run from its YAML."""
        values = vars(self.options)
        return {name: value for name, value in values.items() if _has_object(value) or _is_rows(name, value)}

    @property
    def backend(self) -> str:
        return self.options.backend

    def set(self, name: str, value: Any) -> None:
        """Settle an option that only the machine or the checkpoint could decide; config.yaml shows the outcome."""
        assert hasattr(self.options, name), name
        setattr(self.options, name, value)
        self._config = None

    def given(self, name: str) -> bool:
        """Whether the user set the option, by argument or config."""
        return self.origin[name] in ("argument", "config")


@functools.cache
def option_table(algorithm: str | None) -> dict[str, OptionInfo]:
    """Flat names to the options that `algorithm` takes (None: to those of any algorithm)."""
    names = [algorithm] if algorithm else ALGORITHMS.names()
    specs = [ALGORITHMS.load(name) for name in names]
    table = {row.name: row for row in common_options() if any(_takes(spec, row) for spec in specs)}
    for spec in specs:
        table.update({row.name: row for row in infos(spec.options, "loss")})
    return table


def _takes(spec: AlgorithmSpec, row: OptionInfo) -> bool:
    audience = {"all": True, "online": spec.online, "offline": not spec.online, "sft": spec.name == "sft"}
    return audience[row.audience] and row.name not in spec.without


def takers(name: str) -> list[str]:
    """The algorithms that take the option `name`."""
    return [algorithm for algorithm in ALGORITHMS.names() if name in option_table(algorithm)]


def read_config(config: Any) -> dict[str, Any]:
    """A YAML path, mapping or OmegaConf config as a plain dict; `${}` is resolved for YAML files and OmegaConf.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping at the top.
    """
    if config is None or config is UNSET:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    where = "config"
    try:
        if isinstance(config, (str, os.PathLike)):
            where = str(config)
            if not Path(config).is_file():
                raise ConfigError(f"config: no file {where!r}")
            config = OmegaConf.load(os.fspath(config))
        plain = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: {error}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{where}: a mapping of options is wanted at the top, not a {type(plain).__name__}")
    return {str(key): value for key, value in plain.items()}


def resolve(
    explicit: Mapping[str, Any], config: Any = None, *, algorithms: Iterable[str] | None = None, what: str = ""
) -> Job:
    """One validated job from explicit arguments and a config.

    Args:
        explicit: flat or `section.name` options; `UNSET` values count as not given.
        config: YAML path, mapping or OmegaConf config, flat or in sections.
        algorithms: the names that the caller's factory makes; one alone needs no `algorithm`.
        what: the caller, for messages.

    Raises:
        ConfigError: every fault of every layer at once.
    """
    faults: list[str] = []
    notices: list[str] = []
    argument = {key: value for key, value in explicit.items() if value is not UNSET}
    layers = {"argument": argument, "config": read_config(config)}
    if "stages" in layers["config"]:
        raise ConfigError("this recipe has stages; run it with `aligntune train` or `aligntune.run_recipe(...)`")
    algorithm = _algorithm(layers, tuple(algorithms or ALGORITHMS.names()), what, faults)
    table = option_table(algorithm)
    everything = option_table(None)
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for layer in ("config", "argument"):
        for name, value in _flatten(layers[layer], table, everything, algorithm, faults, notices).items():
            values[name], origin[name] = value, layer
    spec = ALGORITHMS.load(algorithm or "sft")
    defaults = {name: row.default for name, row in table.items()}
    for name, value in {**defaults, **(spec.defaults if algorithm else {})}.items():
        if name not in values:
            values[name] = value
            origin[name] = "default" if name not in spec.defaults else "algorithm default"
    rules.check_names(values, faults)
    if algorithm:
        values["algorithm"] = algorithm
        rules.check(values, origin, spec, faults, notices)
    if faults:
        raise ConfigError.from_faults(faults, what or "the configuration")
    return Job(spec, SimpleNamespace(**values), origin, notices)


def _algorithm(layers: dict[str, dict[str, Any]], allowed: tuple[str, ...], what: str, faults: list[str]) -> str | None:
    named = [layer["algorithm"] for layer in layers.values() if layer.get("algorithm") is not None]
    if not named:
        if len(allowed) == 1:
            return allowed[0]
        faults.append(f"algorithm: none given; valid: {', '.join(allowed)}")
        return None
    try:
        name = ALGORITHMS.resolve(named[0])
    except ConfigError as error:
        faults.append(f"algorithm: {error}")
        return None
    if name not in allowed:
        faults.append(f"algorithm = {name!r}: {what or 'this factory'} makes {', '.join(allowed)}")
    return name


def _flatten(
    layer: Mapping[str, Any], table: dict[str, OptionInfo], everything: dict[str, OptionInfo], algorithm: str | None,
    faults: list[str], notices: list[str],
) -> dict[str, Any]:
    """The layer's valid values by flat name; each fault is collected with its path."""
    sections = {*SECTIONS, "loss"}
    values: dict[str, Any] = {}
    for path, key, value in _leaves(layer, sections, faults):
        name, value = _translate(key, value, everything, notices)
        section = path.rpartition(".")[0]
        if name not in everything:
            faults.append(_unknown(path, key, value, section, table))
        elif name not in table:
            faults.append(f"{path}: {algorithm} does not take this option; {', '.join(takers(name))} do")
        elif section and table[name].section != section:
            faults.append(f"{path}: belongs to section {table[name].section or 'none (top level)'}: {table[name].path}")
        elif name in values:
            faults.append(f"{path}: given twice in one place (as {table[name].path} and by another name)")
        else:
            row = table[name]
            if _has_object(value) or _is_rows(name, value):
                fault = None if row.objects or name in ("trainer_options",) else (
                    f"{path} = {_shown(value)}: must be {row.allowed()}")
            else:
                value, fault = row.check(_plainly(value))
                instead = ABSENT.get(name, {}).get(value.lower()) if isinstance(value, str) else None
                fault = f"{path} = {value!r}: {instead}" if instead else fault
            values[name] = value
            if fault:
                faults.append(fault)
    return values


def _leaves(layer: Mapping[str, Any], sections: set[str], faults: list[str]) -> Iterable[tuple[str, str, Any]]:
    for key, value in layer.items():
        if not isinstance(key, str):
            faults.append(f"{key!r}: option names are strings")
        elif key in sections and not (key in OLD_NAMES and not isinstance(value, Mapping | None)):
            if value is None:
                continue
            if not isinstance(value, Mapping):
                faults.append(f"{key} = {_shown(value)}: a section is a mapping of options")
                continue
            for name, inner in value.items():
                yield f"{key}.{name}", str(name), inner
        elif "." in key and key.partition(".")[0] in sections:
            yield key, key.partition(".")[2], value
        else:
            yield key, key, value


def _translate(key: str, value: Any, everything: dict[str, OptionInfo], notices: list[str]) -> tuple[str, Any]:
    """An old script's name becomes ours, and it is said."""
    name = key if key in everything else OLD_NAMES.get(key, key)
    if key == "load_in_4bit" and isinstance(value, bool):
        value = "nf4" if value else None
    if name != key:
        notices.append(f"{key} is {name} here")
    ours = OLD_VALUES.get(name, {}).get(value) if isinstance(value, str) else None
    if ours is None:
        return name, value
    notices.append(f"{name} {value!r} is {ours!r} here")
    return name, ours


def _unknown(path: str, key: str, value: Any, section: str, table: dict[str, OptionInfo]) -> str:
    if isinstance(value, Mapping) and not section and (close := nearest(key, {*SECTIONS, "loss"})):
        return f"{path}: unknown section; did you mean {close!r}?"
    if key in INSTEAD:
        return f"{path}: unknown option; here it is {INSTEAD[key]}"
    inside = [row.name for row in table.values() if not section or row.section == section]
    close = nearest(key, inside) or nearest(key, table)
    hint = f"; did you mean {table[close].path!r}?" if close else (
        "; `aligntune options` lists them, and trainer_options takes fields of TRL's")
    return f"{path}: unknown option{hint}"


def _plainly(value: Any) -> Any:
    """Paths become strings, tuples lists, mappings dicts; the leaves stay."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plainly(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plainly(item) for key, item in value.items()}
    return value


def _has_object(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has_object(item) for item in value)
    if isinstance(value, Mapping):
        return any(_has_object(item) for item in value.values())
    return not isinstance(value, (*_PLAIN, os.PathLike))


def _is_rows(name: str, value: Any) -> bool:
    return name in ("dataset_name", "eval_dataset_name") and isinstance(value, (list, tuple))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"<{type(value).__name__}>"


def object_label(value: Any) -> str:
    """How config.yaml shows a Python object: `<object: Qwen3ForCausalLM, 4 layers>`."""
    if isinstance(value, (list, tuple)):
        return f"<object: {len(value)} rows>"
    label = type(value).__name__ if not callable(value) or hasattr(value, "config") else getattr(
        value, "__name__", type(value).__name__)
    layers = getattr(getattr(value, "config", None), "num_hidden_layers", None)
    if layers is not None:
        label += f", {layers} layers"
    elif hasattr(value, "num_rows"):
        label += f", {value.num_rows} rows"
    return f"<object: {label}>"


def _tree(values: dict[str, Any], table: dict[str, OptionInfo]) -> Any:
    """The structured config of the job: the options that its algorithm takes, in their sections."""
    from omegaconf import OmegaConf

    nested: dict[str, Any] = {}
    for name, row in table.items():
        value = object_label(values[name]) if _is_rows(name, values[name]) else _as_text(values[name])
        (nested.setdefault(row.section, {}) if row.section else nested)[name] = value
    # A literal "${HOME}" in an argument is text, not an interpolation, so it is escaped.
    tree = OmegaConf.merge(structured_root(table.values()), _escaped(nested))
    OmegaConf.set_readonly(tree, True)
    return tree


def _as_text(value: Any) -> Any:
    """A value as config.yaml holds it: plain, with Python objects by their labels."""
    if isinstance(value, Mapping):
        return {str(key): _as_text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_text(item) for item in value]
    return object_label(value) if _has_object(value) else _plainly(value)


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
