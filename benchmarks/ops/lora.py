"""LoRA groups and the LoRA MLP, forward and backward: time over the bare products of the frozen weights.

    python -m benchmarks.ops.lora [--sweep] [--json FILE]

Layers of a 1B and an 8B model in bf16, adapters fp32 of rank 16, 8192 and 4096 tokens. Rows: bare GEMMs (out and dX of
the frozen weights alone), PEFT's modules under autocast, these under torch.compile, ours; without dropout, with 0.1,
and on NF4 weights. The bound is the bare products and LoRA's own bytes (`ops/lora.py`) at the card's copy bandwidth;
with NF4 two dequantisations as well. `--sweep` times other launches of the dropout kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aligntune.backends.fast.ops import _lora_dropout
from aligntune.backends.fast.ops.lora import Adapter, LoraLinear, lora_linear_group, lora_mlp
from aligntune.backends.fast.ops.nf4 import NF4Weight
from benchmarks.ops._rows import Method, Row, main, measure
from benchmarks.ops.bench import graph_ms

DEVICE = "cuda"
RANK = 16
# name -> (hidden, outputs of the layers on one input, tokens); an MLP's third layer takes the product back.
SHAPES = {
    "1B qkv": (2048, {"q_proj": 2048, "k_proj": 512, "v_proj": 512}, 8192),
    "1B o": (2048, {"o_proj": 2048}, 8192),
    "1B mlp": (2048, {"gate_proj": 8192, "up_proj": 8192}, 8192),
    "8B qkv": (4096, {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}, 4096),
    "8B mlp": (4096, {"gate_proj": 14336, "up_proj": 14336}, 4096),
}
# (rows, columns, warps) of the dropout kernels' tiles.
SWEEP = [(32, 64, 4), (64, 64, 4), (64, 64, 8), (128, 64, 8), (64, 128, 8), (32, 128, 4), (32, 128, 8)]


class Layers(nn.Module):
    """Linear layers on one input; with `mlp`, SwiGLU and a layer back."""

    def __init__(self, hidden: int, outputs: dict[str, int], mlp: bool) -> None:
        super().__init__()
        self.names, self.mlp = list(outputs), mlp
        for name, width in outputs.items():
            self.add_module(name, nn.Linear(hidden, width, bias=False))
        if mlp:
            self.down_proj = nn.Linear(outputs["gate_proj"], hidden, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outs = tuple(getattr(self, name)(x) for name in self.names)
        return (self.down_proj(nn.functional.silu(outs[0]) * outs[1]),) if self.mlp else outs


def peft_model(name: str, *, dropout: float, quantised: bool) -> tuple[Any, torch.Tensor]:
    """PEFT over random bf16 (or NF4) layers, B not zero, and an input."""
    import bitsandbytes
    import peft

    hidden, outputs, tokens = SHAPES[name]
    layers = Layers(hidden, outputs, "mlp" in name).to(DEVICE, torch.bfloat16)
    if quantised:
        for child, module in list(layers.named_children()):
            shape = (module.in_features, module.out_features)
            four = bitsandbytes.nn.Linear4bit(*shape, False, torch.bfloat16, quant_type="nf4")
            four.weight.data = module.weight.data.cpu()
            setattr(layers, child, four.to(DEVICE))
    targets = [child for child, _ in layers.named_children()]
    config = peft.LoraConfig(r=RANK, lora_alpha=16, lora_dropout=dropout, target_modules=targets)
    model = peft.get_peft_model(layers, config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(0, 0.02)
    x = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    return model, x


def ours_of(model: Any) -> list[LoraLinear]:
    """The layers of a PEFT model as the op takes them."""
    linears = []
    for _, module in model.base_model.model.named_children():
        adapter = Adapter(
            module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"],
            dropout=getattr(module.lora_dropout["default"], "p", 0.0),
        )  # fmt: skip
        base = module.base_layer.weight
        weight = NF4Weight.from_param(base) if hasattr(base, "quant_state") else base
        linears.append(LoraLinear(weight, None, (adapter,)))
    return linears


def bare_gemms_ms(name: str) -> float:
    """out = X W^T and dX = dout W of every layer, into ready buffers."""
    hidden, outputs, tokens = SHAPES[name]
    shapes = [(hidden, width) for width in outputs.values()]
    if "mlp" in name:
        shapes.append((outputs["gate_proj"], hidden))
    made = [
        [torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) for shape in ((tokens, k), (n, k), (tokens, n))]
        for k, n in shapes
    ]

    def step() -> None:
        for x, weight, out in made:
            torch.mm(x, weight.t(), out=out)
            torch.mm(out, weight, out=x)

    with torch.no_grad():
        return graph_ms([step])


def lora_bytes(name: str, *, quantised: bool) -> float:
    """What LoRA (and SwiGLU, and two dequantisations) must move beside the products."""
    hidden, outputs, tokens = SHAPES[name]
    width = sum(outputs.values())
    moved = 2 * tokens * (4 * hidden + 4 * width)
    weights = hidden * width
    if "mlp" in name:
        features = outputs["gate_proj"]
        moved += 2 * tokens * (4 * features + 4 * hidden) + 2 * tokens * features * (3 + 6)
        weights += features * hidden
    return moved + (2 * 2.52 * weights if quantised else 0)


def steps_of(name: str, *, dropout: float, quantised: bool) -> tuple[dict[str, Method], Method]:
    model, x = peft_model(name, dropout=dropout, quantised=quantised)
    linears, compiled = ours_of(model), torch.compile(model)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        douts = [torch.randn_like(out) for out in model(x)]

    def clear() -> None:
        model.zero_grad()
        x.grad = None

    def step(forward: Any) -> None:
        clear()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            outs = forward(x)
        torch.autograd.backward(outs, douts)

    def ours(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (lora_mlp(x, *linears),) if "mlp" in name else lora_linear_group(x, linears)

    return {
        "eager PEFT": lambda: step(model),
        "torch.compile of PEFT": lambda: step(compiled),
        "ours": lambda: step(ours),
    }, clear


def make_rows(bandwidth: float, sweep: bool) -> list[Row]:
    rows: list[Row] = []
    for name in SHAPES:
        bare = bare_gemms_ms(name)
        common: Row = {"op": "lora", "shape": name, "rank": RANK}
        rows.append({**common, "method": "bare GEMMs", "ms": bare})
        for dropout, quantised in [(0.0, False), (0.1, False), (0.0, True)]:
            steps, clear = steps_of(name, dropout=dropout, quantised=quantised)
            bound = bare + lora_bytes(name, quantised=quantised) / bandwidth * 1e3
            options: Row = {**common, "dropout": dropout, "nf4": quantised}
            if not sweep:
                rows += measure(steps, bound_ms=bound, clear=clear, **options)
            elif dropout:
                for launch in [_lora_dropout.Launch(r, c, num_warps=w) for r, c, w in SWEEP]:
                    kept, _lora_dropout.LAUNCH = _lora_dropout.LAUNCH, launch
                    rows += measure({"ours": steps["ours"]}, bound_ms=bound, clear=clear, **options, launch=str(launch))
                    _lora_dropout.LAUNCH = kept
    return rows


if __name__ == "__main__":
    main(__doc__, make_rows)
