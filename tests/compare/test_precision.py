"""What an arm's products are computed in, as its report says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aligntune.compare.arm import _precision


@pytest.mark.parametrize(("autocast", "stored", "found"), [
    ("bf16", torch.float32, "bf16"), ("fp16", torch.float32, "fp16"), (None, torch.float32, "fp32"),
    # A peer that trains weights in bf16 has no autocast.
    (None, torch.bfloat16, "bf16"), (None, torch.float16, "fp16"), (None, torch.float64, "fp32"),
])
def test_autocast_or_what_most_weights_are_stored_in(autocast: str | None, stored: torch.dtype, found: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=stored), nn.LayerNorm(8))  # norms are often kept in fp32
    args = SimpleNamespace(bf16=autocast == "bf16", fp16=autocast == "fp16")
    assert _precision(args, model) == found


def test_packed_weights_do_not_count() -> None:
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    model.register_parameter("packed", nn.Parameter(torch.zeros(64, dtype=torch.uint8), requires_grad=False))
    assert _precision(SimpleNamespace(bf16=False, fp16=False), model) == "bf16"
