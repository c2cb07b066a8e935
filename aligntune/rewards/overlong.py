"""The soft overlong punishment of DAPO, as a reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aligntune.algorithms.policy_gradient import soft_overlong_punishment


@dataclass(frozen=True)
class SoftOverlong:
    """0 up to the buffer, then linearly down to -1 at the longest completion (arXiv 2503.14476, equation 13).

    With 100 tokens at most and a buffer of 20: 80 tokens 0, 90 tokens -0.5, 100 tokens -1. The token that ends a
    completion counts.

    Args:
        max_completion_length: the longest completion in tokens, the buffer included.
        overlong_buffer_len: tokens of the buffer.
    """

    max_completion_length: int
    overlong_buffer_len: int
    __name__ = "soft_overlong"
    shaping = True
    """It shapes rewards and grades nothing: dynamic sampling judges the spread of a group without it."""

    def __call__(self, prompts: list[Any], completions: list[Any], completion_ids: Any, **columns: Any) -> list[float]:
        return soft_overlong_punishment(
            [len(ids) for ids in completion_ids], max_completion_length=self.max_completion_length,
            overlong_buffer_len=self.overlong_buffer_len)
