"""AdamW with clipping: time and share of the bound, 32 bytes a parameter in fp32 (28 the step, 4 the norm).

    python -m benchmarks.ops.adamw [--sweep] [--json FILE]

Rows: torch's fused AdamW with clip_grad_norm_ on as many tensors as a LoRA model has and ours on the same, both in fp32
and in bf16; torch's on one flat tensor, torch.compile of the flat step, ours flat in fp32, with a bf16 copy of the
parameters, and on bf16 parameters and gradients with stochastic rounding. Clipping scales here: what lies in many
tensors is read and written once more by it, for 8 bytes a parameter in fp32 and 4 in bf16 that the bound has not.
`--sweep` times other launches of the flat step.
"""

from __future__ import annotations

import functools

import torch

from aligntune.backends.fast.ops import adamw
from aligntune.backends.fast.ops.adamw import adamw_step_
from aligntune.backends.fast.ops.tensor_lists import Tables, adamw_tensors_, clip_grads_
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


def tensors_of(numel: int, tensors: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters with gradients, each of its own memory."""
    sizes = [len(part) for part in torch.empty(numel, device="meta").chunk(tensors)]
    params = [torch.nn.Parameter(torch.randn(size, device=DEVICE, dtype=dtype)) for size in sizes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def ours_of_tensors(numel: int, dtype: torch.dtype = torch.float32) -> Method:
    """Ours where the tensors lie, as trainers make it."""
    params, tables = tensors_of(numel, LORA_TENSORS, dtype), Tables()
    grads = [param.grad for param in params if param.grad is not None]
    moments = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    steps = [torch.zeros((), device=DEVICE) for _ in params]

    @torch.no_grad()
    def step() -> None:
        clip_grads_(grads, 1.0, tables=tables)
        adamw_tensors_(params, grads, moments[0], moments[1], steps, tables=tables, **OPTIONS)

    return step


def torch_step(numel: int, tensors: int, dtype: torch.dtype = torch.float32) -> Method:
    """torch's own: fused AdamW, its step on the device, after clip_grad_norm_."""
    params = tensors_of(numel, tensors, dtype)
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
        "ours, LoRA's tensors": (32, lambda: ours_of_tensors(numel)),
        "torch fused, LoRA's tensors, bf16": (16, lambda: torch_step(numel, LORA_TENSORS, torch.bfloat16)),
        "ours, LoRA's tensors, bf16": (16, lambda: ours_of_tensors(numel, torch.bfloat16)),
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
