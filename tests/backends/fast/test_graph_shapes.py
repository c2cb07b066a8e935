"""A batch in the place of a longer one that was captured: which fit, and what the graph then reads."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from aligntune.backends.fast import graph_shapes
from aligntune.backends.fast.graph_shapes import tokens_of
from aligntune.backends.fast.graphs import _Pair
from aligntune.backends.fast.ledger import Ledger
from aligntune.backends.fast.ops.attention import attention_reference
from aligntune.backends.fast.packing import IGNORED, RowsEndToEnd


def batch(lengths: list[int], collate: RowsEndToEnd | None = None, *, prompt: int = 0) -> dict[str, Any]:
    draw = random.Random(sum(lengths))
    rows = [[draw.randrange(3, 50) for _ in range(n)] for n in lengths]
    made = (collate or RowsEndToEnd(0))([
        {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]} for ids in rows])
    made.pop("num_tokens")
    return made | {"attention_mask": torch.empty((1, 1, 1, 0), dtype=torch.bool), "use_cache": False}


def pair(captured: dict[str, Any]) -> _Pair:
    inputs = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in captured.items()}
    return _Pair(inputs, {}, None, Ledger())  # type: ignore[arg-type]


def fill(captured: _Pair, other: dict[str, Any]) -> dict[str, Any]:
    for name, value in captured.inputs.items():
        if isinstance(value, torch.Tensor):
            graph_shapes.fill(name, value, other[name], captured.inputs)
    return captured.inputs


LONG = [300, 210, 64, 400]


@pytest.mark.parametrize("lengths", [[300, 210, 64, 300], [200, 210, 300, 60], [5, 400, 300, 8]])
def test_the_graph_reads_the_rows_and_a_filling_behind_them(lengths: list[int]) -> None:
    captured, other = pair(batch(LONG)), batch(lengths)
    more = captured.more_for(other)
    assert more == (captured.tokens - tokens_of(other)) / tokens_of(other) and 0 < more <= 0.5
    read, tokens = fill(captured, other), tokens_of(other)
    for name in ("input_ids", "labels", "shift_labels", "position_ids"):
        assert torch.equal(read[name][:, :tokens], other[name]), name
    assert (read["shift_labels"][:, tokens:] == IGNORED).all() and (read["labels"][:, tokens:] == IGNORED).all()
    ends = read["cu_seq_lens_q"]
    assert torch.equal(ends[: len(lengths) + 1], other["cu_seq_lens_q"][: len(lengths) + 1])
    assert int(ends[-1]) == captured.tokens and (ends.diff() >= 0).all() and int(ends.diff().max()) <= 1024
    q = torch.randn(1, 2, captured.tokens, 8)
    whole = attention_reference(q, q, q, ends, max_seqlen=1024, scale=0.3)
    short = q[:, :, :tokens]
    own = attention_reference(short, short, short, other["cu_seq_lens_q"], max_seqlen=1024, scale=0.3)
    assert torch.equal(whole[:, :tokens], own) and own.abs().max() > 0


def test_what_an_earlier_batch_left_is_overwritten() -> None:
    captured = pair(batch(LONG))
    fill(captured, batch([300, 210, 64, 300]))
    again = fill(captured, batch(LONG))
    for name, value in batch(LONG).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(again[name], value), name


def test_kept_positions_are_filled_with_none() -> None:
    captured, other = pair(batch(LONG, prompt=60)), batch([290, 210, 64, 280], prompt=60)
    assert captured.more_for(other) is not None
    read = fill(captured, other)
    size = other["kept"].numel()
    assert torch.equal(read["kept"][:size], other["kept"]) and (read["kept"][size:] == -1).all()


@pytest.mark.parametrize(("captured", "other"), [
    (LONG, [400, 300, 300, 300]),  # longer
    (LONG, [100, 100, 60, 200]),  # more filling than is worth it
    ([200, 200, 200], [200, 190, 150]),  # captured as a dense batch
    (LONG, [30] * 25),  # more rows than the graph has ends
    ([3000, 200, 800, 100], [1500, 500, 300, 200]),  # a filling longer than the longest row that was captured
])
def test_what_does_not_fit(captured: list[int], other: list[int]) -> None:
    held = pair(batch(captured))
    if len(other) == 4 and other[0] == 1500:
        held.inputs["max_length_q"] = 1024
    assert held.more_for(batch(other)) is None


def test_rows_of_one_length_fit_where_an_end_is_left() -> None:
    held, other = pair(batch(LONG)), batch([250, 250, 250])
    assert other["cu_seq_lens_q"].numel() == 4 and held.more_for(other) is not None
    ends = fill(held, other)["cu_seq_lens_q"]
    assert ends[:4].tolist() == [0, 250, 500, 750] and ends[4:].tolist() == [held.tokens] * (ends.numel() - 4)


def test_a_batch_with_other_parts_does_not_fit() -> None:
    held = pair(batch(LONG))
    assert held.more_for(batch([300, 210, 64, 300]) | {"more": 1}) is None
    assert held.more_for(batch([300, 210, 64, 300]) | {"use_cache": True}) is None


def test_few_shapes_come_of_many_batches() -> None:
    """Ends and the longest row only grow: what is left to tell shapes apart is the flat length."""
    collate, draw = RowsEndToEnd(0), random.Random(0)
    batches = [batch([min(2047, max(8, int(draw.lognormvariate(5.3, 0.9)))) for _ in range(16)], collate)
               for _ in range(100)]
    shapes = {(tokens_of(one), one["cu_seq_lens_q"].numel(), one["max_length_q"]) for one in batches[20:]}
    assert len(shapes) == len({tokens for tokens, *_ in shapes}) <= 16
    assert all(one["cu_seq_lens_q"][-2] == one["cu_seq_lens_q"][-1] for one in batches)
