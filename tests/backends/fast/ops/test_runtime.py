"""The shared runtime of ops and the harness that judges them."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from aligntune.backends.fast import ops
from aligntune.backends.fast.ops import _runtime
from aligntune.errors import BackendUnavailableError
from tests.backends.fast.ops import harness
from tests.backends.fast.ops.harness import assert_close_to_truth, assert_fits, far_rows, resources, sm90_case


@_runtime.kernel
def harness_add_one(x_ptr, y_ptr, row, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    cols = tl.arange(0, BLOCK)
    tl.store(y_ptr + pid * row + cols, tl.load(x_ptr + pid * row + cols).to(tl.float32) + 1)


@triton.jit
def harness_spiller(x_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + cols).to(tl.float32)
    b = tl.load(y_ptr + cols).to(tl.float32)
    total = tl.sum(a * b, 0)
    tl.store(y_ptr + cols, a * total + b)


ALIGNED = sm90_case(harness_add_one, {"x_ptr": "*bf16", "y_ptr": "*bf16", "row": 2048}, {"WIDE": 1, "BLOCK": 2048})
ODD_ROW = sm90_case(harness_add_one, {"x_ptr": "*bf16", "y_ptr": "*bf16", "row": 2047}, {"WIDE": 1, "BLOCK": 2048})
SPILLS = sm90_case(harness_spiller, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 16384}, num_warps=1)


def test_kernels_are_listed_by_name_and_names_are_unique():
    assert _runtime.KERNELS["harness_add_one"] is harness_add_one

    def harness_add_one_copy(x_ptr):
        tl.store(x_ptr, tl.program_id(0))

    harness_add_one_copy.__name__ = "harness_add_one"
    harness_add_one_copy.__module__ = "elsewhere"
    with pytest.raises(ValueError, match="two kernels are named 'harness_add_one'"):
        _runtime.kernel(harness_add_one_copy)


def test_an_interpreted_launch_shows_in_a_trace():
    if not _runtime.interpreting():
        pytest.skip("on a GPU the trace shows the kernel itself")
    x = torch.zeros(2, 16)
    with torch.profiler.profile() as trace:
        harness_add_one[(2,)](x, x, 16, 1, 16)
        harness_add_one[(2,)](x, x, 16, 1, 16)
    assert (x == 2).all()
    assert {event.key: event.count for event in trace.key_averages()}["harness_add_one"] == 2


def test_cpu_tensors_are_refused_unless_interpreting(monkeypatch):
    monkeypatch.setattr(_runtime, "_INTERPRETING", False)
    with pytest.raises(BackendUnavailableError, match="backend='trl'"):
        _runtime.require_device(None, torch.zeros(1))
    monkeypatch.setattr(_runtime, "_INTERPRETING", True)
    _runtime.require_device(None, torch.zeros(1))


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (255, 256), (256, 256), (257, 512)])
def test_next_power_of_2(n, power):
    assert _runtime.next_power_of_2(n) == power


def test_row_views_share_memory_where_they_can():
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    for view in (x, x[..., :5], x[0], x[:, :1], x[:, 1], x[0, 0]):
        rows = _runtime.as_rows(view)
        assert rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert torch.equal(rows, view.reshape(-1, view.shape[-1]))
        assert rows.stride(-1) == 1
    for copied in (x.transpose(0, 1), x.transpose(1, 2), x[..., ::2]):
        rows = _runtime.as_rows(copied)
        assert torch.equal(rows, copied.reshape(-1, copied.shape[-1]))
        assert rows.stride(-1) == 1


def test_an_expanded_number_copies_one_row_only():
    rows = _runtime.as_rows(torch.tensor(3.0).expand(4, 1000, 64))
    assert rows.shape == (4000, 64) and rows.stride() == (0, 1)
    assert rows.untyped_storage().nbytes() == 64 * 4
    assert (rows == 3).all()
    assert _runtime.as_rows(torch.ones(4, 1, 1).expand(4, 5, 3)).shape == (20, 3)
    assert torch.equal(_runtime.as_rows(torch.arange(4.0).view(4, 1).expand(4, 3))[:, 0], torch.arange(4.0))
    assert _runtime.as_rows(torch.ones(()).expand(0, 5)).shape == (0, 5)


def test_judging_against_the_truth():
    truth = torch.randn(50, 50)
    eager = truth.bfloat16()
    assert assert_close_to_truth(eager.clone(), eager, truth) < 0.01
    for bad in (eager * 1.02, torch.full_like(eager, float("nan")), eager.float(), eager[:1]):
        with pytest.raises(AssertionError):
            assert_close_to_truth(bad, eager, truth)
    zero = torch.zeros(3)
    with pytest.raises(AssertionError, match="shows nothing"):
        assert_close_to_truth(zero, zero, zero)
    assert assert_close_to_truth(zero, zero, zero, zero_truth=True) == 0
    with pytest.raises(AssertionError, match="exactly 0"):
        assert_close_to_truth(zero + 1, zero, zero, zero_truth=True)


@pytest.mark.parametrize("wide", [True, False])
def test_far_rows_show_an_int32_overflow(wide, device):
    x, y = (far_rows(5, 16, torch.float16, device) for _ in range(2))
    x.copy_(torch.arange(80.0).view(5, 16))
    y.zero_()
    harness_add_one[(5,)](x, y, x.stride(0), wide, 16)
    assert torch.equal(y, x + 1) == wide
    assert torch.equal(y[:4], x[:4] + 1)


def test_the_compile_check_reads_what_the_compiler_made():
    aligned = assert_fits(ALIGNED, load_bits=128)
    assert 0 < aligned.registers <= 255 and aligned.spills == aligned.mma == 0
    assert aligned.loads.keys() == aligned.stores.keys() == {128}
    assert resources(ODD_ROW).loads.keys() == {16}
    with pytest.raises(AssertionError, match="no 128-bit global load"):
        assert_fits(ODD_ROW, load_bits=128)
    assert resources(SPILLS).spills > 0
    with pytest.raises(AssertionError, match="harness_spiller"):
        assert_fits(SPILLS)
    with pytest.raises(AssertionError, match="missing"):
        resources(sm90_case(harness_add_one, {"x_ptr": "*bf16"}, {}))


def test_every_kernel_is_among_those_compiled_for_sm90():
    """Each at least once in bf16 (its largest class), in the cases that test modules make when they are imported."""
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"{ops.__name__}.{module.name}")
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f"{__package__}.{path.stem}")
    cases = [*harness._pending, *harness._results]
    compiled = {case.kernel.partition(":")[2] for case in cases}
    mine = {name for name, kernel in _runtime.KERNELS.items() if kernel.fn.__module__.startswith("aligntune.")}
    assert len(mine) > 20 and mine - compiled == set()
    half = {case.kernel.partition(":")[2] for case in cases if "*bf16" in dict(case.signature).values()}
    # These read and write nothing in the model's type.
    assert mine - half == {
        "adamw_norm_kernel", "adamw_prepare_kernel", "nucleus_floor_kernel", "tensors_clip_kernel"}
