"""Recording a CUDA graph so that nothing of the rest of the process ends it.

A capture ends with an error where a call is made meanwhile that CUDA cannot record: memory that is freed, a module that
is unloaded, a graph of before that is destroyed. Python's collector makes such calls when it finds a cycle that holds
one, at any moment and in any thread; other threads make them in their own affairs (a data loader's pins memory).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from aligntune.core.garbage import uncollected


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, *, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """What runs within is recorded in `graph`: no garbage is collected, and what other threads call is not looked at.

    Args:
        pool: of the memory that the graph writes to, from `torch.cuda.graph_pool_handle`.
        stream: to record on.
    """
    with uncollected(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        yield
