"""Gated linear units: y = act(gate) * up, forward and backward (Shazeer 2020, eqs. 5 and 6: GEGLU, SwiGLU).

    silu(g)      = g s                         s = 1 / (1 + exp(-g))
    gelu(g)      = g (1 + erf(g / sqrt 2)) / 2
    gelu_tanh(g) = g sigmoid(2 z)              z = sqrt(2/pi) (g + 0.044715 g^3); (1 + tanh z) / 2 = sigmoid(2 z)

    dup   = dy act(gate)
    dgate = dy up act'(gate)

act(gate) is rounded to gate's dtype before the product, as transformers does. Nothing is saved but the inputs.

Bytes that must move, T rows of F elements of b bytes: forward 3bTF, backward 5bTF (6bTF with the product).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from aligntune.backends.fast.ops import _runtime
from aligntune.errors import unknown

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class GluLaunch:
    """One program for each `block` columns of a row."""

    block: int
    num_warps: int
    programs: int


def launch_for(n_rows: int, width: int) -> GluLaunch:
    """16 elements a thread, two 16-byte loads of each input: elementwise work is bound by bytes in flight alone.

    4 where rows are not aligned: 16 scalar loads and stores each, with their masks, spill.
    """
    largest, per_thread = (2048, 16) if width % 16 == 0 else (512, 4)
    block = min(largest, max(32, _runtime.next_power_of_2(width)))
    return GluLaunch(block, max(1, block // (32 * per_thread)), n_rows * _runtime.cdiv(width, block))


@triton.jit
def _act_and_slope(g, ACTIVATION: tl.constexpr):
    """(act(g), act'(g)) of fp32 g; a slope that is not used is removed by the compiler."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(g)
        act = g * s
        slope = s * (1 + g * (1 - s))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.math.erf(g * 0.7071067811865476))
        act = g * below
        slope = below + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    else:
        s = tl.sigmoid(g * (1.5957691216057308 + 0.07135481627260025 * g * g))
        act = g * s
        slope = s + g * s * (1 - s) * (1.5957691216057308 + 0.21406444881780076 * g * g)
    return act, slope


@_runtime.kernel
def glu_forward(
    gate_ptr, gate_row, up_ptr, up_row, y_ptr,
    F: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks = (F + BLOCK - 1) // BLOCK
    row = pid // blocks
    cols = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    keep = cols < F
    gate = tl.load(gate_ptr + row * gate_row + cols, keep, other=0.0)
    up = tl.load(up_ptr + row * up_row + cols, keep, other=0.0).to(tl.float32)
    act, _ = _act_and_slope(gate.to(tl.float32), ACTIVATION)
    y = act.to(gate_ptr.dtype.element_ty).to(tl.float32) * up
    tl.store(y_ptr + row * F + cols, y.to(y_ptr.dtype.element_ty), keep)


@_runtime.kernel
def glu_backward(
    dy_ptr, dy_row, gate_ptr, gate_row, up_ptr, up_row, dgate_ptr, dgate_row, dup_ptr, dup_row, y_ptr, y_row,
    F: tl.constexpr, ACTIVATION: tl.constexpr, HAS_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks = (F + BLOCK - 1) // BLOCK
    row = pid // blocks
    cols = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    keep = cols < F
    dy = tl.load(dy_ptr + row * dy_row + cols, keep, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + cols, keep, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, keep, other=0.0).to(tl.float32)
    act, slope = _act_and_slope(gate, ACTIVATION)
    # Every load is above every store, and element i reads only element i: an output may be any of the inputs.
    tl.store(dup_ptr + row * dup_row + cols, (dy * act).to(dup_ptr.dtype.element_ty), keep)
    tl.store(dgate_ptr + row * dgate_row + cols, (dy * up * slope).to(dgate_ptr.dtype.element_ty), keep)
    if HAS_Y:
        y = act.to(gate_ptr.dtype.element_ty).to(tl.float32) * up
        tl.store(y_ptr + row * y_row + cols, y.to(y_ptr.dtype.element_ty), keep)


def _check(gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(unknown("GLU activation", activation, ACTIVATIONS))
    if gate.shape != up.shape:
        raise ValueError(f"glu: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape")


def glu_forward_(gate: torch.Tensor, up: torch.Tensor, *, activation: str = "silu") -> torch.Tensor:
    """act(gate) * up outside autograd: same arguments and result as `glu`."""
    _check(gate, up, activation)
    _runtime.require_device(gate, up)
    gate_rows, up_rows = _runtime.as_rows(gate), _runtime.as_rows(up)
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    if y.numel():
        n_rows, width = gate_rows.shape
        launch = launch_for(n_rows, width)
        with _runtime.on_device(gate):
            glu_forward[(launch.programs,)](
                gate_rows, gate_rows.stride(0), up_rows, up_rows.stride(0), y,
                width, activation, launch.block, num_warps=launch.num_warps,
            )  # fmt: skip
    return y


def _rows_to_write(name: str, buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`buffer` as rows, as a view: a copy would be written and then lost."""
    if buffer.shape != like.shape:
        raise ValueError(f"glu_backward_: {name} has shape {tuple(buffer.shape)}, the gate {tuple(like.shape)}")
    rows = _runtime.as_rows(buffer)
    copied = rows.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()
    if copied or (rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]):
        raise ValueError(f"glu_backward_: {name}, strides {buffer.stride()}, cannot be written as rows")
    return rows


def glu_backward_(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    activation: str = "silu",
    out_gate: torch.Tensor,
    out_up: torch.Tensor,
    out_product: torch.Tensor | None = None,
) -> None:
    """Write the gradients of `gate` and `up` into `out_gate` and `out_up`, and act(gate) * up into `out_product`.

    All are (..., F) with any row strides. An output may be the very buffer of an input (`out_gate=gate`,
    `out_up=up`); one that overlaps an input in any other way gives wrong numbers.
    Raises ValueError for shapes that differ or an output whose rows cannot be written in place.
    """
    _check(gate, up, activation)
    _runtime.require_device(dy, gate, up, out_gate, out_up, out_product)
    if dy.shape != gate.shape:
        raise ValueError(f"glu_backward_: dy {tuple(dy.shape)} and gate {tuple(gate.shape)} differ in shape")
    dgate, dup = _rows_to_write("out_gate", out_gate, gate), _rows_to_write("out_up", out_up, gate)
    y = dgate if out_product is None else _rows_to_write("out_product", out_product, gate)
    if not gate.numel():
        return
    dy_rows, gate_rows, up_rows = _runtime.as_rows(dy), _runtime.as_rows(gate), _runtime.as_rows(up)
    n_rows, width = gate_rows.shape
    launch = launch_for(n_rows, width)
    with _runtime.on_device(gate):
        glu_backward[(launch.programs,)](
            dy_rows, dy_rows.stride(0), gate_rows, gate_rows.stride(0), up_rows, up_rows.stride(0),
            dgate, dgate.stride(0), dup, dup.stride(0), y, y.stride(0),
            width, activation, out_product is not None, launch.block, num_warps=launch.num_warps,
        )  # fmt: skip


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return glu_forward_(gate, up, activation=activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        glu_backward_(dy, gate, up, activation=ctx.activation, out_gate=dgate, out_up=dup)
        return dgate, dup, None


def glu(gate: torch.Tensor, up: torch.Tensor, *, activation: str = "silu") -> torch.Tensor:
    """act(gate) * up, with act one of "silu" (SwiGLU), "gelu" (exact) and "gelu_tanh" (GEGLU).

    `gate`, `up`: (..., F), bf16, fp16 or fp32, any row strides, so that both may be halves of one packed projection.
    Returns (..., F) in their promoted dtype. The backward recomputes the activation.

    Raises ValueError for shapes that differ or an unknown activation; BackendUnavailableError off GPU.
    """
    _check(gate, up, activation)
    _runtime.require_device(gate, up)
    return _GLU.apply(gate, up, activation)


def glu_reference(gate: torch.Tensor, up: torch.Tensor, *, activation: str = "silu") -> torch.Tensor:
    """What transformers computes, in torch: same arguments and result as `glu`."""
    _check(gate, up, activation)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
