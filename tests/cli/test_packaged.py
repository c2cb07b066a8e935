"""Every packaged recipe over builtin data trains, as it is but for the number of steps, and is evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aligntune.cli.app import app
from aligntune.core.recipes import packaged, read_recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", [name for name in packaged() if name.endswith("-builtin")])
def test_a_packaged_recipe_trains_resumes_and_is_evaluated(name: str, tmp_path: Path) -> None:
    runner, folder = CliRunner(), str(tmp_path / "run")
    result = runner.invoke(app, ["train", name, f"output_dir={folder}", "max_steps=2"])
    assert result.exit_code == 0, result.output
    algorithms = read_recipe(name).algorithms
    if len(algorithms) > 1:
        folder = f"{folder}/{len(algorithms)}-{algorithms[-1]}"
        assert json.loads(Path(folder, "summary.json").read_text())["steps"] == 2
    else:
        result = runner.invoke(app, ["train", name, f"output_dir={folder}", "max_steps=3", "resume=true"])
        assert result.exit_code == 0, result.output
        summary = json.loads(Path(folder, "summary.json").read_text())
        assert (summary["steps"], summary["resumed_from"]) == (3, f"{folder}/checkpoint-2")
    result = runner.invoke(app, ["evaluate", folder, "--json", "max_eval_samples=16"])
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout.splitlines()[-1])
    assert any(key in metrics for key in ("eval_perplexity", "eval_reward", "eval_rewards/margins", "eval_margin"))
