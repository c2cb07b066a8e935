"""The passes over rows of logits: every statistic and gradient, far rows, and what sm_90's compiler makes of them."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from packaging.version import Version

from aligntune.backends.fast.ops import _logits_pass as passes
from aligntune.backends.fast.ops import _runtime
from aligntune.backends.fast.ops._logits_pass import STATISTICS, LogitTransform, RowStatistics
from aligntune.backends.fast.ops.cross_entropy import statistics_reference, transform_reference
from tests.backends.fast.ops.far import far_flat, first_program
from tests.backends.fast.ops.harness import assert_fits, far_rows, relative_error, sm90_case
from tests.backends.fast.ops.logit_cases import TRANSFORMS, make


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("vocab", [3, 700, 9000])
def test_every_statistic_and_its_gradients(vocab, transform, device):
    # mild, or the cap makes ties in fp32 that float64 tells apart
    logits, targets = make(5, vocab, device, spread=1.0)
    targets[0] = logits[0].argmax()
    settings = LogitTransform(**transform)
    stats = RowStatistics.empty(5, logits.device, STATISTICS)
    passes.run_loss(logits, targets, stats, settings)
    wide = logits.double().requires_grad_()
    truth = statistics_reference(transform_reference(wide, **transform), targets)
    for name in (*STATISTICS, "lse"):
        ours, wanted = getattr(stats, name).double(), truth[name].detach().double()
        assert (ours - wanted).abs().max() <= 1e-6 + 3e-6 * wanted.abs().max(), name
    assert stats.is_top1[0] and not stats.is_top1[1]
    g_log_probs, g_entropy = torch.randn(2, 5, device=device)
    for of_log_probs, of_entropy in ((g_log_probs, None), (None, g_entropy), (g_log_probs, g_entropy)):
        found = logits.clone()
        passes.run_token_grad(found, targets, stats, settings, grad_log_probs=of_log_probs, grad_entropy=of_entropy)
        weighted = sum(
            (g.double() * truth[name]).sum()
            for g, name in ((of_log_probs, "log_probs"), (of_entropy, "entropy")) if g is not None
        )  # fmt: skip
        wanted = torch.autograd.grad(weighted, wide, retain_graph=True)[0]
        assert relative_error(found, wanted) < 3e-6
        assert not found[1].any()


def test_statistics_one_by_one_are_those_taken_together(device):
    logits, targets = make(4, 500, device)
    together = RowStatistics.empty(4, logits.device, STATISTICS)
    passes.run_loss(logits, targets, together, LogitTransform())
    for name in STATISTICS:
        alone = RowStatistics.empty(4, logits.device, (name,))
        passes.run_loss(logits, targets, alone, LogitTransform())
        assert torch.equal(getattr(alone, name), getattr(together, name)), name
        assert [n for n in STATISTICS[1:] if getattr(alone, n) is not None] == [n for n in (name,) if n != "log_probs"]


@pytest.mark.parametrize("vocab", [1, 200, 9001])
def test_top1_breaks_ties_as_argmax_does(vocab, device):
    """Few distinct values, so that nearly every row has several maxima, in several blocks."""
    logits = torch.randint(0, 3, (12, vocab), device=device).float()
    targets = logits.argmax(-1)
    for row in range(6):
        ties = (logits[row] == logits[row].max()).nonzero().flatten()
        targets[row] = ties[-1] if row % 2 else ties[len(ties) // 2]
    stats = RowStatistics.empty(12, logits.device, ("is_top1",))
    passes.run_loss(logits, targets, stats, LogitTransform())
    wanted = logits.argmax(-1) == targets
    assert torch.equal(stats.is_top1, wanted)
    assert wanted.all() == (vocab == 1)


def test_rows_past_two_to_the_31(device):
    vocab = 300
    logits, out = (far_rows(5, vocab, torch.float16, device) for _ in range(2))
    small, targets = make(5, vocab, device, dtype=torch.float16)
    logits.copy_(small)
    near = RowStatistics.empty(5, small.device, ("entropy",))
    far = RowStatistics.empty(5, small.device, ("entropy",))
    one, grad = torch.ones((), device=device), torch.empty_like(small)
    passes.run_loss(small, targets, near, LogitTransform(), grad=grad, scale=one)
    passes.run_loss(logits, targets, far, LogitTransform(), grad=out, scale=one)
    assert torch.equal(near.loss, far.loss) and torch.equal(near.entropy, far.entropy) and near.loss[4] > 0
    assert torch.equal(grad, out) and grad[4].any()
    g = torch.randn(5, device=device)
    passes.run_token_grad(small, targets, near, LogitTransform(), grad_log_probs=g)
    passes.run_token_grad(logits, targets, far, LogitTransform(), grad_log_probs=g)
    assert torch.equal(small, logits) and small[4].any()


def test_scaling_past_two_to_the_31():
    if not _runtime.interpreting():
        pytest.skip("starts the grid in its middle, which only the interpreter can")
    numel = 2**31 + 100
    x = far_flat(numel, torch.float16)
    x[2**31 :] = 3.0
    with first_program(2**31 // 4096):
        passes.scale_in_place[(1,)](x, torch.tensor(2.0), numel, BLOCK=4096)
    assert (x[2**31 :] == 6).all()


def test_scaling_in_place(device):
    x = torch.randn(5000, device=device)
    before = x.clone()
    assert torch.equal(passes.multiply_in_place(x, torch.ones((), device=device)), before)
    assert torch.equal(passes.multiply_in_place(x, torch.full((), -2.5, device=device)), before * -2.5)


# ------------------------------------------------------------------------------------------------- what sm_90 makes


def _signature(dtype, pointers, vocab, **others):
    kinds = {"targets_ptr": "*i64", "top1_ptr": "*u8", "logits_ptr": dtype, "grad_ptr": dtype}
    return {name: kinds.get(name, "*fp32") for name in pointers.split()} | others | {
        "n_cols": vocab, "ignore_index": -100, "logit_scale": "fp32", "softcap": "fp32", "inv_t": "fp32",
    }  # fmt: skip


def loss_case(dtype, *, outputs=(), softcap=False, smoothing=False, grad=True, vocab=151_936, pitch=None):
    many_sums = softcap or smoothing or "mean_logits" in outputs or "log_sum_sq_probs" in outputs
    strides = {"logits_stride": pitch or vocab, "grad_stride": pitch or vocab}
    launch = passes.choose_launch(vocab, tuple(strides.values()), many_sums=many_sums)
    pointers = (
        "logits_ptr grad_ptr targets_ptr scale_ptr loss_ptr lse_ptr log_prob_ptr entropy_ptr log_sum_sq_ptr mean_ptr "
        "top1_ptr"
    )
    signature = _signature(dtype, pointers, vocab, **strides, smoothing="fp32", z_loss="fp32")
    constants = {
        "SOFTCAP": softcap, "SCALED": softcap, "ENTROPY": "entropy" in outputs,
        "MEAN": smoothing or "mean_logits" in outputs, "LOG_SUM_SQ": "log_sum_sq_probs" in outputs,
        "TOP1": "is_top1" in outputs, "SMOOTHING": smoothing, "GRAD": grad, "BLOCK": launch.block,
        "STAGES": launch.stages,
    }  # fmt: skip
    return sm90_case(passes.logits_loss, signature, constants, num_warps=launch.num_warps)


def grad_case(dtype, *, entropy, softcap, vocab=151_936, pitch=None):
    stride = pitch or vocab
    launch = passes.choose_launch(vocab, (stride,))
    pointers = "logits_ptr targets_ptr lse_ptr log_prob_ptr entropy_ptr g_log_prob_ptr g_entropy_ptr"
    constants = {"SOFTCAP": softcap, "SCALED": softcap, "G_LOG_PROB": True, "G_ENTROPY": entropy, "BLOCK": launch.block,
                 "STAGES": launch.stages}  # fmt: skip
    signature = _signature(dtype, pointers, vocab, logits_stride=stride)
    return sm90_case(passes.logits_grad, signature, constants, num_warps=launch.num_warps)


SFT, DPO = ("entropy", "is_top1"), ("entropy", "mean_logits", "is_top1")
CI_CASES = {
    "sft": loss_case("*bf16", outputs=SFT),
    "everything": loss_case("*bf16", outputs=STATISTICS, softcap=True, smoothing=True),
    "token gradient": grad_case("*bf16", entropy=True, softcap=True),
    "scale": sm90_case(
        passes.scale_in_place, {"x_ptr": "*bf16", "factor_ptr": "*fp32", "numel": 2**32}, {"BLOCK": 4096}, num_warps=8
    ),
}


@pytest.mark.parametrize("name", list(CI_CASES))
def test_kernels_fit_sm_90(name):
    # In the class of SFT, whose 64 registers are what two programs on an SM can have, Triton 3.6 spills one; 3.9 some,
    # but of its 42 loads and stores four are in the loop.
    spills = 64 if name == "sft" and not Version("3.7") <= Version(metadata.version("triton")) < Version("3.9") else 0
    found = assert_fits(CI_CASES[name], load_bits=None if name == "scale" else 128, spills=spills)
    assert found.stores.get(128, 0) > 0 or name == "scale"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocab", "pitch"), [(151_936, 151_936), (262_144, 262_144), (50_257, 50_304), (50_257, 50_257)])
@pytest.mark.parametrize("dtype", ["*bf16", "*fp16", "*fp32"])
def test_every_class_fits_sm_90(dtype, vocab, pitch):
    both = (False, True)
    cases = [
        loss_case(dtype, outputs=outputs, softcap=softcap, smoothing=outputs == (), grad=grad, vocab=vocab, pitch=pitch)
        for outputs in ((), ("entropy",), SFT, DPO, STATISTICS)
        for softcap in both
        for grad in both
    ]
    cases += [
        grad_case(dtype, entropy=entropy, softcap=softcap, vocab=vocab, pitch=pitch)
        for entropy in both
        for softcap in both
    ]
    for case in cases:
        # The head's own buffer is padded to an aligned row; foreign logits of an odd vocabulary are not. There ptxas
        # spills a few registers of one class (entropy, softcap) outside its loops, to have two programs on an SM.
        aligned = pitch % 16 == 0
        assert_fits(case, load_bits=128 if aligned else None, spills=0 if aligned else 16)
