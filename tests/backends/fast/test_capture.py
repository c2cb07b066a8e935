"""A capture goes on whatever Python's collector and other threads would do meanwhile."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from aligntune.backends.fast.capture import capturing
from aligntune.core.garbage import uncollected


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_meanwhile(enabled: bool, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    @contextlib.contextmanager
    def graph(*given: Any, **options: Any) -> Iterator[None]:
        asked.append((given, options, gc.isenabled()))
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with (pytest.raises(ValueError, match="a step") if fails else contextlib.nullcontext(),
              capturing("graph", pool=(1, 2), stream="side")):  # type: ignore[arg-type]  # fmt: skip
            assert not gc.isenabled()
            if fails:
                raise ValueError("a step failed")
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert asked == [(("graph",), {"pool": (1, 2), "stream": "side", "capture_error_mode": "thread_local"}, False)]


def test_captures_that_overlap_end_with_the_last() -> None:
    first, second = uncollected(), uncollected()
    assert gc.isenabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


@pytest.mark.gpu
def test_garbage_and_another_thread_end_no_capture() -> None:
    """A cycle that holds a graph, which the collector would find; and memory that another thread pins."""
    x, side, pool = torch.ones(64, device="cuda"), torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def recorded() -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, pool=pool, stream=side):
            found = x * 2
            cycles = [[index] for index in range(5000)]
            for one in cycles:
                one.append(one)  # type: ignore[arg-type]
            del cycles
            other = threading.Thread(target=lambda: torch.empty(1 << 22).pin_memory())
            other.start()
            other.join()
            found = found + 1
        return graph, found

    thresholds = gc.get_threshold()
    gc.set_threshold(10, 1, 1)
    try:
        for _ in range(3):
            graph, found = recorded()
            graph.replay()
            assert found.tolist() == [3.0] * 64
            holder: list[Any] = [graph, found]
            holder.append(holder)
            del holder, graph, found
    finally:
        gc.set_threshold(*thresholds)
        torch.cuda.synchronize()
