"""Rows that share prompts: as many tokens are spared as the row of the table says, and the numbers are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aligntune.backends.fast import shared_prompts as ours
from aligntune.backends.fast.online import Flat
from benchmarks import shared_prompts


def test_a_row_spares_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "LEAST_SAVED", 0.0)
    found = shared_prompts.cells(smoke=False)
    assert {group for group, *_ in found} == {2, 8} and len(found) == len(set(found)) == 14
    for group, length, prompt, tokens in found:
        ids, mask = shared_prompts.batch_of(group, length, prompt, tokens, 1000, "cpu")
        assert ids.numel() == tokens and len({tuple(row[:prompt].tolist()) for row in ids}) == len(ids) // group
        flat = Flat.of(ids, mask, length - prompt, share=True)
        spared = 1 - flat.inputs["input_ids"].numel() / tokens
        assert min(abs(spared - wanted) for wanted in shared_prompts.SAVED) < 0.01


@pytest.mark.slow
def test_a_toy_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(shared_prompts, "SAVED", (0.05, 0.3))
    assert shared_prompts.main(["--smoke", "--json", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [round(row["saved"], 2) for row in rows] == [0.05, 0.3]
    assert all(0 < row["gradients_apart"] < 1e-5 and row["shared_ms"] > 0 for row in rows)
    assert capsys.readouterr().out.count("saved") == 2
    assert ours.LEAST_SAVED == 0.1, "only the runs' own"
