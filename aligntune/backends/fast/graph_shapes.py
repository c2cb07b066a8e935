"""The flat shapes that graphs are captured for: how long, what fits one, and how a batch is filled up to it.

Filling is a row of its own behind the others, which nothing is learnt from.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from aligntune.backends.fast.packing import IGNORED, LONG, quarter_of
from aligntune.backends.fast.shared_prompts import KEYS

MOST_FILLING = 0.5
"""The most that a batch is filled up with, as a share of its tokens."""
ROOMS = ((LONG // 2, 2), (LONG, 4))
"""Up to so many tokens a shape gets room: so many lengths an octave. Longer steps keep the GPU busy for longer than
launching them takes: their filling would cost more than it saves."""

Batch = dict[str, Any]
USERS = KEYS[2]


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
    lengths |= {name: tokens for name in _FLAT if name in batch} | {
        name: batch[name].shape[-1] for name in KEYS if name in batch}
    if "kept" in batch:  # as many quarters of the longer row
        lengths["kept"] = max(1, round(len(batch["kept"]) / quarter_of(tokens_of(batch)))) * quarter_of(tokens)
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
    return KEYS[0] not in batch and rows * batch["max_length_q"] == tokens_of(batch)


_ENDS = ("cu_seq_lens_q", "cu_seq_lens_k")
_FLAT = ("input_ids", "labels", "shift_labels", "position_ids")
_FILLING = {"labels": IGNORED, "shift_labels": IGNORED, "kept": -1, USERS: -1}


def fits(name: str, captured: Any, value: Any, *, spare: bool) -> bool:
    """Whether `value` can be filled up to what was captured under this name; `spare`: its rows leave no end to move."""
    if not isinstance(value, torch.Tensor):
        return captured >= value if name.startswith("max_length") else captured == value
    if name in _ENDS:
        return captured.numel() >= value.numel() + spare
    if name == USERS:
        return len(captured) >= len(value) and captured.shape[1] == value.shape[1]
    return captured.ndim == value.ndim and captured.shape[-1] >= value.shape[-1]


def fill(name: str, captured: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
    """Copy `value` to where the graph reads, and behind it what is no row's; of `cu_seq_lens` the filling's end.

    Args:
        batch: all that was captured, of which `captured` is one.
    """
    # Of `USERS` prompts are counted along the first dimension, of everything else what is counted lies along the last.
    captured, value = (captured.T, value.T) if name == USERS else (captured, value)
    length = value.shape[-1]
    captured[..., :length].copy_(value, non_blocking=True)
    if name in _ENDS:
        captured[min(length, captured.numel() - 1) :].fill_(tokens_of(batch))
    elif length < captured.shape[-1]:
        captured[..., length:].fill_(_FILLING.get(name, 0))
