"""The table names classes and attributes that exist; outside it, structure is recognised by what a module computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from aligntune.backends.fast import families
from aligntune.backends.fast.families import FAMILIES
from tests.backends.fast.minis import MINIS, build

FAMILY = {family.model_type: family for family in FAMILIES}


def parts(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for module in model.modules():
        known = families.identify(module)
        if known is not None:
            found[known[1]] = found.get(known[1], 0) + 1
    return found


def test_there_is_a_mini_model_for_every_row():
    assert set(MINIS) == set(FAMILY)


# norms: 2 a layer and the last, 4 a layer in sandwiches; q and k norms are 2 a layer more.
NORMS = {"qwen3": 9, "gemma2": 9, "gemma3_text": 13, "olmo2": 9, "qwen3_moe": 9}


@pytest.mark.parametrize("name", MINIS)
def test_every_part_of_a_family_is_found_and_every_named_attribute_exists(name):
    model, family = build(name), FAMILY[name]
    assert families.family_of(model.config.model_type) is family
    found = parts(model)
    assert found.pop("norm") == NORMS.get(name, 5)
    mlps = {"qwen3_moe": (1, 1), "mixtral": (0, 2)}.get(name, (2, 0))
    assert (found.pop("mlp", 0), found.pop("experts", 0)) == mlps
    assert found == {"attention": 2, "layer": 2, "head": 1}
    layer = model.model.layers[0]
    for _, path in family.attention_options:
        owner = layer.self_attn.config if path.startswith("config.") else layer.self_attn
        assert hasattr(owner, path.rpartition(".")[2])
    assert hasattr(families.modeling_module(layer.self_attn), "eager_attention_forward")
    for attribute in (family.residual_scale, *(family.branch_dropouts or ())):
        assert attribute is None or hasattr(layer, attribute)
    assert family.optional_rope is None or hasattr(layer.self_attn, family.optional_rope)
    for attribute in (family.logits_divisor, family.logits_softcap):
        assert attribute is None or hasattr(model.config, attribute)
    assert (family.qk_norm is not None) == hasattr(layer.self_attn, "q_norm")
    assert (family.attention == "packed") == hasattr(layer.self_attn, "qkv_proj")


@pytest.mark.parametrize("name", MINIS)
def test_the_convention_in_the_table_is_what_the_norm_computes(name):
    norm = build(name).model.norm
    assert families.probe_norm(norm) == FAMILY[name].norm


def test_a_subclass_is_its_parent_until_it_overrides_forward():
    class Same(LlamaRMSNorm):
        pass

    class Other(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    assert families.identify(Same(8)) == (FAMILY["llama"], "norm")
    assert families.identify(Other(8)) is None
    assert "Other.forward" in (families.patched_by(Other(8)) or "")
    assert families.patched_by(Same(8)) is None


def test_a_class_patched_by_another_library_is_seen(monkeypatch):
    def lce_forward(self, hidden_states):
        return hidden_states

    monkeypatch.setattr(LlamaRMSNorm, "forward", lce_forward)
    assert families.identify(LlamaRMSNorm(8)) is None
    assert families.patched_by(LlamaRMSNorm(8)).endswith("lce_forward")


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("relu2", None),
        ("quick_gelu", None),
        ("relu", None),
        ("linear", None),
        ("xielu", None),
        ("prelu", None),
    ],
)
def test_activations_are_told_apart_by_their_values(name, kernel):
    assert families.activation_of(ACT2FN[name]) == kernel


class OwnRMSNorm(nn.Module):
    """Someone's RMSNorm: `how` picks the arithmetic."""

    def __init__(self, how: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(40))
        self.eps = 1e-5
        self.how = how

    def forward(self, x):
        wide = x.float()
        if self.how == "centred":
            wide = wide - wide.mean(-1, keepdim=True)
        n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.how == "outside":
            n = wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)
        if self.how == "gemma":
            return (n * (1 + self.weight.float())).to(x.dtype)
        if self.how == "llama":
            return self.weight * n.to(x.dtype)
        return (self.weight * n).to(x.dtype)


@pytest.mark.parametrize(
    ("how", "convention"),
    [("llama", "llama"), ("gemma", "gemma"), ("olmo2", "olmo2"), ("centred", None), ("outside", None)],
)
def test_an_unknown_norm_is_recognised_by_what_it_computes(how, convention):
    norm = OwnRMSNorm(how)
    assert families.looks_like_rms_norm(norm)
    assert families.probe_norm(norm) == convention


class OwnMLP(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(20, 30), nn.Linear(20, 30)
        self.down_proj, self.act_fn = nn.Linear(30, 20), nn.SiLU()
        self.how = how

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.how == "swapped":
            gate, up = up, gate
        if self.how == "shifted":
            up = up + 1
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize(("how", "taken"), [("same", True), ("swapped", False), ("shifted", False)])
def test_an_unknown_mlp_is_recognised_by_what_it_computes(how, taken):
    mlp = OwnMLP(how)
    assert families.looks_like_glu(mlp)
    assert families.probe_glu(mlp) is taken


def test_a_probe_runs_no_hook_draws_nothing_and_leaves_the_module_alone():
    mlp, norm = OwnMLP("same"), OwnRMSNorm("llama")
    calls: list[int] = []
    mlp.register_forward_hook(lambda *_: calls.append(1))
    mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    before = {name: (p, p.clone()) for name, p in [*mlp.named_parameters(), *norm.named_parameters()]}
    state = torch.get_rng_state()
    assert families.probe_glu(mlp) and families.probe_norm(norm) == "llama"
    assert torch.equal(torch.get_rng_state(), state)
    assert not calls
    for name, parameter in [*mlp.named_parameters(), *norm.named_parameters()]:
        assert before[name][0] is parameter and torch.equal(before[name][1], parameter)
    assert mlp(torch.ones(1, 20)).shape == (1, 20) and len(calls) == 2


def test_what_does_not_look_like_it_is_not_probed():
    assert not families.looks_like_rms_norm(nn.LayerNorm(8))
    assert not families.looks_like_glu(nn.Linear(8, 8))
    extra = OwnMLP("same")
    extra.bias_proj = nn.Linear(2, 2)
    assert not families.looks_like_glu(extra)
    assert families.norm_eps(nn.Identity()) is None


def test_the_llama_mlp_is_down_of_act_gate_times_up():
    mlp = build("llama").model.layers[0].mlp
    assert isinstance(mlp, LlamaMLP)
    x = torch.randn(3, 44)
    expected = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert torch.equal(mlp(x), expected) and families.probe_glu(mlp)
