"""What keeps a step from being captured, told of a trainer without a GPU: parameters that say they are on one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aligntune.backends.fast.graphs import eager_because


class OnGpu:
    """As a parameter shows itself: of so many numbers, training or frozen."""

    is_cuda = True

    def __init__(self, numbers: int, requires_grad: bool) -> None:
        self.requires_grad, self._numbers = requires_grad, numbers

    def numel(self) -> int:
        return self._numbers


class Model:
    dtype = torch.bfloat16

    def parameters(self) -> list[OnGpu]:
        return [OnGpu(1000, False), OnGpu(10, True)]

    def modules(self) -> list[Any]:
        return []

    def named_modules(self) -> list[Any]:
        return []


def why(**arguments: Any) -> str | None:
    given = {"bf16": True, "fp16": False, "gradient_checkpointing": False, "torch_compile": False,
             "neftune_noise_alpha": None} | arguments  # a GRPOConfig has no activation_offloading
    return eager_because(SimpleNamespace(  # type: ignore[arg-type]
        model=Model(), args=SimpleNamespace(**given), accelerator=SimpleNamespace(num_processes=1)))


@pytest.mark.parametrize(("arguments", "reason"), [
    ({"neftune_noise_alpha": 5.0}, "noise on embeddings (neftune_noise_alpha) under replay is not covered"),
    ({"torch_compile": True}, "torch_compile makes the launches of its own"),
    ({"activation_offloading": True}, "activation_offloading copies what the backward keeps on a stream of its own"),
])
def test_what_is_not_captured(arguments: dict[str, Any], reason: str) -> None:
    assert why() is None and why(activation_offloading=False) is None
    found = why(**arguments)
    assert found is not None and found.startswith(reason)
