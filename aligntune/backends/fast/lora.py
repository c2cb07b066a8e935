"""Linear layers as the ops see them: plain, 4-bit or under PEFT adapters, alone or several on one input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def slot(module: nn.Module) -> str:
    """The instance attribute that holds the forward: accelerate's device hooks keep theirs under `_old_forward`."""
    return "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in module.__dict__ else "forward"


def instance_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward set on this instance, or None where the class's runs."""
    return module.__dict__.get(slot(module))


def hooked(module: nn.Module) -> bool:
    """True if calling `module` does more than its forward, so that an op may not pass it by."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def project(parent: nn.Module, names: tuple[str, ...], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The outputs of `parent`'s linear layers `names`, all on the input `x`."""
    return tuple(getattr(parent, name)(x) for name in names)
