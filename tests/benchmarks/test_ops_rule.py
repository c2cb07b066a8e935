"""The committed figures of ops hold the rule by which a kernel is kept, and name the peers that each op has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "ops"
EAGER, COMPILED = 1.15, 1.05  # at least so many times eager's speed, at most so many times torch.compile's time

# file -> the methods that stand for eager and for torch.compile, and the peers' own
METHODS: dict[str, tuple[str, str, set[str]]] = {
    "head": ("eager", "torch.compile", {"trl chunked", "liger fused", "liger"}),
    "lora": ("eager PEFT", "torch.compile of PEFT", set()),
    "nf4": ("eager", "torch.compile", {"bitsandbytes"}),
    "fp8": ("eager", "torch.compile", set()),
    "decode": ("eager", "torch.compile", {"products apart"}),
    "adamw": ("torch fused, flat", "torch.compile, flat", {"torch fused, LoRA's tensors"}),
}
FIGURES = ("method", "ms", "tflops", "over_gemms", "peak_gib", "loss", "error", "of_bound")


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["elementwise", *METHODS])
def test_they_are_of_an_h100_and_a_commit(name: str) -> None:
    report = read(name)
    assert "H100" in report["device"] and len(report["commit"]) == 40
    assert 2.5e12 < report["copy_bytes_per_s"] < 3.4e12


def test_elementwise_ops() -> None:
    rows: dict[str, dict[str, Any]] = {}
    for row in read("elementwise")["rows"]:
        rows.setdefault(row["row"], {})[row["implementation"]] = row
    assert {name.split()[0] for name in rows} == {"rms_norm", "glu", "rope", "qk_norm_rope"}
    for name, found in rows.items():
        # liger has no exact GELU, and no norm before its rotary embedding
        peers = set() if name.startswith("qk_norm") or name.startswith("glu gelu ") else {"liger"}
        assert set(found) == {"eager", "torch.compile", "ours"} | peers, name
        ours = found["ours"]
        assert 0.5 < ours["both_of_ceiling"] <= 1.02 and ours["error"] < 2 * found["eager"]["error"], name
        for kind in ("forward_ms", "forward_backward_ms"):
            assert found["eager"][kind] >= EAGER * ours[kind] and ours[kind] <= COMPILED * found["torch.compile"][kind]


@pytest.mark.parametrize("name", METHODS)
def test_ops_with_a_memory_of_their_own(name: str) -> None:
    """As quick as the rule asks, or in less memory than torch.compile."""
    eager, compiled, peers = METHODS[name]
    groups: dict[str, dict[str, Any]] = {}
    for row in read(name)["rows"]:
        key = json.dumps({key: value for key, value in row.items() if key not in FIGURES}, sort_keys=True)
        groups.setdefault(key, {})[row["method"]] = row
    assert len(groups) > 2 and peers <= {method for found in groups.values() for method in found}
    for key, found in groups.items():
        if set(found) == {"bare GEMMs"}:  # what bounds are taken from
            continue
        # AdamW that writes a copy in bf16 too, or rounds to bf16 parameters, moves other bytes than its peers.
        ours = {method: row for method, row in found.items() if method == "ours" or name == "head" and "ours" in method}
        assert ours, key
        for method, row in ours.items():
            quick = found[eager]["ms"] >= EAGER * row["ms"] and row["ms"] <= COMPILED * found[compiled]["ms"]
            saves = row["peak_gib"] < found[compiled]["peak_gib"] and row["peak_gib"] < found[eager]["peak_gib"]
            assert quick or saves, f"{key}: {method}"
