"""What to say when the GPU's memory ran out: where it went, and what would lower it by how much."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

GIB = 1 << 30
_NF4_SAVES = 0.7  # of 16-bit weights: 4.1 bits for 16, the embeddings as they are

_SETTINGS = {
    "batch_size": "train.batch_size", "max_seq_length": "data.max_seq_length", "optimizer": "train.optimizer",
    "gradient_checkpointing": "train.gradient_checkpointing", "quantization": "model.quantization",
}


def explain(trainer: Any, config: Any, error: BaseException) -> str:
    """The settings now and three changes, the largest saving first.

    Args:
        trainer: a transformers Trainer whose step ran out.
        config: the job's config (train.batch_size, data.max_seq_length, ...); None where there is none.
        error: torch's; its first sentence is kept.
    """
    options = SimpleNamespace(**{name: _read(config, path) for name, path in _SETTINGS.items()})
    weights, states = _weights(trainer.model), _states(trainer)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    step = max(0, peak - weights - states)
    now = [f"{name}={value}" for name, value in vars(options).items() if value is not None]
    what = str(error).split(". ")[0].splitlines()[0]
    lines = [f"the GPU ran out of memory in step {trainer.state.global_step + 1}: {what}.",
             f"  now: {', '.join(now)}",
             f"  peak {peak / GIB:.1f} GiB: weights {weights / GIB:.1f}, optimizer state {states / GIB:.1f}, "
             f"gradients and activations {step / GIB:.1f}",
             "  what would lower it:"]
    fixes = sorted(_fixes(trainer, options, weights, step), key=lambda fix: -fix[0])[:3]
    lines += [f"    {change}: about {saved / GIB:.1f} GiB less" for saved, change in fixes]
    return "\n".join(lines)


def _read(config: Any, path: str) -> Any:
    section, name = path.split(".")
    return None if config is None else config.get(section, {}).get(name)


def _weights(model: Any) -> int:
    return sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values() if p.device.type != "meta")


def _states(trainer: Any) -> int:
    held = getattr(trainer.optimizer, "state", {}) if trainer.optimizer is not None else {}
    return sum(value.nbytes for state in held.values() for value in state.values()
               if isinstance(value, torch.Tensor) and value.is_cuda)


def _fixes(trainer: Any, options: Any, weights: int, step: int) -> list[tuple[float, str]]:
    """`(bytes saved, the change)` for each that applies."""
    model, fixes = trainer.model, []
    config = model.config.get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    activations = max(0, step - 4 * trained)
    recomputes = bool(trainer.args.gradient_checkpointing)
    if not recomputes:
        fixes.append((activations * (layers - 1) / layers, "gradient_checkpointing=True"))
    length, batch = options.max_seq_length, trainer.args.per_device_train_batch_size
    if batch > 1:
        accumulate = trainer.args.gradient_accumulation_steps * 2
        fixes.append((activations / 2, f"batch_size={batch // 2}, gradient_accumulation_steps={accumulate}"))
    if length:
        fixes.append((activations / 2, f"max_seq_length={length // 2}"))
        if recomputes and options.gradient_checkpointing != "offload":
            inputs = 2 * batch * length * hidden * (layers - 1)
            fixes.append((min(inputs, activations), "gradient_checkpointing='offload' (backend 'fast')"))
    if hasattr(model, "peft_config"):
        if options.quantization is None and next(model.parameters()).element_size() >= 2:
            fixes.append((weights * _NF4_SAVES, "quantization='nf4'"))
    else:
        if "adamw" in str(trainer.args.optim) and "8bit" not in str(trainer.args.optim):
            fixes.append((6 * trained, "optimizer='adamw_8bit'"))  # two moments of 4 bytes, then of 1
        fixes.append((_states(trainer) or 8 * trained, "use_peft=True"))
    return fixes
