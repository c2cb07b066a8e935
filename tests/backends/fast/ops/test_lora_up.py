"""Both gradients of LoRA's B from one reading of dout: against their definition in fp64, at edges of tiles and runs."""

from __future__ import annotations

import pytest
import torch

from aligntune.backends.fast.ops import _runtime, lora_up
from aligntune.backends.fast.ops.lora_up import MAX_RANK, UpLaunch, launch_for, lora_up_grads, lora_up_grads_reference
from aligntune.errors import ConfigError
from tests.backends.fast.ops.harness import assert_close_to_truth, assert_fits, far_rows, launches, sm90_case

SMALL = UpLaunch(16, 32, 2, 4, 1)


@pytest.fixture(autouse=True)
def seeded(request):
    """The same numbers in CI each time; fresh ones on a GPU."""
    torch.manual_seed(0) if request.node.get_closest_marker("gpu") is None else torch.seed()


def tensors(tokens, width, rank, dtype, device):
    return [torch.randn(shape, device=device).to(dtype) for shape in ((tokens, width), (width, rank), (tokens, rank))]


def check(dout, up, s, *, eps=1e-6, **options):
    found = lora_up_grads(dout, up, s, scaling=0.5, **options)
    options.pop("ds", None)
    eager = lora_up_grads_reference(dout, up, s, scaling=0.5, **options)
    truth = lora_up_grads_reference(*(x.double() for x in (dout, up, s)), scaling=0.5, dtype=torch.float64)
    for name, ours, theirs, wanted in zip(("dS", "dB"), found, eager, truth, strict=True):
        assert_close_to_truth(ours, theirs, wanted, eps=eps, what=name)
    return found


@pytest.mark.parametrize("tokens,width,rank", [
    (32, 64, 16), (33, 65, 16), (1, 1, 1), (15, 31, 3), (70, 40, 17), (100, 33, 64), (16, 200, 8)])  # fmt: skip
@pytest.mark.parametrize("runs", [1, 3, 50])
def test_shapes(runs, tokens, width, rank, device):
    launch = UpLaunch(16, 32, runs, 4, 1)
    check(*tensors(tokens, width, rank, torch.float32, device), launch=launch)


def test_more_parts_than_are_summed_at_once(device):
    """Ten runs of rows and eleven of columns."""
    check(*tensors(160, 340, 5, torch.float32, device), launch=UpLaunch(16, 32, 10, 4, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
def test_half_precision(of, dtype, device):
    # The interpreter truncates to bf16 where a GPU rounds: twice the error of one rounding.
    eps = 2**-8 if _runtime.interpreting() else 1e-6
    ds, grad = check(*tensors(70, 130, 16, dtype, device), dtype=of, eps=eps)
    assert ds.dtype == dtype and grad.dtype == of


def test_rows_at_any_stride_and_a_place_to_write_to(device):
    """As a group of layers has them: parts of S and of dS side by side, and what is beside them stays."""
    dout, up, s = tensors(37, 50, 6, torch.float32, device)
    wide = torch.full((37, 100), 7.0, device=device)
    wide[:, 25:75] = dout
    beside, into = (torch.full((37, 16), 5.0, device=device) for _ in range(2))
    beside[:, 8:14] = s
    ds, _ = check(wide[:, 25:75], up, beside[:, 8:14], ds=into[:, 8:14], launch=SMALL)
    assert ds.data_ptr() == into[:, 8:].data_ptr()
    assert (into[:, :8] == 5).all() and (into[:, 14:] == 5).all()
    expanded = torch.ones((), device=device).expand(37, 50)  # of `sum().backward()`
    check(expanded, up, s, launch=SMALL)


def test_rows_far_apart(device):
    rows = 5
    dout = far_rows(rows, 40, torch.float32, device)
    dout.copy_(torch.randn(rows, 40))
    _, up, s = tensors(rows, 40, 4, torch.float32, device)
    check(dout, up, s, launch=SMALL)


def test_no_rows_and_no_columns(device):
    ds, grad = lora_up_grads(*tensors(0, 8, 4, torch.float32, device))
    assert ds.shape == (0, 4) and grad.shape == (8, 4) and not grad.any()
    ds, grad = lora_up_grads(*tensors(8, 0, 4, torch.float32, device))
    assert ds.shape == (8, 4) and not ds.any() and grad.shape == (0, 4)


def test_two_launches_whatever_the_size(device):
    given = tensors(70, 130, 16, torch.float32, device)
    assert launches(lambda: lora_up_grads(*given)) == {"lora_up_parts_kernel": 1, "lora_up_sum_kernel": 1}


def test_what_cannot_be_read_is_refused(device):
    dout, up, s = tensors(8, 12, 4, torch.float32, device)
    for given, word in (((dout, up.t(), s), r"\(T, N\)"), ((dout, up, s[:, :3]), r"\(T, r\)"),
                        ((dout, up.half(), s), "of one type"), ((dout.int(), up.int(), s.int()), "bf16, fp16 or fp32")):
        with pytest.raises(ConfigError, match=word):
            lora_up_grads(*given)
    with pytest.raises(ConfigError, match="from 1 to 64"):
        lora_up_grads(*tensors(8, 12, MAX_RANK + 1, torch.float32, device))
    for ds in (torch.empty(8, 3), torch.empty(8, 4, dtype=torch.float16), torch.empty(4, 8).t()):
        with pytest.raises(ConfigError, match="rows of stride 1"):
            lora_up_grads(dout, up, s, ds=ds.to(device))
    with pytest.raises(ConfigError, match="float64"):
        lora_up_grads(*(x.double() for x in (dout, up, s)))


def test_a_machine_is_filled():
    """All SMs but a few have as many programs, and dB's columns take no more registers at a higher rank."""
    for width in (512, 1024, 2048, 2560, 4096, 9728, 14336):
        for rank in (8, 16, 32, 64):
            launch = launch_for(8192, width, rank, 132)
            programs = -(-width // launch.columns) * launch.runs
            waves = -(-programs // 132)
            assert programs >= 0.9 * 132 * waves or launch.runs == 8192 // launch.rows
            assert launch.columns * max(16, rank) <= 32 * 32 * launch.num_warps and launch.rows == 64
    assert launch_for(40, 4096, 16, 132).runs == launch_for(40, 40000, 16, 132).runs == 1


def test_tiles_that_were_measured():
    found = {(tokens, width): launch_for(tokens, width, 16, 132) for tokens, width in (
        (8192, 512), (8192, 2560), (4096, 2048), (8192, 4096), (8192, 9728))}  # fmt: skip
    assert found == {(8192, 512): UpLaunch(64, 128, 33), (8192, 2560): UpLaunch(64, 256, 13),
                     (4096, 2048): UpLaunch(64, 256, 16), (8192, 4096): UpLaunch(64, 256, 16),
                     (8192, 9728): UpLaunch(64, 512, 13, 8, 2)}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ sm_90


def sm90(width, rank, dtype="bf16"):
    launch = launch_for(8192, width, rank, 132)
    x, f = f"*{dtype}", "*fp32"
    block_r = max(16, _runtime.next_power_of_2(rank))
    signature = {"dout_ptr": x, "dout_row": width, "up_ptr": x, "s_ptr": x, "s_row": 3 * block_r, "ds_part_ptr": f,
                 "up_part_ptr": f, "tokens": "i32", "run": "i32"}  # fmt: skip
    constants = {"N": width, "R": rank, "BLOCK_T": launch.rows, "BLOCK_N": launch.columns, "BLOCK_R": block_r,
                 "STAGES": launch.stages, "UPCAST": False}  # fmt: skip
    return sm90_case(lora_up.lora_up_parts_kernel, signature, constants, num_warps=launch.num_warps)


def sm90_sum(width, rank):
    f = "*fp32"
    signature = {"ds_part_ptr": f, "up_part_ptr": f, "ds_ptr": "*bf16", "ds_row": 48, "grad_ptr": f, "tokens": "i32",
                 "ds_parts": "i32", "up_parts": "i32", "scaling": "fp32"}  # fmt: skip
    constants = {"N": width, "R": rank, "BLOCK_R": max(16, _runtime.next_power_of_2(rank)),
                 "BLOCK_P": lora_up._SUMMED_PARTS, "BLOCK_T": lora_up._SUMMED_ROWS}  # fmt: skip
    return sm90_case(lora_up.lora_up_sum_kernel, signature, constants, num_warps=4)


CASES = {(width, rank): sm90(width, rank) for width, rank in (
    (512, 16), (2048, 16), (9728, 16), (8192, 8), (4096, 64), (8192, 64))}  # fmt: skip
SUMS = {rank: sm90_sum(2048, rank) for rank in (16, 64)}


@pytest.mark.parametrize("width,rank", CASES)
def test_compiles_for_sm90(width, rank):
    """16 bytes a load, products on tensor cores that are not serialised, and all stages in shared memory."""
    found = assert_fits(CASES[width, rank], load_bits=128)
    launch = launch_for(8192, width, rank, 132)
    assert 0 < found.arrivals < found.mma
    assert found.shared >= launch.stages * launch.rows * launch.columns * 2


@pytest.mark.parametrize("rank", SUMS)
def test_sums_compile_for_sm90(rank):
    assert_fits(SUMS[rank], load_bits=128)


# ------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("tokens,width,rank", [
    (8192, 9728, 16), (4096, 2048, 16), (3000, 1024, 64), (1000, 4104, 24), (100, 2048, 8)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_the_gpu(dtype, tokens, width, rank):
    given = tensors(tokens, width, rank, dtype, "cuda")
    first = check(*given)
    again = lora_up_grads(*given, scaling=0.5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
