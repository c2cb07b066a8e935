"""What `benchmarks.ops.lora_up` compares computes the same, and its tiles are launches that there can be."""

from __future__ import annotations

import torch

from benchmarks.ops import lora_up as bench


def test_both_methods_compute_the_same() -> None:
    torch.manual_seed(0)
    dout, up, s, into = bench.inputs(70, 96, 8, "cpu")
    one, other = into.clone(), into.clone()
    found = [bench.ours(None, dout, up, s, one), bench.two_products(dout, up, s, other)]
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and float(b.norm()) > 1
        assert float((a.float() - b.float()).norm()) <= 2**-7 * float(b.float().norm())


def test_tiles_of_the_sweep_fill_a_machine() -> None:
    for tokens, width, rank in bench.CASES:
        found = dict(bench.launches(tokens, width, rank, 132))
        assert len(found) == 3 * len(bench.TILES)
        assert all(1 <= launch.runs <= tokens // launch.rows for launch in found.values())
    names = [f"64 x 256, 4 warps, 3 stages, {each} an SM" for each in (1, 2, 4)]
    found = dict(bench.launches(8192, 9728, 16, 132))
    assert [found[name].runs for name in names] == [4, 7, 14]
