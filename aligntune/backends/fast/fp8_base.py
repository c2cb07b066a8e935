"""The frozen base under LoRA in e4m3: where its copies live, when they are used, and when they are made again.

A copy is beside the weight, not in its place: two bytes more for each of its numbers. The weight itself is what is
saved and merged. Training, evaluation, rollouts and the reference, which is the model with its adapters off, go through
the copy, so that the policy that draws, the one that learns and the reference are rounded alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aligntune.backends.fast import lora
from aligntune.backends.fast.ops.fp8 import Fp8Weight, fits, together
from aligntune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import Trainer

LEAST_CAPABILITY = (8, 9)  # tensor cores that multiply e4m3: Ada and Hopper


# Layers on one input: their gradients of it are one product, where the columns of their copies lie side by side.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class Copies:
    """The e4m3 copies of one base layer's weight, and what that weight was when they were made.

    `bases`: the base layers whose columns lie beside this one's, itself among them; none where it stands alone.
    """

    weight: Fp8Weight
    pointer: int
    version: int
    bases: list[Any] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, weight: torch.Tensor) -> Copies:
        return cls(Fp8Weight.of(weight), weight.data_ptr(), weight._version)

    def current(self, weight: torch.Tensor) -> Fp8Weight | torch.Tensor:
        """What stands for `weight` in a product: the copies, made again where it was written or replaced since.

        They are made again in place, where captured graphs read them. A weight that trains, or that changed its shape,
        stands for itself. Writes through `.data` leave no trace: PEFT merges so, and a merged layer is never asked for
        its copies.
        """
        if weight.requires_grad or weight.shape != self.weight.shape:
            return weight
        if weight.data_ptr() != self.pointer or weight._version != self.version:
            others = [base._parameters["weight"] for base in self.bases]
            if weight.device == self.weight.rows.device and self._lie_together(others):
                self.weight.renew_(weight, others)
            else:
                self.weight, self.bases = Fp8Weight.of(weight), []
            self.pointer, self.version = weight.data_ptr(), weight._version
        return self.weight

    def _lie_together(self, others: list[torch.Tensor]) -> bool:
        """Whether the weights beside this one are still what their columns were made of, but for their numbers."""
        beside = self.weight.beside
        return beside is None or (tuple(one.shape[0] for one in others) == beside.widths
                                  and all(one.shape[1:] == self.weight.shape[1:] for one in others)
                                  and all(one.device == self.weight.rows.device for one in others))


def install(model: nn.Module) -> tuple[int, int]:
    """Give every frozen linear layer under adapters its copies; returns how many have them, and how many cannot.

    Layers that have copies keep them. A layer cannot whose weight trains or has a side that is no multiple of 16.
    """
    for module in model.modules():
        for names in GROUPS:
            _install_beside([module._modules.get(name) for name in names])
    have = cannot = 0
    for module in model.modules():
        if lora.kind_of(module) != "lora":
            continue
        if not _can(module):
            cannot += 1
            continue
        base: Any = module.base_layer
        if lora.FP8 not in base.__dict__:
            base.__dict__[lora.FP8] = Copies.of(base._parameters["weight"])
        have += 1
    return have, cannot


def _can(module: Any) -> bool:
    base = module.base_layer
    if lora.kind_of(base) != "plain":
        return False
    weight = base._parameters.get("weight")
    return weight is not None and not weight.requires_grad and fits(weight.shape)


def _install_beside(layers: list[Any]) -> None:
    """Copies of layers on one input, where all of them are to have some and none has any."""
    if any(layer is None or lora.kind_of(layer) != "lora" or not _can(layer) for layer in layers):
        return
    bases = [layer.base_layer for layer in layers]
    weights = [base._parameters["weight"] for base in bases]
    one_input = len({(weight.shape[1], weight.device, weight.dtype) for weight in weights}) == 1
    if not one_input or not together([weight.shape[0] for weight in weights]) \
            or any(lora.FP8 in base.__dict__ for base in bases):
        return
    for base, weight, eight in zip(bases, weights, Fp8Weight.of_several(weights), strict=True):
        base.__dict__[lora.FP8] = Copies(eight, weight.data_ptr(), weight._version, bases)


def remove(model: nn.Module) -> None:
    """Take all copies away."""
    for module in model.modules():
        module.__dict__.pop(lora.FP8, None)


def quantize_base(trainer: Trainer, wanted: str | None) -> str | None:
    """Give a trainer's model its copies before it is attached; returns what became of it, None where nothing was asked.

    Args:
        wanted: "fp8" must be had, "auto" is had where it can be, None is not wanted.
    Raises:
        ConfigError: "fp8", and it cannot be.
    """
    if wanted is None:
        return None
    why = unsupported_because(trainer)
    if why is None:
        have, cannot = install(trainer.model)
        if have:
            rest = f", {cannot} as loaded (a side that is no multiple of 16, or weights that train)" if cannot else ""
            return f"base: e4m3 by rows in {have} linear layers{rest}"
        why = "no linear layer under adapters is frozen and has sides that are multiples of 16"
    if wanted == "fp8":
        raise ConfigError(f"base_precision = 'fp8': {why}; leave it out for the base as it is loaded, 'auto' takes "
                          "fp8 where it can be had")
    return f"base: as loaded, {why}"


def unsupported_because(trainer: Trainer) -> str | None:
    """Why the base of this trainer's model cannot be multiplied in fp8, or None."""
    layers = [module for module in trainer.model.modules() if lora.kind_of(module) == "lora"]
    if not layers:
        return "it needs LoRA, and the model has no adapters: only a frozen base under some is quantised"
    if any(lora.kind_of(layer.base_layer) == "nf4" for layer in layers):
        return "the base is quantised to 4 bits already"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "the model is sharded"
    if getattr(trainer, "precompute_ref_logps", False):
        return "precompute_ref_log_probs has scored the reference over the base as it is loaded"
    weight: Any = layers[0].base_layer.weight
    if weight.is_cuda:
        capability = torch.cuda.get_device_capability(weight.device)
        if capability < LEAST_CAPABILITY:
            name = torch.cuda.get_device_name(weight.device)
            return f"{name} has compute capability {capability[0]}.{capability[1]}, and e4m3 products need 8.9 or later"
        if weight.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16):
            return "precision is fp32, and fp8 products come out in bf16"
    return None
