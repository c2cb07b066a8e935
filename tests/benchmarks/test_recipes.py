"""What `benchmarks.recipes` committed of the quickstart, and what it reads off a run's folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks import recipes
from benchmarks.tables import RESULTS

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def test_the_quickstart_did_what_it_promises() -> None:
    """Three seeds on two cores, in the torch of the constraints; each score rises, and SFT leaves room."""
    report = json.loads((RESULTS / "recipes/quickstart.json").read_text())
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", CONSTRAINTS.read_text(), flags=re.M))
    assert list(report["versions"]) == list(recipes.PACKAGES)
    assert report["versions"]["torch"].split("+")[0] == pinned["torch"]
    rows = report["rows"]
    assert len({row["seed"] for row in rows}) >= 3
    for row in rows:
        before, tuned, aligned = row["scores"].values()
        assert list(row["scores"]) == ["before", "after sft", "after grpo"]
        assert before < 0.05 < tuned < aligned
        assert row["threads"] == 2 and 30 < row["wall_s"] <= 300
        assert set(row["tokens_per_s"]) == {"sft", "grpo"} and min(row["tokens_per_s"].values()) > 100
    assert 0.5 < fmean(row["scores"]["after sft"] for row in rows) < 0.7
    assert fmean(row["scores"]["after grpo"] - row["scores"]["after sft"] for row in rows) >= 0.15


@pytest.mark.parametrize("absolute", [True, False])
def test_a_row_is_read_off_the_folders_of_the_stages(absolute: bool, tmp_path: Path) -> None:
    stages = []
    for number, (algorithm, score) in enumerate((("sft", 0.6), ("grpo", 0.8)), 1):
        folder = tmp_path / f"{number}-{algorithm}"
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps({"algorithm": algorithm, "tokens_per_second": 100.0 * number}))
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "loss": 1.0, "reward": 0.123456, "kl": 0.01}) + "\n")
        stages.append({"config": {"seed": 7}, "result": {
            "algorithm": algorithm, "global_step": 10 * number, "probe_before": 0.0 if number == 1 else None,
            "probe_after": score, "output_dir": str(folder) if absolute else folder.name}})
    (tmp_path / "recipe.json").write_text(json.dumps({"stages": stages, "probe": "sums"}))
    assert recipes.result(tmp_path) == {
        "seed": 7, "probe": "sums", "scores": {"before": 0.0, "after sft": 0.6, "after grpo": 0.8},
        "steps": {"sft": 10, "grpo": 20}, "tokens_per_s": {"sft": 100.0, "grpo": 200.0},
        "history": {"reward": [[1, 0.1235]], "kl": [[1, 0.01]]}}
