"""Linear layers as the ops see them: plain, NF4, fp8, or under PEFT adapters; alone, or several on one input.

What PEFT's state says is read at every call: adapters are switched, disabled (the reference pass of DPO and GRPO),
merged and added while a model is attached.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from aligntune.backends.fast.ledger import promise
from aligntune.backends.fast.ops.fp8 import Fp8Weight
from aligntune.backends.fast.ops.glu import glu
from aligntune.backends.fast.ops.lora import (
    Adapter,
    LoraLinear,
    PassCasts,
    lora_linear_group,
    lora_mlp,
    side_by_side,
)
from aligntune.backends.fast.ops.nf4 import NF4Weight
from aligntune.backends.fast.ops.rms_norm import source_of

KEY = "_aligntune"  # where `attach` leaves a module's spec
STEP = "_aligntune_step"  # where a rollout leaves what runs in the place of layers, for as long as a decode step runs
FP8 = "_aligntune_fp8"  # where `fp8_base` leaves the copies of a base layer that has adapters around it

# (module, qualified name) of the forward that a linear layer's class runs -> what it is.
_KINDS = {
    ("torch.nn.modules.linear", "Linear.forward"): "plain",
    ("bitsandbytes.nn.modules", "Linear4bit.forward"): "nf4",
    ("peft.tuners.lora.layer", "Linear.forward"): "lora",
    ("peft.tuners.lora.bnb", "Linear4bit.forward"): "lora",
}


def slot(module: nn.Module) -> str:
    """The instance attribute that holds the forward: accelerate's device hooks keep theirs under `_old_forward`."""
    return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"


def instance_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward set on this instance, or None where the class's runs (also under accelerate's device hooks)."""
    found = module.__dict__.get(slot(module))
    return None if getattr(found, "__func__", None) is type(module).forward else found


def hooked(module: nn.Module) -> bool:
    """True if calling `module` does more than its forward, so that an op may not pass it by."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def kind_of(module: nn.Module) -> str | None:
    """ "plain", "nf4" or "lora"; None for a linear layer of another make."""
    return _kind_of_forward(type(module).forward)


@functools.lru_cache(maxsize=256)
def _kind_of_forward(forward: Callable[..., Any]) -> str | None:
    return _KINDS.get((getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")))


def _touched(module: nn.Module) -> bool:
    """True if the module does more than its class's forward (`attach` sets none on the layers inside an adapter)."""
    if "forward" in module.__dict__ and (instance_forward(module) is not None or _moves_weights(module)):
        return True
    return hooked(module) or "parametrizations" in module._modules


def _moves_weights(module: nn.Module) -> bool:
    """True under a hook of accelerate's that does more than send inputs to the device that the weights are on."""
    hook = module.__dict__.get("_hf_hook")
    return hook is not None and (type(hook).__name__ != "AlignDevicesHook" or hook.offload)


def read(module: nn.Module) -> LoraLinear | str:
    """The layer as it stands now, or why an op may not take its place (hooks on `module` itself are not looked at).

    A base layer that has e4m3 copies is read as these, unless adapters are merged into it.
    """
    kind = kind_of(module)
    if kind == "lora":
        return _read_adapters(module)
    if kind == "plain":
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is parametrized"
        if weight.layout != torch.strided or not weight.is_floating_point():
            return f"its weight is {weight.dtype}"
        return LoraLinear(weight, module._parameters["bias"])
    if kind == "nf4":
        return _read_nf4(module)
    return f"{type(module).__name__} has no kernel"


def _read_nf4(module: nn.Module) -> LoraLinear | str:
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return "its 4-bit weight is not quantised yet"
    if state.quant_type != "nf4":
        return f"4-bit weights of type {state.quant_type!r} have no kernel"
    if getattr(state, "packing_format_for_cpu", False):
        return "its weight is in bitsandbytes' CPU packing"
    return LoraLinear(NF4Weight.from_param(weight), module.bias)


def _read_adapters(module: Any) -> LoraLinear | str:
    if module.lora_variant:
        return f"{type(next(iter(module.lora_variant.values()))).__name__.removesuffix('LinearVariant')} has no kernel"
    if module.fan_in_fan_out:
        return "its weight is stored transposed (fan_in_fan_out)"
    # `_modules` and `_parameters` for speed: seven layers a block are read at every call, and `module.x` costs more
    # than the rest of the reading.
    children = module._modules
    base_layer = children["base_layer"]
    if kind_of(base_layer) not in ("plain", "nf4"):
        return f"its base layer, {type(base_layer).__name__}, has no kernel"
    if _touched(base_layer):
        return "its base layer has hooks, or a forward of its own"
    base = read(base_layer)
    if isinstance(base, str) or module.merged_adapters:
        # Merged adapters are in the base weight; merged and disabled, PEFT takes them out again, in its own forward.
        return "adapters are merged and disabled" if module.merged_adapters and module.disable_adapters else base
    if FP8 in base_layer.__dict__:
        base = LoraLinear(base_layer.__dict__[FP8].current(base.weight), base.bias)
    if module.disable_adapters:
        return base
    adapters = []
    names = children["lora_A"]._modules
    for name in module.active_adapters:
        if name not in names:
            continue
        a, b, dropout = names[name], children["lora_B"]._modules[name], children["lora_dropout"]._modules[name]
        if _touched(a) or _touched(b) or _touched(dropout):
            return "its adapter has hooks, or a forward of its own"
        if not isinstance(dropout, (nn.Dropout, nn.Identity)):
            return f"{type(dropout).__name__} in the place of dropout has no kernel"
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        up = b._parameters
        adapters.append(Adapter(a._parameters["weight"], up["weight"], module.scaling[name], up["bias"], p))
    return LoraLinear(base.weight, base.bias, tuple(adapters)) if adapters else base


_GATHERING = ("FSDPModule", "FullyShardedDataParallel")
_CASTS: weakref.WeakKeyDictionary[nn.Module, PassCasts] = weakref.WeakKeyDictionary()


def casts_of(model: nn.Module) -> AbstractContextManager[None]:
    """Around a pass, for the factors of all adapters to be cast at once, unless layers' own are gathered on the way."""
    casts = _CASTS.get(model)
    if casts is None:
        held = weakref.ref(model)
        casts = _CASTS[model] = PassCasts(lambda: _gathers(held()))
    return casts.running()


def _gathers(model: nn.Module | None) -> bool:
    """Whether FSDP, 1 or 2, gathers the parameters of a layer when it is called, and lets go of them after it."""
    kinds = {type(module) for module in model.modules()} if model is not None else set()
    return any(base.__name__ in _GATHERING for kind in kinds for base in kind.__mro__)


def _tensors(linear: LoraLinear) -> list[torch.Tensor | None]:
    weight = linear.weight if isinstance(linear.weight, torch.Tensor) else None
    return [weight, linear.bias, *(t for one in linear.adapters for t in (one.a, one.b, one.bias))]


def _compute_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that bitsandbytes would multiply in; None where the weight or autocast decides."""
    base = module.base_layer if kind_of(module) == "lora" else module
    return getattr(base, "compute_dtype", None)


def _gains(linears: Sequence[LoraLinear], x: torch.Tensor) -> bool:
    """Whether the op does better than the modules: plain layers outside training are the same GEMMs either way."""
    if any(linear.adapters or not isinstance(linear.weight, torch.Tensor) for linear in linears):
        return True
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(t is not None and t.requires_grad for one in linears for t in _tensors(one))


def _group(parent: nn.Module, names: tuple[str, ...], note: Callable[[str], None]) -> list[LoraLinear] | None:
    """The layers `names` of `parent`, or None where they must be called; `note` hears what came up since `attach`."""
    linears = []
    for name in names:
        module = parent._modules[name]
        if hooked(module) or _foreign(module):
            note(f"{name} has hooks, or a forward of its own")
            return None
        found = read(module)
        if isinstance(found, str):
            if _attached(module):  # otherwise the report has a line for it already
                note(f"{name}: {found}")
            return None
        linears.append(found)
    return None if _multiply_apart(parent, names, linears) else linears


def _multiply_apart(parent: nn.Module, names: tuple[str, ...], linears: Sequence[LoraLinear]) -> bool:
    """True where 4-bit layers multiply in another dtype than the weights of plain ones among them: one by one, then."""
    plain = {linear.weight.dtype for linear in linears if isinstance(linear.weight, torch.Tensor)}
    packed = [name for name, linear in zip(names, linears, strict=True) if isinstance(linear.weight, NF4Weight)]
    asked = {_compute_dtype(getattr(parent, name)) for name in packed} - {None} if plain else set()
    return bool(asked) and asked != plain


def ready_to_read(module: nn.Module) -> LoraLinear | None:
    """The layer as it stands now; None where it must be called."""
    if hooked(module) or _foreign(module):
        return None
    found = read(module)
    return None if isinstance(found, str) else found


def _attached(module: nn.Module) -> bool:
    return KEY in module.__dict__


def _foreign(module: nn.Module) -> bool:
    found = instance_forward(module)
    return (found is not None and getattr(found, "__func__", None) is not linear_forward) or _moves_weights(module)


def _promise_linears(parent: nn.Module, linears: Sequence[LoraLinear], x: torch.Tensor, *, inner: bool = False) -> None:
    """What the layers launch besides cuBLAS. `inner`: their input is made inside the op, so its gradient always is."""
    factors = [tensor for linear in linears for tensor in _tensors(linear)]
    to_x = [x, *factors] if inner else [x]
    if not inner and source_of(x) is not None:
        promise(parent, "norm, made again", *factors)
    beside = side_by_side(linears)
    if beside is not None:
        promise(parent, "fp8 base, one input gradient", *to_x)
    for linear in linears:
        if isinstance(linear.weight, NF4Weight):
            promise(parent, "nf4", *to_x)
        elif isinstance(linear.weight, Fp8Weight) and beside is None:
            promise(parent, "fp8 base, input gradient", *to_x)
    if any(isinstance(linear.weight, Fp8Weight) for linear in linears):
        promise(parent, "fp8 base")
    if any(one.dropout for linear in linears for one in linear.adapters):
        promise(parent, "lora dropout", *factors)
        promise(parent, "lora dropout, input gradient", *to_x)


def project(
    parent: nn.Module, names: tuple[str, ...], x: torch.Tensor, note: Callable[[str], None]
) -> tuple[torch.Tensor, ...]:
    """The outputs of `parent`'s linear layers `names`, all on the input `x`, in one op where they allow it."""
    if STEP in parent.__dict__:
        return parent.__dict__[STEP][names](x)
    linears = _group(parent, names, note)
    if linears is None or not _gains(linears, x):
        return tuple(getattr(parent, name)(x) for name in names)
    promise(parent, "lora_linear_group", x, *(tensor for linear in linears for tensor in _tensors(linear)))
    _promise_linears(parent, linears, x)
    return lora_linear_group(x, linears, compute_dtype=_compute_dtype(getattr(parent, names[0])))


def gated_mlp(
    parent: nn.Module, wide: tuple[str, ...], down: str, x: torch.Tensor, activation: str, note: Callable[[str], None]
) -> torch.Tensor | None:
    """`parent`'s gated MLP in one op; None where its layers must be called, or it would gain nothing."""
    if STEP in parent.__dict__:
        step = parent.__dict__[STEP]
        outs = step[wide](x)
        gate, up = outs if len(wide) == 2 else outs[0].chunk(2, dim=-1)
        promise(parent, "glu", gate, up)
        return step[(down,)](glu(gate, up, activation=activation))[0]
    linears = _group(parent, (*wide, down), note)
    if linears is None or not _gains(linears, x):
        return None
    promise(parent, "lora_mlp", x, *(tensor for linear in linears for tensor in _tensors(linear)))
    _promise_linears(parent, linears[:-1], x)
    _promise_linears(parent, linears[-1:], x, inner=True)
    first, second = linears[0], linears[1] if len(wide) == 2 else None
    dtype = _compute_dtype(getattr(parent, down))
    return lora_mlp(x, first, second, linears[-1], activation=activation, compute_dtype=dtype)


def linear_forward(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """One linear layer with its adapters (or a bare NF4 one), where no group passes it by."""
    if STEP in self.__dict__:
        return self.__dict__[STEP][()](x)[0]
    found: LoraLinear | str = "it was called with arguments besides its input" if args or kwargs else read(self)
    if isinstance(found, str):
        self.__dict__[KEY].fall_out(found)
        return type(self).forward(self, x, *args, **kwargs)
    if not _gains([found], x):
        return type(self).forward(self, x)
    promise(self, "lora_linear_group", x, *_tensors(found))
    _promise_linears(self, [found], x)
    return lora_linear_group(x, [found], compute_dtype=_compute_dtype(self))[0]
