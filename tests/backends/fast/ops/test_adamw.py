"""AdamW and clipping over flat buffers: torch.optim.AdamW's numbers, groups, skipped steps, rounding."""

from __future__ import annotations

import copy as copy_module

import pytest
import torch

from aligntune.backends.fast.ops import _runtime, adamw
from aligntune.backends.fast.ops.adamw import (
    LAUNCH,
    adamw_norm_kernel,
    adamw_prepare_kernel,
    adamw_step_,
    adamw_step_kernel,
    adamw_step_reference_,
)
from aligntune.errors import ConfigError
from tests.backends.fast.ops.far import far_flat, first_program
from tests.backends.fast.ops.harness import assert_close_to_truth, assert_fits, launches, sm90_case

BOTH = pytest.mark.parametrize("fn", [adamw_step_, adamw_step_reference_])


def buffers(numel: int, device: str, *, dtype=torch.float32, state=torch.float32, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "param": torch.randn(numel, generator=generator).to(device, dtype),
        "exp_avg": torch.zeros(numel, device=device, dtype=state),
        "exp_avg_sq": torch.zeros(numel, device=device, dtype=state),
        "step": torch.zeros((), dtype=torch.int64, device=device),
    }


def gradients(numel: int, device: str, steps: int = 10, *, seed: int = 0) -> list[torch.Tensor]:
    """Growing ones, so that clipping to 1 begins in the middle."""
    generator = torch.Generator().manual_seed(seed + 1)
    return [torch.randn(numel, generator=generator).to(device) * 0.005 * (i + 1) for i in range(steps)]


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, *, rtol=1e-6, atol=1e-8) -> None:
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs.view_as(ours), rtol=rtol, atol=atol)


@BOTH
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("numel", [1, 1000, 5003])
def test_ten_steps_of_torch_adamw(fn, numel, max_norm, device):
    ours = buffers(numel, device)
    theirs = torch.nn.Parameter(ours["param"].clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    lr = torch.tensor([1e-2], device=device)
    clipped = 0
    for grad in gradients(numel, device):
        theirs.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_([theirs], max_norm if max_norm is not None else float("inf"))
        clipped += int(max_norm is not None and norm > max_norm)
        optimizer.step()
        kept = grad.clone()
        result = fn(grad=grad, lr=lr, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1, max_norm=max_norm, **ours)
        torch.testing.assert_close(result.grad_norm, norm, rtol=1e-6, atol=0)
        assert int(result.skipped) == 0
        assert torch.equal(grad, kept), "the gradient is read, not scaled in place"
    assert clipped > 0 or max_norm is None or numel < 5003
    assert int(ours["step"]) == 10
    # A parameter on its way to 0 keeps the rounding errors of its earlier, larger self: 10 of half a unit of 2.
    assert_same(ours["param"], theirs.detach(), atol=10 * 2**-23)
    state = optimizer.state[theirs]
    assert_same(ours["exp_avg"], state["exp_avg"])
    assert_same(ours["exp_avg_sq"], state["exp_avg_sq"], atol=1e-12)


@BOTH
def test_the_first_step_by_hand(fn, device):
    # Norm 5, clipped to 0.5: c = 0.1, so c g = (0.3, -0.4). The first step's m / sqrt(v) is the sign.
    state = buffers(2, device)
    state["param"] = torch.tensor([1.0, 2.0], device=device)
    grad = torch.tensor([3.0, -4.0], device=device)
    result = fn(grad=grad, lr=0.1, weight_decay=0.5, eps=0.0, max_norm=0.5, **state)
    assert float(result.grad_norm) == 5.0
    torch.testing.assert_close(state["exp_avg"].cpu(), torch.tensor([0.03, -0.04]), rtol=1e-6, atol=0)
    torch.testing.assert_close(state["exp_avg_sq"].cpu(), torch.tensor([0.09e-3, 0.16e-3]), rtol=1e-6, atol=0)
    torch.testing.assert_close(state["param"].cpu(), torch.tensor([0.95 - 0.1, 1.9 + 0.1]), rtol=2e-6, atol=0)


@BOTH
def test_parameter_groups_are_segments(fn, device):
    # Boundaries inside a block, an empty-looking group of one element, and the last group past a block's end.
    sizes, rates, decays = [700, 1, 2100], [1e-2, 3e-3, 1e-4], [0.0, 0.3, 0.1]
    ours = buffers(sum(sizes), device)
    parts = [torch.nn.Parameter(part.clone()) for part in ours["param"].split(sizes)]
    groups = [{"params": [p], "lr": r, "weight_decay": w} for p, r, w in zip(parts, rates, decays, strict=True)]
    optimizer = torch.optim.AdamW(groups)
    options = {
        "lr": torch.tensor(rates, device=device),
        "weight_decay": torch.tensor(decays, device=device),
        "segment_starts": torch.tensor([0, 700, 701], device=device),
    }
    for grad in gradients(sum(sizes), device, steps=3):
        for part, g in zip(parts, grad.split(sizes), strict=True):
            part.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(parts, 0.1)
        optimizer.step()
        result = fn(grad=grad, max_norm=0.1, **options, **ours)
        torch.testing.assert_close(result.grad_norm, norm, rtol=1e-6, atol=0)
    assert_same(ours["param"], torch.cat([part.detach() for part in parts]))


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step(fn, bad, device):
    ours = buffers(3000, device)
    good = gradients(3000, device, steps=2)
    fn(grad=good[0], lr=1e-2, max_norm=1.0, **ours)
    before = copy_module.deepcopy(ours)
    broken = good[1].clone()
    broken[2999] = bad
    result = fn(grad=broken, lr=1e-2, max_norm=1.0, **ours)
    assert int(result.skipped) == 1 and not torch.isfinite(result.grad_norm)
    for name, value in before.items():
        assert torch.equal(ours[name], value), name
    # The next good step goes on from there.
    result = fn(grad=good[1], lr=1e-2, max_norm=1.0, **ours)
    assert int(result.skipped) == 0 and int(ours["step"]) == 2
    assert not torch.equal(ours["param"], before["param"])


@BOTH
def test_a_norm_from_outside(fn, device):
    # A sharded buffer: the norm of all shards is larger than this one's.
    ours, same = buffers(1000, device), buffers(1000, device)
    grad = gradients(1000, device)[4]
    norm = torch.tensor(12.5, device=device)
    result = fn(grad=grad, lr=1e-2, max_norm=1.0, grad_norm=norm, **ours)
    assert float(result.grad_norm) == 12.5
    fn(grad=grad / (12.5 + 1e-6), lr=1e-2, **same)
    assert_same(ours["exp_avg"], same["exp_avg"], atol=1e-10)
    assert int(fn(grad=grad, lr=1e-2, grad_norm=norm * float("nan"), **ours).skipped) == 1
    assert int(ours["step"]) == 1


def test_bias_correction_does_not_cancel(device):
    # beta2 = 0.9999 at t = 1: 1 - beta2 computed in fp32 would be off by 1.6e-4.
    ours = buffers(8, device)
    before = ours["param"].clone()
    adamw_step_(grad=torch.full((8,), 1e-3, device=device), lr=1e-2, beta2=0.9999, weight_decay=0.0, eps=0.0, **ours)
    torch.testing.assert_close(before - ours["param"], torch.full((8,), 1e-2, device=device), rtol=3e-5, atol=0)
    scalars = torch.zeros(3, device=device)
    skipped, norm = torch.zeros((), dtype=torch.int32, device=device), torch.ones((), device=device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    adamw_prepare_kernel[(1,)](
        norm, norm, skipped, step, scalars, 0, 0.0, adamw._log(0.9), adamw._log(0.9999),
        REDUCE=False, CLIP=False, BLOCK=1,
    )  # fmt: skip
    torch.testing.assert_close(scalars.cpu(), torch.tensor([1.0, 10.0, 0.01]), rtol=3e-7, atol=0)


@BOTH
def test_a_copy_in_the_models_dtype(fn, device):
    ours = buffers(2000, device)
    model = torch.zeros(2000, dtype=torch.bfloat16, device=device)
    fn(grad=gradients(2000, device)[0].bfloat16(), lr=1e-2, copy=model, **ours)
    wanted = ours["param"].to(torch.bfloat16)
    assert wanted.abs().max() > 0
    if fn is adamw_step_ and _runtime.interpreting():  # the interpreter truncates fp32 to bf16
        assert (model.view(torch.int16).int() - wanted.view(torch.int16).int()).abs().max() <= 1
    else:
        assert torch.equal(model, wanted)


def stochastic(device, *, seed=7, step=0, numel=8192) -> torch.Tensor:
    """bf16 ones after a step to 0.999, a quarter of the way down to the next bf16 number, 0.99609375."""
    state = {
        "param": torch.ones(numel, dtype=torch.bfloat16, device=device),
        "exp_avg": torch.zeros(numel, device=device),
        "exp_avg_sq": torch.zeros(numel, device=device),
        "step": torch.tensor(step, device=device),
    }
    adamw_step_(
        grad=torch.ones(numel, device=device), lr=1e-3, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0,
        seed=torch.tensor([seed], device=device), **state,
    )  # fmt: skip
    return state["param"].float().cpu()


def test_stochastic_rounding_is_right_on_average(device):
    rounded = stochastic(device)
    assert set(rounded.unique().tolist()) == {0.99609375, 1.0}
    down = float((rounded < 1).float().mean())
    # 0.001 / 0.00390625 = 0.256, with a standard deviation of 0.0048 over 8192 draws.
    assert abs(down - 0.256) < 4 * 0.0048
    assert abs(float(rounded.mean()) - 0.999) < 4 * 0.0048 * 0.00390625
    # Rounding to nearest would never have moved.
    assert torch.tensor(0.999).bfloat16() == 1.0


def test_stochastic_rounding_draws_by_seed_step_and_place(device):
    first = stochastic(device)
    assert torch.equal(first, stochastic(device))
    for other in (stochastic(device, seed=8), stochastic(device, step=1), first.roll(8), first.roll(1)):
        # Independent draws agree on 0.256^2 + 0.744^2 = 62% of the places.
        assert 0.58 < float((first == other).float().mean()) < 0.66


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_buffers(fn, dtype, device, seed=0):
    ours = buffers(2000, device, dtype=dtype, state=dtype, seed=seed)
    truth = {name: value.float() if value.is_floating_point() else value.clone() for name, value in ours.items()}
    grad = gradients(2000, device, seed=seed)[9].to(dtype)
    # Beside the truth, the same step by torch in the same dtype.
    theirs = torch.nn.Parameter(ours["param"].clone())
    theirs.grad = grad.clone()
    torch.optim.AdamW([theirs], lr=1e-2, eps=1e-4).step()
    adamw_step_reference_(grad=grad.float(), lr=1e-2, eps=1e-4, **truth)
    fn(grad=grad, lr=1e-2, eps=1e-4, **ours)
    # The interpreter truncates to bf16, which costs twice what rounding does.
    eps = 4e-3 if _runtime.interpreting() and dtype == torch.bfloat16 else 1e-6
    assert_close_to_truth(ours["param"], theirs.detach(), truth["param"], eps=eps)


@BOTH
def test_an_empty_buffer(fn, device):
    ours = buffers(0, device)
    result = fn(grad=torch.zeros(0, device=device), lr=1e-2, max_norm=1.0, **ours)
    assert float(result.grad_norm) == 0.0 and int(result.skipped) == 0


def test_autograd_sees_the_writes(device):
    ours = buffers(64, device)
    leaf = torch.ones(64, device=device, requires_grad=True)
    product = (leaf * ours["param"]).sum()
    adamw_step_(grad=gradients(64, device)[0], lr=1e-2, **ours)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@BOTH
def test_what_it_refuses(fn, device):
    ours, grad = buffers(64, device), torch.ones(64, device=device)
    for message, change in {
        "grad is": {"grad": grad[:63]},
        "exp_avg is": {"exp_avg": torch.zeros(128, device=device)[::2]},
        "param is torch.float64": {"param": ours["param"].double()},
        "copy is": {"copy": torch.zeros(8, 8, device=device)},
        "step is": {"step": torch.zeros((), device=device)},
        "bf16 parameters": {"seed": torch.zeros(1, dtype=torch.int64, device=device)},
        "lr has 2": {"lr": torch.ones(2, device=device)},
    }.items():
        with pytest.raises(ConfigError, match=message):
            fn(**{"grad": grad, "lr": 0.1, **ours, **change})
    assert int(ours["step"]) == 0


@pytest.mark.parametrize("numel", [5, 40_000])
def test_one_launch_steps_and_clips_however_many_groups(numel, device):
    """Clipping adds the norm's pass and a program that sums it: a norm of all must be known before the first update."""
    ours, grad = buffers(numel, device), gradients(numel, device, 1)[0]
    groups = {"lr": torch.tensor([1e-2, 1e-3], device=device), "weight_decay": torch.zeros(2, device=device),
              "segment_starts": torch.tensor([0, 3], device=device)}  # fmt: skip
    names = ("adamw_norm_kernel", "adamw_prepare_kernel", "adamw_step_kernel")
    assert launches(lambda: adamw_step_(grad=grad, max_norm=0.1, **groups, **ours)) == dict.fromkeys(names, 1)
    norm = grad.norm()
    found = launches(lambda: adamw_step_(grad=grad, max_norm=0.1, grad_norm=norm, **groups, **ours))
    assert found == dict.fromkeys(names[1:], 1)
    assert int(ours["step"]) == 2


def test_many_partial_norms(device, monkeypatch):
    # One program for each 4096 elements, up to the grid's limit; here three programs walk 12 blocks.
    grad = torch.randn(12 * LAUNCH.norm_block - 5, generator=torch.Generator().manual_seed(3)).to(device)
    wanted = grad.double().norm()
    assert float(adamw._partial_norms(grad).double().sum().sqrt() / wanted - 1) == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(adamw, "num_sms", lambda tensor: 1)
    monkeypatch.setattr(adamw, "LAUNCH", adamw.Launch(norm_programs=3))
    partials = adamw._partial_norms(grad)
    assert partials.numel() == 3
    assert float(partials.double().sum().sqrt() / wanted - 1) == pytest.approx(0, abs=1e-6)


@pytest.mark.skipif(not _runtime.interpreting(), reason="steps a grid by hand")
def test_offsets_past_int32():
    far, numel = 2**31, 2**31 + 100
    flat = {name: far_flat(numel, torch.float32) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    flat["param"][far:] = 1.0
    flat["grad"][far:] = 2.0
    scalars = torch.tensor([1.0, 1.0, 1.0])
    step, skipped = torch.ones((), dtype=torch.int64), torch.zeros((), dtype=torch.int32)
    rate = torch.tensor([0.0, 0.5])
    with first_program(far // LAUNCH.block):
        adamw_step_kernel[(1,)](
            *flat.values(), flat["param"], scalars, skipped, step, rate, torch.zeros(2), torch.tensor([0, far + 50]),
            step, numel, 1.0, 0.0, 1.0, 0.0, SEGMENTS=2, COPY=False, STOCHASTIC=False, BLOCK=LAUNCH.block,
        )  # fmt: skip
    assert flat["param"][far:].tolist() == [1.0] * 50 + [0.5] * 50
    partial = torch.zeros(numel // LAUNCH.norm_block + 1)
    with first_program(far // LAUNCH.norm_block):
        adamw_norm_kernel[(1,)](flat["grad"], partial, numel, BLOCK=LAUNCH.norm_block)
    assert float(partial[far // LAUNCH.norm_block]) == 400.0


STEP_TYPES = {
    "param_ptr": "*fp32", "grad_ptr": "*fp32", "exp_avg_ptr": "*fp32", "exp_avg_sq_ptr": "*fp32", "copy_ptr": "*bf16",
    "scalars_ptr": "*fp32", "skipped_ptr": "*i32", "step_ptr": "*i64", "lr_ptr": "*fp32", "decay_ptr": "*fp32",
    "start_ptr": "*i64", "seed_ptr": "*i64", "numel": 2**24, "one_minus_beta1": "fp32", "beta2": "fp32",
    "one_minus_beta2": "fp32", "eps": "fp32",
}  # fmt: skip
PLAIN = {"SEGMENTS": 1, "COPY": False, "STOCHASTIC": False, "BLOCK": LAUNCH.block}
STEP = sm90_case(adamw_step_kernel, STEP_TYPES, PLAIN, num_warps=LAUNCH.num_warps)
STEP_COPY = sm90_case(adamw_step_kernel, STEP_TYPES, {**PLAIN, "SEGMENTS": 3, "COPY": True}, num_warps=LAUNCH.num_warps)
STEP_STOCHASTIC = sm90_case(
    adamw_step_kernel, {**STEP_TYPES, "param_ptr": "*bf16", "grad_ptr": "*bf16"}, {**PLAIN, "STOCHASTIC": True},
    num_warps=LAUNCH.num_warps,
)  # fmt: skip
NORM = sm90_case(
    adamw_norm_kernel, {"grad_ptr": "*fp32", "partial_ptr": "*fp32", "numel": 2**24}, {"BLOCK": LAUNCH.norm_block},
    num_warps=2 * LAUNCH.num_warps,
)  # fmt: skip
PREPARE = sm90_case(
    adamw_prepare_kernel,
    {"partial_ptr": "*fp32", "norm_ptr": "*fp32", "skipped_ptr": "*i32", "step_ptr": "*i64", "scalars_ptr": "*fp32",
     "num_partials": 528, "max_norm": "fp32", "log_beta1": "fp32", "log_beta2": "fp32"},
    {"REDUCE": True, "CLIP": True, "BLOCK": 1024},
)  # fmt: skip


@pytest.mark.parametrize("case", [STEP, STEP_COPY, STEP_STOCHASTIC, NORM], ids=lambda case: case.kernel)
def test_compiles_for_sm90(case):
    found = assert_fits(case, load_bits=128)
    # At most 80 registers keep 6 blocks of 128 threads on an SM, 96 KB of loads in flight: more than bandwidth needs.
    assert found.registers <= 80


def test_prepare_compiles_for_sm90():
    assert_fits(PREPARE)


@pytest.mark.slow
def test_sizes_of_one_compile():
    """The launcher makes a constant of every integer argument that is 1."""
    for case, name in ((STEP, "numel"), (STEP_STOCHASTIC, "numel"), (NORM, "numel"), (PREPARE, "num_partials")):
        types = {**dict(case.signature), name: 1}
        assert_fits(sm90_case(case.kernel, types, dict(case.constexprs), num_warps=case.num_warps))


@pytest.mark.gpu
@pytest.mark.parametrize("numel", [1, 5003, 3_000_000])
def test_ten_steps_on_the_gpu(numel):
    test_ten_steps_of_torch_adamw(adamw_step_, numel, 1.0, "cuda")
    test_parameter_groups_are_segments(adamw_step_, "cuda")
    test_a_copy_in_the_models_dtype(adamw_step_, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_gpu(dtype):
    test_half_precision_buffers(adamw_step_, dtype, "cuda", torch.seed() % 2**31)
    test_stochastic_rounding_is_right_on_average("cuda")
    test_stochastic_rounding_draws_by_seed_step_and_place("cuda")


@pytest.mark.gpu
def test_replays_in_a_cuda_graph_with_lr_and_step_on_the_device():
    ours, same = buffers(5003, "cuda"), buffers(5003, "cuda")
    lr, grad = torch.tensor([1e-2], device="cuda"), torch.zeros(5003, device="cuda")
    adamw_step_(grad=grad + 1, lr=lr, max_norm=1.0, **buffers(5003, "cuda"))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = adamw_step_(grad=grad, lr=lr, max_norm=1.0, **ours)
    for i, new in enumerate(gradients(5003, "cuda")):
        grad.copy_(new)
        lr.fill_(1e-2 / (i + 1))
        graph.replay()
        expected = adamw_step_reference_(grad=new, lr=1e-2 / (i + 1), max_norm=1.0, **same)
        torch.testing.assert_close(result.grad_norm, expected.grad_norm, rtol=1e-6, atol=0)
    assert int(ours["step"]) == 10
    assert_same(ours["param"], same["param"])
    grad[0] = float("nan")
    graph.replay()
    assert int(result.skipped) == 1 and int(ours["step"]) == 10


@pytest.mark.gpu
def test_past_two_to_the_31_parameters():
    numel = 2**31 + 5000
    ours = {
        name: torch.zeros(numel, dtype=torch.bfloat16, device="cuda") for name in ("param", "exp_avg", "exp_avg_sq")
    }
    grad = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    grad[-100:] = 0.5
    result = adamw_step_(grad=grad, lr=0.25, step=torch.zeros((), dtype=torch.int64, device="cuda"), **ours)
    assert float(result.grad_norm) == 5.0
    assert (ours["param"][-100:] == -0.25).all() and not ours["param"][:-100].any()
