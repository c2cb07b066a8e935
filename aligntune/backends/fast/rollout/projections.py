"""Linear layers as a decode step runs them: adapters unmerged, one launch a group, weights read where they are.

Training casts the factors of every group at every call, because they change between calls. Within a rollout they do
not: here they are cast once, when it begins, into buffers that stay where the captured graphs read them, A_i of all
layers on one input one below the other, and s_i B_i too.

    out_i = X W_i^T + (X A_i^T) (s_i B_i)^T

In 16 bits on a GPU few rows take `decode_linear`, which under autocast also rounds fp32 weights as it reads them, those
of the head too, or `decode_linear_nf4`, which unpacks four bits as it reads them: a step then writes no copy of a
weight. Many rows, and fp32, take cuBLAS's products, each layer's into its columns of one buffer; there the s_i B_i also
lie on a diagonal, so that one product adds every layer's update.

Plain layers are taken where that spares launches or casts; one alone in the type that it is multiplied in spares none.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from aligntune.backends.fast import lora
from aligntune.backends.fast.forwards import KEY, AttentionSpec, MlpSpec
from aligntune.backends.fast.ops import decode_linear as op
from aligntune.backends.fast.ops import decode_linear_nf4 as op_nf4
from aligntune.backends.fast.ops._runtime import interpreting
from aligntune.backends.fast.ops.fp8 import Fp8Weight
from aligntune.backends.fast.ops.lora import LoraLinear
from aligntune.backends.fast.ops.nf4 import NF4Weight, dequantize_nf4


@dataclass
class Projection:
    """Layers on one input; call it with (.., H) for one (.., N_i) a layer in `dtype`, columns of one buffer.

    Under autocast the input may be of another type and is cast, as autocast would. `counts`: what `decode_linear`
    counts in, one for all groups of a stream; None takes cuBLAS's products always.
    """

    linears: list[LoraLinear]
    dtype: torch.dtype
    counts: torch.Tensor | None = None
    sizes: list[int] = field(init=False)
    rank: int = field(init=False)
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    diagonal: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.sizes = [linear.weight.shape[0] for linear in self.linears]
        ranks = [sum(adapter.a.shape[0] for adapter in linear.adapters) for linear in self.linears]
        self.rank = op.padded_rank(max(ranks))
        adapters = [adapter for linear in self.linears for adapter in linear.adapters]
        if adapters:
            a = adapters[0].a
            self.down = a.new_zeros((len(self.linears) * self.rank, a.shape[1]), dtype=self.dtype)
            self.up = a.new_zeros((sum(self.sizes), self.rank), dtype=self.dtype)
            self.diagonal = a.new_zeros((sum(self.sizes), len(self.linears) * self.rank), dtype=self.dtype)
        biases = [linear.bias for linear in self.linears if linear.bias is not None]
        if biases:
            self.bias = biases[0].new_zeros(sum(self.sizes), dtype=self.dtype)

    def refresh(self) -> None:
        """Take the factors and biases as they are now."""
        column = 0
        for number, (linear, size) in enumerate(zip(self.linears, self.sizes, strict=True)):
            if linear.bias is not None and self.bias is not None:
                self.bias[column : column + size].copy_(linear.bias)
            row = 0
            for adapter in linear.adapters:
                assert self.down is not None and self.up is not None
                rank = adapter.a.shape[0]
                self.down[number * self.rank + row : number * self.rank + row + rank].copy_(adapter.a)
                self.up[column : column + size, row : row + rank].copy_(adapter.b.float() * adapter.scaling)
                row += rank
            if self.diagonal is not None and self.up is not None:
                block = self.diagonal[column : column + size, number * self.rank : (number + 1) * self.rank]
                block.copy_(self.up[column : column + size])
            column += size

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_autocast_enabled(x.device.type):
            rows = rows.to(self.dtype)
        if self.counts is not None and op.fits(rows.shape[0], len(self.linears), self.rank):
            out = self._together(rows, down=self.down, up=self.up, bias=self.bias, counts=self.counts)
        else:
            out = self._apart(rows)
        return out.view(*x.shape[:-1], -1).split(self.sizes, dim=-1)

    def _together(self, rows: torch.Tensor, **options: torch.Tensor | None) -> torch.Tensor:
        """In one launch; what it cannot read as it is stored is unpacked, or cast, before it."""
        packed = [linear.weight for linear in self.linears if isinstance(linear.weight, NF4Weight)]
        if len(packed) == len(self.linears) and op_nf4.unreadable_because(packed) is None:
            return op_nf4.decode_linear_nf4(rows, packed, **options)
        weights = [self._weight(linear) for linear in self.linears]
        if len({weight.dtype for weight in weights}) > 1:  # the kernel reads one type
            weights = [weight.to(self.dtype) for weight in weights]
        return op.decode_linear(rows, weights, **options)

    def _weight(self, linear: LoraLinear) -> torch.Tensor:
        if isinstance(linear.weight, NF4Weight):
            return dequantize_nf4(linear.weight, dtype=self.dtype)
        assert isinstance(linear.weight, torch.Tensor)  # `_add` leaves fp8 copies to their layers
        return linear.weight

    def _apart(self, rows: torch.Tensor) -> torch.Tensor:
        """Product by product."""
        out = torch.empty((rows.shape[0], sum(self.sizes)), dtype=rows.dtype, device=rows.device)
        column = 0
        for linear, part in zip(self.linears, out.split(self.sizes, dim=1), strict=True):
            weight = self._weight(linear).to(self.dtype)
            if linear.bias is None:
                torch.mm(rows, weight.t(), out=part)
            else:
                assert self.bias is not None
                torch.addmm(self.bias[column : column + part.shape[1]], rows, weight.t(), out=part)
            del weight  # before the next one is dequantised, or cast
            column += part.shape[1]
        if self.down is not None and self.diagonal is not None:
            out.addmm_(torch.mm(rows, self.down.t()), self.diagonal.t())
        return out


def _adapted(linears: list[LoraLinear]) -> bool:
    """Whether layers have more to them than a product each: adapters, or weights in four bits."""
    return any(linear.adapters or isinstance(linear.weight, NF4Weight) for linear in linears)


class Projections:
    """Every group of an attached model that gains by it, by the module that asks for it; under autocast its head too.

    Args:
        model: a causal language model.
        autocast: the type that steps run under autocast to; None runs the modules as they are.
        kernels: few rows may take `decode_linear`.
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None = None, kernels: bool = True) -> None:
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        self._dtype, self._autocast = autocast or embedding.dtype, autocast
        half = self._dtype in (torch.bfloat16, torch.float16) and (embedding.is_cuda or interpreting())
        self._counts = (
            torch.zeros(op.MAX_PLACES, dtype=torch.int32, device=embedding.device) if half and kernels else None
        )
        self._groups: list[tuple[nn.Module, dict[tuple[str, ...], Projection]]] = []
        for module in model.modules():
            spec = module.__dict__.get(KEY)
            if isinstance(spec, AttentionSpec):
                assert spec.family is not None
                packed = spec.family.attention == "packed"
                self._add(module, ("qkv_proj",) if packed else ("q_proj", "k_proj", "v_proj"))
                self._add(module.o_proj, ())  # it is called by itself
            elif isinstance(spec, MlpSpec):
                self._add(module, ("gate_up_proj",) if spec.packed else ("gate_proj", "up_proj"), ("down_proj",))
        head = model.get_output_embeddings()  # type: ignore[operator]
        if lora.kind_of(head) == "plain":
            self._add(head, ())

    def _add(self, module: nn.Module, *groups: tuple[str, ...]) -> None:
        """All groups of a module, or none: a layer with hooks is called as it is, and one that has fp8 copies.

        Those run as training runs them. Rounded at any other place, numbers here and there would become another e4m3
        number, 2^-4 apart, and tokens be drawn from a policy that is not the one that learns.
        """
        members = {}
        for names in groups:
            found = [lora.ready_to_read(module._modules[name]) for name in names] if names else [
                lora.ready_to_read(module)]  # fmt: skip
            linears = [linear for linear in found if linear is not None]
            if len(linears) < len(found) or not all(map(self._can_read, linears)):
                return
            members[names] = linears
        gains = [self._gains(linears) for linears in members.values()]
        if all(map(_adapted, members.values())) or any(gains):
            made = {names: Projection(linears, self._dtype, self._counts if gain else None)
                    for (names, linears), gain in zip(members.items(), gains, strict=True)}  # fmt: skip
            self._groups.append((module, made))

    def _can_read(self, linear: LoraLinear) -> bool:
        if isinstance(linear.weight, Fp8Weight) or any(adapter.bias is not None for adapter in linear.adapters):
            return False
        # 4-bit weights come out in any type; others are multiplied as they are, but for what autocast would cast.
        return isinstance(linear.weight, NF4Weight) or linear.weight.dtype == self._dtype or (
            self._autocast is not None and linear.weight.dtype == torch.float32)  # fmt: skip

    def _gains(self, linears: list[LoraLinear]) -> bool:
        """Whether `decode_linear` spares these layers launches, or casts."""
        return self._counts is not None and (len(linears) > 1 or _adapted(linears) or any(
            isinstance(linear.weight, torch.Tensor) and linear.weight.dtype != self._dtype for linear in linears))

    def __len__(self) -> int:
        return sum(len(groups) for _, groups in self._groups)

    def refresh(self) -> None:
        """Take all factors as they are now; once a rollout."""
        for _, groups in self._groups:
            for projection in groups.values():
                projection.refresh()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While open, the attached forwards call these in the place of their layers, and so do plain layers alone."""
        before: list[tuple[nn.Module, str, Any]] = []
        try:
            for module, groups in self._groups:
                module.__dict__[lora.STEP] = groups
                if () in groups and lora.kind_of(module) == "plain":  # the others' forward is this one already
                    name = lora.slot(module)
                    before.append((module, name, module.__dict__.get(name)))
                    module.__dict__[name] = types.MethodType(lora.linear_forward, module)
            yield
        finally:
            for module, name, forward in before:
                if forward is None:
                    del module.__dict__[name]
                else:
                    module.__dict__[name] = forward
            for module, _ in self._groups:
                module.__dict__.pop(lora.STEP, None)
