"""NF4 dequantisation: bit-equal to bitsandbytes, by the numbers of the code book, and what it refuses."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from aligntune.backends.fast.ops import _runtime
from aligntune.backends.fast.ops.nf4 import (
    LAUNCH,
    NF4Weight,
    dequantize_nf4,
    dequantize_nf4_reference,
    nf4_dequant_kernel,
)
from aligntune.errors import ConfigError
from tests.backends.fast.ops.far import far_flat, first_program
from tests.backends.fast.ops.harness import assert_fits, launches, sm90_case

bnb = pytest.importorskip("bitsandbytes")

# The NF4 code book to 7 digits (arXiv 2305.14314, appendix E).
CODE = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip


def quantised(shape, *, blocksize=64, nested=True, dtype=torch.float32, device="cpu", storage=torch.uint8, seed=0):
    """(NF4Weight, bitsandbytes' own dequantisation) of a random weight."""
    torch.manual_seed(seed)
    weight = torch.randn(shape, device=device).to(dtype)
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4", quant_storage=storage
    )
    # bitsandbytes compiles its odd-shape path; eager gives the same bits in a fraction of the time.
    with torch.compiler.set_stance("force_eager"):
        theirs = bnb.functional.dequantize_4bit(packed, state)
    return NF4Weight.from_param(SimpleNamespace(data=packed, quant_state=state)), theirs.view(shape), weight


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in representable 16-bit numbers; signs agree wherever this is small."""
    return int((a.view(torch.int16).int() - b.view(torch.int16).int()).abs().max())


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [((64, 64), 64), ((300, 500), 128), ((7, 129), 64), ((33, 1), 64), ((1,), 64), ((255, 100), 64), ((3, 4096), 4096)],
)
def test_equals_bitsandbytes_bit_for_bit(shape, blocksize, nested, device):
    weight, theirs, original = quantised(shape, blocksize=blocksize, nested=nested, device=device)
    ours = dequantize_nf4(weight)
    assert ours.shape == torch.Size(shape) and ours.dtype == torch.float32
    assert theirs.abs().max() > 0
    assert torch.equal(dequantize_nf4_reference(weight), ours)
    # bitsandbytes' AVX-512 CPU kernel is not exact from 2048 on, and it says so.
    if device == "cuda" or blocksize < 2048:
        assert torch.equal(ours, theirs)
    # A gap of the code book is at most 0.304 wide, so no weight is off by more than half of it.
    assert (ours - original).abs().max() < 0.17 * original.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype, device):
    weight, theirs, _ = quantised((96, 200), dtype=dtype, device=device)
    ours = dequantize_nf4(weight)
    assert ours.dtype == dtype
    # The interpreter truncates fp32 to bf16.
    assert ulps(ours, theirs) <= (1 if _runtime.interpreting() and dtype == torch.bfloat16 else 0)
    assert torch.equal(dequantize_nf4_reference(weight), theirs)
    wide = dequantize_nf4(weight, dtype=torch.float32)
    assert torch.equal(wide, dequantize_nf4_reference(weight, dtype=torch.float32))


def handmade(packed: list[int], absmax: float = 3.0, *, device="cpu") -> NF4Weight:
    return NF4Weight(
        packed=torch.tensor(packed, dtype=torch.uint8, device=device),
        absmax=torch.tensor([absmax], device=device),
        code=torch.tensor(CODE, device=device),
        shape=torch.Size([2 * len(packed)]),
        blocksize=64,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("fn", [dequantize_nf4, dequantize_nf4_reference])
def test_the_high_nibble_comes_first(fn, device):
    found = fn(handmade([0x0F, 0x78, 0x12, 0x34, 0xF0], device=device))
    wanted = 3.0 * torch.tensor([CODE[n] for n in (0, 15, 7, 8, 1, 2, 3, 4, 15, 0)])
    assert torch.equal(found.cpu(), wanted)
    assert found[:3].tolist() == [-3.0, 3.0, 0.0]


@pytest.mark.parametrize("fn", [dequantize_nf4, dequantize_nf4_reference])
def test_double_quantisation_by_hand(fn, device):
    # 300 blocks of 64: the second nested scale starts at block 256.
    blocks = 300
    weight = NF4Weight(
        packed=torch.full((blocks * 32,), 0xFF, dtype=torch.uint8, device=device),
        absmax=(torch.arange(blocks) % 256).to(torch.uint8).to(device),
        code=torch.tensor(CODE, device=device),
        shape=torch.Size([blocks, 64]),
        blocksize=64,
        dtype=torch.float32,
        nested_absmax=torch.tensor([2.0, 10.0], device=device),
        nested_code=torch.arange(256, device=device).float(),
        offset=torch.tensor(0.5, device=device),
    )
    scales = fn(weight)[:, 63].cpu()
    assert scales[[0, 1, 255, 256, 299]].tolist() == [0.5, 2.5, 510.5, 0.5, 430.5]


def test_bitsandbytes_code_book_is_the_papers():
    weight, _, _ = quantised((64, 64))
    torch.testing.assert_close(weight.code, torch.tensor(CODE), rtol=0, atol=1e-7)


def test_reads_a_linear4bit_and_any_storage_dtype(device):
    plain, theirs, _ = quantised((64, 128), device=device)
    stored, _, _ = quantised((64, 128), device=device, storage=torch.bfloat16)
    assert stored.packed.dtype == torch.bfloat16
    assert torch.equal(dequantize_nf4(stored), theirs)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=True)
    with torch.no_grad():
        layer.weight.data.normal_()
    layer = layer.to(device)
    weight = NF4Weight.from_param(layer.weight)
    assert weight.shape == (64, 128) and weight.nested_absmax is not None
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dequantize_nf4(weight), expected)
    # Nothing of bitsandbytes' is copied or changed.
    assert weight.packed.data_ptr() == layer.weight.data_ptr()


def test_a_shard_may_start_at_any_byte(device):
    weight, theirs, _ = quantised((64, 64), device=device)
    for pad in (1, 2, 4):
        shifted = torch.cat([weight.packed.new_zeros(pad), weight.packed.view(-1)])[pad:]
        assert torch.equal(dequantize_nf4(dataclasses.replace(weight, packed=shifted)), theirs)


def test_writes_into_a_reused_buffer(device):
    small, theirs, _ = quantised((8, 64), device=device, seed=1)
    big, theirs_big, _ = quantised((64, 64), device=device, seed=2)
    buffer = torch.full((64 * 64,), 7.0, device=device)
    out = dequantize_nf4(big, out=buffer)
    assert out.data_ptr() == buffer.data_ptr() and torch.equal(out, theirs_big)
    out = dequantize_nf4(small, out=buffer[: 8 * 64])
    assert torch.equal(out, theirs)
    # Nothing is written past the end.
    assert torch.equal(buffer[8 * 64 :], theirs_big.view(-1)[8 * 64 :])


def test_nothing_past_an_odd_end(device):
    weight, theirs, _ = quantised((3, 43), device=device)
    buffer = torch.full((3 * 43 + 8,), 7.0, device=device)
    assert torch.equal(dequantize_nf4(weight, out=buffer[: 3 * 43]), theirs)
    assert (buffer[3 * 43 :] == 7.0).all()


def test_an_empty_weight(device):
    empty = NF4Weight(
        packed=torch.empty(0, dtype=torch.uint8, device=device),
        absmax=torch.empty(0, device=device),
        code=torch.tensor(CODE, device=device),
        shape=torch.Size([0, 64]),
        blocksize=64,
        dtype=torch.bfloat16,
    )
    assert dequantize_nf4(empty).shape == (0, 64)


def test_both_steps_are_one_launch(device):
    """The scales are quantised as well; nothing is unpacked before the kernel, or after it."""
    weight, theirs, _ = quantised((64, 128), device=device)
    assert weight.nested_absmax is not None and weight.absmax.dtype == torch.uint8
    out = torch.zeros(64, 128, device=device)
    assert launches(lambda: dequantize_nf4(weight, out=out)) == {"nf4_dequant_kernel": 1}
    assert torch.equal(out, theirs)
    with torch.profiler.profile() as trace:
        dequantize_nf4(weight, out=out)
    # The interpreter copies to and fro; beside that no torch op computes.
    computed = {event.key for event in trace.key_averages()}
    assert not computed & {"aten::mul", "aten::add", "aten::index", "aten::to", "aten::bitwise_and"}, computed


def test_what_it_refuses(device):
    good, _, _ = quantised((64, 64), device=device)
    weight = torch.randn(64, 64, device=device)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="fp4")
    with pytest.raises(ConfigError, match="fp4.*nf4"):
        NF4Weight.from_param(SimpleNamespace(data=packed, quant_state=state))
    with pytest.raises(ConfigError, match="quantisation state"):
        NF4Weight.from_param(torch.nn.Parameter(weight))
    state.quant_type, state.packing_format_for_cpu = "nf4", True
    with pytest.raises(ConfigError, match="CPU inference packing"):
        NF4Weight.from_param(SimpleNamespace(data=packed, quant_state=state))
    faults = {
        "block size 48": {"blocksize": 48},
        "packed bytes": {"packed": good.packed[1:]},
        "block scales for": {"absmax": good.absmax[1:]},
        "code book is not": {"code": good.code[:8]},
        "uint8 needs the nested scales": {"nested_absmax": None},
        "nested scales for": {"nested_absmax": good.code},
        "256-entry code book": {"offset": None},
    }
    for message, change in faults.items():
        with pytest.raises(ConfigError, match=message):
            dequantize_nf4(dataclasses.replace(good, **change))
    for out in (torch.empty(64, 63, device=device), torch.empty(128, 64, device=device)[::2]):
        with pytest.raises(ConfigError, match="out is"):
            dequantize_nf4(good, out=out)
    with pytest.raises(ConfigError, match="not to torch.float64"):
        dequantize_nf4(good, dtype=torch.float64)


@pytest.mark.skipif(not _runtime.interpreting(), reason="steps a grid by hand")
def test_offsets_past_int32():
    far, numel, per_program = 2**31, 2**31 + 128, 8 * LAUNCH.units
    out, packed = far_flat(numel, torch.bfloat16), far_flat(numel // 8, torch.int32)
    absmax = far_flat(numel // 64, torch.float32)
    packed.view(torch.uint8)[far // 2 :] = 0xF0
    absmax[far // 64 :] = torch.tensor([2.0, 4.0])
    code = torch.tensor(CODE)
    with first_program(far // per_program):
        nf4_dequant_kernel[(1,)](
            packed, absmax, code, code, code, code, out, numel, BLOCKSIZE=64, NESTED_BLOCKSIZE=256, NESTED=False,
            PER_UNIT=8, UNITS=LAUNCH.units,
        )  # fmt: skip
    assert out[far:].tolist() == [2.0, -2.0] * 32 + [4.0, -4.0] * 32


SIGNATURE = {
    "packed_ptr": "*i32", "absmax_ptr": "*u8", "code_ptr": "*fp32", "nested_absmax_ptr": "*fp32",
    "nested_code_ptr": "*fp32", "offset_ptr": "*fp32", "out_ptr": "*bf16", "numel": 4096 * 14336,
}  # fmt: skip
CONSTANTS = {"BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256, "NESTED": True, "PER_UNIT": 8, "UNITS": LAUNCH.units}
SM90 = sm90_case(nf4_dequant_kernel, SIGNATURE, CONSTANTS, num_warps=LAUNCH.num_warps)
SM90_BYTES = sm90_case(
    nf4_dequant_kernel, {**SIGNATURE, "packed_ptr": "*u8"}, {**CONSTANTS, "PER_UNIT": 2}, num_warps=LAUNCH.num_warps
)
SM90_PLAIN = sm90_case(
    nf4_dequant_kernel, {**SIGNATURE, "absmax_ptr": "*fp32", "out_ptr": "*fp32"}, {**CONSTANTS, "NESTED": False},
    num_warps=LAUNCH.num_warps,
)  # fmt: skip


def test_compiles_for_sm90():
    found = assert_fits(SM90)
    # Eight weights leave a thread as one 16-byte store; 32 registers keep 64 warps on an SM.
    assert found.stores == {128: 1}
    assert found.registers <= 32
    assert found.shared == 0


def test_the_other_forms_compile():
    assert_fits(SM90_BYTES)
    assert assert_fits(SM90_PLAIN).stores == {128: 2}


@pytest.mark.slow
def test_sizes_of_one_compile():
    """The launcher makes a constant of every integer argument that is 1."""
    assert_fits(sm90_case(nf4_dequant_kernel, {**SIGNATURE, "numel": 1}, CONSTANTS, num_warps=LAUNCH.num_warps))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "blocksize"), [((1024, 4096), 64), ((77, 129), 64), ((512, 512), 128), ((1, 1), 64)])
def test_equals_bitsandbytes_on_the_gpu(shape, blocksize, dtype):
    for nested in (True, False):
        weight, theirs, _ = quantised(shape, blocksize=blocksize, nested=nested, dtype=dtype, device="cuda")
        ours = dequantize_nf4(weight)
        assert ours.dtype == dtype and torch.equal(ours, theirs)
        assert torch.equal(dequantize_nf4_reference(weight), theirs)


@pytest.mark.gpu
def test_past_two_to_the_31_weights():
    rows = 2**31 // 4096 + 16
    block = quantised((16, 4096), device="cuda")[0]
    tail = dequantize_nf4(block, dtype=torch.bfloat16)
    packed = torch.zeros(rows * 2048, dtype=torch.uint8, device="cuda")
    packed[-16 * 2048 :] = block.packed.view(-1)
    absmax = torch.zeros(rows * 64, dtype=torch.float32, device="cuda")
    nested = block.nested_absmax.repeat_interleave(256)
    absmax[-16 * 64 :] = block.nested_code[block.absmax.int()] * nested + block.offset
    big = NF4Weight(packed, absmax, block.code, torch.Size([rows, 4096]), 64, torch.bfloat16)
    out = dequantize_nf4(big)
    assert torch.equal(out[-16:], tail)
    assert not out[:-16].any()


@pytest.mark.gpu
def test_replays_in_a_cuda_graph():
    weight, theirs, _ = quantised((128, 256), dtype=torch.bfloat16, device="cuda")
    out = torch.empty(128, 256, dtype=torch.bfloat16, device="cuda")
    dequantize_nf4(weight, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dequantize_nf4(weight, out=out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, theirs)
