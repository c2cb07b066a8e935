"""Which batch shapes are captured, and with how much room: decided on the CPU, so that it is tested there."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aligntune.backends.fast import graph_shapes, graphs
from aligntune.backends.fast.graph_memory import GraphMemory
from aligntune.backends.fast.graph_shapes import planned_tokens, room_for, tokens_of, with_room
from aligntune.backends.fast.graphs import GraphedModel, _Pair
from aligntune.backends.fast.memory import GIB, WORKSPACES, Costs, MemoryPlan
from aligntune.backends.fast.packing import IGNORED, RowsEndToEnd, bucket
from aligntune.backends.fast.recompute import recompute_of
from tests.backends.fast.test_preference_graphs import Pool, Toy, capture, stand_in
from tests.backends.fast.test_rows_end_to_end import rows as rows_of
from tests.backends.fast.test_rows_end_to_end import trainer_of


def rows(*lengths: int, learnt: int = 1) -> list[dict[str, list[int]]]:
    """Of every row the last `learnt` of each four tokens are learnt."""
    return [{"input_ids": list(range(1, n + 1)), "labels": [i if i % 4 < learnt else IGNORED for i in range(1, n + 1)]}
            for n in lengths]


def batch(flat: RowsEndToEnd, *lengths: int, learnt: int = 1) -> dict[str, Any]:
    found = flat(rows(*lengths, learnt=learnt))
    del found["num_tokens"]
    return found | {"attention_mask": torch.empty(1, 1, 1, 0, dtype=torch.bool), "use_cache": False}


class Memory(GraphMemory):
    """Without a card: all is plentiful, or scarce, or nothing fits beside what is captured."""

    scarce = full = False
    judged: tuple[tuple[int, int], ...] = ()

    def plentiful(self, tokens: int) -> bool:
        self.judged += ((tokens, self.most_tokens),)
        return not self.scarce

    def suffices(self, tokens: int) -> bool:
        return not self.full


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One without a GPU: a capture is a pair that holds clones of its inputs."""
    found: Any = GraphedModel.__new__(GraphedModel)
    found.pairs, found.launched, found.filled, found.unfit = {}, set(), {}, set()
    found.captures, found.capture_seconds, found._largest, found.log = 0, 0.0, 0, []
    found.memory, found._warmed, found.cold = Memory(), {True, False}, []

    def capture(inputs: Any) -> _Pair:
        found.log.append(tokens_of(inputs))
        if torch.is_grad_enabled() not in found._warmed:
            found.cold.append(tokens_of(inputs))
        found._warmed.add(torch.is_grad_enabled())
        return _Pair({name: value.clone() if isinstance(value, torch.Tensor) else value
                      for name, value in inputs.items()}, {}, None, None)  # type: ignore[arg-type]

    def let_go() -> None:
        found.pairs.clear()
        found._largest = 0
        found.log.append("let go")

    found._capture, found._let_go, found._forget_moved = capture, let_go, lambda: None
    return found


@pytest.mark.parametrize(("tokens", "room"), [
    (1, 1), (64, 64), (65, 96), (1000, 1024), (1025, 1536), (1536, 1536), (1537, 2048), (4096, 4096), (4097, 5120),
    (5121, 6144), (8192, 8192), (8448, 8448), (16_384, 16_384), (100_000, 100_000),
])
def test_room(tokens: int, room: int) -> None:
    assert room_for(tokens) == room


def test_a_shape_is_captured_again_with_less_room_than_it_may_be_filled() -> None:
    for tokens in range(64, 40_000, 64):
        room = room_for(bucket(tokens))
        assert tokens <= room <= bucket(tokens) * (1 + graph_shapes.MOST_FILLING)


def test_a_batch_with_room_is_the_batch_and_filling() -> None:
    flat = RowsEndToEnd(pad_token_id=0)
    small = batch(flat, 700, 500, 350)
    assert tokens_of(small) == 1664 and len(small["kept"]) == 416
    roomy = with_room(small, 2048)
    assert tokens_of(roomy) == 2048 and roomy["use_cache"] is False and roomy["attention_mask"].shape == (1, 1, 1, 0)
    for name in ("input_ids", "labels", "shift_labels", "position_ids"):
        assert roomy[name].shape == (1, 2048) and torch.equal(roomy[name][:, :1664], small[name])
    assert (roomy["labels"][0, 1550:] == IGNORED).all() and (roomy["shift_labels"][0, 1550:] == IGNORED).all()
    assert len(roomy["kept"]) == 512 and torch.equal(roomy["kept"][:416], small["kept"])
    assert (roomy["kept"][416:] == -1).all()
    ends = roomy["cu_seq_lens_q"].tolist()
    # Ends of rows that are not there, and that of the filling.
    assert ends[:5] == [0, 700, 1200, 1550, 1664] and set(ends[5:-1]) == {1664} and ends[-1] == 2048
    assert len(ends) == len(small["cu_seq_lens_q"]) == 9
    assert roomy["max_length_q"] == roomy["max_length_k"] == 1024
    assert with_room(batch(flat, 1500, 1400, 1300), 6144)["max_length_q"] == 2048
    assert with_room(batch(flat, 9000, 20), 12_288)["max_length_q"] == 16_384
    every = with_room(batch(flat, 700, 500, 350, learnt=4), 2048)
    assert "kept" not in every


@pytest.mark.parametrize("learnt", [1, 2, 3, 4])
def test_every_batch_that_may_be_filled_fits(learnt: int) -> None:
    """Of shapes captured with room: whatever has the same rows learnt and two thirds of the tokens or more."""
    flat, draw = RowsEndToEnd(pad_token_id=0), random.Random(learnt)
    flat(rows(2000, 5))  # the longest row was seen
    for _ in range(60):
        lengths = [draw.randint(20, 900) for _ in range(8)]
        small = batch(flat, *lengths, learnt=learnt)
        room = planned_tokens(small, capture=True)
        pair = _Pair(with_room(small, room), {}, None, None)  # type: ignore[arg-type]
        assert pair.more_for(small) == pytest.approx((room - tokens_of(small)) / tokens_of(small))
        other = batch(flat, *(max(1, n * 3 // 4) for n in lengths), learnt=learnt)
        more = pair.more_for(other)
        assert (more is not None) == ((room - tokens_of(other)) <= 0.5 * tokens_of(other))


def launched(graphed: Any, laid: dict[str, Any], kind: str = "trained") -> int | None:
    """The flat length at which the batch was launched; None where it was replayed."""
    pair, found = graphed._pair(kind, laid)
    return tokens_of(found) if pair is None else None


def replayed(graphed: Any, laid: dict[str, Any], kind: str = "trained") -> int:
    """The flat length of the graph that the batch was replayed in."""
    pair, _ = graphed._pair(kind, laid)
    assert pair is not None
    return pair.tokens


def test_a_shape_is_launched_with_room_then_captured(graphed: Any) -> None:
    flat = RowsEndToEnd(pad_token_id=0)
    larger, other = batch(flat, 900, 800, 600), batch(flat, 300, 200, 100)
    assert tokens_of(larger) == 2304 and tokens_of(other) == 640
    assert launched(graphed, larger) == 3072 and launched(graphed, other) == 768 and not graphed.log
    # What comes next has not the tokens of what came first: it is the room that they share.
    assert replayed(graphed, batch(flat, 900, 800, 900)) == 3072 and graphed.log == [3072]
    # Two thirds of that or more is filled up; less is captured.
    assert replayed(graphed, batch(flat, 900, 700, 400)) == 3072
    assert replayed(graphed, batch(flat, 300, 250, 170)) == 768
    assert graphed.log == [3072, 768] and graphed.captures == 2


def test_what_is_launched_with_room_is_what_is_captured(graphed: Any) -> None:
    flat = RowsEndToEnd(pad_token_id=0)
    one = batch(flat, 900, 800, 600)
    pair, laid = graphed._pair("trained", one)
    assert pair is None and torch.equal(laid["input_ids"][0, :2304], one["input_ids"][0])
    pair, again = graphed._pair("trained", one)
    assert graphed._key("trained", laid) == graphed._key("trained", pair.inputs) == graphed._key("trained", again)


def test_a_launched_batch_with_room_answers_for_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    toy = Toy()
    found, one = GraphedModel(toy, [toy.w], Memory()), batch(RowsEndToEnd(pad_token_id=0), 300, 200, 100)
    for _ in range(2):  # launched, replayed
        outputs = found(one)
        assert {name: value.shape for name, value in outputs.items()} == dict.fromkeys(outputs, (1, 640))
        with torch.no_grad():
            assert found.quiet(one, "reference").shape == (1, 640)
    assert Pool.replays == ["trained", "quiet"] and {pair.tokens for pair in found.pairs.values()} == {768}


def test_a_shape_whose_filling_cost_a_capture_is_captured(graphed: Any) -> None:
    flat = RowsEndToEnd(pad_token_id=0)
    for _ in range(2):
        graphed._pair("trained", batch(flat, 900, 800, 700))
    assert graphed.log == [3072]
    much, little = batch(flat, 800, 800, 500), batch(flat, 900, 900, 990)
    assert (tokens_of(much), tokens_of(little)) == (2304, 2816)
    for _ in range(graphs.CAPTURE_COSTS // 768):
        assert replayed(graphed, much) == 3072
    # Launched once, which loads its kernels.
    assert launched(graphed, much) == 2304 and replayed(graphed, much) == 2304 and graphed.log == [3072, 2304]
    for _ in range(graphs.CAPTURE_COSTS // 256):
        assert replayed(graphed, little) == 3072
    assert launched(graphed, little) == 2816 and replayed(graphed, little) == 2816
    # When the pool is made anew, at once.
    for _ in range(2):
        graphed._pair("trained", batch(flat, 1000, 1000, 1000, 1000))
    assert len(graphed.pairs) == 1 and replayed(graphed, little) == 2816 and replayed(graphed, much) == 2304


def test_no_room_where_memory_is_scarce_or_rows_are_of_one_length(graphed: Any) -> None:
    flat = RowsEndToEnd(pad_token_id=0)
    equal = batch(flat, 500, 500, 500)
    assert launched(graphed, equal) == tokens_of(equal) == 1500 and replayed(graphed, equal) == 1500
    graphed.memory.scarce = True
    tight = batch(flat, 900, 800, 600)
    assert launched(graphed, tight) == tokens_of(tight) == 2304 and replayed(graphed, tight) == 2304
    assert planned_tokens(equal, capture=True) == 1500 and planned_tokens(tight, capture=True) == 3072
    assert planned_tokens(tight, capture=False) == 2304
    assert planned_tokens({"input_ids": torch.zeros(4, 600)}, capture=True) == 2400


def test_what_was_launched_without_room_is_captured_so(graphed: Any) -> None:
    """The first step of all, after which there is a measure of what is free."""
    flat = RowsEndToEnd(pad_token_id=0)
    graphed.memory.scarce = True
    first, other = batch(flat, 900, 800, 600), batch(flat, 900, 800, 700)
    assert launched(graphed, first) == 2304
    graphed.memory.scarce = False
    assert launched(graphed, other) == 3072 and replayed(graphed, first) == 2304


def test_rows_one_at_a_time_are_captured_when_their_length_comes_again(graphed: Any) -> None:
    """Each length is a shape of its own, which holds no other."""
    flat, draw = RowsEndToEnd(pad_token_id=0), random.Random(0)
    lengths = [draw.randint(20, 2000) for _ in range(60)]
    for length in [*lengths, lengths[0], lengths[1]]:
        graphed._pair("trained", batch(flat, length))
    # and the longest, which makes the pool
    assert graphed.captures == 1 + 62 - len(set(lengths)) == 3 + 60 - len(set(lengths))
    assert replayed(graphed, batch(flat, max(set(lengths) - set(lengths[:2]))))


def test_room_is_judged_by_steps_that_ran(graphed: Any) -> None:
    """Not by the batch that is to come, nor by passes that keep no activations."""
    flat, memory = RowsEndToEnd(pad_token_id=0), graphed.memory
    memory.scarce = True
    small, large = batch(flat, 300, 200, 90), batch(flat, 900, 800, 600)
    with torch.no_grad():
        graphed._pair("reference", large)
    for one in (small, small, large):
        graphed._pair("trained", one)
    assert memory.judged == ((3072, 0), (768, 0), (3072, 640)) and memory.most_tokens == 2304


def card(
    monkeypatch: pytest.MonkeyPatch, *, allocated: float, peak: float, reserved: float, pool: float = 0,
    share: float = 1.0,
) -> None:
    """One of 80 GiB, of which the process may have a share; `pool` of what is reserved lies idle in that of graphs.

    All in GiB.
    """
    values = {"memory_allocated": allocated, "max_memory_allocated": peak, "memory_reserved": reserved}
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: int(value * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda *_: share)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int((80 - reserved) * GIB), 80 * GIB))
    segments = [{"total_size": int(pool * GIB), "allocated_size": 0, "segment_pool_id": (0, 1)},
                {"total_size": 9 * GIB, "allocated_size": GIB, "segment_pool_id": (0, 0)}]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)


def test_what_is_left_beside_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, allocated=2, peak=42, reserved=50, pool=40)
    memory = GraphMemory()
    assert not memory.plentiful(1) and not memory.suffices(1), "no step ran: nobody knows what one takes"
    memory.ran(1000, None)  # took 40 GiB
    assert memory.left() == pytest.approx((80 * 0.94 - 2 - 40) * GIB) and memory.takes(500) == 20 * GIB
    assert memory.suffices(829) and not memory.suffices(831)
    assert memory.plentiful(414) and not memory.plentiful(416)
    card(monkeypatch, allocated=2, peak=42, reserved=50, pool=40, share=0.75)
    assert memory.left() == pytest.approx((60 * 0.94 - 2 - 40) * GIB)


def test_what_is_left_of_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, allocated=2, peak=42, reserved=50, pool=7)
    plan = MemoryPlan(SimpleNamespace(layers=[None] * 4), 20 * GIB, gradients=0)  # type: ignore[arg-type]
    memory = GraphMemory(plan)
    assert memory.waits
    plan.costs = Costs(2 * GIB, GIB, forward=GIB / 100, standing=0, backward=GIB / 100, layer=GIB / 1000, passing=0,
                       layers=4)
    assert not memory.waits and memory.left() == 18 * GIB
    took = plan.costs.of(500, 4) - 2 * GIB
    assert memory.takes(500) == took == pytest.approx(7 * GIB + WORKSPACES) and memory.suffices(500)
    kept = plan.costs.kept(1300, 20 * GIB)
    assert 0 < kept < 4 and memory.takes(1300) == plan.costs.of(1300, kept) - 2 * GIB and memory.suffices(1300)
    card(monkeypatch, allocated=2, peak=42, reserved=78, pool=70)
    assert memory.left() == pytest.approx((80 * 0.94 - 72) * GIB) and not memory.suffices(500), "nor is it there"


def test_graphs_go_where_a_step_does_not_fit_beside_them(graphed: Any) -> None:
    flat = RowsEndToEnd(pad_token_id=0)
    large, small = batch(flat, 900, 800, 600), batch(flat, 300, 200, 90)
    graphed._pair("trained", large)
    graphed.memory.full = True
    assert replayed(graphed, large) == 3072, "a replay needs nothing but the pool"
    with torch.no_grad():
        assert launched(graphed, small, "reference") == 768, "it keeps no activations"
    assert graphed.log == [3072]
    assert launched(graphed, small) == 768 and graphed.log == [3072, "let go"] and not graphed.pairs
    assert replayed(graphed, large) == 3072 and replayed(graphed, small) == 768, "both were launched before"


def test_what_no_capture_has_memory_for_is_launched(graphed: Any) -> None:
    flat, capture = RowsEndToEnd(pad_token_id=0), graphed._capture
    small, large = batch(flat, 300, 200, 90), batch(flat, 900, 800, 600)
    graphed._pair("trained", small)
    assert replayed(graphed, small) == 768

    def fails(inputs: Any) -> Any:
        if tokens_of(inputs) > 1000:
            raise torch.OutOfMemoryError
        return capture(inputs)

    graphed._capture = fails
    assert [launched(graphed, large) for _ in range(4)] == [3072, 3072, 2304, 2304]
    assert graphed.log == [768, "let go", "let go"] and replayed(graphed, small) == 768


def test_the_longest_that_was_launched_makes_the_pool(graphed: Any) -> None:
    flat = RowsEndToEnd(pad_token_id=0)
    long, short = batch(flat, 1500, 1500, 1400), batch(flat, 300, 200, 90)
    for one in (short, long, short):
        graphed._pair("trained", one)
    assert graphed.log == [5120, 768] and replayed(graphed, long) == 5120 and graphed.captures == 2
    for one in [batch(flat, 900, 800, 700)] * 2:
        graphed._pair("trained", one)
    assert graphed.log == [5120, 768, 3072], "nothing was let go of"


def test_a_batch_that_is_the_longest_itself_is_captured_once(graphed: Any) -> None:
    """As it was launched, without room: the first step of all, after which there is a measure of what is free."""
    flat = RowsEndToEnd(pad_token_id=0)
    graphed.memory.scarce = True
    assert launched(graphed, batch(flat, 900, 800, 600)) == 2304
    graphed.memory.scarce = False
    assert replayed(graphed, batch(flat, 900, 800, 600)) == 2304 and graphed.log == [2304]


def test_what_was_never_launched_is_run_before_its_capture(graphed: Any) -> None:
    """The longest, where it gets room that it did not have when it was launched: kernels cannot be loaded meanwhile."""
    flat = RowsEndToEnd(pad_token_id=0)
    graphed.memory.scarce = True
    assert launched(graphed, batch(flat, 900, 800, 600)) == 2304
    graphed.memory.scarce = False
    for _ in range(2):
        graphed._pair("trained", batch(flat, 300, 200, 90))
    assert graphed.log == [3072, 768] and graphed.cold == [3072]


@pytest.mark.parametrize("why", ["scarce", "graphs", "without gradients", "of its own"])
def test_the_longest_is_not_captured_first(why: str, graphed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = RowsEndToEnd(pad_token_id=0)
    long, short = batch(flat, 1500, 1500, 1400), batch(flat, 300, 200, 90)
    graphed.memory.scarce = why == "scarce"
    if why == "graphs":
        monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    graphed._pair("trained", long)
    with torch.set_grad_enabled(why != "without gradients"):
        for one in [long if why == "of its own" else short] * 2:
            graphed._pair("trained", one)
    assert graphed.log == [{"scarce": 640, "of its own": 5120}.get(why, 768)]


def test_steps_before_the_plan_are_launched_and_judge_room_too(graphed: Any) -> None:
    """Their peak is the process's: the longest batch is among them."""
    flat, memory = RowsEndToEnd(pad_token_id=0), graphed.memory
    memory.scarce, memory.plan = True, SimpleNamespace(planned=False)
    for lengths in ((900, 800, 600), (300, 200, 90), (300, 200, 90), (300, 200, 90)):
        assert launched(graphed, batch(flat, *lengths)) in (640, 2304)
    memory.plan.planned = True
    assert launched(graphed, batch(flat, 300, 200, 90)) == 640, "none that was launched before the plan counts"
    assert replayed(graphed, batch(flat, 300, 200, 90)) == 640
    assert memory.judged[0] == (768, 2304)


def test_kinds_of_passes_have_shapes_of_their_own(graphed: Any) -> None:
    flat = RowsEndToEnd(pad_token_id=0)
    one = batch(flat, 900, 800, 600)
    with torch.no_grad():
        assert launched(graphed, one, "reference") == 3072 and replayed(graphed, one, "reference") == 3072
    assert launched(graphed, one) == 3072 and replayed(graphed, one) == 3072


def test_no_more_than_so_many_graphs(graphed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    flat = RowsEndToEnd(pad_token_id=0)
    for _ in range(2):
        graphed._pair("trained", batch(flat, 900, 800, 600))
        # As it came: nothing is laid out for a capture that is not to be.
    assert len(graphed.pairs) == 1
    for _ in range(3):
        assert launched(graphed, batch(flat, 90, 80, 60)) == 256


def test_short_runs_replay_most_steps(graphed: Any) -> None:
    """Eight rows of median 200 tokens a step."""
    flat, draw = RowsEndToEnd(pad_token_id=0), random.Random(0)
    count = 0
    for _ in range(40):
        lengths = [min(1023, max(8, int(draw.lognormvariate(5.3, 0.9)))) for _ in range(8)]
        count += launched(graphed, batch(flat, *lengths)) is not None
    assert count <= 7 and graphed.captures <= 9, (count, graphed.captures, graphed.log)


@pytest.mark.slow
def test_nothing_is_captured_before_layers_are_planned(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window's micro-batches come again within the first optimizer step, when every layer is recomputed."""
    for name, value in {"memory_allocated": GIB, "max_memory_allocated": 2 * GIB, "memory_reserved": 2 * GIB}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda *_: 1.0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    stand_in(monkeypatch)
    monkeypatch.setattr(GraphedModel, "_make_room", lambda self, tokens: None)
    trainer = trainer_of("fast", "llama", tmp_path, rows_of((12,) * 64), gradient_checkpointing=True, batch_size=2,
                         gradient_accumulation_steps=3, max_steps=2).trainer
    recompute = recompute_of(trainer.model)
    assert recompute is not None
    trainer.memory, trainer.capture, captured = MemoryPlan(recompute, None, gradients=0), True, []
    monkeypatch.setattr(GraphedModel, "_forget_moved", lambda self: None)

    def noted(self: GraphedModel, batch: Any) -> Any:
        captured.append((trainer.state.global_step, [layer.gradient_checkpointing for layer in recompute.layers]))
        return capture(self, batch)

    monkeypatch.setattr(GraphedModel, "_capture", noted)
    trainer.train()
    assert captured == [(1, [False, False])], "of the second step's three micro-batches, the second"
    assert Pool.replays.count("trained") == 2
