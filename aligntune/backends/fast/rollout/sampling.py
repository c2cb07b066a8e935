"""How completions are drawn: the options, and the scores that penalties and filters leave.

The filters are transformers' LogitsProcessors in transformers' order: repetition penalty (Keskar et al. 2019, section
4.1), temperature, top-k, top-p (Holtzman et al. 2019), min-p (Nguyen et al. 2024). They run inside a captured graph:
nothing here waits for the GPU, and the numbers that may change between calls are read from device memory.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from aligntune.backends.fast.ops.nucleus import nucleus_floor, nucleus_floor_reference
from aligntune.errors import ConfigError


class Form(NamedTuple):
    """What of a `Sampling` decides which launches a step makes; the rest is numbers on the device."""

    greedy: bool
    penalty: bool
    top_k: int
    top_p: bool
    min_p: bool

    @property
    def filters(self) -> bool:
        """Whether tokens are drawn from something else than logits / temperature."""
        return self.penalty or bool(self.top_k) or self.top_p or self.min_p


@dataclass(frozen=True)
class Sampling:
    """How one call draws its completions.

    `temperature` 0 takes the likeliest token each time. `top_k` 0, `top_p` 1, `min_p` None or 0 and
    `repetition_penalty` 1 are off. `stop_token_ids` None takes the model's end-of-sequence tokens; () stops at none.
    A completion ends with its stop token, or with the token that completes a stop string. Equal seeds draw equal
    tokens from equal logits, whatever else is in the batch.

    Raises ConfigError, all faults at once.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        number, ids, strings = _is_number, self.stop_token_ids, self.stop_strings
        rules = {
            "max_new_tokens": (is_whole(self.max_new_tokens) and self.max_new_tokens >= 1, "a whole number from 1"),
            "temperature": (number(self.temperature) and 0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (is_whole(self.top_k) and self.top_k >= 0, "a whole number, 0 (off) or more"),
            "top_p": (number(self.top_p) and 0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (self.min_p is None or number(self.min_p) and 0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf,
                                   "above 0"),
            "stop_token_ids": (ids is None or isinstance(ids, tuple | list) and all(map(is_whole, ids)),
                               "a tuple of whole numbers, or None"),
            "stop_strings": (isinstance(strings, tuple | list) and all(isinstance(s, str) and s for s in strings),
                             "a tuple of strings that are not empty"),
            "seed": (is_whole(self.seed) and 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
        }
        faults = [f"{name} = {getattr(self, name)!r}: must be {must}" for name, (holds, must) in rules.items()
                  if not holds]
        if faults:
            raise ConfigError.from_faults(faults, "Sampling")

    @property
    def form(self) -> Form:
        """The launches it needs; with `temperature` 0 no filter changes which token is likeliest."""
        if self.temperature == 0:
            return Form(True, self.repetition_penalty != 1, 0, False, False)
        return Form(False, self.repetition_penalty != 1, self.top_k, self.top_p < 1, bool(self.min_p))


def stops_of(options: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Fields of `Sampling` for transformers' `eos_token_id` and `stop_strings`, one or several, None as none."""
    ends, strings = options.get("eos_token_id"), options.get("stop_strings")
    return {"stop_token_ids": (ends,) if is_whole(ends) else tuple(ends or ()),
            "stop_strings": (strings,) if isinstance(strings, str) else tuple(strings or ())}


def is_whole(value: Any) -> bool:
    """Whether `value` is an integer, of Python or NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclass
class Numbers:
    """The numbers of a `Sampling` on the device, at addresses that stay: () tensors."""

    seed: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition_penalty: torch.Tensor

    @classmethod
    def on(cls, device: torch.device) -> Numbers:
        new = lambda dtype: torch.ones((), dtype=dtype, device=device)  # noqa: E731
        return cls(new(torch.int64), *(new(torch.float32) for _ in range(4)))

    def set(self, sampling: Sampling) -> None:
        """Write the numbers of `sampling`."""
        self.seed.fill_(sampling.seed)
        self.temperature.fill_(sampling.temperature or 1.0)
        self.top_p.fill_(sampling.top_p)
        self.min_p.fill_(sampling.min_p or 0.0)
        self.repetition_penalty.fill_(sampling.repetition_penalty)


def choices(
    logits: torch.Tensor, form: Form, numbers: Numbers, seen: torch.Tensor | None, *, kernels: bool = False
) -> torch.Tensor:
    """Scores to draw from, -inf where a token is left out.

    Args:
        logits: (rows, V), any float type.
        form, numbers: the sampling.
        seen: (rows, V) bool, tokens of the row's prompt and completion so far; None without a penalty.
        kernels: find the nucleus with our kernel, or by sorting.

    Returns:
        (rows, V) fp32.
    """
    scores = logits.float()
    if form.penalty:
        assert seen is not None
        penalty = numbers.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if form.greedy:
        return scores
    scores = scores / numbers.temperature
    among = scores
    if form.top_k:
        among = scores.topk(min(form.top_k, scores.shape[1]), dim=1).values
        scores = scores.masked_fill(scores < among[:, -1:], -math.inf)
    if form.top_p:
        floor = nucleus_floor if kernels else nucleus_floor_reference
        scores = scores.masked_fill(scores < floor(among, numbers.top_p), -math.inf)  # few, if top-k came before
    if form.min_p:
        best = scores.max(dim=1, keepdim=True).values
        scores = scores.masked_fill(scores < best + numbers.min_p.log(), -math.inf)
    return scores
