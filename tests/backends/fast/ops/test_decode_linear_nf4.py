"""Linear layers of a decode step over packed weights: the bits of unpacked ones, torch's twin, the compile check."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from aligntune.backends.fast.ops import decode_linear as plain
from aligntune.backends.fast.ops import decode_linear_nf4 as op
from aligntune.backends.fast.ops.decode_linear_nf4 import (
    decode_linear_nf4,
    decode_linear_nf4_reference,
    unreadable_because,
)
from aligntune.backends.fast.ops.nf4 import dequantize_nf4_reference
from aligntune.errors import ConfigError
from tests.backends.fast.ops.harness import assert_close_to_truth, assert_fits, launches, sm90_case
from tests.backends.fast.ops.test_nf4 import quantised

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seeded(request):
    """The same numbers in CI each time; fresh ones on a GPU."""
    torch.manual_seed(0) if request.node.get_closest_marker("gpu") is None else torch.seed()


def packed(inner, widths, device, **kind):
    return [quantised((width, inner), device=device, seed=seed, **kind)[0] for seed, width in enumerate(widths)]


def make(rows, inner, widths, dtype, device, *, rank=0, bias=False, **kind):
    weights = packed(inner, widths, device, **kind)
    options = {}
    if rank:
        options["down"] = (torch.randn(len(widths) * rank, inner) * inner**-0.5).to(device, dtype)
        options["up"] = torch.randn(sum(widths), rank).to(device, dtype)
    if bias:
        options["bias"] = torch.randn(sum(widths)).to(device, dtype)
    return torch.randn(rows, inner).to(device, dtype), weights, options


def compare(rows, inner, widths, dtype, device, **kind):
    x, weights, options = make(rows, inner, widths, dtype, device, **kind)
    wide = {name: tensor.double() for name, tensor in options.items()}
    whole = [dequantize_nf4_reference(weight, dtype=torch.float32).double() for weight in weights]
    truth = plain.decode_linear_reference(x.double(), whole, **wide)
    eager = decode_linear_nf4_reference(x, weights, **options)
    assert_close_to_truth(decode_linear_nf4(x, weights, **options), eager, truth, what=f"{rows} x {inner} x {widths}")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", [{}, {"rank": 16, "bias": True}, {"rank": 64, "nested": False}], ids=str)
@pytest.mark.parametrize("shape", [(1, 64, (48,)), (64, 320, (70, 9, 16)), (17, 576, (33, 65))], ids=str)
def test_against_the_truth(shape, kind, dtype, device):
    """No further from the oracle on unrounded weights than torch's own products on unpacked ones."""
    compare(*shape, dtype, device, **kind)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "blocksize", "nested"), [
    ((70, 192), 64, True), ((70, 192), 64, False), ((9, 544), 32, True), ((66, 128), 128, True), ((34, 512), 256, True),
    ((300, 64), 64, True), ((9, 1024), 1024, False)], ids=str)  # fmt: skip
def test_weights_are_the_bits_that_unpacking_gives(shape, blocksize, nested, dtype, device):
    """Rows of the identity pick them out; less the unpacked ones, 0 is left, which rounding the output would not give.

    300 blocks have two nested scales, and 544 = 4 x 128 + 32 numbers a last tile that is partly beyond the row.
    """
    weight = quantised(shape, blocksize=blocksize, nested=nested, device=device)[0]
    whole = dequantize_nf4_reference(weight, dtype=dtype)
    inner = shape[1]
    for first in range(0, inner, 64):
        x = torch.eye(inner)[first : first + 64].to(device, dtype)
        ours = decode_linear_nf4(x, [weight])
        assert ours.dtype == dtype and torch.equal(ours, whole[:, first : first + 64].t())
        # A = I_k makes S = X, and so s B^T with B = -W takes the unpacked number off before anything is rounded.
        if inner <= 64:
            assert not decode_linear_nf4(x, [weight], down=torch.eye(64).to(x), up=-whole).any()


def test_splits_of_the_inner_dimension(device):
    """Parts begin with blocks of scales; every launch leaves the counts as they were, and repeats bit by bit."""
    x, weights, options = make(20, 1088, (64, 40), torch.float16, device, rank=16, bias=True)
    assert op.launch_for(20, 1088, (64, 40), 132).splits == 4
    counts = torch.zeros(plain.MAX_PLACES, dtype=torch.int32, device=device)
    first, second = (decode_linear_nf4(x, weights, counts=counts, **options) for _ in range(2))
    assert torch.equal(first, second) and not counts.any()
    near = decode_linear_nf4_reference(x, weights, **options)
    torch.testing.assert_close(first, near, atol=2**-7, rtol=2**-9)
    with pytest.raises(ConfigError, match="counts holds 1 tiles of"):
        decode_linear_nf4(x, weights, counts=counts[:1], **options)


@pytest.mark.parametrize("name", ["packed", "absmax", "code", "nested_absmax", "nested_code", "offset"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_layer_has_its_own(layer, name, device):
    """What is read of one layer changes its columns, and no others."""
    x, weights, _ = make(4, 128, (40, 9, 30), torch.float16, device)
    edges = (0, 40, 49, 79)
    before = decode_linear_nf4(x, weights)
    old = getattr(weights[layer], name)
    weights[layer] = dataclasses.replace(weights[layer], **{name: old ^ 85 if old.dtype == torch.uint8 else old * 1.5})
    changed = (decode_linear_nf4(x, weights) != before).any(0)
    assert changed[edges[layer] : edges[layer + 1]].float().mean() > 0.9
    assert not changed[: edges[layer]].any() and not changed[edges[layer + 1] :].any()


def test_rows_of_any_stride_and_codes_of_any_type(device):
    x, weights, _ = make(4, 192, (40,), torch.float16, device)
    wide = torch.randn(4, 300, device=device).half()
    wide[:, 50:242] = x
    stored = quantised((40, 192), device=device, storage=torch.bfloat16)[0]
    assert stored.packed.dtype == torch.bfloat16
    assert torch.equal(decode_linear_nf4(wide[:, 50:242], [stored]), decode_linear_nf4(x, weights))


@pytest.mark.parametrize("nested", [True, False])
def test_scales_beyond_a_row_are_not_read(nested, device):
    """A tile that goes on past the last row's end meets no number that lies there: 0 times NaN is NaN."""
    x, (weight,), _ = make(4, 192, (40,), torch.float16, device, nested=nested)
    name = "nested_absmax" if nested else "absmax"
    whole = torch.full((4096,), float("nan"), device=device)
    own = getattr(weight, name)
    whole[: own.numel()] = own
    if nested:  # 256 blocks: the next one has the next of these scales
        x, (weight,), _ = make(4, 64, (256,), torch.float16, device)
        whole[:1] = weight.nested_absmax
        own = weight.nested_absmax
    moved = dataclasses.replace(weight, **{name: whole[: own.numel()]})
    assert torch.equal(decode_linear_nf4(x, [moved]), decode_linear_nf4(x, [weight]))


def test_programs_of_a_launch():
    """Two an SM where the inner dimension suffices, in parts of two tiles or more."""
    for widths, inner, programs in (((2048, 512, 512), 2048, 192), ((2048,), 2048, 256), ((8192, 8192), 2048, 256),
                                    ((64,), 512, 2), ((4096,), 14336, 256)):  # fmt: skip
        launch = op.launch_for(8, inner, widths, 132)
        assert launch.splits * sum(width // launch.columns for width in widths) == programs


def test_one_launch(device):
    x, weights, options = make(4, 128, (40, 9), torch.float16, device, rank=16)
    assert launches(lambda: decode_linear_nf4(x, weights, **options)) == {"decode_linear_nf4_kernel": 1}


def test_what_it_refuses(device):
    x, weights, options = make(4, 128, (40, 9), torch.float16, device, rank=16)
    with pytest.raises(ConfigError, match=r"x is torch\.float32"):
        decode_linear_nf4(x.float(), weights)
    with pytest.raises(ConfigError, match="x is"):
        decode_linear_nf4(x[:, :64], weights, **options)
    with pytest.raises(ConfigError, match="A without B"):
        decode_linear_nf4(x, weights, down=options["down"])
    with pytest.raises(ConfigError, match="block scales for"):
        decode_linear_nf4(x, [dataclasses.replace(weights[0], absmax=weights[0].absmax[:3])])
    mixed = [weights[0], quantised((9, 128), nested=False, device=device)[0]]
    odd = quantised((8, 100), device=device)[0]
    apart = dataclasses.replace(weights[0], packed=weights[0].packed.expand(-1, 2)[:, :1].contiguous()[1:].view(-1))
    for wrong, why in ((mixed, "their scales differ"), ([weights[0], packed(128, (9,), device, blocksize=128)[0]],
                       "blocks or"), ([odd], "rows of 100 do not begin"), ([apart], "lie in words")):  # fmt: skip
        assert why in unreadable_because(wrong)
    assert unreadable_because(weights) is None
    for wrong in (mixed, [odd]):
        with pytest.raises(ConfigError, match="the weights are"):
            decode_linear_nf4(torch.zeros(4, wrong[0].shape[1], device=device).half(), wrong)


def test_counts_suffice_for_any_shape():
    for sms in (16, 132, 148, 300):
        for rows in (1, 17, 64):
            for widths in ((16,), (4096, 1024, 1024), (28672, 28672)):
                launch = op.launch_for(rows, 8192, widths, sms)
                tiles = sum(-(-width // launch.columns) for width in widths) * -(-rows // launch.rows)
                assert launch.splits == 1 or tiles <= plain.MAX_PLACES


# ------------------------------------------------------------------------------------------------------------ compile


def case(rows, inner, widths, dtype, rank, *, nested=True, blocksize=64):
    launch = op.launch_for(rows, inner, widths, 132)
    sizes = [*widths, *[0] * (3 - len(widths))]
    kinds = {"packed": "*i32", "absmax": "*u8" if nested else "*fp32", "code": "*fp32", "nested_absmax": "*fp32",
             "nested_code": "*fp32", "offset": "*fp32"}  # fmt: skip
    signature = {f"{name}_ptr": dtype for name in ("x", "down", "up", "bias", "out")}
    signature |= {f"{name}{layer}_ptr": kind for name, kind in kinds.items() for layer in range(3)}
    signature |= {"x_row": inner, "out_row": sum(widths), "part_ptr": "*fp32", "count_ptr": "*i32", "m": "i32"}
    constants = {"K": inner, **{f"N{i}": size for i, size in enumerate(sizes)}, "RANK": rank, "HAS_BIAS": True,
                 "BLOCKSIZE": blocksize, "NESTED": nested, "NESTED_BLOCKSIZE": 256, "BLOCK_M": launch.rows,
                 "BLOCK_N": launch.columns, "BLOCK_K": launch.depth, "SPLITS": launch.splits,
                 "UPCAST": False}  # fmt: skip
    return sm90_case(op.decode_linear_nf4_kernel, signature, constants, launch.num_warps, launch.stages,
                     enable_fp_fusion=False)


LARGEST = [case(64, 4096, (4096, 1024, 1024), "*bf16", 64), case(1, 14336, (4096,), "*bf16", 16)]


@pytest.mark.parametrize("number", range(len(LARGEST)))
def test_compiles_for_sm90(number):
    found = assert_fits(LARGEST[number], load_bits=128)
    assert found.mma > 0
    launch = dict(LARGEST[number].constexprs)
    tiles = launch["BLOCK_K"] * (launch["BLOCK_N"] / 2 + (launch["BLOCK_M"] + launch["RANK"]) * 2)
    stages, threads = LARGEST[number].num_stages, 32 * LARGEST[number].num_warps
    assert found.loads[128] >= stages * tiles / (16 * threads)  # codes too come 16 bytes at a time


@pytest.mark.slow
def test_every_class_compiles_for_sm90():
    for dtype in ("*bf16", "*fp16"):
        for nested, blocksize in ((True, 64), (False, 64), (True, 32), (True, 256), (False, 4096)):
            for rows, inner, widths, rank in ((1, 4096, (8192, 8192), 16), (33, 4096, (2048, 512, 512), 32)):
                assert_fits(case(rows, inner, widths, dtype, rank, nested=nested, blocksize=blocksize))
        assert_fits(case(64, 8192, (2048,), dtype, 0))


# ---------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(1, 2048, (2048, 512, 512)), (64, 2048, (8192, 8192)), (64, 8192, (2048,)),
                                   (48, 2560, (4096, 1024, 1024)), (33, 192, (100, 7))], ids=str)  # fmt: skip
def test_gpu_against_the_truth(shape, dtype):
    compare(*shape, dtype, "cuda")
    compare(*shape, dtype, "cuda", rank=16, bias=True)
    compare(*shape, dtype, "cuda", rank=64, nested=False)
