"""Gated linear units: y = act(gate) * up, forward and backward (Shazeer 2020, eqs. 5 and 6: GEGLU, SwiGLU).

    silu(g)      = g s                         s = 1 / (1 + exp(-g))
    gelu(g)      = g (1 + erf(g / sqrt 2)) / 2
    gelu_tanh(g) = g sigmoid(2 z)              z = sqrt(2/pi) (g + 0.044715 g^3); (1 + tanh z) / 2 = sigmoid(2 z)

    dup   = dy act(gate)
    dgate = dy up act'(gate)

act(gate) is rounded to gate's dtype before the product, as transformers does. Nothing is saved but the inputs.

Gate, up and dy may be base products that LoRA has still to change: `Update`s add s S B to them on the way (S and B of
rank r), in fp32, rounded once, as `addmm` does. Apart, each of them reads and writes a tensor for no more than that.

Bytes that must move, T rows of F elements of b bytes: forward 3bTF, backward 5bTF (6bTF with the product), with or
without updates; an update's own addmm moves 2bTF.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from aligntune.backends.fast.ops import _runtime
from aligntune.errors import unknown

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
MAX_RANK = 64  # of an update: its tiles of S and B are held in registers beside those of the operands


class Update(NamedTuple):
    """`scaling * s @ b`, to be added to an operand (T, F): `s` (T, r) rows, `b` (r, F), any strides, r <= MAX_RANK."""

    s: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class GluLaunch:
    """One program for each tile of `rows` x `block` elements."""

    rows: int
    block: int
    num_warps: int
    programs: int


def launch_for(n_rows: int, width: int, *, updates: bool = False) -> GluLaunch:
    """A piece of one row, 16 elements a thread, two 16-byte loads of each input: work that bytes in flight alone bound.

    4 elements where rows are not aligned: 16 scalar loads and stores each, with their masks, spill. Updates are
    products of tensor cores, which want tiles.
    """
    if updates:
        rows, block = 16, min(128, max(16, _runtime.next_power_of_2(width)))
        return GluLaunch(rows, block, 4, _runtime.cdiv(n_rows, rows) * _runtime.cdiv(width, block))
    largest, per_thread = (2048, 16) if width % 16 == 0 else (512, 4)
    block = min(largest, max(32, _runtime.next_power_of_2(width)))
    return GluLaunch(1, block, max(1, block // (32 * per_thread)), n_rows * _runtime.cdiv(width, block))


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


@triton.jit
def _updated(
    base, s_ptr, s_row, b_ptr, b_rank, b_col, scaling, row, cols, in_rows, in_cols,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """base + scaling * s b, rounded to base's dtype."""
    rank = tl.arange(0, BLOCK_R)
    in_rank = rank < RANK
    s = tl.load(s_ptr + row[:, None] * s_row + rank[None, :], in_rows & in_rank[None, :], other=0.0)
    b = tl.load(b_ptr + rank[:, None] * b_rank + cols[None, :] * b_col, in_rank[:, None] & in_cols, other=0.0)
    if UPCAST:  # the interpreter multiplies bf16 as integers
        s, b = s.to(tl.float32), b.to(tl.float32)
    product = tl.dot(s, b, input_precision="tf32x3")
    return (base.to(tl.float32) + scaling * product).to(base.dtype)


@_runtime.kernel(do_not_specialize=["n_rows"])
def glu_forward(
    gate_ptr, gate_row, up_ptr, up_row, y_ptr, n_rows,
    sg_ptr, sg_row, bg_ptr, bg_rank, bg_col, g_scaling, su_ptr, su_row, bu_ptr, bu_rank, bu_col, u_scaling,
    F: tl.constexpr, ACTIVATION: tl.constexpr, RANK_G: tl.constexpr, RANK_U: tl.constexpr,
    BLOCK_R: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks = (F + BLOCK - 1) // BLOCK
    row = pid // blocks * ROWS + tl.arange(0, ROWS)
    cols = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    in_rows, in_cols = (row < n_rows)[:, None], (cols < F)[None, :]
    keep = in_rows & in_cols
    at = cols[None, :]
    gate = tl.load(gate_ptr + row[:, None] * gate_row + at, keep, other=0.0)
    up = tl.load(up_ptr + row[:, None] * up_row + at, keep, other=0.0)
    if RANK_G > 0:
        gate = _updated(gate, sg_ptr, sg_row, bg_ptr, bg_rank, bg_col, g_scaling, row, cols, in_rows, in_cols,
                        RANK_G, BLOCK_R, UPCAST)  # fmt: skip
    if RANK_U > 0:
        up = _updated(up, su_ptr, su_row, bu_ptr, bu_rank, bu_col, u_scaling, row, cols, in_rows, in_cols,
                      RANK_U, BLOCK_R, UPCAST)  # fmt: skip
    act, _ = _act_and_slope(gate.to(tl.float32), ACTIVATION)
    y = act.to(gate_ptr.dtype.element_ty).to(tl.float32) * up.to(tl.float32)
    tl.store(y_ptr + row[:, None] * F + at, y.to(y_ptr.dtype.element_ty), keep)


@_runtime.kernel(do_not_specialize=["n_rows"])
def glu_backward(
    dy_ptr, dy_row, gate_ptr, gate_row, up_ptr, up_row, dgate_ptr, dgate_row, dup_ptr, dup_row, y_ptr, y_row, n_rows,
    sd_ptr, sd_row, bd_ptr, bd_rank, bd_col, d_scaling,
    sg_ptr, sg_row, bg_ptr, bg_rank, bg_col, g_scaling, su_ptr, su_row, bu_ptr, bu_rank, bu_col, u_scaling,
    F: tl.constexpr, ACTIVATION: tl.constexpr, HAS_Y: tl.constexpr,
    RANK_D: tl.constexpr, RANK_G: tl.constexpr, RANK_U: tl.constexpr,
    BLOCK_R: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks = (F + BLOCK - 1) // BLOCK
    row = pid // blocks * ROWS + tl.arange(0, ROWS)
    cols = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    in_rows, in_cols = (row < n_rows)[:, None], (cols < F)[None, :]
    keep = in_rows & in_cols
    at = cols[None, :]
    dy = tl.load(dy_ptr + row[:, None] * dy_row + at, keep, other=0.0)
    gate = tl.load(gate_ptr + row[:, None] * gate_row + at, keep, other=0.0)
    up = tl.load(up_ptr + row[:, None] * up_row + at, keep, other=0.0)
    if RANK_D > 0:
        dy = _updated(dy, sd_ptr, sd_row, bd_ptr, bd_rank, bd_col, d_scaling, row, cols, in_rows, in_cols,
                      RANK_D, BLOCK_R, UPCAST)  # fmt: skip
    if RANK_G > 0:
        gate = _updated(gate, sg_ptr, sg_row, bg_ptr, bg_rank, bg_col, g_scaling, row, cols, in_rows, in_cols,
                        RANK_G, BLOCK_R, UPCAST)  # fmt: skip
    if RANK_U > 0:
        up = _updated(up, su_ptr, su_row, bu_ptr, bu_rank, bu_col, u_scaling, row, cols, in_rows, in_cols,
                      RANK_U, BLOCK_R, UPCAST)  # fmt: skip
    dy, gate, up = dy.to(tl.float32), gate.to(tl.float32), up.to(tl.float32)
    act, slope = _act_and_slope(gate, ACTIVATION)
    # Every load is above every store, and element i reads only element i: an output may be any of the inputs. Products
    # of tensor cores hand elements from thread to thread, so all threads have loaded before one of them stores.
    if RANK_D + RANK_G + RANK_U > 0:
        tl.debug_barrier()
    tl.store(dup_ptr + row[:, None] * dup_row + at, (dy * act).to(dup_ptr.dtype.element_ty), keep)
    tl.store(dgate_ptr + row[:, None] * dgate_row + at, (dy * up * slope).to(dgate_ptr.dtype.element_ty), keep)
    if HAS_Y:
        y = act.to(gate_ptr.dtype.element_ty).to(tl.float32) * up
        tl.store(y_ptr + row[:, None] * y_row + at, y.to(y_ptr.dtype.element_ty), keep)


def _check(gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(unknown("GLU activation", activation, ACTIVATIONS))
    if gate.shape != up.shape:
        raise ValueError(f"glu: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape")


def _arguments(name: str, update: Update | None, rows: torch.Tensor) -> tuple[tuple[Any, ...], int]:
    """What the kernels want of an update of `rows` (T, F), and its rank: 0 for None."""
    if update is None:
        return (rows, 0, rows, 0, 0, 0.0), 0
    s, b, scaling = update
    rank = b.shape[0]
    if s.shape != (rows.shape[0], rank) or b.shape != (rank, rows.shape[1]) or not 0 < rank <= MAX_RANK:
        raise ValueError(f"glu: the update of {name}, {tuple(s.shape)} and {tuple(b.shape)}, does not fit "
                         f"{tuple(rows.shape)} with a rank of 1 to {MAX_RANK}")  # fmt: skip
    if s.dtype != rows.dtype or b.dtype != rows.dtype or not _runtime.has_rows(s):
        raise ValueError(f"glu: the update of {name} is {s.dtype} and {b.dtype}, strides {s.stride()}: it wants rows "
                         f"in {rows.dtype}")  # fmt: skip
    _runtime.require_device(s, b)
    return (s, s.stride(0), b, b.stride(0), b.stride(1), float(scaling)), rank


def _block_r(*ranks: int) -> int:
    return max(16, _runtime.next_power_of_2(max(ranks)))  # tensor cores multiply no less than 16


def glu_forward_(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    activation: str = "silu",
    gate_update: Update | None = None,
    up_update: Update | None = None,
) -> torch.Tensor:
    """act(gate) * up outside autograd: same arguments and result as `glu`, and what is still to be added to each.

    Raises ValueError for updates that do not fit (T, F).
    """
    _check(gate, up, activation)
    _runtime.require_device(gate, up)
    gate_rows, up_rows = _runtime.as_rows(gate), _runtime.as_rows(up)
    for_gate, rank_g = _arguments("gate", gate_update, gate_rows)
    for_up, rank_u = _arguments("up", up_update, up_rows)
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    if y.numel():
        n_rows, width = gate_rows.shape
        launch = launch_for(n_rows, width, updates=rank_g + rank_u > 0)
        with _runtime.on_device(gate):
            glu_forward[(launch.programs,)](
                gate_rows, gate_rows.stride(0), up_rows, up_rows.stride(0), y, n_rows, *for_gate, *for_up,
                width, activation, rank_g, rank_u, _block_r(rank_g, rank_u), _runtime.interpreting(),
                launch.rows, launch.block, num_warps=launch.num_warps,
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
    dy_update: Update | None = None,
    gate_update: Update | None = None,
    up_update: Update | None = None,
) -> None:
    """Write the gradients of `gate` and `up` into `out_gate` and `out_up`, and act(gate) * up into `out_product`.

    All are (..., F) with any row strides. An output may be the very buffer of an input (`out_gate=gate`,
    `out_up=up`); one that overlaps an input in any other way gives wrong numbers. Updates are what is still to be
    added to the inputs.
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
    updates = zip(("dy", "gate", "up"), (dy_update, gate_update, up_update), (dy_rows, gate_rows, up_rows), strict=True)
    (for_dy, rank_d), (for_gate, rank_g), (for_up, rank_u) = (_arguments(*each) for each in updates)
    n_rows, width = gate_rows.shape
    launch = launch_for(n_rows, width, updates=rank_d + rank_g + rank_u > 0)
    with _runtime.on_device(gate):
        glu_backward[(launch.programs,)](
            dy_rows, dy_rows.stride(0), gate_rows, gate_rows.stride(0), up_rows, up_rows.stride(0),
            dgate, dgate.stride(0), dup, dup.stride(0), y, y.stride(0), n_rows, *for_dy, *for_gate, *for_up,
            width, activation, out_product is not None, rank_d, rank_g, rank_u, _block_r(rank_d, rank_g, rank_u),
            _runtime.interpreting(), launch.rows, launch.block, num_warps=launch.num_warps,
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
