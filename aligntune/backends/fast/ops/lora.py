"""LoRA on linear layers that share an input, and a gated MLP with LoRA on all three: one autograd node each.

Hu et al., LoRA (arXiv 2106.09685), eq. 3. For linear layers i on X (T, H), each with adapters j of rank r_j:

    out_i = X W_i^T + b_i + sum_j s_j (drop_j(X) A_j^T B_j^T + c_j)
    dS_j  = s_j dout_i B_j,        dX = sum_i dout_i W_i + sum_j drop_j'(dS_j A_j)
    dA_j  = dS_j^T drop_j(X),      dB_j = s_j dout_i^T S_j,      S_j = drop_j(X) A_j^T

All A_j are stacked, so S (T, n R) takes one read of X and all input gradients end in one dX buffer. R is the largest
rank padded to 16, 32 or a multiple of 64. rsLoRA (arXiv 2312.03732) changes s_j only. Matrix products are cuBLAS's, but
for dS and dB of a large dout in 16 bits up to rank 16: bound by reading dout, they come of one reading (`lora_up`).
Other Triton kernels do what cuBLAS cannot: dropout (`_lora_dropout`), NF4 (`nf4`), GLU (`glu`), e4m3 rows (`fp8`).

With an fp8 weight, X is quantised by rows once for all layers of the group that have one, and each dout_i for its
product with W_i, or all of them together where the weights' columns lie side by side (`fp8`): dX is then one product.
Only these two products change: adapters, dropout and every gradient but dX's base part read X and dout as they are. dX
is rounded once more for each product after the first.

Saved for backward, bytes a token in 16 bits: a group 2H (its input, which the layer before often keeps anyway) and
2nR; the MLP 2H + 4F + 6R, where eager keeps 2H + 8F + 6R; and the cast factors. An input that `rms_norm` made is not
kept, these 2H bytes: of what the norm keeps it is made again for dA, the same bits, in a launch that reads and writes
4H. act(gate) and the product are made again by the GLU's backward, which writes them and the gradients over what the
forward saved. Dropout masks are never stored.

Work, T tokens, N outputs in all: 2THN flops forward, 2THN backward (a frozen weight has no dW). LoRA adds per linear
layer 2T(H + 2N) bytes forward (X read for S, out read and written) and 2T(3H + 2N) backward, N where dout is read
once. In the MLP the GLU reads gate, up and the product's gradient anyway, and adds to each of them what LoRA adds: 12TF
bytes less forward and backward together, where every layer has one adapter of a rank up to 64 (and down no dropout).

Rounding. Factors are cast from their fp32 masters once a call, in one launch, and the backward takes the same; within
`PassCasts.running` those of all groups together, when the first is called. The cast is not kept between passes:
`.data` writes and optimizers that write through raw pointers (bitsandbytes', ours) do not advance a version counter,
and a stale factor would train in silence. The base product is rounded to the compute dtype, S is rounded, and their
sum with s S B^T is formed in fp32 and rounded once. PEFT under autocast rounds these too and, before the sum, S B^T
and its product with s: two roundings more. Backward, PEFT rounds each layer's share of dX, and dA and dB, to 16 bits;
here dX is rounded once an addition, and dA and dB reach fp32 masters unrounded. Without autocast PEFT runs fp32
factors in fp32 and rounds the sum only; ours keeps to x's dtype, which costs less than the base product's own rounding
as long as the update is no larger than the base product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from aligntune.backends.fast.ops._lora_core import (
    Adapter,
    Factors,
    LoraLinear,
    PassCasts,
    UpGrads,
    adapters_of,
    bind,
    dropout_of,
    factors_of,
    flatten,
    forward,
    fusable,
    gradient_rows,
    input_grad,
    param_grads,
    side_by_side,
    up_grads,
    updates_of,
)
from aligntune.backends.fast.ops._lora_dropout import STEPS, keep_reference, threshold_of
from aligntune.backends.fast.ops._runtime import as_rows, require_device
from aligntune.backends.fast.ops.fp8 import Fp8Weight
from aligntune.backends.fast.ops.glu import ACTIVATIONS, Update, glu_backward_, glu_forward_, glu_reference
from aligntune.backends.fast.ops.nf4 import NF4Weight, dequantize_nf4_reference
from aligntune.backends.fast.ops.rms_norm import Source, made_again, source_of
from aligntune.errors import ConfigError, unknown

__all__ = [
    "Adapter",
    "LoraLinear",
    "PassCasts",
    "lora_linear_group",
    "lora_linear_group_reference",
    "lora_mlp",
    "lora_mlp_reference",
    "side_by_side",
]


class LoraLinearGroup(torch.autograd.Function):
    """Linear layers on one input (T, H); outputs (T, N_i)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, source: Source | None, bare: Any, seed: torch.Tensor | None,
        *tensors: torch.Tensor | None,
    ) -> Any:  # fmt: skip
        linears = bind(bare, tensors)
        factors = factors_of(linears, x.dtype)
        outs, s = forward(x, linears, dropout_of(linears, seed), factors)
        ctx.bare = bare
        ctx.set_materialize_grads(False)
        kept = _keep(ctx, factors)
        ctx.save_for_backward(*_keep_input(ctx, x, source, ctx.needs_input_grad[4:]), s, seed, *kept, *tensors)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: torch.Tensor | None) -> Any:
        of_x, (s, seed, *rest) = _kept_input(ctx)
        (factors,), tensors = _kept(ctx, rest)
        if all(dout is None for dout in douts):
            return (None,) * (4 + len(tensors))
        linears = bind(ctx.bare, tensors)
        dropout = dropout_of(linears, seed)
        rows = [gradient_rows(dout) for dout in douts]
        wanted = ctx.needs_input_grad[4:]
        with torch.autocast(next(dout for dout in douts if dout is not None).device.type, enabled=False):
            ups = up_grads(rows, linears, s, factors, wanted)
            dx = input_grad(rows, linears, dropout, factors, ups) if ctx.needs_input_grad[0] else None
            grads = param_grads(_input(ctx, of_x), rows, linears, s, ups, dropout, wanted)
        return dx, None, None, None, *grads


class LoraMLP(torch.autograd.Function):
    """down(act(gate(x)) * up(x)) on (T, H); gate and up are two layers or one that makes both halves.

    Where each layer has one adapter, gate and up are saved as the base layers made them, and the GLU adds the rest.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, source: Source | None, bare: Any, activation: str, seed: torch.Tensor | None,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        *wide, down = bind(bare, tensors)
        of_wide, of_down = factors_of(wide, x.dtype), factors_of([down], x.dtype)
        fused = fusable(wide)
        outs, s_wide = forward(x, wide, dropout_of(wide, seed), of_wide, base_only=fused)
        for_gate, for_up = _updates(wide, s_wide, of_wide) if fused else (None, None)
        gate, up = _halves(outs)
        product = glu_forward_(gate, up, activation=activation, gate_update=for_gate, up_update=for_up)
        (y,), s_down = forward(product, [down], dropout_of([down], seed, len(adapters_of(wide))), of_down)
        ctx.bare, ctx.activation, ctx.num_outs = bare, activation, len(outs)
        kept = _keep(ctx, of_wide, of_down)
        trained = ctx.needs_input_grad[5 : len(tensors) + 5 - (2 + 3 * len(down.adapters))]
        ctx.save_for_backward(*_keep_input(ctx, x, source, trained), s_wide, s_down, seed, *outs, *kept, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        of_x, (s_wide, s_down, seed, *rest) = _kept_input(ctx)
        outs = rest[: ctx.num_outs]
        (of_wide, of_down), tensors = _kept(ctx, rest[ctx.num_outs :])
        *wide, down = bind(ctx.bare, tensors)
        wanted = ctx.needs_input_grad[5:]
        for_down = len(wanted) - (2 + 3 * len(down.adapters))
        dropout = dropout_of(wide, seed)
        dropout_down = dropout_of([down], seed, len(adapters_of(wide)))
        dy = gradient_rows(dy)
        with torch.autocast(dy.device.type, enabled=False):
            fused = fusable([down]) and dropout_down is None
            ups = up_grads([dy], [down], s_down, of_down, wanted[for_down:])
            buffer = input_grad([dy], [down], dropout_down, of_down, ups, base_only=fused)
            for_gate, for_up = _updates(wide, s_wide, of_wide) if fusable(wide) else (None, None)
            gate, up = _halves(outs)
            # dgate and dup take the places of gate and up, the product that of its gradient: nothing is allocated.
            glu_backward_(
                buffer, gate, up, activation=ctx.activation, out_gate=gate, out_up=up, out_product=buffer,
                dy_update=_input_update(down, ups, of_down) if fused else None, gate_update=for_gate, up_update=for_up,
            )  # fmt: skip
            # A second backward through this node would read gradients as activations: this makes autograd refuse it.
            torch.autograd.graph.increment_version(outs)
            grads = param_grads(buffer, [dy], [down], s_down, ups, dropout_down, wanted[for_down:])
            del buffer
            ups = up_grads(outs, wide, s_wide, of_wide, wanted[:for_down])
            dx = input_grad(outs, wide, dropout, of_wide, ups) if ctx.needs_input_grad[0] else None
            grads = param_grads(_input(ctx, of_x), outs, wide, s_wide, ups, dropout, wanted[:for_down]) + grads
        return dx, None, None, None, None, *grads


def _keep_input(
    ctx: Any, x: torch.Tensor, source: Source | None, trained: Sequence[bool]
) -> Sequence[torch.Tensor]:
    """What to save of an input (T, H): what a norm made it of, or itself; nothing where nothing trains on it."""
    kept: Sequence[torch.Tensor] = () if not any(trained) else (x,) if source is None else source.tensors
    ctx.recipe, ctx.dtype, ctx.num_kept = None if source is None else source.recipe, x.dtype, len(kept)
    return kept


def _kept_input(ctx: Any) -> tuple[Sequence[torch.Tensor], Sequence[Any]]:
    """What `_keep_input` saved, and the tensors after it."""
    saved = ctx.saved_tensors
    return saved[: ctx.num_kept], saved[ctx.num_kept :]


def _input(ctx: Any, kept: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The input, which may have to be made again; None where nothing trains on it."""
    if not kept or ctx.recipe is None:
        return kept[0] if kept else None
    return made_again(ctx.recipe, *kept).to(ctx.dtype)


def _keep(ctx: Any, *groups: Factors | None) -> list[torch.Tensor]:
    """The cast factors as tensors to save: the backward needs not cast them again."""
    ctx.groups = [None if one is None else (1 + len(one.ups), one.rank) for one in groups]
    return [tensor for one in groups if one is not None for tensor in (one.stack, *one.ups)]


def _kept(ctx: Any, tensors: Sequence[Any]) -> tuple[list[Factors | None], Sequence[Any]]:
    """What `_keep` saved, and the tensors after it."""
    groups: list[Factors | None] = []
    for group in ctx.groups:
        if group is None:
            groups.append(None)
            continue
        count, rank = group
        stack, *ups = tensors[:count]
        groups.append(Factors(stack, tuple(ups), rank))
        tensors = tensors[count:]
    return groups, tensors


def _updates(
    wide: Sequence[LoraLinear], s: torch.Tensor | None, factors: Factors | None
) -> tuple[Update | None, Update | None]:
    """What the adapters add to gate and to up; of one layer that makes both, each half of its B."""
    assert s is not None and factors is not None
    updates = updates_of(wide, s, factors)
    if len(updates) == 2:
        return updates[0], updates[1]
    (both,) = updates
    assert both is not None
    gate, up = both.b.chunk(2, dim=1)
    return both._replace(b=gate), both._replace(b=up)


def _input_update(linear: LoraLinear, of_ups: UpGrads | None, factors: Factors | None) -> Update:
    """What the one adapter adds to the gradient of the layer's input: dS A; dS holds the scaling."""
    assert of_ups is not None and factors is not None
    rank = linear.adapters[0].a.shape[0]
    return Update(of_ups.ds[:, :rank], factors.stack[:rank], 1.0)


def _halves(outs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    if len(outs) == 2:
        return outs[0], outs[1]
    gate, up = outs[0].chunk(2, dim=-1)
    return gate, up


def _out_features(linear: LoraLinear) -> int:
    return linear.weight.shape[0]


def _check(x: torch.Tensor, linears: Sequence[LoraLinear], where: str) -> None:
    """Raise ConfigError for shapes that do not fit and probabilities that are none."""
    faults = []
    if not linears:
        faults.append(f"{where}: no linear layer was given")
    for number, linear in enumerate(linears):
        shape = tuple(linear.weight.shape)
        name = f"{where}, layer {number} {shape}"
        if len(shape) != 2 or shape[1] != x.shape[-1]:
            faults.append(f"{name}: x has {x.shape[-1]} features")
            continue
        n, h = shape
        if linear.bias is not None and linear.bias.shape != (n,):
            faults.append(f"{name}: bias {tuple(linear.bias.shape)}")
        for adapter in linear.adapters:
            a, b, c = adapter.a, adapter.b, adapter.bias
            if a.dim() != 2 or a.shape[1] != h or b.shape != (n, a.shape[0]):
                faults.append(f"{name}: factors {tuple(a.shape)} and {tuple(b.shape)}")
            if c is not None and c.shape != (n,):
                faults.append(f"{name}: adapter bias {tuple(c.shape)}")
            if not 0 <= adapter.dropout <= 1:
                faults.append(f"{name}: dropout {adapter.dropout} is not a probability")
    if faults:
        raise ConfigError.from_faults(faults, where=where)


def _compute(x: torch.Tensor, linears: Sequence[LoraLinear], compute_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that products are taken in: autocast's, or for NF4 and fp8 the one asked for, or x's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype = compute_dtype or x.dtype
    for linear in linears:
        if isinstance(linear.weight, torch.Tensor) and linear.weight.dtype != dtype:
            raise ConfigError(f"x is {dtype} and the weight {linear.weight.dtype}: cast one, or use autocast")
    return dtype


def _draw_seed(linears: Sequence[LoraLinear], device: torch.device) -> torch.Tensor | None:
    """A seed from torch's generator: checkpointing restores it for the recompute, a CUDA graph advances it a replay."""
    if not any(adapter.dropout for adapter in adapters_of(linears)):
        return None
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)


def lora_linear_group(
    x: torch.Tensor,
    linears: Sequence[LoraLinear],
    *,
    compute_dtype: torch.dtype | None = None,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The outputs (..., N_i) of linear layers on one input x (..., H), adapters included; one autograd node.

    Products are taken in autocast's dtype where it is on, else in `compute_dtype` (for NF4 and fp8), else in x's; the
    outputs are in autocast's dtype or x's. Gradients go to x, to factors and biases in their own dtypes, and to base
    weights that require one. Each adapter with dropout draws its own mask from `seed` (int64 scalar on the device); by
    default the seed comes from torch's generator of x's device.

    Raises ConfigError for shapes or dtypes that do not fit, BackendUnavailableError off the GPU.
    """
    _check(x, linears, "a LoRA group")
    bare, tensors = flatten(linears)
    require_device(x, *tensors)
    dtype = _compute(x, linears, compute_dtype)
    if seed is None:
        seed = _draw_seed(linears, x.device)
    outs = LoraLinearGroup.apply(as_rows(x.to(dtype)), source_of(x), bare, seed, *tensors)
    back = dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
    return tuple(out.view(*x.shape[:-1], out.shape[-1]).to(back) for out in outs)


def lora_mlp(
    x: torch.Tensor,
    gate: LoraLinear,
    up: LoraLinear | None,
    down: LoraLinear,
    *,
    activation: str = "silu",
    compute_dtype: torch.dtype | None = None,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """down(act(gate(x)) * up(x)) for x (..., H), adapters included; one autograd node that saves 2H + 4F bytes a token,
    4F where `rms_norm` made x.

    `up=None`: `gate` makes both halves, (2F, H), gate first. `activation` is "silu", "gelu" or "gelu_tanh". The rest is
    as for `lora_linear_group`. The backward overwrites what the forward saved, so it runs once: autograd refuses a
    second one through the same graph.

    Raises ConfigError for shapes or dtypes that do not fit, BackendUnavailableError off the GPU.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(unknown("GLU activation", activation, ACTIVATIONS))
    wide = [gate] if up is None else [gate, up]
    _check(x, wide, "an MLP's gate and up")
    features = _out_features(gate) // (2 if up is None else 1)
    if any(_out_features(one) != (2 * features if up is None else features) for one in wide):
        raise ConfigError(f"gate and up make {[_out_features(one) for one in wide]} features")
    _check(x.new_empty((0, features)), [down], "an MLP's down")
    linears = [*wide, down]
    bare, tensors = flatten(linears)
    require_device(x, *tensors)
    dtype = _compute(x, linears, compute_dtype)
    if seed is None:
        seed = _draw_seed(linears, x.device)
    y = LoraMLP.apply(as_rows(x.to(dtype)), source_of(x), bare, activation, seed, *tensors)
    back = dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
    return y.view(*x.shape[:-1], y.shape[-1]).to(back)


# ------------------------------------------------------------------------------------------------------- torch's twins


def lora_linear_group_reference(
    x: torch.Tensor,
    linears: Sequence[LoraLinear],
    *,
    compute_dtype: torch.dtype | None = None,
    seed: torch.Tensor | None = None,
    first: int = 0,
) -> tuple[torch.Tensor, ...]:
    """`lora_linear_group` in plain torch and PEFT's order; `first` is the number of the first mask.

    Raises:
        ConfigError: what does not fit, or an fp8 weight, which has a reference of its own.
    """
    _check(x, linears, "a LoRA group")
    dtype = _compute(x, linears, compute_dtype)
    rows, outs, j = x.to(dtype).reshape(-1, x.shape[-1]), [], first
    for linear in linears:
        if isinstance(linear.weight, NF4Weight):
            weight = dequantize_nf4_reference(linear.weight, dtype=dtype)
        elif isinstance(linear.weight, Fp8Weight):
            raise ConfigError("an fp8 weight is multiplied with rounded inputs; its reference is `fp8_mm_reference`")
        else:
            weight = linear.weight.to(dtype)
        out = torch.nn.functional.linear(rows, weight, None if linear.bias is None else linear.bias.to(dtype))
        for adapter in linear.adapters:
            dropped = rows
            if adapter.dropout and seed is not None:
                kept = 1 - threshold_of(adapter.dropout) / STEPS
                keep = keep_reference(seed, j, rows.shape[0], rows.shape[1], adapter.dropout)
                dropped = rows * keep / kept if kept else rows * 0
            update = dropped @ adapter.a.to(dtype).t() @ adapter.b.to(dtype).t()
            if adapter.bias is not None:
                update = update + adapter.bias.to(dtype)
            out = out + update * adapter.scaling
            j += 1
        outs.append(out.view(*x.shape[:-1], out.shape[-1]))
    return tuple(outs)


def lora_mlp_reference(
    x: torch.Tensor,
    gate: LoraLinear,
    up: LoraLinear | None,
    down: LoraLinear,
    *,
    activation: str = "silu",
    compute_dtype: torch.dtype | None = None,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`lora_mlp` in plain torch."""
    wide = [gate] if up is None else [gate, up]
    outs = lora_linear_group_reference(x, wide, compute_dtype=compute_dtype, seed=seed)
    product = glu_reference(*_halves(outs), activation=activation)
    first = len(adapters_of(wide))
    return lora_linear_group_reference(product, [down], compute_dtype=compute_dtype, seed=seed, first=first)[0]
