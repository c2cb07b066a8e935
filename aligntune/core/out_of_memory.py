"""What to say when the GPU's memory ran out: where it went, and what would lower it by how much."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from aligntune.core.row_lengths import LongestBatch
from aligntune.errors import GpuMemoryError

GIB = 1 << 30
WORTH = 0.01
"""Share of the peak that a change must free to be named."""
_NF4 = 4.127 / 8  # bytes of a weight: 4 bits and, for 64 of them, 8 bits of scale with scales of their own
_PAGED = "paged_"
_OF_STATE = ("optimizer", "adapters", "base", "rank", "targets")  # kinds of changes that make the state smaller
_MLP = (".mlp.", ".gate_proj.", ".up_proj.", ".down_proj.")

_SETTINGS = (
    "train.batch_size", "train.gradient_accumulation_steps", "data.max_seq_length", "data.packing",
    "train.gradient_checkpointing", "train.memory_budget_gib", "model.quantization", "model.base_precision",
    "train.optimizer", "lora.use_peft", "lora.lora_r", "rollout.num_generations", "rollout.max_completion_length",
    "rollout.rollout_memory_gib", "loss.precompute_ref_log_probs",
)
_FIELDS = {"batch_size": "per_device_train_batch_size", "max_seq_length": "max_length", "optimizer=": "optim="}
_IN_SCRIPTS = _FIELDS | {
    "quantization='nf4'": "load_in_4bit=True", "use_peft=True": "adapters (FastLanguageModel.get_peft_model)",
    "lora_r": "r", "lora_target_modules": "target_modules",
    "gradient_checkpointing='offload'": "gradient_checkpointing='offload' (FastTrainingArguments)",
}
"""What is called otherwise by those who write TRL's arguments."""
_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw_fused"}


class StepMemoryError(GpuMemoryError, torch.OutOfMemoryError):
    """GpuMemoryError of a script's own trainer: who catches torch's error still does."""


class Fix(NamedTuple):
    """A change: bytes it saves, what it is about, and its words. Of one kind the first is the one to name."""

    saved: float
    kind: str
    change: str


@dataclass
class Run:
    """What predictions are made of: the settings now, and bytes (`linear`, `trained`: numbers)."""

    settings: dict[str, Any]
    peak: int
    weights: int
    gradients: int
    states: int
    activations: int
    linear: int
    linear_bytes: int
    trained: int
    layers: int
    hidden: int
    plan: Any
    fast: bool
    batch: LongestBatch | None
    """Of prepared rows; None where their lengths are not known, and of rollouts'."""

    @property
    def tokens(self) -> int | None:
        """Of the longest micro-batch; of rows that are not known, as many as there may be."""
        length = self.settings.get("max_seq_length")
        return self.batch.tokens() if self.batch else None if length is None else self.settings["batch_size"] * length


@contextmanager
def explained(trainer: Any) -> Iterator[None]:
    """Around the training of a script's own trainer: torch's error becomes one with the message of `explain`.

    Raises:
        StepMemoryError: the GPU's memory ran out.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # what the process took before is no part of a step
    try:
        yield
    except torch.OutOfMemoryError as error:
        if isinstance(error, GpuMemoryError):
            raise
        raise StepMemoryError(explain(trainer, None, error)) from error


def explain(trainer: Any, config: Any, error: BaseException) -> str:
    """The settings now and three changes, the largest saving first; where there are fewer, how many and why.

    Args:
        trainer: a transformers Trainer whose step ran out.
        config: the job's config (train.batch_size, data.max_seq_length, ...); None where there is none: settings are
            then read off the trainer, and go by the names that TRL has for them.
        error: torch's; its first sentence is kept.
    """
    run = _measure(trainer, config)
    fixes, why_not = _fixes(trainer, run)
    worth = [fix for fix in fixes if fix.saved >= max(1, WORTH * run.peak)]
    small = {fix.kind: fix for fix in reversed(fixes) if fix.kind not in {other.kind for other in worth}}
    why_not += [f"{fix.change} would free {_size(fix.saved)}" for fix in reversed(small.values())]
    named = sorted(_three(worth), key=lambda fix: -fix.saved)
    what = str(error).split(". ")[0].splitlines()[0]
    rest = run.peak - run.weights - run.states
    lines = [f"the GPU ran out of memory in step {trainer.state.global_step + 1}: {what}.",
             "  now: " + ", ".join(f"{name}={value}" for name, value in run.settings.items()),
             f"  peak {run.peak / GIB:.1f} GiB: weights {run.weights / GIB:.1f}, optimizer state "
             f"{run.states / GIB:.1f}, gradients and activations {max(0, rest) / GIB:.1f}",
             "  what would lower it:" if named else "  nothing of these settings is predicted to lower it:"]
    lines += [f"    {fix.change}: about {_size(fix.saved)} less" for fix in named]
    if len(named) < 3:
        count = "no change" if not named else f"only {len(named)} change{'s' * (len(named) > 1)}"
        lines.append(f"    {count} would free {WORTH:.0%} of the peak or more: {'; '.join(why_not)}" if run.peak else
                     "    no peak was measured to predict from")
    if any(fix.kind in _OF_STATE for fix in named) and not run.states and (coming := _moments(trainer, run)):
        lines.append(f"    (counted among it: optimizer state that comes when the first step ends, {_size(coming)})")
    if config is None:
        lines[1] = _renamed(lines[1], _FIELDS)
        lines[3:] = [_renamed(line, _IN_SCRIPTS) for line in lines[3:]]
    return "\n".join(lines)


def _renamed(line: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        line = line.replace(f" {ours}", f" {theirs}")
    return line


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.0f} MiB"


def _three(fixes: list[Fix]) -> list[Fix]:
    """The largest of different kinds; further ones of the same kind where those are fewer than three."""
    first: dict[str, Fix] = {}
    for fix in fixes:
        first.setdefault(fix.kind, fix)
    chosen = sorted(first.values(), key=lambda fix: -fix.saved)
    return [*chosen, *(fix for fix in fixes if fix not in chosen)][:3]


def _measure(trainer: Any, config: Any) -> Run:
    model, args = trainer.model, trainer.args
    beside = (getattr(trainer, name, None) for name in ("ref_model", "critic"))
    modules = [model, *(one for one in beside if isinstance(one, nn.Module))]
    trained = [p for p in model.parameters() if p.requires_grad]
    weights, gradients = _bytes(modules), sum(p.nbytes for p in trained)
    states, peak = _states(trainer), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head and not (
        m.weight.requires_grad and hasattr(model, "peft_config"))]
    sizes = model.config.get_text_config()
    settings = _of_script(trainer) if config is None else _of_config(config)
    settings["batch_size"] = args.per_device_train_batch_size
    settings["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    optim = str(getattr(args.optim, "value", args.optim))
    settings["optimizer"] = optim if config is None else _OPTIMIZERS.get(optim, optim)
    settings["quantization"] = "nf4" if getattr(model, "is_loaded_in_4bit", False) else None
    settings["use_peft"] = hasattr(model, "peft_config")
    if not settings["use_peft"]:
        settings.pop("lora_r", None)
    activations = max(0, peak - weights - states - gradients)
    return Run(settings, peak, weights, gradients, states, activations, sum(w.numel() for w in linears),
               sum(w.nbytes for w in linears), sum(p.numel() for p in trained), sizes.num_hidden_layers,
               sizes.hidden_size, getattr(trainer, "memory", None), config is None or config.get("backend") == "fast",
               LongestBatch.of(getattr(trainer, "train_dataset", None), size=args.per_device_train_batch_size,
                               flat=bool(getattr(trainer, "rows_end_to_end", False))))


def _of_config(config: Any) -> dict[str, Any]:
    """The options that the job has; an algorithm that does not sample has none of a rollout."""
    found = {}
    for path in _SETTINGS:
        section, name = path.split(".")
        if name in (config.get(section) or {}):
            found[name] = config[section][name]
    return found


def _of_script(trainer: Any) -> dict[str, Any]:
    args, model = trainer.args, trainer.model
    recompute = next((m.__dict__["_aligntune_recompute"] for m in model.modules()
                      if "_aligntune_recompute" in m.__dict__), None)
    checkpointing = bool(args.gradient_checkpointing) or any(
        getattr(part, "gradient_checkpointing", False) for part in model.modules())  # its property warns from 5.23 on
    ranks = [adapter.r for adapter in getattr(model, "peft_config", {}).values() if hasattr(adapter, "r")]
    names = {"batch_size": None, "gradient_accumulation_steps": None, "max_seq_length": getattr(
        args, "max_length", None), "packing": getattr(args, "packing", False),
        "gradient_checkpointing": "offload" if recompute is not None and recompute.offload else getattr(
            args, "recompute", None) or checkpointing, "memory_budget_gib": getattr(args, "memory_budget_gib", None),
        "quantization": None, "optimizer": None, "use_peft": None}
    online = {name: getattr(args, name) for name in ("num_generations", "max_completion_length")
              if hasattr(args, name)}
    eight = {"base_precision": args.base_precision} if getattr(args, "base_precision", None) else {}
    return names | eight | ({"lora_r": ranks[0]} if ranks else {}) | online


def _bytes(modules: list[Any]) -> int:
    held = {id(p): p.nbytes for module in modules for p in module.parameters() if p.device.type != "meta"}
    return sum(held.values())


def _states(trainer: Any) -> int:
    held = getattr(trainer.optimizer, "state", {}) if trainer.optimizer is not None else {}
    return sum(value.nbytes for state in held.values() for value in state.values()
               if isinstance(value, torch.Tensor) and value.is_cuda)


def _fixes(trainer: Any, run: Run) -> tuple[list[Fix], list[str]]:
    """Every change that applies, and why the others do not."""
    kinds = [_recompute, _batch, _length, _packing, _base, _optimizer, _adapters, _beside]
    fixes, why_not = [], []
    if getattr(getattr(trainer, "rollout_engine", None), "ran_out", False):
        kinds, why_not = kinds[4:], ["a rollout ran out, which keeps no activations"]
    for of_kind in kinds:
        for found in of_kind(trainer, run):
            if isinstance(found, Fix):
                fixes.append(found)
            else:
                why_not.append(found)
    return fixes, why_not


def _recompute(trainer: Any, run: Run) -> Iterator[Fix | str]:
    layers, wanted = run.layers, run.settings.get("gradient_checkpointing")
    kept = getattr(run.plan, "keeps", 0)
    if kept:
        budget = int(9 * run.peak / GIB) / 10  # nine tenths
        yield Fix(kept, "recompute", "gradient_checkpointing=True")
        if budget > 0:
            yield Fix(min(kept, run.peak - budget * GIB), "budget", f"memory_budget_gib={budget:g}")
    elif wanted == "offload":
        yield "layers keep nothing on the GPU"
    elif not (trainer.args.gradient_checkpointing or wanted is True):
        yield Fix(run.activations * (layers - 1) / layers, "recompute", "gradient_checkpointing=True")
    elif (tokens := run.tokens) is not None:
        inputs = 2 * tokens * run.hidden * (layers - 1)
        yield Fix(min(inputs, run.activations), "recompute",
                  "gradient_checkpointing='offload'" + ("" if run.fast else " (backend 'fast')"))


def _batch(trainer: Any, run: Run) -> Iterator[Fix | str]:
    batch, accumulate = run.settings["batch_size"], run.settings["gradient_accumulation_steps"]
    if batch == 1:
        yield "batch_size is 1"
        return
    smaller = next(size for size in range(batch // 2, 0, -1) if batch % size == 0)
    yield Fix(run.activations * (1 - smaller / batch), "batch",
              f"batch_size={smaller}, gradient_accumulation_steps={accumulate * batch // smaller}")


def _length(trainer: Any, run: Run) -> Iterator[Fix | str]:
    """A row's activations go with its length; of a sampled one only the completion gets shorter."""
    total, completion = run.settings.get("max_seq_length"), run.settings.get("max_completion_length")
    if completion is None and run.batch is not None:
        for shorter in _shorter(run.batch.longest):
            yield Fix(run.activations * (1 - run.batch.tokens(shorter) / run.batch.tokens()), "length",
                      f"max_seq_length={shorter}")
        return
    name, length = ("max_seq_length", total) if completion is None else ("max_completion_length", completion)
    if length is None:
        yield "no longest row is set"
        return
    share = 1 if completion is None else min(1, completion / (total or completion))
    for shorter in _shorter(length):
        yield Fix(run.activations * share * (1 - shorter / length), "length", f"{name}={shorter}")


def _shorter(length: int) -> list[int]:
    """Halved first, then less of a change and more of one."""
    return [shorter for quarters in (2, 3, 1) if (shorter := length * quarters // 4) >= 2]


def _packing(trainer: Any, run: Run) -> Iterator[Fix | str]:
    """Sequences are filled to the longest row allowed; rows that stand alone are at most as long as the longest is."""
    rows, length = getattr(trainer, "train_dataset", None), run.settings.get("max_seq_length")
    if not run.settings.get("packing") or not length or "seq_lengths" not in (
            getattr(rows, "column_names", None) or ()):
        return
    longest = max(size for sizes in rows[:1000]["seq_lengths"] for size in sizes)  # type: ignore[index]
    yield Fix(run.activations * max(0, 1 - longest / length), "packing", "packing=False (fewer tokens a step)")


def _base(trainer: Any, run: Run) -> Iterator[Fix | str]:
    to_nf4 = max(0, run.linear_bytes - run.linear * _NF4)
    if run.settings["use_peft"]:
        if run.settings["quantization"] is not None:
            yield "the base is in 4 bits"
        elif run.settings.get("base_precision") == "fp8":
            yield Fix(2 * run.linear, "fp8", "base_precision=None")
            yield Fix(to_nf4 + 2 * run.linear, "base", "quantization='nf4', base_precision=None")
        else:
            yield Fix(to_nf4, "base", "quantization='nf4'")
        return
    # Adapters of rank 16 have 16 (in + out) numbers for in x out; weight, gradient and two moments are 16 bytes each.
    whole, adapters = run.gradients + _moments(trainer, run), 16 * 16 * 2 * run.linear / run.hidden
    reference = getattr(trainer, "ref_model", None)
    whole += _bytes([reference]) if isinstance(reference, nn.Module) else 0
    to_16 = max(0, run.linear_bytes - 2 * run.linear) if trainer.args.bf16 or trainer.args.fp16 else 0
    yield Fix(max(0, whole + to_16 - adapters), "adapters", "use_peft=True")
    yield Fix(max(0, whole + to_nf4 - adapters), "base", "use_peft=True, quantization='nf4'")


def _moments(trainer: Any, run: Run) -> float:
    """Bytes of the optimizer's state on the GPU: what is there, or what its first step will make."""
    name = run.settings["optimizer"]
    if run.states or "adamw" not in name or name.startswith(_PAGED):
        return run.states
    return 2 * run.trained if "8bit" in name else 2 * run.gradients


def _optimizer(trainer: Any, run: Run) -> Iterator[Fix | str]:
    name, moments = run.settings["optimizer"], _moments(trainer, run)
    if name.startswith(_PAGED):
        yield "the optimizer's state can wait in host memory"
    elif "adamw" not in name:
        yield f"{name} is not adamw"
    else:
        if "8bit" not in name:
            yield Fix(max(0, moments - 2 * run.trained), "optimizer", "optimizer='adamw_8bit'")
        yield Fix(moments, "optimizer", "optimizer='paged_adamw_8bit' (state in host memory)")


def _adapters(trainer: Any, run: Run) -> Iterator[Fix | str]:
    rank = run.settings.get("lora_r")
    named = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad and ".lora_" in name]
    numbers = sum(p.numel() for _, p in named)
    if not run.settings["use_peft"] or not numbers or not rank:
        return
    # Each trained number is there as weight and gradient, and has its share of the optimizer's state.
    bytes_a_number = 2 * run.gradients / run.trained + _moments(trainer, run) / run.trained
    if rank >= 2:
        yield Fix(numbers / 2 * bytes_a_number, "rank", f"lora_r={rank // 2}")
    in_mlp = sum(p.numel() for name, p in named if any(part in name for part in _MLP))
    if 0 < in_mlp < numbers:
        yield Fix(in_mlp * bytes_a_number, "targets", "lora_target_modules of attention alone")


def _beside(trainer: Any, run: Run) -> Iterator[Fix | str]:
    """What stands beside the model in the step."""
    reference = getattr(trainer, "ref_model", None)
    if isinstance(reference, nn.Module) and run.settings.get("precompute_ref_log_probs") is False:
        yield Fix(_bytes([reference]), "reference", "precompute_ref_log_probs=True")
    engine: Any = getattr(trainer, "rollout_engine", None)
    cache = getattr(engine, "cache_bytes", 0)
    if cache and engine.ran_out:  # its cache is there while it generates
        yield Fix(cache / 2, "rollouts", f"rollout_memory_gib={cache / 2 / GIB:.2g}")
