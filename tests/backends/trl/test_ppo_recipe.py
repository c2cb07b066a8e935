"""PPO lifts held-out reward: a whole training on sums, a few minutes long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aligntune import run_recipe

RESULT = Path(__file__).parents[3] / "benchmarks/results/recipes/ppo-builtin.json"


@pytest.mark.slow
def test_the_recipe_lifts_held_out_accuracy(tmp_path: Any) -> None:
    run_recipe("ppo-builtin", {"output_dir": str(tmp_path / "run"), "seed": 5})
    stages = json.loads((tmp_path / "run/recipe.json").read_text())["stages"]
    before, after = (stage["result"]["probe_after"] for stage in stages)
    assert 0.2 < before < 0.8 and after >= before + 0.2, (before, after)


def test_the_committed_result_has_three_seeds_each_lifted() -> None:
    rows = json.loads(RESULT.read_text())["rows"]
    assert len({row["seed"] for row in rows}) >= 3
    for row in rows:
        assert row["scores"]["after ppo"] >= row["scores"]["after sft"] + 0.2, row
