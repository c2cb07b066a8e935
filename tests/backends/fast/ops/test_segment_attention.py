"""Attention over segments end to end: against its definition in fp64, at edges of tiles, segments and prompts."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from aligntune.backends.fast.ops import _runtime
from aligntune.backends.fast.ops import _segment_kernels as kernels
from aligntune.backends.fast.ops import segment_attention as op
from aligntune.backends.fast.ops.segment_attention import (
    Launches,
    SharedPrompts,
    TileLaunch,
    attend_in_tiles,
    launch_for,
    segment_attention,
    segment_attention_reference,
)
from aligntune.errors import ConfigError
from tests.backends.fast.ops.harness import assert_close_to_truth, assert_fits, far_rows, launches, sm90_case
from tests.backends.fast.ops.segment_cases import ONE_USER, PLAIN, SHARED, Layout, compare, run, tensors

# Of rows that are none numpy, which plays the GPU here, takes logarithms of 0.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value) encountered")

SMALL = TileLaunch(32, 16, 4, 1)


@pytest.fixture(autouse=True)
def seeded(request):
    """The same numbers in CI each time; fresh ones on a GPU."""
    torch.manual_seed(0) if request.node.get_closest_marker("gpu") is None else torch.seed()


def tiled(*, compact=None, tile=SMALL):
    return functools.partial(attend_in_tiles, Launches(tile, tile, tile, compact))


@pytest.mark.parametrize("window", [None, 1, 7, 17, 21])
@pytest.mark.parametrize("compact", [False, True], ids=["as if all were longest", "searched"])
def test_segments(compact, window, device):
    compare(tiled(compact=compact), tensors(PLAIN, (4, 1), 16, torch.float32, device), PLAIN, window=window)


@pytest.mark.parametrize("window", [None, 3, 9, 16, 24])
@pytest.mark.parametrize("layout", [SHARED, ONE_USER], ids=["shared", "one user"])
def test_shared_prompts(layout, window, device):
    """Windows within a segment, within its prompt, and across the border of the two."""
    compare(tiled(), tensors(layout, (4, 1), 16, torch.float32, device), layout, window=window)


@pytest.mark.parametrize("heads,head_dim,layout", [
    ((2, 2), 24, PLAIN), ((7, 1), 16, PLAIN), ((7, 1), 24, ONE_USER), ((6, 2), 64, ONE_USER), ((1, 1), 5, PLAIN),
    ((32, 1), 16, ONE_USER)])  # fmt: skip
def test_heads(heads, head_dim, layout, device):
    tile = TileLaunch(max(16, _runtime.next_power_of_2(heads[0] // heads[1])), 16, 4, 1)
    compare(tiled(tile=tile), tensors(layout, heads, head_dim, torch.float32, device), layout)


@pytest.mark.parametrize("layout", [PLAIN, SHARED], ids=["plain", "shared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, layout, device):
    # The interpreter truncates to bf16 where a GPU rounds: twice the error of one rounding.
    eps = 2**-8 if dtype == torch.bfloat16 and _runtime.interpreting() else 1e-6
    compare(segment_attention, tensors(layout, (4, 1), 24, dtype, device), layout, eps=eps)


@pytest.mark.parametrize("layout", [PLAIN, SHARED], ids=["plain", "shared"])
def test_launches_change_no_bit(layout, device):
    """How programs find their tiles changes none; tiles of other sizes do."""
    inputs = tensors(layout, (4, 1), 16, torch.float32, device)
    first, searched = (run(tiled(compact=compact), *inputs, layout) for compact in (False, True))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, searched, strict=True))
    wider = run(tiled(tile=TileLaunch(32, 64, 4, 1)), *inputs, layout)
    for a, b in zip(first, wider, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def tokens_of(layout, segment):
    return slice(sum(layout.lengths[:segment]), sum(layout.lengths[: segment + 1]))


@pytest.mark.parametrize("layout,segment,seen", [
    (PLAIN, 5, ()), (SHARED, 2, ()), (SHARED, 4, (1,)), (SHARED, 3, (0,))])
def test_no_segment_moves_another(layout, segment, seen, device):
    """Of a segment that others go on from, nothing but what they gave its keys."""
    inputs = tensors(layout, (4, 1), 16, torch.float32, device)
    before = run(tiled(), *inputs, layout)
    its = tokens_of(layout, segment)
    moved = [x.detach().clone() for x in inputs]
    for x in moved[:3]:
        x[:, :, its] += 1
    moved[3][:, its] -= 1
    after = run(tiled(), *(x.requires_grad_() for x in moved[:3]), moved[3], layout)
    for number, (a, b) in enumerate(zip(before, after, strict=True)):
        if number:
            a, b = a.transpose(1, 2), b.transpose(1, 2)
        for other in range(len(layout.lengths)):
            at = tokens_of(layout, other)
            same = torch.equal(a[:, at], b[:, at])
            assert same is not (other == segment or (other in seen and number > 1)) or not layout.lengths[other]


def test_a_segment_alone_gives_the_same_bits(device):
    inputs = tensors(PLAIN, (4, 1), 16, torch.float32, device)
    among = run(tiled(), *inputs, PLAIN)
    for segment in (2, 3):
        its = tokens_of(PLAIN, segment)
        own = [x.detach()[:, :, its].requires_grad_() for x in inputs[:3]] + [inputs[3][:, its]]
        alone = run(tiled(), *own, Layout((PLAIN.lengths[segment],)))
        assert torch.equal(alone[0], among[0][:, its])
        assert all(torch.equal(a, b[:, :, its]) for a, b in zip(alone[1:], among[1:], strict=True))


def whole_rows(layout):
    """Each token of rows that begin with their prompt, by its number among the segments'."""
    rows = []
    for segment, before in enumerate(layout.before):
        first = tokens_of(layout, layout.group[segment]).start if before else 0
        its = tokens_of(layout, segment)
        rows.append([*range(first, first + before), *range(its.start, its.stop)])
    return rows


def test_equals_whole_rows(device):
    """Shared prompts against rows that hold a copy each: results of the segments', sums of the copies' gradients."""
    q, k, v, dout = tensors(SHARED, (4, 1), 16, torch.float32, device)
    rows = whole_rows(SHARED)
    index = torch.tensor([token for row in rows for token in row], device=device)
    own = torch.cat([torch.arange(len(row), device=device) >= before
                     for row, before in zip(rows, SHARED.before, strict=True)])
    whole = [x.detach()[:, :, index].requires_grad_() for x in (q, k, v)]
    upstream = dout[:, index] * own[:, None, None]
    out, *grads = run(tiled(), *whole, upstream, Layout(tuple(map(len, rows))))
    found = run(tiled(), q, k, v, dout, SHARED)
    torch.testing.assert_close(found[0], out[:, own], atol=2e-6, rtol=2e-6)
    for a, b in zip(found[1:], grads, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a).index_add_(2, index, b), atol=5e-6, rtol=5e-6)


def as_(kind, x):
    """The same numbers otherwise laid; the last dimension stays contiguous but for the last kind."""
    if kind == "heads first":
        return x.detach().contiguous()
    if kind == "sliced":
        wide = torch.full((*x.shape[:-1], 3 * x.shape[-1]), float("nan"), device=x.device)
        part = wide[..., x.shape[-1] : 2 * x.shape[-1]]
        return part.copy_(x.detach())
    return x.detach().transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("kind", ["heads first", "sliced", "columns"])
def test_strides(kind, device):
    q, k, v, dout = tensors(ONE_USER, (4, 2), 16, torch.float32, device)
    expected = run(tiled(), q, k, v, dout, ONE_USER)
    other = [as_(kind, x) for x in (q, k, v, dout)]
    assert all(a.stride() != b.stride() for a, b in zip(other, (q, k, v, dout), strict=True)) or kind == "heads first"
    found = run(tiled(), *(x.requires_grad_() for x in other[:3]), other[3], ONE_USER)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(found, expected, strict=True))


def test_a_gradient_of_stride_0(device):
    q, k, v, _ = tensors(ONE_USER, (4, 2), 16, torch.float32, device)
    one = torch.ones(1, device=device).expand(1, 14, 4, 16)
    compare(tiled(), [q, k, v, one], ONE_USER)


def test_gradients_that_are_not_wanted(device):
    q, k, v, dout = (x.detach() for x in tensors(ONE_USER, (4, 2), 16, torch.float32, device))
    options = ONE_USER.options(device)
    expected = run(tiled(), *(x.clone().requires_grad_() for x in (q, k, v)), dout, ONE_USER)
    for number, x in enumerate((q, k, v)):
        x.requires_grad_()
        out = tiled()(q, k, v, scale=0.3, **options)
        counted = launches(lambda out=out, x=x: out.backward(dout))
        assert counted == {"segment_attention_dq": 1} | ({"segment_attention_dkv": 1} if number else {})
        assert torch.equal(x.grad, expected[number + 1])
        x.requires_grad_(False)
    assert not segment_attention(q, k, v, scale=0.3, **options).requires_grad


def test_no_tokens(device):
    q, k, v = (torch.randn(1, n, 0, 16, device=device, requires_grad=True) for n in (4, 2, 2))
    ends = torch.zeros(3, dtype=torch.int32, device=device)
    out = segment_attention(q, k, v, ends, max_seqlen=8, scale=1.0)
    assert out.shape == (1, 0, 4, 16)
    assert segment_attention_reference(q, k, v, ends, max_seqlen=8, scale=1.0).shape == out.shape


@pytest.mark.parametrize("far", ["tokens", "heads"])
def test_offsets_beyond_int32(far, device):
    """q, k, v and the gradient with five tokens, or heads, 2^29 elements apart."""
    layout = Layout((3, 2), (0, 3), (0, 0), ((1,),)) if far == "tokens" else Layout((2,))
    heads = 1 if far == "tokens" else 5
    near = tensors(layout, (heads, heads), 16, torch.float16, device)
    expected = run(tiled(), *near, layout)

    def spread(like):
        count = 5 if far == "tokens" else 10
        step = 2**29 if far == "tokens" else 16
        if far == "tokens":
            rows = far_rows(count, 16, torch.float16, device, stride=step).view(1, 1, 5, 16)
        else:
            rows = far_rows(5, 32, torch.float16, device).view(1, 5, 2, 16)
        return rows.copy_(like.detach())

    q, k, v = (spread(x).requires_grad_() for x in near[:3])
    dout = spread(near[3].transpose(1, 2)).transpose(1, 2)
    found = run(tiled(), q, k, v, dout, layout)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(found, expected, strict=True))


def i32(*x):
    return torch.tensor(x, dtype=torch.int32)


REFUSED = {
    "must be \\(1, heads, T, head_dim\\)": {"k": torch.zeros(1, 2, 6, 16)},
    "over 3 key heads": {"k": torch.zeros(1, 3, 5, 16), "v": torch.zeros(1, 3, 5, 16)},
    "at most 256 wide": {"q": torch.zeros(1, 4, 5, 257), "k": torch.zeros(1, 2, 5, 257),
                         "v": torch.zeros(1, 2, 5, 257)},
    "must be of one type": {"v": torch.zeros(1, 2, 5, 16, dtype=torch.float16)},
    "must be \\(segments \\+ 1,\\) int32": {"cu_seqlens": torch.tensor([0, 5])},
    "2 segments of at most 2 tokens cannot hold 5 tokens": {"max_seqlen": 2},
    "scale 0 and": {"scale": 0},
    "window 0 must": {"window": 0},
    "shared prompts of 2 segments: before \\(1,\\)": {"shared": SharedPrompts(i32(0), i32(0, 0), i32([1]))},
    "they must be contiguous int32": {"shared": SharedPrompts(i32(0, 3), i32(0, 0), torch.tensor([[1]]))},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("fn", [segment_attention, segment_attention_reference])
def test_what_does_not_fit_is_refused(fn, message):
    given = {"q": torch.zeros(1, 4, 5, 16), "k": torch.zeros(1, 2, 5, 16), "v": torch.zeros(1, 2, 5, 16),
             "cu_seqlens": i32(0, 3, 5), "max_seqlen": 3, "scale": 1.0} | REFUSED[message]  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        fn(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("cu_seqlens"), **given)


def test_fp64_is_refused():
    q, k, v, dout = tensors(ONE_USER, (4, 2), 16, torch.float64, "cpu")
    with pytest.raises(ConfigError, match="float64"):
        run(segment_attention, q, k, v, dout, ONE_USER)


def test_a_gpu_with_little_shared_memory_loads_no_wide_tile_ahead():
    """Of 256: 106,496 bytes forward and 102,656 of keys with two stages, and no more than 98,304 so."""
    small = [launch_for(256, group, 2, shared_memory=101376) for group in (1, 4, 8)]
    assert all(tile.stages == 1 for one in small for tile in (one.forward, one.dq, one.dkv))
    assert [(one.dkv.rows, one.dkv.keys) for one in small] == [(32, 32)] * 3
    assert launch_for(256, 4, 2, shared_memory=167936) == launch_for(256, 4, 2)  # sm_80
    assert launch_for(128, 4, 2, shared_memory=101376) == launch_for(128, 4, 2)


def test_how_many_programs(device):
    """Every segment as if it were the longest where that is no more than twice what there is; a search otherwise."""
    q = torch.zeros(1, 32, 4240, 64, device=device, dtype=torch.bfloat16)
    tile = TileLaunch(128, 64, 4, 3)
    chosen = Launches(tile, tile, tile)

    def ask(segments, longest, keys=False, shared=None):
        ends = torch.zeros(segments + 1, dtype=torch.int32, device=device)
        return op._arguments(q, q[:, :8], ends, shared, tile, keys, longest, 0.1, 0, chosen)

    (programs,), _, constants = ask(16, 300)
    assert programs == 10 * 16 * 8 and not constants["COMPACT"]
    (programs,), _, constants = ask(16, 2048)
    assert programs == (4240 // 32 + 16) * 8 and constants["COMPACT"]
    (programs,), _, constants = ask(16, 2048, keys=True)
    assert programs == (4240 // 64 + 16) * 8 and constants["BLOCK_S"] == 32
    shared = SharedPrompts(*(torch.zeros(3, dtype=torch.int32),) * 2, torch.zeros((2, 4), dtype=torch.int32))
    (_,), numbers, constants = ask(40, 300, shared=shared)
    assert numbers == (40, 4240, 10, 2) and constants["COMPACT"] and constants["BLOCK_S"] == 128


# ------------------------------------------------------------------------------------------------------ sm_90


def sm90(which, head_dim, *, heads=(32, 8), dtype="bf16", window=0, shared=False, compact=True):
    group = heads[0] // heads[1]
    launch = getattr(launch_for(head_dim, group, 4 if dtype == "fp32" else 2), which)
    x = f"*{dtype}"
    factors = {"q_ptr": x, "q_token": heads[0] * head_dim, "q_head": head_dim, "k_ptr": x,
               "k_token": heads[1] * head_dim, "k_head": head_dim, "v_ptr": x, "v_token": heads[1] * head_dim,
               "v_head": head_dim}  # fmt: skip
    dout = {"dout_ptr": x, "dout_token": heads[0] * head_dim, "dout_head": head_dim}
    rows = {"lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    own = {"forward": {"out_ptr": x, "lse_ptr": "*fp32"}, "dq": {"out_ptr": x, **dout, **rows, "dq_ptr": x},
           "dkv": {**dout, **rows, "dk_ptr": x, "dv_ptr": x}}[which]  # fmt: skip
    last = {"ends_ptr": "*i32", "before_ptr": "*i32", "users_ptr" if which == "dkv" else "group_ptr": "*i32",
            "segments": "i32", "tokens": "i32", "tiles": "i32", "prompts": "i32"}  # fmt: skip
    if which == "dkv":
        last["most"] = "i32"
    constants = {
        "SCALE": 0.18, "HK": heads[1], "GROUP": group, "G": _runtime.next_power_of_2(group), "D": head_dim,
        "WINDOW": window, "SHARED": shared, "COMPACT": compact, "UPCAST": False, "BLOCK_S": 32,
        "BLOCK_M": launch.rows, "BLOCK_N": launch.keys, "BLOCK_D": op._block_d(head_dim), "STAGES": launch.stages,
    }  # fmt: skip
    kernel = getattr(kernels, f"segment_attention_{which}")
    return sm90_case(kernel, {**factors, **own, **last}, constants, num_warps=launch.num_warps), launch


WHICH = ("forward", "dq", "dkv")
# Those of up to 128 in 16 bits are the fastest on an H100 all the same, as Triton 3.6 compiles them; 3.9 spills more.
SPILLS = {("dkv", 64, "bf16"): 112, ("dkv", 80, "bf16"): 24, ("dkv", 128, "bf16"): 24,
          ("dkv", 256, "bf16"): 20, ("forward", 64, "fp32"): 8, ("dq", 256, "fp32"): 220, ("dkv", 128, "fp32"): 8,
          ("dkv", 256, "fp32"): 8}  # fmt: skip
KINDS = {"plain": {}, "shared": {"shared": True}, "window": {"window": 100},
         "shared, window": {"shared": True, "window": 100}}  # fmt: skip
CASES = {(which, head_dim, kind): sm90(which, head_dim, **KINDS[kind])
         for which in WHICH for head_dim in (64, 128) for kind in ("shared", "shared, window")}  # fmt: skip


def fits(case, which, head_dim):
    """Products on tensor cores, 16 bytes a load, and as many tiles in shared memory as are loaded ahead."""
    compiled, launch = case
    found = assert_fits(compiled, load_bits=128, spills=SPILLS.get((which, head_dim, "bf16"), 0))
    assert 0 < found.arrivals < found.mma
    loaded, held = (launch.rows, launch.keys) if which == "dkv" else (launch.keys, launch.rows)
    assert found.shared >= (2 * launch.stages * loaded + held) * op._block_d(head_dim) * 2, found


@pytest.mark.parametrize("which,head_dim,kind", CASES)
def test_compiles_for_sm90(which, head_dim, kind):
    fits(CASES[which, head_dim, kind], which, head_dim)


@pytest.mark.slow
def test_every_launch_compiles_for_sm90():
    """Asked for together: a process of its own for each would take as long as the compiles."""
    fitting, others = [], []
    for which, head_dim in itertools.product(WHICH, (64, 128)):
        for compact, (kind, options) in itertools.product((True, False), KINDS.items()):
            if compact or "shared" not in kind:
                fitting.append((sm90(which, head_dim, compact=compact, **options), which, head_dim))
        fitting.append((sm90(which, head_dim, heads=(14, 2)), which, head_dim))
    for which, (head_dim, dtype) in itertools.product(
            WHICH, ((16, "bf16"), (80, "bf16"), (256, "bf16"), (64, "fp32"), (128, "fp32"), (256, "fp32"))):
        case, _ = sm90(which, head_dim, dtype=dtype, shared=True)
        others.append((case, SPILLS.get((which, head_dim, dtype), 0)))
    for case in fitting:
        fits(*case)
    for case, spills in others:
        assert_fits(case, spills=spills)


# ------------------------------------------------------------------------------------------------------ on a GPU

RAGGED = Layout(tuple(265 + offset for offset in (-60, -41, -33, -27, -20, -12, -5, -1, 0, 3, 8, 15, 22, 31, 47, 73)))
PAIRS = Layout((90, 90, 175, 175, 161, 175), (0, 0, 90, 90, 90, 90), (0, 0, 0, 0, 1, 1), ((2, 3), (4, 5)))
LONG = Layout((2048, 1, 700))
# As a batch of pairs lies: with room for more prompts and segments, a filling, and lengths of up to 1,024 announced.
FILLED = Layout((90, 61, 175, 161, 175, 140, 222, *(0,) * 26), (0, 0, 90, 61, 90, 61, *(0,) * 27),
                (0, 0, 0, 1, 0, 1, *(0,) * 27), ((2, 4), (3, 5), (-1, -1), (-1, -1)), 1024)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("layout,head_dim,dtype", [
    *((FILLED, *kind) for kind in itertools.product((64, 128, 256), (torch.bfloat16,))),
    *((PAIRS, *kind) for kind in itertools.product((64, 128, 80, 256), (torch.bfloat16, torch.float16, torch.float32))),
    *itertools.product((RAGGED, LONG), (64, 128, 80), (torch.bfloat16, torch.float16))])  # fmt: skip
def test_on_the_gpu(dtype, head_dim, layout, window):
    inputs = tensors(layout, (32, 8), head_dim, dtype, "cuda")
    compare(segment_attention, inputs, layout, eps=2e-6, window=window)
    first, again = (run(segment_attention, *inputs, layout, window=window) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [RAGGED, LONG], ids=["ragged", "long"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_farther_from_the_truth_than_flash_attention(head_dim, layout):
    from aligntune.backends.fast.ops.attention import _varlen

    inputs = tensors(layout, (32, 8), head_dim, torch.bfloat16, "cuda")

    def flash(q, k, v, ends, *, max_seqlen, scale, shared):
        return _varlen(q, k, v, ends, max_seqlen, scale, None)

    wide = [x.detach().double().requires_grad_() for x in inputs[:3]] + [inputs[3].double()]
    truth = run(segment_attention_reference, *wide, layout)
    theirs, ours = (run(fn, *inputs, layout) for fn in (flash, segment_attention))
    for a, b, c in zip(ours, theirs, truth, strict=True):
        error, bound = (float((x.double() - c).norm() / c.norm()) for x in (a, b))
        assert error <= 1.25 * bound


@pytest.mark.gpu
def test_a_captured_launch_follows_the_lengths():
    inputs = tensors(PAIRS, (32, 8), 64, torch.bfloat16, "cuda")
    q, k, v, dout = inputs
    where = PAIRS.options("cuda")

    def step():
        out = segment_attention(q, k, v, scale=0.3, **where)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    other = Layout((60, 120, 175, 175, 161, 175), (0, 0, 60, 120, 60, 31), (0, 0, 0, 1, 0, 1), ((4, 2), (3, 5)))
    for layout in (PAIRS, other, Layout((*other.lengths,), (0,) * 6, (0,) * 6, ((-1, -1), (-1, -1)))):
        fresh = layout.options("cuda")
        where["cu_seqlens"].copy_(fresh["cu_seqlens"])
        for to, of in zip(where["shared"], fresh["shared"], strict=True):
            to.copy_(of)
        for x in found:
            x.fill_(float("nan"))
        graph.replay()
        for a, b in zip(found, run(segment_attention, q, k, v, dout, layout), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_long_rows_against_one_launch_in_fp32():
    """Many tiles, and a prompt that many go on from."""
    layout = Layout((130, *(200 + 3 * n for n in range(24))), (0, *(130,) * 24), (0,) * 25, (tuple(range(24, 0, -1)),))
    inputs = tensors(layout, (8, 2), 64, torch.float16, "cuda")
    wide = [x.detach().double().requires_grad_() for x in inputs[:3]] + [inputs[3].double()]
    truth = run(segment_attention_reference, *wide, layout)
    eager = run(segment_attention_reference, *inputs, layout)
    for a, b, c in zip(run(segment_attention, *inputs, layout), eager, truth, strict=True):
        assert_close_to_truth(a, b, c, eps=2e-6)
