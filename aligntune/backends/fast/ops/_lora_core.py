"""The products of LoRA layers on one input, outside autograd; `lora` has the maths, the bytes and the rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from aligntune.backends.fast.ops import _runtime
from aligntune.backends.fast.ops._lora_dropout import Dropout, padded_rank
from aligntune.backends.fast.ops.fp8 import (
    Fp8Weight,
    SideBySide,
    fp8_mm,
    quantize_rows,
    quantize_rows_together,
    together,
)
from aligntune.backends.fast.ops.glu import MAX_RANK, Update
from aligntune.backends.fast.ops.lora_up import lora_up_grads
from aligntune.backends.fast.ops.nf4 import NF4Weight, dequantize_nf4

READ_ONCE_FROM, READ_ONCE_RANK = 1 << 22, 16
"""A layer's gradient is read once for dS and dB if it has so many numbers or more, of a layer of at most this rank.
Of smaller ones only the op was measured, not a step; at rank 32 two products take about as long, at 64 less
(`benchmarks.ops.lora_up`)."""


class Adapter(NamedTuple):
    """One LoRA adapter: masters `a (r, H)` and `b (N, r)` in any float dtype, `scaling` alpha / r or alpha / sqrt(r).

    `bias (N,)` is PEFT's `lora_bias`. `dropout` is the probability in force: 0 where the module is not training.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0
    bias: torch.Tensor | None = None
    dropout: float = 0.0


class LoraLinear(NamedTuple):
    """A linear layer: `weight (N, H)`, a tensor, NF4 or fp8, `bias (N,)`, and the adapters that are active on it."""

    weight: torch.Tensor | NF4Weight | Fp8Weight
    bias: torch.Tensor | None = None
    adapters: tuple[Adapter, ...] = ()


def flatten(linears: Sequence[LoraLinear]) -> tuple[tuple[LoraLinear, ...], list[torch.Tensor | None]]:
    """The linears without their tensors, and these in the order weight, bias, (a, b, bias) of each adapter."""
    bare: list[LoraLinear] = []
    tensors: list[torch.Tensor | None] = []
    for weight, bias, adapters in linears:
        quantised = isinstance(weight, (NF4Weight, Fp8Weight))
        tensors += (None if quantised else weight, bias)
        for adapter in adapters:
            tensors += (adapter.a, adapter.b, adapter.bias)
        stripped = tuple(Adapter(None, None, one.scaling, None, one.dropout) for one in adapters)  # type: ignore[arg-type]
        bare.append(LoraLinear(weight if quantised else None, None, stripped))  # type: ignore[arg-type]
    return tuple(bare), tensors


def bind(bare: Sequence[LoraLinear], tensors: Sequence[torch.Tensor | None]) -> list[LoraLinear]:
    """The inverse of `flatten`."""
    bound, at = [], 0
    for stored, _, adapters in bare:
        weight, bias = tensors[at : at + 2]
        at += 2
        whole = []
        for one in adapters:
            a, b, c = tensors[at : at + 3]
            whole.append(Adapter(a, b, one.scaling, c, one.dropout))  # type: ignore[arg-type]
            at += 3
        bound.append(LoraLinear(stored if weight is None else weight, bias, tuple(whole)))
    return bound


def adapters_of(linears: Sequence[LoraLinear]) -> list[Adapter]:
    return [adapter for linear in linears for adapter in linear.adapters]


def _weight(linear: LoraLinear, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(linear.weight, NF4Weight):
        # A fresh buffer each time is the same block of the allocator's, and safe under several streams and graphs.
        return dequantize_nf4(linear.weight, dtype=dtype)
    assert isinstance(linear.weight, torch.Tensor)
    return linear.weight.to(dtype)


def _bias(linear: LoraLinear, dtype: torch.dtype) -> torch.Tensor | None:
    biases = [adapter.bias.float() * adapter.scaling for adapter in linear.adapters if adapter.bias is not None]
    if not biases:
        return None if linear.bias is None else linear.bias.to(dtype)
    if linear.bias is not None:
        biases.append(linear.bias.float())
    return torch.stack(biases).sum(0).to(dtype)


class Factors(NamedTuple):
    """All A of a group stacked as `stack` (n R, H) and every B (N, r) in `ups`, in the compute dtype; `rank` is R."""

    stack: torch.Tensor
    ups: tuple[torch.Tensor, ...]
    rank: int


def factors_of(linears: Sequence[LoraLinear], dtype: torch.dtype) -> Factors | None:
    """The factors cast in one launch, or in one of several groups (`PassCasts`); None without adapters."""
    adapters = adapters_of(linears)
    if not adapters:
        return None
    running = _RUNNING.get()
    if running is not None:
        return running.factors(adapters, dtype)
    made, copies = _laid(adapters, dtype)
    _copy(copies)
    return made


Copies = list[tuple[torch.Tensor, torch.Tensor]]


def _copy(copies: Copies) -> None:
    """In one launch for each pair of types; lists of several went wrong in some versions of torch."""
    alike: dict[tuple[torch.dtype, torch.dtype], Copies] = {}
    for target, source in copies:
        alike.setdefault((target.dtype, source.dtype), []).append((target, source))
    for some in alike.values():
        torch._foreach_copy_([target for target, _ in some], [source for _, source in some])


def _laid(adapters: Sequence[Adapter], dtype: torch.dtype) -> tuple[Factors, Copies]:
    """The factors of a group, and what is to be copied into them."""
    rank = padded_rank(max(adapter.a.shape[0] for adapter in adapters))
    first = adapters[0].a
    padded = any(adapter.a.shape[0] != rank for adapter in adapters)
    if len(adapters) == 1 and not padded and first.dtype == dtype and first.is_contiguous():  # kernels read rows
        stack, copies = first, []
    else:
        # A padding of anything but zeros would meet the zeros of dS as NaN sooner or later.
        new = torch.zeros if padded else torch.empty
        stack = new((len(adapters) * rank, first.shape[1]), dtype=dtype, device=first.device)
        copies = [(stack[j * rank : j * rank + one.a.shape[0]], one.a) for j, one in enumerate(adapters)]
    ups = tuple(one.b if one.b.dtype == dtype else torch.empty_like(one.b, dtype=dtype) for one in adapters)
    copies += [(up, one.b) for up, one in zip(ups, adapters, strict=True) if up is not one.b]
    return Factors(stack, ups, rank), copies


class PassCasts:
    """Casts the factors of all of a model's groups when a pass asks for the first: in one call instead of one a group.

    Which groups there are an earlier pass that began with the same one has shown: a reference's adapters take turns
    with those that train. What is cast lives as long as the pass, or its graph: the next one casts anew.

    Args:
        apart: asked when a pass had groups that were not known; where it says so, every group is cast by itself.
    """

    def __init__(self, apart: Callable[[], bool] = lambda: False) -> None:
        self._may_not = apart
        self._apart = False
        self._passes: dict[_Group, _Groups] = {}
        self._seen: _Groups = {}
        self._ready: dict[_Group, Factors] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a pass: a forward, without the backward."""
        token = _RUNNING.set(self)
        try:
            yield
        finally:
            _RUNNING.reset(token)
            self._remember(self._seen)
            self._seen, self._ready = {}, None

    def factors(self, adapters: Sequence[Adapter], dtype: torch.dtype) -> Factors:
        # The tensors are held as long as their numbers are.
        group = tuple((id(one.a), id(one.b)) for one in adapters), dtype
        self._seen[group] = adapters, dtype
        if self._ready is None:
            laid = {one: _laid(*found) for one, found in {**self._passes.get(group, {}), **self._seen}.items()}
            _copy([copy for _, copies in laid.values() for copy in copies])
            self._ready = {one: factors for one, (factors, _) in laid.items()}
        if group not in self._ready:
            self._ready[group], copies = _laid(adapters, dtype)
            _copy(copies)
        return self._ready[group]

    def _remember(self, seen: _Groups) -> None:
        if not seen:  # without adapters: nothing is said of the next pass that has them
            return
        first = next(iter(seen))
        known = self._passes.pop(first, {})
        if not seen.keys() <= known.keys():
            self._apart = self._may_not()
        if self._apart:
            self._passes.clear()
            return
        self._passes[first] = seen
        while len(self._passes) > _PASSES:  # an adapter that is deleted is let go of
            del self._passes[next(iter(self._passes))]


_PASSES = 2
_Group = tuple[tuple[tuple[int, int], ...], torch.dtype]
_Groups = dict[_Group, tuple[Sequence[Adapter], torch.dtype]]
_RUNNING: ContextVar[PassCasts | None] = ContextVar("lora_casts", default=None)


def fusable(linears: Sequence[LoraLinear]) -> bool:
    """Whether what the adapters add can be a GLU's updates: one adapter a layer at most, of a rank that fits."""
    adapters = adapters_of(linears)
    return (bool(adapters) and all(len(linear.adapters) <= 1 for linear in linears)
            and all(adapter.a.shape[0] <= MAX_RANK for adapter in adapters))


def updates_of(
    linears: Sequence[LoraLinear], s: torch.Tensor, factors: Factors
) -> list[Update | None]:
    """What the one adapter of each layer adds to its output, None where it has none."""
    updates: list[Update | None] = []
    j = 0
    for linear in linears:
        updates.append(None)
        for adapter in linear.adapters:
            part = s[:, j * factors.rank : j * factors.rank + adapter.a.shape[0]]
            updates[-1] = Update(part, factors.ups[j].t(), adapter.scaling)
            j += 1
    return updates


def dropout_of(linears: Sequence[LoraLinear], seed: torch.Tensor | None, first: int = 0) -> Dropout | None:
    ps = tuple(adapter.dropout for adapter in adapters_of(linears))
    return Dropout(ps, seed, first) if seed is not None and any(ps) else None


def forward(
    x: torch.Tensor,
    linears: Sequence[LoraLinear],
    dropout: Dropout | None,
    factors: Factors | None,
    *,
    base_only: bool = False,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Outputs (T, N_i) and S (T, n R), None without adapters.

    `base_only`: outputs are the base layers' alone, and `updates_of` says what is still to be added.
    """
    dtype = x.dtype
    s = None
    if factors is not None:
        s = dropout.down(x, factors.stack) if dropout else torch.mm(x, factors.stack.t())
    eight = quantize_rows(x) if any(isinstance(linear.weight, Fp8Weight) for linear in linears) else None
    outs: list[torch.Tensor] = []
    j = 0
    for linear in linears:
        bias = _bias(linear, dtype)
        if isinstance(linear.weight, Fp8Weight):
            assert eight is not None
            out = fp8_mm(*eight, linear.weight.rows, linear.weight.row_scale, dtype, bias)
        else:
            weight = _weight(linear, dtype)
            out = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
            del weight  # before the next one is dequantised
        for adapter in () if base_only else linear.adapters:
            assert s is not None and factors is not None
            part = s[:, j * factors.rank : j * factors.rank + adapter.a.shape[0]]
            out.addmm_(part, factors.ups[j].t(), alpha=adapter.scaling)
            j += 1
        outs.append(out)
    return outs, s


def side_by_side(linears: Sequence[LoraLinear]) -> SideBySide | None:
    """The columns of exactly these layers' fp8 weights, where they lie side by side in this order."""
    weights = [linear.weight for linear in linears if isinstance(linear.weight, Fp8Weight)]
    beside = weights[0].beside if weights else None
    if beside is None or len(weights) != len(linears) or len(weights) != len(beside.widths):
        return None
    mine = all(weight.beside is beside and weight.place == place for place, weight in enumerate(weights))
    return beside if mine and together(beside.widths) else None


class UpGrads(NamedTuple):
    """dS (T, n R) of a group, and of its adapters, by number, the dB that came with it."""

    ds: torch.Tensor
    ups: dict[int, torch.Tensor]


def up_grads(
    douts: Sequence[torch.Tensor | None],
    linears: Sequence[LoraLinear],
    s: torch.Tensor | None,
    factors: Factors | None,
    needed: Sequence[bool],
) -> UpGrads | None:
    """dS from the gradients of the outputs, at least one of which is not None; None without adapters.

    With dB of those that are read once for both: what `needed` says, in the order of `flatten`, and is worth it.
    """
    if factors is None:
        return None
    given = next(dout for dout in douts if dout is not None)
    adapters, ups, at = adapters_of(linears), {}, 0
    whole = all(one.a.shape[0] == factors.rank for one in adapters) and all(dout is not None for dout in douts)
    new = torch.empty if whole else torch.zeros
    ds = new((given.shape[0], len(adapters) * factors.rank), dtype=given.dtype, device=given.device)
    j = 0
    for dout, linear in zip(douts, linears, strict=True):
        for k, adapter in enumerate(linear.adapters):
            columns = slice(j * factors.rank, j * factors.rank + adapter.a.shape[0])
            if dout is None:
                pass
            elif s is not None and needed[at + 3 + 3 * k] and _reads_once(dout, adapter):
                _, ups[j] = lora_up_grads(dout, factors.ups[j], s[:, columns], scaling=adapter.scaling,
                                          ds=ds[:, columns], dtype=adapter.b.dtype)
            else:
                ds[:, columns].addmm_(dout, factors.ups[j], beta=0, alpha=adapter.scaling)
            j += 1
        at += 2 + 3 * len(linear.adapters)
    return UpGrads(ds, ups)


def _reads_once(dout: torch.Tensor, adapter: Adapter) -> bool:
    """Whether dS and dB come of one launch: 16 bits where kernels run, and enough to read."""
    return (dout.dtype != torch.float32 and 0 < adapter.a.shape[0] <= READ_ONCE_RANK and dout.numel() >= READ_ONCE_FROM
            and (dout.is_cuda or _runtime.interpreting()))


def input_grad(
    douts: Sequence[torch.Tensor | None],
    linears: Sequence[LoraLinear],
    dropout: Dropout | None,
    factors: Factors | None,
    of_ups: UpGrads | None,
    *,
    base_only: bool = False,
) -> torch.Tensor:
    """dX (T, H) from the gradients of the outputs, at least one of which is not None, and dS.

    `base_only`: dX is the base layers' alone; dS A is still to be added to it.
    """
    there = [dout for dout in douts if dout is not None]
    dtype = there[0].dtype
    beside = side_by_side(linears) if len(there) == len(linears) else None
    dx: torch.Tensor | None = None
    for dout, linear in zip(douts, linears, strict=True):
        if dout is not None and isinstance(linear.weight, Fp8Weight):
            if beside is not None:
                continue
            columns = linear.weight.columns.contiguous()  # part of several, where not all of them are wanted
            part = fp8_mm(*quantize_rows(dout), columns, linear.weight.column_scale, dtype)
            dx = part if dx is None else dx.add_(part)
        elif dout is not None:
            weight = _weight(linear, dtype)
            dx = torch.mm(dout, weight) if dx is None else dx.addmm_(dout, weight)
            del weight
    if beside is not None:
        dx = fp8_mm(*quantize_rows_together(there), beside.columns, beside.scale, dtype)
    assert dx is not None
    if of_ups is not None and factors is not None and not base_only:
        if dropout:
            dropout.add_grad_x_(dx, of_ups.ds, factors.stack)
        else:
            dx.addmm_(of_ups.ds, factors.stack)
    return dx


def _mm_as(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b in `dtype`; 16-bit factors give an fp32 result without rounding it first."""
    if dtype == torch.float32 and a.dtype != dtype:
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.mm(a.float(), b.float())
    return torch.mm(a, b).to(dtype)


def param_grads(
    x: torch.Tensor | None,
    douts: Sequence[torch.Tensor | None],
    linears: Sequence[LoraLinear],
    s: torch.Tensor | None,
    of_ups: UpGrads | None,
    dropout: Dropout | None,
    needed: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients in the order of `flatten`, None where `needed` says so or the output took no part.

    Args:
        x: None where `needed` is False throughout.
    """
    if x is None:
        return [None] * len(needed)
    sizes = [2 + 3 * len(linear.adapters) for linear in linears]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    flags = [needed[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    da = None
    if any(dout is not None and any(wanted[2::3]) for dout, wanted in zip(douts, flags, strict=True)):
        assert of_ups is not None
        da = dropout.grad_a(x, of_ups.ds) if dropout else _mm_as(of_ups.ds.t(), x, torch.float32)
    rank = s.shape[1] // len(adapters_of(linears)) if s is not None else 0
    grads: list[torch.Tensor | None] = []
    j = 0
    for dout, linear, wanted in zip(douts, linears, flags, strict=True):
        if dout is None:
            grads += [None] * len(wanted)
        else:
            parts = [slice((j + k) * rank, (j + k) * rank + one.a.shape[0]) for k, one in enumerate(linear.adapters)]
            ups = [None if of_ups is None else of_ups.ups.get(j + k) for k in range(len(linear.adapters))]
            grads += _grads_of_one(x, dout, linear, s, da, ups, parts, wanted)
        j += len(linear.adapters)
    return grads


def _grads_of_one(
    x: torch.Tensor,
    dout: torch.Tensor,
    linear: LoraLinear,
    s: torch.Tensor | None,
    da: torch.Tensor | None,
    ups: Sequence[torch.Tensor | None],
    parts: Sequence[slice],
    wanted: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of one layer's weight, bias and, for each adapter, a, b and bias; `parts` are its columns of S."""
    grads: list[torch.Tensor | None] = [None] * len(wanted)
    if wanted[0]:
        assert isinstance(linear.weight, torch.Tensor)
        grads[0] = _mm_as(dout.t(), x, linear.weight.dtype)
    # Every third place from 1 on is a bias: the layer's, then the adapters'.
    columns = dout.sum(0, dtype=torch.float32) if any(wanted[1::3]) else None
    if columns is not None and wanted[1] and linear.bias is not None:
        grads[1] = columns.to(linear.bias.dtype)
    for k, (adapter, part) in enumerate(zip(linear.adapters, parts, strict=True)):
        at = 2 + 3 * k
        if wanted[at] and da is not None:
            grads[at] = da[part].to(adapter.a.dtype)
        if wanted[at + 1] and ups[k] is not None:
            grads[at + 1] = ups[k]
        elif wanted[at + 1] and s is not None:
            grads[at + 1] = _mm_as(dout.t(), s[:, part], adapter.b.dtype).mul_(adapter.scaling)
        if columns is not None and adapter.bias is not None and wanted[at + 2]:
            grads[at + 2] = (columns * adapter.scaling).to(adapter.bias.dtype)
    return grads


def gradient_rows(dout: torch.Tensor | None) -> torch.Tensor | None:
    """An incoming gradient as rows that cuBLAS takes as they are: `sum().backward()` gives it stride 0."""
    if dout is None:
        return None
    usable = dout.stride(1) == 1 and dout.stride(0) >= dout.shape[1]
    return dout if usable or dout.shape[0] <= 1 else dout.contiguous()
