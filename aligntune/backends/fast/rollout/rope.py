"""Rotary embeddings that choose their frequencies by the longest position of a call.

Rows of a call lie in one line: such a choice would fall on a row for its neighbours' lengths, and the cache holds keys
of an earlier one. Up to some length there is but one choice: the engine keeps to it, and takes no longer rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

BY_LENGTH = ("dynamic", "longrope")


def length_limit(config: Any) -> tuple[str, int] | None:
    """The type of a model's rotary embedding and the longest row of one choice; None where it does not choose."""
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *rope.values()):  # some families have parameters for each kind of layer
        kind = one.get("rope_type") if isinstance(one, dict) else None
        if kind in BY_LENGTH:
            return kind, (one["original_max_position_embeddings"] if kind == "longrope" else
                          config.max_position_embeddings)
    return None


@contextlib.contextmanager
def frequencies_of_short_rows(model: nn.Module) -> Iterator[None]:
    """While open, rotary embeddings do not look at lengths, whatever they have seen before."""
    held: list[tuple[nn.Module, Any, dict[str, Any]]] = []
    try:
        for module in model.modules():
            kinds = module.__dict__.get("rope_type")
            named = {f"{layer}_": kind for layer, kind in kinds.items()} if isinstance(kinds, dict) else {"": kinds}
            chosen = [prefix for prefix, kind in named.items() if kind in BY_LENGTH]
            if not chosen:
                continue
            held.append((module, kinds, {f"{prefix}inv_freq": getattr(module, f"{prefix}inv_freq")
                                         for prefix in chosen}))
            for prefix in chosen:
                # Not copied: transformers 5.17 lets both names hold one tensor.
                setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
            module.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
        yield
    finally:
        for module, kinds, before in held:
            module.rope_type = kinds
            for name, tensor in before.items():
                setattr(module, name, tensor)
