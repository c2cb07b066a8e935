"""A trained model for use: from a run folder, a recipe's folder, a checkpoint, a saved model, adapters or the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligntune.errors import AlignTuneError, BackendUnavailableError, CheckpointError, ConfigError, unknown

if TYPE_CHECKING:
    from aligntune.backends.base import Generator

ENGINES = ("auto", "fast", "hf")
DEVICES = ("auto", "cpu", "cuda")
_MODEL_FILES = ("config.json", "adapter_config.json")


def locate(name: str, *, option: str = "model") -> str:
    """Where the weights that `name` means lie: a folder, or a hub id as it stands.

    A recipe's folder means its last finished stage, a run folder its newest complete checkpoint. `option` is what the
    user gave `name` as, for the errors.

    Raises:
        ConfigError: a folder without a model, or no such folder.
        CheckpointError: a run that has no complete checkpoint.
    """
    from aligntune.builtin import is_builtin, model_path

    if is_builtin(name):
        return str(model_path(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(_within(path, option))
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{option}: {name!r} is " + ("a file, not a folder" if path.exists() else "no folder here"))
    return name


def looked_up(name: str) -> str:
    """For an error of loading `name`: where it was looked for, if no folder has the name."""
    return "" if Path(name).expanduser().exists() else " (no folder here has this name, so it was taken for a hub id)"


def _within(folder: Path, option: str) -> Path:
    from aligntune.core.checkpoints import all_checkpoints, newest_complete

    if any((folder / name).is_file() for name in _MODEL_FILES):
        return folder
    state = folder / "recipe.json"
    if state.is_file():
        stages = json.loads(state.read_text(encoding="utf-8"))["stages"]
        if not stages:
            raise CheckpointError(f"no stage of {folder} is finished")
        last = stages[-1]["result"]
        return _within(folder / (last["model"] or last["output_dir"]), option)
    if all_checkpoints(folder):
        return newest_complete(folder)
    if (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder} is a run without a checkpoint")
    raise ConfigError(f"{option}: {str(folder)!r} holds no model (no {' or '.join(_MODEL_FILES)}) and is no run folder")


def load(name: str, *, device: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its tokenizer; bf16 on a GPU that has it, fp32 on the CPU.

    Adapters are loaded on their base.

    Args:
        device: "auto" is the GPU where there is one.

    Raises:
        ConfigError, CheckpointError: nothing to load there, adapters of a reward model, a model that lacks weights, or
            no such device.
        BackendUnavailableError: "cuda" without a GPU.
        AlignTuneError: it cannot be loaded; keeps the loader's reason.
    """
    import torch

    if device not in DEVICES:
        raise ConfigError(unknown("device", device, DEVICES))
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError("device='cuda': torch sees no CUDA GPU here; 'auto' takes what is there")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    dtype = torch.float32
    if on_gpu:
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    model, tokenizer = _read(name, scorers=False, dtype=dtype, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if on_gpu and not getattr(model, "is_quantized", False):
        model = model.to("cuda")
    return model.eval(), tokenizer


def load_as_saved(name: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The model as its weights are stored, on the CPU, and its tokenizer as it is: for another save.

    Adapters are loaded on their base, a reward model with its score head.

    Raises:
        ConfigError, CheckpointError: nothing to load there, adapters of a reward model, or a model that was not saved
            whole.
        AlignTuneError: it cannot be loaded; keeps the loader's reason.
    """
    model, tokenizer = _read(name, scorers=True, dtype="auto", trust_remote_code=trust_remote_code)
    return model.eval(), tokenizer


def _read(name: str, *, scorers: bool, dtype: Any, trust_remote_code: bool) -> tuple[Any, Any]:
    """The model, whole, and its tokenizer; `scorers`: a reward model is loaded as one."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    source = locate(name)
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    adapters = Path(source) / "adapter_config.json"
    try:
        if adapters.is_file():
            from peft import AutoPeftModelForCausalLM

            if json.loads(adapters.read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS":
                raise ConfigError(f"{name!r} holds adapters of a reward model, which `save_model(folder, "
                                  "merge_adapters=True)` of their trainer merges; reward_model_name takes them as they "
                                  "are")
            model = AutoPeftModelForCausalLM.from_pretrained(source, **kwargs)
        else:
            auto: Any = AutoModelForCausalLM
            if scorers and scorer_of(AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)):
                auto = AutoModelForSequenceClassification
            model, info = auto.from_pretrained(source, output_loading_info=True, **kwargs)
            must_be_whole(repr(name), model, info["missing_keys"])
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # RuntimeError: weights of other shapes
        if isinstance(error, AlignTuneError):
            raise
        raise AlignTuneError(f"{name!r} cannot be loaded{looked_up(source)}: {error}") from error
    return model, tokenizer


def must_be_whole(name: str, model: Any, missing: Iterable[str]) -> None:
    """That the folder or hub id `name`, which `model` was loaded from, lacks no weights.

    Args:
        name: what a message calls it.
        missing: the weights that transformers did not find and drew at random; one that is tied to another is none.

    Raises:
        ConfigError: it lacks some; names them.
    """
    names = sorted(missing)
    # With adapters transformers tells what these lack, and no longer what the model does.
    if not names or getattr(model, "_hf_peft_config_loaded", False):
        return
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
    kind = scorer_of(model.config)
    if kind and "SequenceClassification" not in type(model).__name__:
        raise ConfigError(f"{name} is a reward model ({kind}): it has no {listed}, which would be random; "
                          "reward_model_name takes it")
    raise ConfigError(f"{name} has no {listed}, which would be random: it was not saved whole")


def scorer_of(config: Any) -> str | None:
    """The architecture of a reward model that a configuration names, or None."""
    return next((kind for kind in config.architectures or [] if "SequenceClassification" in kind), None)


def check_engine(name: str) -> None:
    """Raise ConfigError unless there is such an engine."""
    if name not in ENGINES:
        raise ConfigError(unknown("engine", name, ENGINES))


def generator_for(model: Any, tokenizer: Any, engine: str = "auto") -> tuple[Generator | None, str]:
    """What generates with a loaded model, and that in words; None is transformers.

    Args:
        engine: "fast" is the engine of backend fast, "hf" transformers, "auto" the first on a GPU where it runs.

    Raises:
        ConfigError: no such engine, or "fast" cannot run this model; says why.
    """
    check_engine(engine)
    if engine == "hf":
        return None, "transformers"
    from aligntune.backends.fast.rollout import cannot_run_because
    from aligntune.backends.fast.rollout.serve import of_model

    if engine == "auto":
        why = "the model is not on a GPU" if model.device.type != "cuda" else cannot_run_because(model)
        if why is None:
            from aligntune.backends.fast.support import BACKEND

            state = BACKEND.available()
            why = None if state else state.reason
        if why is not None:
            return None, f"transformers; {why}"
    return of_model(model, tokenizer), "our engine"
