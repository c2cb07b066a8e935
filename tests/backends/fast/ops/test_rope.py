"""RoPE, alone and after the norm of each head, against transformers' own functions and a float64 truth."""

from __future__ import annotations

import importlib

import pytest
import torch

from aligntune.backends.fast.ops import _runtime
from aligntune.backends.fast.ops import rope as op
from aligntune.backends.fast.ops.rms_norm import CONVENTIONS
from aligntune.backends.fast.ops.rope import qk_norm_rope, qk_norm_rope_reference, rope, rope_reference, rotate_into
from tests.backends.fast.ops.harness import assert_close_to_truth, assert_fits, far_rows, launches, sm90_case

HALF = [torch.bfloat16, torch.float16]
# (batch, seq, q heads, k heads, head_dim, rotary_dim)
SHAPES = [(2, 3, 4, 2, 16, 16), (1, 1, 1, 1, 6, 6), (3, 1, 7, 1, 24, 24), (2, 3, 3, 3, 20, 12), (1, 3, 5, 2, 66, 10)]
# The interpreter truncates to bf16 where a GPU rounds, at each of several roundings.
TRUNCATED = 2**-6


@pytest.fixture(autouse=True)
def seeded(request):
    """The same numbers in CI each time; fresh ones on a GPU."""
    torch.manual_seed(0) if request.node.get_closest_marker("gpu") is None else torch.seed()


def tables(shape, dtype, device, *, batch=None):
    """cos and sin whose halves differ, as no model's do: a kernel that reads one half for both is caught."""
    angles = torch.randn(shape[0] if batch is None else batch, shape[1], shape[-1]) * 3
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def make(shape, dtype, device, *, norm=False):
    """Inputs (q, k and the norm's weights) and the gradients of the results.

    q and k are as projections give them: (batch, heads, seq, dim) views of (batch, seq, heads, dim) memory.
    """
    batch, seq, q_heads, k_heads, dim, _ = shape

    def draw(heads):
        return torch.randn(batch, seq, heads, dim).to(device, dtype).transpose(1, 2)

    inputs = [draw(heads).requires_grad_() for heads in (q_heads, k_heads)]
    if norm:
        inputs += [(torch.randn(dim) * 0.3 + 1).to(device, dtype).requires_grad_() for _ in range(2)]
    return inputs, (draw(q_heads), draw(k_heads))


def run(fn, inputs, cos_sin, grads, **options):
    """Outputs, then the gradients of the inputs that are not frozen."""
    out = fn(*inputs, *cos_sin, **options)
    return [t.detach() for t in out] + list(torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grads))


def compare(inputs, cos_sin, grads, *, tolerance=1e-6, **options):
    ours, reference = (rope, rope_reference) if len(inputs) == 2 else (qk_norm_rope, qk_norm_rope_reference)
    wide = [[t.detach().double().requires_grad_(t.requires_grad) for t in group] for group in (inputs, cos_sin, grads)]
    truth = run(reference, *wide, **options)
    eager = run(reference, inputs, cos_sin, grads, **options)
    found = run(ours, inputs, cos_sin, grads, **options)
    names = ("q", "k", "dq", "dk", "dw_q", "dw_k")[: 2 + sum(t.requires_grad for t in inputs)]
    for name, a, b, c in zip(names, found, eager, truth, strict=True):
        assert_close_to_truth(a, b, c, eps=tolerance, what=f"{name} {tuple(a.shape)} {options}")


@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_in_fp32_against_the_truth(shape, device):
    inputs, grads = make(shape, torch.float32, device)
    compare(inputs, tables(shape, torch.float32, device), grads)


@pytest.mark.parametrize("convention", list(CONVENTIONS))
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_rotation_in_fp32_against_the_truth(shape, convention, device):
    inputs, grads = make(shape, torch.float32, device, norm=True)
    compare(inputs, tables(shape, torch.float32, device), grads, eps=1e-6, convention=convention)


def test_norms_that_are_frozen_against_the_truth(device):
    inputs, grads = make(SHAPES[3], torch.float32, device, norm=True)
    cos_sin = tables(SHAPES[3], torch.float32, device)
    for frozen in ((2, 3), (2,), (3,)):
        for number in (2, 3):
            inputs[number].requires_grad_(number not in frozen)
        compare(inputs, cos_sin, grads, eps=1e-6)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("table_dtype", [None, torch.float32])
def test_half_precision_against_the_truth(table_dtype, dtype, device):
    shape = SHAPES[3]
    tolerance = TRUNCATED if dtype == torch.bfloat16 and _runtime.interpreting() else 1e-6
    cos_sin = tables(shape, table_dtype or dtype, device)
    inputs, grads = make(shape, dtype, device)
    compare(inputs, cos_sin, grads, tolerance=tolerance)
    inputs, grads = make(shape, dtype, device, norm=True)
    for convention in CONVENTIONS:
        compare(inputs, cos_sin, grads, tolerance=tolerance, eps=1e-6, convention=convention)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norm_weights_of_another_dtype(dtype, weight_dtype, device):
    inputs, grads = make(SHAPES[0], dtype, device, norm=True)
    inputs[2:] = [w.detach().to(weight_dtype).requires_grad_() for w in inputs[2:]]
    for convention in CONVENTIONS:
        compare(inputs, tables(SHAPES[0], torch.float32, device), grads, eps=1e-6, convention=convention)


# ------------------------------------------------------------------------------------------------ transformers itself


def theirs_rope(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2"])
def test_the_rotation_is_transformers_to_the_bit(family, device):
    """fp16 here (the interpreter rounds it as hardware does), with the tables that the family makes."""
    shape = SHAPES[3] if family == "phi3" else SHAPES[2]
    assert_same_bits(family, shape, torch.float16, device)


def assert_same_bits(family, shape, dtype, device):
    inputs, grads = make(shape, dtype, device)
    cos_sin = tables(shape, torch.float32 if family == "olmo2" else dtype, device)
    want = run(theirs_rope(family), inputs, cos_sin, grads)
    assert all(torch.equal(a, b) and b.any() for a, b in zip(run(rope, inputs, cos_sin, grads), want, strict=True))
    reference = run(rope_reference, inputs, cos_sin, grads)
    assert all(torch.equal(a, b) for a, b in zip(reference, want, strict=True))


def assert_rounds_as_transformers(family, cls, convention, shape, dtype, device):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    (q, k, q_weight, k_weight), _ = make(shape, dtype, device, norm=True)
    cos_sin = tables(shape, dtype, device)
    norms = [getattr(module, cls)(shape[4], eps=1e-6).to(device) for _ in range(2)]
    for norm, weight in zip(norms, (q_weight, k_weight), strict=True):
        norm.weight = torch.nn.Parameter(weight.detach().clone())
    want = module.apply_rotary_pos_emb(norms[0](q), norms[1](k), *cos_sin)
    options = {"eps": 1e-6, "convention": convention}
    reference = qk_norm_rope_reference(q, k, q_weight, k_weight, *cos_sin, **options)
    for a, b, c in zip(qk_norm_rope(q, k, q_weight, k_weight, *cos_sin, **options), want, reference, strict=True):
        assert torch.equal(b, c)
        # Only the order of the sum of squares differs; a rounding elsewhere would change about a quarter.
        assert a.dtype == b.dtype and float((a != b).float().mean()) < 0.01


FAMILIES = [("qwen3", "Qwen3RMSNorm", "llama"), ("gemma3", "Gemma3RMSNorm", "gemma")]


@pytest.mark.parametrize(("family", "cls", "convention"), FAMILIES)
def test_norm_and_rotation_round_where_transformers_does(family, cls, convention, device):
    assert_rounds_as_transformers(family, cls, convention, (2, 9, 4, 2, 32, 32), torch.float16, device)


# ------------------------------------------------------------------------------------------------- strides and layout


def test_slices_of_a_packed_projection_and_both_orders_of_dimensions(device):
    batch, seq, q_heads, k_heads, dim = 2, 5, 4, 2, 16
    packed = torch.randn(batch, seq, (q_heads + 2 * k_heads) * dim, device=device)
    q, k, _ = packed.split((q_heads * dim, k_heads * dim, k_heads * dim), dim=-1)
    q, k = q.view(batch, seq, -1, dim).requires_grad_(), k.view(batch, seq, -1, dim).requires_grad_()
    cos_sin = tables((batch, seq, dim), torch.float32, device)
    grads = torch.randn_like(q), torch.randn_like(k)
    compare((q, k), cos_sin, grads, unsqueeze_dim=2)
    norm_weights = [torch.randn(dim, device=device, requires_grad=True) for _ in range(2)]
    compare((q, k, *norm_weights), cos_sin, grads, unsqueeze_dim=2, eps=1e-6)
    turned = [t.transpose(1, 2) for t in (q, k)]
    compare(turned, cos_sin, [t.transpose(1, 2) for t in grads])
    for out in rope(*turned, *cos_sin):
        assert out.transpose(1, 2).is_contiguous()  # what the projection's backward and varlen attention want
    heads_first = [t.detach().contiguous().requires_grad_() for t in turned]
    compare(heads_first, cos_sin, [t.transpose(1, 2) for t in grads])


def test_tables_shared_by_the_batch_or_expanded_or_of_unlike_strides(device):
    inputs, grads = make(SHAPES[2], torch.float32, device)
    cos, sin = tables(SHAPES[2], torch.float32, device, batch=1)
    compare(inputs, (cos, sin), grads)
    compare(inputs, (cos.expand(3, -1, -1), sin.expand(3, -1, -1)), grads)
    compare(inputs, (cos.expand(3, -1, -1), sin.repeat(3, 1, 1)), grads)
    both = torch.cat((cos, sin), dim=-1)
    compare(inputs, both.chunk(2, dim=-1), grads)


SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_positions_of_each_row_as_a_model_scales_them(scaling, device):
    """Left padding and packing: cos and sin of each row are its own."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=64,
        rope_parameters={"rope_type": scaling, "rope_theta": 10000.0, **SCALINGS[scaling]},
    )  # fmt: skip
    positions = torch.tensor([[0, 1, 2, 3, 50], [0, 0, 1, 0, 1]], device=device)
    inputs, grads = make((2, 5, 4, 2, 16, 16), torch.float32, device)
    cos_sin = LlamaRotaryEmbedding(config).to(device)(inputs[0], positions)
    compare(inputs, cos_sin, grads)
    q, _ = rope(*inputs, *cos_sin)
    # Position 0 turns nothing; YaRN's tables hold its factor, 0.1 ln(4) + 1.
    stretch = 1.1386294 if scaling == "yarn" else 1.0
    torch.testing.assert_close(q[1, :, 3], inputs[0][1, :, 3] * stretch, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(q[0, :, 4], inputs[0][0, :, 4] * stretch, atol=0.1)


@pytest.mark.parametrize("norm", [False, True])
def test_gradients_of_stride_zero_and_left_alone(norm, device):
    inputs, grads = make(SHAPES[0], torch.float32, device, norm=norm)
    cos_sin, options = tables(SHAPES[0], torch.float32, device), {"eps": 1e-6} if norm else {}
    one = torch.tensor(0.7, device=device)
    compare(inputs, cos_sin, [one.expand(t.shape) for t in grads], **options)
    before = [t.clone() for t in grads]
    run(qk_norm_rope if norm else rope, inputs, cos_sin, grads, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, grads, strict=True))


def test_into_given_tensors_and_in_place(device):
    (q, k), _ = make(SHAPES[3], torch.float32, device)
    q, k = q.detach(), k.detach()
    cos_sin = tables(SHAPES[3], torch.float32, device)
    want = rope_reference(q, k, *cos_sin)
    q_out, k_out = torch.full_like(q, float("nan")), torch.full_like(k, float("nan"))
    rotate_into(q, k, *cos_sin, q_out, k_out)
    torch.testing.assert_close((q_out, k_out), want)
    rotate_into(q, k, *cos_sin, q, k)
    assert torch.equal(q, q_out) and torch.equal(k, k_out)
    with pytest.raises(ValueError, match="cannot be written"):
        rotate_into(q, k, *cos_sin, q_out[:, :, :-1], k_out)


@pytest.mark.parametrize("norm", [False, True])
def test_only_one_result_is_used(norm, device):
    inputs, grads = make(SHAPES[0], torch.float32, device, norm=norm)
    cos_sin, options = tables(SHAPES[0], torch.float32, device), {"eps": 1e-6} if norm else {}
    for which in (0, 1):
        got, want = (
            torch.autograd.grad(
                fn(*inputs, *cos_sin, **options)[which], inputs, grads[which], allow_unused=True, materialize_grads=True
            )
            for fn in ((qk_norm_rope, qk_norm_rope_reference) if norm else (rope, rope_reference))
        )
        assert want[which].any() and not want[1 - which].any()
        torch.testing.assert_close(got, want)


# ----------------------------------------------------------------------------------------------------------- launches


def test_one_launch_each_way_and_frozen_weights_cost_nothing(device):
    inputs, _ = make(SHAPES[0], torch.float32, device, norm=True)
    cos_sin = tables(SHAPES[0], torch.float32, device)

    def step(fn, *args, **options):
        return launches(lambda: sum(t.square().sum() for t in fn(*args, *cos_sin, **options)).backward())

    assert step(rope, *inputs[:2]) == {"rope_forward": 1, "rope_backward": 1}
    both = {"qk_norm_rope_forward": 1, "qk_norm_rope_backward": 1}
    assert step(qk_norm_rope, *inputs, eps=1e-6) == both | {"norm_weight_grad": 1}
    want = inputs[3].grad
    inputs[2].requires_grad_(False)
    inputs[2].grad = inputs[3].grad = None
    assert step(qk_norm_rope, *inputs, eps=1e-6) == both | {"norm_weight_grad": 1}
    assert inputs[2].grad is None and torch.equal(inputs[3].grad, want)
    inputs[3].requires_grad_(False)
    assert step(qk_norm_rope, *inputs, eps=1e-6) == both


def test_a_persistent_program_takes_many_tokens(monkeypatch, device):
    monkeypatch.setattr(_runtime, "num_sms", lambda _=None: 1)
    shape = (2, 5, 20, 2, 128, 128)  # 8 warps, so two programs
    assert op.launch_for(10, 20, 2, 128, 128, sms=1).programs == 2
    inputs, grads = make(shape, torch.float32, device, norm=True)
    compare(inputs, tables(shape, torch.float32, device), grads, eps=1e-6)


def test_more_heads_than_a_tile_holds(device):
    shape = (1, 2, 40, 36, 130, 128)
    launch = op.launch_for(2, *shape[2:])
    assert launch.block_q == launch.block_k == 32
    inputs, grads = make(shape, torch.float32, device, norm=True)
    compare(inputs, tables(shape, torch.float32, device), grads, eps=1e-6)
    compare(inputs[:2], tables(shape, torch.float32, device), grads)


@pytest.mark.parametrize("far", ["seq", "heads", "batch", "tables"])
@pytest.mark.parametrize("norm", [False, True])
def test_offsets_beyond_int32(norm, far, device):
    """q, k and their gradients with five rows of one dimension 2^29 elements apart."""
    shape = {"seq": (1, 5, 1, 1, 32, 32), "heads": (1, 1, 5, 5, 32, 32), "batch": (5, 1, 1, 1, 32, 32)}
    shape = shape.get(far, (1, 5, 1, 1, 32, 32))
    near, near_grads = make(shape, torch.float16, device, norm=norm)
    cos_sin, options = tables(shape, torch.float16, device), {"eps": 1e-6} if norm else {}
    fn = qk_norm_rope if norm else rope
    want = run(fn, near, cos_sin, near_grads, **options)

    def spread(like):
        rows = far_rows(5, 32, torch.float16, device)
        rows.copy_(like.detach().reshape(5, 32))
        return rows.view(like.shape) if far != "tables" else rows.view(1, 5, 32)

    if far == "tables":
        got = run(fn, near, [spread(t) for t in cos_sin], near_grads, **options)
    else:
        inputs = [spread(t).requires_grad_() for t in near[:2]] + near[2:]
        got = run(fn, inputs, cos_sin, [spread(t) for t in near_grads], **options)
        if not norm:
            out = [spread(torch.zeros_like(t)) for t in near[:2]]
            rotate_into(*inputs, *cos_sin, *out)
            assert all(torch.equal(a, b) for a, b in zip(out, want[:2], strict=True))
    assert all(torch.equal(a, b) and b.any() for a, b in zip(got, want, strict=True))


def test_no_tokens(device):
    inputs, grads = make((2, 0, 4, 2, 16, 16), torch.float32, device, norm=True)
    cos_sin = tables((2, 0, 16), torch.float32, device)
    assert [t.shape for t in run(rope, inputs[:2], cos_sin, grads)] == [t.shape for t in (*grads, *grads)]
    *_, dw_q, dw_k = run(qk_norm_rope, inputs, cos_sin, grads, eps=1e-6)
    assert dw_q.shape == dw_k.shape == (16,) and not dw_q.any() and not dw_k.any()


def test_what_does_not_fit_is_refused(device):
    q, k = torch.zeros(2, 4, 5, 16, device=device), torch.zeros(2, 2, 5, 16, device=device)
    cos = torch.zeros(2, 5, 16, device=device)
    w = torch.ones(16, device=device)
    bad = [
        ("unsqueeze_dim", (q, k, cos, cos), {"unsqueeze_dim": 0}),
        ("4 dimensions", (q[0], k, cos, cos), {}),
        ("differ in more than their heads", (q, k[:, :, :4], cos, cos), {}),
        ("differ in more than their heads", (q, k.half(), cos, cos), {}),
        ("do not fit", (q, k, cos[:, :4], cos[:, :4]), {}),
        ("do not fit", (q, k, cos, cos[:1]), {}),
        ("do not fit", (q, k, cos[0], cos[0]), {}),
        ("15 rotary", (q, k, cos[..., :15], cos[..., :15]), {}),
        ("32 rotary", (q, k, torch.cat((cos, cos), -1), torch.cat((cos, cos), -1)), {}),
        ("no gradient", (q, k, cos.clone().requires_grad_(), cos), {}),
    ]
    for message, args, options in bad:
        for fn in (rope, rope_reference):
            with pytest.raises(ValueError, match=message):
                fn(*args, **options)
    for fn in (qk_norm_rope, qk_norm_rope_reference):
        with pytest.raises(ValueError, match="did you mean 'gemma'"):
            fn(q, k, w, w, cos, cos, eps=1e-6, convention="gema")
        with pytest.raises(ValueError, match=r"k's weight has shape \(15,\)"):
            fn(q, k, w, w[:15], cos, cos, eps=1e-6)
        with pytest.raises(ValueError, match="q's weight is torch.float32"):
            fn(q, k, w, w.half(), cos, cos, eps=1e-6)


# ------------------------------------------------------------------------------------------------------------ compile


def cases(shape, dtype):
    """Every kernel of the op for (q heads, k heads, head_dim, rotary_dim), as projections of 4096 tokens a row."""
    q_heads, k_heads, dim, rotary = shape

    def tensor(name, heads):
        short = name.replace("_out", "o")
        strides = {f"{short}_b": 4096 * heads * dim, f"{short}_s": heads * dim, f"{short}_h": dim}
        return {name if name.endswith("_out") else f"{name}_ptr": dtype, **strides}

    io = tensor("q", q_heads) | tensor("k", k_heads) | tensor("q_out", q_heads) | tensor("k_out", k_heads)
    norm = {"qw_ptr": dtype, "kw_ptr": dtype}
    tabled = {"cos_ptr": dtype, "sin_ptr": dtype, "cos_b": 4096 * rotary, "cos_s": rotary}
    one, loop = op.launch_for(8192, *shape), op.launch_for(8192, *shape, sms=132)
    sizes = {"HQ": q_heads, "HK": k_heads, "D": dim, "R": rotary, "BLOCK_Q": one.block_q, "BLOCK_K": one.block_k,
             "BLOCK_HALF": one.block_half, "BLOCK_REST": one.block_rest}  # fmt: skip
    assert (one.block_q, one.num_warps) == (loop.block_q, loop.num_warps)
    rounds = {"ROUND": dtype != "*fp32"}
    normed = {"EPS": 1e-6, "CAST_FIRST": True, "OFFSET": 0.0}
    back = tensor("dq", q_heads) | tensor("dk", k_heads) | io | norm | tabled | {"partials_ptr": "*fp32"}
    counts = {"n_tokens": "i32", "n_seq": "i32"}
    table = {
        "forward": (op.rope_forward, io | tabled | {"n_seq": "i32"}, sizes | rounds),
        "backward": (op.rope_backward, io | tabled | {"n_seq": "i32"}, sizes | rounds),
        "norm forward": (op.qk_norm_rope_forward, io | norm | tabled | {"n_seq": "i32"},
                         sizes | rounds | normed | {"ROUND_NORM": True}),
        "norm backward": (op.qk_norm_rope_backward, back | counts,
                          sizes | {"EPS": 1e-6, "OFFSET": 0.0, "HAS_DW": True}),
        "norm backward, frozen": (op.qk_norm_rope_backward, back | counts,
                                  sizes | {"EPS": 1e-6, "OFFSET": 0.0, "HAS_DW": False}),
    }  # fmt: skip
    return {
        name: sm90_case(*entry, one.num_warps, enable_fp_fusion=name.startswith("norm backward"))
        for name, entry in table.items()
    }


LARGEST = cases((64, 8, 128, 128), "*bf16")


@pytest.mark.parametrize("name", list(LARGEST))
def test_compiles_for_sm90(name):
    found = assert_fits(LARGEST[name], load_bits=128)
    if not name.startswith("norm backward"):
        assert found.half_fmas == 0  # a fused product is not rounded, where transformers rounds it


@pytest.mark.slow
def test_every_class_compiles_for_sm90():
    shapes = [
        (32, 8, 64, 64),
        (28, 4, 128, 128),
        (64, 8, 128, 128),
        (8, 4, 256, 256),
        (32, 8, 96, 72),
        (24, 24, 80, 20),
    ]
    table = {(shape, dtype): cases(shape, dtype) for shape in shapes for dtype in ("*bf16", "*fp16", "*fp32")}
    for (shape, _), kernels in table.items():
        for case in kernels.values():
            # ptxas (not the same kernels in each release) gives up to 3 registers away to fit one more program an SM.
            assert_fits(case, load_bits=128 if shape[3] % 16 == 0 else None, spills=6)


# ---------------------------------------------------------------------------------------------------------------- GPU

GPU_SHAPES = [(2, 341, 32, 8, 64, 64), (1, 1000, 28, 4, 128, 128), (2, 100, 8, 4, 256, 256), (2, 77, 32, 8, 96, 72)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_gpu_against_the_truth(shape, dtype):
    cos_sin = tables(shape, dtype, "cuda")
    inputs, grads = make(shape, dtype, "cuda", norm=True)
    compare(inputs[:2], cos_sin, grads)
    for trained in (True, False):
        for weight in inputs[2:]:
            weight.requires_grad_(trained)
        for convention in CONVENTIONS:
            compare(inputs, cos_sin, grads, eps=1e-6, convention=convention)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2"])
def test_gpu_rotation_is_transformers_to_the_bit(family, dtype):
    for shape in GPU_SHAPES if family == "phi3" else GPU_SHAPES[:3]:
        assert_same_bits(family, shape, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("family", "cls", "convention"), FAMILIES)
def test_gpu_norm_and_rotation_round_where_transformers_does(family, cls, convention, dtype):
    assert_rounds_as_transformers(family, cls, convention, (2, 500, 16, 8, 128, 128), dtype, "cuda")
