"""What one module gets: the op and its instance forward, or the reason why it stays eager."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from aligntune.backends.fast import families, forwards, lora
from aligntune.backends.fast.families import Family
from aligntune.backends.fast.forwards import AttentionSpec, LayerSpec, MlpSpec, NormSpec, Spec
from aligntune.backends.fast.ops.fp8 import Fp8Weight
from aligntune.backends.fast.ops.rms_norm import MAX_WIDTH

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Decision:
    """`forward` and its `spec`, or a `reason`. `static_ops`: ops that one step calls at least once through it."""

    op: str
    forward: Callable[..., Any] | None = None
    spec: Spec | None = None
    reason: str | None = None
    static_ops: tuple[str, ...] = ()


def eager(op: str, reason: str) -> Decision:
    return Decision(op, reason=reason)


def decide(module: nn.Module) -> Decision | None:
    """The decision for `module`; None for modules that are no business of ours (or have nothing to gain)."""
    known = families.identify(module)
    decision: Decision | None
    if lora.kind_of(module) in ("lora", "nf4"):
        decision = _linear(module)
    elif known is not None:
        family, part = known
        decision = _BY_PART[part](module, family) if part in _BY_PART else None
    else:
        decision = _other_linear(module) or _by_structure(module)
    if decision is None or decision.forward is None:
        return decision
    if lora.instance_forward(module) is not None:
        return eager(decision.op, "a forward of its own was set on the instance")
    if nn.utils.parametrize.is_parametrized(module):
        return eager(decision.op, "its weights are parametrized")
    if any(p.dtype == torch.float64 for p in module.parameters()):
        return eager(decision.op, "its weights are torch.float64")
    return decision


# ------------------------------------------------------------------------------------------------ families of the table


def _norm(module: nn.Module, family: Family) -> Decision:
    return _norm_decision(module, family.norm)


def _norm_decision(module: nn.Module, convention: str) -> Decision:
    weight = module.weight
    if weight.dtype not in DTYPES:
        return eager("rms_norm", f"its weight is {weight.dtype}")
    if weight.numel() > MAX_WIDTH:
        return eager("rms_norm", f"rows of {weight.numel()} elements; the kernel holds at most {MAX_WIDTH}")
    spec = NormSpec("norm", eps=families.norm_eps(module) or 0.0, convention=convention)
    return Decision(f"rms_norm, {convention} convention", forwards.norm_forward, spec, static_ops=("rms_norm",))


def _mlp(module: nn.Module, family: Family) -> Decision:
    return _glu_decision(module, packed=family.mlp == "packed")


def _glu_decision(module: nn.Module, *, packed: bool) -> Decision:
    activation = families.activation_of(families.activation_module(module))
    if activation is None:
        return eager("glu", f"activation {_activation_name(module)!r} has no kernel")
    spec = MlpSpec("mlp", activation=activation, packed=packed)
    return Decision(f"glu, {activation}", forwards.mlp_forward, spec, static_ops=("glu",))


def _activation_name(module: nn.Module) -> str:
    config = getattr(module, "config", None)
    named = (getattr(config, name, None) for name in ("hidden_activation", "hidden_act"))
    return next((name for name in named if isinstance(name, str)), type(families.activation_module(module)).__name__)


def _attention(module: nn.Module, family: Family) -> Decision:
    if not hasattr(families.modeling_module(module), "eager_attention_forward"):
        return eager("attention", "this version of transformers has no `eager_attention_forward` beside the module")
    spec = AttentionSpec("attention", family=family)
    if family.optional_rope is not None and not getattr(module, family.optional_rope):
        return Decision("projections; no rotary embedding in this layer", forwards.attention_forward, spec)
    if family.qk_norm != "head":
        return Decision("rope", forwards.attention_forward, spec, static_ops=("rope",))
    norms = (module.q_norm, module.k_norm)  # under `modules_to_save` they are wrappers
    if any(families.identify(norm) != (family, "norm") or _norm(norm, family).forward is None for norm in norms):
        return Decision("rope", forwards.attention_forward, spec, static_ops=("rope",))
    return Decision("qk_norm + rope", forwards.attention_forward, spec, static_ops=("qk_norm_rope",))


def _layer(module: nn.Module, family: Family) -> Decision | None:
    if family.layer == "post":
        return None
    second = module.pre_feedforward_layernorm if family.layer == "sandwich" else module.post_attention_layernorm
    if families.identify(second) != (family, "norm") or _norm(second, family).forward is None:
        return eager("add + rms_norm", "its second norm has no kernel")
    spec = LayerSpec("layer", family=family, checkpoints=_checkpoints_in_forward(module))
    return Decision("add + rms_norm in one launch", forwards.layer_forward, spec)


def _checkpoints_in_forward(layer: nn.Module) -> bool:
    """Newer transformers wrap the class's `forward` with the recomputation, older ones `__call__`, which we leave."""
    base = _checkpointed_class(layer)
    return base is not None and "__call__" not in base.__dict__


def _checkpointed_class(layer: nn.Module) -> type | None:
    """The class that transformers' blocks have in common, or None for a module that is no block."""
    return next((cls for cls in type(layer).__mro__ if cls.__name__ == "GradientCheckpointingLayer"), None)


def _experts(module: nn.Module, family: Family) -> Decision:
    return eager("experts", "routed experts have no kernel")


def _linear(module: nn.Module) -> Decision:
    """A linear layer under adapters, or a bare NF4 one; inside a known attention or MLP its group passes it by."""
    adapted = lora.kind_of(module) == "lora"
    op = "lora" if adapted else "nf4"
    found = lora.read(module)
    if isinstance(found, str):
        return eager(op, found)
    base = module.base_layer if adapted else module
    nf4 = " on nf4" if adapted and lora.kind_of(base) == "nf4" else ""
    fp8 = ", fp8 base" if isinstance(found.weight, Fp8Weight) else ""
    return Decision(f"{op}{nf4}{fp8}", lora.linear_forward, Spec(op))


def _other_linear(module: nn.Module) -> Decision | None:
    """A layer under adapters of another kind, or a linear layer of another make: called as it is."""
    base = module._modules.get("base_layer")
    if base is not None and type(module).__module__.startswith("peft.tuners."):
        kind = type(module).__module__.split(".")[2]
        return eager(kind, f"{kind} adapters on {type(base).__name__} have no kernel")
    found = lora.read(module) if isinstance(module, nn.Linear) else None
    return eager("linear", found) if isinstance(found, str) else None


_BY_PART: dict[str, Callable[[Any, Family], Decision | None]] = {
    "norm": _norm,
    "mlp": _mlp,
    "attention": _attention,
    "layer": _layer,
    "experts": _experts,
}


# --------------------------------------------------------------------------------------------------------- by structure


def _by_structure(module: nn.Module) -> Decision | None:
    """A module outside the table: taken where a probe shows what it computes."""
    name = type(module).__name__
    patcher = families.patched_by(module)
    if patcher is not None:
        return eager(name, f"its class's forward was replaced by {patcher}")
    if families.looks_like_rms_norm(module):
        convention = families.probe_norm(module)
        if convention is None:
            return eager("rms_norm", f"{name} computes something else than the conventions that have a kernel")
        return _norm_decision(module, convention)
    if families.looks_like_glu(module):
        if not families.probe_glu(module):
            return eager("glu", f"{name} computes something else than down(act(gate) * up)")
        return _glu_decision(module, packed=False)
    if isinstance(module, nn.LayerNorm):
        return eager("norm", "LayerNorm has no kernel")
    if name.endswith(("Attention", "SelfAttention")) and list(module.children()):
        return eager("attention", f"{name} is in no family of the table")
    if name.endswith(("MoeBlock", "MoE")):
        return eager("experts", "routed experts have no kernel")
    if name.endswith(("MLP", "FeedForward")) and list(module.children()):
        return eager("glu", f"{name} is no gate_proj, up_proj, down_proj with an activation")
    if _checkpointed_class(module) is not None:  # a block; its parts may have names that nothing above knows
        return eager("layer", f"{name} is in no family of the table")
    return None
