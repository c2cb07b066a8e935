"""TRL's trainers of methods on fixed data, on columns that the pre-flight made.

What is changed is who prepares the rows: TRL would tokenise again, cut, and drop rows without a word.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from trl import KTOTrainer, RewardTrainer

with warnings.catch_warnings():
    # "may change or be removed": the version range of pyproject.toml answers that, not a line in every run.
    warnings.filterwarnings("ignore", message=".*experimental.*")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from aligntune.backends._compat import load_top_adapter
from aligntune.data import with_kl_completions

__all__ = ["CPO", "KTO", "ORPO", "CPOConfig", "ORPOConfig", "Quiet", "Reward"]

_SETTINGS = ("weight_decay", "betas", "eps", "fused")
"""What options say of an optimizer's groups, beside the rate."""


class Quiet:
    """Mixin: no report of use to the hub, which TRL's trainers make when they are built; no card with a checkpoint of
    a model that goes nowhere; on resuming no false alarm, and the schedule and the optimizer's settings of this run.
    """

    _saves = False

    def _send_telemetry(self) -> None:
        return None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._saves = True
        try:
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._saves = False

    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        # Without a repository TRL's card loads a model "None", and says that a local base is one.
        if self.hub_model_id is not None or not self._saves:
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if not self.is_fsdp_enabled:
            load_top_adapter(self.model if model is None else model, resume_from_checkpoint)

    def _issue_warnings_after_load(self: Any, load_result: Any) -> None:
        # A file holds tied weights once, under the embedding's name: transformers then calls the head missing.
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        schedule = self.lr_scheduler
        peaks = list(getattr(schedule, "base_lrs", ()))
        settings = [{name: group[name] for name in _SETTINGS if name in group} for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        _write_settings(self.optimizer, settings)
        if not isinstance(schedule, LambdaLR):
            return
        # What is loaded brings the old run's peaks, which would stay, and the rate of its next step, which would train
        # the first one here: 0 where a linear schedule was at its end.
        schedule.base_lrs = peaks
        schedule._last_lr = [peak * factor(schedule.last_epoch)
                             for peak, factor in zip(peaks, schedule.lr_lambdas, strict=True)]
        for group, peak, rate in zip(schedule.optimizer.param_groups, peaks, schedule._last_lr, strict=True):
            group["initial_lr"], group["lr"] = peak, rate


def _write_settings(optimizer: Any, settings: list[dict[str, Any]]) -> None:
    """Give each group its `settings` in the place of those that were loaded with the optimizer's state."""
    for group, mine in zip(optimizer.param_groups, settings, strict=True):
        group.update(mine)
        if "fused" not in mine:
            continue
        for weight in group["params"]:
            # torch loads the count of steps to where the checkpoint's own setting wants it.
            step = optimizer.state[weight].get("step") if weight in optimizer.state else None
            if isinstance(step, torch.Tensor):
                optimizer.state[weight]["step"] = step.to(weight.device if mine["fused"] else "cpu")


class Reward(Quiet, RewardTrainer):
    """TRL's RewardTrainer on rows that hold `chosen_ids` and `rejected_ids` (and `margin`).

    TRL takes such rows as they are and drops those above `max_length`; the pre-flight has made them bad rows.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, parameter in self.model.named_parameters():
            # On a 4-bit base TRL makes everything trainable bf16. LoRA casts its input to that; a whole score head
            # beside it does not, and fails on fp32 activations.
            if parameter.requires_grad and "modules_to_save" in name:
                parameter.data = parameter.data.float()

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if "chosen_ids" in dataset.column_names:
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)


class KTO(Quiet, KTOTrainer):
    """TRL's KTOTrainer on rows that hold `prompt_ids`, `completion_ids` and `label`."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        columns = dataset.column_names
        if "prompt_ids" not in columns:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if "KL_completion_ids" in columns:
            return dataset
        # TRL never shuffles (the mismatched completions belong to fixed batches), and pairs come as a thousand good
        # completions, then a thousand bad ones: batches of one label have no margin, in evaluation too.
        dataset = dataset.shuffle(seed=args.seed, keep_in_memory=True, load_from_cache_file=False)
        size = args.per_device_train_batch_size if dataset_name == "train" else args.per_device_eval_batch_size
        return with_kl_completions(dataset, size) if self.calculate_KL else dataset


class _PairIds(Quiet):
    """For trainers that tokenise text pairs row by row: `prompt_ids`, `chosen_ids`, `rejected_ids` as their columns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # TRL's newer trainers keep their metrics so; evaluation means over rows are made from them.
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        super().__init__(*args, **kwargs)

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        if "prompt_ids" not in feature:
            return super().tokenize_row(feature, model)  # type: ignore[misc]
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            row |= {f"{side}_input_ids": prompt + answer, f"{side}_attention_mask": [1] * (len(prompt) + len(answer)),
                    f"{side}_labels": [-100] * len(prompt) + answer}
        return row

    def store_metrics(self, metrics: dict[str, float], train_eval: str = "train") -> None:
        super().store_metrics(metrics, train_eval)  # type: ignore[misc]
        for name, value in metrics.items():
            self._metrics[train_eval][name.removeprefix("eval_")].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # type: ignore[misc]
        self._metrics["train" if "loss" in logs else "eval"].clear()


class ORPO(_PairIds, ORPOTrainer):
    """TRL's experimental ORPOTrainer."""


class CPO(_PairIds, CPOTrainer):
    """TRL's experimental CPOTrainer, for CPO and SimPO."""
