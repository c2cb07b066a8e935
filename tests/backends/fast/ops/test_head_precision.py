"""The head's precision, the plan of its chunks, and the weight gradient's sum."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aligntune.backends.fast.ops import _projection, _runtime, head
from aligntune.backends.fast.ops._logits_pass import STATISTICS
from aligntune.backends.fast.ops.head import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    token_loss,
    token_loss_reference,
)
from tests.backends.fast.ops.harness import assert_close_to_truth, relative_error
from tests.backends.fast.ops.head_cases import KINDS, as_dict, make, run


@pytest.fixture(autouse=True)
def seeded(request):
    """The same numbers in CI each time; fresh ones on a GPU."""
    torch.manual_seed(0) if request.node.get_closest_marker("gpu") is None else torch.seed()


@pytest.fixture
def chunks_of_four(monkeypatch):
    monkeypatch.setattr(head, "plan_rows", lambda *_: 4)


# ------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_fp16_against_the_truth(kind, trained, device, chunks_of_four):
    """err(ours) < 2 err(eager), on numbers that fp16 holds; the weight gradient crosses its two halves at V = 300."""
    tensors = make(9, 32, 300, device, dtype=torch.float16, bias=trained)
    ours, eager = (
        run(kind, *tensors, reference=reference, trained=trained, outputs=("log_probs", "entropy"), upstream=2.0)
        for reference in (False, True)
    )
    wide = [None if t is None else t.double() for t in tensors[:3]]
    truth = run(
        kind, *wide, tensors[3], reference=True, trained=trained, outputs=("log_probs", "entropy"), upstream=2.0
    )
    for name in ("log_probs", "entropy", "dx", *(["dweight", "dbias"] if trained else [])):
        assert_close_to_truth(ours[name], eager[name], truth[name], eps=1e-5, what=name)


@pytest.mark.parametrize("fp32_logits", [True, False])
@pytest.mark.parametrize("kind", ["loss", "tokens"])
def test_fp16_gradients_do_not_underflow(kind, fp32_logits, device):
    """1/n and a loss scale of 2^16, as a gradient scaler has it: p_j / n = 1.5e-8 on its own is 0 in fp16."""
    x, weight, _, targets = make(2, 8, 4096, device, dtype=torch.float16, scale=0.01)
    targets[:] = 7
    grads = {}
    for reference in (False, True):
        wide = (lambda t: t.double()) if reference else (lambda t: t)
        leaf = wide(weight).detach().requires_grad_()
        if kind == "loss":
            fn = linear_cross_entropy_reference if reference else linear_cross_entropy
            out = as_dict(
                fn(wide(x), leaf, targets, num_items_in_batch=16_384, fp32_logits=fp32_logits and not reference)
            )
        else:
            fn = token_loss_reference if reference else token_loss
            out = as_dict(
                fn(wide(x), leaf, targets, lambda log_probs, _: -log_probs, denominator=16_384,
                   fp32_logits=fp32_logits and not reference)
            )  # fmt: skip
        (out["loss"] * 2.0**16).backward()
        grads[reference] = leaf.grad
    assert grads[False][8:].count_nonzero() > 0.99 * grads[False][8:].numel()
    assert relative_error(grads[False][8:], grads[True][8:]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_logits_of_half_inputs(kind, dtype, device, chunks_of_four):
    """As exact as the head in fp32: the gradients are then rounded once, to the inputs' type."""
    x, weight, bias, targets = make(9, 32, 300, device, dtype=dtype, bias=True)
    options = {"outputs": STATISTICS, "fp32_logits": True}
    ours = run(kind, x, weight, bias, targets, reference=False, **options)
    truth = run(kind, x.double(), weight.double(), bias.double(), targets, reference=True, **options)
    for name in ("log_probs", "entropy", "mean_logits"):
        assert relative_error(ours[name], truth[name]) < 1e-5, name
    # the interpreter truncates to bf16 where a GPU rounds
    ulp = torch.finfo(dtype).eps * (1 if _runtime.interpreting() and dtype == torch.bfloat16 else 0.5)
    for name in ("dx", "dweight", "dbias"):
        assert ours[name].dtype == dtype
        assert relative_error(ours[name], truth[name]) < ulp, name


def test_fp32_logits_keep_sixteen_bits_of_the_gradient(device):
    """Half a token more or less in dlogits shows in dW as 2^-9 with one bf16 term, 2^-17 with two."""
    if device != "cpu":
        pytest.skip("reads the fp32 sum, which only the CPU path leaves unrounded")
    x, weight, _, targets = make(8, 32, 300, device, dtype=torch.bfloat16)
    sums = []
    plain = _projection.add_product

    def spy(acc, a, b, *, first):
        plain(acc, a, b, first=first)
        sums.append(acc.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_projection, "add_product", spy)
        linear_cross_entropy(x.requires_grad_(), weight, targets, fp32_logits=True)
    wide = x.detach().double().requires_grad_()
    linear_cross_entropy_reference(wide, weight.double(), targets)["loss"].backward()
    one, both = (relative_error(s, wide.grad) for s in sums[1:])
    assert both < 2e-5 < 1e-4 < one


@pytest.mark.parametrize("trained", [True, False])
def test_autocast_decides_the_precision(trained, device):
    """fp32 hidden states and weight under fp16 autocast: fp16 products, fp32 gradients."""
    x, weight, _, targets = make(6, 32, 300, device)
    dtypes = []
    plain = _projection.Projection.logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _projection.Projection, "logits", lambda self, x, out: dtypes.append(x.dtype) or plain(self, x, out)
        )
        with torch.autocast(device, dtype=torch.float16):
            ours = run("loss", x, weight, None, targets, reference=False, trained=trained)
            eager = run("loss", x, weight, None, targets, reference=True, trained=trained)
            run("loss", x, weight, None, targets, reference=False, trained=trained, fp32_logits=True)
    assert dtypes == [torch.float16, torch.float32]
    truth = run("loss", x.double(), weight.double(), None, targets, reference=True, trained=trained)
    for name in ("dx", "dweight") if trained else ("dx",):
        assert ours[name].dtype == torch.float32
        assert_close_to_truth(ours[name], eager[name], truth[name], eps=1e-5, what=name)


def test_a_weight_of_another_type(device):
    """modules_to_save keeps the head in fp32 beside half-precision hidden states."""
    x, weight, _, targets = make(6, 32, 300, device)
    out = run("loss", x.half(), weight, None, targets, reference=False)
    truth = run("loss", x.half().double(), weight.half().double(), None, targets, reference=True)
    assert out["dx"].dtype == torch.float16 and out["dweight"].dtype == torch.float32
    assert relative_error(out["dx"], truth["dx"]) < 2e-3 and relative_error(out["dweight"], truth["dweight"]) < 2e-3


# ------------------------------------------------------------------------------------------- chunks and accumulation


@pytest.mark.parametrize(
    ("rows", "hidden", "vocab", "trained", "frozen"),
    [
        (100, 4096, 151_936, 100, 100),  # fewer than a chunk
        (1500, 2048, 128_256, 1500, 1500),  # of 2 chunks the products' waves would be as many as of one of 2048 rows
        (8192, 4096, 151_936, 3072, 1024),  # 3072, 3072, 2048: 8 waves, where 2816 rows a chunk would take 9
        (8192, 2048, 128_256, 4096, 2048),
        (8192, 4096, 262_144, 2048, 1024),
        (16_384, 2560, 151_936, 3328, 3328),
        (10_240, 2560, 151_936, 3328, 1536),
    ],
)
def test_the_plan(rows, hidden, vocab, trained, frozen):
    row_bytes = _projection.logits_row_bytes(vocab, _projection.Precision(torch.bfloat16, torch.bfloat16))
    for needed, expected in ((True, trained), (False, frozen)):
        plan = _projection.plan_rows(rows, hidden, row_bytes, _projection.MEMORY_BUDGET, 132, needed)
        assert plan == expected
        assert plan * row_bytes <= _projection.MEMORY_BUDGET


def test_the_plan_keeps_to_the_budget():
    for budget in (1, 1 << 20, 1 << 26, 1 << 28, 1 << 31):
        for rows in (1, 255, 257, 5000, 100_000):
            for trained in (True, False):
                plan = _projection.plan_rows(rows, 1024, 300_000, budget, 132, trained)
                assert 1 <= plan <= min(rows, 4096) and (plan * 300_000 <= budget or plan <= 256)


class _LargestRows(TorchDispatchMode):
    """The most rows of any tensor as wide as the vocabulary that a torch op hands out."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.dim() > 1 and self.vocab <= t.shape[-1] < 2 * self.vocab:
                self.rows = max(self.rows, t.numel() // t.shape[-1])
        return out


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_all_rows_are_never_held(kind, trained, device, monkeypatch):
    """Forward and backward, whatever is asked for; the reference, which holds them, shows that it would be seen."""
    monkeypatch.setattr(head, "plan_rows", lambda *_: 8)
    tensors = make(30, 8, 1000, device)  # a transposed weight has 8 rows, too
    found = {}
    for reference in (False, True):
        options = {} if reference else {"memory_budget": 1}
        with _LargestRows(1000) as seen:
            run(kind, *tensors, reference=reference, trained=trained, outputs=STATISTICS, **options)
        found[reference] = seen.rows
    assert found == {True: 30, False: 8}


@pytest.mark.parametrize(("vocab", "hidden"), [(300, 7), (100, 5), (1, 3), (9001, 8), (128, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_weight_gradient_is_rounded_once(vocab, hidden, dtype):
    """4096 + 1/2 + 1/2 is 4096 if every partial sum is rounded to fp16, and 4097 rounded to 4096 or 4100 if one is."""
    weight = torch.zeros(vocab, hidden)
    total = _projection.WeightGradient(weight, dtype)
    chunks = [(torch.randn(3, vocab).to(dtype), torch.randn(3, hidden).to(dtype)) for _ in range(20)]
    for g, x in chunks:
        total.add(g, x)
    truth = sum(g.double().t() @ x.double() for g, x in chunks)
    result = total.finish()
    assert result.dtype == dtype and result.untyped_storage().nbytes() == vocab * hidden * dtype.itemsize
    if dtype == torch.float16:
        assert torch.allclose(result.double(), truth, rtol=2**-11 * 1.01, atol=2e-6)
    else:
        assert relative_error(result, truth) < 1e-6
    assert not _projection.WeightGradient(weight, dtype).finish().any()


def test_memory_of_the_weight_gradient():
    """4VH bytes for the sum, and no more: the result lies in half of them."""
    total = _projection.WeightGradient(torch.empty(1024, 64), torch.bfloat16)
    parts = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (total.result, total.lower, total.upper)
    }
    assert sum(parts.values()) == 4 * 1024 * 64


@pytest.mark.parametrize("trained", [False, True])
def test_what_lies_between_rows_of_logits_is_in_no_gradient(trained, device, monkeypatch):
    """Rows of an odd vocabulary are padded; torch's bf16 products on a CPU read on, and NaN times 0 is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(
        float("nan") if options.get("dtype", torch.float32).is_floating_point else 0))
    hidden = torch.randn(46, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(259, 32, device=device, dtype=torch.bfloat16, requires_grad=trained)
    targets = torch.randint(0, 259, (46,), device=device)
    loss = linear_cross_entropy(hidden, weight, targets).loss
    monkeypatch.undo()
    loss.backward()
    for gradient in [hidden.grad, *([weight.grad] if trained else [])]:
        assert gradient.isfinite().all() and float(gradient.norm()) > 1e-2
