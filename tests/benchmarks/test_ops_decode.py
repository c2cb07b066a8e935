"""The rows of a decode step's ops: what each method computes, and the bytes of the bounds."""

from __future__ import annotations

import pytest
import torch

from aligntune.backends.fast.ops.sample import FIELDS
from benchmarks.ops import decode, fp8


def test_a_rows_methods_compute_the_same(device):
    linear = [decode.linear_case("q, k, v", 3, 64, (32, 16, 16), base) for base in decode.BYTES]
    for case in (*linear, decode.attention_case(2, 20)):
        torch.manual_seed(0)
        arguments = case.arguments(device)
        found = {name: call(*arguments).float() for name, call in case.methods.items()}
        for name in found:
            assert float(found["eager"].norm()) > 0.1
            torch.testing.assert_close(found[name], found["eager"], atol=0.06, rtol=0.06)
    assert len(found) == 2


def test_a_draw_moves_its_row_on_and_has_room(device):
    case = decode.sample_case(2, 300)
    arguments = case.arguments(device)
    tokens, log_probs = case.methods["eager"](*arguments)
    assert tokens.shape == log_probs.shape == (2, 1) and float(log_probs.max()) < 0
    for _ in range(3):
        case.methods["ours"](*arguments)
    state, outputs = arguments[1:3]
    assert [state[:, FIELDS.index(name)].tolist() for name in ("generated", "active")] == [[3, 3], [1, 1]]
    assert float(outputs.log_probs[:, :3].max()) < 0 == float(outputs.log_probs[:, 3:].abs().max())


def test_bounds_in_bytes_by_hand():
    assert fp8.moved(2, 16) == 3 * 32 + 8
    # A (4, 64) in, three weights and their B, out, and three A of rank 16.
    assert decode.linear_case("q, k, v", 4, 64, (32, 16, 16)).moved == 2 * (
        4 * 64 + 64 * 64 + 64 * 16 + 4 * 64 + 3 * 16 * 64)
    wide, four = (decode.linear_case("q, k, v", 4, 64, (32, 16, 16), base).moved for base in ("fp32", "nf4"))
    assert wide - four == 64 * 64 * (4 - 0.5 - 1 / 64 - 1 / 4096)
    assert decode.attention_case(2, 32).moved == 2 * 2 * (2 * 32 * 8 * 64 + 2 * 32 * 64)
    names = [f"{case.op}: {case.shape}" for case in decode.CASES]
    assert len(set(names)) == len(names) == 31 and min(case.moved for case in decode.CASES) > 1e6


def test_there_is_no_sweep():
    for module in (decode, fp8):
        with pytest.raises(SystemExit, match="no sweep"):
            module.make_rows(3e12, True)
