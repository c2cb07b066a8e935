"""Gated linear units against transformers' activations and a float64 truth."""

from __future__ import annotations

import pytest
import torch

from aligntune.backends.fast.ops import _runtime
from aligntune.backends.fast.ops import glu as op
from aligntune.backends.fast.ops.glu import glu, glu_backward_, glu_forward_, glu_reference
from tests.backends.fast.ops.harness import assert_close_to_truth, assert_fits, far_rows, launches, sm90_case

# exp(100) is inf, and 1 / (1 + inf) the 0 that is wanted; numpy, which plays the GPU here, remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")

HALF = [torch.bfloat16, torch.float16]
TRANSFORMERS_NAME = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@pytest.fixture(autouse=True)
def seeded(request):
    """The same numbers in CI each time; fresh ones on a GPU."""
    torch.manual_seed(0) if request.node.get_closest_marker("gpu") is None else torch.seed()


def make(shape, dtype, device):
    """gate, up and dy; the gate reaches far enough to saturate every activation on both sides."""
    gate, up, dy = torch.randn(shape) * 4, torch.randn(shape), torch.randn(shape)
    if gate.numel() > 4:
        gate.view(-1)[:4] = torch.tensor([0.0, -30.0, 30.0, -100.0])
    return [t.to(device, dtype).requires_grad_() for t in (gate, up)] + [dy.to(device, dtype)]


def run(fn, gate, up, dy, activation):
    y = fn(gate, up, activation=activation)
    return [y.detach(), *torch.autograd.grad(y, (gate, up), dy)]


def compare(gate, up, dy, activation, *, eps=1e-6):
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    truth = run(glu_reference, *wide, dy.double(), activation)
    eager = run(glu_reference, gate, up, dy, activation)
    ours = run(glu, gate, up, dy, activation)
    for name, a, b, c in zip(("y", "dgate", "dup"), ours, eager, truth, strict=True):
        assert_close_to_truth(a, b, c, eps=eps, what=f"{activation} {name} {tuple(gate.shape)}")


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 7, 255), (1, 256), (5, 1), (1, 1, 1), (7, 3, 16), (3, 2048), (2, 4100)])
def test_fp32_against_the_truth(shape, activation, device):
    compare(*make(shape, torch.float32, device), activation)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_half_precision_against_the_truth(activation, dtype, device):
    # The interpreter truncates to bf16 where a GPU rounds: twice the error of one rounding, at two places.
    eps = 2**-7 if dtype == torch.bfloat16 and _runtime.interpreting() else 1e-6
    compare(*make((4, 6, 255), dtype, device), activation, eps=eps)


def assert_rounds_as_transformers(gate, up, activation):
    from transformers.activations import ACT2FN

    theirs = ACT2FN[TRANSFORMERS_NAME[activation]](gate) * up
    assert torch.equal(theirs, glu_reference(gate, up, activation=activation))
    ours = glu(gate, up, activation=activation)
    assert ours.dtype == theirs.dtype
    # For negative gates their 1 + erf and 1 + tanh cancel, and the last bits of erf and tanh come up (13% of all
    # numbers of gelu_tanh on a GPU; `compare` shows that ours are not the worse ones). A product that is not rounded
    # twice changes about a quarter.
    above = gate > 0
    assert above.any() and float((ours != theirs)[above].float().mean()) < 0.05


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_rounds_where_transformers_does(activation, device):
    gate, up, _ = make((40, 255), torch.float16, device)
    assert_rounds_as_transformers(gate, up, activation)


def test_gates_at_the_ends_of_the_range_stay_finite(device):
    gate = torch.tensor([[-1e30, -3e4, -88.8, -1e-30, 0.0, 1e-30, 88.8, 3e4, 1e30]], device=device, requires_grad=True)
    up = torch.ones_like(gate).requires_grad_()
    for activation in ("silu", "gelu"):
        y, dgate, dup = run(glu, gate, up, torch.ones_like(gate), activation)
        want = [0, 0, 0, 0, 0, 0, 88.8, 3e4, 1e30]
        torch.testing.assert_close(y[0].cpu(), torch.tensor(want))
        torch.testing.assert_close(dup, y)
        torch.testing.assert_close(dgate[0].cpu(), torch.tensor([0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1]))


def test_halves_of_a_packed_projection(device):
    packed = torch.randn(3, 5, 200, device=device, requires_grad=True)
    dy = torch.randn(3, 5, 100, device=device)
    grads = []
    for fn in (glu, glu_reference):
        gate, up = packed.chunk(2, dim=-1)
        assert gate.stride(1) == 200
        grads.append(torch.autograd.grad(fn(gate, up), packed, dy)[0])
    assert grads[1].any()
    torch.testing.assert_close(grads[0], grads[1])


def test_a_packed_projection_is_not_copied(monkeypatch, device):
    gate, up = torch.randn(3, 5, 200, device=device).chunk(2, dim=-1)
    as_rows, seen = _runtime.as_rows, []

    def spy(x):
        rows = as_rows(x)
        seen.append(rows.data_ptr() == x.data_ptr())
        return rows

    monkeypatch.setattr(_runtime, "as_rows", spy)
    glu(gate, up)
    assert seen == [True, True]


@pytest.mark.parametrize("kind", ["one number", "one row", "strided", "transposed"])
def test_gradients_of_any_stride(kind, device):
    gate, up, _ = make((4, 3, 66), torch.float32, device)
    dy = {
        "one number": lambda: torch.tensor(0.7).expand(4, 3, 66),
        "one row": lambda: torch.randn(66).expand(4, 3, 66),
        "strided": lambda: torch.randn(4, 3, 132)[..., ::2],
        "transposed": lambda: torch.randn(3, 4, 66).transpose(0, 1),
    }[kind]().to(device)
    before = dy.clone()
    compare(gate, up, dy, "silu")
    assert torch.equal(dy, before)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_backward_writes_where_it_is_told(in_place, device):
    """The way LoRA's MLP uses it: gradients over the forward's buffers, the product again for the down projection."""
    wide = torch.randn(6, 300, device=device)
    gate, up, dy = wide[:, :100], wide[:, 100:200], wide[:, 200:]
    want = run(glu_reference, *(t.clone().requires_grad_() for t in (gate, up)), dy.clone(), "silu")
    poison = lambda: torch.full((6, 100), float("nan"), device=device)  # noqa: E731
    out_gate, out_up, product = (gate, up, dy) if in_place else (poison(), poison(), poison())
    glu_backward_(dy, gate, up, out_gate=out_gate, out_up=out_up, out_product=product)
    for ours, eager in zip((product, out_gate, out_up), want, strict=True):
        torch.testing.assert_close(ours, eager)


def updated(shape, dtype, device, rank):
    """Operands with updates, and the operands that they make, summed in float64."""
    gate, up, dy = (t.detach() for t in make(shape, dtype, device))
    made, updates = [], []
    for number, base in enumerate((gate, up, dy)):
        wide = torch.randn(base.shape[0], 2 * rank).to(device, dtype)
        s = wide[:, rank:]  # a slice, as S of several adapters is
        factor = (torch.randn(rank, shape[-1]) * 0.2).to(device, dtype)
        b = factor if number == 2 else factor.t().contiguous().t()
        updates.append(op.Update(s, b, 0.5 + number))
        made.append(base.double() + (0.5 + number) * s.double() @ b.double())
    return (gate, up, dy), updates, made


def through_updates(operands, updates, activation="silu"):
    """y, dgate and dup, the way LoRA's MLP comes by them; the backward over the very operands."""
    gate, up, dy = (t.clone() for t in operands)
    for_gate, for_up, for_dy = updates
    y = glu_forward_(gate, up, activation=activation, gate_update=for_gate, up_update=for_up)
    glu_backward_(dy, gate, up, activation=activation, out_gate=gate, out_up=up, out_product=dy, dy_update=for_dy,
                  gate_update=for_gate, up_update=for_up)
    assert torch.equal(dy, y)
    return y, gate, up


def compare_updated(shape, dtype, device, rank, *, only=(0, 1, 2), eps=1e-6):
    operands, updates, made = updated(shape, dtype, device, rank)
    updates = [update if number in only else None for number, update in enumerate(updates)]
    made = [wide if number in only else operands[number].double() for number, wide in enumerate(made)]
    rounded = [wide.to(dtype) for wide in made]
    truth = run(glu_reference, *(t.clone().requires_grad_() for t in made[:2]), made[2], "silu")
    eager = run(glu_reference, *(t.clone().requires_grad_() for t in rounded[:2]), rounded[2], "silu")
    for name, a, b, c in zip(("y", "dgate", "dup"), through_updates(operands, updates), eager, truth, strict=True):
        assert_close_to_truth(a, b, c, eps=eps, what=f"{name} {shape} {rank}")


@pytest.mark.parametrize("rank", [1, 7, 16, 33])
@pytest.mark.parametrize("shape", [(3, 255), (33, 40), (1, 1), (65, 130)])
def test_updates_are_added_on_the_way(shape, rank, device):
    compare_updated(shape, torch.float32, device, rank)


@pytest.mark.parametrize("only", [(0,), (1,), (2,), (0, 1), (0, 2)])
def test_any_operand_may_have_an_update(only, device):
    compare_updated((5, 48), torch.float32, device, 4, only=only)


def test_updates_in_half_precision(device):
    compare_updated((5, 48), torch.bfloat16, device, 8, eps=2**-7 if _runtime.interpreting() else 1e-6)
    compare_updated((5, 48), torch.float16, device, 8)


def test_an_update_is_no_launch_of_its_own(device):
    operands, updates, _ = updated((4, 64), torch.float32, device, 4)
    assert launches(lambda: through_updates(operands, updates)) == {"glu_forward": 1, "glu_backward": 1}


def test_updates_that_do_not_fit_are_refused(device):
    x, s, b = torch.zeros(4, 6, device=device), torch.zeros(4, 3, device=device), torch.zeros(3, 6, device=device)
    for bad in (op.Update(s, b[:, :5], 1.0), op.Update(s[:3], b, 1.0), op.Update(s[:, :2], b, 1.0),
                op.Update(torch.zeros(4, 65, device=device), torch.zeros(65, 6, device=device), 1.0)):  # fmt: skip
        with pytest.raises(ValueError, match="update of up.*does not fit"):
            glu_forward_(x, x, up_update=bad)
    for bad in (op.Update(s.half(), b, 1.0), op.Update(torch.zeros(3, 4, device=device).t(), b, 1.0)):
        with pytest.raises(ValueError, match="update of dy.*wants rows in torch.float32"):
            glu_backward_(x, x, x, out_gate=x.clone(), out_up=x.clone(), dy_update=bad)


def test_outputs_that_cannot_be_written_are_refused(device):
    x = torch.zeros(4, 6, device=device)
    with pytest.raises(ValueError, match=r"out_up has shape \(4, 5\)"):
        glu_backward_(x, x, x, out_gate=x.clone(), out_up=x[:, :5])
    for bad in (torch.zeros(6, 4, device=device).t(), torch.zeros(6, device=device).expand(4, 6)):
        with pytest.raises(ValueError, match="out_gate.*cannot be written"):
            glu_backward_(x, x, x, out_gate=bad, out_up=x.clone())
    with pytest.raises(ValueError, match="dy"):
        glu_backward_(x[:2], x, x, out_gate=x.clone(), out_up=x.clone())


def test_nothing_but_the_inputs_is_saved_and_one_kernel_runs_each_way(device):
    gate, up, dy = make((4, 64), torch.float32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = glu(gate, up)
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]
    assert launches(lambda: y.backward(dy)) == {"glu_backward": 1}
    assert launches(lambda: glu_forward_(gate, up)) == {"glu_forward": 1}


def test_offsets_beyond_int32(device):
    gate, up, dy = (far_rows(5, 32, torch.float16, device) for _ in range(3))
    for t in (gate, up, dy):
        t.copy_(torch.randn(5, 32))
    near = [t.contiguous() for t in (gate, up, dy)]
    far = run(glu, gate.requires_grad_(), up.requires_grad_(), dy, "silu")
    want = run(glu, near[0].requires_grad_(), near[1].requires_grad_(), near[2], "silu")
    assert all(torch.equal(a, b) and b.any() for a, b in zip(far, want, strict=True))
    out = [far_rows(5, 32, torch.float16, device) for _ in range(2)]
    glu_backward_(near[2], near[0].detach(), near[1].detach(), out_gate=out[0], out_up=out[1])
    assert torch.equal(out[0], want[1]) and torch.equal(out[1], want[2])


def test_offsets_of_updates_beyond_int32(device):
    """S of an adapter is a slice of a wide row; its rows, and those of what it is added to, lie past 2^31."""
    operands, updates, _ = updated((5, 32), torch.float16, device, 4)
    want = through_updates(operands, updates)

    def spread(like):
        rows = far_rows(*like.shape, torch.float16, device)
        return rows.copy_(like)

    far = [op.Update(spread(s), b, scaling) for s, b, scaling in updates]
    assert all(torch.equal(a, b) and b[4].any() for a, b in zip(through_updates(operands, far), want, strict=True))
    gate, up, dy = map(spread, operands)
    y = glu_forward_(gate, up, gate_update=far[0], up_update=far[1])
    glu_backward_(dy, gate, up, out_gate=gate, out_up=up, out_product=dy, dy_update=far[2], gate_update=far[0],
                  up_update=far[1])  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip((y, gate, up), want, strict=True)) and torch.equal(dy, y)


def test_no_rows(device):
    gate, up, dy = (torch.zeros(0, 3, 64, device=device, requires_grad=True) for _ in range(3))
    assert [t.shape for t in run(glu, gate, up, dy, "gelu")] == [gate.shape] * 3


def test_what_does_not_fit_is_refused(device):
    x = torch.zeros(2, 8, device=device)
    for fn in (glu, glu_reference, glu_forward_):
        with pytest.raises(ValueError, match="did you mean 'gelu_tanh'"):
            fn(x, x, activation="gelutanh")
        with pytest.raises(ValueError, match="differ in shape"):
            fn(x, x[:, :7])


# ------------------------------------------------------------------------------------------------------------ compile


def cases(width, dtype, activation, *, rank=0):
    """Forward and backward, as the autograd function launches them; with a `rank`, as LoRA's MLP does."""
    launch = op.launch_for(8192, width, updates=rank > 0)
    rows = {"gate_ptr": dtype, "gate_row": width, "up_ptr": dtype, "up_row": width}
    constants = {"F": width, "ACTIVATION": activation, "BLOCK": launch.block, "ROWS": launch.rows,
                 "BLOCK_R": op._block_r(rank), "UPCAST": False, "RANK_G": rank, "RANK_U": rank}  # fmt: skip
    out = {
        f"{name}_{part}": value for name in ("dgate", "dup", "y") for part, value in (("ptr", dtype), ("row", width))
    }

    def update(name, by_column):
        strides = (width, 1) if by_column else (1, rank)
        return {f"s{name}_ptr": dtype, f"s{name}_row": 2 * rank, f"b{name}_ptr": dtype,
                f"b{name}_rank": strides[0] if rank else 0, f"b{name}_col": strides[1] if rank else 0,
                f"{name}_scaling": "fp32"}  # fmt: skip

    wide = {**update("g", False), **update("u", False)}
    return (
        sm90_case(op.glu_forward, {**rows, "y_ptr": dtype, "n_rows": "i32", **wide}, constants, launch.num_warps),
        sm90_case(op.glu_backward, {"dy_ptr": dtype, "dy_row": width, **rows, **out, "n_rows": "i32",
                                    **update("d", True), **wide},
                  {**constants, "HAS_Y": True, "RANK_D": rank}, launch.num_warps),
    )  # fmt: skip


LARGEST = {name: cases(14336, "*bf16", name) for name in op.ACTIVATIONS}
UPDATED = {rank: cases(14336, "*bf16", "silu", rank=rank) for rank in (16, 64)}


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_compiles_for_sm90(activation):
    for case in LARGEST[activation]:
        found = assert_fits(case, load_bits=128)
        assert found.loads.keys() == {128} and found.registers <= 128 and found.mma == 0


@pytest.mark.parametrize("rank", UPDATED)
def test_updates_compile_for_sm90(rank):
    for case in UPDATED[rank]:
        found = assert_fits(case, load_bits=128)
        assert found.loads.keys() <= {32, 64, 128} and found.mma > 0  # S of rank 16: 2 elements a thread


@pytest.mark.slow
def test_every_class_compiles_for_sm90():
    table = [(w, cases(w, dtype, activation)) for w in (16, 255, 768, 1000, 9728, 14336)
             for dtype in ("*bf16", "*fp16", "*fp32") for activation in op.ACTIVATIONS]  # fmt: skip
    for width, pair in table:
        for case in pair:
            assert_fits(case, load_bits=128 if width % 16 == 0 and width > 500 else None)
    for width, dtype in ((255, "*bf16"), (8192, "*fp16"), (8192, "*fp32")):
        for rank in (7, 16, 32, 64):
            for case in cases(width, dtype, "gelu_tanh", rank=rank):
                assert_fits(case)


# ---------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activation", op.ACTIVATIONS)
@pytest.mark.parametrize("width", [255, 768, 8192, 14336])
def test_gpu_against_the_truth(width, activation, dtype):
    compare(*make((3, 341, width), dtype, "cuda"), activation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_gpu_rounds_where_transformers_does(activation, dtype):
    gate, up, _ = make((1000, 2048), dtype, "cuda")
    assert_rounds_as_transformers(gate, up, activation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("shape", [(1023, 255), (1000, 8192)])
def test_gpu_updates_against_the_truth(shape, rank, dtype):
    compare_updated(shape, dtype, "cuda", rank)
