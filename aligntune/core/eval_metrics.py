"""Evaluation means over rows, or over tokens where the loss is one of tokens, instead of over batches.

transformers and TRL average the batches' means: with 5 rows in batches of 4, the fifth row counts as much as the other
four together. Here a mean is the same number whatever `eval_batch_size` is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_TOKEN_MEANS = ("entropy", "mean_token_accuracy")


@dataclass
class _Batch:
    rows: float
    tokens: torch.Tensor | None
    loss: torch.Tensor | None


class Averages:
    """Weighs what `trainer` logs in evaluation; installed on that one trainer instance.

    Args:
        trainer: a TRL trainer.
        per_token: its loss is the mean negative log-likelihood of the supervised tokens of a batch (SFT).
    """

    def __init__(self, trainer: Any, *, per_token: bool) -> None:
        self._trainer = trainer
        args = trainer.args
        self._per_token = per_token
        self._nll = (
            per_token and getattr(args, "loss_type", "nll") == "nll" and not args.label_smoothing_factor
            and not callable(trainer.compute_loss_func)
        )
        self._batches: list[_Batch] = []
        self._step = trainer.prediction_step
        trainer.prediction_step = self._prediction_step

    def _prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        rows = _rows(inputs)
        batch = _Batch(self._own_rows(rows), None, None)
        if self._per_token:
            if 0 < batch.rows < rows and all(getattr(value, "shape", ())[:1] == (rows,) for value in inputs.values()):
                inputs = {key: value[: int(batch.rows)] for key, value in inputs.items()}
            batch.tokens = _tokens(inputs)
            if batch.tokens is not None and not batch.rows:
                batch.tokens = batch.tokens * 0
        outcome = self._step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        batch.loss = outcome[0].detach().float() if outcome[0] is not None else None
        self._batches.append(batch)
        return outcome

    def _own_rows(self, rows: float) -> float:
        """How many of this process's rows are not repeats that fill the last round of several processes."""
        accelerator = self._trainer.accelerator
        state = accelerator.gradient_state
        if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - accelerator.process_index * rows, 0), rows)

    def amend(self, logs: dict[str, Any]) -> dict[str, float]:
        """Replace the evaluation means in `logs`, in place; returns what was changed or added.

        For SFT: `eval_loss` becomes the mean over all supervised tokens and `eval_perplexity` its exponential.
        """
        batches, self._batches = self._batches, []
        loss_key = next((key for key in logs if key.startswith("eval") and key.endswith("_loss")), None)
        if loss_key is None or not batches:
            return {}
        rows = self._sum_over_processes([batch.rows for batch in batches])
        tokens = None
        if all(batch.tokens is not None for batch in batches):
            mine = [float(batch.tokens) for batch in batches if batch.tokens is not None]
            tokens = self._sum_over_processes(mine)
        changed: dict[str, float] = {}
        if self._nll and tokens is not None and sum(tokens):
            summed = [float(b.loss) * float(b.tokens) for b in batches if b.loss is not None and b.tokens is not None]
            loss = sum(self._sum_over_processes(summed)) / sum(tokens)
            changed[loss_key] = loss
            changed[f"{loss_key.removesuffix('_loss')}_perplexity"] = math.exp(loss) if loss < 700 else math.inf
        for name, values in (getattr(self._trainer, "_metrics", None) or {}).get("eval", {}).items():
            weights = tokens if name in _TOKEN_MEANS and tokens is not None else rows
            # A list of another length has batches that logged nothing (KTO without a chosen row): leave it to TRL.
            if len(values) == len(batches) and f"eval_{name}" in logs:
                mean = _weighted(values, weights)
                if mean is not None:
                    changed[f"eval_{name}"] = mean
        logs.update(changed)
        return changed

    def _sum_over_processes(self, values: list[float]) -> list[float]:
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return values
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        return accelerator.reduce(torch.tensor(values, dtype=dtype, device=accelerator.device), "sum").tolist()


def _weighted(values: list[float], weights: list[float]) -> float | None:
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if not math.isnan(value)]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def _rows(inputs: Any) -> float:
    if not isinstance(inputs, Mapping):
        return float(len(inputs))
    positions = inputs.get("position_ids")
    if isinstance(positions, torch.Tensor) and "attention_mask" not in inputs:
        return float((positions == 0).sum())  # rows end to end in one sequence
    for value in inputs.values():
        if isinstance(value, torch.Tensor) and value.ndim:
            return float(value.shape[0])
    return 1.0


def _tokens(inputs: Any) -> torch.Tensor | None:
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    return (labels[:, 1:] != -100).sum() if isinstance(labels, torch.Tensor) else None
