"""What an optimizer's step launches: the norm of all gradients, clipping, and AdamW, each at once (`ops.tensor_lists`).

transformers decides when, and by how much; torch's optimizer keeps its state, so checkpoints are those of either. What
is not plain tensors of a GPU stays torch's: sharded ones, fp16's scaled gradients, other optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from accelerate.utils import DistributedType

from aligntune.backends.fast.ops.adamw import PARAM_DTYPES
from aligntune.backends.fast.ops.tensor_lists import Tables, adamw_tensors_, clip_grads_

_STATE = ("exp_avg", "exp_avg_sq", "step")
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_UNSHARDED = (DistributedType.NO, DistributedType.MULTI_GPU)
_ELSEWHERE = ("amsgrad", "maximize", "capturable", "differentiable")
"""Options of AdamW that are torch's to compute."""
_NAMES = ("adamw_torch", "adamw_torch_fused")
_ON_THE_CPU = (torch.float32, torch.device("cpu"))


def by_torch_because(trainer: Any) -> str | None:
    """Why the steps of the optimizer that this trainer makes are torch's, or None where they are ours."""
    if trainer.accelerator.scaler is not None:
        return "fp16's gradients are scaled"
    if trainer.accelerator.distributed_type not in _UNSHARDED:
        return "the model is sharded"
    name = getattr(trainer.args.optim, "value", trainer.args.optim)
    return None if name in _NAMES else f"{name} is not torch's AdamW"


class UpdatesAtOnce:
    """Mixin before a transformers Trainer: gradients are clipped at once, and so steps the AdamW that it makes."""

    def create_accelerator_and_postprocess(self: Any) -> None:
        """transformers'; it makes the accelerator, and another one for another batch size."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        clip_at_once(self.accelerator)

    def create_optimizer(self: Any, model: Any = None) -> Any:
        """transformers'."""
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if made_here and by_torch_because(self) is None:
            step_at_once(optimizer)
        return optimizer


def clip_at_once(accelerator: Any) -> None:
    """Have `accelerator.clip_grad_norm_` clip in three launches; what is not plain tensors of a GPU is accelerate's.

    The norm comes in fp32, accelerate's in the dtype of the gradients.
    """
    theirs, tables = accelerator.clip_grad_norm_, Tables()

    def clip(self: Any, parameters: Iterable[torch.nn.Parameter], max_norm: float, norm_type: float = 2) -> Any:
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        plain = self.scaler is None and self.distributed_type in _UNSHARDED and norm_type == 2
        grads = [p.grad for p in parameters if p.grad is not None] if plain else []
        if not grads or not _computed_here(grads):
            return theirs(parameters, max_norm, norm_type=norm_type)
        return clip_grads_(grads, max_norm, tables=tables)

    accelerator.clip_grad_norm_ = MethodType(clip, accelerator)


def step_at_once(optimizer: Any) -> None:
    """Give torch's AdamW, fused or not, a step of one launch a parameter group; another optimizer stays as it is.

    The first step is torch's, which makes the state, and so is one that asks for more than plain numbers.
    """
    if not _plain_adamw(optimizer):
        return
    theirs = type(optimizer).step  # as torch wraps it for the hooks of steps, which read and write gradients
    theirs = theirs.__wrapped__ if getattr(theirs, "hooked", False) else theirs
    kept: dict[int, _Kept] = {}

    def step(self: Any, closure: Any = None) -> Any:
        found = None if closure is not None else _groups(self)
        return theirs(self, closure) if found is None else _step(found, kept)

    optimizer.step = MethodType(torch.optim.Optimizer.profile_hook_step(step), optimizer)


def _plain_adamw(optimizer: Any) -> bool:
    return type(optimizer) is torch.optim.AdamW and not any(
        group.get(name) for group in optimizer.param_groups for name in _ELSEWHERE)


@dataclass
class _Kept:
    """Of a parameter group: its table, and on the device the counts of an optimizer that has them on the CPU."""

    tables: Tables = field(default_factory=Tables)
    counts: torch.Tensor | None = None
    columns: list[torch.Tensor] = field(default_factory=list)

    def counted(self, steps: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        """The steps, which are on the CPU, on the device, always in the same places."""
        if self.counts is None or len(self.counts) != len(steps) or self.counts.device != device:
            self.counts = torch.empty(len(steps), dtype=torch.float32, device=device)
            self.columns = list(self.counts.unbind())
        now = torch.stack(steps)
        self.counts.copy_(now.pin_memory() if device.type == "cuda" else now, non_blocking=True)
        return self.columns


_Group = tuple[dict[str, Any], list[list[torch.Tensor]]]


def _groups(optimizer: Any) -> list[_Group] | None:
    """Each group with its parameters, gradients and state as columns; None where torch is to make the step."""
    scaled = any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))
    if scaled or not _plain_adamw(optimizer):
        return None
    found = []
    for group in optimizer.param_groups:
        if not all(isinstance(group[name], (int, float)) for name in ("lr", "eps", "weight_decay")):
            return None
        if not all(isinstance(beta, (int, float)) for beta in group["betas"]):
            return None
        rows = []
        for p in group["params"]:
            if p.grad is None:
                continue
            state = optimizer.state.get(p)
            if not state:
                return None
            rows.append([p, p.grad, *(state[name] for name in _STATE)])
        columns = [list(column) for column in zip(*rows, strict=True)]
        if columns:
            *numbers, steps = columns
            if not _computed_here([one for column in numbers for one in column]):
                return None
            counted = {(step.dtype, step.device) for step in steps}
            if len(counted) > 1 or counted.pop() not in ((torch.float32, rows[0][0].device), _ON_THE_CPU):
                return None
        found.append((group, columns))
    return found


@torch.no_grad()
def _step(groups: list[_Group], kept: dict[int, _Kept]) -> None:
    for number, (group, columns) in enumerate(groups):
        if not columns:
            continue
        own = kept.setdefault(number, _Kept())
        params, grads, exp_avgs, exp_avg_sqs, steps = columns
        device, (beta1, beta2) = params[0].device, group["betas"]
        there = steps if steps[0].device == device else own.counted(steps, device)
        adamw_tensors_(params, grads, exp_avgs, exp_avg_sqs, there, lr=group["lr"], beta1=beta1, beta2=beta2,
                       eps=group["eps"], weight_decay=group["weight_decay"], tables=own.tables)
        if there is not steps:
            torch._foreach_add_(steps, 1)


def _computed_here(tensors: list[torch.Tensor]) -> bool:
    """Whether these are plain tensors of one GPU that the kernels take."""
    kinds = {(type(tensor), tensor.dtype, tensor.device) for tensor in tensors}
    plain = all(kind in _PLAIN and dtype in PARAM_DTYPES for kind, dtype, _ in kinds)
    here = len({device for *_, device in kinds}) == 1 and _on_gpu(tensors[0])
    return plain and here and all(tensor.is_contiguous() for tensor in tensors)


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda
