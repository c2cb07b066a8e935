"""The LoRA MLP: torch's twin, PEFT on transformers' own MLP, in-place backward, saved bytes, NF4, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from aligntune.backends.fast.ops import lora
from aligntune.backends.fast.ops.lora import Adapter, LoraLinear, lora_mlp, lora_mlp_reference
from aligntune.backends.fast.ops.nf4 import NF4Weight
from aligntune.errors import ConfigError
from tests.backends.fast.ops.harness import assert_close_to_truth
from tests.backends.fast.ops.lora_cases import TOLERANCE, Maker, assert_same, gradients, run, saved_bytes


def layers(maker: Maker, *, h=24, f=40, packed=False, **options) -> list[LoraLinear | None]:
    wide = [maker.linear("gate", 2 * f if packed else f, h, **options)]
    wide.append(None if packed else maker.linear("up", f, h, **options))
    return [*wide, maker.linear("down", h, f, **options)]


CASES = {
    "plain": {},
    "odd": {"h": 255, "f": 33, "ranks": (7,)},
    "rank 1 with biases": {"ranks": (1,), "bias": True, "adapter_bias": True},
    "packed gate and up": {"packed": True},
    "packed, odd": {"packed": True, "f": 33},
    "trainable weights": {"train_weight": True, "bias": True},
    "no adapters, trainable": {"ranks": (), "train_weight": True},
    "two adapters": {"ranks": (4, 3)},
    "too large a rank for the GLU": {"ranks": (65,)},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_mlp(name, activation, device):
    options = CASES[name]

    def build(maker):
        return layers(maker, **options)

    shape = (2, 3, options.get("h", 24))
    (out,), grads = run(lora_mlp, build, device, shape=shape, activation=activation)
    (wanted,), wanted_grads = run(lora_mlp_reference, build, device, shape=shape, activation=activation)
    assert float(wanted.norm()) > 0
    torch.testing.assert_close(out, wanted, **TOLERANCE)
    assert_same(grads, wanted_grads)


def test_no_rows_and_no_gradient_of_x(device):
    (out,), grads = run(lora_mlp, layers, device, shape=(0, 24))
    assert out.shape == (0, 24) and not grads["gate.0.a"].any()
    (_,), grads = run(lora_mlp, layers, device, shape=(5, 24), x_grad=False)
    (_,), wanted = run(lora_mlp_reference, layers, device, shape=(5, 24), x_grad=False)
    assert grads["x"] is None
    assert_same(grads, wanted)


@pytest.mark.parametrize("trains", ["gate", "down", "x"])
def test_one_layer_trains(trains, device):
    def build(maker):
        made = layers(maker)
        for name, leaf in maker.leaves.items():
            leaf.requires_grad_(name.startswith(f"{trains}.0"))
        return made

    options = {"shape": (5, 24), "x_grad": trains == "x"}
    _, grads = run(lora_mlp, build, device, **options)
    _, wanted = run(lora_mlp_reference, build, device, **options)
    assert sum(grad is not None for grad in wanted.values()) == (1 if trains == "x" else 2)
    assert_same(grads, wanted)


def test_strides_and_stride_0_gradients(device):
    def once(fn):
        maker = Maker(device)
        made = layers(maker)
        wide = torch.randn(2, 9, 60, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
        fn(wide[:, 2:7, 30:54], *made).sum().backward()
        return {"x": wide.grad, **{name: leaf.grad for name, leaf in maker.leaves.items()}}

    assert_same(once(lora_mlp), once(lora_mlp_reference))


def test_the_glu_adds_what_one_adapter_a_layer_adds(monkeypatch, device):
    """And what it cannot add (two adapters, dropout before down's, a rank too large) is added apart."""
    seen = []
    for name in ("glu_forward_", "glu_backward_"):
        real = getattr(lora, name)

        def spy(*args, real=real, **kwargs):
            seen.append([key for key in ("gate_update", "up_update", "dy_update") if kwargs.get(key) is not None])
            return real(*args, **kwargs)

        monkeypatch.setattr(lora, name, spy)

    def updates(**options):
        seen.clear()
        run(lora_mlp, lambda maker: layers(maker, **options), device, shape=(5, 24))
        return seen

    both = ["gate_update", "up_update"]
    assert updates() == updates(packed=True) == [both, [*both, "dy_update"]]
    assert updates(p=0.5) == [both, both]
    assert updates(ranks=(4, 3)) == updates(ranks=(65,)) == updates(ranks=(), train_weight=True) == [[], []]


def test_a_second_backward_is_refused_not_wrong(device):
    maker = Maker(device)
    x = torch.randn(5, 24, device=device, requires_grad=True)
    y = lora_mlp(x, *layers(maker)).square().sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, device):
    maker = Maker(device)
    made = layers(maker)
    x = torch.randn((5, 24), generator=torch.Generator().manual_seed(5)).to(device).requires_grad_()
    recomputed = gradients((checkpoint(lambda y: lora_mlp(y, *made), x, use_reentrant=reentrant),), maker, x)
    _, plain = run(lora_mlp, layers, device, shape=(5, 24))
    for name, wanted in plain.items():
        assert wanted is None and recomputed[name] is None or torch.equal(wanted, recomputed[name]), name


def test_saves_4f_a_token(device):
    maker = Maker(device)
    made = layers(maker, h=24, f=40)
    x = torch.randn(64, 24, device=device, requires_grad=True)
    leaves = [*maker.leaves.values(), x]
    # gate and up, and S: three adapters, ranks padded to 16; 4 bytes each. The padded A are copies.
    factors = 4 * 16 * (2 * 24 + 40)
    assert saved_bytes(lambda: lora_mlp(x, *made), not_counting=leaves) == 64 * 4 * (2 * 40 + 3 * 16) + factors
    eager = saved_bytes(lambda: lora_mlp_reference(x, *made), not_counting=leaves)
    assert eager > 64 * 4 * (4 * 40)


def test_backward_allocates_no_third_buffer(device):
    # What the backward writes over: gate, up, and the one buffer of the product's gradient.
    maker = Maker(device)
    made = layers(maker)
    x = torch.randn(5, 24, device=device, requires_grad=True)
    kept = []

    def pack(tensor):
        if tensor.shape == (5, 40):
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = lora_mlp(x, *made)
    before = [tensor.clone() for tensor in kept]
    y.sum().backward()
    assert len(kept) == 2
    # They hold dgate and dup now.
    assert all(not torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    up_grad = kept[1].t() @ x.detach()
    wanted = made[1].adapters[0].scaling * made[1].adapters[0].b.detach().t() @ up_grad
    torch.testing.assert_close(made[1].adapters[0].a.grad, wanted, **TOLERANCE)


# ---------------------------------------------------------------------------------------- PEFT over transformers' MLP


def peft_mlp(dtype=torch.float32, hidden=48, **options):
    peft = pytest.importorskip("peft")
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=2 * hidden, num_attention_heads=2)).to(dtype)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["gate_proj", "up_proj", "down_proj"], **options)
    model = peft.get_peft_model(mlp, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return model


def linear_of(module) -> LoraLinear:
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    base = module.base_layer.weight
    weight = NF4Weight.from_param(base) if hasattr(base, "quant_state") else base
    return LoraLinear(weight, module.base_layer.bias, (Adapter(a, b, module.scaling["default"]),))


def peft_run(model, x, device, *, ours, autocast=None):
    x = x.clone().to(device).requires_grad_()
    with torch.autocast(torch.device(device).type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        if ours:
            mlp = model.base_model.model
            out = lora_mlp(x, *(linear_of(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down")))
        else:
            out = model(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out))
    grads = {"x": x.grad, **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}
    model.zero_grad()
    return out.detach(), grads


def test_equals_peft_on_llamas_mlp(device):
    model = peft_mlp().to(device)
    x = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1))
    wanted, their_grads = peft_run(model, x, device, ours=False)
    out, grads = peft_run(model, x, device, ours=True)
    torch.testing.assert_close(out, wanted, **TOLERANCE)
    assert len(their_grads) == 7
    assert_same(grads, their_grads)


def test_nf4(device):
    bnb = pytest.importorskip("bitsandbytes")
    # bitsandbytes' AVX-512 CPU kernel mistakes rows that are no multiple of the block size, 64.
    model = peft_mlp(hidden=64)
    for name in ("gate_proj", "up_proj", "down_proj"):
        module = getattr(model.base_model.model, name)
        quantised = bnb.nn.Linear4bit(module.in_features, module.out_features, False, torch.float32, quant_type="nf4")
        quantised.weight.data = module.base_layer.weight.data
        module.base_layer = quantised.to(device)
    model = model.to(device).train()
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1))
    wanted, their_grads = peft_run(model, x, device, ours=False)
    out, grads = peft_run(model, x, device, ours=True)
    torch.testing.assert_close(out, wanted, **TOLERANCE)
    assert_same(grads, their_grads)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_16_bits_against_the_truth(dtype, autocast, device):
    autocast = dtype if autocast else None
    model, truth_model = peft_mlp(dtype).to(device), peft_mlp(dtype).to(device)
    x = torch.randn(512, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth, truth_grads = peft_run(truth_model.double(), x.double(), device, ours=False)
    eager, eager_grads = peft_run(model, x, device, ours=False, autocast=autocast)
    out, grads = peft_run(model, x, device, ours=True, autocast=autocast)
    assert_close_to_truth(out, eager, truth)
    for name, wanted in truth_grads.items():
        assert_close_to_truth(grads[name], eager_grads[name], wanted, what=name)


def test_what_it_refuses(device):
    maker = Maker(device)
    gate, up, down = layers(maker)
    x = torch.randn(5, 24, device=device)
    with pytest.raises(ConfigError, match="relu2"):
        lora_mlp(x, gate, up, down, activation="relu2")
    with pytest.raises(ConfigError, match="make .40, 8. features"):
        lora_mlp(x, gate, maker.linear("small", 8, 24), down)
    with pytest.raises(ConfigError, match="down"):
        lora_mlp(x, gate, up, maker.linear("wrong", 24, 41))
    with pytest.raises(ConfigError, match="make .41. features"):
        lora_mlp(x, maker.linear("packed", 41, 24), None, down)
    with pytest.raises(ConfigError, match="cast one"):
        lora_mlp(x, gate, up, down._replace(weight=down.weight.bfloat16()))
