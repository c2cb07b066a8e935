"""LoRA groups: torch's twin, PEFT's own modules, autocast, checkpointing, NF4 bases, what is saved and refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from aligntune.backends.fast.ops.lora import (
    Adapter,
    LoraLinear,
    lora_linear_group,
    lora_linear_group_reference,
    lora_mlp,
)
from aligntune.backends.fast.ops.nf4 import NF4Weight
from aligntune.backends.fast.ops.rms_norm import rms_norm
from aligntune.errors import ConfigError
from tests.backends.fast.ops.harness import assert_close_to_truth
from tests.backends.fast.ops.lora_cases import TOLERANCE, Maker, assert_same, gradients, run, saved_bytes


def assert_group_is_its_reference(build, device, *, zero=(), **options):
    outs, grads = run(lora_linear_group, build, device, **options)
    wanted, wanted_grads = run(lora_linear_group_reference, build, device, **options)
    for out, want in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out, want, **TOLERANCE)
        assert want.numel() == 0 or float(want.norm()) > 0
    assert_same(grads, wanted_grads, zero=zero)


# ------------------------------------------------------------------------------------------------- groups, no dropout


GROUPS = {
    "one": lambda m: [m.linear("o", 24, 40)],
    "qkv of three widths": lambda m: [m.linear(n, w, 40, bias=True) for n, w in (("q", 48), ("k", 16), ("v", 17))],
    "odd everything": lambda m: [m.linear("g", 33, 255, ranks=(7,)), m.linear("u", 33, 255, ranks=(1,))],
    "rank 64": lambda m: [m.linear("o", 70, 80, ranks=(64,))],
    "rank 65": lambda m: [m.linear("o", 70, 80, ranks=(65,))],
    "k without an adapter": lambda m: [m.linear("q", 8, 16), m.linear("k", 8, 16, ranks=()), m.linear("v", 8, 16)],
    "two adapters": lambda m: [m.linear("q", 24, 40, ranks=(4, 16)), m.linear("v", 12, 40, ranks=(3,))],
    "adapter biases": lambda m: [m.linear("q", 24, 40, adapter_bias=True), m.linear("v", 8, 40, bias=True)],
    "bias on both": lambda m: [m.linear("q", 24, 40, adapter_bias=True, bias=True, ranks=(4, 4))],
    "trainable weights": lambda m: [m.linear(n, 24, 40, bias=True, train_weight=True) for n in "qk"],
    "no adapters, trainable": lambda m: [m.linear(n, 24, 40, ranks=(), train_weight=True) for n in "qk"],
    "scaling 1": lambda m: [m.linear("o", 24, 40, scaling=1.0)],
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("rows", [(3, 5), (1,)])
def test_group(name, rows, device):
    build = GROUPS[name]
    hidden = build(Maker(device))[0].weight.shape[1]
    assert_group_is_its_reference(build, device, shape=(*rows, hidden))


def test_no_rows(device):
    build = GROUPS["qkv of three widths"]
    outs, grads = run(lora_linear_group, build, device, shape=(0, 5, 40))
    assert [tuple(out.shape) for out in outs] == [(0, 5, 48), (0, 5, 16), (0, 5, 17)]
    assert grads["x"].shape == (0, 5, 40)
    for name, shape in {"q.0.a": (4, 40), "q.0.b": (48, 4), "v.0.b": (17, 4)}.items():
        assert grads[name].shape == shape and not grads[name].any()


@pytest.mark.parametrize("skip", [(0,), (1, 2), (0, 2)])
def test_outputs_that_take_no_part(skip, device):
    assert_group_is_its_reference(GROUPS["qkv of three widths"], device, shape=(3, 5, 40), skip=skip)
    assert_group_is_its_reference(GROUPS["k without an adapter"], device, shape=(3, 5, 16), skip=skip)


def test_the_first_layers_input_needs_no_gradient(device):
    assert_group_is_its_reference(GROUPS["qkv of three widths"], device, shape=(3, 5, 40), x_grad=False)


def test_frozen_factors(device):
    def build(maker):
        q, v = maker.linear("q", 24, 40), maker.linear("v", 8, 40)
        q.adapters[0].a.requires_grad_(False)
        v.adapters[0].b.requires_grad_(False)
        return [q, v]

    assert_group_is_its_reference(build, device, shape=(6, 40))


def test_nothing_trains_but_x(device):
    def build(maker):
        layer = maker.linear("q", 24, 40)
        for leaf in maker.leaves.values():
            leaf.requires_grad_(False)
        return [layer]

    assert_group_is_its_reference(build, device, shape=(6, 40))


# ----------------------------------------------------------------------------------------------- strides, graphs, use


def test_rows_far_apart_and_expanded_gradients(device):
    def once(fn):
        maker = Maker(device)
        layers = GROUPS["qkv of three widths"](maker)
        wide = torch.randn(2, 9, 100, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
        q, k, v = fn(wide[:, 2:7, 30:70], layers)
        # Three gradients with stride 0: from a sum, from a broadcast over rows, from a broadcast over columns.
        (q.sum() + (k * torch.arange(16.0, device=device)).sum() + v.sum(-1, keepdim=True).square().sum()).backward()
        return {"x": wide.grad, **{name: leaf.grad for name, leaf in maker.leaves.items()}}

    ours = once(lora_linear_group)
    assert_same(ours, once(lora_linear_group_reference))
    assert not ours["x"][:, :2].any() and not ours["x"][:, :, 70:].any()


def test_a_transposed_input(device):
    def once(fn):
        maker = Maker(device)
        layers = GROUPS["one"](maker)
        x = torch.randn(40, 11, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
        fn(x.t(), layers)[0].square().sum().backward()
        return {"x": x.grad, **{name: leaf.grad for name, leaf in maker.leaves.items()}}

    assert_same(once(lora_linear_group), once(lora_linear_group_reference))


def test_incoming_gradients_are_not_written_to(device):
    maker = Maker(device)
    layers = GROUPS["qkv of three widths"](maker)
    x = torch.randn(6, 40, device=device, requires_grad=True)
    outs = lora_linear_group(x, layers)
    douts = [torch.randn_like(out) for out in outs]
    kept = [dout.clone() for dout in douts]
    torch.autograd.backward(outs, douts)
    assert all(torch.equal(dout, keep) for dout, keep in zip(douts, kept, strict=True))


def test_one_layer_used_twice_and_retained_graphs(device):
    def once(fn):
        maker = Maker(device)
        layers = [maker.linear("o", 40, 40, train_weight=True)]
        x = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
        y = fn(fn(x, layers)[0], layers)[0].square().sum()
        y.backward(retain_graph=True)
        y.backward()
        return {"x": x.grad, **{name: leaf.grad for name, leaf in maker.leaves.items()}}

    assert_same(once(lora_linear_group), once(lora_linear_group_reference))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, device):
    def once(recompute):
        maker = Maker(device)
        layers = GROUPS["qkv of three widths"](maker)
        x = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
        if recompute:
            outs = checkpoint(lambda y: lora_linear_group(y, layers), x, use_reentrant=reentrant)
        else:
            outs = lora_linear_group(x, layers)
        return gradients(outs, maker, x)

    for (name, plain), again in zip(once(False).items(), once(True).values(), strict=True):
        assert plain is None and again is None or torch.equal(plain, again), name


def test_saves_its_input_and_three_ranks(device):
    maker = Maker(device)
    layers = GROUPS["qkv of three widths"](maker)
    x = torch.randn(64, 40, device=device, requires_grad=True)
    leaves = [*maker.leaves.values(), x]
    # S: 3 adapters, ranks padded to 16, 4 bytes; and the padded A, which are copies.
    assert saved_bytes(lambda: lora_linear_group(x, layers), not_counting=leaves) == (64 + 40) * 3 * 16 * 4
    # The input is saved, and by one reference: without it in the list its bytes appear once.
    assert saved_bytes(lambda: lora_linear_group(x, layers), not_counting=leaves[:-1]) == (
        64 * (3 * 16 + 40) + 40 * 3 * 16) * 4


@pytest.mark.parametrize("frozen", [False, True], ids=["x trains", "x frozen"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("what", ["group", "mlp"])
def test_an_input_that_a_norm_made_is_not_kept_but_made_again(what, autocast, frozen, device):
    """Of what the norm keeps; the same bits as with the input kept. A frozen x is what the first layer sees."""
    rows, hidden = 64, 40

    def call(maker, y):
        layers = ([maker.linear("q", 48, hidden), maker.linear("k", 16, hidden)] if what == "group" else
                  [maker.linear("gate", 56, hidden), maker.linear("up", 56, hidden), maker.linear("down", hidden, 56)])
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            return lora_linear_group(y, layers) if what == "group" else (lora_mlp(y, *layers),)

    def once(kept):
        maker, weight = Maker(device), torch.full((hidden,), 1.25, device=device)
        x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_(not frozen)
        y, h = rms_norm(x, weight, eps=1e-5, keep=True)
        assert y.requires_grad is not frozen
        y = y.view_as(y) if kept else y
        outs = []
        known = [y, h, weight]
        size = saved_bytes(lambda: outs.extend(call(maker, y)), not_counting=known)
        outs = [out.float() for out in outs]
        return gradients(outs if frozen else (*outs, h), maker, x), size

    (again, size), (kept, wanted) = once(False), once(True)
    assert_same(again, kept, zero=("q.weight", "k.weight"), tolerance={"rtol": 0, "atol": 0})
    trained = {name for name in again if name.endswith((".a", ".b"))} | (set() if frozen else {"x"})
    assert len(trained) > 3 and all(again[name].norm() > 0 for name in trained)
    # rstd, 4 bytes a row, which the norm keeps too, in the place of what autocast made of y.
    assert size - wanted == rows * (4 - (hidden * 2 if autocast else 0)), (size, wanted)


def test_what_nothing_trains_on_is_not_kept(device):
    maker = Maker(device)
    frozen, x = maker.linear("q", 48, 40, ranks=()), torch.randn(64, 40, device=device, requires_grad=True)
    assert saved_bytes(lambda: lora_linear_group(x, [frozen]), not_counting=maker.leaves.values()) == 0
    (out,) = lora_linear_group(x, [frozen])
    out.sum().backward()
    torch.testing.assert_close(x.grad, frozen.weight.sum(0).expand(64, 40))
    # Of an MLP the input alone: what its down layer learns from is made of gate and up.
    gate, up, down = (maker.linear(n, *shape, ranks=r) for n, shape, r in (
        ("gate", (56, 40), ()), ("up", (56, 40), ()), ("down", (40, 56), (4,))))
    known = [*maker.leaves.values()]
    size = saved_bytes(lambda: lora_mlp(x, gate, up, down), not_counting=known)
    assert size == (64 * (2 * 56 + 16) + 56 * 16) * 4


# --------------------------------------------------------------------------------------------------------------- PEFT


def peft_model(*, dtype=torch.float32, seed=0, bias=False, hidden=40, **options):
    """A PEFT model over three linears on one input, B drawn N(0, 0.02): at PEFT's own zero no A has a gradient."""
    peft = pytest.importorskip("peft")

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, width in (("q_proj", hidden + 8), ("k_proj", 16), ("v_proj", 16)):
                self.add_module(name, torch.nn.Linear(hidden, width, bias=bias))

        def forward(self, x):
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"], **options)
    model = peft.get_peft_model(Attention().to(dtype), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return model


def linears_of(model) -> list[LoraLinear]:
    layers = []
    for name in ("q_proj", "k_proj", "v_proj"):
        module = getattr(model.base_model.model, name)
        adapters = tuple(
            Adapter(
                module.lora_A[key].weight,
                module.lora_B[key].weight,
                module.scaling[key],
                module.lora_B[key].bias,
                getattr(module.lora_dropout[key], "p", 0.0) if module.training else 0.0,
            )
            for key in module.active_adapters
        )
        base = module.base_layer
        quantised = hasattr(base.weight, "quant_state")
        weight = NF4Weight.from_param(base.weight) if quantised else base.weight
        layers.append(LoraLinear(weight, base.bias, adapters))
    return layers


def peft_run(model, x, device, *, ours: bool, autocast=None):
    x = x.clone().to(device).requires_grad_()
    with torch.autocast(torch.device(device).type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        outs = lora_linear_group(x, linears_of(model)) if ours else model(x)
    generator = torch.Generator().manual_seed(4)
    douts = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
    torch.autograd.backward(outs, douts)
    grads = {"x": x.grad, **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}
    model.zero_grad()
    return [out.detach() for out in outs], grads


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_bias": True, "bias": True}, {"lora_dropout": 0.5}], ids=str
)
def test_equals_peft(options, device):
    model = peft_model(**options).to(device).eval()  # eval: PEFT's dropout draws other masks than ours
    if options.get("use_rslora"):
        assert linears_of(model)[0].adapters[0].scaling == pytest.approx(16 / 8**0.5)
    x = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(1))
    theirs, their_grads = peft_run(model, x, device, ours=False)
    outs, grads = peft_run(model, x, device, ours=True)
    for out, wanted in zip(outs, theirs, strict=True):
        torch.testing.assert_close(out, wanted, **TOLERANCE)
    assert len(their_grads) == (10 if options.get("lora_bias") else 7)
    assert_same(grads, their_grads)


def test_two_active_peft_adapters(device):
    peft = pytest.importorskip("peft")
    model = peft_model()
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model = model.to(device)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    for name in ("k_proj", "v_proj"):
        getattr(model.base_model.model, name)._active_adapter = ["default"]
    theirs, their_grads = peft_run(model, x, device, ours=False)
    outs, grads = peft_run(model, x, device, ours=True)
    torch.testing.assert_close(outs[0], theirs[0], **TOLERANCE)
    assert any("second" in name for name in their_grads)
    assert_same(grads, their_grads)


def assert_rounds_no_worse(model, truth_model, x, device, *, autocast):
    """Outputs and gradients in 16 bits against PEFT's own, both judged by fp64."""
    truths, truth_grads = peft_run(truth_model.double(), x.double(), device, ours=False)
    theirs, their_grads = peft_run(model, x, device, ours=False, autocast=autocast)
    outs, grads = peft_run(model, x, device, ours=True, autocast=autocast)
    for i, (out, eager, truth) in enumerate(zip(outs, theirs, truths, strict=True)):
        assert_close_to_truth(out, eager, truth, what=f"output {i}")
    for name, truth in truth_grads.items():
        assert_close_to_truth(grads[name], their_grads[name], truth, what=name)


@pytest.mark.parametrize("under_autocast", [True, False])
def test_bf16_is_as_close_to_the_truth_as_peft(under_autocast, device):
    # The op itself holds no Triton kernel here, so bf16 means the same on the CPU.
    model = peft_model(dtype=torch.bfloat16).to(device)
    truth = peft_model(dtype=torch.bfloat16).to(device)
    assert next(p for n, p in model.named_parameters() if "lora_A" in n).dtype == torch.float32
    with torch.no_grad():  # an update as large as it gets: half the base product
        for one in (model, truth):
            for name, parameter in one.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(8)
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert_rounds_no_worse(model, truth, x, device, autocast=torch.bfloat16 if under_autocast else None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("under_autocast", [True, False])
def test_16_bits_on_the_gpu(dtype, under_autocast):
    for number in range(3):
        model, truth = (peft_model(dtype=dtype, seed=number, hidden=1024).to("cuda") for _ in range(2))
        x = torch.randn(1000, 1024, generator=torch.Generator().manual_seed(number)).to(dtype)
        assert_rounds_no_worse(model, truth, x, "cuda", autocast=dtype if under_autocast else None)


def test_autocast_of_an_fp32_model(device):
    model, truth = peft_model().to(device), peft_model().to(device)
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(1))
    assert_rounds_no_worse(model, truth, x, device, autocast=torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        outs = lora_linear_group(x.to(device), linears_of(model))
    assert [out.dtype for out in outs] == [torch.bfloat16] * 3


# ---------------------------------------------------------------------------------------------------------------- NF4


def test_nf4_bases(device):
    bnb = pytest.importorskip("bitsandbytes")
    model = peft_model(dtype=torch.float32)
    for name in ("q_proj", "k_proj", "v_proj"):
        module = getattr(model.base_model.model, name)
        quantised = bnb.nn.Linear4bit(40, module.out_features, False, torch.float32, quant_type="nf4")
        quantised.weight.data = module.base_layer.weight.data
        module.base_layer = quantised.to(device)
    model = model.to(device).train()
    x = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(1))
    # PEFT's module over the same weight, dequantised: bitsandbytes' own matmul differs from device to device.
    plain = linears_of(model)
    state = [one.weight for one in plain]
    assert all(isinstance(weight, NF4Weight) for weight in state)
    outs, grads = peft_run(model, x, device, ours=True)
    theirs, their_grads = peft_run(model, x, device, ours=False)
    for out, wanted in zip(outs, theirs, strict=True):
        torch.testing.assert_close(out, wanted, **TOLERANCE)
    assert_same(grads, their_grads)
    # Computing in 16 bits below an fp32 input, as Linear4bit does: the result comes back in the input's dtype.
    out = lora_linear_group(x.to(device), plain, compute_dtype=torch.float16)[0]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, theirs[0], rtol=2e-2, atol=2e-3)
    assert not torch.equal(out, theirs[0])


# ----------------------------------------------------------------------------------------------------------- refusals


def test_what_it_refuses(device):
    maker = Maker(device)
    good = maker.linear("o", 24, 40, bias=True)
    adapter = good.adapters[0]
    x = torch.randn(5, 40, device=device)
    broken = {
        "no linear layer": [],
        "x has 40 features": [good._replace(weight=torch.zeros(24, 39, device=device))],
        "bias": [good._replace(bias=torch.zeros(23, device=device))],
        "factors": [good._replace(adapters=(adapter._replace(b=adapter.b[:, :3]),))],
        "adapter bias": [good._replace(adapters=(adapter._replace(bias=torch.zeros(3, device=device)),))],
        "not a probability": [good._replace(adapters=(adapter._replace(dropout=1.5),))],
        "cast one": [good._replace(weight=good.weight.bfloat16())],
    }
    for message, layers in broken.items():
        for fn in (lora_linear_group, lora_linear_group_reference):
            with pytest.raises(ConfigError, match=message):
                fn(x, layers)
    faults = [good._replace(bias=torch.zeros(23, device=device), adapters=(adapter._replace(dropout=-0.1),))]
    with pytest.raises(ConfigError) as caught:
        lora_linear_group(x, faults)
    assert len(caught.value.faults) == 2
