"""Decode attention over a paged cache: against dense attention in float64, and the write that fills the cache."""

from __future__ import annotations

import pytest
import torch

from aligntune.backends.fast.ops import decode_attention as op
from aligntune.backends.fast.ops.decode_attention import (
    decode_attention,
    decode_attention_kernel,
    decode_attention_reference,
    decode_attention_sum,
    launch_for,
    write_kv,
    write_kv_kernel,
    write_kv_reference,
)
from aligntune.errors import ConfigError
from tests.backends.fast.ops.harness import assert_close_to_truth, assert_fits, resources, sm90_case


def case(lengths, *, q_heads=4, k_heads=2, head_dim=12, page=4, dtype=torch.float32, device="cpu", seed=0):
    """q, pages, a table whose pages are shuffled, lengths; what lies beyond a row's end is NaN."""
    g = torch.Generator().manual_seed(seed)
    per_row = [-(-n // page) for n in lengths]
    order = (torch.randperm(sum(per_row), generator=g) + 1).tolist()
    table = torch.zeros(len(lengths), max(per_row) + 2, dtype=torch.int32)
    pages = torch.full((2, sum(per_row) + 1, k_heads, page, head_dim), float("nan"))
    dense = []
    for row, n in enumerate(lengths):
        own = [order.pop() for _ in range(per_row[row])]
        table[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
        kv = torch.randn(2, n, k_heads, head_dim, generator=g).to(dtype).float()
        for at in range(n):
            pages[:, own[at // page], :, at % page] = kv[:, at]
        dense.append(kv.double())
    q = torch.randn(len(lengths), q_heads, head_dim, generator=g).to(dtype)
    to = lambda t: t.to(device)  # noqa: E731
    return (to(q), to(pages[0].to(dtype)), to(pages[1].to(dtype)), to(table),
            to(torch.tensor(lengths, dtype=torch.int32))), dense


def truth(q, dense, *, scale, window=None, softcap=None):
    out = []
    for row, kv in enumerate(dense):
        n = kv.shape[1]
        if not n:
            out.append(torch.zeros(q.shape[1:], dtype=torch.float64))
            continue
        k, v = (x.repeat_interleave(q.shape[1] // kv.shape[2], dim=1) for x in kv)
        s = torch.einsum("hd,nhd->hn", q[row].double().cpu(), k) * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        if window:
            s[:, : max(0, n - window)] = float("-inf")
        out.append(torch.einsum("hn,nhd->hd", s.softmax(-1), v))
    return torch.stack(out)


OPTIONS = [{}, {"window": 5}, {"softcap": 2.0}, {"window": 3, "softcap": 1.5}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("fn", [decode_attention, decode_attention_reference])
def test_equals_dense_attention(fn, options, device):
    arguments, dense = case([1, 4, 0, 7, 13], device=device)
    out = fn(*arguments, scale=0.3, **options)
    expected = truth(arguments[0], dense, scale=0.3, **options)
    assert out.shape == arguments[0].shape and out[2].abs().max() == 0
    torch.testing.assert_close(out.double().cpu(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("q_heads,k_heads,head_dim,page", [(4, 4, 16, 16), (6, 1, 5, 2), (18, 1, 33, 8)])
def test_odd_shapes(q_heads, k_heads, head_dim, page, device):
    arguments, dense = case([3, 70, 1], q_heads=q_heads, k_heads=k_heads, head_dim=head_dim, page=page, device=device)
    out = decode_attention(*arguments, scale=0.2)
    torch.testing.assert_close(out.double().cpu(), truth(arguments[0], dense, scale=0.2), atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("window", [None, 90])
def test_split_rows(window, device, monkeypatch):
    """Long rows beside short ones: pieces without a token of their row count for nothing."""
    arguments, dense = case([300, 1, 66], page=16, device=device)
    monkeypatch.setattr(op, "launch_for", lambda *a, **k: op.DecodeLaunch(16, 16, 64, splits=4))
    out = decode_attention(*arguments, scale=0.3, window=window)
    expected = truth(arguments[0], dense, scale=0.3, window=window)
    torch.testing.assert_close(out.double().cpu(), expected, atol=3e-6, rtol=3e-6)


def test_strided_query(device):
    arguments, dense = case([3, 9], device=device)
    wide = torch.zeros(4, 2, 12, device=device)  # heads first, as the projections' views are
    wide.copy_(arguments[0].transpose(0, 1))
    q = wide.transpose(0, 1)
    assert not q.is_contiguous()
    out = decode_attention(q, *arguments[1:], scale=0.3)
    torch.testing.assert_close(out.double().cpu(), truth(q, dense, scale=0.3), atol=2e-6, rtol=2e-6)


def test_shapes_that_do_not_fit_are_refused():
    (q, k, v, table, lengths), _ = case([3, 9])
    with pytest.raises(ConfigError, match="contiguous"):
        decode_attention(q, k, v[:-1], table, lengths, scale=1.0)
    with pytest.raises(ConfigError, match="does not fit"):
        decode_attention_reference(q[..., :8], k, v, table, lengths, scale=1.0)


@pytest.mark.parametrize("fn", [write_kv, write_kv_reference])
def test_write(fn, device):
    g = torch.Generator().manual_seed(3)
    k, v = (torch.randn(2, 5, 12, generator=g).to(device).transpose(0, 1) for _ in range(2))  # (5 tokens, 2 heads, 12)
    k_pages, v_pages = (torch.full((4, 2, 3, 12), 7.0, device=device) for _ in range(2))
    slots = torch.tensor([0, 11, -1, 5, 7], device=device)
    fn(k, v, slots, k_pages, v_pages)
    for new, pages in ((k, k_pages), (v, v_pages)):
        expected = torch.full((4, 2, 3, 12), 7.0, device=device)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[slot // 3, :, slot % 3] = new[token]
        assert torch.equal(pages, expected)


def placed(k, v, *, before=False):
    """The pages' copies elsewhere, with what says where; the anchor lies before them, or behind."""
    memory = torch.full((2, 48 + k.numel() + v.numel()), float("nan"), dtype=k.dtype, device=k.device)
    own, anchor = memory[0], memory[1, :16]
    if before:
        own, anchor = memory[1], memory[0, :16]
    starts = (16, 16 + -(-k.numel() // 16) * 16)
    for start, pages in zip(starts, (k, v), strict=True):
        own[start : start + pages.numel()] = pages.flatten()
    elements = [(own.data_ptr() - anchor.data_ptr()) // k.element_size() + start for start in starts]
    return op.Place(anchor, torch.tensor(elements, device=k.device)), own, starts


@pytest.mark.parametrize("before", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_that_lie_elsewhere(dtype, before, device):
    """The pages that the launch is given are neither read nor written; the interpreter takes any address too."""
    (q, k, v, table, lengths), _ = case([1, 4, 0, 7, 13], head_dim=16, dtype=dtype, device=device)
    expected = decode_attention(q, k, v, table, lengths, scale=0.3)
    place, own, (at_k, at_v) = placed(k, v, before=before)
    assert (int(place.elements[0]) < 0) is not before
    blank = torch.full_like(k, float("nan"))
    assert torch.equal(decode_attention(q, blank, blank, table, lengths, scale=0.3, place=place), expected)
    new = torch.ones(1, 2, 16, dtype=dtype, device=device)
    untouched, whole = blank.clone(), own.clone()
    write_kv(new, 2 * new, torch.tensor([5], device=device), blank, blank, place=place)
    for start, pages, value in ((at_k, k, 1), (at_v, v, 2)):
        line = whole[start : start + pages.numel()].view_as(pages)
        line[5 // 4, :, 5 % 4] = value
    torch.testing.assert_close(own, whole, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(blank, untouched, rtol=0, atol=0, equal_nan=True)


def test_an_anchor_of_another_type_is_refused(device):
    (q, k, v, table, lengths), _ = case([3, 9], device=device)
    place = op.Place(torch.zeros(16, dtype=torch.bfloat16, device=device), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="an anchor in torch.bfloat16 of pages in torch.float32"):
        decode_attention(q, k, v, table, lengths, scale=1.0, place=place)


def test_launch_splits_only_where_processors_are_idle():
    assert launch_for(64, 32, 8, 64, 2048, sms=132).splits == 1
    assert launch_for(1, 32, 8, 64, 8192, sms=132).splits == 32
    assert launch_for(8, 32, 8, 128, 4096, sms=132).splits == 8
    assert launch_for(1, 32, 8, 64, 100, sms=132).splits == 1  # too short to share out


SIGNATURE = {
    "q_ptr": "*bf16", "q_row": 2048, "q_head": 64, "k_ptr": "*bf16", "v_ptr": "*bf16",
    "elements_ptr": "*i64", "table_ptr": "*i32", "table_row": 160, "lengths_ptr": "*i32", "out_ptr": "*bf16",
    "partial_ptr": "*fp32", "stats_ptr": "*fp32",
}  # fmt: skip


def sm90(head_dim, splits, *, window=0, softcap=0.0, dtype="bf16", moves=True):
    launch = launch_for(64, 32, 8, head_dim, 4096, sms=132, itemsize=4 if dtype == "fp32" else 2)
    constants = {
        "MOVES": moves, "SCALE": 0.125, "HK": 8, "GROUP": 4, "D": head_dim, "PAGE": 16, "WINDOW": window,
        "SOFTCAP": softcap, "SPLITS": splits, "UPCAST": False, "BLOCK_G": launch.block_g, "BLOCK_D": launch.block_d,
        "BLOCK_N": launch.block_n, "STAGES": launch.stages,
    }  # fmt: skip
    signature = {name: f"*{dtype}" if kind == "*bf16" else kind for name, kind in SIGNATURE.items()}
    return sm90_case(decode_attention_kernel, signature, constants, num_warps=launch.num_warps)


FP32 = [sm90(head_dim, splits, dtype="fp32") for head_dim in (64, 256) for splits in (1, 8)]
CASES = {"d64": sm90(64, 1), "d128": sm90(128, 4), "d256": sm90(256, 1, window=4096, softcap=50.0)}
FIXED = sm90(64, 1, moves=False)
SUM = sm90_case(decode_attention_sum, {"partial_ptr": "*fp32", "stats_ptr": "*fp32", "out_ptr": "*bf16"},
                {"D": 128, "SPLITS": 8, "BLOCK_D": 128}, num_warps=2)  # fmt: skip
WRITE = sm90_case(
    write_kv_kernel,
    {"k_ptr": "*bf16", "k_token": 512, "k_head": 64, "v_ptr": "*bf16", "v_token": 512, "v_head": 64,
     "slots_ptr": "*i64", "k_pages": "*bf16", "v_pages": "*bf16", "elements_ptr": "*i64"},
    {"MOVES": True, "HK": 8, "D": 64, "PAGE": 16, "BLOCK_H": 8, "BLOCK_D": 64}, num_warps=2,
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_compiles_for_sm90(name):
    found = assert_fits(CASES[name])
    assert found.mma > 0


def test_pages_that_move_are_read_as_wide_as_others():
    """Of keys and values 16 bytes a thread at a time, by the same number of instructions; registers within a few."""
    moving, fixed = resources(CASES["d64"]), resources(FIXED)
    assert moving.loads[128] == fixed.loads[128] and moving.mma == fixed.mma
    assert moving.registers <= fixed.registers + 8


@pytest.mark.slow
def test_fp32_does_not_spill():
    for one in FP32:
        assert_fits(one)


def test_the_small_kernels_compile():
    assert_fits(SUM)
    assert_fits(WRITE, load_bits=128)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("options", OPTIONS)
def test_on_the_gpu(dtype, head_dim, options):
    lengths = [1, 2, 17, 300, 64, 65, 1000]
    arguments, dense = case(lengths, q_heads=32, k_heads=8, head_dim=head_dim, page=16, dtype=dtype, device="cuda")
    scale = head_dim**-0.5
    eager = decode_attention_reference(*arguments, scale=scale, **options)
    ours = decode_attention(*arguments, scale=scale, **options)
    expected = truth(arguments[0], dense, scale=scale, **options)
    assert_close_to_truth(ours.cpu(), eager.cpu(), expected, eps=2e-6)


@pytest.mark.gpu
def test_one_captured_launch_serves_any_lengths():
    arguments, _ = case([300, 7, 64], q_heads=8, k_heads=2, head_dim=64, page=16, dtype=torch.bfloat16, device="cuda")
    lengths = arguments[4]
    decode_attention(*arguments, scale=0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(*arguments, scale=0.1)
    for new in ([1, 7, 3], [299, 2, 64]):
        lengths.copy_(torch.tensor(new, dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, decode_attention(*arguments, scale=0.1))


@pytest.mark.gpu
def test_a_captured_launch_follows_its_pages():
    (q, k, v, table, lengths), _ = case([300, 7, 64], q_heads=8, k_heads=2, head_dim=64, page=16, dtype=torch.bfloat16,
                                        device="cuda")
    expected = decode_attention(q, k, v, table, lengths, scale=0.1)
    blank = torch.full_like(k, float("nan"))
    anchor = torch.zeros(16, dtype=k.dtype, device="cuda")
    place = op.Place(anchor, torch.zeros(2, dtype=torch.int64, device="cuda"))

    def at(*pages):
        place.elements.copy_(torch.tensor([(x.data_ptr() - anchor.data_ptr()) // 2 for x in pages]))

    at(k, v)
    new, slots = k[1, :, :5].transpose(0, 1).contiguous(), torch.arange(5, device="cuda")
    decode_attention(q, blank, blank, table, lengths, scale=0.1, place=place)
    write_kv(new, new, slots, blank, blank, place=place)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, blank, blank, table, lengths, scale=0.1, place=place)
        write_kv(new, new, slots, blank, blank, place=place)
    for _ in range(3):
        k, v = k.clone(), v.clone()
        at(k, v)
        graph.replay()
        assert torch.equal(out, expected)
        assert all(torch.equal(pages[0, :, :5].transpose(0, 1), new) for pages in (k, v))
    assert blank.isnan().all()
