"""Device, precision, tokenizer, model and adapter configuration: the same for every backend."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligntune.builtin import is_builtin
from aligntune.core.inference import locate, looked_up, must_be_whole, scorer_of
from aligntune.core.resolve import option_table
from aligntune.errors import AlignTuneError, BackendUnavailableError, ConfigError, unknown

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

    from aligntune.core.resolve import Job

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Precision:
    """Arithmetic of the step: `name` is bf16, fp16 or fp32; `device` is cpu or cuda; `why` says who chose."""

    name: str
    device: str
    why: str

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, DTYPES[self.name])


def precision_of(job: Job) -> Precision:
    """The device and precision of the job.

    Raises:
        BackendUnavailableError: device='cuda' without a GPU.
        ConfigError: fp16 on CPU, which has no kernels for it in training.
    """
    import torch

    wanted = job.options.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError("device='cuda': torch sees no CUDA GPU here; device='auto' takes what is there")
    device = "cuda" if torch.cuda.is_available() and wanted != "cpu" else "cpu"
    name = job.options.precision
    if name == "auto":
        if device == "cpu":
            return Precision("fp32", device, "fp32 on CPU")
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", device, f"bf16 on {torch.cuda.get_device_name()}")
        return Precision("fp16", device, f"fp16: {torch.cuda.get_device_name()} has no bf16")
    if name == "fp16" and device == "cpu":
        raise ConfigError("model.precision = 'fp16': CPU trains in fp32 or bf16")
    return Precision(name, device, f"{name} as asked, on {device}")


def load_tokenizer(job: Job) -> Any:
    """The job's tokenizer: the object given, the one named, or the model's own; with a pad token.

    Raises:
        AlignTuneError: none can be loaded; says how to name one.
    """
    from transformers import AutoTokenizer

    options = job.options
    own = options.tokenizer_name is None
    source = options.model_name if own else options.tokenizer_name
    # A tokenizer of another name than the model's has other branches and commits.
    another = isinstance(options.model_name, str) and source != options.model_name
    revision = None if another else options.model_revision
    if not isinstance(source, str):
        own = False
        if hasattr(source, "encode"):
            tokenizer = source
            source = None
        else:
            source = source.config._name_or_path
            if not source:
                raise ConfigError("tokenizer_name: the model object names no checkpoint to take a tokenizer from; "
                                  "pass tokenizer_name=<a tokenizer or where to load one>")
    if source is not None:
        # A folder of a tokenizer alone holds no model.
        source = locate(source, option="model_name") if own or is_builtin(source) else source
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=revision, trust_remote_code=options.trust_remote_code
            )
        except (OSError, ValueError, ImportError) as error:
            raise AlignTuneError(f"no tokenizer can be loaded from {source!r}{looked_up(source)}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        job.notices.append(f"the tokenizer has no pad token: {tokenizer.eos_token!r} pads (masks go by position, so "
                           "the end of turn still trains)")
    return tokenizer


def weights_of(job: Job, option: str) -> str:
    """Where the weights lie that the option names: a folder or a hub id. What of a run folder is taken is said.

    Raises:
        ConfigError, CheckpointError: no such folder, or no model in it.
    """
    name = getattr(job.options, option)
    found = locate(name, option=option)
    if not is_builtin(name) and Path(found) != Path(name).expanduser():
        job.notices.append(f"{option}: {name!r} is a run; its newest complete checkpoint is taken, {found}")
    return found


def load_model(job: Job, precision: Precision, *, scores: bool = False) -> Any:
    """The job's model on its device: the object given as it is, or loaded in the storage type the job asks for.

    Args:
        scores: a reward model: one number a sequence in place of logits; from a language model, its head is new.

    Raises:
        AlignTuneError: it cannot be loaded; the message keeps the loader's reason.
        ConfigError: quantization contradicts the checkpoint, or a 4-bit base would train whole; or the name is of
            adapters alone, or of a model that lacks weights (a reward model its score head): names them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

    options = job.options
    if not isinstance(options.model_name, str):
        model = options.model_name
        if scores:
            _must_score(model)
        _settle_quantization(job, getattr(model.config, "quantization_config", None))
        return model.to(precision.device) if _movable(model) else model
    source = weights_of(job, "model_name")
    _check_adapters(source, options.model_name, scores=scores)
    try:
        config = AutoConfig.from_pretrained(
            source, revision=options.model_revision, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise AlignTuneError(
            f"no model can be loaded from {options.model_name!r}{looked_up(source)}: {error}") from error
    quantized = _settle_quantization(job, getattr(config, "quantization_config", None))
    kwargs: dict[str, Any] = {
        "dtype": _storage_dtype(job, precision, quantized),
        "revision": options.model_revision, "trust_remote_code": options.trust_remote_code,
    }
    if options.attn_implementation:
        kwargs["attn_implementation"] = options.attn_implementation
    if quantized == "nf4":
        kwargs["quantization_config"] = nf4_config(precision)
    if quantized or precision.device == "cuda":
        kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0)) if precision.device == "cuda" else "cpu"}
    auto = AutoModelForCausalLM
    if scores:
        auto, kwargs["num_labels"] = AutoModelForSequenceClassification, 1
        set_seed(options.seed)  # the new head is drawn here
    try:
        model, info = auto.from_pretrained(source, output_loading_info=True, **kwargs)
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # RuntimeError: weights of other shapes
        raise AlignTuneError(f"{options.model_name!r} cannot be loaded: {error}") from error
    missing = info["missing_keys"]
    if scores and scorer_of(config) is None:  # the head is new; it may begin with a pooler
        missing = [key for key in missing if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key]
    must_be_whole(f"model_name: {options.model_name!r}", model, missing)
    return model


def _check_adapters(source: str, name: str, *, scores: bool) -> None:
    """That a folder of adapters, if it is one, has the model under them and the head that they trained.

    transformers gives a reward model without its head a random one and says no word of it.
    """
    folder = Path(source)
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    try:
        task = json.loads(path.read_text(encoding="utf-8")).get("task_type")
    except ValueError as error:
        raise ConfigError(f"model_name: {str(path)!r} cannot be read: {error}") from error
    faults = []
    alone = not (folder / "config.json").is_file()
    if alone:
        faults.append(f"model_name: {name!r} holds adapters without the model under them; give a folder that "
                      "`save_model(folder, merge_adapters=True)` wrote, or `resume` the run that trained them")
    files = "adapter_model" if alone else "model"
    if scores and task != "CAUSAL_LM" and not _has_head(folder, files):
        faults.append(f"model_name: {name!r} holds adapters of a reward model, and its {files}.safetensors no "
                      "score.weight: its scores would be random; `aligntune train` with algorithm 'reward' saves it")
    if faults:
        raise ConfigError.from_faults(faults)


def _has_head(folder: Path, files: str) -> bool:
    """Whether a score head is among the weights in safetensors files of this name."""
    from aligntune.core.checkpoints import safetensors_header

    names = [name for file in folder.glob(f"{files}*.safetensors") for name in safetensors_header(file) or {}]
    return any({"score", "classifier"} & set(name.split(".")) for name in names)


def _revision_of(model: Any, wanted: str) -> str | None:
    held = getattr(model.config, "_commit_hash", None)
    # The commit may be what a branch or a tag is, or what the hash is short for.
    return held if held is None or re.fullmatch("[0-9a-f]{40}", wanted) else wanted


def _dtype_of(model: Any, wanted: str) -> str | None:
    stored = str(model.dtype).removeprefix("torch.")
    return next((short for short, long in DTYPES.items() if long == stored), stored)


def _quantization_of(model: Any, wanted: str) -> str | None:
    config = getattr(model.config, "quantization_config", None)
    return None if config is None else wanted if _is_nf4(config) else _label(config)


def _attention_of(model: Any, wanted: str) -> str | None:
    from aligntune.backends._compat import flash_kernel

    held = getattr(model.config.get_text_config(), "_attn_implementation", None)
    return wanted if held is not None and held == flash_kernel(wanted) else held


_LOADED_WITH: dict[str, tuple[Callable[[Any, str], str | None], Callable[[str], str]]] = {
    "model_revision": (_revision_of, lambda wanted: f"load it with revision={wanted!r}"),
    "model_dtype": (_dtype_of, lambda wanted: f"load it with dtype=torch.{DTYPES[wanted]}"),
    "quantization": (
        _quantization_of,
        lambda wanted: f"load it with BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={wanted!r})"),
    "attn_implementation": (_attention_of, lambda wanted: f"call its set_attn_implementation({wanted!r})"),
}
"""Options that only loading a model reads: what an object has of each, and how it would get what was asked for."""


def check_model_object(job: Job) -> None:
    """That a model object, which is taken as it is, already has what the options for loading one ask for.

    Options of adapters become those of the adapters that it has.

    Raises:
        ConfigError: names every option that asks for something else; or it is no model of transformers or PEFT.
    """
    model, faults = job.options.model_name, []
    if isinstance(model, str):
        return
    if not hasattr(model, "config"):
        raise ConfigError(f"model_name: a {type(model).__name__} object has no config; give a model of transformers or "
                          "PEFT, or where to load one")
    for name, (held_by, instead) in _LOADED_WITH.items():
        wanted = getattr(job.options, name)
        if wanted in (None, "auto") or (held := held_by(model, wanted)) == wanted:
            continue
        faults.append(f"model.{name} = {wanted!r}, but the model object has {held!r}: {instead(wanted)}, or leave the "
                      "option out")
    if hasattr(model, "peft_config"):
        faults += _take_adapters(job)
    if faults:
        raise ConfigError.from_faults(faults, "the model object")


ADAPTERS = {
    "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_bias": "bias",
    "use_rslora": "use_rslora", "use_dora": "use_dora", "lora_target_modules": "target_modules",
    "modules_to_save": "modules_to_save", "lora_init": "init_lora_weights",
}
"""Options of adapters, and the fields of peft's configuration that they are."""


def _take_adapters(job: Job) -> list[str]:
    """Has the job's options say what the adapters of its model object are; returns the faults of those that differ."""
    config, options = _held(job.options.model_name), vars(job.options)
    asked = {field: options[option] for option, field in ADAPTERS.items() if job.given(option)}
    if asked.get("init_lora_weights") == "default":
        asked["init_lora_weights"] = True
    names = {field: option for option, field in ADAPTERS.items()}
    faults = [f"lora.{names[field]} = {ours!r}, but the adapters of the model object have {theirs!r}: leave the option "
              "out, or merge them first (model.merge_and_unload())"
              for field, ours, theirs in differences(job.options.model_name, asked)]
    table = option_table(job.spec.name)
    for option, field in ADAPTERS.items():
        value = names_of(getattr(config, field, None))
        value, fault = table[option].check("default" if option == "lora_init" and value is True else value)
        if not fault:  # adapters of another kind have no rank
            job.set(option, value)
    return faults


def differences(model: Any, wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, ours, theirs) of each field of peft's configuration in which a model's adapters are not those wanted.

    They stay as they are: peft would draw them anew under their name.
    """
    config, found = _held(model), []
    for field, value in wanted.items():
        ours, theirs = names_of(value), names_of(getattr(config, field, None))
        if ours == "all-linear":  # which peft has turned into names
            same = ours == theirs or not _without_adapters(model)
        elif field == "modules_to_save" and ours and theirs:  # peft adds the other name of a tied one, and a new head
            same = set(ours) <= set(theirs)
        else:
            same = ours == theirs
        if not same:
            found.append((field, ours, theirs))
    return found


def _held(model: Any) -> Any:
    """peft's configuration of the adapters that a model has: of those that are active."""
    return getattr(model, "active_peft_config", None) or next(iter(model.peft_config.values()))


def names_of(value: Any) -> Any:
    """Names in their order, for peft makes sets of them; another value as it is."""
    return (sorted(value) or None) if isinstance(value, (list, tuple, set)) else value


def _without_adapters(model: Any) -> bool:
    """Whether there are linears that carry no adapters, the head apart."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    wrapped = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))]
    apart = {id(part) for module in [*wrapped, model.get_output_embeddings()] if module is not None
             for part in module.modules()}
    return any(isinstance(module, (Linear, Conv1D)) and id(module) not in apart for module in model.modules())


def _must_score(model: Any) -> None:
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if "SequenceClassification" not in type(base).__name__:
        raise ConfigError(f"model_name: a {type(base).__name__} object scores no sequences; save it and give the "
                          "folder (it then gets a score head), or give a sequence-classification model")


def nf4_config(precision: Precision) -> Any:
    """bitsandbytes NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=precision.dtype, bnb_4bit_quant_storage="uint8")


def _movable(model: Any) -> bool:
    return getattr(model, "hf_device_map", None) is None and not getattr(model, "is_loaded_in_4bit", False)


def _settle_quantization(job: Job, checkpoint: Any) -> str | None:
    """None, "nf4" (we quantise) or "checkpoint" (it is quantised already); turns LoRA on where it must be."""
    options = job.options
    if checkpoint is None:
        return "nf4" if options.quantization == "nf4" else None
    label = _label(checkpoint)
    if job.given("quantization") and options.quantization is None:
        raise ConfigError(f"model.quantization = None: the checkpoint is quantised ({label}); leave it at 'auto'")
    if options.quantization == "nf4" and not _is_nf4(checkpoint):
        raise ConfigError(f"model.quantization = 'nf4': the checkpoint is stored as {label}; leave it at 'auto'")
    if not options.use_peft:
        if job.given("use_peft"):
            raise ConfigError(f"lora.use_peft = False: the checkpoint is quantised ({label}) and cannot be trained "
                              "whole; use_peft=True trains adapters on it")
        job.set("use_peft", True)
        job.notices.append(f"the checkpoint is quantised ({label}): LoRA is turned on")
    return "checkpoint"


def _is_nf4(config: Any) -> bool:
    return _field(config, "bnb_4bit_quant_type") == "nf4" and not _field(config, "load_in_8bit")


def _label(config: Any) -> str:
    """The kind of a quantization_config. bitsandbytes' has a type for 4 bits where it has loaded 8, too."""
    method = _field(config, "quant_method")
    kind = "8 bits" if _field(config, "load_in_8bit") else _field(config, "bnb_4bit_quant_type")
    return f"{getattr(method, 'value', method)}{f' {kind}' if kind else ''}"


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _storage_dtype(job: Job, precision: Precision, quantized: str | None) -> Any:
    import torch

    if job.options.model_dtype != "auto":
        return getattr(torch, DTYPES[job.options.model_dtype])
    # Full training keeps fp32 weights under autocast: bf16 weights lose updates below 1/256 of their size.
    return precision.dtype if job.options.use_peft or quantized else torch.float32


def steps_lost(model: Any, rate: float) -> str | None:
    """What a model loses that trains all its weights where they are stored in bf16; None where it has none such.

    No trainer here keeps a copy in fp32 beside them, or rounds at random: a step that is too small changes nothing.
    """
    import torch

    if hasattr(model, "peft_config"):
        return None
    count = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16)
    if not count:
        return None
    return (f"{count:,} weights train that are stored in bfloat16, which loses steps below 1/256 of a weight: one of "
            f"the size of learning_rate ({rate:g}) on weights above about {256 * rate:.2g}; storage in float32 keeps "
            "them (model_dtype='fp32'; of a model that is loaded by hand dtype=torch.float32)")


def must_have(model: Any, wanted: dict[str, Iterable[str] | str | None]) -> None:
    """That the model has the modules that options name; `wanted` is option: names.

    peft takes names by the end of a module's path, and leaves out one that fits nothing if another fits.

    Raises:
        ConfigError: it lacks some; each is named, with the nearest that it has.
    """
    paths = [path for path, _ in model.named_modules()]
    own = {path.rpartition(".")[2] for path, module in model.named_modules()
           if next(module.parameters(recurse=False), None) is not None}
    faults = []
    for option, names in wanted.items():
        if isinstance(names, str):
            if names != "all-linear" and not any(re.fullmatch(names, path) for path in paths):
                faults.append(f"{option} = {names!r}: fits no module's whole name; a pattern of whole names, a "
                              "list of their ends ([q_proj, v_proj]) or 'all-linear' is wanted")
            continue
        faults += [f"{option}: {unknown('module', name, own)}" for name in names or []
                   if not any(path == name or path.endswith(f".{name}") for path in paths)]
    if faults:
        raise ConfigError.from_faults(faults, "the adapters")


def keep_tied(config: LoraConfig, model: Any) -> LoraConfig:
    """Has peft keep tied embeddings one tensor where one of them trains whole; else it would make two copies."""
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    tied = len(ends) == 2 and ends[0].weight is ends[1].weight
    paths = [path for path, module in model.named_modules() if tied and any(module is end for end in ends)]
    config.ensure_weight_tying = any(path.endswith(name) for path in paths for name in config.modules_to_save or [])
    return config


def lora_config(job: Job, model: Any) -> LoraConfig | None:
    """peft's configuration for the job, or None where it trains no adapters or the model has some already.

    Raises:
        ConfigError: it names modules that the model lacks.
    """
    options = job.options
    if not options.use_peft or hasattr(options.model_name, "peft_config"):
        return None
    from peft import LoraConfig, TaskType

    must_have(model, {"lora.lora_target_modules": options.lora_target_modules,
                      "lora.modules_to_save": options.modules_to_save})
    init = {"default": True}.get(options.lora_init, options.lora_init)
    alpha = options.lora_alpha
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if job.spec.takes == "reward" else TaskType.CAUSAL_LM, r=options.lora_r,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=options.lora_dropout, target_modules=options.lora_target_modules, bias=options.lora_bias,
        # A list of its own: peft writes the name of a tied module into it.
        modules_to_save=list(options.modules_to_save) if options.modules_to_save else None,
        use_dora=options.use_dora, use_rslora=options.use_rslora, init_lora_weights=init,
    )
    return keep_tied(config, model)
