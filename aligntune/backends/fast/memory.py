"""How many layers a step recomputes: the fewest with which it fits, by what the first step was measured to take.

Bytes of a step, with T its tokens and k the layers that keep their activations:

    base + gradients + T (step + k layer)

`base` is what stands between steps (weights, optimizer state), `step` what a step with every layer recomputed takes
above that, `layer` what one layer keeps for its backward. The first step recomputes every layer and measures `step`
and `layer`; `base` is read when the second begins, when the optimizer has made its state. Each batch is then planned
by its own length: a long one recomputes more layers than a short one.

The peak that is measured is taken without the gradients, which the first micro-batch only makes as it goes back. Where
micro-batches accumulate, those after it find them there when their forward ends: `step` is at least what that takes.

Part of `step` are the head's logits: of all rows, and no more than `logits_budget`. A shorter batch may come up to
that, too, and where no layer is recomputed it is more than was measured: what is missing is added.

Part of `step` is a tile of an MLP (`tiles`), which a shorter batch takes as a whole and a longer one shares: what is
planned is the larger of T step and T (step - tile of the measured batch) + tile of this one. A layer that keeps its
activations goes back through its MLP as a whole: where there is one, `step` is at least what that takes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from aligntune.backends.fast.ops.head import MEMORY_BUDGET
from aligntune.backends.fast.recompute import Recompute
from aligntune.backends.fast.tiles import tile_bytes

GIB = 1 << 30
SPARE = 0.06
"""Share of the memory that is planned with and stays free: blocks of the allocator that fit nothing."""


def logits_budget(recomputed: bool) -> int:
    """Bytes that the head's logits may take: a quarter of what is usual where layers are recomputed to save memory."""
    return MEMORY_BUDGET // 4 if recomputed else MEMORY_BUDGET


def reachable(device: torch.device | None = None) -> int:
    """Bytes of the GPU that this process can have, with what it has; no more than the share that it is held to."""
    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(free + torch.cuda.memory_reserved(device), int(share * total))


def idle_in_pools() -> int:
    """Bytes of the pools of CUDA graphs that hold nothing now: their graphs write there, and nobody else may."""
    return sum(segment["total_size"] - segment["allocated_size"] for segment in torch.cuda.memory_snapshot()
               if tuple(segment["segment_pool_id"]) != (0, 0))


@dataclass
class Costs:
    """What was measured, in a batch of `tokens`: bytes, and bytes a token.

    `layers`: of the model; `logits_row`: bytes that the logits of one token take at most.
    """

    base: int
    gradients: int
    step: float
    layer: float
    layers: int
    tokens: int = 0
    logits_row: int = 0
    shape: dict[str, Any] | None = None

    def recomputed(self, tokens: int) -> float:
        """Bytes that `tokens` take above what stands, every layer recomputed; of what was measured at `self.tokens`."""
        linear = tokens * self.step
        if self.shape is None or not self.tokens:
            return linear
        tile = tile_bytes(self.tokens, **self.shape)
        return max(linear, tokens * (self.step - tile / self.tokens) + tile_bytes(tokens, **self.shape))

    def whole(self, tokens: int) -> float:
        """Bytes that the backward of a layer that kept its activations takes beside them."""
        if self.shape is None:
            return 0
        return tokens * (self.shape["width"] + 3 * self.shape["hidden"]) * self.shape["element_size"]

    def logits(self, tokens: int, kept: int) -> float:
        """Bytes that the head's logits may take beside their share of `recomputed`."""
        share = tokens / self.tokens * min(logits_budget(True), self.tokens * self.logits_row) if self.tokens else 0
        return max(0, min(logits_budget(kept < self.layers), tokens * self.logits_row) - share)

    def of(self, tokens: int, kept: int) -> float:
        """Bytes at the peak of a step of `tokens`, `kept` layers keeping their activations."""
        step = max(self.recomputed(tokens), self.whole(tokens) if kept else 0)
        return self.base + self.gradients + self.logits(tokens, kept) + step + tokens * kept * self.layer

    def kept(self, tokens: int, budget: float) -> int:
        """The most layers that can keep their activations within `budget` bytes."""
        return max((kept for kept in range(self.layers + 1) if self.of(tokens, kept) <= budget), default=0)


@dataclass
class MemoryPlan:
    """Plans each step of one trainer.

    Args:
        recompute: the model's layers.
        budget: bytes that the steps may take at their peak; None is what this process can have of the GPU.
        gradients: bytes of the gradients of what trains.
        logits_row: bytes that the logits of one token take at most; 0 of a model without a head.
        accumulates: whether several micro-batches make a step.
    """

    recompute: Recompute
    budget: int | None
    gradients: int
    logits_row: int = 0
    accumulates: bool = False
    costs: Costs | None = None
    most: int = 0
    keeps: float = 0  # bytes that the kept layers of the last step took
    _began: int | None = None
    _first: tuple[int, int, float, dict[str, Any] | None] | None = None

    @contextmanager
    def step(self, tokens: int, *, number: int, most: int | None = None) -> Iterator[None]:
        """Around forward and backward of `tokens`, in optimizer step `number`.

        Args:
            most: tokens whose memory they may take, where that is more (a longer shape that was captured); a step is
                measured by its own.
        """
        if self._began is None:
            self._began = number
        if self.costs is None and self._first is not None and number != self._began:
            self._settle()
        if self.costs is not None:
            tokens = max(tokens, most or 0)
            kept = self.costs.kept(tokens, self.reach())
            self.most = max(self.most, len(self.recompute.layers) - kept)
            self.keeps = kept * tokens * self.costs.layer
            self.recompute.choose(len(self.recompute.layers) - kept)
            yield
            return
        measuring = self._first is None
        self.recompute.choose(None)
        self.recompute.measure = measuring
        if measuring:
            gc.collect()  # an earlier trainer's tensors, let go of halfway through, would be missing from the peak
            # The peak so far is that of another thing: an evaluation, a rollout, whatever a script did before.
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        if measuring and self.recompute.measured is not None:
            step = max(0, torch.cuda.max_memory_allocated() - before - self.gradients)
            if self.accumulates and self.recompute.forward_peak is not None:
                step = max(step, self.recompute.forward_peak - before)
            self._first = (tokens, step, self.recompute.measured, self.recompute.shape)

    def _settle(self) -> None:
        assert self._first is not None
        tokens, step, layer, shape = self._first
        base = torch.cuda.memory_allocated()
        layers = len(self.recompute.layers)
        self.costs = Costs(base, self.gradients, step / tokens, layer / tokens, layers, tokens, self.logits_row, shape)
        torch.cuda.empty_cache()  # blocks cut for the first step would lie idle beside larger ones

    @property
    def planned(self) -> bool:
        """Whether steps are planned yet: before, every layer is recomputed, which later steps are not to be."""
        return self.costs is not None

    def training_begins(self) -> None:
        """Steps are numbered anew; one that an earlier training measured was its first, and its only one."""
        self._began = None if self._first is None else -1

    def reach(self) -> float:
        """Bytes that steps may take at their peak, with what stands."""
        if self.budget is not None:
            return self.budget
        return reachable() * (1 - SPARE)

    def takes(self, tokens: int) -> float:
        """Bytes that a step of so many tokens takes above what stands."""
        assert self.costs is not None
        kept = self.costs.kept(tokens, self.reach())
        return self.costs.of(tokens, kept) - self.costs.base

    def __str__(self) -> str:
        layers = len(self.recompute.layers)
        if self.costs is None:
            return f"all {layers} layers recomputed until a step is measured"
        many = "no layer" if not self.most else f"up to {self.most} of {layers} layers"
        return (f"{many} recomputed; measured: {self.costs.base / GIB:.2f} GiB between steps, and for 1,000 tokens "
                f"{self.costs.step * 1000 / GIB:.3f} GiB and {self.costs.layer * 1000 / GIB:.4f} GiB a kept layer")
