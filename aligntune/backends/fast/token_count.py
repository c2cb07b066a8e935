"""How many tokens were trained on: counted where they are known, and read from the GPU only when someone asks."""

from __future__ import annotations

from typing import Any

import torch


class TokenCount:
    """A trainer's `_total_train_tokens`, as TRL counts it and our callbacks restore it in a run that goes on."""

    _counted = 0
    _uncounted: torch.Tensor | None = None

    def _number(self: Any, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A number on the device, by a launch: a copy from the CPU would be waited for."""
        return torch.full((), float(value), device=self.accelerator.device, dtype=dtype)

    @property
    def _total_train_tokens(self) -> int:
        """Tokens trained on so far; read from the GPU where several processes counted."""
        if self._uncounted is not None:
            self._counted, self._uncounted = self._counted + int(self._uncounted), None
        return self._counted

    @_total_train_tokens.setter
    def _total_train_tokens(self, value: int) -> None:
        self._counted, self._uncounted = value, None

    def _note_tokens(self: Any, num_tokens: int, every: torch.Tensor | None = None) -> None:
        """Count a batch's tokens.

        Args:
            num_tokens: this process's.
            every: all processes' together, on the device, where the caller has summed them.
        """
        mode = "train" if self.model.training else "eval"
        if mode == "train" and self.accelerator.num_processes == 1:
            self._counted += num_tokens
        elif mode == "train":
            if every is None:
                every = self.accelerator.reduce(self._number(num_tokens, torch.float64), reduction="sum")
            self._uncounted = every if self._uncounted is None else self._uncounted + every
        waiting = 0 if self._uncounted is None else self._uncounted
        self._metrics[mode]["num_tokens"] = [self._counted + waiting]
