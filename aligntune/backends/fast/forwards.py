"""The forwards that `attach` sets on module instances: a family's own arithmetic, with our ops in it.

Each is a plain function of the module, bound to the instance with `types.MethodType`. It reaches weights and children
through `self` alone, so a deep copy of an attached module runs on the copy's own weights. What differs between families
is in the spec that `attach` leaves beside the forward, under `KEY`.

A forward hands its tensors to the op or raises; where this call cannot go through the op (a hook was put on a module
that the op would pass by) it calls the modules and says so in `spec.eager`, which the report shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from aligntune.backends.fast import tiles
from aligntune.backends.fast.families import ACTIVATION_NAMES, Family, modeling_module
from aligntune.backends.fast.ledger import WITH_ITS_NEIGHBOUR, promise
from aligntune.backends.fast.lora import KEY, gated_mlp, hooked, instance_forward, linear_forward, project
from aligntune.backends.fast.ops.attention import attention
from aligntune.backends.fast.ops.glu import glu
from aligntune.backends.fast.ops.rms_norm import rms_norm
from aligntune.backends.fast.ops.rope import qk_norm_rope, rope
from aligntune.backends.fast.shared_prompts import shared_in
from aligntune.errors import ConfigError


@dataclass
class Spec:
    """What a module's forward needs to know beside the module. `eager`: reason -> calls that did not take the op."""

    kind: str
    strict: bool = False
    eager: dict[str, int] = field(default_factory=dict)
    of: int = 0  # `id` of the module it was made for, which a copy of that module is not

    def fall_out(self, reason: str) -> None:
        """Record that this call runs the modules themselves; under strict an error."""
        if self.strict:
            raise ConfigError(f"strict=True: {self.kind} would run eager in this call: {reason}")
        self.eager[reason] = self.eager.get(reason, 0) + 1


@dataclass
class NormSpec(Spec):
    eps: float = 0.0
    convention: str = "llama"


@dataclass
class MlpSpec(Spec):
    activation: str = "silu"
    packed: bool = False


@dataclass
class AttentionSpec(Spec):
    family: Family | None = None


@dataclass
class LayerSpec(Spec):
    family: Family | None = None
    checkpoints: bool = False

    def parts(self, layer: nn.Module, kwargs: dict[str, Any]) -> tiles.Halves | None:
        """`layer(.., **kwargs)` as a call that can be run in parts; None where calling it would do more."""
        return None if passing_by_is_wrong(layer, layer_forward) else _halves(layer, kwargs)


def norm_op(weight: torch.Tensor) -> str:
    """The ledger's name of a norm: with a weight that trains its backward launches one kernel more."""
    return "rms_norm, trained" if weight.requires_grad else "rms_norm"


def passing_by_is_wrong(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """True if calling `module` would do more than the instance forward `forward` that `attach` gave it."""
    return hooked(module) or getattr(instance_forward(module), "__func__", None) is not forward


# --------------------------------------------------------------------------------------------------------------- norm


def norm_forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """RMSNorm."""
    spec: NormSpec = self.__dict__[KEY]
    promise(self, norm_op(self.weight), hidden_states, self.weight)
    return rms_norm(hidden_states, self.weight, eps=spec.eps, convention=spec.convention)


def add_norm(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(norm(residual + x), residual + x)`, in one launch where `norm` is attached."""
    spec: NormSpec | None = norm.__dict__.get(KEY)
    if spec is None or passing_by_is_wrong(norm, norm_forward):
        if spec is not None:
            spec.fall_out("not fused with the add before it: it has hooks, or another forward was put on it")
        residual = residual + x
        return norm(residual), residual
    promise(norm, norm_op(norm.weight), x, residual, norm.weight)
    return rms_norm(x, norm.weight, eps=spec.eps, convention=spec.convention, residual=residual)


def norm_and_input(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(norm(x), x)`; where `norm` is attached, the gradient of this x is added inside the backward of norm."""
    spec: NormSpec | None = norm.__dict__.get(KEY)
    if spec is None or passing_by_is_wrong(norm, norm_forward):
        return norm(x), x
    promise(norm, norm_op(norm.weight), x, norm.weight)
    return rms_norm(x, norm.weight, eps=spec.eps, convention=spec.convention, keep=True)


# ---------------------------------------------------------------------------------------------------------------- MLP


def mlp_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`down(act(gate(x)) * up(x))`, gate and up apart or packed; in one op where its layers allow it."""
    spec: MlpSpec = self.__dict__[KEY]
    if any(name in self._modules and hooked(self._modules[name]) for name in ACTIVATION_NAMES):
        spec.fall_out("its activation has hooks")
        return type(self).forward(self, x)
    wide = ("gate_up_proj",) if spec.packed else ("gate_proj", "up_proj")
    whole = gated_mlp(self, wide, "down_proj", x, spec.activation, spec.fall_out)
    if whole is not None:
        return whole
    outs = tuple(getattr(self, name)(x) for name in wide)
    gate, up = outs[0].chunk(2, dim=-1) if spec.packed else outs
    promise(self, "glu", gate, up)
    return self.down_proj(glu(gate, up, activation=spec.activation))


# ---------------------------------------------------------------------------------------------------------- attention


def attention_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention: projections, (norms and) rotary embedding in one launch, then the model's own attention function.

    A mask of width 0 (`trainers.FastSFT`) says that rows lie end to end: attention then stays within each row.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    family: Family = self.__dict__[KEY].family
    input_shape = hidden_states.shape[:-1]
    query, key, value = _rotated(self, family, hidden_states, position_embeddings)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, modeling_module(self).eager_attention_forward
    )
    options = {name: _attribute(self, path) for name, path in family.attention_options}
    if attention_mask is not None and attention_mask.shape[-1] == 0:
        if query.is_cuda and query.dtype != torch.float32:
            promise(self, "attention", query, key, value)
        flat = attention(
            query, key, value, kwargs["cu_seq_lens_q"], max_seqlen=kwargs["max_length_q"], scale=self.scaling,
            window=options.get("sliding_window"), shared=shared_in(kwargs),
        )
        return self.o_proj(flat.reshape(*input_shape, -1)), None
    output, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        **options,
        **kwargs,
    )
    return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights


def _attribute(module: nn.Module, path: str) -> Any:
    if path.startswith("config."):
        return getattr(module.config, path.removeprefix("config."), None)
    return getattr(module, path)


def _rotated(
    self: nn.Module, family: Family, x: torch.Tensor, position_embeddings: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as (batch, heads, seq, head_dim), q and k normed and rotated as the family does it."""
    note = self.__dict__[KEY].fall_out
    if family.attention == "packed":
        packed = project(self, ("qkv_proj",), x, note)[0]
        kv_width = self.config.num_key_value_heads * self.head_dim
        q, k, v = packed.split((packed.shape[-1] - 2 * kv_width, kv_width, kv_width), dim=-1)
    else:
        q, k, v = project(self, ("q_proj", "k_proj", "v_proj"), x, note)
    if family.qk_norm == "row":
        q, k = self.q_norm(q), self.k_norm(k)
    shape = (*x.shape[:-1], -1, self.head_dim)
    q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))
    if family.optional_rope is not None and not getattr(self, family.optional_rope):
        return q, k, v
    cos, sin = position_embeddings
    if family.qk_norm == "head":
        norm: NormSpec | None = self.q_norm.__dict__.get(KEY)
        if norm is not None and not any(passing_by_is_wrong(n, norm_forward) for n in (self.q_norm, self.k_norm)):
            trained = ", trained" if self.q_norm.weight.requires_grad or self.k_norm.weight.requires_grad else ""
            promise(self, f"qk_norm_rope{trained}", q, k, self.q_norm.weight, self.k_norm.weight)
            promise(self.q_norm, WITH_ITS_NEIGHBOUR)
            promise(self.k_norm, WITH_ITS_NEIGHBOUR)
            q, k = qk_norm_rope(
                q, k, self.q_norm.weight, self.k_norm.weight, cos, sin, eps=norm.eps, convention=norm.convention
            )
            return q, k, v
        if norm is not None:
            note("q_norm and k_norm run apart from the rotary embedding: they have hooks")
        q, k = self.q_norm(q), self.k_norm(k)
    promise(self, "rope", q, k)
    q, k = rope(q, k, cos, sin)
    return q, k, v


# ------------------------------------------------------------------------------------------------------ decoder layer


def layer_forward(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A decoder layer whose second norm takes the residual add with it; checkpointed as the class would be."""
    spec: LayerSpec = self.__dict__[KEY]
    if spec.checkpoints and self.gradient_checkpointing and self.training:
        # A cache would be written twice, by the forward and by its recomputation.
        kwargs.update({name: off for name, off in (("use_cache", False), ("past_key_values", None)) if name in kwargs})
        return self._gradient_checkpointing_func(_halves(self, kwargs), *args)
    return _layer(self, *args, **kwargs)


def _layer(self: nn.Module, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    normed, hidden_states = norm_and_input(self.input_layernorm, hidden_states)
    return _second(self, _attend(self, normed, **kwargs), hidden_states)


def _attend(self: nn.Module, normed: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Attention's branch of a layer, as it is added."""
    family: Family = self.__dict__[KEY].family
    x, _ = self.self_attn(hidden_states=normed, **kwargs)
    if family.layer == "sandwich":
        x = self.post_attention_layernorm(x)
    return _branch(self, family, x, 0)


def _second(self: nn.Module, branch: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The layer's output from attention's branch and the layer's input: each row from its own."""
    family: Family = self.__dict__[KEY].family
    sandwich = family.layer == "sandwich"
    second = self.pre_feedforward_layernorm if sandwich else self.post_attention_layernorm
    x, residual = add_norm(second, branch, residual)
    del branch  # where nothing else keeps it, it is free while the MLP runs
    x = self.mlp(x)
    if sandwich:
        x = self.post_feedforward_layernorm(x)
    return residual + _branch(self, family, x, 1)


def _halves(self: nn.Module, kwargs: dict[str, Any]) -> tiles.Halves:
    """The layer's call, for whoever recomputes it; of width 0 where its MLP is not ours, or has hooks: these count."""
    family: Family = self.__dict__[KEY].family
    mlp, norm = self.mlp, self.input_layernorm
    after = [self.post_attention_layernorm, self.post_feedforward_layernorm] if family.layer == "sandwich" else []
    ours = isinstance(mlp.__dict__.get(KEY), MlpSpec) and not any(map(hooked, [*mlp.modules(), *after]))
    down = getattr(mlp.down_proj, "base_layer", mlp.down_proj) if ours else None
    return tiles.Halves(
        self, norm, _layer, norm_and_input, _attend, _second, kwargs, width=getattr(down, "in_features", 0),
        unpacks=hasattr(getattr(down, "weight", None), "quant_state"))


def _branch(self: nn.Module, family: Family, x: torch.Tensor, which: int) -> torch.Tensor:
    """A branch's output as it is added: through its dropout, times its multiplier."""
    if family.branch_dropouts is not None:
        x = getattr(self, family.branch_dropouts[which])(x)
    if family.residual_scale is not None:
        x = x * getattr(self, family.residual_scale)
    return x


OURS = (norm_forward, mlp_forward, attention_forward, layer_forward, linear_forward)

# A bound method is pickled by its function's name: under the class's own, a pickled model loads with its own forward.
for _forward in OURS:
    _forward.__name__ = "forward"
