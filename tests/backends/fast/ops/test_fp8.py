"""Rows in e4m3 and their products: against torch's own cast, by hand, and what the compiler makes of the kernel."""

from __future__ import annotations

import pytest
import torch

from aligntune.backends.fast.ops import fp8
from aligntune.backends.fast.ops.fp8 import (
    E4M3,
    Fp8Weight,
    fits,
    fp8_mm,
    fp8_mm_reference,
    launch_of,
    launch_together,
    quantize_rows,
    quantize_rows_kernel,
    quantize_rows_reference,
    quantize_rows_together,
    quantize_rows_together_kernel,
    quantize_rows_together_reference,
    together,
)
from aligntune.errors import ConfigError
from tests.backends.fast.ops.harness import assert_fits, far_rows, launches, relative_error, sm90_case

BOTH = pytest.mark.parametrize("fn", [quantize_rows, quantize_rows_reference])


def same(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's result, after it was found to be the reference's bit for bit."""
    (values, scale), (wanted, wanted_scale) = quantize_rows(x), quantize_rows_reference(x)
    assert values.dtype == E4M3 and values.is_contiguous() and scale.dtype == torch.float32
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))
    return values, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (5, 44), (37, 300), (2, 4096), (1, 5000)])
def test_rows_of_any_shape(shape, dtype, device):
    torch.manual_seed(0)
    # Rows of very different sizes: one scale for all would lose the small ones.
    x = (torch.randn(shape) * 10.0 ** torch.linspace(-3, 3, shape[0])[:, None]).to(device, dtype)
    values, scale = same(x)
    assert values.shape == shape and scale.shape == shape[:1]
    assert (values.float().abs().amax(1) == 448).all()
    back = values.float() * scale[:, None]
    # Half a unit in the last of 4 bits, or half of the smallest subnormal e4m3 number.
    bound = torch.maximum(x.float().abs() * 2**-4, scale[:, None] * 2**-10) * 1.001
    assert ((back - x.float()).abs() <= bound).all()
    assert back.norm() > 0


def test_rows_too_wide_for_one_tile(monkeypatch, device):
    monkeypatch.setattr(fp8, "MAX_TILE", 64)
    torch.manual_seed(1)
    for width in (65, 128, 200):
        x = torch.randn(3, width, device=device)
        x[1, -1] = 9.0  # the largest stands in the last part
        _, scale = same(x)
        assert float(scale[1]) == pytest.approx(9 / 448)
    assert launch_of(3, 200).block_cols == 64


@BOTH
def test_by_hand(fn, device):
    x = torch.tensor([[448.0, -448.0, 17.0, 19.0, 0.0], [0.0] * 5, [2.0, 1.0, -0.5, 0.25, 0.0]], device=device)
    values, scale = fn(x)
    assert scale.tolist() == pytest.approx([1.0, 1.0, 2 / 448])
    # 17 and 19 lie half way between two numbers of 4 bits (16, 18, 20): ties go to the even mantissa.
    assert values[0].tolist() == [448.0, -448.0, 16.0, 20.0, 0.0]
    assert values[1].tolist() == [0.0] * 5
    assert values[2].tolist() == [448.0, 224.0, -112.0, 56.0, 0.0]


@BOTH
def test_what_is_not_finite_is_seen(fn, device):
    x = torch.ones(4, 40, device=device)
    x[0, 3], x[1, 39], x[2, 0] = float("nan"), float("inf"), -float("inf")
    values, scale = fn(x)
    back = values.float() * scale[:, None]
    for row in range(3):
        assert not torch.isfinite(scale[row])
        assert not torch.isfinite(back[row]).any()
    assert back[3].tolist() == [1.0] * 40
    product = fp8_mm_reference(values, scale, *quantize_rows_reference(torch.eye(40, device=device)), torch.float32)
    assert not torch.isfinite(product[:3]).any() and product[3].tolist() == pytest.approx([1.0] * 40)


@BOTH
def test_numbers_that_have_no_finite_inverse(fn, device):
    x = torch.full((2, 16), 1e-42, device=device)
    x[1] = 3e38
    values, scale = fn(x)
    assert scale[0] == 2.0**-126 and torch.isfinite(values.float()).all()
    assert values[1].tolist() == [448.0] * 16


def test_any_row_stride(device):
    torch.manual_seed(2)
    wide = torch.randn(6, 100, device=device)
    plain = wide[:, 7:40].contiguous()
    values, scale = same(plain)
    for view in (wide[:, 7:40], torch.cat([plain, plain], 1).view(12, 33)[::2], plain.t().contiguous().t()):
        again, again_scale = same(view)
        assert torch.equal(again.view(torch.uint8), values.view(torch.uint8)) and torch.equal(again_scale, scale)
    assert same(plain[:1].expand(4, 33))[1].tolist() == [float(scale[0])] * 4
    for fn in (quantize_rows, quantize_rows_reference):
        empty = fn(plain[:0])
        assert empty[0].shape == (0, 33) and empty[1].shape == (0,)
        assert fn(plain[:, :0])[1].tolist() == [1.0] * 6


def test_rows_past_int32(device):
    x = far_rows(5, 24, torch.float32, device)
    x.copy_(torch.arange(120, device=device).view(5, 24) - 30.0)
    values, scale = quantize_rows(x)
    wanted, wanted_scale = quantize_rows_reference(x.clone())
    assert torch.equal(scale, wanted_scale) and torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))


def test_one_launch_into_given_memory(device):
    x = torch.randn(5, 48, device=device)
    out = torch.empty(5, 48, dtype=E4M3, device=device), torch.empty(5, device=device)
    assert launches(lambda: quantize_rows(x, out=out)) == {"quantize_rows_kernel": 1}
    assert torch.equal(out[1], quantize_rows_reference(x)[1])
    for wrong in ((out[0].t(), out[1]), (out[0], out[1][:4]), (out[0].float(), out[1]), (out[0], out[1].half())):
        with pytest.raises(ConfigError, match="out is"):
            quantize_rows(x, out=wrong)
    for bad in (x[0], x.double(), x.view(5, 6, 8)):
        with pytest.raises(ConfigError, match="rows of fp32"):
            quantize_rows(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "widths"), [
    (1, (16, 16)), (5, (48, 16, 32)), (37, (300, 12, 1)), (3, (4096, 4096)),
])
def test_rows_side_by_side_have_one_scale(tokens, widths, dtype, device):
    torch.manual_seed(2)
    xs = [(torch.randn(tokens, width, device=device) * size).to(dtype)
          for width, size in zip(widths, (1.0, 30.0, 0.1), strict=False)]
    xs[0] = torch.randn(tokens, widths[0] + 8, device=device).to(dtype)[:, : widths[0]]  # rows further apart
    assert launches(lambda: quantize_rows_together(xs)) == {"quantize_rows_together_kernel": 1}
    values, scale = quantize_rows_together(xs)
    wanted, wanted_scale = quantize_rows_together_reference(xs)
    one, one_scale = quantize_rows_reference(torch.cat(xs, dim=1))
    assert values.shape == (tokens, sum(widths)) and torch.equal(scale, wanted_scale) and torch.equal(scale, one_scale)
    # As numbers: the interpreter rounds what is below the smallest of them to a zero without its sign.
    assert torch.equal(values.float(), wanted.float()) and torch.equal(values.float(), one.float())
    assert (values.float().abs().amax(1) == 448).all()


@pytest.mark.parametrize("fn", [quantize_rows_together, quantize_rows_together_reference])
def test_what_is_not_finite_is_seen_in_every_part(fn, device):
    for part in range(3):
        xs = [torch.ones(3, 16, device=device) for _ in range(3)]
        xs[part][1, 3] = float("nan")
        values, scale = fn(xs)
        assert scale.isnan().tolist() == [False, True, False]
        assert (values.float() * scale[:, None])[1].isnan().all()
        assert (values.float()[[0, 2]] == 448).all()
    zeros = fn([torch.zeros(2, 16, device=device)] * 2)
    assert zeros[1].tolist() == [1.0, 1.0] and not zeros[0].float().any()
    assert fn([torch.zeros(0, 16, device=device)] * 2)[0].shape == (0, 32)


@pytest.mark.parametrize("fn", [quantize_rows_together, quantize_rows_together_reference])
def test_what_cannot_be_quantised_together(fn, device):
    x = torch.zeros(2, 16, device=device)
    for xs in ([x], [x] * 4, [x, x[:1]], [x, x.half()], [x, x.double()], [x[0], x[0]], [x, x[:, :0]],
               [torch.zeros(1, 1, device=device).expand(1, 40_000)] * 2):
        with pytest.raises(ConfigError, match="rows of two or three tensors"):
            fn(xs)
    assert together([14336, 14336]) and together([4096, 1024, 1024]) and not together([18944, 18944])
    assert not together([16]) and not together([16] * 4)


def test_rows_side_by_side_past_int32(device):
    x = far_rows(5, 24, torch.float32, device)
    x.copy_(torch.arange(120, device=device).view(5, 24) - 30.0)
    values, scale = quantize_rows_together([x, x * 2])
    wanted, wanted_scale = quantize_rows_together_reference([x.clone(), x * 2])
    assert torch.equal(scale, wanted_scale) and torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))


def test_weights_side_by_side(device):
    torch.manual_seed(5)
    weights = [torch.randn(n, 32, device=device) * size for n, size in ((48, 1.0), (16, 20.0), (32, 0.5))]
    found = Fp8Weight.of_several(weights)
    beside = found[0].beside
    assert beside is not None and beside.columns.shape == (32, 96) and beside.widths == (48, 16, 32)
    torch.testing.assert_close(beside.scale, torch.cat(weights).abs().amax(0) / 448)
    for place, (one, weight) in enumerate(zip(found, weights, strict=True)):
        alone = Fp8Weight.of(weight)
        assert one.beside is beside and one.place == place and one.columns.shape == (32, weight.shape[0])
        assert torch.equal(one.rows.view(torch.uint8), alone.rows.view(torch.uint8))
        assert relative_error(one.dequantized_columns(), weight) < 0.04
    memory = beside.columns.data_ptr()
    found[1].renew_(weights[1] * -3, [weights[0], weights[1] * -3, weights[2]])
    assert beside.columns.data_ptr() == memory and relative_error(found[1].dequantized(), weights[1] * -3) < 0.04
    assert relative_error(found[1].dequantized_columns(), weights[1] * -3) < 0.04
    assert relative_error(found[0].dequantized_columns(), weights[0]) < 0.04
    with pytest.raises(ConfigError, match="multiples of 16"):
        Fp8Weight.of_several([weights[0], torch.zeros(8, 32, device=device)])


def test_a_product_of_dequantised_factors(device):
    torch.manual_seed(3)
    x, w, bias = (torch.randn(*shape, device=device) for shape in ((7, 32), (48, 32), (48,)))
    (x8, sx), (w8, sw) = quantize_rows(x), quantize_rows(w)
    truth = (x8.double() * sx[:, None]) @ (w8.double() * sw[:, None]).t() + bias
    found = fp8_mm_reference(x8, sx, w8, sw, torch.float32, bias)
    torch.testing.assert_close(found, truth.float(), rtol=1e-5, atol=1e-5)
    if device == "cpu":
        assert torch.equal(fp8_mm(x8, sx, w8, sw, torch.float32, bias), found)
    low = fp8_mm(x8, sx, w8, sw, torch.bfloat16)
    assert low.dtype == torch.bfloat16
    # The product is rounded, and then the sum.
    twice, once = fp8_mm(x8, sx, w8, sw, torch.bfloat16, bias.bfloat16()), (truth - bias + bias.bfloat16()).bfloat16()
    assert torch.equal(twice, low + bias.bfloat16()) and not torch.equal(twice, once)
    assert fp8_mm(x8[:0], sx[:0], w8, sw, torch.bfloat16).shape == (0, 48)
    # Each element is off by about 2^-5.3 of itself, and so is a product of random factors by sqrt(2) of that.
    assert 0.01 < relative_error(found - bias, x @ w.t()) < 0.06


def test_a_weight_is_held_by_rows_and_by_columns(device):
    torch.manual_seed(4)
    weight = torch.randn(48, 32, device=device) * torch.logspace(-2, 2, 48, device=device)[:, None]
    found = Fp8Weight.of(weight)
    assert found.shape == (48, 32) and found.columns.shape == (32, 48)
    assert found.row_scale.shape == (48,) and found.column_scale.shape == (32,)
    torch.testing.assert_close(found.row_scale, weight.abs().amax(1) / 448)
    torch.testing.assert_close(found.column_scale, weight.abs().amax(0) / 448)
    for back in (found.dequantized(), found.dequantized_columns()):
        assert back.shape == weight.shape and relative_error(back, weight) < 0.04
    kept = found.rows.data_ptr(), found.columns.data_ptr(), found.row_scale.data_ptr(), found.column_scale.data_ptr()
    found.renew_(weight * -3)
    assert kept == (
        found.rows.data_ptr(), found.columns.data_ptr(), found.row_scale.data_ptr(), found.column_scale.data_ptr()
    )  # fmt: skip
    assert relative_error(found.dequantized(), weight * -3) < 0.04
    assert relative_error(found.dequantized_columns(), weight * -3) < 0.04
    for shape in ((48, 33), (40, 32), (0, 32), (32,), (2, 16, 16)):
        assert not fits(torch.Size(shape))
        with pytest.raises(ConfigError, match="multiples of 16"):
            Fp8Weight.of(torch.zeros(shape, device=device))


def _case(width: int, x: str = "*bf16"):
    launch = launch_of(8192, width)
    return sm90_case(
        quantize_rows_kernel,
        {"x_ptr": x, "x_row": width, "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "n_rows": "i32"},
        {"H": width, "LARGEST": 448.0, "TINY": 2.0**-126, "WIDE": width > launch.block_cols, "ROUND_FIRST": False,
         "BLOCK_R": launch.block_rows, "BLOCK_H": launch.block_cols},
        num_warps=launch.num_warps,
    )  # fmt: skip


def _case_together(widths: tuple[int, ...], x: str = "*bf16"):
    launch, blocks = launch_together(8192, widths)
    a, b, c = (*widths, 0)[:3]
    return sm90_case(
        quantize_rows_together_kernel,
        {"a_ptr": x, "a_row": a, "b_ptr": x, "b_row": b, "c_ptr": x, "c_row": c or a, "out_ptr": "*fp8e4nv",
         "scale_ptr": "*fp32", "n_rows": "i32"},
        {"A": a, "B": b, "C": c, "LARGEST": 448.0, "TINY": 2.0**-126, "ROUND_FIRST": False,
         "BLOCK_R": launch.block_rows, "BLOCK_A": blocks[0], "BLOCK_B": blocks[1],
         "BLOCK_C": blocks[2] if c else 1},
        num_warps=launch.num_warps,
    )  # fmt: skip


TOGETHER = {widths: _case_together(widths) for widths in
            ((2048, 512, 512), (8192, 8192), (4096, 1024, 1024), (14336, 14336), (9728, 9728))}
TOGETHER_OTHERS = [_case_together((2048, 512, 512), "*fp32"), _case_together((300, 60), "*fp16")]
SM90 = {width: _case(width) for width in (512, 2048, 8192, 14336)}
SM90_OTHERS = [_case(2048, "*fp32"), _case(2048, "*fp16"), _case(300), _case(28672)]


@pytest.mark.parametrize("width", SM90)
def test_compiles_for_sm90(width):
    found = assert_fits(SM90[width], load_bits=128)
    assert found.stores.get(128, 0) > 0
    assert found.registers <= 64


@pytest.mark.parametrize("widths", TOGETHER)
def test_rows_side_by_side_compile_for_sm90(widths):
    found = assert_fits(TOGETHER[widths], load_bits=128)
    assert found.stores.get(128, 0) > 0 and found.registers <= 64


def test_the_other_forms_compile():
    for case in (*SM90_OTHERS, *TOGETHER_OTHERS):
        assert_fits(case)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [8192, 1, 17, 1001])
@pytest.mark.parametrize("widths", [(2048, 512, 512), (8192, 8192), (144, 80)])
def test_one_product_of_rows_side_by_side_on_the_gpu(rows, widths):
    torch.manual_seed(rows)
    douts = [torch.randn(rows, n, device="cuda").bfloat16() for n in widths]
    weights = [(torch.randn(n, 2048, device="cuda") * n**-0.5).bfloat16() for n in widths]
    found = Fp8Weight.of_several(weights)
    beside = found[0].beside
    assert beside is not None
    values, scale = quantize_rows_together(douts)
    wanted, wanted_scale = quantize_rows_together_reference(douts)
    assert torch.equal(scale, wanted_scale) and torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))
    ours = fp8_mm(values, scale, beside.columns, beside.scale, torch.bfloat16)
    reference = fp8_mm_reference(values, scale, beside.columns, beside.scale, torch.bfloat16)
    truth = sum(dout.double() @ weight.double() for dout, weight in zip(douts, weights, strict=True))
    assert torch.isfinite(ours).all()
    assert relative_error(ours, truth) < 1.1 * relative_error(reference, truth) < 0.06


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [8192, 1, 17, 1001])
@pytest.mark.parametrize(("n", "h"), [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192), (144, 80)])
def test_products_on_the_gpu(rows, n, h):
    torch.manual_seed(rows)
    x, w = torch.randn(rows, h, device="cuda").bfloat16(), (torch.randn(n, h, device="cuda") * h**-0.5).bfloat16()
    bias = torch.randn(n, device="cuda").bfloat16()
    weight = Fp8Weight.of(w)
    for factor, eight, scale, truth in (
        (x, weight.rows, weight.row_scale, x.double() @ w.double().t()),
        (torch.randn(rows, n, device="cuda").bfloat16(), weight.columns, weight.column_scale, None),
    ):
        truth = factor.double() @ w.double() if truth is None else truth
        x8, sx = quantize_rows(factor)
        wanted, wanted_scale = quantize_rows_reference(factor)
        assert torch.equal(sx, wanted_scale) and torch.equal(x8.view(torch.uint8), wanted.view(torch.uint8))
        reference = fp8_mm_reference(x8, sx, eight, scale, torch.bfloat16)
        ours = fp8_mm(x8, sx, eight, scale, torch.bfloat16)
        assert torch.isfinite(ours).all()
        assert relative_error(ours, truth) < 1.1 * relative_error(reference, truth) < 0.06
    x8, sx = quantize_rows(x)
    biased = fp8_mm(x8, sx, weight.rows, weight.row_scale, torch.bfloat16, bias)
    assert torch.equal(biased, fp8_mm(x8, sx, weight.rows, weight.row_scale, torch.bfloat16) + bias)
    assert relative_error(biased, x.double() @ w.double().t() + bias) < 0.06
