"""RMSNorm against transformers' modules and a float64 truth."""

from __future__ import annotations

import importlib

import pytest
import torch

from aligntune.backends.fast.ops import _runtime
from aligntune.backends.fast.ops import rms_norm as op
from aligntune.backends.fast.ops.rms_norm import made_again, rms_norm, rms_norm_reference, source_of
from tests.backends.fast.ops.harness import assert_close_to_truth, assert_fits, far_rows, launches, sm90_case

EPS = 1e-5
MODULES = {
    "llama": ("llama", "LlamaRMSNorm"),
    "gemma": ("gemma3", "Gemma3RMSNorm"),
    "olmo2": ("olmo2", "Olmo2RMSNorm"),
}
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seeded(request):
    """The same numbers in CI each time; fresh ones on a GPU."""
    torch.manual_seed(0) if request.node.get_closest_marker("gpu") is None else torch.seed()


def transformers_norm(convention: str, weight: torch.Tensor) -> torch.nn.Module:
    name, cls = MODULES[convention]
    module = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), cls)(len(weight), eps=EPS)
    module.weight = torch.nn.Parameter(weight.detach().clone())
    return module


def make(shape, dtype, device, *, weight_dtype=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    x, residual = (draw(*shape) * 1.5 + 0.2).to(dtype), draw(*shape).to(dtype)
    weight = (draw(shape[-1]) * 0.3 + 1).to(weight_dtype or dtype)
    return [t.to(device).requires_grad_() for t in (x, weight, residual)]


def run(fn, x, weight, residual, dy, dh, *, convention):
    """Outputs and gradients, in the order y, h, dx, dw, dresidual (h and dresidual only with a residual).

    There is no dw where the weight is frozen.
    """
    out = fn(x, weight, eps=EPS, convention=convention, residual=residual)
    trained = [t for t in (x, weight, residual) if t is not None and t.requires_grad]
    if residual is None:
        return [out.detach(), *torch.autograd.grad(out, trained, dy.to(out.dtype))]
    grads = torch.autograd.grad(out, trained, (dy.to(out[0].dtype), dh.to(out[1].dtype)))
    return [out[0].detach(), out[1].detach(), *grads]


def compare(x, weight, residual, dy, dh, *, convention, eps=1e-6):
    widen = lambda t: None if t is None else t.detach().double().requires_grad_(t.requires_grad)  # noqa: E731
    truth = run(rms_norm_reference, widen(x), widen(weight), widen(residual), dy.double(), dh.double(),
                convention=convention)  # fmt: skip
    eager = run(rms_norm_reference, x, weight, residual, dy, dh, convention=convention)
    ours = run(rms_norm, x, weight, residual, dy, dh, convention=convention)
    names = ["y", "dx", "dw"] if residual is None else ["y", "h", "dx", "dw", "dresidual"]
    names = [name for name in names if name != "dw" or weight.requires_grad]
    for name, a, b, c in zip(names, ours, eager, truth, strict=True):
        assert_close_to_truth(a, b, c, eps=eps, what=f"{convention} {name} {tuple(x.shape)}")


@pytest.mark.parametrize("convention", list(op.CONVENTIONS))
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(3, 7, 255), (1, 256), (5, 3), (7, 3, 16), (2, 2048), (300, 12)])
def test_fp32_against_the_truth(shape, with_residual, convention, device):
    x, weight, residual = make(shape, torch.float32, device)
    dy, dh = torch.randn_like(x), torch.randn_like(x)
    compare(x, weight, residual if with_residual else None, dy, dh, convention=convention)


@pytest.mark.parametrize("convention", list(op.CONVENTIONS))
def test_a_frozen_weight_against_the_truth(convention, device):
    x, weight, residual = make((3, 7, 255), torch.float32, device)
    weight.requires_grad_(False)
    dy, dh = torch.randn_like(x), torch.randn_like(x)
    for added in (None, residual):
        compare(x, weight, added, dy, dh, convention=convention)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("convention", list(op.CONVENTIONS))
def test_half_precision_against_the_truth(convention, with_residual, dtype, device):
    x, weight, residual = make((4, 6, 255), dtype, device)
    # The interpreter truncates to bf16 where a GPU rounds: about twice eager's error, so one more ulp is allowed.
    eps = 2**-8 if dtype == torch.bfloat16 and _runtime.interpreting() else 1e-6
    dy, dh = torch.randn_like(x), torch.randn_like(x)
    compare(x, weight, residual if with_residual else None, dy, dh, convention=convention, eps=eps)


@pytest.mark.parametrize("convention", list(op.CONVENTIONS))
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_transformers_own_and_the_op_has_its_dtypes(convention, dtype, weight_dtype, device):
    x, weight, _ = make((5, 64), dtype, device, weight_dtype=weight_dtype)
    module = transformers_norm(convention, weight).to(device)
    theirs = module(x)
    theirs.sum().backward()
    reference = rms_norm_reference(x, weight, eps=EPS, convention=convention)
    assert torch.equal(reference, theirs) and reference.dtype == theirs.dtype
    ours = rms_norm(x, weight, eps=EPS, convention=convention)
    assert ours.dtype == theirs.dtype
    grads = torch.autograd.grad(ours.sum(), (x, weight))
    assert [grad.dtype for grad in grads] == [x.dtype, module.weight.grad.dtype]


def assert_rounds_as_transformers(convention, x, weight):
    theirs = transformers_norm(convention, weight).to(x.device)(x)
    ours = rms_norm(x, weight, eps=EPS, convention=convention)
    # Only the order of the sum of squares differs; rounding elsewhere would change about a quarter of the numbers.
    assert float((ours != theirs).float().mean()) < 0.01


@pytest.mark.parametrize("convention", list(op.CONVENTIONS))
def test_rounds_where_transformers_does(convention, device):
    assert_rounds_as_transformers(convention, *make((40, 255), torch.float16, device)[:2])


@pytest.mark.parametrize("convention", list(op.CONVENTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_input_goes_on_and_both_gradients_meet_inside(dtype, convention, device):
    def through(fn, x, weight):
        y, same = fn(x, weight, eps=EPS, convention=convention, keep=True)
        torch.testing.assert_close(same, x, rtol=0, atol=0)
        # What goes on is used twice, as a residual and by another branch.
        return [y.detach(), *torch.autograd.grad((y, same * 2, same), (x, weight), (dy.to(y), dh.to(y), dh.to(y)))]

    x, weight, _ = make((4, 6, 255), dtype, device)
    dy, dh = torch.randn_like(x), torch.randn_like(x)
    ours, eager = through(rms_norm, x, weight), through(rms_norm_reference, x, weight)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    for name, a, b, c in zip(("y", "dx", "dw"), ours, eager, through(rms_norm_reference, *wide), strict=True):
        assert_close_to_truth(a, b, c, what=f"{convention} {name}")
    y, same = rms_norm(x, weight, eps=EPS, keep=True)
    assert same.data_ptr() == x.data_ptr()
    trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with trace:
        torch.autograd.backward((y, same), (dy.to(y), dh))
    assert "aten::add" not in {event.name for event in trace.events()}


def test_residual_of_another_dtype_is_promoted_as_the_sum_is(device):
    x, weight, residual = make((4, 32), torch.float16, device)
    residual = residual.detach().float().requires_grad_()
    y, h = rms_norm(x, weight, eps=EPS, residual=residual)
    assert torch.equal(h, residual + x) and h.dtype == torch.float32
    assert_close_to_truth(y, rms_norm_reference(h, weight, eps=EPS), rms_norm_reference(h, weight, eps=EPS).double())
    dx, dresidual = torch.autograd.grad(y.sum() + h.sum(), (x, residual))
    assert dx.dtype == torch.float16 and dresidual.dtype == torch.float32
    assert torch.equal(dx, dresidual.half())


def test_rows_of_any_stride_and_gradients_of_stride_zero(device):
    wide = torch.randn(6, 10, 100, device=device)
    x = wide[1:5, ::3, 7:55].requires_grad_()  # batch, sequence and row strides all unlike a contiguous tensor's
    weight = torch.randn(48, device=device, requires_grad=True)
    residual = torch.randn(1, 4, 1, device=device).expand(4, 4, 48).requires_grad_()
    ones, strided = torch.ones((), device=device).expand(4, 4, 48), torch.randn(4, 4, 96, device=device)[..., ::2]
    one_row = torch.randn(48, device=device).expand(4, 4, 48)
    for dy, dh in [(ones, ones), (strided, one_row), (one_row, strided)]:
        compare(x, weight, residual, dy, dh, convention="llama")
        compare(x, weight, None, dy, dh, convention="gemma")


def test_incoming_gradients_are_left_alone(device):
    x, weight, residual = make((5, 33), torch.float32, device)
    dy, dh = torch.randn_like(x), torch.randn_like(x)
    before = dy.clone(), dh.clone()
    run(rms_norm, x, weight, residual, dy, dh, convention="llama")
    assert torch.equal(dy, before[0]) and torch.equal(dh, before[1])


@pytest.mark.parametrize("use", ["y", "h"])
def test_an_output_that_is_not_used(use, device):
    x, weight, residual = make((5, 33), torch.float32, device)

    def grads(fn):
        y, h = fn(x, weight, eps=EPS, residual=residual)
        loss = (y if use == "y" else h).square().sum()
        return torch.autograd.grad(loss, (x, weight, residual), allow_unused=True, materialize_grads=True)

    for ours, eager, name in zip(grads(rms_norm), grads(rms_norm_reference), ("dx", "dw", "dresidual"), strict=True):
        torch.testing.assert_close(ours, eager, msg=lambda text, name=name: f"{name}: {text}")
        assert bool(eager.any()) == (use == "y" or name != "dw")


def test_a_frozen_weight_costs_nothing(device):
    x, weight, _ = make((5, 64), torch.float32, device)
    trained = launches(lambda: rms_norm(x, weight, eps=EPS).sum().backward())
    assert trained == {"rms_norm_forward": 1, "rms_norm_backward": 1, "norm_weight_grad": 1}
    want, x.grad = x.grad, None
    weight.requires_grad_(False)
    frozen = launches(lambda: rms_norm(x, weight, eps=EPS).sum().backward())
    assert frozen == {"rms_norm_forward": 1, "rms_norm_backward": 1}
    torch.testing.assert_close(x.grad, want)


def assert_made_again(x, weight, *, convention="llama", **options):
    out = rms_norm(x, weight, eps=EPS, convention=convention, **options)
    y = out[0] if isinstance(out, tuple) else out
    source = source_of(y)
    assert not any(tensor.requires_grad for tensor in source.tensors)
    again = made_again(source.recipe, *source.tensors)
    assert again.dtype == y.dtype and again.data_ptr() != y.data_ptr() and again.norm() > 0
    assert torch.equal(again.view_as(y), y)


@pytest.mark.parametrize("convention", list(op.CONVENTIONS))
@pytest.mark.parametrize(("dtype", "weight_dtype"), [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_its_output_is_made_again_to_the_bit(dtype, weight_dtype, convention, device):
    for shape in ((3, 7, 255), (300, 12), (2, 2048)):
        x, weight, residual = make(shape, dtype, device, weight_dtype=weight_dtype)
        for options in ({}, {"keep": True}, {"residual": residual}):
            assert_made_again(x, weight, convention=convention, **options)
    far = far_rows(5, 32, dtype, device)
    far.copy_(torch.randn(5, 32))
    assert_made_again(far.requires_grad_(), torch.randn(32, device=device, dtype=weight_dtype), convention=convention)


def test_what_it_was_made_of_is_told_of_no_other_tensor(device):
    x, weight, _ = make((5, 64), torch.float32, device)
    y = rms_norm(x, weight, eps=EPS)
    assert source_of(y) is not None and source_of(y.clone()) is source_of(y.view_as(y)) is source_of(x) is None
    with torch.no_grad():
        y.mul_(2)
        assert source_of(y) is None, "it was written to"
        assert source_of(rms_norm(x, weight, eps=EPS)) is None
    assert source_of(rms_norm(x.detach(), weight.detach(), eps=EPS)) is not None, "what it goes to may train"
    empty = source_of(rms_norm(x[:0], weight, eps=EPS))
    assert made_again(empty.recipe, *empty.tensors).shape == (0, 64)
    reached = []
    source = source_of(rms_norm(x, weight, eps=EPS))
    source.recipe.reached = lambda: reached.append(1)
    assert launches(lambda: made_again(source.recipe, *source.tensors)) == {"rms_norm_again": 1} and reached == [1]


def test_a_persistent_program_takes_many_tiles(monkeypatch, device):
    monkeypatch.setattr(_runtime, "num_sms", lambda _=None: 3)
    launch = op.weight_grad_launch(101, 255, sms=3)
    assert launch.programs * 4 < _runtime.cdiv(101, launch.block_rows)
    x, weight, residual = make((101, 255), torch.float32, device)
    dy, dh = torch.randn_like(x), torch.randn_like(x)
    compare(x, weight, residual, dy, dh, convention="llama")
    compare(x, weight, None, dy, dh, convention="gemma")


def test_more_partial_sums_than_one_load_holds(device):
    partials = torch.randn(300, 50, device=device)
    torch.testing.assert_close(op.sum_partials(partials, torch.float32), partials.sum(0), atol=1e-4, rtol=1e-5)


def test_offsets_beyond_int32(device):
    x, residual, dy, dh = (far_rows(5, 32, torch.float16, device) for _ in range(4))
    for t in (x, residual, dy, dh):
        t.copy_(torch.randn(5, 32))
    weight = torch.randn(32, device=device).half().requires_grad_()
    near = [t.contiguous() for t in (x, residual, dy, dh)]
    far = run(rms_norm, x.requires_grad_(), weight, residual.requires_grad_(), dy, dh, convention="llama")
    want = run(rms_norm, near[0].requires_grad_(), weight, near[1].requires_grad_(), *near[2:], convention="llama")
    assert all(torch.equal(a, b) and b.any() for a, b in zip(far, want, strict=True))


def test_no_rows(device):
    x, weight, residual = make((0, 7, 64), torch.float32, device)
    y, h = rms_norm(x, weight, eps=EPS, residual=residual)
    assert y.shape == h.shape == (0, 7, 64)
    dx, dw = torch.autograd.grad((y.sum() + h.sum()), (x, weight))
    assert dx.shape == x.shape and dw.shape == weight.shape and not dw.any()


def test_what_does_not_fit_is_refused(device):
    x, weight = torch.zeros(2, 8, device=device), torch.ones(8, device=device)
    for fn in (rms_norm, rms_norm_reference):
        with pytest.raises(ValueError, match="did you mean 'llama'"):
            fn(x, weight, eps=EPS, convention="lama")
        with pytest.raises(ValueError, match=r"weight has shape \(7,\)"):
            fn(x, weight[:7], eps=EPS)
        with pytest.raises(ValueError, match="differ in shape"):
            fn(x, weight, eps=EPS, residual=x[:1])
    with pytest.raises(ValueError, match="at most 16384"):
        rms_norm(torch.zeros(1, 16385, device=device), torch.ones(16385, device=device), eps=EPS)


# ------------------------------------------------------------------------------------------------------------ compile


def forward_case(width, dtype="*bf16", convention="llama", residual=True):
    cast_first, offset = op.CONVENTIONS[convention]
    launch = op.forward_launch(8192, width)
    signature = {"x_ptr": dtype, "x_row": width, "residual_ptr": dtype, "residual_row": width, "w_ptr": dtype,
                 "h_ptr": dtype, "y_ptr": dtype, "rstd_ptr": "*fp32", "n_rows": "i32"}  # fmt: skip
    constants = {"EPS": EPS, "H": width, "CAST_FIRST": cast_first, "OFFSET": offset, "HAS_RESIDUAL": residual,
                 "BLOCK_R": launch.block_rows, "BLOCK_H": launch.block_cols}  # fmt: skip
    return sm90_case(op.rms_norm_forward, signature, constants, launch.num_warps)


def backward_case(width, dtype="*bf16", convention="llama", train_weight=True, residual=True):
    _, offset = op.CONVENTIONS[convention]
    launch = op.weight_grad_launch(8192, width, sms=132) if train_weight else op.forward_launch(8192, width)
    signature = {"dy_ptr": dtype, "dy_row": width, "dh_ptr": dtype, "dh_row": width, "h_ptr": dtype, "h_row": width,
                 "w_ptr": dtype, "rstd_ptr": "*fp32", "dx_ptr": dtype, "dw_ptr": "*fp32", "n_rows": "i32"}  # fmt: skip
    constants = {"H": width, "OFFSET": offset, "HAS_DH": residual, "HAS_DW": train_weight,
                 "BLOCK_R": launch.block_rows, "BLOCK_H": launch.block_cols, "STAGES": launch.stages}  # fmt: skip
    return sm90_case(op.rms_norm_backward, signature, constants, launch.num_warps)


def again_case(width, dtype="*bf16", convention="llama", residual=True):
    cast_first, offset = op.CONVENTIONS[convention]
    launch = op.forward_launch(8192, width)
    signature = {"h_ptr": dtype, "h_row": width, "rstd_ptr": "*fp32", "w_ptr": dtype, "y_ptr": dtype, "n_rows": "i32"}
    constants = {"H": width, "CAST_FIRST": cast_first, "OFFSET": offset, "BLOCK_R": launch.block_rows,
                 "BLOCK_H": launch.block_cols}  # fmt: skip
    return sm90_case(op.rms_norm_again, signature, constants, launch.num_warps)


LARGEST = {
    "forward": forward_case(8192),
    "again": again_case(8192),
    "backward": backward_case(8192),
    "backward, frozen": backward_case(8192, train_weight=False),
    "partial sums": sm90_case(
        op.norm_weight_grad,
        {"partials_ptr": "*fp32", "dw_ptr": "*bf16", "n_partials": "i32"},
        {"H": 8192, "BLOCK_P": 128, "BLOCK_H": 16},
    ),
}


@pytest.mark.parametrize("name", list(LARGEST))
def test_compiles_for_sm90(name):
    assert_fits(LARGEST[name], load_bits=128)


@pytest.mark.slow
def test_every_class_compiles_for_sm90():
    cases = {
        (kind, width, dtype, convention, residual): make_case(width, dtype, convention, residual=residual, **options)
        for kind, make_case, options in [
            ("forward", forward_case, {}),
            ("again", again_case, {}),
            ("backward", backward_case, {}),
            ("frozen", backward_case, {"train_weight": False}),
        ]
        for width in (64, 255, 1000, 2048, 2560, 4096, 8191, 8192, 16384)
        for dtype in ("*bf16", "*fp16", "*fp32")
        for convention, residual in (("llama", True), ("gemma", True), ("olmo2", False))
    }
    for (kind, width, dtype, *_), case in cases.items():
        # A row of 16384 fp32 and its running sum do not fit 64 registers a thread; no model of this width trains fp32.
        # Elsewhere ptxas (Triton 3.6's, not 3.7's) gives one register away to fit one more program an SM.
        spills = 32 if (kind, width, dtype) == ("backward", 16384, "*fp32") else 2
        assert_fits(case, load_bits=128 if width % 16 == 0 else None, spills=spills)


# ---------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", [64, 255, 2048, 2560, 4096, 8192, 16384])
@pytest.mark.parametrize("convention", list(op.CONVENTIONS))
def test_gpu_against_the_truth(convention, width, dtype):
    """With the weight trained, and frozen: the backward is then launched otherwise."""
    seed = int(torch.randint(2**31, ()))
    x, weight, residual = make((3, 341, width), dtype, "cuda", seed=seed)
    dy, dh = torch.randn_like(x), torch.randn_like(x)
    for trained in (True, False):
        for added in (None, residual):
            compare(x, weight.requires_grad_(trained), added, dy, dh, convention=convention)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("convention", list(op.CONVENTIONS))
def test_gpu_rounds_where_transformers_does(convention, dtype):
    assert_rounds_as_transformers(convention, *make((1000, 2048), dtype, "cuda")[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("width", [64, 255, 2048, 2560, 16384])
def test_gpu_makes_its_output_again_to_the_bit(width, dtype):
    """Another kernel than the one that made it."""
    for convention in op.CONVENTIONS:
        x, weight, residual = make((3, 341, width), dtype, "cuda", seed=int(torch.randint(2**31, ())))
        for options in ({}, {"residual": residual}):
            assert_made_again(x, weight, convention=convention, **options)


@pytest.mark.gpu
def test_gpu_weight_gradient_is_the_same_bits_each_time():
    x, weight, _ = make((5000, 2048), torch.bfloat16, "cuda")
    dy = torch.randn_like(x)
    first = run(rms_norm, x, weight, None, dy, dy, convention="llama")
    for _ in range(5):
        again = run(rms_norm, x, weight, None, dy, dy, convention="llama")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
