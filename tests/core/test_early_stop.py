"""Training stops, with a checkpoint, once an evaluation is good enough."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aligntune import ConfigError, create_sft_trainer
from aligntune.core.early_stop import StopAt
from tests.core import tiny

ROWS = [{"prompt": "say", "completion": " ab"} for _ in range(16)]


@pytest.mark.parametrize(("metric", "value", "logged", "stops"), [
    ("reward", 0.5, {"eval_loss": 1.0, "eval_reward": 0.5}, True),
    ("reward", 0.5, {"eval_loss": 1.0, "eval_reward": 0.4}, False),
    ("loss", 0.5, {"eval_loss": 0.6}, False), ("loss", 0.5, {"eval_loss": 0.5}, True),
    ("loss", 0.5, {"loss": 0.1}, False),
])
def test_when_it_stops(metric: str, value: float, logged: dict, stops: bool) -> None:
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    StopAt(metric, value).on_log(None, None, control, logged)  # type: ignore[arg-type]
    assert (control.should_training_stop, control.should_save) == (stops, stops)


def test_a_run_stops_before_its_last_step_and_leaves_a_checkpoint(tmp_path: Any) -> None:
    options: dict[str, Any] = {
        "backend": "trl", "tokenizer_name": tiny.tokenizer(), "max_steps": 60, "batch_size": 8, "learning_rate": 1e-2,
        "report_to": "none", "eval_dataset_name": ROWS[:4], "eval_steps": 2, "stop_metric": "mean_token_accuracy",
        "stop_value": 0.99,
    }
    trainer = create_sft_trainer(tiny.llama(), ROWS, output_dir=str(tmp_path / "a"), **options)
    steps = trainer.train().global_step
    assert 2 <= steps < 60
    assert (tmp_path / "a" / f"checkpoint-{steps}" / "trainer_state.json").is_file()
    wrong = {**options, "stop_metric": "acc"}
    trainer = create_sft_trainer(tiny.llama(), ROWS, output_dir=str(tmp_path / "b"), **wrong)
    with pytest.raises(ConfigError, match="unknown evaluation.stop_metric 'acc'"):
        trainer.train()
