"""AdamW with clipping: time and share of the bound, 32 bytes a parameter in fp32 (28 the step, 4 the norm).

    python -m benchmarks.ops.adamw [--sweep] [--json FILE]

Rows: torch's fused AdamW with clip_grad_norm_ on as many tensors as a LoRA model has and on one flat tensor,
torch.compile of the flat step, ours in fp32, ours with a bf16 copy of the parameters, ours on bf16 parameters and
gradients with stochastic rounding. `--sweep` times other launches.
"""

from __future__ import annotations

import functools

import torch

from aligntune.backends.fast.ops import adamw
from aligntune.backends.fast.ops.adamw import adamw_step_
from benchmarks.ops._rows import Method, Row, main, measure

DEVICE = "cuda"
# Parameters of LoRA r=16 on a 1B and an 8B model, and of a 1B model in full.
SIZES = [11_272_192, 41_943_040, 1_235_814_400]
LORA_TENSORS = 224
OPTIONS = {"lr": 2e-4, "weight_decay": 0.01}


def flat_state(numel: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        "param": torch.randn(numel, device=DEVICE, dtype=dtype),
        "grad": torch.randn(numel, device=DEVICE, dtype=dtype),
        "exp_avg": torch.zeros(numel, device=DEVICE),
        "exp_avg_sq": torch.zeros(numel, device=DEVICE),
        "step": torch.zeros((), device=DEVICE, dtype=torch.int64),
    }


def torch_step(numel: int, tensors: int) -> Method:
    """torch's own: fused AdamW, its step on the device, after clip_grad_norm_."""
    params = [torch.nn.Parameter(part) for part in torch.randn(numel, device=DEVICE).chunk(tensors)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW(params, **OPTIONS, fused=True, capturable=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def plain_step(
    param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, step: torch.Tensor
) -> None:
    """The same step written flat, for torch.compile: no host sync, nothing skipped."""
    step += 1
    grad = grad * (1.0 / (grad.norm() + 1e-6)).clamp(max=1.0)
    param.mul_(1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
    exp_avg.lerp_(grad, 0.1)
    exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=0.001)
    rate = OPTIONS["lr"] / (1 - 0.9**step)
    param.sub_(rate * exp_avg / (exp_avg_sq.sqrt() / (1 - 0.999**step).sqrt() + 1e-8))


def ours(numel: int, **extra: torch.Tensor) -> Method:
    state = flat_state(numel)
    lr = torch.tensor([OPTIONS["lr"]], device=DEVICE)
    return lambda: adamw_step_(**state, **extra, lr=lr, weight_decay=OPTIONS["weight_decay"], max_norm=1.0)


def ours_stochastic(numel: int) -> Method:
    state = flat_state(numel, torch.bfloat16)
    seed = torch.ones(1, device=DEVICE, dtype=torch.int64)
    return lambda: adamw_step_(**state, seed=seed, **OPTIONS, max_norm=1.0)


def compiled(numel: int) -> Method:
    state, step = flat_state(numel), torch.compile(plain_step)
    return lambda: step(**state)


def rows_of(numel: int, bandwidth: float, sweep: bool) -> list[Row]:
    """Every method makes its own buffers: five of them would not fit beside each other at the largest size."""
    makers = {
        "torch fused, LoRA's tensors": (32, lambda: torch_step(numel, LORA_TENSORS)),
        "torch fused, flat": (32, lambda: torch_step(numel, 1)),
        "torch.compile, flat": (32, lambda: compiled(numel)),
        "ours": (32, lambda: ours(numel)),
        "ours, bf16 copy": (34, lambda: ours(numel, copy=torch.empty(numel, device=DEVICE, dtype=torch.bfloat16))),
        "ours, bf16 stochastic": (24, lambda: ours_stochastic(numel)),
    }
    if sweep:
        launches = [adamw.Launch(block, warps) for block in (512, 1024, 2048, 4096) for warps in (4, 8)]
        makers = {f"ours, {launch}": (32, functools.partial(_with, launch, numel)) for launch in launches}
    rows = []
    for name, (per_param, make) in makers.items():
        bound = per_param * numel / bandwidth * 1e3
        rows += measure({name: make()}, bound_ms=bound, clear=lambda: None, op="adamw", numel=numel)
    return rows


def _with(launch: adamw.Launch, numel: int) -> Method:
    step = ours(numel)

    def run() -> None:
        kept, adamw.LAUNCH = adamw.LAUNCH, launch
        step()
        adamw.LAUNCH = kept

    return run


def make_rows(bandwidth: float, sweep: bool) -> list[Row]:
    return [row for numel in SIZES for row in rows_of(numel, bandwidth, sweep)]


if __name__ == "__main__":
    main(__doc__, make_rows)
