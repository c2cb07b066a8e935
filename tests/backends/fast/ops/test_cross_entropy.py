"""Cross-entropy on logits against float64, torch's own loss and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from aligntune.backends.fast.ops import _logits_pass as passes
from aligntune.backends.fast.ops import _runtime
from aligntune.backends.fast.ops._logits_pass import STATISTICS, LogitTransform, RowStatistics
from aligntune.backends.fast.ops.cross_entropy import (
    cross_entropy,
    cross_entropy_reference,
    statistics_reference,
    transform_reference,
)
from aligntune.errors import BackendUnavailableError
from tests.backends.fast.ops.harness import assert_close_to_truth, launches, relative_error
from tests.backends.fast.ops.logit_cases import TRANSFORMS, make

LOSSES = [
    {},
    {"label_smoothing": 0.2},
    {"z_loss": 0.05},
    {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "sum"},
    {"num_items_in_batch": 11},
]


@pytest.fixture(autouse=True)
def seeded(request):
    """The same numbers in CI each time; fresh ones on a GPU."""
    torch.manual_seed(0) if request.node.get_closest_marker("gpu") is None else torch.seed()


def loss_and_grad(fn, logits, targets, upstream=1.0, **options):
    logits = logits.detach().clone().requires_grad_()
    loss = fn(logits, targets, **options)
    (loss * upstream).backward()
    return loss.detach(), logits.grad


def assert_equal_to_truth(logits, targets, *, tolerance=2e-6, **options):
    ours, grad = loss_and_grad(cross_entropy, logits, targets, **options)
    truth, true_grad = loss_and_grad(cross_entropy_reference, logits.double(), targets, **options)
    assert abs(truth) > 1e-3 and true_grad.norm() > 1e-3, "compares zeros"
    assert ours.dtype == torch.float32 and grad.dtype == logits.dtype and grad.shape == logits.shape
    assert abs(ours.double() - truth) <= tolerance * abs(truth)
    assert relative_error(grad, true_grad) < tolerance
    return grad


# ---------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_reference_is_torchs_loss(reduction, label_smoothing):
    logits, targets = make(6, 50, "cpu", dtype=torch.float64)
    found = loss_and_grad(
        cross_entropy_reference, logits, targets, label_smoothing=label_smoothing, reduction=reduction
    )
    wanted = loss_and_grad(F.cross_entropy, logits, targets, label_smoothing=label_smoothing, reduction=reduction)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_reference_of_every_number_by_hand():
    """z = log [1/2, 1/4, 1/8, 1/8], undone by the transform; the target is the second."""
    z = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]], dtype=torch.float64).log()
    raw = torch.atanh(z * 2 / 5) * 5 / 3
    again = transform_reference(raw, softcap=5.0, logit_scale=3.0, temperature=2.0)
    torch.testing.assert_close(again, z, rtol=1e-12, atol=0)
    found = statistics_reference(z, torch.tensor([1]))
    wanted = {
        "lse": 0.0, "log_probs": -1.3862943611198906, "entropy": 1.2130075659799042,
        "log_sum_sq_probs": -1.0678406300013146, "mean_logits": -1.5595811562598770, "is_top1": 0,
    }  # fmt: skip
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(value, abs=1e-12), name
    loss = cross_entropy_reference(raw, torch.tensor([1]), softcap=5.0, logit_scale=3.0, temperature=2.0,
                                   label_smoothing=0.5, z_loss=1.0)  # fmt: skip
    assert float(loss) == pytest.approx(0.5 * 1.3862943611198906 + 0.5 * 1.5595811562598770, abs=1e-12)


def test_the_gradient_is_that_of_finite_differences(device):
    options = {"softcap": 3.0, "logit_scale": 1.4, "temperature": 0.8, "label_smoothing": 0.15, "z_loss": 0.02}
    logits, targets = make(3, 9, device, spread=2.0)
    grad = loss_and_grad(cross_entropy, logits, targets, **options)[1]
    step, wide = 1e-6, logits.double()
    for row in (0, 2):
        for col in range(9):
            moved = [wide.clone(), wide.clone()]
            moved[0][row, col] += step
            moved[1][row, col] -= step
            up, down = (cross_entropy_reference(m, targets, **options) for m in moved)
            assert float(grad[row, col]) == pytest.approx(float(up - down) / (2 * step), abs=2e-7)
    assert not grad[1].any()


# ----------------------------------------------------------------------------------------------------------- the op


@pytest.mark.parametrize(
    ("rows", "vocab"),
    [(5, 1000), (1, 1000), (4, 2), (3, 129), (2, 8192), (2, 8200), (2, 20001), (1, 262_144), (1, 262_151)],
)
def test_odd_shapes(rows, vocab, device):
    logits, targets = make(rows, vocab, device, ignored=(1,) if rows > 2 else ())
    assert_equal_to_truth(logits, targets)
    assert_equal_to_truth(logits, targets, softcap=4.0, label_smoothing=0.1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_option(transform, loss, device):
    logits, targets = make(5, 300, device)
    assert_equal_to_truth(logits, targets, upstream=0.37, **transform, **loss)


def test_a_vocabulary_of_one(device):
    logits, targets = torch.tensor([[3.0], [-2.0]], device=device), torch.zeros(2, dtype=torch.int64, device=device)
    loss, grad = loss_and_grad(cross_entropy, logits, targets)
    assert float(loss) == 0 and not grad.any()


def test_more_dimensions_and_other_ignored_labels(device):
    logits, targets = make(6, 40, device, ignored=())
    targets[2] = targets[5] = 7
    found = loss_and_grad(cross_entropy, logits.view(2, 3, 40), targets.view(2, 3), ignore_index=7)
    wanted = loss_and_grad(F.cross_entropy, logits.double(), targets, ignore_index=7)
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-6)
    assert relative_error(found[1].view(6, 40), wanted[1]) < 1e-6


def test_num_items_in_batch_of_every_kind(device):
    logits, targets = make(5, 30, device)
    total = cross_entropy(logits, targets, reduction="sum")
    for items in (8, 8.0, torch.tensor(8), torch.tensor([8], device=device), torch.tensor(8.0)):
        assert float(cross_entropy(logits, targets, num_items_in_batch=items)) == pytest.approx(float(total) / 8)
    assert float(cross_entropy(logits, targets)) == pytest.approx(float(total) / 4)


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 0}, {"reduction": "sum"}, {"label_smoothing": 0.1}])
def test_all_rows_ignored(options, device):
    logits, targets = make(3, 100, device)
    loss, grad = loss_and_grad(cross_entropy, logits, torch.full_like(targets, -100), **options)
    assert float(loss) == 0 and not grad.any()


def test_no_rows(device):
    loss, grad = loss_and_grad(cross_entropy, torch.empty(0, 7, device=device), torch.empty(0, device=device).long())
    assert float(loss) == 0 and grad.shape == (0, 7)


def test_a_confident_token_keeps_its_gradient(device):
    """p_y - 1 = -3e-11: computed as p - 1 in fp32 it would be 0."""
    logits = torch.zeros(1, 300, device=device)
    logits[0, 4] = 30.0
    targets = torch.tensor([4], device=device)
    loss, grad = loss_and_grad(cross_entropy, logits, targets)
    truth, true_grad = loss_and_grad(cross_entropy_reference, logits.double(), targets)
    assert 1e-12 < float(truth) < 1e-10
    assert float(loss) == pytest.approx(float(truth), rel=1e-5)
    assert float(grad[0, 4]) == pytest.approx(float(true_grad[0, 4]), rel=1e-5)
    stats = RowStatistics.empty(1, logits.device, ())
    passes.run_loss(logits, targets, stats, LogitTransform())
    ones = torch.ones(1, device=device)
    passes.run_token_grad(logits, targets, stats, LogitTransform(), grad_log_probs=-ones)
    assert float(logits[0, 4]) == pytest.approx(float(true_grad[0, 4]), rel=1e-5)


@pytest.mark.parametrize("p", [0.02, 0.5, 0.72, 0.76, 0.9, 0.92, 0.999])
def test_both_forms_of_the_target_gradient_agree_with_float64(p, device):
    """On both sides of where the series take over from exp and log."""
    logits = torch.tensor([[0.0, 0.0]], device=device)
    logits[0, 1] = torch.logit(torch.tensor(p))
    targets = torch.tensor([1], device=device)
    truth, true_grad = loss_and_grad(cross_entropy_reference, logits.double(), targets)
    loss, grad = loss_and_grad(cross_entropy, logits, targets)
    assert float(loss) == pytest.approx(float(truth), rel=3e-6)
    assert float(grad[0, 1]) == pytest.approx(float(true_grad[0, 1]), rel=1e-6)
    stats = RowStatistics.empty(1, logits.device, ())
    passes.run_loss(logits, targets, stats, LogitTransform())
    passes.run_token_grad(logits, targets, stats, LogitTransform(), grad_log_probs=-torch.ones(1, device=device))
    assert float(logits[0, 1]) == pytest.approx(float(true_grad[0, 1]), rel=3e-6)


def test_extreme_logits(device):
    """Saturated caps, -inf for tokens that cannot be, values whose exponentials overflow."""
    logits, targets = make(4, 600, device, ignored=(), spread=200.0)
    targets[:] = 17
    assert_equal_to_truth(logits, targets)
    assert_equal_to_truth(logits / 10, targets, softcap=6.0, tolerance=5e-6)
    banned = logits / 50
    banned[:, 100:] = -float("inf")
    loss, grad = loss_and_grad(cross_entropy, banned, targets)
    wanted, wanted_grad = loss_and_grad(cross_entropy, banned[:, :100].contiguous(), targets)
    assert torch.isfinite(loss) and torch.equal(loss, wanted)
    torch.testing.assert_close(grad[:, :100], wanted_grad, rtol=1e-6, atol=1e-8)
    assert not grad[:, 100:].any()
    # the first block of the sweep holds nothing but -inf
    banned = torch.full((1, 8192 + 50), -float("inf"), device=device)
    banned[0, 8192:] = torch.linspace(-3, 3, 50)
    stats = RowStatistics.empty(1, banned.device, STATISTICS)
    passes.run_loss(banned, torch.tensor([8200], device=device), stats, LogitTransform())
    wanted = statistics_reference(banned[:, 8192:].double(), torch.tensor([8], device=device))
    for name in ("lse", "log_probs", "entropy", "log_sum_sq_probs"):
        assert float(getattr(stats, name)) == pytest.approx(float(wanted[name]), rel=1e-6), name


def test_nan_and_unknown_targets_are_not_hidden(device):
    logits, targets = make(4, 300, device, ignored=())
    for label in (300, 10_000, -1, -99):
        wrong = targets.clone()
        wrong[2] = label
        assert torch.isnan(cross_entropy(logits, wrong)), label
    assert torch.isnan(cross_entropy(torch.where(torch.arange(300, device=device) == 5, float("nan"), logits), targets))


def test_the_logits_are_left_alone(device):
    logits, targets = make(4, 200, device)
    before = logits.clone()
    assert_equal_to_truth(logits, targets)
    leaf = logits.requires_grad_()
    cross_entropy(leaf, targets).backward()
    assert torch.equal(leaf.detach(), before)


def test_row_strides_and_expanded_gradients(device):
    wide, targets = make(4, 512, device)
    for logits in (wide[:, :300], wide[:, 5:305], wide[:, ::2], wide[:1].expand(4, 512)[:, :77]):
        labels = targets.clamp(max=logits.shape[-1] - 1)
        found = logits.detach().requires_grad_()
        # each loss gets an expanded, stride-0 gradient from the sum
        losses = torch.stack([cross_entropy(found, labels), cross_entropy(found, labels, softcap=3.0)])
        losses.sum().backward()
        truth = logits.double().detach().requires_grad_()
        (cross_entropy_reference(truth, labels) + cross_entropy_reference(truth, labels, softcap=3.0)).backward()
        assert relative_error(found.grad, truth.grad) < 2e-6


def test_fp16_gradients_do_not_underflow(device):
    """1/n and a loss scale of 2^16, as a gradient scaler has it: p_j / n = 1.5e-8 on its own is 0 in fp16."""
    logits, targets = make(2, 4096, device, dtype=torch.float16, ignored=(), spread=0.1)
    grad = loss_and_grad(cross_entropy, logits, targets, upstream=2.0**16, num_items_in_batch=16_384)[1]
    truth = loss_and_grad(cross_entropy_reference, logits.double(), targets, 2.0**16, num_items_in_batch=16_384)[1]
    assert (grad != 0).all()
    assert relative_error(grad, truth) < 1e-3


def test_gradients_are_handed_out_once(device):
    logits, targets = make(3, 50, device)
    loss = cross_entropy(logits.requires_grad_(), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_one_launch_forward_one_backward(device):
    logits, targets = make(3, 50, device)
    leaf = logits.requires_grad_()
    cross_entropy(leaf, targets).backward()
    if not _runtime.interpreting():
        torch.cuda.synchronize()
    assert launches(lambda: cross_entropy(leaf, targets).backward()) == {"logits_loss": 1, "scale_in_place": 1}
    with torch.no_grad():
        assert not cross_entropy(leaf, targets).requires_grad


def test_misuse_is_named(device, monkeypatch):
    logits, targets = make(3, 50, device)
    with pytest.raises(ValueError, match="do not fit"):
        cross_entropy(logits, targets[:2])
    with pytest.raises(ValueError, match="reduction must be"):
        cross_entropy(logits, targets, reduction="none")
    with pytest.raises(ValueError, match="divides by nothing"):
        cross_entropy(logits, targets, reduction="sum", num_items_in_batch=3)
    with pytest.raises(ValueError, match="softcap must be positive"):
        cross_entropy(logits, targets, softcap=0.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        cross_entropy(logits, targets, temperature=0.0)
    with pytest.raises(ValueError, match="unknown outputs"):
        RowStatistics.empty(1, logits.device, ("entropies",))
    monkeypatch.setattr(_runtime, "_INTERPRETING", False)
    if device == "cpu":
        with pytest.raises(BackendUnavailableError):
            cross_entropy(logits, targets)


# ------------------------------------------------------------------------------------------------------- on the card


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4, "temperature": 0.7}, {"logit_scale": 0.3}],
)
@pytest.mark.parametrize("vocab", [128_256, 151_936, 262_144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_against_the_truth(dtype, vocab, options, device):
    logits, targets = make(256, vocab, device, dtype=dtype, ignored=range(0, 250, 7), spread=2.0)
    found = loss_and_grad(cross_entropy, logits, targets, upstream=3.0, **options)
    eager = loss_and_grad(cross_entropy_reference, logits, targets, upstream=3.0, **options)
    truth = loss_and_grad(cross_entropy_reference, logits.double(), targets, upstream=3.0, **options)
    assert_close_to_truth(found[1], eager[1], truth[1], what="gradient")
    assert float(found[0]) == pytest.approx(float(truth[0]), rel=1e-5)


@pytest.mark.gpu
def test_no_host_sync(device):
    logits, targets = make(64, 32_000, device, dtype=torch.bfloat16)
    leaf, items = logits.requires_grad_(), torch.tensor(60)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            cross_entropy(leaf, targets).backward()
            cross_entropy(leaf, targets, num_items_in_batch=items, softcap=10.0).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(leaf.grad).all() and leaf.grad.any()
