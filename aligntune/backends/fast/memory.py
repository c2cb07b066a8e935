"""How many layers a step recomputes: the fewest with which it fits, by what the first step was measured to take.

Bytes at the peak of a step, with T its tokens, n layers and k of them that keep their activations, above what stands
between steps (weights, optimizer state), are the most of

    held + T forward + logits + dW + T k layer                      when the forward ends
    held + T standing + T passing + T k layer                       in the last layer that keeps its own
    T standing + one whole layer + made + T k layer                 when the first layer goes back, or, of k that keep
    T standing + one whole layer + made + k/n gradients             theirs, the last
    gradients + T backward                                          at the end of the way back

The first step recomputes every layer and measures a token's bytes: `forward` when the forward ends, `standing` when the
way back begins, `backward` on it, what one `layer` keeps, and `passing`, what that layer takes beside it in its
forward. What stands between steps is read when the second begins, when the optimizer has made its state, and raised
where more stands later. Each batch is planned by its own length: a long one recomputes more layers than a short one.

* `held` are gradients that are there when a forward begins: those of earlier micro-batches of the step. `made` are
  these, or the head's where there are none.
* Logits are the head's chunk, by `logits_budget`, which does not grow with the tokens.
* dW is the fp32 sum of the gradient of a head that trains, as large for a short batch as for a long one.
* Part of `backward` is a tile of an MLP (`tiles`), which a shorter batch takes as a whole and a longer one shares. A
  layer that kept its activations goes back through its MLP as a whole; one that is not known in parts is taken to need
  as much again as it kept.
* Layers are taken to be alike: of two in the middle the one that keeps more is measured.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from aligntune.backends.fast.ops.head import MEMORY_BUDGET, LogitsBuffer
from aligntune.backends.fast.recompute import Recompute
from aligntune.backends.fast.tiles import tile_bytes

GIB = 1 << 30
SPARE = 0.06
"""Share of the memory that is planned with and stays free: blocks of the allocator that fit nothing."""
WORKSPACES = 1 << 26
"""Bytes that no step measured: cuBLAS's on the stream that captures (32 MiB on Hopper), and what little is constant."""
GROWTH = 1 << 28
"""Bytes that may come to what stands between steps without being planned with: graphs' inputs, workspaces."""


def logits_budget(recomputed: bool) -> int:
    """Bytes that the head's logits may take: a quarter of what is usual where layers are recomputed to save memory."""
    return MEMORY_BUDGET // 4 if recomputed else MEMORY_BUDGET


def reachable(device: torch.device | None = None) -> int:
    """Bytes of the GPU that this process can have, with what it has; no more than the share that it is held to."""
    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(free + torch.cuda.memory_reserved(device), int(share * total))


def scores_held(model: Any, length: int) -> int:
    """`length` of a model's padded rows where its attention holds the scores of all pairs in a row, else 0."""
    config = getattr(model, "config", None)
    return length if getattr(config, "_attn_implementation", None) == "eager" else 0


def idle_in_pools() -> int:
    """Bytes of the pools of CUDA graphs that hold nothing now: their graphs write there, and nobody else may."""
    return sum(segment["total_size"] - segment["allocated_size"] for segment in torch.cuda.memory_snapshot()
               if tuple(segment["segment_pool_id"]) != (0, 0))


@dataclass
class Costs:
    """What was measured, in a batch of `tokens`: bytes, and bytes a token.

    Args:
        base: what stands between steps.
        gradients: of what trains.
        forward: a token's when the forward ends, every layer recomputed, without logits and dW.
        standing: a token's when the way back begins, every layer recomputed, without gradients of what trains.
        backward: a token's on the way back, every layer recomputed, without the gradients.
        layer: a token's that one layer keeps for its backward.
        passing: a token's that one layer takes beside that while it is computed.
        layers: of the model.
        held: gradients that stand when a forward begins.
        head_sum: dW of the head where it trains, `head_gradient` what remains of it.
        head: what the head's logits take; None of a model without a head.
        shape: what `tiles.tile_bytes` wants to know of a layer; None where none is tiled.
    """

    base: int
    gradients: int
    forward: float
    standing: float
    backward: float
    layer: float
    passing: float
    layers: int
    tokens: int = 0
    held: int = 0
    head_sum: int = 0
    head_gradient: int = 0
    head: LogitsBuffer | None = None
    shape: dict[str, Any] | None = None

    def recomputed(self, tokens: int) -> float:
        """Bytes that layers take that are recomputed on the way back."""
        linear = tokens * self.backward
        if self.shape is not None and self.tokens:
            tile = tile_bytes(self.tokens, **self.shape)
            own = tile_bytes(tokens, **self.shape)
            linear = max(linear, tokens * max(0.0, self.backward - tile / self.tokens) + own)
        # What of dW is in `backward`, nobody has measured.
        return linear + self.head_sum * max(0.0, 1 - tokens / self.tokens) if self.tokens else linear

    def whole(self, tokens: int) -> float:
        """Bytes that the backward of a layer that kept its activations takes beside them."""
        if self.shape is None:
            return tokens * self.layer
        return tokens * (self.shape["width"] + 3 * self.shape["hidden"]) * self.shape["element_size"]

    def first_back(self, tokens: int) -> float:
        """Bytes, without gradients that are there already, when the first of layers that are recomputed goes back.

        As one that kept its activations, and its output made again; no more than the peak that was measured, which
        came when some gradients had been made at least.
        """
        output = 0 if self.shape is None else tokens * self.shape["hidden"] * self.shape["element_size"]
        as_kept = tokens * (self.standing + self.layer) + self.whole(tokens) + output
        more = self.gradients - self.head_gradient
        return min(as_kept, self.recomputed(tokens) + more * (tokens / self.tokens if self.tokens else 1))

    def logits(self, tokens: int, kept: int) -> int:
        """Bytes of the head's logits, all of the tokens being scored."""
        return 0 if self.head is None else self.head.most(tokens, logits_budget(kept < self.layers))

    def of(self, tokens: int, kept: int) -> float:
        """Bytes at the peak of a step of `tokens`, `kept` layers keeping their activations."""
        standing, activations = tokens * self.standing, tokens * kept * self.layer
        made = self.held or self.head_gradient
        found = [self.held + tokens * self.forward + self.logits(tokens, kept) + self.head_sum + activations,
                 made + self.first_back(tokens),
                 self.gradients + self.recomputed(tokens)]
        if kept:
            later = 0 if self.held else kept / self.layers * (self.gradients - self.head_gradient)
            found += [self.held + standing + tokens * self.passing + activations,
                      standing + self.whole(tokens) + made + max(activations, later)]
        return self.base + WORKSPACES + max(found)

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
        head: bytes of the fp32 sum of the gradient of a head that trains, and of the gradient.
        accumulates: whether several micro-batches make a step.
    """

    recompute: Recompute
    budget: int | None
    gradients: int
    head: tuple[int, int] = (0, 0)
    accumulates: bool = False
    costs: Costs | None = None
    most: int = 0
    keeps: float = 0  # bytes that the kept layers of the last step took
    _began: int | None = None
    _number: int | None = None
    _length: int = 0
    _first: Callable[[int], Costs] | None = None

    @contextmanager
    def step(self, tokens: int, *, number: int, most: int | None = None, length: int = 0) -> Iterator[None]:
        """Around forward and backward of `tokens`, in optimizer step `number`.

        Args:
            most: tokens whose memory they may take, where that is more (a longer shape that was captured); a step is
                measured by its own.
            length: of the padded rows, where attention holds the scores of all pairs in a row: a token of a longer
                row than the measured ones takes as many times as much.
        """
        if self._first is None:
            self._length = length
        tokens = math.ceil(tokens * max(1.0, length / self._length)) if self._length else tokens
        if self._began is None:
            self._began = number
        if self.costs is None and self._first is not None and number != self._began:
            self._settle()
        if self.costs is not None:
            if number != self._number:
                self._number = number
                self._raise(torch.cuda.memory_allocated())  # before its first micro-batch: no gradient is there
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
            self._first = self._measured(tokens, before)

    def _measured(self, tokens: int, before: int) -> Callable[[int], Costs]:
        """What the step that ends took, of so many bytes that stood before: costs by what stands between steps."""
        layers, peak = self.recompute, torch.cuda.max_memory_allocated()
        forward = peak if layers.forward_peak is None else layers.forward_peak
        standing = (forward if layers.standing is None else layers.standing) - self.head[1]
        logits = 0 if layers.head is None else layers.head.chunk(layers.head.rows, logits_budget(True))
        ends = forward - logits - self.head[0]
        if layers.before_head is not None and forward <= layers.before_head[0]:
            ends = min(ends, max(standing, layers.before_head[1]))  # the peak was a layer's, not the head's

        def of_a_token(stood: int) -> float:
            return max(0, stood - before) / tokens

        return functools.partial(
            Costs, gradients=self.gradients, forward=of_a_token(ends), standing=of_a_token(standing),
            backward=of_a_token(peak - self.gradients), layer=(layers.measured or 0) / tokens,
            passing=layers.passing / tokens, layers=len(layers.layers), tokens=tokens,
            held=self.gradients if self.accumulates else 0, head_sum=self.head[0], head_gradient=self.head[1],
            head=layers.head, shape=layers.shape)

    def _raise(self, standing: int) -> None:
        """Plan with what stands now, where that is much more than what did: an optimizer's state that came late."""
        assert self.costs is not None
        if standing > self.costs.base * (1 + SPARE) + GROWTH:
            self.costs.base = standing

    def _settle(self) -> None:
        assert self._first is not None
        self.costs = self._first(torch.cuda.memory_allocated())
        torch.cuda.empty_cache()  # blocks cut for the first step would lie idle beside larger ones

    @property
    def planned(self) -> bool:
        """Whether steps are planned yet: before, every layer is recomputed, which later steps are not to be."""
        return self.costs is not None

    def training_begins(self) -> None:
        """Steps are numbered anew; one that an earlier training measured was its first, and its only one."""
        self._began, self._number = None if self._first is None else -1, None

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
        step = max(self.costs.forward, self.costs.backward)
        return (f"{many} recomputed; measured: {self.costs.base / GIB:.2f} GiB between steps, and for 1,000 tokens "
                f"{step * 1000 / GIB:.3f} GiB and {self.costs.layer * 1000 / GIB:.4f} GiB a kept layer")
