"""TRL's trainers with the step's surroundings changed: rows end to end, and nothing that waits for the GPU.

What is computed stays TRL's: the same rows a step, the same loss and denominator, the same metrics under their names.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from aligntune.backends.fast import rehearsal
from aligntune.backends.fast.graph_shapes import planned_tokens
from aligntune.backends.fast.graphs import ReplayedSteps
from aligntune.backends.fast.memory import MemoryPlan, scores_held
from aligntune.backends.fast.online import FlatLogProbs
from aligntune.backends.fast.optim import EmbeddingRate
from aligntune.backends.fast.packing import IGNORED, RowsEndToEnd, attention_padded_because, noise_padded_because
from aligntune.backends.fast.ppo import FastPPO
from aligntune.backends.fast.preference import FastDPO
from aligntune.backends.fast.preference_free import FastCPO, FastORPO
from aligntune.backends.fast.preference_unpaired import FastKTO
from aligntune.backends.fast.reward import FastReward
from aligntune.backends.fast.rollout.trl import FastRollouts, ScoredRollouts
from aligntune.backends.fast.token_count import TokenCount
from aligntune.backends.fast.token_gradients import GRPOTokenGradients
from aligntune.backends.trl.trainers import DAPO, GRPO, RLOO, SFT, TRAINERS

if TYPE_CHECKING:
    from transformers import Trainer

    from aligntune.backends.fast.attachment import Attachment

_COLUMNS = ("input_ids", "labels", "seq_lengths")


def padded_because(trainer: Trainer, attachment: Attachment) -> str | None:
    """Why rows of this trainer's batches cannot lie end to end, or None where they can."""
    if attachment.head is None or attachment.head.options is None or not attachment.head.options.trl:
        return "the head is not ours"
    if trainer.aux_loss_enabled:
        return "the router's loss wants a mask"
    if trainer.label_smoother is not None or callable(trainer.compute_loss_func):  # TRL may set a string
        return "its loss wants logits"
    return noise_padded_because(trainer) or attention_padded_because(attachment)


def _as_arrays(rows: Any) -> Any:
    """The rows as arrays over the table's memory, for lists of Python's ints; with no column that they did not show.

    A transform of the user's (`set_transform`) takes a format's place and makes the rows: such ones stay as they are.
    """
    if not isinstance(rows, Dataset) or rows.format["type"] == "custom":
        return rows
    shown = rows.column_names if rows.format["output_all_columns"] else rows.format["columns"]
    return rows.with_format("numpy", columns=[name for name in _COLUMNS if name in shown])


class FastSFT(TokenCount, EmbeddingRate, ReplayedSteps, SFT):
    """TRL's SFTTrainer; training batches are rows end to end where the model allows it."""

    rows_end_to_end = False
    padded_collator = DataCollatorForLanguageModeling  # this class and no other: what overrides it lays rows otherwise
    memory: MemoryPlan | None = None
    _to_rehearse: tuple[Any, RowsEndToEnd] | None = None
    _rehearsed: Any = None

    def get_train_dataloader(self) -> Any:
        if not self.rows_end_to_end:
            return super().get_train_dataloader()
        padded, rows = self.data_collator, self.train_dataset  # type: ignore[has-type]
        self.data_collator = RowsEndToEnd(self._tokenizer.pad_token_id, packed=padded.padding_free)
        self.train_dataset = _as_arrays(rows)
        self._to_rehearse = self.train_dataset, self.data_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = padded  # evaluation pads, as TRL does: it has no step to keep short
            self.train_dataset = rows

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """transformers'; when a training's first are there and no step has begun, a pass over the longest batch."""
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if batches and self._rehearsed is not self.state:
            self._rehearsed = self.state  # every training makes its own, and so does each try of auto_find_batch_size
            if self._to_rehearse is not None and rehearsal.wanted(self):
                self._rehearse(*self._to_rehearse, first=batches[0]["input_ids"].numel())
        return batches, num_items_in_batch

    def _rehearse(self, rows: Any, collate: RowsEndToEnd, *, first: int) -> None:
        """Of its own, so that what times a step can leave it out."""
        rehearsal.rehearse(self, rows, collate, first=first)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """TRL's, within the memory that is planned with."""
        if self.memory is None:
            return super().training_step(model, inputs, num_items_in_batch)
        most = planned_tokens(inputs, capture=self.capture)
        length = scores_held(self.model, inputs["input_ids"].shape[-1]) if "num_tokens" not in inputs else 0
        with self.memory.step(inputs["input_ids"].numel(), number=self.state.global_step, most=most, length=length):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, - sum of log p over `num_items_in_batch`; metrics stay on the GPU until they are logged."""
        if "num_tokens" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        num_tokens = inputs.pop("num_tokens")
        inputs["use_cache"] = False
        # A mask of width 0: transformers hands a 4-dimensional mask on as it is, and our attention reads the sign. An
        # attention that is not ours cannot take it for a mask and fails.
        inputs["attention_mask"] = inputs["input_ids"].new_empty((1, 1, 1, 0), dtype=torch.bool)
        num_valid = (inputs["shift_labels"] != IGNORED).sum()
        denominator = (num_valid if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)).clamp(min=1)
        graphs = self._graphs(model)
        if graphs is not None:
            outputs = SimpleNamespace(**graphs(inputs), loss=None)
        else:
            # The mean over tokens is a loss whose gradient the head can make in its forward.
            over = {"loss_over": denominator} if self.args.loss_type == "nll" and self._head_trains() else {}
            outputs = model(**inputs, fused_lm_head=True, **over)
            if not over:
                outputs.loss = None
        loss = outputs.loss
        if loss is None:
            per_token_loss = -outputs.log_probs
            if self.args.loss_type == "dft":
                per_token_loss = per_token_loss * outputs.log_probs.exp().detach()
            loss = per_token_loss.sum() / denominator
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self._note(outputs, num_valid, num_tokens)
        return (loss, outputs) if return_outputs else loss

    def _head_trains(self) -> bool:
        return self.model.training and self.model.get_output_embeddings().weight.requires_grad

    def _note(self, outputs: Any, num_valid: torch.Tensor, num_tokens: int) -> None:
        sums = torch.stack([num_valid.float(), outputs.entropy.detach().sum().float(), outputs.is_top1.sum().float(),
                            self._number(num_tokens)])
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        count = sums[0].clamp(min=1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["entropy"].append(sums[1] / count)
        metrics["mean_token_accuracy"].append(sums[2] / count)
        self._note_tokens(num_tokens, sums[3].double())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The one place that reads metrics from the GPU."""
        for values in self._metrics["train" if self.model.training else "eval"].values():
            values[:] = [value.item() if isinstance(value, torch.Tensor) else value for value in values]
        super().log(logs, start_time)


class FastGRPO(EmbeddingRate, FastRollouts, GRPOTokenGradients, FlatLogProbs, GRPO):
    """TRL's GRPOTrainer; completions come from our engine, and log-probs of rows end to end."""


class FastDAPO(EmbeddingRate, FastRollouts, GRPOTokenGradients, FlatLogProbs, DAPO):
    """The same with dynamic sampling."""


class FastRLOO(EmbeddingRate, ScoredRollouts, FlatLogProbs, RLOO):
    """TRL's RLOOTrainer; completions come from our engine, and log-probs of rows end to end."""


FAST_TRAINERS = TRAINERS | {"sft": FastSFT, "dpo": FastDPO, "ipo": FastDPO, "grpo": FastGRPO, "dr_grpo": FastGRPO,
                            "kto": FastKTO, "orpo": FastORPO, "simpo": FastCPO, "cpo": FastCPO, "reward": FastReward,
                            "dapo": FastDAPO, "rloo": FastRLOO, "ppo": FastPPO}
