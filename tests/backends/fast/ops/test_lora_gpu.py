"""LoRA groups and the MLP on the card: every kind of group in half precision, over plain and over NF4 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aligntune.backends.fast.ops.lora import (
    lora_linear_group,
    lora_linear_group_reference,
    lora_mlp,
    lora_mlp_reference,
)
from aligntune.backends.fast.ops.nf4 import NF4Weight, dequantize_nf4_reference
from tests.backends.fast.ops.harness import assert_close_to_truth
from tests.backends.fast.ops.lora_cases import Maker

pytestmark = pytest.mark.gpu
HALF = [torch.bfloat16, torch.float16]
ROWS, WIDTH = 300, 256

GROUPS: dict[str, Callable[[Maker], list[Any]]] = {
    "qkv": lambda m: [m.linear(n, w, WIDTH, bias=True, ranks=(16,)) for n, w in (("q", 256), ("k", 64), ("v", 64))],
    "gate-up": lambda m: [m.linear(n, 520, WIDTH, ranks=(8,)) for n in ("gate", "up")],
    "o": lambda m: [m.linear("o", WIDTH, WIDTH, ranks=(64,))],
    "rsLoRA": lambda m: [m.linear("o", WIDTH, WIDTH, ranks=(16,), scaling=32 / 16**0.5)],
    "biases of adapters": lambda m: [m.linear(n, 64, WIDTH, ranks=(4,), adapter_bias=True, bias=True) for n in "qv"],
    "two adapters": lambda m: [m.linear("q", 64, WIDTH, ranks=(4, 16)), m.linear("v", 64, WIDTH, ranks=())],
    "weights that train": lambda m: [m.linear(n, 64, WIDTH, ranks=(8,), bias=True, train_weight=True) for n in "qk"],
    "odd": lambda m: [m.linear("q", 33, 255, ranks=(7,)), m.linear("k", 17, 255, ranks=(1,))],
}


def mlp(maker: Maker, *, packed: bool = False, width: int = 520, **options: Any) -> list[Any]:
    wide = [maker.linear("gate", 2 * width if packed else width, WIDTH, **options)]
    wide.append(None if packed else maker.linear("up", width, WIDTH, **options))
    return [*wide, maker.linear("down", WIDTH, width, **options)]


MLPS: dict[str, dict[str, Any]] = {
    "plain": {"ranks": (16,)},
    "packed": {"ranks": (16,), "packed": True},
    "odd": {"ranks": (7,), "width": 255},
    "biases": {"ranks": (4,), "bias": True, "adapter_bias": True},
    "two adapters": {"ranks": (4, 3)},
    "weights that train": {"ranks": (), "train_weight": True},
}


def gradients(
    fn: Any, build: Any, dtype: torch.dtype, device: str, *, wide: bool, nf4: bool, seed: int, **options: Any
) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name, of fp32 adapters over weights in `dtype`; `wide`: the same numbers in float64."""
    low = Maker(device, seed=seed, weight_dtype=dtype)
    layers, maker = build(low), low
    if nf4:
        layers = [None if one is None else one._replace(weight=quantised(one.weight)) for one in layers]
    if wide:
        weights = [None if one is None else one.weight for one in layers]
        maker = Maker(device, dtype=torch.float64)
        layers = build(maker)
        with torch.no_grad():
            for name, leaf in maker.leaves.items():
                leaf.copy_(low.leaves[name])
        if nf4:
            layers = [one and one._replace(weight=dequantize_nf4_reference(weight, dtype=torch.float32).double())
                      for one, weight in zip(layers, weights, strict=True)]  # fmt: skip
    generator = torch.Generator().manual_seed(seed + 1)
    hidden = 255 if "odd" in options.pop("name") and fn in (lora_linear_group, lora_linear_group_reference) else WIDTH
    x = torch.randn(ROWS, hidden, generator=generator).to(device, dtype)
    x = (x.double() if wide else x).requires_grad_()
    outs = fn(x, *layers, **options) if fn in (lora_mlp, lora_mlp_reference) else fn(x, layers, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    drawn = [torch.randn(out.shape, generator=generator).to(device, dtype).to(out.dtype) for out in outs]
    torch.autograd.backward(outs, drawn)
    trained = {name: leaf.grad for name, leaf in maker.leaves.items() if leaf.grad is not None}
    return {f"output {i}": out.detach() for i, out in enumerate(outs)} | {"x": x.grad} | trained


def quantised(weight: torch.Tensor) -> NF4Weight:
    bnb = pytest.importorskip("bitsandbytes")
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return NF4Weight.from_param(type("Param", (), {"data": packed, "quant_state": state}))


def compare(ours: Any, reference: Any, build: Any, dtype: torch.dtype, device: str, **options: Any) -> None:
    options = {"nf4": False, "seed": torch.seed() % 2**31, **options}
    truth = gradients(reference, build, dtype, device, wide=True, **options)
    eager = gradients(reference, build, dtype, device, wide=False, **options)
    found = gradients(ours, build, dtype, device, wide=False, **options)
    assert found.keys() == eager.keys() == truth.keys() and len(truth) > 3
    what = f"{options['name']}, seed {options['seed']}"
    for name, wanted in truth.items():
        assert_close_to_truth(found[name], eager[name], wanted, what=f"{what}: {name}")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", GROUPS)
def test_groups_against_the_truth(name, dtype, device):
    compare(lora_linear_group, lora_linear_group_reference, GROUPS[name], dtype, device, name=name)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("name", MLPS)
def test_mlps_against_the_truth(name, activation, dtype, device):
    compare(lora_mlp, lora_mlp_reference, lambda maker: mlp(maker, **MLPS[name]), dtype, device, name=name,
            activation=activation)  # fmt: skip


@pytest.mark.parametrize("dtype", HALF)
def test_nf4_weights_against_the_truth(dtype, device):
    """The truth multiplies by the numbers that the four bits stand for, in float64."""
    for name in ("qkv", "o"):
        compare(lora_linear_group, lora_linear_group_reference, GROUPS[name], dtype, device, name=name, nf4=True)
    compare(lora_mlp, lora_mlp_reference, lambda maker: mlp(maker, ranks=(16,)), dtype, device, name="mlp", nf4=True)
