"""Models without the `forward` that a trainer left on them.

TRL installs its fused head by putting a function into the model instance's `__dict__["forward"]`. That function holds
the ORIGINAL's bound forward in its closure, and `copy.deepcopy` copies no closures: a copy's plain forward would run,
and follow, the model it was copied from; a second trainer would wrap the wrapper.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

ATTACHMENT = "_aligntune_attachment"
"""Where a backend leaves, on a model that it put kernels under, what undoes that: an object with `detach()`."""

# `_original_forward` is where accelerate's mixed precision keeps the forward it wrapped: the same closure.
_NAMES = ("forward", "_original_forward")


def _patched(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        for name in _NAMES:
            # accelerate's device hooks are partials over the module, which deepcopy follows; they stay.
            if name in vars(module) and not isinstance(vars(module)[name], functools.partial):
                yield module, name


def detach_backends(model: nn.Module) -> None:
    """Undo what a backend has put on `model` or a part of it, beside forwards too; that there was one is forgotten.

    For a model that is handed to another trainer: how layers are recomputed, a plan of which, copies of its base in
    another precision were the first one's.
    """
    for module in list(model.modules()):
        attachment = vars(module).get(ATTACHMENT)
        if attachment is not None:
            attachment.detach()


def forget_patched_forward(model: nn.Module) -> int:
    """Remove every instance-level `forward` under `model` for good; returns how many there were.

    For a model that is handed to another trainer. One that still trains wants `plain_forward`.
    """
    found = list(_patched(model))
    for module, name in found:
        del vars(module)[name]
    return len(found)


def forget_reference_adapter(model: nn.Module) -> bool:
    """Remove the adapter "ref" under which TRL keeps, on a PEFT model, the reference that it began with.

    Its next trainer would fail to add one, and the reference is to be what this model is now.
    """
    adapters = getattr(model, "peft_config", {})
    if "ref" not in adapters or "default" not in adapters:
        return False
    model.delete_adapter("ref")
    return True


@contextlib.contextmanager
def plain_forward(model: Model) -> Iterator[Model]:
    """`model` with its class's own `forward` in every module, for the block; what was there is put back after."""
    removed = [(module, name, vars(module).pop(name)) for module, name in list(_patched(model))]
    try:
        yield model
    finally:
        for module, name, value in removed:
            vars(module)[name] = value


@contextlib.contextmanager
def kept_mode(model: nn.Module) -> Iterator[None]:
    """Train or eval mode of every module, as it was before the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def autocast_if_mixed(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Autocast for a model of several float types, a null context for one of a single type.

    In training accelerate autocasts. Outside, fp32 activations meet bf16 weights: TRL casts what trains on a 4-bit base
    to bf16, and a plain forward through such an lm_head raises.
    """
    parameters = [value for value in model.parameters() if value.is_floating_point()]
    half = {value.dtype for value in parameters} & {torch.bfloat16, torch.float16}
    if len(half) != 1 or all(value.dtype in half for value in parameters):
        return contextlib.nullcontext()
    return torch.autocast(parameters[0].device.type, dtype=half.pop())


def keep_4bit_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking the 4-bit weights of `model` on CPU; undo it where it has.

    On CPUs with AVX512-BF16 the first forward in eval mode repacks each weight for good and rounds its scales to bf16.
    After one evaluation training goes on from another base, a merge reads noise, and so does DoRA in that very
    forward: its outputs were off by half their spread.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        weight: Any = module.weight
        state = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

            # Its own way back leaves the scales transposed, or quantises them a second time.
            scales, state.original_nested = state.absmax.T.reshape(-1).float(), False
            weight.data, state = unpack(weight.data, state)
            state.absmax = scales


def copy_model(model: Model, *, device: str | torch.device | None = None) -> Model:
    """A copy of `model` that shares nothing with it: plain `forward`, nothing of a backend's, frozen, in eval mode.

    Args:
        model: a model of any state; a quantised base and adapters are copied as they are.
        device: where the copy's tensors go as they are copied (no second copy on the model's own device);
            None keeps each where it is.
    """
    memo: dict[int, Any] = {}
    if device is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            memo[id(tensor)] = _moved(tensor, torch.device(device))
    with plain_forward(model):
        clone = copy.deepcopy(model, memo)
    detach_backends(clone)
    clone.requires_grad_(False)
    return clone.eval()


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not isinstance(tensor, nn.Parameter):
        return tensor.detach().to(device, copy=True)
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.detach().to(device, copy=True), requires_grad=tensor.requires_grad)
    # bitsandbytes' parameters carry a quantisation state: their own deepcopy and `.to` know how to move it.
    return copy.deepcopy(tensor).to(device)
