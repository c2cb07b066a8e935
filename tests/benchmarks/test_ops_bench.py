"""The op benchmarks: rows, bounds, refusals, and a toy run."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch

from aligntune.backends.fast.ops import _runtime
from benchmarks.ops import MODULES, __main__, bench

ROWS = [row for name in MODULES for row in importlib.import_module(f"benchmarks.ops.{name}").ROWS]


def test_rows_have_unique_names_and_bounds():
    assert len({row.name for row in ROWS}) == len(ROWS) > 10
    by_name = {row.name: row for row in ROWS}
    norm, added = by_name["rms_norm 4096 frozen"], by_name["rms_norm 4096 +add trained"]
    assert norm.moved(norm.shape, 2) == (4 * 8192 * 4096, 6 * 8192 * 4096)
    assert added.moved(added.shape, 2) == (8 * 8192 * 4096, 8 * 8192 * 4096)
    glu = by_name["glu silu 8192"]
    assert glu.moved(glu.shape, 2) == (6 * 8192 * 8192, 10 * 8192 * 8192)
    heads, tables = 2 * 8192 * 40 * 128, 2 * 2 * 2048 * 128
    rope, normed = by_name["rope 32+8 x 128"], by_name["qk_norm_rope frozen 32+8 x 128"]
    assert rope.moved(rope.shape, 2) == (2 * heads + tables,) * 2
    assert normed.moved(normed.shape, 2) == (2 * heads + tables, 3 * heads + tables)


def test_shares_of_the_ceiling():
    row = next(row for row in ROWS if row.name == "rms_norm 4096 frozen")
    ceilings = bench.Ceilings(bytes_per_s=3e12, flops_per_s=7e14)
    forward_bound, backward_bound = 4 * 8192 * 4096 / 3e9, 6 * 8192 * 4096 / 3e9
    found = bench.bounds(row, row.shape, ceilings, 2 * forward_bound, 2 * forward_bound + 4 * backward_bound)
    assert found["forward_of_ceiling"] == pytest.approx(0.5)
    assert found["backward_of_ceiling"] == pytest.approx(0.25)
    assert found["both_of_ceiling"] == pytest.approx(
        (forward_bound + backward_bound) / (2 * forward_bound + 4 * backward_bound)
    )
    assert math.isnan(bench.bounds(row, row.shape, ceilings, 1.0, 1.0)["backward_of_ceiling"])
    assert ceilings.bound_ms(3e9, 14e11) == pytest.approx(2.0)  # the product takes longer than the bytes


@pytest.mark.parametrize("name", MODULES)
def test_a_toy_run_of_a_row(name, device):
    row = importlib.import_module(f"benchmarks.ops.{name}").ROWS[0]
    eager, ours = bench.measure(row, None, device=device, smoke=True)
    assert (eager["implementation"], ours["implementation"]) == ("eager", "ours")
    assert 0 < eager["error"] < 0.01 and 0 < ours["error"] < 0.02


def test_a_wrong_op_shows_in_its_error():
    x = torch.randn(100)
    assert bench.worst_error((x, x), (x, x)) == 0
    assert bench.worst_error((x, 1.5 * x), (x, x)) == pytest.approx(0.5)
    assert math.isnan(bench.worst_error((x * math.nan,), (x,)))


def test_no_number_is_written_without_a_gpu(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit):
        __main__.main(["--smoke", "--json", str(out)])
    assert "writes nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        __main__.main(["rms_nrom"])
    assert "unknown: rms_nrom" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert __main__.main(["--json", str(out)]) == 1 and not out.exists()
    assert "need an NVIDIA GPU" in capsys.readouterr().err


def test_smoke_says_what_it_is(capsys):
    if not _runtime.interpreting():
        pytest.skip("smoke of the interpreter")
    assert __main__.main(["--smoke", "rms_norm", "--only", "2048 frozen"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("smoke: toy sizes; these times mean nothing")
    assert "rms_norm 2048 frozen" in out and "liger" not in out and "compile" not in out


@pytest.mark.gpu
def test_gpu_a_row_and_its_report(tmp_path):
    out = tmp_path / "out.json"
    assert __main__.main(["rms_norm", "--only", "2048 frozen", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert {"command", "commit", "device", "versions", "copy_bytes_per_s", "bf16_flops_per_s"} < report.keys()
    found = {entry["implementation"]: entry for entry in report["rows"]}
    assert {"eager", "torch.compile", "ours"} <= found.keys()
    assert 0.3 < found["ours"]["forward_of_ceiling"] < 1.3  # past 1.3 something was not read or written
