"""Models on disk: adapters, or the whole model with the adapters merged in, checked against the live one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aligntune.core.model_hygiene import autocast_if_mixed, copy_model, keep_4bit_layout, kept_mode, plain_forward
from aligntune.core.run_dir import check_file_in, writing
from aligntune.errors import AlignTuneError, CheckpointError, ConfigError

CHECK_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Q: What is 12 + 30?\nA: 12 + 30 = 42",
    "def mean(values):\n    return sum(values) / len(values)\n",
)
"""What a merged model and the live one are compared on."""

_WHOLE = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json")


@dataclass(frozen=True)
class MergeCheck:
    """How far the logits of the model read back from disk are from the live model's, in units of their spread.

    Args:
        error: RMS of the difference.
        effect: RMS of what the adapters change; 0 without adapters.
        share: how much of that change the merged model has (least squares): 1 is all, 0 a lost merge, 2 a double one.
        rounding: the error that the stored type's rounding explains.
    """

    error: float
    effect: float
    share: float
    rounding: float

    @property
    def passed(self) -> bool:
        if self.error > self.rounding:
            return False
        if self.effect == 0 or self.effect < 0.2 * self.error:
            return True  # below a fifth of the noise the share says nothing
        # Where the live model's own rounding is as large as the change, it is in the change as measured too: of a right
        # merge the share then falls towards a half (seen: 0.64 after one step in 4 bits), of a lost one it stays below.
        low, high = (0.4, 1.5) if self.effect < 2 * self.error else (0.75, 1.25)
        return low <= self.share <= high

    def __str__(self) -> str:
        return (f"logits differ by {self.error:.2g} of their spread (rounding explains {self.rounding:.2g}); the "
                f"adapters change them by {self.effect:.2g}, of which {self.share:.0%} is in the merged model")


def save(
    model: Any, tokenizer: Any, path: str | os.PathLike[str], *, merge_adapters: bool = False
) -> MergeCheck | None:
    """Write `model` and its tokenizer to `path`; whole or not at all.

    The files are made in a folder beside `path`, which is then renamed to it, or, where `path` has files already, moved
    into it one by one; files of other names stay. Adapters are saved alone unless `merge_adapters`.

    Returns:
        How the merged model compares with the live one, or None where nothing was merged.

    Raises:
        ConfigError: `path` is a file, cannot be written or holds another kind of model, or a quantised base that cannot
            be merged.
        CheckpointError: the merged model, read back, does not give the live model's logits; `path` is untouched.
    """
    target = Path(path).expanduser().absolute()
    adapters = hasattr(model, "peft_config")
    temporary = _beside(target, adapters and not merge_adapters)
    try:
        check = None
        if adapters and merge_adapters:
            merged = merged_copy(model)
            merged.save_pretrained(temporary)
            kind = type(merged)
            del merged
            check = compare(model, kind, tokenizer, temporary)
            if not check.passed:
                raise CheckpointError(f"the merged model is not the trained one: {check}; nothing was saved")
        else:
            with plain_forward(model):
                model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return check


def check_repo_id(repo_id: str) -> None:
    """Raise ConfigError unless a hub repository can have this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub: {error}") from error


def push(
    model: Any, tokenizer: Any, repo_id: str, *, merge_adapters: bool = False, private: bool | None = None,
    token: str | None = None, commit_message: str = "Upload model",
) -> str:
    """Upload what `save` writes to the hub repository `repo_id`, made where there is none; returns its address.

    Raises:
        ConfigError, CheckpointError: what `save` raises.
        AlignTuneError: the hub refused; keeps its reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="aligntune-push-") as folder:
        save(model, tokenizer, Path(folder) / "model", merge_adapters=merge_adapters)
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=url.repo_id, folder_path=Path(folder) / "model", commit_message=commit_message)
        except (HfHubHTTPError, LocalTokenNotFoundError) as error:
            raise AlignTuneError(f"push_to_hub: {error}") from error
    return str(url)


def merged_copy(model: Any) -> Any:
    """The model under the adapters with the adapters added to its weights: a copy, in CPU memory; `model` is as before.

    A 4-bit base becomes 16- or 32-bit (its compute type): merging into 4-bit weights would round the adapters away.

    Raises:
        ConfigError: the base is quantised by something else, or the adapters are not of a kind that merges.
    """
    keep_4bit_layout(model)
    config = model.active_peft_config
    if config.is_prompt_learning or not hasattr(model.base_model, "merge_and_unload"):
        raise ConfigError(f"merge_adapters: {config.peft_type.value} adapters cannot be merged; save them alone")
    base = model.get_base_model()
    quantized = getattr(base, "hf_quantizer", None) is not None or getattr(base, "is_quantized", False)
    if quantized and not getattr(base, "is_loaded_in_4bit", False):
        method = getattr(getattr(base.config, "quantization_config", None), "quant_method", "unknown")
        raise ConfigError(
            f"merge_adapters: the base is quantised ({getattr(method, 'value', method)}) and only bitsandbytes 4-bit "
            "can be merged; save the adapters alone"
        )
    if not quantized:
        return copy_model(model, device="cpu").merge_and_unload(safe_merge=True)
    return _merge_4bit(copy_model(model, device="cpu"))


def _merge_4bit(model: Any) -> Any:
    import bitsandbytes as bnb
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    dtype = next((module.compute_dtype for module in base.modules()
                  if isinstance(module, bnb.nn.Linear4bit) and module.compute_dtype is not None), base.dtype)
    for name, module in list(base.named_modules()):
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), bnb.nn.Linear4bit):
            base.set_submodule(name, _merged_linear(module, dtype))
    for name, module in list(base.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            base.set_submodule(name, _linear(_dequantized(module), module.bias, dtype))
    merged = model.merge_and_unload(safe_merge=True)  # adapters on modules that were never quantised
    merged.hf_quantizer.remove_quantization_config(merged)
    return merged.to(dtype)


def _merged_linear(module: Any, dtype: torch.dtype) -> nn.Linear:
    base = module.get_base_layer()
    weight, bias = _dequantized(base), base.bias
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        if adapter in module.lora_variant:  # DoRA and its kin say themselves how they merge
            weight = module.lora_variant[adapter].merge_safe(module, adapter, weight)
        else:
            weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
        if module.lora_bias[adapter]:
            extra = module.lora_B[adapter].bias
            bias = extra if bias is None else bias + extra
    return _linear(weight, bias, dtype)


def _dequantized(linear: Any) -> torch.Tensor:
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


def compare(live: Any, kind: type, tokenizer: Any, path: Path) -> MergeCheck:
    """Logits of the model in the folder `path`, read back from disk, against the live model's."""
    device = next(live.parameters()).device
    again: Any = kind
    loaded = again.from_pretrained(path, dtype="auto").to(_room(device, path)).eval()
    parts: tuple[list[torch.Tensor], ...] = ([], [], [], [])
    differences, effects, changes, spreads = parts
    with kept_mode(live), torch.no_grad():
        live.eval()
        for ids in _check_ids(tokenizer, live.config.get_text_config().vocab_size):
            theirs = loaded(input_ids=ids.to(loaded.device)).logits.float().cpu()
            with autocast_if_mixed(live):
                mine = live(input_ids=ids.to(device)).logits.float().cpu()
                with live.disable_adapter():
                    bare = live(input_ids=ids.to(device)).logits.float().cpu()
            differences.append((theirs - mine).reshape(-1))
            effects.append((mine - bare).reshape(-1))
            changes.append((theirs - bare).reshape(-1))
            spreads.append((mine - mine.mean()).reshape(-1))
    spread = _rms(spreads) or 1.0
    wanted, got = torch.cat(effects).double(), torch.cat(changes).double()
    share = float(got @ wanted / (wanted @ wanted)) if wanted.any() else 1.0
    dtypes = {value.dtype for model in (live, loaded) for value in model.parameters() if value.is_floating_point()}
    # Half a unit in the last place of each weight, through the layers.
    rounding = max({torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2}.get(dtype, 5e-2) for dtype in dtypes)
    return MergeCheck(_rms(differences) / spread, _rms(effects) / spread, share, rounding)


def _rms(parts: list[torch.Tensor]) -> float:
    return float(torch.cat(parts).pow(2).mean().sqrt())


def _room(device: torch.device, path: Path) -> torch.device:
    """The live model's device if the model on disk fits beside it, else the CPU."""
    if device.type != "cuda":
        return torch.device("cpu")
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return device if torch.cuda.mem_get_info(device)[0] > 1.2 * size + 2**30 else torch.device("cpu")


def _check_ids(tokenizer: Any, vocab: int) -> Iterator[torch.Tensor]:
    for text in CHECK_TEXTS:
        ids = list(tokenizer(text)["input_ids"])[:128] if tokenizer is not None else []
        # A tokenizer that knows none of these words says little about the model; any ids compare as well.
        yield torch.tensor([ids if len(set(ids)) > 3 else [index % vocab for index in range(3, 35)]])


def _beside(target: Path, adapters: bool) -> Path:
    """A new folder beside `target`, which can take what is made in it."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    what, refused = "save_model", target
    with writing(what, target):
        if target.exists() and not target.is_dir():
            raise ConfigError(f"save_model: {str(target)!r} is a file")
        _refuse_mixture(target, adapters)
        if target.is_dir():
            if any(target.iterdir()):
                check_file_in(target)
            what, refused = f"save_model: the model is made beside {str(target)!r} first", target.parent
    with writing(what, refused):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    return temporary


def _refuse_mixture(target: Path, adapters: bool) -> None:
    other = _WHOLE if adapters else _ADAPTERS
    found = sorted(file.name for pattern in other for file in target.glob(pattern))
    if found:
        raise ConfigError(
            f"save_model: {str(target)!r} holds {'a whole model' if adapters else 'adapters'} ({found[0]}), and with "
            f"{'adapters' if adapters else 'a whole model'} beside would load as a mixture; give another folder"
        )


def _publish(temporary: Path, target: Path) -> None:
    fresh = {entry.name for entry in temporary.iterdir()}
    there = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    if not there:
        os.replace(temporary, target)
        return
    stale = sorted({file.name for pattern in _WHOLE + _ADAPTERS for file in target.glob(pattern)} - fresh)
    if stale:
        raise ConfigError(
            f"save_model: {str(target)!r} has {', '.join(stale[:3])} of another save, which would be loaded with this "
            "one; remove them or give another folder"
        )
    # Weights last: whoever finds new weights finds the configuration that goes with them.
    for name in sorted(fresh, key=lambda name: (name.endswith((".safetensors", ".bin")), name)):
        source, place = temporary / name, target / name
        if name == "README.md" and place.exists():
            continue  # peft writes a model card; the one that is there may be the user's
        if source.is_dir():
            shutil.copytree(source, place, dirs_exist_ok=True)
        else:
            os.replace(source, place)
