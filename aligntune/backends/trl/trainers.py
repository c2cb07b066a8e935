"""TRL's trainers with the two things changed that no option changes: who prepares the data, and telemetry.

Losses, generation, optimisation are TRL's own.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from trl import DPOTrainer, GRPOTrainer, SFTTrainer

from aligntune.core.model_hygiene import plain_forward


class _Quiet:
    """TRL trainers report their use to the hub when they are built; ours report nothing."""

    def _send_telemetry(self) -> None:
        return None


class SFT(_Quiet, SFTTrainer):
    """TRL's SFTTrainer on rows that hold `input_ids` and `labels`."""


class DPO(_Quiet, DPOTrainer):
    """TRL's DPOTrainer on rows that hold `prompt_ids`, `chosen_ids` and `rejected_ids`.

    TRL would tokenise again and drop rows without a word; the pre-flight has done both, out loud.
    """

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if "prompt_ids" in dataset.column_names:
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)


class GRPO(_Quiet, GRPOTrainer):
    """TRL's GRPOTrainer."""


TRAINERS = {"sft": SFT, "dpo": DPO, "grpo": GRPO, "gspo": GRPO, "dapo": GRPO, "dr_grpo": GRPO}


@contextlib.contextmanager
def reference_from_memory(model: Any) -> Iterator[None]:
    """While open, TRL's "load the reference by name" loads the weights that `model` holds in memory.

    GRPO and RLOO take no `ref_model`: they read `config._name_or_path` again, which for a model that was changed in
    memory is another model, and for one built in memory is nothing.
    """
    folder = tempfile.mkdtemp(prefix="aligntune-reference-")
    name = model.config._name_or_path
    try:
        with plain_forward(model):
            model.save_pretrained(folder)
        model.config._name_or_path = folder
        yield
    finally:
        model.config._name_or_path = name
        shutil.rmtree(folder, ignore_errors=True)
