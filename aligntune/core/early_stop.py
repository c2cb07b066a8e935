"""Stops training once a metric of an evaluation during training is good enough."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aligntune.errors import ConfigError, unknown


class StopAt(TrainerCallback):
    """Ends training with a checkpoint when `eval_<metric>` reaches `value`; a loss or perplexity has to fall to it.

    Raises:
        ConfigError: an evaluation reports no such metric; names those that it does.
    """

    def __init__(self, metric: str, value: float) -> None:
        self.name = metric if metric.startswith("eval_") else f"eval_{metric}"
        self.value = value
        self.falls = metric.endswith(("loss", "perplexity"))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """TRL adds its evaluation metrics when it logs, so they are read here and not in `on_evaluate`."""
        if not logs or "eval_loss" not in logs:
            return
        if self.name not in logs:
            known = [name.removeprefix("eval_") for name in logs if name.startswith("eval_")]
            raise ConfigError(unknown("evaluation.stop_metric", self.name.removeprefix("eval_"), known))
        reached = logs[self.name] <= self.value if self.falls else logs[self.name] >= self.value
        if reached:
            control.should_training_stop = True
            control.should_save = True
