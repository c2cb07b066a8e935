"""What memory captured graphs and launched steps have beside each other.

The graphs' pool keeps what the longest of them needs for as long as they live, and nothing that is launched can have
it. So a step that is launched beside them needs its own: where that is not there, the graphs have to go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from aligntune.backends.fast.memory import SPARE, MemoryPlan, idle_in_pools, reachable

ROOM_SHARE = 0.5
"""Of the memory that is left, what a shape may need that is longer than a batch asks for."""


@dataclass
class GraphMemory:
    """Of one trainer's passes.

    Args:
        plan: of the layers that are recomputed, where there is one. Until it has measured, steps are launched: a graph
            recomputes what its capture did, and before layers are planned that is every one of them.

    `most_tokens`: of the passes with gradients so far, launched or replayed.
    `longest`: the longest batch of those that were launched.
    """

    plan: MemoryPlan | None = None
    most_tokens: int = 0
    longest: dict[str, Any] | None = None

    @property
    def waits(self) -> bool:
        """Whether steps are to be launched until they are planned."""
        return self.plan is not None and not self.plan.planned

    def ran(self, tokens: int, launched: dict[str, Any] | None) -> None:
        """A pass with gradients comes: of so many tokens, and where it is launched, of that batch."""
        if launched is not None and (self.longest is None or tokens > self.longest["input_ids"].shape[-1]):
            self.longest = launched
        self.most_tokens = max(self.most_tokens, tokens)

    def left(self) -> float:
        """Bytes that launched passes can have beside what stands and beside the graphs' pool, and within a budget.

        A budget is of what is allocated, and idle blocks are not.
        """
        standing = torch.cuda.memory_allocated()
        reach = reachable() * (1 - SPARE)
        budget = math.inf if self.plan is None or self.plan.budget is None else self.plan.budget
        return min(reach - idle_in_pools(), budget) - standing

    def takes(self, tokens: int) -> float:
        """Bytes that a step of so many tokens takes above what stands: as planned, or by the largest one so far."""
        if self.plan is not None:
            return self.plan.takes(tokens)
        if not self.most_tokens:
            return math.inf
        return tokens / self.most_tokens * (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())

    def suffices(self, tokens: int) -> bool:
        """Whether a step of so many tokens can be launched beside the graphs."""
        return self.takes(tokens) <= self.left()

    def plentiful(self, tokens: int) -> bool:
        """Whether one would leave as much as it takes."""
        return self.takes(tokens) < ROOM_SHARE * self.left()
