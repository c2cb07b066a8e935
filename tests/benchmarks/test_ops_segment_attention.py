"""The rows of attention over segments: what each method computes, the pairs of the bounds, and the sweep's launches."""

from __future__ import annotations

import torch

from aligntune.backends.fast.ops.segment_attention import segment_attention_reference
from benchmarks.ops import segment_attention as bench

HEADS = (4, 2, 16)


def test_a_rows_methods_compute_the_same(device):
    for case in (bench.Case("", (5, 9, 2), HEADS), bench.Case("", (6, 6), HEADS),
                 bench.Case("", (4, 7, 3, 2, 5, 1), HEADS, prompts=2, each=2)):
        torch.manual_seed(0)
        arguments = bench.inputs(case, device)
        wide = [x.detach().float().requires_grad_() for x in arguments[:3]] + [arguments[3].float()]
        options = case.options(device)
        truth = bench.with_backward(lambda *x, o=options: segment_attention_reference(*x, **o), *wide)
        calls = bench.methods(case, device)
        assert len(calls) == 2
        for fn in calls.values():
            for a, b in zip(bench.with_backward(fn, *arguments), truth, strict=True):
                assert 0 < float((a.detach().float() - b.detach()).norm() / b.detach().norm()) < 2e-2


def test_bounds_by_hand():
    case = bench.Case("", (2, 3, 1), HEADS, prompts=1, each=2)
    assert case.before == [0, 2, 2] and case.group == [0, 0, 0]
    pairs = 3 + (6 + 3 * 2) + (1 + 2)
    assert case.flops() == (4 * pairs * 4 * 16, 10 * pairs * 4 * 16)
    assert case.moved()[0] == 2 * 6 * (8 + 4) * 16 + 4 * 6 * 4


def test_cases_and_variants():
    assert len({case.shape for case in bench.CASES}) == len(bench.CASES)
    assert [len(x) for x in (bench.NEAR_265, bench.RAGGED)] == [16, 16]
    assert sum(bench.documents(8192)) == 8192 and min(bench.documents(8192)) > 0
    for case in bench.CASES:
        assert len(case.before) == len(case.group or case.before) == len(case.lengths)
        names = [name for name, *_ in bench.variants(case)]
        assert len(set(names)) == len(names) > 10
