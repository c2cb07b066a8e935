"""LoRA layers whose gradient is read once for dS and dB: as two products, but for the order of sums."""

from __future__ import annotations

import pytest
import torch

from aligntune.backends.fast.ops import _lora_core
from aligntune.backends.fast.ops.lora import lora_linear_group, lora_mlp
from tests.backends.fast.ops.harness import launches, relative_error
from tests.backends.fast.ops.lora_cases import Maker, gradients

MASTERS = {"dtype": torch.float32, "weight_dtype": torch.bfloat16}
PARTS = "lora_up_parts_kernel"


def group(device, *, skip=(), ranks=((4,), (4, 3), (), (16,)), frozen=(), **options):
    """Gradients of four layers on one input, and how many were read once."""
    maker = Maker(device, **MASTERS)
    x = maker.tensor("x.own", 37, 24, dtype=torch.bfloat16)
    widths = zip((40, 9, 16, 33), ranks, strict=True)
    linears = [maker.linear(f"l{i}", n, 24, ranks=r, **options) for i, (n, r) in enumerate(widths)]
    for name in frozen:
        maker.leaves[name].requires_grad_(False)
    found = {}

    def run():
        torch.manual_seed(3)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            outs = lora_linear_group(x, linears)
        found.update(gradients(outs, maker, x, skip=skip))

    return found, launches(run).get(PARTS, 0)


def mlp(device, **options):
    maker = Maker(device, **MASTERS)
    x = maker.tensor("x.own", 37, 24, dtype=torch.bfloat16)
    gate, up, down = (maker.linear(name, n, h, **options) for name, n, h in
                      (("gate", 48, 24), ("up", 48, 24), ("down", 24, 48)))  # fmt: skip
    found = {}

    def run():
        torch.manual_seed(3)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            out = lora_mlp(x, gate, up, down)
        found.update(gradients([out], maker, x))

    return found, launches(run).get(PARTS, 0)


CASES = {
    "group": (group, {}, 4),
    "an output that took no part": (group, {"skip": (1,)}, 2),
    "B that does not train": (group, {"frozen": ("l0.0.b", "l1.1.b")}, 2),
    "dropout": (group, {"p": 0.4}, 4),
    "biases of adapters": (group, {"adapter_bias": True}, 4),
    "mlp": (mlp, {}, 3),
    "mlp, dropout": (mlp, {"p": 0.4}, 3),
    "mlp, two adapters": (mlp, {"ranks": (4, 2)}, 6),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients(case, device, monkeypatch):
    make, options, times = CASES[case]
    theirs, none = make(device, **options)
    monkeypatch.setattr(_lora_core, "READ_ONCE_FROM", 0)
    ours, read = make(device, **options)
    assert (none, read) == (0, times) and ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        if wanted is None:
            assert ours[name] is None, name
            continue
        assert ours[name].dtype == wanted.dtype and float(wanted.norm()) > 0
        assert relative_error(ours[name], wanted) < 2**-7, name  # the interpreter truncates


def test_what_is_read_twice_all_the_same(device, monkeypatch):
    """Layers in fp32, ranks beyond the launch's, and what is too little to gain by it."""
    monkeypatch.setattr(_lora_core, "READ_ONCE_FROM", 0)
    assert group(device, ranks=((80,), (), (), (17,)))[1] == 0
    assert group(device, ranks=((16,), (), (), (17,)))[1] == 1
    monkeypatch.setattr(_lora_core, "READ_ONCE_FROM", 37 * 33 + 1)
    assert group(device)[1] == 1  # the layer of 40 columns
    monkeypatch.setattr(_lora_core, "READ_ONCE_FROM", 0)
    monkeypatch.setitem(MASTERS, "weight_dtype", torch.float32)
    maker = Maker(device)
    x = maker.tensor("x.own", 5, 24)
    layer = maker.linear("l", 9, 24)
    assert PARTS not in launches(lambda: gradients(lora_linear_group(x, [layer]), maker, x))
