"""How many layers a step recomputes, from what the first step was measured to take."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aligntune.backends.fast import memory
from aligntune.backends.fast.memory import GIB, Costs, MemoryPlan
from aligntune.backends.fast.ops.head import MEMORY_BUDGET, LogitsBuffer
from aligntune.backends.fast.recompute import Recompute

MIB = 1 << 20


def costs(**changed: Any) -> Costs:
    return Costs(**{"base": 2 * GIB, "gradients": 100 * MIB, "forward": 0.1 * MIB, "standing": 0.02 * MIB,
                    "backward": 0.08 * MIB, "layer": 0.05 * MIB, "passing": 0.01 * MIB, "layers": 16,
                    "tokens": 8000} | changed)


HEAD = LogitsBuffer(rows=8000, hidden=2048, row_bytes=MIB // 4, sms=132, trained=False)  # a chunk: 1,024 rows


@pytest.mark.parametrize(("tokens", "budget", "kept"), [
    (1000, 100, 16),  # all of them fit
    (1000, 3, 16),
    (1000, 2.8, 14),
    (8000, 4, 3),
    (8000, 2.5, 0),  # nor does a step with all recomputed
])
def test_as_many_layers_keep_as_fit(tokens: int, budget: float, kept: int) -> None:
    planned = costs()
    budget = budget * GIB + memory.WORKSPACES
    assert planned.kept(tokens, budget) == kept
    if 0 < kept < 16:
        assert planned.of(tokens, kept) <= budget < planned.of(tokens, kept + 1)


def above(planned: Costs, tokens: int, kept: int) -> float:
    return planned.of(tokens, kept) - planned.base - memory.WORKSPACES


def test_the_peak_is_where_the_forward_ends_or_on_the_way_back() -> None:
    """Gradients are made on the way back, or stand before, where micro-batches accumulate."""
    tokens = 8000
    ends, back, kept = tokens * 0.1 * MIB, tokens * 0.08 * MIB, 3 * tokens * 0.05 * MIB
    assert above(costs(), tokens, 0) == ends > 100 * MIB + back
    assert above(costs(), tokens, 3) == ends + kept
    large = costs(gradients=4 * GIB)
    assert above(large, tokens, 0) == 4 * GIB + back == above(large, tokens, 3)
    # When the last of those that keep theirs has gone back, 8 of 16 layers' gradients are there; or the first goes.
    assert above(costs(gradients=32 * GIB, backward=0), tokens, 8) == 32 * GIB
    first = costs(standing=0.09 * MIB, gradients=4 * GIB, backward=0)
    assert above(first, tokens, 8) == pytest.approx(tokens * (0.09 + 0.05 + 8 * 0.05) * MIB)
    last = dataclasses.replace(first, gradients=16 * GIB, layers=8)
    assert above(last, tokens, 8) == pytest.approx(16 * GIB + tokens * (0.09 + 0.05) * MIB)
    held = costs(gradients=4 * GIB, held=4 * GIB)
    assert above(held, tokens, 0) == pytest.approx(4 * GIB + tokens * (0.02 + 2 * 0.05) * MIB)
    assert above(held, tokens, 3) == 4 * GIB + ends + kept
    wide = costs(passing=0.5 * MIB)
    assert above(wide, tokens, 3) == pytest.approx(tokens * (0.02 + 0.5) * MIB + kept)
    assert above(wide, tokens, 0) == ends


def test_the_first_layer_goes_back_beside_gradients_that_stand() -> None:
    """As one that kept its activations, its output made again; or no more than the peak that was measured."""
    known = costs(held=100 * MIB, shape=SHAPE, forward=0, backward=0.3 * MIB)
    as_kept = 8000 * (0.07 * MIB + (8192 + 3 * 2048 + 2048) * 2)
    assert known.first_back(8000) == pytest.approx(as_kept)
    assert above(known, 8000, 0) == pytest.approx(100 * MIB + 8000 * 0.3 * MIB)
    less = dataclasses.replace(known, backward=0.08 * MIB)
    assert less.first_back(8000) == pytest.approx(8000 * 0.08 * MIB + 100 * MIB) and less.first_back(8000) < as_kept
    assert above(less, 8000, 0) == 100 * MIB + less.first_back(8000)


def test_logits_take_a_chunk_however_long_the_batch_is() -> None:
    """A quarter of a GiB at most where layers are recomputed, else a GiB."""
    assert memory.logits_budget(False) == MEMORY_BUDGET == GIB and memory.logits_budget(True) == 256 * MIB
    planned = costs(head=HEAD)
    assert [planned.logits(tokens, 15) / MIB for tokens in (80, 2000, 8000, 80_000)] == [20, 256, 256, 256]
    assert planned.of(8000, 3) == costs().of(8000, 3) + 256 * MIB
    wide = dataclasses.replace(HEAD, row_bytes=2 * MIB)  # never under 256 rows, whatever the budget
    assert costs(head=wide).logits(8000, 15) == 512 * MIB
    trained = dataclasses.replace(HEAD, trained=True)  # a backward may find all rows' kept
    assert trained.most(4000, GIB) == 1000 * MIB >= trained.chunk(4000, GIB) > 0
    assert trained.most(5000, GIB) == trained.chunk(5000, GIB) <= GIB
    assert costs(head=HEAD).logits(8000, 16) == HEAD.most(8000, GIB) <= GIB


def test_the_gradient_of_a_head_takes_as_much_of_a_shorter_batch() -> None:
    head = costs(head_sum=4 * GIB, head_gradient=2 * GIB, gradients=2 * GIB)
    for tokens in (2000, 8000, 16_000):
        assert above(head, tokens, 0) == max(4 * GIB + tokens * 0.1 * MIB, 2 * GIB + head.recomputed(tokens))
    assert head.recomputed(2000) == pytest.approx(2000 * 0.08 * MIB + 3 * GIB)
    assert head.recomputed(8000) == pytest.approx(8000 * 0.08 * MIB)
    whole = costs(head_gradient=2 * GIB, gradients=2 * GIB, shape=SHAPE | {"width": 1 << 16})
    assert above(whole, 8000, 16) == pytest.approx(8000 * (0.02 + 16 * 0.05) * MIB + 2 * GIB + whole.whole(8000))
    held = dataclasses.replace(whole, held=3 * GIB)
    assert above(held, 8000, 16) == above(whole, 8000, 16) + GIB  # the head's is one of them


def test_layers_that_keep_nothing_are_all_kept() -> None:
    assert costs(layer=0.0, layers=7).kept(1000, 100 * GIB) == 7 and costs(layers=0).kept(1000, 100 * GIB) == 0


SHAPE = {"width": 8192, "hidden": 2048, "element_size": 2}
TILE = 4096 * 3 * 10240 * 2  # of 4,096 rows, as of all lengths from that to 65,536


def test_a_shorter_batch_pays_its_tile_and_a_longer_one_what_was_measured() -> None:
    planned = costs(backward=0.05 * MIB, tokens=8192, shape=SHAPE)
    linear = 0.05 * MIB
    assert planned.recomputed(8192) == pytest.approx(8192 * linear)
    shorter = planned.recomputed(4096)
    assert shorter == pytest.approx(4096 * (linear - TILE / 8192) + TILE) and shorter > 4096 * linear * 1.5
    assert planned.recomputed(32_768) == pytest.approx(32_768 * linear)
    assert costs(backward=0.05 * MIB).recomputed(2048) == pytest.approx(2048 * linear)


def test_a_kept_layer_goes_back_as_a_whole() -> None:
    planned = costs(standing=0.001 * MIB, forward=0.001 * MIB, backward=0.001 * MIB, layer=0.1 * MIB, tokens=8192,
                    shape=SHAPE)
    whole = 8192 * (8192 + 3 * 2048) * 2
    assert above(planned, 8192, 1) == pytest.approx(8192 * 0.101 * MIB + whole)
    unknown = dataclasses.replace(planned, shape=None)  # takes as much again as it kept
    assert above(unknown, 8192, 1) == pytest.approx(8192 * 0.201 * MIB)
    budget = planned.of(8192, 3)
    assert planned.kept(8192, budget) == 3 and planned.kept(8192, budget - 1) == 2
    assert planned.kept(8192, planned.of(8192, 0)) == 0  # room for none is not less than none


def test_scores_are_held_by_eager_attention_alone() -> None:
    for how, length in (("eager", 512), ("sdpa", 0)):
        model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=how))
        assert memory.scores_held(model, 512) == length
    assert memory.scores_held(SimpleNamespace(), 512) == 0


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
    return MemoryPlan(Recompute([Layer() for _ in range(10)]), budget, 20 * MIB)


def flags(planned: MemoryPlan) -> list[bool]:
    return [layer.gradient_checkpointing for layer in planned.recompute.layers]


def measure(planned: MemoryPlan, gpu: dict[str, int], *, layer: int = 50 * MIB, most: int | None = None) -> None:
    """A first step of 1,000 tokens that peaks at 320 MiB above what stood before; the optimizer then makes 200."""
    with planned.step(1000, number=0, most=most):
        assert flags(planned) == [True] * 10 and planned.recompute.measure
        planned.recompute.measure, planned.recompute.measured = False, layer
        planned.recompute.standing = gpu["allocated"] + 100 * MIB
        gpu["peak"] = max(gpu["peak"], gpu["allocated"] + 320 * MIB)
    gpu["allocated"] += 200 * MIB


@pytest.mark.parametrize("accumulates", [False, True])
def test_what_the_forward_took_is_told_from_the_way_back(accumulates: bool, gpu: dict[str, int]) -> None:
    """Of a peak of 320 MiB with 20 of gradients, and 290 before a layer went back, 256 of them a chunk of logits."""
    planned = plan(None)
    planned.accumulates, planned.head = accumulates, (9 * MIB, 7)
    planned.recompute.forward_peak, planned.recompute.head = 1290 * MIB, HEAD
    measure(planned, gpu)
    with planned.step(1000, number=1):
        assert planned.costs is not None
        assert planned.costs.forward * 1000 == pytest.approx((290 - 256 - 9) * MIB)
        assert planned.costs.backward * 1000 == pytest.approx(300 * MIB)
        assert planned.costs.standing * 1000 == pytest.approx(100 * MIB - 7)
        assert planned.costs.held == (20 * MIB if accumulates else 0) and planned.costs.head is HEAD
        assert (planned.costs.head_sum, planned.costs.head_gradient) == (9 * MIB, 7)


@pytest.mark.parametrize(("peak_before", "stood_before", "forward"), [
    (1200, 1090, 290 - 256),  # the head made the peak
    (1290, 1020, 20),  # a layer did: then what stood at the head,
    (1290, 1000, 15),  # or stands after it,
    (1290, 1900, 290 - 256),  # and never more than the peak
])
def test_what_the_head_took_is_told_from_a_layer(
    peak_before: int, stood_before: int, forward: int, gpu: dict[str, int]
) -> None:
    planned = plan(None)
    planned.recompute.forward_peak, planned.recompute.head = 1290 * MIB, HEAD
    planned.recompute.before_head = peak_before * MIB, stood_before * MIB
    planned.recompute.passing = 30 * MIB
    with planned.step(1000, number=0):
        planned.recompute.measure, planned.recompute.measured = False, 50 * MIB
        planned.recompute.standing = 1015 * MIB
        gpu["peak"] = 1320 * MIB
    with planned.step(1000, number=1):
        assert planned.costs is not None
        assert planned.costs.forward * 1000 == pytest.approx(forward * MIB)
        assert planned.costs.passing * 1000 == pytest.approx(30 * MIB)


def test_what_stands_later_is_planned_with(gpu: dict[str, int]) -> None:
    """An optimizer that made its state after the second step's begin (a first step that a scaler skipped)."""
    planned = plan(None)
    measure(planned, gpu)
    with planned.step(1000, number=1):
        assert planned.costs is not None and planned.costs.base == 1200 * MIB
        # The gradients of its first micro-batch:
        gpu["allocated"] += 2000 * MIB
    with planned.step(1000, number=1):
        assert planned.costs.base == 1200 * MIB
    gpu["allocated"] = 1500 * MIB  # inputs of graphs, say
    with planned.step(1000, number=2):
        assert planned.costs.base == 1200 * MIB
    gpu["allocated"] = 1600 * MIB
    with planned.step(1000, number=3):
        assert planned.costs.base == 1600 * MIB
    gpu["allocated"] = 1000 * MIB
    with planned.step(1000, number=4):
        assert planned.costs.base == 1600 * MIB
    planned.training_begins()
    gpu["allocated"] = 2500 * MIB
    with planned.step(1000, number=4):
        assert planned.costs.base == 2500 * MIB


def test_tokens_of_longer_padded_rows_take_more_where_attention_holds_scores(gpu: dict[str, int]) -> None:
    planned = plan(None)
    with planned.step(1000, number=0, length=100):
        planned.recompute.measure, planned.recompute.measured = False, 50 * MIB
        gpu["peak"] = gpu["allocated"] + 320 * MIB
    for length, times in ((100, 1), (50, 1), (300, 3), (0, 1)):
        with planned.step(1000, number=1, length=length):
            kept = flags(planned).count(False)
            assert planned.keeps == pytest.approx(kept * times * 50 * MIB)


def test_the_first_step_recomputes_all_and_the_next_what_it_must(gpu: dict[str, int]) -> None:
    planned = plan(1200 * MIB + 20 * MIB + memory.WORKSPACES + 300 * MIB + 370 * MIB)
    assert "until a step is measured" in str(planned)
    measure(planned, gpu)
    with planned.step(1000, number=0):  # the rest of the first window: nothing is known of the optimizer's state yet
        assert flags(planned) == [True] * 10 and not planned.recompute.measure
    with planned.step(1000, number=1):
        assert planned.costs is not None and planned.costs.base == 1200 * MIB
        assert planned.costs.backward == pytest.approx(0.3 * MIB) and planned.costs.layer == pytest.approx(0.05 * MIB)
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
        assert planned.costs is not None and planned.costs.backward == pytest.approx(0.3 * MIB)


def test_a_step_is_measured_by_its_tokens_and_planned_by_the_most_it_may_take(gpu: dict[str, int]) -> None:
    planned = plan(1200 * MIB + 20 * MIB + memory.WORKSPACES + 300 * MIB + 370 * MIB)
    measure(planned, gpu, most=1500)
    with planned.step(500, number=1, most=1000):
        assert planned.costs is not None and planned.costs.backward == pytest.approx(0.3 * MIB)
        assert planned.costs.layer == pytest.approx(0.05 * MIB)
        assert flags(planned) == [True] * 3 + [False] * 7  # as of 1,000
    with planned.step(1000, number=2, most=500):
        assert flags(planned) == [True] * 3 + [False] * 7


@pytest.mark.parametrize(("free", "kept"), [(3000, 10), (600, 8), (400, 6), (0, 2)])
def test_without_a_budget_what_is_free_is_planned_with(free: int, kept: int, gpu: dict[str, int]) -> None:
    planned = plan(None)
    gpu["free"] = free * MIB
    measure(planned, gpu, layer=100 * MIB)
    with planned.step(1000, number=1):
        left = (2000 + free) * MIB * (1 - memory.SPARE) - 1200 * MIB - memory.WORKSPACES - 320 * MIB
        assert flags(planned).count(False) == min(10, int(left / (100 * MIB))) == kept


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
        assert planned.costs.backward == pytest.approx(0.3 * MIB)


def test_a_step_that_fails_measures_nothing(gpu: dict[str, int]) -> None:
    planned = plan(None)
    with pytest.raises(torch.OutOfMemoryError), planned.step(1000, number=0):
        raise torch.OutOfMemoryError("no")
    with planned.step(10, number=1):
        assert planned.costs is None and flags(planned) == [True] * 10
