"""How many layers a step recomputes, from what the first step was measured to take."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from aligntune.backends.fast import memory
from aligntune.backends.fast.memory import GIB, Costs, MemoryPlan
from aligntune.backends.fast.ops.head import MEMORY_BUDGET
from aligntune.backends.fast.recompute import Recompute

MIB = 1 << 20


def costs(**changed: Any) -> Costs:
    return Costs(**{"base": 2 * GIB, "gradients": 100 * MIB, "step": 0.1 * MIB, "layer": 0.05 * MIB, "layers": 16,
                    "tokens": 8000, "logits_row": MIB} | changed)


@pytest.mark.parametrize(("tokens", "budget", "kept"), [
    (1000, 100, 16),  # all of them fit
    (1000, 4, 16),
    (1000, 3.5, 15),  # all but for the logits, which may take more where no layer is recomputed
    (1000, 2.6, 3),
    (8000, 4, 2),
    (8000, 2.5, 0),  # nor does a step with all recomputed
])
def test_as_many_layers_keep_as_fit(tokens: int, budget: float, kept: int) -> None:
    planned = costs()
    assert planned.kept(tokens, budget * GIB) == kept
    if 0 < kept < 16:
        assert planned.of(tokens, kept) <= budget * GIB < planned.of(tokens, kept + 1)


def test_bytes_of_a_step_are_the_sum() -> None:
    assert costs().of(8000, 3) == 2 * GIB + 100 * MIB + 8000 * (0.1 * MIB + 3 * 0.05 * MIB)


def test_logits_take_what_they_may_however_short_a_batch_is() -> None:
    """A quarter of a GiB where layers are recomputed, of which a step has measured a batch's share, and else a GiB."""
    assert memory.logits_budget(False) == MEMORY_BUDGET == GIB and memory.logits_budget(True) == 256 * MIB
    planned = costs()
    assert [planned.logits(tokens, 15) / MIB for tokens in (80, 2000, 8000, 80_000)] == [77.44, 192, 0, 0]
    assert [planned.logits(tokens, 16) / MIB for tokens in (80, 2000, 8000)] == [77.44, 960, 768]
    assert planned.of(2000, 3) == 2 * GIB + (100 + 192) * MIB + 2000 * (0.1 * MIB + 3 * 0.05 * MIB)
    assert costs(tokens=80).logits(80, 15) == costs(logits_row=0).logits(2000, 16) == 0


def test_layers_that_keep_nothing_are_all_kept() -> None:
    assert costs(layer=0.0, layers=7).kept(1000, 100 * GIB) == 7 and costs(layers=0).kept(1000, 100 * GIB) == 0


SHAPE = {"width": 8192, "hidden": 2048, "element_size": 2}
TILE = 4096 * 3 * 10240 * 2  # of 4,096 rows, as of all lengths from that to 65,536


def test_a_shorter_batch_pays_its_tile_and_a_longer_one_what_was_measured() -> None:
    planned = costs(step=0.05 * MIB, tokens=8192, shape=SHAPE)
    linear = 0.05 * MIB
    assert planned.recomputed(8192) == pytest.approx(8192 * linear)
    shorter = planned.recomputed(4096)
    assert shorter == pytest.approx(4096 * (linear - TILE / 8192) + TILE) and shorter > 4096 * linear * 1.5
    assert planned.recomputed(32_768) == pytest.approx(32_768 * linear)
    assert costs(step=0.05 * MIB).recomputed(2048) == pytest.approx(2048 * linear)


def test_a_kept_layer_goes_back_as_a_whole() -> None:
    planned = costs(step=0.001 * MIB, layer=0.1 * MIB, tokens=8192, shape=SHAPE)
    whole = 8192 * (8192 + 3 * 2048) * 2
    assert planned.of(8192, 1) - planned.of(8192, 0) == pytest.approx(
        whole - planned.recomputed(8192) + 8192 * 0.1 * MIB)
    budget = planned.of(8192, 3)
    assert planned.kept(8192, budget) == 3 and planned.kept(8192, budget - 1) == 2
    assert planned.kept(8192, planned.of(8192, 0)) == 0  # room for none is not less than none


class Layer(torch.nn.Module):
    gradient_checkpointing = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch.cuda's counters, by hand."""
    now = {"allocated": 1000 * MIB, "peak": 1000 * MIB, "reserved": 2000 * MIB, "free": 3000 * MIB, "emptied": 0,
           "share": 1.0}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: now["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: now["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: now.update(peak=now["allocated"]))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: now["reserved"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (now["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda *_: now["share"])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: now.__setitem__("emptied", now["emptied"] + 1))
    return now


def plan(budget: int | None) -> MemoryPlan:
    return MemoryPlan(Recompute([Layer() for _ in range(10)]), budget, 20 * MIB, logits_row=MIB)


def flags(planned: MemoryPlan) -> list[bool]:
    return [layer.gradient_checkpointing for layer in planned.recompute.layers]


def measure(planned: MemoryPlan, gpu: dict[str, int], *, layer: int = 50 * MIB, most: int | None = None) -> None:
    """A first step of 1,000 tokens that peaks at 320 MiB above what stood before; the optimizer then makes 200."""
    with planned.step(1000, number=0, most=most):
        assert flags(planned) == [True] * 10 and planned.recompute.measure
        planned.recompute.measure, planned.recompute.measured = False, layer
        gpu["peak"] = max(gpu["peak"], gpu["allocated"] + 320 * MIB)
    gpu["allocated"] += 200 * MIB


@pytest.mark.parametrize(("accumulates", "forward_peak", "step"), [
    (False, 1310, 300), (True, 1310, 310), (True, 1290, 300), (True, None, 300)])
def test_micro_batches_after_the_first_find_the_gradients_there(
    accumulates: bool, forward_peak: int | None, step: int, gpu: dict[str, int]
) -> None:
    """The first one's peak of 320 MiB has 20 of gradients in it; another's forward ends beside them."""
    planned = plan(None)
    planned.accumulates = accumulates
    planned.recompute.forward_peak = None if forward_peak is None else forward_peak * MIB
    measure(planned, gpu)
    with planned.step(1000, number=1):
        assert planned.costs is not None and planned.costs.step * 1000 == pytest.approx(step * MIB)


def test_the_first_step_recomputes_all_and_the_next_what_it_must(gpu: dict[str, int]) -> None:
    planned = plan(1200 * MIB + 20 * MIB + 300 * MIB + 370 * MIB)
    assert "until a step is measured" in str(planned)
    measure(planned, gpu)
    with planned.step(1000, number=0):  # the rest of the first window: nothing is known of the optimizer's state yet
        assert flags(planned) == [True] * 10 and not planned.recompute.measure
    with planned.step(1000, number=1):
        assert planned.costs is not None and planned.costs.base == 1200 * MIB
        assert planned.costs.step == pytest.approx(0.3 * MIB) and planned.costs.layer == pytest.approx(0.05 * MIB)
        assert flags(planned) == [True] * 3 + [False] * 7  # 370 // 50 are kept, the last ones
        assert planned.keeps == pytest.approx(350 * MIB)
    assert gpu["emptied"] == 1
    with planned.step(2000, number=2):
        assert flags(planned) == [True] * 10 and planned.keeps == 0
    with planned.step(100, number=3):
        assert flags(planned) == [False] * 10
    assert "up to 10 of 10 layers recomputed" in str(planned) and "1.17 GiB between steps" in str(planned)


@pytest.mark.parametrize("numbers", [(0,), (100, 0, 1)], ids=["one step each", "resumed, then anew"])
def test_the_second_training_is_planned_by_what_the_first_measured(
    numbers: tuple[int, ...], gpu: dict[str, int]
) -> None:
    planned = plan(None)
    planned.training_begins()
    with planned.step(1000, number=numbers[0]):
        planned.recompute.measure, planned.recompute.measured = False, 50 * MIB
        gpu["peak"] = gpu["allocated"] + 320 * MIB
    assert not planned.planned
    planned.training_begins()
    for number in numbers[1:] or (0,):
        with planned.step(1000, number=number):
            assert planned.planned and flags(planned) == [False] * 10


def test_a_training_that_measured_nothing_leaves_the_next_its_first_step(gpu: dict[str, int]) -> None:
    planned = plan(None)
    for _ in range(2):
        planned.training_begins()
        with pytest.raises(RuntimeError, match="out of"), planned.step(1000, number=3):
            raise RuntimeError("out of memory")
    planned.training_begins()
    measure(planned, gpu)
    with planned.step(1000, number=0):
        assert not planned.planned
    with planned.step(1000, number=1):
        assert planned.planned


def test_what_ran_before_is_not_the_steps(gpu: dict[str, int]) -> None:
    """An evaluation in a script, say, before its training."""
    gpu["peak"] = 20 * GIB
    planned = plan(None)
    measure(planned, gpu)
    with planned.step(1000, number=1):
        assert planned.costs is not None and planned.costs.step == pytest.approx(0.3 * MIB)


def test_a_step_is_measured_by_its_tokens_and_planned_by_the_most_it_may_take(gpu: dict[str, int]) -> None:
    planned = plan(1200 * MIB + 20 * MIB + 300 * MIB + 370 * MIB)
    measure(planned, gpu, most=1500)
    with planned.step(500, number=1, most=1000):
        assert planned.costs is not None and planned.costs.step == pytest.approx(0.3 * MIB)
        assert planned.costs.layer == pytest.approx(0.05 * MIB)
        assert flags(planned) == [True] * 3 + [False] * 7  # as of 1,000
    with planned.step(1000, number=2, most=500):
        assert flags(planned) == [True] * 3 + [False] * 7


@pytest.mark.parametrize(("free", "kept"), [(3000, 10), (768, 9), (400, 7), (0, 3)])
def test_without_a_budget_what_is_free_is_planned_with(free: int, kept: int, gpu: dict[str, int]) -> None:
    planned = plan(None)
    gpu["free"] = free * MIB
    measure(planned, gpu, layer=100 * MIB)
    with planned.step(1000, number=1):
        left = (2000 + free) * MIB * (1 - memory.SPARE) - 1200 * MIB - 20 * MIB - 300 * MIB
        assert min(10, int(left / (100 * MIB))) == (10 if kept == 9 else kept)  # of all, the logits' other 744 MiB
        assert flags(planned).count(False) == kept


def test_a_process_that_is_held_to_a_share_of_the_card_plans_with_that(gpu: dict[str, Any]) -> None:
    gpu["share"] = 1 / 32
    assert plan(None).reach() == pytest.approx(80 * GIB / 32 * (1 - memory.SPARE))
    gpu["share"] = 1 / 2
    assert plan(None).reach() == pytest.approx(5000 * MIB * (1 - memory.SPARE))


def test_what_is_let_go_of_halfway_through_is_not_the_steps(gpu: dict[str, int]) -> None:
    """An earlier trainer in a cycle: 200 MiB that Python frees when it comes to it."""
    earlier = Layer()
    earlier.__dict__["itself"] = earlier
    weakref.finalize(earlier, lambda: gpu.__setitem__("allocated", gpu["allocated"] - 200 * MIB))
    del earlier
    planned = plan(None)
    with planned.step(1000, number=0):
        gc.collect()
        planned.recompute.measure, planned.recompute.measured = False, 50 * MIB
        gpu["peak"] = gpu["allocated"] + 320 * MIB
    with planned.step(1000, number=1):
        assert planned.costs is not None and planned.costs.base == 800 * MIB
        assert planned.costs.step == pytest.approx(0.3 * MIB)


def test_a_step_that_fails_measures_nothing(gpu: dict[str, int]) -> None:
    planned = plan(None)
    with pytest.raises(torch.OutOfMemoryError), planned.step(1000, number=0):
        raise torch.OutOfMemoryError("no")
    with planned.step(10, number=1):
        assert planned.costs is None and flags(planned) == [True] * 10
