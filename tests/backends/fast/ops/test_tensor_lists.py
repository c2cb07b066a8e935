"""Clipping and AdamW of many tensors in one launch: torch's numbers, wherever the tensors lie."""

from __future__ import annotations

import math

import pytest
import torch

from aligntune.backends.fast.ops import _runtime, tensor_lists
from aligntune.backends.fast.ops.tensor_lists import (
    LAUNCH,
    SPAN,
    Launch,
    Tables,
    adamw_tensors_,
    adamw_tensors_reference_,
    clip_grads_,
    clip_grads_reference_,
    tensors_adamw_kernel,
    tensors_clip_kernel,
    tensors_norm_kernel,
    tensors_scale_kernel,
)
from aligntune.errors import ConfigError
from tests.backends.fast.ops.harness import assert_close_to_truth, assert_fits, launches, sm90_case

STEPS = pytest.mark.parametrize("fn", [adamw_tensors_, adamw_tensors_reference_])
CLIPS = pytest.mark.parametrize("fn", [clip_grads_, clip_grads_reference_])
SHAPES = [(16, 40), (3,), (130, 129), (), (0,), (2, SPAN), (1, SPAN + 1)]
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}
BETAS = (0.9, 0.95)


def drawn(shapes, device, *, scale=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(device, dtype) for shape in shapes]


def state_of(params):
    return ([torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params],
            [torch.zeros((), device=p.device) for p in params])  # fmt: skip


@STEPS
@pytest.mark.parametrize("shapes", [SHAPES, [(16, 40), (8, SPAN)]], ids=["odd", "wide"])
def test_ten_steps_of_torch_s_fused_adamw(fn, shapes, device):
    params = drawn(shapes, device)
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    state, tables = state_of(params), Tables()
    optimizer = torch.optim.AdamW(theirs, betas=BETAS, fused=True, **OPTIONS)
    for number in range(10):
        grads = drawn(shapes, device, scale=0.01, seed=1 + number)
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        kept = [grad.clone() for grad in grads]
        fn(params, grads, *state, beta1=BETAS[0], beta2=BETAS[1], tables=tables, **OPTIONS)
        assert all(map(torch.equal, grads, kept)), "gradients are read"
    for number, (p, own, began) in enumerate(zip(params, theirs, drawn(shapes, device), strict=True)):
        if p.numel():
            assert ((p - began).abs() > 1e-4).float().mean() > 0.95, "nearly every number moves"
        torch.testing.assert_close(p, own.detach(), rtol=1e-6, atol=10 * 2**-23, msg=f"{shapes[number]}")
        # Ten roundings of numbers up to 1e-2, of which an average may be the small rest.
        for name, column, atol in zip(("exp_avg", "exp_avg_sq", "step"), state, (1e-8, 1e-12, 0), strict=True):
            torch.testing.assert_close(column[number], optimizer.state[own][name], rtol=2e-6, atol=atol, msg=name)
    assert {float(step) for step in state[2]} == {10.0}


@CLIPS
@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf], ids=str)
def test_clipping_is_torch_s(fn, max_norm, device):
    grads = drawn(SHAPES, device, scale=0.1)
    theirs = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for p, grad in zip(theirs, grads, strict=True):
        p.grad = grad.clone()
    before = [grad.clone() for grad in grads]
    wanted = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    norm = fn(grads, max_norm)
    assert norm.dtype == torch.float32 and norm.shape == () and wanted > 10
    torch.testing.assert_close(norm, wanted, rtol=1e-6, atol=0)
    for grad, p, was in zip(grads, theirs, before, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-6, atol=0)
        assert torch.equal(grad, was) is (max_norm > 1 or not grad.numel())


@CLIPS
def test_clipping_by_hand(fn, device):
    grads = [torch.tensor([3.0], device=device), torch.tensor([[-4.0, 0.0]], device=device)]
    small = [grad * 1e-4 for grad in grads]  # beside what torch adds to a norm
    assert float(fn(small, 1e-4)) == pytest.approx(5e-4, rel=1e-6)
    torch.testing.assert_close(small[0].cpu(), torch.tensor([3e-4 / (5 + 1e-2)]), rtol=1e-6, atol=0)
    assert float(fn(grads, 0.5)) == 5.0
    torch.testing.assert_close(grads[0].cpu(), torch.tensor([0.3]), rtol=1e-6, atol=0)
    torch.testing.assert_close(grads[1].cpu(), torch.tensor([[-0.4, 0.0]]), rtol=1e-6, atol=0)


@CLIPS
@pytest.mark.parametrize("max_norm", [1.0, math.inf])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_no_number_leaves_none(fn, bad, max_norm, device):
    """As torch does: a loss that is lost shows, and is not clipped to something that looks like a step."""
    grads = drawn([(5, 8), (9,)], device)
    grads[1][4] = bad
    theirs = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for p, grad in zip(theirs, grads, strict=True):
        p.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert not torch.isfinite(fn(grads, max_norm))
    for grad, p in zip(grads, theirs, strict=True):
        torch.testing.assert_close(grad, p.grad, equal_nan=True, rtol=0, atol=0)
    assert grads[1][4].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@STEPS
def test_half_precision_is_rounded_once(fn, dtype, device, seed=0):
    """Nearer to fp32's step of the same numbers than torch's own."""
    params, grads = drawn(SHAPES[:3], device, dtype=dtype, seed=seed), drawn(SHAPES[:3], device, dtype=dtype, seed=1)
    truth = [p.float() for p in params]
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    for p, grad in zip(theirs, grads, strict=True):
        p.grad = grad.clone()
    torch.optim.AdamW(theirs, lr=1e-2, eps=1e-4).step()
    adamw_tensors_reference_(truth, [grad.float() for grad in grads], *state_of(truth), lr=1e-2, eps=1e-4)
    fn(params, grads, *state_of(params), lr=1e-2, eps=1e-4)
    # The interpreter truncates to bf16, which costs twice what rounding does.
    eps = 4e-3 if _runtime.interpreting() and dtype == torch.bfloat16 else 1e-6
    for ours, own, wanted in zip(params, theirs, truth, strict=True):
        assert_close_to_truth(ours, own.detach(), wanted, eps=eps)


def test_dtypes_may_differ_and_each_kind_is_a_launch(device):
    shapes = [(8, 16), (5,), (24,)]
    params = drawn(shapes, device)
    params[1] = params[1].bfloat16()
    theirs = [p.clone() for p in params]
    grads, state, same = drawn(shapes, device, seed=1), state_of(params), state_of(params)
    found = launches(lambda: adamw_tensors_(params, grads, *state, lr=1e-2))
    assert found == {"tensors_adamw_kernel": 2}
    adamw_tensors_reference_(theirs, grads, *same, lr=1e-2)
    for ours, wanted in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    mixed = [grads[0], grads[1].bfloat16(), grads[2]]
    norm = torch.stack([grad.float().norm() for grad in mixed]).norm()
    found = launches(lambda: torch.testing.assert_close(clip_grads_(mixed, 0.1), norm, rtol=1e-6, atol=0))
    assert found == {"tensors_norm_kernel": 2, "tensors_clip_kernel": 1, "tensors_scale_kernel": 2}
    torch.testing.assert_close(torch.stack([grad.float().norm() for grad in mixed]).norm(), torch.tensor(0.1).to(norm),
                               rtol=5e-3, atol=0)  # fmt: skip


def test_however_many_tensors_it_is_one_launch(device):
    params = drawn([(4, 8)] * 70, device)
    found = launches(lambda: adamw_tensors_(params, drawn([(4, 8)] * 70, device), *state_of(params), lr=1e-2))
    assert found == {"tensors_adamw_kernel": 1}
    names = ("tensors_norm_kernel", "tensors_clip_kernel", "tensors_scale_kernel")
    assert launches(lambda: clip_grads_(params, 1.0)) == dict.fromkeys(names, 1)


def test_a_table_is_made_anew_where_tensors_lie_elsewhere(device):
    """And holds none of them: gradients of the step before would be kept through the next."""
    tables, before = Tables(), drawn([(8, 16), (5,)], device)
    assert float(clip_grads_(before, math.inf, tables=tables)) == pytest.approx(_norm(before), rel=1e-6)
    (made,) = tables.made.values()
    assert float(clip_grads_(before, math.inf, tables=tables)) == pytest.approx(_norm(before), rel=1e-6)
    assert next(iter(tables.made.values())) is made, "the same places"
    assert not any(isinstance(value, torch.Tensor) and value.data_ptr() in {t.data_ptr() for t in before}
                   for value in vars(made).values())
    other = drawn([(8, 16), (5,)], device, scale=3.0, seed=4)
    assert float(clip_grads_(other, math.inf, tables=tables)) == pytest.approx(_norm(other), rel=1e-6)
    assert next(iter(tables.made.values())).programs is made.programs, "of the same sizes"
    longer = drawn([(8, 17), (5,)], device, seed=5)
    assert float(clip_grads_(longer, math.inf, tables=tables)) == pytest.approx(_norm(longer), rel=1e-6)
    assert next(iter(tables.made.values())).programs is not made.programs


def _norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _aligned(*columns):
    return Tables().of(("parts",), {str(number): column for number, column in enumerate(columns)})[0].aligned


def test_sums_of_more_programs_than_are_read_at_a_time(device, monkeypatch):
    monkeypatch.setattr(tensor_lists, "LAUNCH", Launch(reduce_block=4))
    grads = drawn([(3, 5)] * 11, device)
    assert float(clip_grads_(grads, math.inf)) == pytest.approx(_norm(grads), rel=1e-6)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_whatever_torch_s_default_dtype_is(default, device):
    grads, before = drawn([(40, 50)], device), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        norm = clip_grads_(grads, 1.0)
    finally:
        torch.set_default_dtype(before)
    assert norm.dtype == torch.float32 and _norm(grads) == pytest.approx(1, rel=1e-5)


def test_views_of_one_buffer(device):
    """As a flat buffer's parts lie: not at multiples of 16 bytes, and in any order."""
    flat = drawn([(1000,)], device)[0]
    parts = [flat[501:900], flat[3:500], flat[900:903]]
    copies = [part.clone() for part in parts]
    assert not _aligned(parts)
    wide = flat[: 8 * 24].split(8 * 8)
    assert _aligned(wide) and not _aligned([wide[0], wide[1][:-1]]) and not _aligned([wide[0], flat[69:85]])
    assert not _aligned(wide, [flat[501 : 501 + 64], *wide[:2]]), "each column counts"
    grads = drawn([(399,), (497,), (3,)], device, seed=2)
    adamw_tensors_(parts, grads, *state_of(parts), lr=1e-2)
    adamw_tensors_reference_(copies, grads, *state_of(copies), lr=1e-2)
    for part, copy in zip(parts, copies, strict=True):
        torch.testing.assert_close(part, copy, rtol=1e-6, atol=1e-7)
    began = drawn([(1000,)], device)[0]
    for start, stop in ((0, 3), (500, 501), (903, 1000)):
        assert torch.equal(flat[start:stop], began[start:stop]), "what lies between is not touched"


@STEPS
def test_no_tensors(fn, device):
    fn([], [], [], [], [], lr=1e-2)
    assert float(clip_grads_([], 1.0)) == 0 == float(clip_grads_reference_([], 1.0))


def test_autograd_sees_the_writes(device):
    params, leaf = drawn([(8,)], device), torch.ones(8, device=device, requires_grad=True)
    product = (leaf * params[0]).sum()
    adamw_tensors_(params, drawn([(8,)], device, seed=1), *state_of(params), lr=1e-2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@STEPS
def test_what_a_step_refuses(fn, device):
    params, grads = drawn([(4, 8), (5,)], device), drawn([(4, 8), (5,)], device, seed=1)
    state = state_of(params)
    for message, change in {
        r"gradients\[0\] is \(8, 4\)": (0, grads[0].T.contiguous()),
        r"gradients\[0\] is \(4, 8\) with strides": (0, grads[0].T.contiguous().T),
        r"gradients\[\d\] is torch.float64": (1, grads[1].double()),
    }.items():
        wrong = list(grads)
        wrong[change[0]] = change[1]
        with pytest.raises(ConfigError, match=message):
            fn(params, wrong, *state, lr=1e-2)
    with pytest.raises(ConfigError, match=r"lists of \[2, 1, 2, 2, 2\]"):
        fn(params, grads[:1], *state, lr=1e-2)
    with pytest.raises(ConfigError, match=r"steps\[\d\] is \(\) torch.int64"):
        fn(params, grads, *state[:2], [state[2][0], torch.zeros((), dtype=torch.int64, device=device)], lr=1e-2)
    assert [float(step) for step in state[2]] == [0, 0] and torch.equal(params[0], drawn([(4, 8)], device)[0])


TABLE = {"table_ptr": "*i64", "programs_ptr": "*i32"}
COUNTS = {"num_tensors": "i32", "num_programs": "i32"}
NUMBERS = ("lr", "decay", "log_beta1", "log_beta2", "one_minus_beta1", "beta2", "one_minus_beta2", "eps")


def norm_and_scale(dtype, aligned=True):
    options = {"SPAN": SPAN, "BLOCK": LAUNCH.norm_block, "ALIGNED": aligned}
    lasts = {tensors_norm_kernel: "partial_ptr", tensors_scale_kernel: "coefficient_ptr"}
    return [sm90_case(kernel, {"grad_ptr": dtype, **TABLE, last: "*fp32", **COUNTS}, options,
                      num_warps=LAUNCH.norm_warps) for kernel, last in lasts.items()]  # fmt: skip


def step_case(dtype, state, aligned=True):
    return sm90_case(
        tensors_adamw_kernel,
        {"param_ptr": dtype, "grad_ptr": dtype, "exp_avg_ptr": state, "exp_avg_sq_ptr": state, "step_ptr": "*fp32",
         **TABLE, **COUNTS, **dict.fromkeys(NUMBERS, "fp32")},
        {"SPAN": SPAN, "BLOCK": LAUNCH.block, "ALIGNED": aligned}, num_warps=LAUNCH.num_warps,
    )  # fmt: skip


WIDE = [*norm_and_scale("*fp32"), *norm_and_scale("*bf16"), step_case("*fp32", "*fp32"), step_case("*bf16", "*bf16")]
NARROW = [*norm_and_scale("*bf16", aligned=False), step_case("*fp32", "*fp32", aligned=False)]
CLIP = sm90_case(
    tensors_clip_kernel,
    {**dict.fromkeys(("partial_ptr", "norm_ptr", "coefficient_ptr"), "*fp32"), "num_partials": "i32",
     "max_norm": "fp32"},
    {"BLOCK": LAUNCH.reduce_block}, num_warps=LAUNCH.norm_warps,
)  # fmt: skip


@pytest.mark.parametrize("case", WIDE, ids=lambda case: f"{case.kernel.partition(':')[2]}-{case.signature[0][1]}")
def test_compiles_for_sm90(case):
    # At most 80 registers keep 6 blocks of 128 threads on an SM: more than bandwidth needs.
    assert assert_fits(case, load_bits=128).registers <= 80


@pytest.mark.parametrize("case", [*NARROW, CLIP], ids=lambda case: case.kernel.partition(":")[2])
def test_what_is_not_wide_compiles_for_sm90(case):
    assert_fits(case, spills=2)  # by Triton 3.9


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", [SHAPES, [(16, 2048), (8192, 16), (512, 16)] * 70, [(3, 1_000_003)]],
                         ids=["odd", "LoRA", "long"])
def test_on_the_gpu(shapes):
    test_ten_steps_of_torch_s_fused_adamw(adamw_tensors_, shapes, "cuda")
    grads = drawn(shapes, "cuda", scale=0.1)
    wanted = _norm(grads)
    assert float(clip_grads_(grads, 0.5)) == pytest.approx(wanted, rel=1e-5)
    assert _norm(grads) == pytest.approx(0.5, rel=1e-5)
    again = drawn(shapes, "cuda", scale=0.1)
    clip_grads_(again, 0.5)
    assert all(map(torch.equal, grads, again)), "sums are in a fixed order"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_gpu(dtype):
    test_half_precision_is_rounded_once(adamw_tensors_, dtype, "cuda", torch.seed() % 2**31)
    test_dtypes_may_differ_and_each_kind_is_a_launch("cuda")
    test_views_of_one_buffer("cuda")


@pytest.mark.gpu
def test_past_two_to_the_31_numbers_and_bytes():
    """Of one tensor, and between two."""
    far = torch.zeros(2**31 + 5000, dtype=torch.bfloat16, device="cuda")
    near = torch.zeros(64, dtype=torch.bfloat16, device="cuda")
    far[-100:], near[:44] = 0.5, 0.5
    assert float(clip_grads_([near, far], 3.0)) == 6.0
    assert (far[-100:] == 0.25).all() and (near[:44] == 0.25).all() and not far[:-100].any()
