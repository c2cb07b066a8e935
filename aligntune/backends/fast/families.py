"""Which module of which model family takes which op: a table of rows, and what is recognised outside it by structure.

A row is data. Modules of a family in the table are recognised by the `forward` they run (so a subclass that overrides
it is not taken for its parent, and a class that another library has patched is seen to be patched). Modules of other
families are recognised by a probe: the module's own `forward` runs on a few numbers on the CPU, and is taken only if
it gives what the op gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from aligntune.backends.fast.ops.rms_norm import CONVENTIONS, rms_norm_reference

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")


@dataclass(frozen=True)
class Family:
    """One model family.

    `norm`: the RMSNorm convention of `ops.rms_norm`. `layer`: where a decoder layer normalises: "pre" (before attention
    and MLP), "sandwich" (before and after), "post" (after only; leaves no add + norm to fuse). `attention`: "split"
    (q, k, v apart) or "packed" (one `qkv_proj`). `qk_norm`: RMSNorm on each head of q and k ("head"), on the whole row
    ("row"), or none. `attention_options`: keyword of the attention function -> the attribute that holds its value, on
    the module or, as "config.x", on its config. `mlp`: "split", "packed" (one `gate_up_proj`) or "experts".
    `optional_rope`: attribute that is false in layers without rotary embedding. `residual_scale`: attribute that
    multiplies each branch before it is added. `branch_dropouts`: dropout modules on the two branches.
    `logits_divisor`, `logits_softcap`: names in the config.
    """

    model_type: str
    title: str
    module: str
    prefix: str
    norm: str = "llama"
    layer: str = "pre"
    attention: str = "split"
    qk_norm: str | None = None
    attention_options: tuple[tuple[str, str], ...] = ()
    mlp: str = "split"
    optional_rope: str | None = None
    residual_scale: str | None = None
    branch_dropouts: tuple[str, str] | None = None
    logits_divisor: str | None = None
    logits_softcap: str | None = None


_WINDOW = (("sliding_window", "sliding_window"),)
_CONFIG_WINDOW = (("sliding_window", "config.sliding_window"),)

# fmt: off
FAMILIES: tuple[Family, ...] = (
    Family("llama", "Llama 3.x", "llama.modeling_llama", "Llama"),
    Family("mistral", "Mistral", "mistral.modeling_mistral", "Mistral", attention_options=_CONFIG_WINDOW),
    Family("qwen2", "Qwen 2, 2.5", "qwen2.modeling_qwen2", "Qwen2", attention_options=_WINDOW),
    Family("qwen3", "Qwen 3", "qwen3.modeling_qwen3", "Qwen3", qk_norm="head", attention_options=_WINDOW),
    Family("gemma2", "Gemma 2", "gemma2.modeling_gemma2", "Gemma2", norm="gemma", layer="sandwich",
           attention_options=(*_WINDOW, ("softcap", "attn_logit_softcapping")),
           logits_softcap="final_logit_softcapping"),
    Family("gemma3_text", "Gemma 3 (text)", "gemma3.modeling_gemma3", "Gemma3", norm="gemma", layer="sandwich",
           qk_norm="head", attention_options=_WINDOW, logits_softcap="final_logit_softcapping"),
    Family("phi3", "Phi-3, Phi-4", "phi3.modeling_phi3", "Phi3", attention="packed", mlp="packed",
           attention_options=_CONFIG_WINDOW, branch_dropouts=("resid_attn_dropout", "resid_mlp_dropout")),
    Family("smollm3", "SmolLM3", "smollm3.modeling_smollm3", "SmolLM3", optional_rope="use_rope",
           attention_options=_WINDOW),
    Family("granite", "Granite 3.x", "granite.modeling_granite", "Granite", residual_scale="residual_multiplier",
           logits_divisor="logits_scaling"),
    Family("olmo2", "OLMo 2", "olmo2.modeling_olmo2", "Olmo2", norm="olmo2", layer="post", qk_norm="row"),
    Family("qwen3_moe", "Qwen 3 MoE", "qwen3_moe.modeling_qwen3_moe", "Qwen3Moe", qk_norm="head", mlp="experts",
           attention_options=_WINDOW),
    Family("mixtral", "Mixtral", "mixtral.modeling_mixtral", "Mixtral", mlp="experts",
           attention_options=_CONFIG_WINDOW),
)
# fmt: on

_PARTS = {
    "RMSNorm": "norm",
    "MLP": "mlp",
    "Attention": "attention",
    "DecoderLayer": "layer",
    "SparseMoeBlock": "experts",
    "ForCausalLM": "head",
}


def _known_forwards() -> Iterator[tuple[tuple[str, str], tuple[Family, str]]]:
    for family in FAMILIES:
        for suffix, part in _PARTS.items():
            yield (
                (f"transformers.models.{family.module}", f"{family.prefix}{suffix}.forward"),
                (family, part),
            )


_BY_FORWARD = dict(_known_forwards())
_BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}


def family_of(model_type: str) -> Family | None:
    """The row of a `config.model_type`, or None for a family outside the table."""
    return _BY_MODEL_TYPE.get(model_type)


def identify(module: nn.Module) -> tuple[Family, str] | None:
    """`(family, part)` of a module whose class runs a forward of the table; None otherwise.

    Parts: "norm", "mlp", "attention", "layer", "experts", "head".
    """
    forward = type(module).forward
    return _BY_FORWARD.get((getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")))


def patched_by(module: nn.Module) -> str | None:
    """Who replaced the class's `forward`, where a module of the table runs one that is not its own; None otherwise."""
    for cls in type(module).__mro__:
        suffix = next((suffix for suffix in _PARTS if cls.__name__.endswith(suffix)), None)
        if suffix is None or (cls.__module__, f"{cls.__name__}.forward") not in _BY_FORWARD:
            continue
        forward = type(module).forward
        owner = getattr(forward, "__module__", "?")
        if owner != cls.__module__ or getattr(forward, "__qualname__", "") != f"{cls.__name__}.forward":
            return f"{owner}.{getattr(forward, '__qualname__', '?')}"
    return None


def modeling_module(module: nn.Module) -> ModuleType:
    """The transformers file that a module's forward is written in (where its module-level helpers live)."""
    import sys

    return sys.modules[type(module).forward.__module__]


# ------------------------------------------------------------------------------------------- recognition by structure


def _numbers(*shape: int, phase: float) -> torch.Tensor:
    """Fixed numbers of both signs: a probe draws nothing, so the RNG state stays as it was."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) * 0.7 + phase).sin().mul(2.0).reshape(shape)


def activation_of(act_fn: Any) -> str | None:
    """Which of `ACTIVATIONS` an activation computes, found by evaluating it; None if none of them (or if it learns)."""
    if not callable(act_fn) or (isinstance(act_fn, nn.Module) and next(act_fn.parameters(), None) is not None):
        return None
    x = torch.linspace(-6.0, 6.0, 49)
    with torch.no_grad():
        y = act_fn(x)
    return next((name for name, fn in ACTIVATIONS.items() if torch.allclose(y, fn(x), atol=2e-6, rtol=0)), None)


def activation_module(mlp: nn.Module) -> Any:
    """The activation of an MLP, under whichever name the family gives it."""
    return next((getattr(mlp, name) for name in ACTIVATION_NAMES if hasattr(mlp, name)), None)


def norm_eps(norm: nn.Module) -> float | None:
    """The epsilon of an RMSNorm, under whichever name the family gives it."""
    value = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
    return float(value) if isinstance(value, (int, float)) else None


def looks_like_rms_norm(module: nn.Module) -> bool:
    """One 1-D `weight`, no bias, no children, and the name: worth a probe."""
    names = {name for name, _ in module.named_parameters()}
    return (
        "rmsnorm" in type(module).__name__.lower()
        and names == {"weight"}
        and module.weight.dim() == 1
        and not list(module.children())
    )


def probe_norm(module: nn.Module) -> str | None:
    """The convention of an RMSNorm outside the table, or None if it computes something else.

    Runs the module's own forward, on a small CPU twin, in float32 and bfloat16: the conventions differ by where they
    round, which only the second shows.
    """
    eps = norm_eps(module)
    if eps is None:
        return None
    fits = list(CONVENTIONS)
    for dtype in (torch.float32, torch.bfloat16):
        weight = _numbers(24, phase=0.3).to(dtype)
        twin = _twin(module, parameters={"weight": weight})
        x = _numbers(5, 24, phase=1.1).to(dtype)
        y = _run(twin, x)
        if y is None or y.shape != x.shape:
            return None
        fits = [name for name in fits if torch.equal(y, rms_norm_reference(x, weight, eps=eps, convention=name))]
    return fits[0] if fits else None


def looks_like_glu(module: nn.Module) -> bool:
    """`gate_proj`, `up_proj`, `down_proj` and an activation, and nothing else with parameters: worth a probe."""
    children = {name for name, child in module.named_children() if next(child.parameters(), None) is not None}
    return children == {"gate_proj", "up_proj", "down_proj"} and activation_module(module) is not None


def probe_glu(module: nn.Module) -> bool:
    """True if an MLP outside the table computes `down(act(gate(x)) * up(x))`: its forward runs on a tiny twin."""
    shapes = {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
    linears = {name: _linear(*shape, phase=0.2 * i) for i, (name, shape) in enumerate(shapes.items())}
    x = _numbers(3, 8, phase=0.9)
    y = _run(_twin(module, children=linears), x)
    act = activation_module(module)
    with torch.no_grad():
        expected = linears["down_proj"](act(linears["gate_proj"](x)) * linears["up_proj"](x))
    return y is not None and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-6)


def _linear(out_features: int, in_features: int, *, phase: float) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False)
    linear.weight = nn.Parameter(_numbers(out_features, in_features, phase=phase) * 0.3)
    return linear


def _twin(
    module: nn.Module,
    *,
    parameters: dict[str, torch.Tensor] | None = None,
    children: dict[str, nn.Module] | None = None,
) -> nn.Module:
    """A shallow copy that runs the class's forward on other weights, without the hooks of the original."""
    twin = copy.copy(module)
    twin.__dict__ = {key: value for key, value in module.__dict__.items() if key not in ("forward", "_old_forward")}
    for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        twin.__dict__[table] = {}
    twin.__dict__["_parameters"] = {
        **module._parameters,
        **{name: nn.Parameter(value) for name, value in (parameters or {}).items()},
    }
    twin.__dict__["_modules"] = {**module._modules, **(children or {})}
    return twin


def _run(twin: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The twin's answer, or None where its forward wants something else than one tensor."""
    with torch.no_grad():
        try:
            y = type(twin).forward(twin, x)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return None
    return y if isinstance(y, torch.Tensor) else None
