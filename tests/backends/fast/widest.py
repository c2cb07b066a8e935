"""Watches for logits in everything that is made."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROWS = 8
"""Rows of logits at a time in these tests: the smallest real chunk is longer than their batches."""


class Widest(TorchDispatchMode):
    """Looks for tensors as wide as the vocabulary while it is entered, backward included.

    `rows`: the most of one tensor; `held`: the most of all that were there at a time.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.head = model.get_output_embeddings()
        self.rows = self.held = 0
        self.entered = False
        self._there: dict[int, tuple[StorageWeakRef, int]] = {}

    def __enter__(self) -> Any:
        self.entered, self._hook = True, self.head.register_forward_pre_hook(self.called)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        self.entered = False
        self._hook.remove()
        super().__exit__(*args)

    def called(self, *args: Any) -> None:
        raise AssertionError("the head's own forward was called")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        vocabulary, own = self.head.weight.shape[0], self.head.weight.untyped_storage().data_ptr()
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and one.dim() and one.shape[-1] == vocabulary and (
                    one.untyped_storage().data_ptr() != own):  # fmt: skip
                rows = one.numel() // vocabulary
                self.rows = max(self.rows, rows)
                ref = StorageWeakRef(one.untyped_storage())
                self._there[ref.cdata] = ref, max(rows, self._there.get(ref.cdata, (ref, 0))[1])
        self._there = {key: found for key, found in self._there.items() if not found[0].expired()}
        self.held = max(self.held, sum(rows for _, rows in self._there.values()))
        return made
