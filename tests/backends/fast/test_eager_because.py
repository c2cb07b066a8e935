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
    def __init__(self, dtype: torch.dtype = torch.bfloat16, **config: Any) -> None:
        text = SimpleNamespace(**{"model_type": "llama"} | config)
        # As of a model that reads images, which keeps what is asked for here with its language model.
        self.dtype, self.config = dtype, SimpleNamespace(model_type="llava", get_text_config=lambda: text)

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.empty(0, dtype=self.dtype))

    def parameters(self) -> list[OnGpu]:
        return [OnGpu(1000, False), OnGpu(10, True)]

    def modules(self) -> list[Any]:
        return []

    def named_modules(self) -> list[Any]:
        return []


def why(model: Model | None = None, **arguments: Any) -> str | None:
    # A GRPOConfig has no activation_offloading.
    given = {"bf16": True, "fp16": False, "gradient_checkpointing": False, "neftune_noise_alpha": None} | arguments
    return eager_because(SimpleNamespace(  # type: ignore[arg-type]
        model=model or Model(), args=SimpleNamespace(**given), accelerator=SimpleNamespace(num_processes=1)))


@pytest.mark.parametrize(("arguments", "reason"), [
    ({"neftune_noise_alpha": 5.0}, "noise on embeddings (neftune_noise_alpha) under replay is not covered"),
    ({"activation_offloading": True}, "activation_offloading copies what the backward keeps on a stream of its own"),
])
def test_what_is_not_captured(arguments: dict[str, Any], reason: str) -> None:
    assert why() is None and why(activation_offloading=False) is None
    found = why(**arguments)
    assert found is not None and found.startswith(reason)


_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(("config", "reason"), [
    ({"rope_parameters": _DYNAMIC, "max_position_embeddings": 64}, "its rotary embedding of type 'dynamic' chooses by"),
    ({"rope_parameters": {"full_attention": _DYNAMIC}, "max_position_embeddings": 64}, "its rotary embedding of type"),
    ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 64}},
     "its rotary embedding of type 'longrope' chooses by the longest row"),
    ({"rope_parameters": {"rope_type": "llama3"}}, None),
    ({"model_type": "mixtral", "_experts_implementation": "eager"}, "routed experts run as 'eager'"),
    ({"model_type": "mixtral", "_experts_implementation": "grouped_mm"}, None),
    ({"model_type": "mixtral", "_experts_implementation": "grouped_mm", "dtype": torch.float16},
     "torch's grouped product waits for the router in float16"),
], ids=str)
def test_models_whose_forward_waits_are_not_captured(config: dict[str, Any], reason: str | None) -> None:
    """In a capture such a wait would end the training."""
    found = why(Model(**config))
    assert found is None if reason is None else found is not None and found.startswith(reason)
