"""ORPO, CPO and SimPO on rows end to end give TRL's loss, gradients and metrics; under LoRA no logits are kept."""

from __future__ import annotations

from typing import Any

import pytest

from aligntune.backends.fast.ops import head
from tests.backends.fast.preference_steps import assert_same_step, both_steps, built_of, step
from tests.backends.fast.widest import ROWS, Widest

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
    assert seen.rows == seen.held == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["orpo", "simpo"])
def test_every_weight(algorithm: str, tmp_path: Any) -> None:
    ours, theirs, _ = both_steps(algorithm, tmp_path)
    assert_same_step(ours, theirs, without=OTHER_MEANS)
