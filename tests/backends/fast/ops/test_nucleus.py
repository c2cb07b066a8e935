"""The floor of the nucleus: by bisection, against sorting and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from aligntune.backends.fast.ops import nucleus as op
from aligntune.backends.fast.ops.nucleus import nucleus_floor, nucleus_floor_kernel, nucleus_floor_reference
from tests.backends.fast.ops.harness import assert_fits, sm90_case

BOTH = pytest.mark.parametrize("fn", [nucleus_floor, nucleus_floor_reference])


def kept(fn, scores, top_p, device="cpu"):
    floor = fn(scores.to(device), torch.tensor(top_p, device=device)).cpu()
    assert floor.shape == (len(scores), 1) and floor.dtype == torch.float32
    return scores >= floor


@BOTH
@pytest.mark.parametrize(("top_p", "expected"), [(0.3, 1), (0.5, 1), (0.5001, 2), (0.75, 2), (0.8, 3), (1.0, 4)])
def test_by_hand(fn, top_p, expected, device):
    """Probabilities 1/2, 1/4, 1/8, 1/8: a token is in while less than top_p lies above it; equals go together."""
    scores = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log() + 3.7
    probabilities = scores.softmax(1)
    # Halves are exact here but for rounding: look on either side of them.
    inside = kept(fn, scores, top_p if expected != 1 or top_p != 0.5 else 0.4999, device)
    if fn is nucleus_floor_reference and expected == 3:
        assert inside.sum() in (3, 4)  # sorting cuts between equals, and the floor brings the other back
    elif expected == 3:
        assert inside.sum() == 4
    else:
        assert inside.sum() == expected
    assert inside[0, probabilities.argmax()]


@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.9, 0.999])
@pytest.mark.parametrize("vocab", [3, 101, 9000])
def test_equals_sorting(vocab, top_p, device):
    g = torch.Generator().manual_seed(vocab)
    scores = torch.randn(3, vocab, generator=g) * torch.tensor([[0.3], [3.0], [12.0]])
    scores[0, ::2] = -math.inf  # cut already
    scores[1] -= 100.0  # all negative
    scores[2] += 100.0  # all positive
    ours, theirs = kept(nucleus_floor, scores, top_p, device), kept(nucleus_floor_reference, scores, top_p)
    # Where the mass meets top_p to rounding, one token may fall either way.
    assert ((ours ^ theirs).sum(1) <= 1).all()
    assert ours.any(1).all() and not ours[0, ::2].any()
    if top_p == 0.2 and vocab == 9000:
        assert (ours.sum(1) > 1)[0] and (~ours).any(1).all()


def test_rows_at_a_stride_and_rows_that_are_flat(device):
    wide = torch.zeros(4, 20, device=device)
    wide[:, 10:] = 77.0
    inside = nucleus_floor(wide[:, :10], torch.tensor(0.5, device=device)).cpu()
    assert inside.flatten().tolist() == [0.0] * 4  # all equal: all in
    assert nucleus_floor(wide[:0], torch.tensor(0.5, device=device)).shape == (0, 1)


CASE = sm90_case(nucleus_floor_kernel, {"scores_ptr": "*fp32", "row_stride": 128256, "top_p_ptr": "*fp32",
                                        "floor_ptr": "*fp32", "vocab": 128256}, {"BLOCK": op._BLOCK},
                 num_warps=op._WARPS)  # fmt: skip


def test_compiles_for_sm90():
    assert_fits(CASE, load_bits=128)


@pytest.mark.gpu
def test_on_the_gpu_at_full_vocabulary():
    scores = torch.randn(64, 151_936, device="cuda") * 2.5
    top_p = torch.tensor(0.95, device="cuda")
    ours, theirs = (scores >= fn(scores, top_p) for fn in (nucleus_floor, nucleus_floor_reference))
    assert ((ours ^ theirs).sum(1) <= 8).all()  # sums of 150,000 terms, in two orders
    assert (ours.sum(1) > 100).all()
