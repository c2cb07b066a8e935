"""The longest batch first: a pass over one as long as a run's longest is expected to be, before the first step.

Rows and their order stay TRL's, so the longest batch comes when it comes. Where memory does not suffice for its forward
and backward, this pass says so at once, and under gradient_checkpointing="auto" it is what the plan measures. What the
optimizer's first step makes is not there yet, unless the run resumes. The pass leaves nothing behind: no gradient, no
metric, no drawn number. The longest of as many batches drawn at random is taken, as the sampler's own order is its own
affair.

Under DDP each process makes the pass over the same rows, the longest of what all of them draw, through the module that
DDP wraps. Its gradients are asked for and do not reach the parameters, where DDP's hooks wait for them: even where they
exchange nothing they note which parameters were used, and one that the first step does not use would be given zeros.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel

from aligntune.backends.fast.graph_shapes import tokens_of

logger = logging.getLogger(__name__)
DRAWS = 4096
"""Batches that are drawn at most: the longest of more is hardly longer."""
LONGER = 1.1
"""How many times the first batch's tokens make a pass of its own worth the time."""
Indices = npt.NDArray[np.int64]


def lengths_of(rows: Any) -> Indices | None:
    """Tokens of each row of a dataset, read from its table; None where they cannot be told so."""
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names or rows.format["type"] == "custom":
        return None
    import pyarrow.compute

    # Offsets of the lists: no token is read. `select` and `shuffle` leave indices over the table.
    table = rows.with_format("arrow")
    column = table.data.column("input_ids")
    lengths = np.asarray(pyarrow.compute.list_value_length(column), dtype=np.int64)
    indices = table._indices
    return lengths if indices is None else lengths[np.asarray(indices.column(0), dtype=np.int64)]


def longest_batch(lengths: Indices, *, size: int, batches: int) -> Indices:
    """Indices of the rows of the longest of so many random batches of `size` rows; torch's state is not touched.

    No row comes twice in an epoch, as in training; a batch has no more rows than there are.
    """
    draw, size, batches = np.random.default_rng(0), min(size, len(lengths)), min(batches, DRAWS)
    epoch = len(lengths) // size
    found, most = np.empty(0, dtype=np.int64), -1
    for begun in range(0, batches, epoch):
        drawn = draw.permutation(len(lengths))[: epoch * size].reshape(epoch, size)[: batches - begun]
        tokens = lengths[drawn].sum(1)
        if tokens.max() > most:
            found, most = drawn[tokens.argmax()], int(tokens.max())
    return found


def rehearse(trainer: Any, rows: Any, collate: Any, *, first: int) -> int | None:
    """Forward and backward of the longest batch; returns its flat length, None where it is no longer than the first's.

    Args:
        rows: the training rows.
        collate: makes a flat batch of some.
        first: tokens of the first batch.
    """
    lengths = lengths_of(rows)
    if lengths is None or not len(lengths):
        return None
    # The classes' own: what watches steps is put around the instances' methods, and this is no step.
    ours, accelerator = type(trainer), trainer.accelerator
    steps = trainer.state.max_steps - trainer.state.global_step
    batches = steps * trainer.args.gradient_accumulation_steps * accelerator.num_processes
    # transformers' own batch size: under auto_find_batch_size not the one that was asked for.
    indices = longest_batch(lengths, size=trainer._train_batch_size, batches=max(1, batches))
    if accelerator.num_processes > 1:  # metrics are summed over processes in the pass: all make it, or none
        first = int(accelerator.gather(torch.tensor([first], device=accelerator.device)).min())
    if lengths[indices].sum() <= LONGER * first:
        return None
    batch = collate([rows[int(index)] for index in indices])
    tokens, wrapped = tokens_of(batch), isinstance(trainer.model_wrapped, DistributedDataParallel)
    model = trainer.model_wrapped.module if wrapped else trainer.model_wrapped
    logger.info("the longest batch first: %d rows, %d tokens", len(indices), int(lengths[indices].sum()))
    with _leaving_nothing(trainer, model):
        model.train()
        inputs = ours._prepare_inputs(trainer, batch)
        planned = trainer.memory.step(tokens, number=trainer.state.global_step) if trainer.memory else None
        with planned or contextlib.nullcontext(), trainer.maybe_activation_offload_context:
            with trainer.compute_loss_context_manager():
                loss = ours.compute_loss(trainer, model, inputs)
            if wrapped:
                torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
            else:
                type(accelerator).backward(accelerator, loss)
    return tokens


@contextlib.contextmanager
def _leaving_nothing(trainer: Any, model: Any) -> Iterator[None]:
    """No gradient, metric or drawn number of what is done within is there afterwards."""
    kept = {"_metrics": copy.deepcopy(trainer._metrics), "_total_train_tokens": trainer._total_train_tokens}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.zero_grad(set_to_none=True)
        for name, value in kept.items():
            setattr(trainer, name, value)


def wanted(trainer: Any) -> bool:
    """Whether there is memory that can run out, a GPU's, and a pass leaves nothing behind."""
    return trainer.args.device.type == "cuda" and traceless(trainer)


def traceless(trainer: Any) -> bool:
    """Whether a backward does no more than fill gradients, of which there are none: these can be let go of again."""
    accelerator = trainer.accelerator
    if isinstance(trainer.model_wrapped, DistributedDataParallel):
        # Torch's reentrant recompute has no gradients to ask for.
        if (trainer.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            return False
    # DeepSpeed's engine makes a step of it; sharded models exchange weights and gradients meanwhile.
    elif accelerator.distributed_type != DistributedType.NO:
        return False
    if accelerator.has_lomo_optimizer:
        return False
    # Hooks of parameters are where an optimizer works that works in the backward (layer-wise GaLore and APOLLO, LOMO).
    return not any(p.grad is not None or p._backward_hooks or p._post_accumulate_grad_hooks
                   for p in trainer.model.parameters())
