"""ORPO, CPO and SimPO on rows end to end give TRL's loss, gradients and metrics; under LoRA no logits are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aligntune.backends.fast.ops import head
from tests.backends.fast.preference_steps import assert_same_step, both_steps, built_of, step

OTHER_MEANS = ("logits/chosen", "logits/rejected")
VARIANTS = [
    ("orpo", {"beta": 0.3}),
    ("cpo", {"beta": 0.3, "cpo_alpha": 0.6, "label_smoothing": 0.1}),
    ("cpo", {"beta": 0.3, "loss_type": "hinge"}),
    ("cpo", {"beta": 0.3, "loss_type": "ipo", "cpo_alpha": 0.0}),
    ("simpo", {"beta": 2.3, "simpo_gamma": 0.7, "label_smoothing": 0.1}),
    ("simpo", {"cpo_alpha": 0.2}),
    ("simpo", {"trainer_options": {"alpha": 0.25}}),
]


QUICK = (0, 1, 6)
ROWS = 8
"""Rows of logits at a time: the smallest real chunk is longer than these batches."""


class Widest(TorchDispatchMode):
    """Looks for logits in everything that is made, backward included: the most rows of them, in one tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.weight = model.get_output_embeddings().weight
        self.rows = 0
        model.get_output_embeddings().register_forward_pre_hook(self.called)

    def called(self, *args: Any) -> None:
        raise AssertionError("the head's own forward was called")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and one.dim() and one.shape[-1] == self.weight.shape[0] and (
                    one.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr()):  # fmt: skip
                self.rows = max(self.rows, one.numel() // one.shape[-1])
        return made


@pytest.mark.parametrize(("algorithm", "options"), [
    pytest.param(*one, marks=() if i in QUICK else pytest.mark.slow) for i, one in enumerate(VARIANTS)], ids=str)
def test_every_option(algorithm: str, options: dict[str, Any], tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(head, "plan_rows", lambda *args: ROWS)
    built, reference = (built_of(backend, algorithm, tmp_path, use_peft=True, **options) for backend in ("fast", "trl"))
    assert built.attestation()["layout"].startswith("rows: end to end, one forward a pass")
    with Widest(built.trainer.model) as seen:
        ours = step(built.trainer)
    theirs = step(reference.trainer)
    assert_same_step(ours, theirs, without=OTHER_MEANS)
    assert abs(theirs[2]["rewards/margins"]) > 1e-3
    assert seen.rows == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["orpo", "simpo"])
def test_every_weight(algorithm: str, tmp_path: Any) -> None:
    ours, theirs, _ = both_steps(algorithm, tmp_path)
    assert_same_step(ours, theirs, without=OTHER_MEANS)
