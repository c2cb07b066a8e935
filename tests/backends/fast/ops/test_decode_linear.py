"""Linear layers of a decode step in one launch: torch's twin, split sums, odd shapes, the compile check."""

from __future__ import annotations

import pytest
import torch

from aligntune.backends.fast.ops import decode_linear as op
from aligntune.backends.fast.ops.decode_linear import decode_linear, decode_linear_reference
from aligntune.errors import ConfigError
from tests.backends.fast.ops.harness import assert_close_to_truth, assert_fits, launches, sm90_case


@pytest.fixture(autouse=True)
def seeded(request):
    """The same numbers in CI each time; fresh ones on a GPU."""
    torch.manual_seed(0) if request.node.get_closest_marker("gpu") is None else torch.seed()


def make(rows, inner, widths, dtype, device, *, rank=0, bias=False, weights=None):
    x = torch.randn(rows, inner).to(device, dtype)
    weights = [(torch.randn(width, inner) * inner**-0.5).to(device, weights or dtype) for width in widths]
    options = {}
    if rank:
        options["down"] = (torch.randn(len(widths) * rank, inner) * inner**-0.5).to(device, dtype)
        options["up"] = (torch.randn(sum(widths), rank) * 0.3).to(device, dtype)
    if bias:
        options["bias"] = torch.randn(sum(widths)).to(device, dtype)
    return x, weights, options


def compare(rows, inner, widths, dtype, device, *, eps=1e-6, **kind):
    x, weights, options = make(rows, inner, widths, dtype, device, **kind)
    wide = {name: tensor.double() for name, tensor in options.items()}
    truth = decode_linear_reference(x.double(), [weight.double() for weight in weights], **wide)
    eager = decode_linear_reference(x, weights, **options)
    ours = decode_linear(x, weights, **options)
    assert_close_to_truth(ours, eager, truth, eps=eps, what=f"{rows} x {inner} x {widths} {kind}")


@pytest.mark.parametrize("kind", [{}, {"rank": 16}, {"rank": 32, "bias": True}, {"bias": True}], ids=str)
@pytest.mark.parametrize("shape", [(1, 64, (48,)), (3, 520, (40, 9)), (17, 255, (70, 16, 16)), (64, 1030, (64,))],
                         ids=str)  # fmt: skip
def test_fp32_against_the_truth(shape, kind, device):
    compare(*shape, torch.float32, device, **kind)


def test_the_cases_split_the_inner_dimension_and_do_not(device):
    splits = {op.launch_for(rows, inner, widths, 132, element_size=4).splits for rows, inner, widths in
              ((1, 64, (48,)), (3, 520, (40, 9)), (64, 1030, (64,)))}  # fmt: skip
    assert 1 in splits and max(splits) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device):
    compare(5, 520, (40, 24), dtype, device, rank=16, bias=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [{}, {"rank": 16, "bias": True}, {"rank": 64}], ids=str)
@pytest.mark.parametrize("shape", [(1, 64, (48,)), (64, 260, (70, 9, 16)), (17, 255, (33,))], ids=str)
def test_fp32_weights_beside_half_precision(shape, kind, dtype, device):
    """No further from the oracle on unrounded weights than torch's own products on cast ones."""
    compare(*shape, dtype, device, weights=torch.float32, **kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_weights_are_rounded_as_a_cast_rounds_them(dtype, device):
    """Rows of the identity pick weights out: the same bits, ties and numbers next to them among them; split or not.

    Less the rounded ones, 0 is left, which is more than rounding the output alone gives.
    """
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 - 2.0**-9, 1 - 2.0**-12, 0.0,
                         -3e-6])  # fmt: skip
    near = torch.cat([torch.nextafter(ties, torch.tensor(away)) for away in (9e9, -9e9)])
    weight = torch.cat([ties, -ties, near, torch.randn(70 * 136 - 32) * torch.logspace(-4, 3, 70 * 136 - 32)])
    weight = weight.view(70, 136).to(device)
    assert op.launch_for(34, 136, [70], 132, weight_size=4).splits == 1
    assert op.launch_for(34, 272, [70], 132, weight_size=4).splits == 2
    x, both = torch.eye(136).to(device, dtype), torch.cat([weight, weight.to(dtype).float()], dim=1)
    for at in (slice(34), slice(102, 136)):
        ours = decode_linear(x[at], [weight])
        assert ours.dtype == dtype and torch.equal(ours, weight.to(dtype)[:, at].t())
        assert not decode_linear(torch.cat([x[at], -x[at]], dim=1), [both]).any()


def test_every_layer_has_its_own_adapter(device):
    """A factor of one layer changes the columns of no other."""
    x, weights, options = make(4, 520, (40, 9, 30), torch.float32, device, rank=16)
    before = decode_linear(x, weights, **options)
    options["down"][16:32] += 1
    changed = (decode_linear(x, weights, **options) != before).any(0)
    assert changed[40:49].all() and not changed[:40].any() and not changed[49:].any()


def test_counts_are_left_as_they_were_found_and_results_repeat(device):
    x, weights, options = make(20, 1030, (64, 40), torch.float32, device, rank=16)
    counts = torch.zeros(op.MAX_PLACES, dtype=torch.int32, device=device)
    first, second = (decode_linear(x, weights, counts=counts, **options) for _ in range(2))
    assert torch.equal(first, second) and not counts.any()
    with pytest.raises(ConfigError, match="counts holds 1 tiles of"):
        decode_linear(x, weights, counts=counts[:1], **options)


def test_one_launch(device):
    x, weights, options = make(4, 520, (40, 9), torch.float32, device, rank=16)
    assert launches(lambda: decode_linear(x, weights, **options)) == {"decode_linear_kernel": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_any_stride(dtype, device):
    x, weights, options = make(4, 200, (40,), dtype, device, rank=16, weights=torch.float32)
    wide = torch.randn(4, 300, device=device, dtype=dtype)
    wide[:, 50:250] = x
    padded = torch.randn(40, 210, device=device)
    padded[:, :200] = weights[0]
    ours = decode_linear(wide[:, 50:250], [padded[:, :200]], **options)
    assert torch.equal(ours, decode_linear(x, weights, **options))
    near = {"atol": 2**-9, "rtol": 2**-9} if dtype == torch.float16 else {}
    torch.testing.assert_close(ours, decode_linear_reference(x, weights, **options), **near)


def test_what_it_refuses(device):
    x, weights, options = make(4, 64, (40, 9), torch.float32, device, rank=16)
    half = [weight.half() for weight in weights]
    for bad, beside in ((x[:, :63], weights), (x, half), (x.bfloat16(), half), (x.half(), [half[0], weights[1]]),
                        (x[:0], weights), (x.expand(4, 4, 64), weights)):  # fmt: skip
        with pytest.raises(ConfigError, match="x is"):
            decode_linear(bad, beside, **options)
    with pytest.raises(ConfigError, match="A without B"):
        decode_linear(x, weights, down=options["down"])
    for name, tensor in (("down", options["down"][:16]), ("up", options["up"][:, :15]), ("up", options["up"][1:]),
                         ("down", options["down"].half()), ("up", options["up"].half())):  # fmt: skip
        with pytest.raises(ConfigError, match="the factors are"):
            decode_linear(x, weights, **{**options, name: tensor})
    for bias in (torch.zeros(3, device=device), torch.zeros(49, device=device).half()):
        with pytest.raises(ConfigError, match="the bias is"):
            decode_linear(x, weights, bias=bias)
    assert op.fits(64, 3, 64) and not any(op.fits(*each) for each in ((65, 3, 64), (0, 1, 0), (1, 4, 0), (1, 1, 65)))


def test_counts_suffice_for_any_shape():
    for sms in (16, 132, 148, 300):
        for rows in (1, 17, 64):
            for widths in ((16,), (4096, 1024, 1024), (28672, 28672)):
                for sizes in ((2, 2), (2, 4), (4, 4)):
                    launch = op.launch_for(rows, 8192, widths, sms, element_size=sizes[0], weight_size=sizes[1])
                    tiles = sum(-(-width // launch.columns) for width in widths) * -(-rows // launch.rows)
                    assert launch.splits == 1 or tiles <= op.MAX_PLACES


# ------------------------------------------------------------------------------------------------------------ compile


def case(rows, inner, widths, dtype, rank, weights=None):
    weights = weights or dtype
    launch = op.launch_for(rows, inner, widths, 132, element_size=4 if dtype == "*fp32" else 2,
                           weight_size=4 if weights == "*fp32" else 2)
    sizes = [*widths, *[0] * (3 - len(widths))]
    signature = {f"{name}_ptr": dtype for name in ("x", "down", "up", "bias", "out")}
    signature |= {f"{name}_ptr": weights for name in ("w0", "w1", "w2")}
    signature |= {f"{name}_row": inner for name in ("x", "w0", "w1", "w2")}
    signature |= {"out_row": sum(widths), "part_ptr": "*fp32", "count_ptr": "*i32", "m": "i32"}
    constants = {"K": inner, **{f"N{i}": size for i, size in enumerate(sizes)}, "RANK": rank, "HAS_BIAS": True,
                 "BLOCK_M": launch.rows, "BLOCK_N": launch.columns, "BLOCK_K": launch.depth, "SPLITS": launch.splits,
                 "UPCAST": False}  # fmt: skip
    return sm90_case(op.decode_linear_kernel, signature, constants, launch.num_warps, launch.stages)


LARGEST = [case(64, 4096, (4096, 1024, 1024), "*bf16", 64), case(64, 14336, (4096,), "*bf16", 16),
           case(64, 4096, (4096, 1024, 1024), "*bf16", 64, "*fp32"), case(1, 2048, (128256,), "*bf16", 0, "*fp32")]


@pytest.mark.parametrize("number", range(len(LARGEST)))
def test_compiles_for_sm90(number):
    found = assert_fits(LARGEST[number], load_bits=128)
    assert found.mma > 0
    launch = dict(LARGEST[number].constexprs)
    weight_size = 4 if dict(LARGEST[number].signature)["w0_ptr"] == "*fp32" else 2
    tiles = launch["BLOCK_K"] * (launch["BLOCK_N"] * weight_size + (launch["BLOCK_M"] + launch["RANK"]) * 2)
    stages, threads = LARGEST[number].num_stages, 32 * LARGEST[number].num_warps
    assert found.loads[128] >= stages * tiles / (16 * threads)  # all of X, W and A by 16 bytes, in each stage


@pytest.mark.slow
def test_every_class_compiles_for_sm90():
    for dtype, weights in (("*bf16", None), ("*fp16", None), ("*fp32", None), ("*bf16", "*fp32"), ("*fp16", "*fp32")):
        for rows, inner, widths, rank in ((1, 2048, (8192, 8192), 16), (16, 255, (40,), 0), (64, 8192, (2048,), 32),
                                          (33, 2048, (2048, 512, 512), 64)):  # fmt: skip
            assert_fits(case(rows, inner, widths, dtype, rank, weights))


# ---------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2048, (2048, 512, 512)), (64, 2048, (8192, 8192)), (64, 8192, (2048,)),
                                   (48, 2560, (4096, 1024, 1024)), (33, 255, (100, 7))], ids=str)  # fmt: skip
def test_gpu_against_the_truth(shape, dtype):
    compare(*shape, dtype, "cuda", rank=16, bias=True)
    compare(*shape, dtype, "cuda", rank=64)
    compare(*shape, dtype, "cuda", weights=torch.float32)
    compare(*shape, dtype, "cuda", weights=torch.float32, rank=16, bias=True)
