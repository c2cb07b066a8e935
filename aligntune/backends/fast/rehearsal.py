"""The longest batch first: a pass over a run's longest, before the first step.

Rows and their order stay TRL's, so the longest batch comes when it comes. Where memory does not suffice for its forward
and backward, this pass says so at once, and under gradient_checkpointing="auto" it is what the plan measures. What the
optimizer's first step makes is not there yet, unless the run resumes. The pass leaves nothing behind: no gradient, no
metric, no drawn number. The batches are those that the run's own sampler will draw, read from a copy of it. Where it is
somebody else's, or would draw very many rows, the longest of as many drawn at random stands for them.

Under DDP each process makes the pass over the same rows, the longest of what all of them draw, through the module that
DDP wraps. Its gradients are asked for and do not reach the parameters, where DDP's hooks wait for them: even where they
exchange nothing they note which parameters were used, and one that the first step does not use would be given zeros.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, SequentialSampler

from aligntune.backends.fast.graph_shapes import tokens_of
from aligntune.core.row_lengths import Lengths, lengths_of, longest_batch

logger = logging.getLogger(__name__)
MOST_ROWS = 10_000_000
"""Of a run, that its sampler's copy draws: some two seconds."""
LONGER = 1.1
"""How many times the first batch's tokens make a pass of its own worth the time."""


def longest_drawn(trainer: Any, lengths: Lengths) -> Lengths:
    """Indices of the rows of the longest micro-batch that a training draws, of all its processes."""
    # transformers' own batch size: under auto_find_batch_size not the one that was asked for.
    args, size, processes = trainer.args, trainer._train_batch_size, trainer.accelerator.num_processes
    window, steps = args.gradient_accumulation_steps * processes, trainer.state.max_steps
    sampler = _sampler(trainer.callback_handler.train_dataloader, size, len(lengths))
    if sampler is None or steps * window * size > MOST_ROWS:
        return longest_batch(lengths, size=size, batches=max(1, (steps - trainer.state.global_step) * window))
    every, found, most = -(-len(lengths) // size), np.empty(0, dtype=np.int64), -1
    for epoch in itertools.count():
        batches = min(every, steps * window)
        if batches <= 0:
            return found
        if isinstance(sampler, SeedableRandomSampler):
            sampler.set_epoch(epoch)
        order = np.fromiter(itertools.islice(sampler, batches * size), np.int64)
        if processes > 1:  # the last of each are filled up with the epoch's first rows
            order = np.resize(order, -(-len(order) // (size * processes)) * size * processes)
        tokens = np.add.reduceat(lengths[order], np.arange(0, len(order), size))
        if tokens.max() > most:
            most, begun = int(tokens.max()), int(tokens.argmax()) * size
            found = order[begun : begun + size]
        steps -= -(-every // window)
    raise AssertionError("an epoch has steps")


def _sampler(loader: Any, size: int, rows: int) -> Any:
    """A copy of what draws the rows of a loader's batches in an order that can be drawn again; None of another."""
    batches: Any = getattr(loader, "batch_sampler", None)
    batches = getattr(batches, "batch_sampler", batches)  # of all processes
    sampler: Any = getattr(batches, "sampler", None)
    plain = type(batches) is BatchSampler and batches.batch_size == size and not batches.drop_last
    if not plain or type(sampler) not in (SeedableRandomSampler, SequentialSampler) or len(sampler) != rows:
        return None
    again = copy.copy(sampler)
    if isinstance(again, SeedableRandomSampler):
        again.generator = None  # its own would be moved on
    return again


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
    indices = longest_drawn(trainer, lengths)
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
