"""TRL's trainers with what no option changes: whose data, no telemetry, dynamic sampling, whole checkpoints.

Losses, generation, optimisation are TRL's own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
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


class _KeepsRollout:
    """Mixin: a rollout under way is part of a checkpoint, as the random state is; TRL would sample another.

    GSPO has one under way after three steps in four.
    """

    def _rollout_file(self: Any, folder: str) -> Path:
        return Path(folder, f"rollout_{self.args.process_index}.pth")

    def _save_rng_state(self: Any, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        if self._buffered_inputs is not None and self._step % (self.args.steps_per_generation * self.num_iterations):
            torch.save(self._buffered_inputs, self._rollout_file(output_dir))

    def _load_rng_state(self: Any, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        if checkpoint is not None and self._rollout_file(checkpoint).is_file():
            self._buffered_inputs = torch.load(
                self._rollout_file(checkpoint), map_location=self.accelerator.device, weights_only=True)


class GRPO(_KeepsRollout, Quiet, GRPOTrainer):
    """TRL's GRPOTrainer."""


class DAPO(DynamicSampling, GRPO):
    """TRL's GRPOTrainer on batches whose groups have a spread of rewards."""


class RLOO(_KeepsRollout, Quiet, RLOOTrainer):
    """TRL's RLOOTrainer."""


TRAINERS = {"sft": SFT, "reward": Reward, "dpo": DPO, "ipo": DPO, "kto": KTO, "orpo": ORPO, "simpo": CPO, "cpo": CPO,
            "rloo": RLOO, "grpo": GRPO, "gspo": GRPO, "dapo": DAPO, "dr_grpo": GRPO,
            "ppo": PPOTrainer}


def _not_of_the_reference(record: logging.LogRecord) -> bool:
    """Not TRL's word that `model_init_kwargs` are ignored: the reference is loaded with them."""
    return "You passed `model_init_kwargs`" not in record.getMessage()


@contextlib.contextmanager
def reference_from_memory(model: Any, args: Any) -> Iterator[None]:
    """While open, TRL's "load the reference by name" loads the weights that `model` holds in memory.

    GRPO and RLOO take no `ref_model`: they read `config._name_or_path` again, which for a model that was changed in
    memory is another model, and for one built in memory is nothing; and they would spread it over all GPUs that the
    process sees. Here it comes to the GPU of `args`, the trainer's arguments.

    Raises:
        BackendUnavailableError: the processes share no folder to write the weights to.
    """
    name, given = model.config._name_or_path, args.model_init_kwargs

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
        if args.device.type == "cuda":
            args.model_init_kwargs = {**(given or {}), "device_map": {"": args.device}}
        with contextlib.ExitStack() as quiet:
            for trainer in (GRPOTrainer, RLOOTrainer):
                told = logging.getLogger(trainer.__module__)
                told.addFilter(_not_of_the_reference)
                quiet.callback(told.removeFilter, _not_of_the_reference)
            yield
    finally:
        model.config._name_or_path, args.model_init_kwargs = name, given
        PartialState().wait_for_everyone()  # to have read it
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)
