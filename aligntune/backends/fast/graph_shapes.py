"""The flat shapes that graphs are captured for: how long, what fits one, and how a batch is filled up to it.

Filling is a row of its own behind the others, which nothing is learnt from.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from aligntune.backends.fast.packing import IGNORED, LONG, quarter_of
from aligntune.backends.fast.shared_prompts import KEYS, NOWHERE

MOST_FILLING = 0.5
"""The most that a batch is filled up with, as a share of its tokens."""
ROOMS = ((LONG // 2, 2), (LONG, 4))
"""Up to so many tokens a shape gets room: so many lengths an octave. Longer steps keep the GPU busy for longer than
launching them takes: their filling would cost more than it saves."""

Batch = dict[str, Any]
SHARED_INDEX, SHARED_OWN, SHARED_USES = KEYS


def room_for(tokens: int) -> int:
    """The flat length at which a shape of so many tokens is captured."""
    for most, an_octave in ROOMS:
        if tokens <= most:
            step = max(1, (1 << max(0, (tokens - 1).bit_length() - 1)) // an_octave)
            return -(-tokens // step) * step
    return tokens


def planned_tokens(batch: Batch, *, capture: bool) -> int:
    """The flat length whose memory a step of `batch` may take, where steps are captured or where they are not."""
    tokens = tokens_of(batch)
    if not capture or "cu_seq_lens_q" not in batch or equal_rows(batch):
        return batch["input_ids"].numel()
    return min(room_for(tokens), int(tokens * (1 + MOST_FILLING)))


def with_room(batch: Batch, tokens: int) -> Batch:
    """`batch`, rows of uneven lengths end to end, filled up to a flat length of `tokens`.

    It has room for a filling as long as any batch needs that is replayed in its place.
    """
    longest_filling = math.ceil(tokens * MOST_FILLING / (1 + MOST_FILLING))
    lengths = {name: len(batch[name]) for name in _ENDS}
    lengths |= {name: tokens for name in (*_FLAT, SHARED_OWN) if name in batch}
    # as many quarters of the longer row
    lengths |= {name: max(1, round(batch[name].shape[-1] / quarter_of(tokens_of(batch)))) * quarter_of(tokens)
                for name in ("kept", SHARED_USES) if name in batch}
    if SHARED_USES in batch:
        lengths[SHARED_USES] = min(lengths[SHARED_USES], tokens)
        lengths[SHARED_INDEX] = tokens + len(batch[SHARED_USES]) * lengths[SHARED_USES]
    found = dict(batch)
    for name, value in batch.items():
        if name.startswith("max_length"):
            found[name] = max(value, 1 << (longest_filling - 1).bit_length())
        elif name in lengths:
            found[name] = value.new_empty((*value.shape[:-1], lengths[name]))
    for name in lengths:
        fill(name, found[name], batch[name], found)
    return found


def tokens_of(batch: Batch) -> int:
    """T, the flat length of a batch."""
    return batch["input_ids"].shape[-1]


def equal_rows(batch: Batch) -> bool:
    rows = batch["cu_seq_lens_q"].numel() - 1
    return SHARED_INDEX not in batch and rows * batch["max_length_q"] == tokens_of(batch)


_ENDS = ("cu_seq_lens_q", "cu_seq_lens_k")
_FLAT = ("input_ids", "labels", "shift_labels", "position_ids")
_FILLING = {"labels": IGNORED, "shift_labels": IGNORED, "kept": -1, SHARED_OWN: NOWHERE, SHARED_USES: NOWHERE}


def fits(name: str, captured: Any, value: Any, *, spare: bool) -> bool:
    """Whether `value` can be filled up to what was captured under this name; `spare`: its rows leave no end to move."""
    if not isinstance(value, torch.Tensor):
        return captured >= value if name.startswith("max_length") else captured == value
    if name in _ENDS:
        return captured.numel() >= value.numel() + spare
    return captured.ndim == value.ndim and captured.shape[-1] >= value.shape[-1]


def fill(name: str, captured: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
    """Copy `value` to where the graph reads, and behind it what is no row's; of `cu_seq_lens` the filling's end.

    Args:
        batch: all that was captured, of which `captured` is one.
    """
    length = value.shape[-1]
    captured[..., :length].copy_(value, non_blocking=True)
    if name in _ENDS:
        end = len(batch[SHARED_INDEX]) if name == "cu_seq_lens_k" and SHARED_INDEX in batch else tokens_of(batch)
        captured[min(length, captured.numel() - 1) :].fill_(end)
    elif length < captured.shape[-1]:
        captured[..., length:].fill_(_FILLING.get(name, 0))
