"""Linear layers under adapters as a decode step runs them: adapters unmerged, in two launches a group.

Training casts the factors of every group at every call, because they change between calls. Within a rollout they do
not: here they are cast once, when it begins, into buffers that stay where the captured graphs read them. The factors
B of all layers on one input lie block by block on a diagonal, so that one product adds every layer's update:

    out = X [W_1; W_2; ..]^T + (X [A_1; A_2; ..]^T) diag(s_1 B_1, s_2 B_2, ..)^T

The base weights are read where they are, one product each into its columns of `out`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from aligntune.backends.fast import lora
from aligntune.backends.fast.forwards import KEY, AttentionSpec, MlpSpec
from aligntune.backends.fast.ops.lora import LoraLinear
from aligntune.backends.fast.ops.nf4 import NF4Weight, dequantize_nf4


@dataclass
class Projection:
    """Layers on one input; call it with (.., H) for one (.., N_i) a layer, columns of one buffer."""

    linears: list[LoraLinear]
    dtype: torch.dtype
    sizes: list[int] = field(init=False)
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.sizes = [linear.weight.shape[0] for linear in self.linears]
        adapters = [adapter for linear in self.linears for adapter in linear.adapters]
        if adapters:
            a, ranks = adapters[0].a, sum(adapter.a.shape[0] for adapter in adapters)
            self.down = a.new_zeros((ranks, a.shape[1]), dtype=self.dtype)
            self.up = a.new_zeros((sum(self.sizes), ranks), dtype=self.dtype)

    def refresh(self) -> None:
        """Take the factors as they are now."""
        row = column = 0
        for linear, size in zip(self.linears, self.sizes, strict=True):
            for adapter in linear.adapters:
                assert self.down is not None and self.up is not None
                rank = adapter.a.shape[0]
                self.down[row : row + rank].copy_(adapter.a)
                self.up[column : column + size, row : row + rank].copy_(adapter.b.float() * adapter.scaling)
                row += rank
            column += size

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty((rows.shape[0], sum(self.sizes)), dtype=rows.dtype, device=rows.device)
        for linear, part in zip(self.linears, out.split(self.sizes, dim=1), strict=True):
            weight = linear.weight
            if isinstance(weight, NF4Weight):
                weight = dequantize_nf4(weight, dtype=rows.dtype)
            assert isinstance(weight, torch.Tensor)  # `ready_to_read` gives no fp8 copies
            if linear.bias is None:
                torch.mm(rows, weight.t(), out=part)
            else:
                torch.addmm(linear.bias, rows, weight.t(), out=part)
        if self.down is not None and self.up is not None:
            out.addmm_(torch.mm(rows, self.down.t()), self.up.t())
        return out.view(*x.shape[:-1], -1).split(self.sizes, dim=-1)


class Projections:
    """Every group of an attached model that gains by it, by the module that asks for it."""

    def __init__(self, model: nn.Module) -> None:
        self._dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
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

    def _add(self, module: nn.Module, *groups: tuple[str, ...]) -> None:
        """All groups of a module, or none: a layer with hooks is called as it is."""
        made = {}
        for names in groups:
            members = [module._modules[name] for name in names] if names else [module]
            found = [lora.ready_to_read(member) for member in members]
            linears = [linear for linear in found if linear is not None]
            if len(linears) < len(members) or not any(
                linear.adapters or isinstance(linear.weight, NF4Weight) for linear in linears
            ):
                return
            if any(adapter.bias is not None for linear in linears for adapter in linear.adapters):
                return
            # 4-bit weights come out in any type; the others are multiplied as they are.
            plain = {linear.weight.dtype for linear in linears if isinstance(linear.weight, torch.Tensor)}
            if plain - {self._dtype}:
                return
            made[names] = Projection(linears, self._dtype)
        self._groups.append((module, made))

    def __len__(self) -> int:
        return sum(len(groups) for _, groups in self._groups)

    def refresh(self) -> None:
        """Take all factors as they are now; once a rollout."""
        for _, groups in self._groups:
            for projection in groups.values():
                projection.refresh()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While open, the attached forwards call these in the place of their layers."""
        try:
            for module, groups in self._groups:
                module.__dict__[lora.STEP] = groups
            yield
        finally:
            for module, _ in self._groups:
                module.__dict__.pop(lora.STEP, None)
