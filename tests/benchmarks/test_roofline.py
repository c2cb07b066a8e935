"""The parts of a step and their bounds."""

from __future__ import annotations

import json

import pytest

from benchmarks import tables
from benchmarks.sft import roofline
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


def test_kernels_by_part_and_what_no_kernel_names():
    trace = {"busy": 0.0101, "idle": 0.0005, "kernels": {
        "nvjet_sm90_tst_320x128_64x3": 0.004, "void cublasLt::splitKreduce_kernel<32>": 0.001, "glu_backward": 0.002,
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": 0.0005, "qk_norm_rope_forward": 0.0004,
        "rms_norm_forward": 0.0003, "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<x>": 0.0006,
        "Memcpy DtoD (Device -> Device)": 0.0002, "nf4_dequant_kernel": 0.0007, "logits_loss": 0.0003,
    }}  # fmt: skip
    found = roofline.measured_ms(trace)
    assert found == pytest.approx({"products": 5.0, "GLU": 2.0, "attention": 0.5, "rotation": 0.4, "norms": 0.3,
                                   "optimizer": 0.6, "NF4": 0.7, "loss": 0.3, roofline.REST: 0.3, roofline.IDLE: 0.5})
    assert sum(found.values()) == pytest.approx(1e3 * (trace["busy"] + trace["idle"]))


@pytest.mark.parametrize("row", roofline.ROWS)
def test_a_committed_row_s_parts(row):
    """All of the traced step is in the parts, the products are the most or attention is, and no bound is absurd."""
    report = json.loads((tables.RESULTS / "sft" / f"{row}.json").read_text())
    fast = next(one for one in report["rows"] if one["arm"] == "fast")
    *found, whole = roofline.parts(report)
    assert whole[1] == pytest.approx(1e3 * (fast["trace"]["busy"] + fast["trace"]["idle"]), rel=2e-3)
    assert 0.85 < whole[1] / fast["step_ms"] < 1.05 and whole[2] < whole[1]
    by_part = {part: (ms, bound) for part, ms, bound in found}
    assert max(by_part, key=lambda part: by_part[part][0]) in ("products", "attention")
    assert 0.8 < by_part["products"][1] / by_part["products"][0] < 1 and by_part[roofline.REST][0] < 0.03 * whole[1]
    assert all(bound < 1.25 * ms for ms, bound in by_part.values() if bound is not None)
