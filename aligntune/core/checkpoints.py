"""Checkpoints to resume from: which are complete, which is the newest, and whether one fits the run at hand.

A save that was killed leaves a folder that looks like a checkpoint. The trainer writes trainer_state.json last, so a
folder without a readable one is unfinished; every other file is opened as far as its own format can tell that it is
whole (a zip has its directory at its end, a safetensors header says how long the file is).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligntune.core.resolve import OLD_VALUES
from aligntune.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import Trainer

STATE = "trainer_state.json"
STATE_KEY = "AlignTuneState"
"""Where trainer_state.json keeps our part, under `stateful_callbacks`."""

_NAME = re.compile(r"checkpoint-(\d+)")
_SHARDED = ("pytorch_model_fsdp", "global_step", "optimizer_")
_SHAPE_OF_ADAPTER = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "use_dora", "use_rslora")
_SHAPE_OF_MODEL = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "tie_word_embeddings",
)


def all_checkpoints(run: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, complete or not, by N."""
    if not run.is_dir():
        return []
    found = [(int(match[1]), path) for path in run.iterdir() if path.is_dir() and (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that training can resume from, by step."""
    return [path for path in all_checkpoints(run) if fault(path) is None]


def newest_complete(run: Path) -> Path:
    """The complete checkpoint of the highest step.

    Raises:
        CheckpointError: there is none; says what there is.
    """
    complete = complete_checkpoints(run)
    if complete:
        return complete[-1]
    there = [f"{path.name} ({fault(path)})" for path in all_checkpoints(run)]
    what = f"it has {'; '.join(there)}" if there else ("it has no checkpoint-N" if run.is_dir() else "no such folder")
    raise CheckpointError(f"no complete checkpoint in {run}: {what}")


def resolve(resume: bool | str | os.PathLike[str] | None, run: Path) -> Path | None:
    """The checkpoint that `resume` means: None or False is none, True the newest complete one, a path that one.

    Raises:
        CheckpointError: absent or unfinished; says what exists.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        return newest_complete(run)
    path = Path(resume).expanduser()
    if not path.is_dir():
        inside = run / path
        if not inside.is_dir():
            names = ", ".join(entry.name for entry in complete_checkpoints(run)) or "none"
            raise CheckpointError(f"no checkpoint {str(resume)!r}; complete ones in {run}: {names}")
        path = inside
    if not (path / STATE).is_file() and all_checkpoints(path):
        return newest_complete(path)
    reason = fault(path)
    if reason is not None:
        raise CheckpointError(f"{path} cannot be resumed from: {reason}")
    return path


def fault(path: Path) -> str | None:
    """Why training cannot resume from the folder `path`, or None when it can."""
    state = _json(path / STATE)
    if state is None:
        return f"no readable {STATE}: the save was not finished"
    if "global_step" not in state:
        return f"{STATE} has no step"
    names = sorted(os.listdir(path))
    weights = list(_weights(path))
    if not weights and not any(name.startswith(_SHARDED[:2]) for name in names):
        return "no weights"
    for name in weights:
        if not _whole(path / name):
            return f"{name} is cut short"
    index = _json(path / "model.safetensors.index.json")
    missing = sorted(set((index or {}).get("weight_map", {}).values()) - set(names))
    if missing:
        return f"{missing[0]} is missing"
    if "optimizer.pt" not in names and "optimizer.bin" not in names and not any(
        name.startswith(_SHARDED[1:]) for name in names
    ):
        return "it has weights only, no optimizer state (save_only_model)"
    for name in names:
        if name.endswith((".pt", ".pth")) and not _whole(path / name):
            return f"{name} is cut short"
    return None


def step_of(path: Path) -> int:
    """The optimizer step a complete checkpoint was written at."""
    return int((_json(path / STATE) or {})["global_step"])


def our_state(path: Path) -> dict[str, Any]:
    """What this package added to a checkpoint's trainer_state.json; empty for one that plain TRL wrote."""
    kept = ((_json(path / STATE) or {}).get("stateful_callbacks") or {}).get(STATE_KEY) or {}
    if isinstance(kept, list):
        kept = kept[-1]
    return dict(kept.get("attributes") or {})


def clear_after(run: Path, step: int) -> list[str]:
    """Make way for a run that goes on from `step`: later checkpoints belong to another future.

    Unfinished ones are deleted, complete ones renamed to `old-checkpoint-N`: a later `resume=True` would otherwise
    take one, and a save killed while it writes over one would leave a mixture that looks complete.
    """
    moved = []
    for path in all_checkpoints(run):
        if _json(path / STATE) is None:
            shutil.rmtree(path)
            moved.append(f"{path.name} was unfinished: deleted")
        elif step_of(path) > step:
            target = path.with_name(f"old-{path.name}")
            number = 2
            while target.exists():
                target = path.with_name(f"old-{path.name}-{number}")
                number += 1
            path.rename(target)
            moved.append(f"{path.name} is of another continuation: now {target.name}")
    return moved


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _weights(path: Path) -> Iterator[str]:
    for pattern in ("model*.safetensors", "adapter_model*.safetensors", "*/adapter_model.safetensors",
                    "pytorch_model*.bin", "adapter_model.bin"):
        for found in sorted(path.glob(pattern)):
            yield str(found.relative_to(path))


def _whole(path: Path) -> bool:
    if path.suffix == ".safetensors":
        header = safetensors_header(path)
        if header is None:
            return False
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        with path.open("rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
        return path.stat().st_size == start + max(ends, default=0)
    return zipfile.is_zipfile(path)


def safetensors_header(path: Path) -> dict[str, Any] | None:
    """Names to dtype, shape and offsets of a safetensors file, without reading its data; None if it is cut short."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            text = file.read(length)
        return json.loads(text) if len(text) == length else None
    except (OSError, struct.error, ValueError):
        return None


# Does a checkpoint belong to this run?


def fingerprint(trainer: Trainer, algorithm: str) -> dict[str, Any]:
    """What a checkpoint and the run that resumes it must agree on, beyond the shapes of the weights."""
    args = trainer.args
    rows = None
    with contextlib.suppress(TypeError):
        rows = len(trainer.train_dataset)
    optimizer = str(getattr(args.optim, "value", args.optim))
    return {
        "algorithm": algorithm,
        "optimizer": OLD_VALUES["optimizer"].get(optimizer, optimizer),
        "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "seed": args.seed if args.data_seed is None else f"{args.seed} with data_seed {args.data_seed}",
        "train_rows": rows,
        "rows_digest": _some_rows(trainer.train_dataset),
        **_base_weights(trainer.model),
    }


def _some_rows(rows: Any) -> str | None:
    """A digest of a few rows as they are trained: the place in the data means nothing in others of the same number."""
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        return None
    # TRL adds the reference's log-probs, which a GPU rounds otherwise another time.
    names = sorted(name for name in rows.column_names if not name.startswith("ref_"))
    plain = rows.with_format(None, columns=names)
    chosen = [plain[index] for index in range(0, len(plain), max(1, len(plain) // 16))]
    text = json.dumps(chosen, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _base_weights(model: Any) -> dict[str, Any]:
    """A digest of a few frozen weights: an adapter is worth nothing on another base of the same shape."""
    if not hasattr(model, "peft_config"):
        return {}
    digest, dtypes = hashlib.sha256(), set()
    # An adapter that does not train (TRL's reference) is in the checkpoint, and comes from there.
    adapters = tuple(f".{name}." for name in model.peft_config)
    frozen = [(name, value) for name, value in model.named_parameters()
              if not value.requires_grad and not any(adapter in f"{name}." for adapter in adapters)]
    for name, value in frozen[:: max(1, len(frozen) // 16)]:
        sample = value.detach().reshape(-1)[:256].cpu()
        dtypes.add(str(value.dtype))
        digest.update(name.encode())
        digest.update(sample.contiguous().view(dtype=_bytes()).numpy().tobytes())
    return {"base_weights": digest.hexdigest()[:16], "base_dtypes": sorted(dtypes)}


def _bytes() -> Any:
    import torch

    return torch.uint8


_WORDS = {
    "algorithm": "algorithm", "optimizer": "optimizer",
    "rows_per_step": "rows a step (batch x accumulation x processes)", "seed": "seed",
    "train_rows": "rows in the training set", "rows_digest": "content of the training rows (digest)",
    "base_weights": "weights under the adapters",
}
_SAME_STATE = {"adamw_fused": "adamw", "paged_adamw_8bit": "adamw_8bit"}
"""Optimizers that go on from the state of another."""


def check_fits(path: Path, trainer: Trainer, mine: Mapping[str, Any]) -> None:
    """Raise unless the checkpoint at `path` is one of this run's kind; transformers loads what fits, in silence.

    Raises:
        CheckpointError: every difference, with both values.
    """
    faults = []
    theirs = our_state(path).get("fingerprint") or {}
    for key, words in _WORDS.items():
        if key == "base_weights" and theirs.get("base_dtypes") != mine.get("base_dtypes"):
            continue  # the same base in another precision has other bytes
        if key == "rows_digest" and theirs.get("train_rows") != mine.get("train_rows"):
            continue  # said already
        there, here = theirs.get(key), mine.get(key)
        if there is None or here is None:
            continue  # not known of checkpoints of plain TRL, or of earlier versions
        if _SAME_STATE.get(there, there) != _SAME_STATE.get(here, here):
            faults.append(f"{words}: {there} in the checkpoint, {here} now")
    faults += _adapter_faults(path, trainer.model)
    if not faults:
        faults = _weight_faults(path, trainer.model)
    if faults:
        # Adapters alone are no model to start from.
        whole = not (path / "adapter_config.json").is_file()
        way_out = ". To start anew from its weights, pass the folder as model_name" if whole else ""
        raise CheckpointError(f"{path} is of another run: {'; '.join(faults)}{way_out}")


def _adapter_faults(path: Path, model: Any) -> list[str]:
    saved = _json(path / "adapter_config.json")
    live = getattr(model, "peft_config", None)
    if (saved is None) != (live is None) and not any(path.glob("*/adapter_config.json")):
        there, here = ("adapters", "the whole model") if live is None else ("the whole model", "adapters")
        return [f"the checkpoint trains {there}, this run {here}"]
    if saved is None or live is None:
        config = _json(path / "config.json") or {}
        mine = getattr(model, "config", None)
        return [
            f"{key}: {config[key]} in the checkpoint, {getattr(mine, key)} now" for key in _SHAPE_OF_MODEL
            if config.get(key) is not None and getattr(mine, key, None) is not None
            and config[key] != getattr(mine, key)
        ]
    now = live[model.active_adapters[0] if hasattr(model, "active_adapters") else "default"].to_dict()
    faults = []
    for key in _SHAPE_OF_ADAPTER:
        there, here = _comparable(saved.get(key)), _comparable(now.get(key))
        if there != here:
            faults.append(f"{'lora_r' if key == 'r' else key}: {there} in the checkpoint, {here} now")
    return faults


def _comparable(value: Any) -> Any:
    if isinstance(value, (set, list, tuple)):
        return sorted(value) or None
    return getattr(value, "value", value) or None


def _weight_faults(path: Path, model: Any) -> list[str]:
    saved = _shapes_on_disk(path)
    if not saved:
        return []
    live = _saved_shapes(model)
    if hasattr(model, "peft_config"):
        absent = [f"{name} is not in the checkpoint" for name in live if name not in saved]
    else:
        absent = []  # see `reload_renamed_weights`
    wrong = [f"{name}: shape {saved[name]} in the checkpoint, {shape} now"
             for name, shape in live.items() if name in saved and saved[name] != shape]
    faults = wrong + absent
    return faults if len(faults) <= 3 else [*faults[:3], f"and {len(faults) - 3} more"]


def _shapes_on_disk(path: Path) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(entry["shape"]) for file in _weights(path) if file.endswith(".safetensors") and "/" not in file
        for name, entry in (safetensors_header(path / file) or {}).items() if name != "__metadata__"
    }


def reload_renamed_weights(path: Path, model: Any) -> bool:
    """Load a checkpoint whose tensors are not named as in memory; returns whether it had to.

    Mixtures of experts are saved one expert a tensor and live fused. transformers' trainer loads such a checkpoint
    with `strict=False`: the experts keep the weights the process started from, and training "resumes".

    Raises:
        CheckpointError: a parameter is in the checkpoint under no name.
    """
    on_disk = _shapes_on_disk(path)
    if hasattr(model, "peft_config") or not on_disk or set(_saved_shapes(model)) <= set(on_disk):
        return False
    kind = type(model)
    loaded, info = kind.from_pretrained(path, dtype=model.dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(info['missing_keys'])[:3])} of this model")
    model.load_state_dict(loaded.state_dict())
    return True


def _saved_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a save of `model` holds and that training changes."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        return {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}
    seen: set[int] = set()
    shapes = {}
    for name, value in model.named_parameters():  # tied names come once, under the name that is saved
        if value.requires_grad and id(value) not in seen:
            seen.add(id(value))
            shapes[name] = tuple(value.shape)
    return shapes
