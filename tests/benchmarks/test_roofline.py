"""The parts of a step and their bounds."""

from __future__ import annotations

import json

import pytest

from benchmarks import tables
from benchmarks.sft import roofline
from benchmarks.sft.__main__ import traced
from benchmarks.sft.workloads import MODES

CARD = {"flops_per_s": 1e15, "bytes_per_s": 1e12}


def test_sizes_of_a_llama_1b():
    shape = roofline.Shape.of("llama-1b")
    assert shape.linear == 973_078_528  # 1,235,814,400 without the embedding's 262,668,288 and the norms' 67,584
    assert roofline._trained(shape, "lora-1b") == 11_272_192 and MODES["lora"]["lora_r"] == 16


def test_bounds_by_hand():
    tokens, linear, head = 8192, 973_078_528, 128_256 * 2048
    found = roofline.bounds_ms("full-1b", CARD)
    assert found["products"] == pytest.approx(6e-12 * tokens * (linear + head))
    # Four rows, 16 layers, 32 heads of 64: two products over half a square forward, five backward.
    assert found["attention"] == pytest.approx(1e-12 * 7 * 4 * 2048**2 * 32 * 64 * 16)
    assert found["loss"] == pytest.approx(1e-9 * 4 * tokens * 128_256) and "NF4" not in found
    assert found["optimizer"] == pytest.approx(1e-9 * 16 * (linear + head))
    lora = roofline.bounds_ms("lora-1b", CARD)
    adapters = 2 * tokens * 16 * (2 * (3 * 2048 + 8192) + 3072 + 2048 + 16_384 + 2048)
    assert lora["products"] == pytest.approx(4e-12 * tokens * (linear + head) + 1e-9 * adapters)
    assert lora["GLU"] == pytest.approx(1e-9 * 16 * 8 * 2 * tokens * 8192)
    assert lora["norms"] == pytest.approx(1e-9 * 33 * 8 * 2 * tokens * 2048)
    assert lora["rotation"] == pytest.approx(1e-9 * 16 * 4 * 2 * tokens * (2048 + 512))
    assert roofline.bounds_ms("qlora-8b", CARD)["NF4"] == pytest.approx(1e-9 * 6_979_321_856 * 5.125)


def test_bounds_of_uneven_rows_are_those_of_their_tokens():
    """Two documents of 30 and 40 tokens: 70 tokens, and attention over 900 + 1600."""
    full, found = (roofline.bounds_ms("lora-1b-ragged", CARD, sizes=sizes) for sizes in (
        {"tokens": 16 * 2048, "squared": 16 * 2048**2}, {"tokens": 70, "squared": 2500}))  # fmt: skip
    assert roofline.bounds_ms("lora-1b-ragged", CARD) == full
    assert found["attention"] == pytest.approx(full["attention"] * 2500 / (16 * 2048**2))
    for part in full.keys() - {"attention", "optimizer"}:
        assert found[part] == pytest.approx(full[part] * 70 / (16 * 2048)), part
    assert found["optimizer"] == full["optimizer"]


def test_bounds_of_a_base_in_fp8():
    tokens, linear = 8192, 973_078_528
    bf16, found = (roofline.bounds_ms("lora-1b", CARD, fp8=fp8) for fp8 in (False, True))
    assert bf16["products"] - found["products"] == pytest.approx(4e-12 * tokens * linear / 2), "not the head's"
    # Read in bf16 and written in a byte: inputs of the four groups, gradients of the seven outputs.
    widths = 3 * 2048 + 8192 + 3072 + 2048 + 16_384 + 2048
    assert found["quantising"] == pytest.approx(1e-9 * 3 * tokens * 16 * widths) and "quantising" not in bf16


def test_without_the_traced_step_s_lengths_uneven_rows_have_no_bound():
    entry = {"row": "lora-1b-ragged", "arm": "fast", "trace": {
        "busy": 0.003, "idle": 0.001, "kernels": {"glu_backward": 0.003}}}  # fmt: skip
    assert roofline.parts(entry, CARD) == [
        ("GLU", 3.0, None), (roofline.IDLE, 1.0, None), ("the traced step", 4.0, None)]
    entry["traced"] = {"tokens": 70, "squared": 2500}
    assert roofline.parts(entry, CARD)[0][2] > 0


def test_the_traced_step_s_sizes_are_kept():
    run = {"trace": {"step": 5}, "steps": [{"step": i, "tokens": 10 * i, "squared": i} for i in (4, 5, 6)]}
    assert traced(run) == {"tokens": 50, "squared": 5} and traced({**run, "trace": None}) is None


def test_kernels_by_part_and_what_no_kernel_names():
    trace = {"busy": 0.0101, "idle": 0.0005, "kernels": {
        "nvjet_sm90_tst_320x128_64x3": 0.004, "void cublasLt::splitKreduce_kernel<32>": 0.001, "glu_backward": 0.002,
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": 0.0005, "qk_norm_rope_forward": 0.0004,
        "rms_norm_forward": 0.0003, "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<x>": 0.0006,
        "Memcpy DtoD (Device -> Device)": 0.0002, "nf4_dequant_kernel": 0.0007, "logits_loss": 0.0003,
    }}  # fmt: skip
    found = roofline.measured_ms(trace)
    assert roofline.measured_ms({**trace, "kernels": {"quantize_rows_together_kernel": 0.01}})["quantising"] == 10
    assert found == pytest.approx({"products": 5.0, "GLU": 2.0, "attention": 0.5, "rotation": 0.4, "norms": 0.3,
                                   "optimizer": 0.6, "NF4": 0.7, "loss": 0.3, roofline.REST: 0.3, roofline.IDLE: 0.5})
    assert sum(found.values()) == pytest.approx(1e3 * (trace["busy"] + trace["idle"]))


@pytest.mark.parametrize(("row", "arm"), roofline.ROWS)
def test_a_committed_row_s_parts(row, arm):
    """All of the traced step is in the parts, the products are the most or attention is, and no bound is absurd."""
    report = json.loads((tables.RESULTS / "sft" / f"{row}.json").read_text())
    fast = roofline.shown(arm, report)
    assert fast is not None
    *found, whole = roofline.parts(fast, report["ceilings"])
    assert whole[1] == pytest.approx(1e3 * (fast["trace"]["busy"] + fast["trace"]["idle"]), rel=2e-3)
    # A ragged step is longer or shorter by its tokens.
    of_mean = (fast.get("traced") or {"tokens": fast["tokens_per_step"]})["tokens"] / fast["tokens_per_step"]
    assert 0.85 < whole[1] / fast["step_ms"] / of_mean < 1.05
    by_part = {part: (ms, bound) for part, ms, bound in found}
    assert max(by_part, key=lambda part: by_part[part][0]) in ("products", "attention")
    assert by_part[roofline.REST][0] < 0.03 * whole[1]
    if whole[2] is None:
        assert "traced" not in fast and row in ("lora-1b-ragged", "lora-1b-packed")
        return
    # A shape that is filled up to one that was captured computes more than its tokens.
    least = 0.65 if row == "lora-1b-ragged" else 0.8
    assert whole[2] < whole[1] and least < by_part["products"][1] / by_part["products"][0] < 1
    assert all(bound < 1.25 * ms for ms, bound in by_part.values() if bound is not None)
