"""What a process of a test of two does: `torchrun ... rehearsed_processes.py FOLDER` trains with the pass and without.

Each rank writes, for either run, what it trained and what DDP exchanged.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback

from aligntune.backends.fast import rehearsal
from tests.backends.fast.test_rows_end_to_end import rows, run, trainer_of

# Of the first batches that of one rank is as long as any, and that of the other is not: it alone asks for the pass.
LENGTHS = tuple(30 if i % 6 == 5 else 3 + i % 4 for i in range(24))


class Watch(TrainerCallback):
    """How many buckets of gradients DDP exchanged so far, and the gradients of every step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.exchanged = 0
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.model_wrapped.register_comm_hook(None, lambda group, bucket: self._exchange(group, bucket))

    def _exchange(self, group: Any, bucket: Any) -> Any:
        self.exchanged += 1
        return allreduce_hook(group, bucket)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        trained = self.trainer.model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in trained if p.grad is not None})


def train(folder: Path, *, rehearsed: bool) -> dict[str, Any]:
    """A run of two steps of two rows a process; `passes`: of each its first batch, its tokens and what it left."""
    passes: list[dict[str, Any]] = []
    watch, rehearse = Watch(), rehearsal.rehearse

    def watched(trainer: Any, *args: Any, first: int) -> int | None:
        before = torch.get_rng_state()
        tokens = rehearse(trainer, *args, first=first)
        passes.append({
            "first": first, "tokens": tokens, "exchanged": watch.exchanged,
            "drew": not torch.equal(before, torch.get_rng_state()),
            "gradients": sum(p.grad is not None for p in trainer.model.parameters()),
        })
        return tokens

    rehearsal.rehearse = watched
    rehearsal.longest_drawn = lambda _, lengths: np.argsort(lengths)[-2:]  # longer than those of so few steps
    rehearsal.wanted = lambda trainer: rehearsed and rehearsal.traceless(trainer)
    built = trainer_of("fast", "llama", folder / str(rehearsed), rows(LENGTHS), max_steps=2, batch_size=2,
                       use_peft=True, lora_dropout=0.3, lora_r=4, optimizer="adamw")
    watch.trainer = built.trainer
    built.trainer.add_callback(watch)
    losses, weights, log = run(built)
    rehearsal.rehearse = rehearse
    return {"losses": losses, "weights": weights, "log": log, "passes": passes, "gradients": watch.gradients,
            "exchanged": watch.exchanged, "processes": built.trainer.accelerator.num_processes}


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    torch.save({rehearsed: train(folder, rehearsed=rehearsed) for rehearsed in (True, False)}, folder / f"{rank}.pt")
    dist.barrier()  # a process that leaves while the other still speaks to it is aborted by gloo
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
