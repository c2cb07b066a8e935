"""LoRA dropout made in kernels: the masks, their means, forward and backward agreeing, recompute, replay."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from aligntune.backends.fast.ops import _lora_dropout, _runtime
from aligntune.backends.fast.ops._lora_dropout import (
    LAUNCH,
    Dropout,
    keep_reference,
    lora_dropout_down_kernel,
    lora_dropout_grad_a_kernel,
    lora_dropout_grad_x_kernel,
    padded_rank,
    threshold_of,
)
from aligntune.backends.fast.ops.lora import (
    lora_linear_group,
    lora_linear_group_reference,
    lora_mlp,
    lora_mlp_reference,
)
from tests.backends.fast.ops.far import far_flat, first_program
from tests.backends.fast.ops.harness import assert_close_to_truth, assert_fits, far_rows, sm90_case
from tests.backends.fast.ops.lora_cases import Maker, assert_same, gradients, run
from tests.backends.fast.ops.test_philox import philox

# On a GPU fp32 products are made of three tf32 ones.
LOOSE = {"rtol": 1e-3, "atol": 1e-4}


def seed_of(number: int, device: str) -> torch.Tensor:
    return torch.tensor([number], dtype=torch.int64, device=device)


def kernel_mask(seed, rows, hidden, p, *, adapter=0, device="cpu") -> torch.Tensor:
    """The mask that the forward kernel draws: with a = one column of the identity at a time, S is a column of it."""
    x = torch.ones(rows, hidden, device=device)
    eye = torch.zeros(padded_rank(hidden), hidden, device=device)
    eye[:hidden] = torch.eye(hidden, device=device)
    return Dropout((p,), seed, adapter).down(x, eye)[:, :hidden]


# ---------------------------------------------------------------------------------------------------------- the masks


def test_the_reference_mask_is_philox():
    seed = -1234567890123456789
    mask = keep_reference(seed_of(seed, "cpu"), 2, 3, 20, 0.3)
    threshold = threshold_of(0.3)
    assert threshold == 19661
    for row in range(3):
        numbers = [h for g in range(3) for w in philox(seed, (g, row, 2, 0)) for h in (w & 0xFFFF, w >> 16)]
        assert mask[row].tolist() == [number >= threshold for number in numbers[:20]]


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_kernels_mask_and_its_mean(p, device):
    rows, hidden = 70, 61
    drawn = kernel_mask(seed_of(11, device), rows, hidden, p, adapter=3, device=device)
    keep = keep_reference(seed_of(11, device), 3, rows, hidden, p)
    scale = 65536 / (65536 - threshold_of(p)) if p < 1 else 0.0
    torch.testing.assert_close(drawn, keep * scale, rtol=1e-6, atol=0)
    # 4270 entries: the mean of mask / (1 - p) is 1 within 4 standard deviations.
    if p < 1:
        assert abs(float(drawn.mean()) - 1) < 4 * (p / (1 - p) / (rows * hidden)) ** 0.5
        assert abs(float((drawn > 0).float().mean()) - (1 - p)) < 4 * (p * (1 - p) / (rows * hidden)) ** 0.5
    else:
        assert not drawn.any()


def test_masks_differ_by_seed_adapter_row_and_column(device):
    first = kernel_mask(seed_of(1, device), 64, 48, 0.5, device=device) > 0
    others = [
        kernel_mask(seed_of(2, device), 64, 48, 0.5, device=device) > 0,
        kernel_mask(seed_of(1 + 2**32, device), 64, 48, 0.5, device=device) > 0,
        kernel_mask(seed_of(1, device), 64, 48, 0.5, adapter=1, device=device) > 0,
        first.roll(1, 0), first.roll(8, 1), first.roll(1, 1),
    ]  # fmt: skip
    for other in others:
        # Independent fair masks agree in half the places: 3072 of them, standard deviation 0.009.
        assert abs(float((first == other).float().mean()) - 0.5) < 0.036


def test_p_of_0_keeps_everything(device):
    assert (kernel_mask(seed_of(1, device), 5, 9, 0.0, device=device) == 1).all()


# ---------------------------------------------------------------------------------------------------------- gradients


def one_of_two(maker):
    """Two adapters on a layer, the second without dropout."""
    layer = maker.linear("o", 24, 40, ranks=(4, 5), p=0.4)
    return [layer._replace(adapters=(layer.adapters[0], layer.adapters[1]._replace(dropout=0.0)))]


def columns_in_a_row(maker):
    """A of a rank that is not padded, and so read where it is, with its columns one after the other."""
    layer = maker.linear("o", 24, 40, ranks=(16,), p=0.3)
    a = layer.adapters[0].a.detach().t().contiguous().t().requires_grad_()
    maker.leaves["o.0.a"] = a
    return [layer._replace(adapters=(layer.adapters[0]._replace(a=a),))]


GROUPS = {
    "A by columns": columns_in_a_row,
    "one": lambda m: [m.linear("o", 24, 40, p=0.3)],
    "qkv": lambda m: [m.linear(n, w, 255, p=0.1, ranks=(7,)) for n, w in (("q", 24), ("k", 8), ("v", 8))],
    "rank 65": lambda m: [m.linear("o", 24, 40, ranks=(65,), p=0.3)],
    "two adapters, one without": one_of_two,
    "all of it": lambda m: [m.linear("o", 24, 40, p=1.0)],
}


@pytest.mark.parametrize("name", GROUPS)
def test_forward_and_backward_use_the_same_masks(name, device):
    build = GROUPS[name]
    hidden = build(Maker(device))[0].weight.shape[1]
    options = {"shape": (7, 11, hidden), "seed": seed_of(5, device)}
    outs, grads = run(lora_linear_group, build, device, **options)
    wanted, wanted_grads = run(lora_linear_group_reference, build, device, **options)
    for out, want in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out, want, **LOOSE)
    zero = ("o.0.a", "o.0.b") if name == "all of it" else ()
    assert_same(grads, wanted_grads, zero=zero, tolerance=LOOSE)
    # Without dropout the numbers are others: the comparison above is not of nothing.
    plain, _ = run(lora_linear_group_reference, build, device, shape=(7, 11, hidden))
    assert not torch.allclose(plain[0], wanted[0], **LOOSE)


def test_mlp_draws_three_masks(device):
    def build(maker):
        shapes = {"gate": (40, 24), "up": (40, 24), "down": (24, 40)}
        return [maker.linear(name, *shape, p=0.3) for name, shape in shapes.items()]

    options = {"shape": (7, 24), "seed": seed_of(5, device)}
    (out,), grads = run(lora_mlp, build, device, **options)
    (wanted,), wanted_grads = run(lora_mlp_reference, build, device, **options)
    torch.testing.assert_close(out, wanted, **LOOSE)
    assert_same(grads, wanted_grads, tolerance=LOOSE)


def test_rows_far_apart_in_splits(device, monkeypatch):
    # Many rows, so that dA is summed from several splits of T, the last of them short; X with a row stride.
    monkeypatch.setattr(_lora_dropout, "num_sms", lambda tensor: 1)
    rows, hidden = 9 * LAUNCH.rows + 5, 40
    wide = torch.randn(rows, 90, generator=torch.Generator().manual_seed(1)).to(device)
    x, ds = wide[:, 30:70], torch.randn(rows, 32, generator=torch.Generator().manual_seed(2)).to(device)
    masks = Dropout((0.25, 0.5), seed_of(3, device))
    found = masks.grad_a(x, ds)
    for adapter, p in enumerate(masks.ps):
        keep = keep_reference(masks.seed, adapter, rows, hidden, p)
        part = slice(16 * adapter, 16 * adapter + 16)
        torch.testing.assert_close(found[part], ds[:, part].t() @ (x * keep) / (1 - p), **LOOSE)
    monkeypatch.setattr(_lora_dropout, "num_sms", lambda tensor: 132)
    torch.testing.assert_close(masks.grad_a(x, ds), found, **LOOSE)


# ----------------------------------------------------------------------------------------------------------- the seed


def dropped(maker):
    return [maker.linear("q", 24, 40, p=0.5), maker.linear("v", 8, 40, p=0.5)]


def test_the_seed_follows_torchs_generator(device):
    layers = dropped(Maker(device))
    x = torch.randn(6, 40, device=device)
    torch.manual_seed(3)
    first, second = (lora_linear_group(x, layers)[0] for _ in range(2))
    assert not torch.equal(first, second), "two layers or steps drew one mask"
    torch.manual_seed(3)
    assert torch.equal(lora_linear_group(x, layers)[0], first)
    state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    without = [one._replace(adapters=tuple(a._replace(dropout=0.0) for a in one.adapters)) for one in layers]
    lora_linear_group(x, without)
    now = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    assert torch.equal(state, now), "a call without dropout moved the generator"


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_draws_the_same_masks(reentrant, device):
    def once(recompute):
        torch.manual_seed(7)
        maker = Maker(device)
        layers = dropped(maker)
        x = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
        call = lambda y: lora_linear_group(y, layers)  # noqa: E731
        outs = checkpoint(call, x, use_reentrant=reentrant) if recompute else call(x)
        torch.manual_seed(1234)  # what runs between forward and recompute must not matter
        return [out.detach() for out in outs], gradients(outs, maker, x)

    (plain, plain_grads), (again, again_grads) = once(False), once(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    for name, wanted in plain_grads.items():
        assert wanted is None and again_grads[name] is None or torch.equal(wanted, again_grads[name]), name


@pytest.mark.skipif(not _runtime.interpreting(), reason="steps a grid by hand")
def test_offsets_past_int32():
    x = far_rows(6, 16, torch.float32, "cpu")
    x.copy_(torch.arange(96.0).view(6, 16))
    seed, threshold = seed_of(1, "cpu"), torch.zeros(1, dtype=torch.int32)
    constants = {"WIDTH": 16, "RANK": 16, "BLOCK_R": 16, "ROWS": 1, "COLUMNS": 16, "UPCAST": True}
    s, ones, partial = torch.zeros(6, 16), torch.ones(6, 16), torch.zeros(1, 16, 16)
    lora_dropout_down_kernel[(6,)](x, torch.eye(16), s, seed, threshold, 6, 16, x.stride(0), 0, **constants)
    assert torch.equal(s, x)
    lora_dropout_grad_a_kernel[(1,)](x, ones, partial, seed, threshold, 6, 16, x.stride(0), 0, 6, **constants)
    torch.testing.assert_close(partial[0, 0], x.sum(0))
    # dX and dS are contiguous: the row's number alone passes 2^31.
    far = 2**31 // 16 + 1
    dx, ds = (far_flat(2**31 + 64, torch.float32) for _ in range(2))
    dx[16 * far : 16 * far + 16], ds[16 * far : 16 * far + 16] = 1.0, 3.0
    with first_program(far):
        lora_dropout_grad_x_kernel[(1,)](dx, ds, torch.eye(16), seed, threshold, far + 1, 16, 0, **constants)
    assert dx[16 * far : 16 * far + 16].tolist() == [4.0] * 16


# ---------------------------------------------------------------------------------------------------------- compiling


def cases(dtype: str, rank: int):
    constants = {
        "WIDTH": 3 * rank, "RANK": rank, "BLOCK_R": min(rank, LAUNCH.max_block_r), "ROWS": LAUNCH.rows,
        "COLUMNS": LAUNCH.columns, "UPCAST": False,
    }  # fmt: skip
    common = {"seed_ptr": "*i64", "threshold_ptr": "*i32", "num_rows": 8192, "hidden": 2048, "first_adapter": 0}
    down = {"x_ptr": dtype, "a_ptr": dtype, "s_ptr": dtype, "x_stride": 2048, **common}
    grad_a = {"x_ptr": dtype, "ds_ptr": dtype, "partial_ptr": "*fp32", "x_stride": 2048, **common}
    grad_x = {"dx_ptr": dtype, "ds_ptr": dtype, "a_ptr": dtype, **common}
    kernels = {
        lora_dropout_down_kernel: down,
        lora_dropout_grad_a_kernel: {**grad_a, "rows_per_split": 1024},
        lora_dropout_grad_x_kernel: grad_x,
    }
    return [sm90_case(kernel, types, constants, num_warps=LAUNCH.num_warps) for kernel, types in kernels.items()]


COMMON = [*cases("*bf16", 16), *cases("*bf16", 256)]


@pytest.mark.parametrize("case", COMMON, ids=lambda case: f"{case.kernel}-{dict(case.constexprs)['RANK']}")
def test_compiles_for_sm90(case):
    found = assert_fits(case, load_bits=128)
    assert found.mma > 0, "the products are not on tensor cores"
    assert found.registers <= 128


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["*fp16", "*fp32"])
def test_every_class_compiles(dtype):
    every = [(rank, cases(dtype, rank)) for rank in (16, 32, 64, 256)]
    for rank, case in [(rank, case) for rank, of_rank in every for case in of_rank]:
        # fp32 at rank 64 and more: the three tf32 products of dX leave 6 spills; fp32 training is no target.
        assert_fits(case, spills=6 if dtype == "*fp32" and rank >= 64 and "grad_x" in case.kernel else 0)


# --------------------------------------------------------------------------------------------------------- on the GPU


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 255])
def test_odd_sizes_compile(size):
    """The launcher makes a constant of every integer argument that is 1, and takes odd strides as unaligned."""
    for case in cases("*bf16", 16):
        types = {name: size if isinstance(value, int) else value for name, value in case.signature}
        assert_fits(sm90_case(case.kernel, types, dict(case.constexprs), num_warps=case.num_warps))


@pytest.mark.gpu
def test_masks_on_the_gpu(monkeypatch):
    test_the_kernels_mask_and_its_mean(0.1, "cuda")
    test_masks_differ_by_seed_adapter_row_and_column("cuda")
    for name in GROUPS:
        test_forward_and_backward_use_the_same_masks(name, "cuda")
    test_rows_far_apart_in_splits("cuda", monkeypatch)
    test_recompute_draws_the_same_masks(False, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_against_the_truth(dtype, device):
    """Our rounding against the twin's in 16 bits, both against the twin in fp64, under the same masks."""
    fresh = torch.seed() % 2**31
    seed = seed_of(fresh, device)

    def once(fn, kind):
        maker = Maker(device, seed=fresh, dtype=torch.float32, weight_dtype=dtype)
        layers = [maker.linear(n, 256, 512, p=0.2, ranks=(16,)) for n in "qk"]
        x = torch.randn(700, 512, generator=torch.Generator().manual_seed(fresh + 1)).to(device, dtype)
        if kind == "truth":
            layers = [one._replace(weight=one.weight.double()) for one in layers]
            x = x.double()
        x = x.requires_grad_()
        outs = fn(x, layers, seed=seed)
        return outs, gradients(outs, maker, x)

    truths, truth_grads = once(lora_linear_group_reference, "truth")
    theirs, their_grads = once(lora_linear_group_reference, "eager")
    outs, grads = once(lora_linear_group, "ours")
    for out, eager, truth in zip(outs, theirs, truths, strict=True):
        assert_close_to_truth(out, eager, truth)
    for name, truth in truth_grads.items():
        if truth is not None:
            assert_close_to_truth(grads[name], their_grads[name], truth, what=f"{name}, seed {fresh}")


@pytest.mark.gpu
def test_a_graphs_replays_draw_new_masks():
    maker = Maker("cuda")
    layers = dropped(maker)
    x = torch.randn(64, 40, device="cuda", requires_grad=True)

    def step():
        q, v = lora_linear_group(x, layers)
        (q.square().sum() + v.square().sum()).backward()
        return q

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        for leaf in (x, *maker.leaves.values()):
            leaf.grad = None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append((out.clone(), x.grad.clone()))
    assert not torch.equal(replays[0][0], replays[1][0])
    assert not torch.equal(replays[0][1], replays[1][1])
    # From one state of the generator, one draw.
    torch.cuda.manual_seed(5)
    graph.replay()
    first = out.clone()
    torch.cuda.manual_seed(5)
    graph.replay()
    assert torch.equal(out, first)
    assert float(first.norm()) > 0
