"""TRL's trainers with what no option changes: who prepares the data, no telemetry, and DAPO's dynamic sampling.

Losses, generation, optimisation are TRL's own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer, SFTTrainer

from aligntune.backends.trl.dynamic_sampling import DynamicSampling
from aligntune.backends.trl.offline import CPO, KTO, ORPO, Quiet, Reward
from aligntune.backends.trl.ppo import PPOTrainer
from aligntune.core.model_hygiene import plain_forward
from aligntune.core.run_dir import on_main_process
from aligntune.errors import BackendUnavailableError


class SFT(Quiet, SFTTrainer):
    """TRL's SFTTrainer on rows that hold `input_ids` and `labels`."""


class DPO(Quiet, DPOTrainer):
    """TRL's DPOTrainer on rows that hold `prompt_ids`, `chosen_ids` and `rejected_ids`.

    TRL would tokenise again and drop rows without a word; the pre-flight has done both, out loud.
    """

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if "prompt_ids" in dataset.column_names:
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)


class GRPO(Quiet, GRPOTrainer):
    """TRL's GRPOTrainer."""


class DAPO(DynamicSampling, GRPO):
    """TRL's GRPOTrainer on batches whose groups have a spread of rewards."""


class RLOO(Quiet, RLOOTrainer):
    """TRL's RLOOTrainer."""


TRAINERS = {"sft": SFT, "reward": Reward, "dpo": DPO, "ipo": DPO, "kto": KTO, "orpo": ORPO, "simpo": CPO, "cpo": CPO,
            "rloo": RLOO, "grpo": GRPO, "gspo": GRPO, "dapo": DAPO, "dr_grpo": GRPO,
            "ppo": PPOTrainer}


@contextlib.contextmanager
def reference_from_memory(model: Any) -> Iterator[None]:
    """While open, TRL's "load the reference by name" loads the weights that `model` holds in memory.

    GRPO and RLOO take no `ref_model`: they read `config._name_or_path` again, which for a model that was changed in
    memory is another model, and for one built in memory is nothing.
    """
    name = model.config._name_or_path

    def write() -> str:
        folder = tempfile.mkdtemp(prefix="aligntune-reference-")
        with plain_forward(model):
            model.save_pretrained(folder)
        return folder

    # Once, by the main process: in the others save_pretrained writes nothing.
    folder = Path(on_main_process(write))
    if not folder.is_dir():
        raise BackendUnavailableError(f"the reference model was written to {folder}, which this machine does not see; "
                                      "set TMPDIR to a folder that all machines share")
    try:
        model.config._name_or_path = str(folder)
        yield
    finally:
        model.config._name_or_path = name
        PartialState().wait_for_everyone()  # to have read it
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)
