"""Logits, targets and transforms for the tests of the row passes and of the cross-entropy on them."""

from __future__ import annotations

import torch

TRANSFORMS = [
    {},
    {"softcap": 5.0},
    {"temperature": 0.7},
    {"logit_scale": 0.4},
    {"softcap": 2.5, "logit_scale": 1.7, "temperature": 1.3},
]


def make(rows, vocab, device, *, dtype=torch.float32, ignored=(1,), spread=4.0):
    logits = (torch.randn(rows, vocab) * spread).to(dtype).to(device)
    targets = torch.randint(0, vocab, (rows,), device=device)
    for row in ignored:
        if row < rows - 1:
            targets[row] = -100
    return logits, targets
