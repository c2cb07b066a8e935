"""DPO and IPO on rows end to end give TRL's loss, gradients and metrics, option by option."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch

from aligntune.algorithms.dpo import LOSS_TYPES
from tests.backends.fast.preference_steps import assert_same_step, both_steps, built_of

SQUARED = ("sppo_hard", "ipo")
SETTINGS: list[dict[str, Any]] = [
    {"loss_types": ["sigmoid", "sft", "bco_pair"], "loss_weights": [0.7, 1.3, 0.4]},
    {"loss_types": ["sigmoid", "nca_pair"], "loss_weights": [1.0, 1.0], "use_weighting": True},
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "js_divergence", "loss_types": ["sigmoid_norm"]},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    {"loss_types": ["discopop"], "discopop_tau": 0.3},
    {"ld_alpha": 0.4},
]


def passes_done_once(trainer: Any) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """(a model that answers from memory, a batch with the reference's log-probs, the policy's log-probs as a leaf)."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = trainer.compute_ref_log_probs(trainer.model, batch)
    trainer.precompute_ref_logps = True
    kept: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        kept.append(trainer.model(*args, **kwargs))
        return kept[0]

    trainer._compute_loss(record, batch, False)
    kept[0].log_probs = kept[0].log_probs.detach().requires_grad_()
    return lambda *args, **kwargs: kept[0], batch, kept[0].log_probs


def test_every_form_and_option(tmp_path: Any) -> None:
    """The losses and their gradients by log-prob, of one pass."""
    options = {"beta": 0.3, "use_peft": True, "label_smoothing": 0.1, "loss_type": "robust", "use_weighting": True}
    ours, theirs = (built_of(backend, "dpo", tmp_path, **options).trainer for backend in ("fast", "trl"))
    (our_model, our_batch, our_leaf), (model, batch, leaf) = passes_done_once(ours), passes_done_once(theirs)
    assert "places" in our_batch and "places" not in batch
    scored = batch["completion_mask"][:, 1:] == 1
    our_scored = our_batch.get("once", our_batch)["shift_labels"] >= 0
    torch.testing.assert_close(our_leaf[our_scored], leaf[scored], rtol=1e-6, atol=5e-6)
    losses = set()
    for settings in [*({"loss_types": [form]} for form in LOSS_TYPES), *SETTINGS]:
        with contextlib.ExitStack() as stack:
            for trainer, given in ((ours, our_batch), (theirs, batch)):
                for name, value in ({"use_weighting": False, "loss_types": ["sigmoid"]} | settings).items():
                    owner = trainer.args if name == "discopop_tau" else trainer
                    stack.enter_context(mock.patch.object(owner, name, value))
                if "ld_alpha" in settings:
                    given["ref_chosen_logps"], given["ref_rejected_logps"] = trainer.compute_ref_log_probs(
                        trainer.model, given)
            our_leaf.grad = leaf.grad = None
            found, expected = ours._compute_loss(our_model, our_batch, False), theirs._compute_loss(model, batch, False)
            # Answers of 50 nats are known to 4e-6 in fp32, and a square's slope multiplies that.
            squared = set(settings.get("loss_types", ())) & set(SQUARED)
            assert found.item() == pytest.approx(expected.item(), rel=5e-6 if squared else 1e-6), settings
            found.backward()
            expected.backward()
        assert leaf.grad.norm() > 1e-4
        torch.testing.assert_close(our_leaf.grad[our_scored], leaf.grad[scored], rtol=1e-5, atol=1e-7)
        assert not our_leaf.grad[~our_scored].any()
        losses.add(round(expected.item(), 5))
    assert len(losses) == len(LOSS_TYPES) + len(SETTINGS) - 1  # alpha 1 is the plain divergence


@pytest.mark.parametrize("adapters", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_a_step(adapters: bool, tmp_path: Any) -> None:
    ours, theirs, layout = both_steps("dpo", tmp_path, beta=0.3, use_peft=adapters)
    assert layout.startswith("rows: end to end, one forward a pass")
    assert_same_step(ours, theirs)
    assert abs(theirs[2]["rewards/margins"]) > 1e-3


@pytest.mark.slow
def test_ipo(tmp_path: Any) -> None:
    ours, theirs, layout = both_steps("ipo", tmp_path, beta=0.3, use_peft=True)
    assert layout.startswith("rows: end to end, one forward a pass")
    assert_same_step(ours, theirs, loss=5e-6)


VARIANTS = [
    {"loss_type": ["sigmoid", "sft", "bco_pair"], "loss_weights": [0.7, 1.3, 0.4]},
    {"use_weighting": True, "loss_type": ["sigmoid", "nca_pair"]},
    {"trainer_options": {"ld_alpha": 0.4}},
    {"trainer_options": {"f_divergence_type": "forward_kl"}},
    {"trainer_options": {"f_divergence_type": "js_divergence"}, "loss_type": "sigmoid_norm"},
    {"trainer_options": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}},
    {"trainer_options": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}},
    {"trainer_options": {"discopop_tau": 0.3}, "loss_type": "discopop"},
    {"trainer_options": {"max_length": 7, "truncation_mode": "keep_end"}},
    {"trainer_options": {"max_length": 7}},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_step_with_every_option(options: dict[str, Any], tmp_path: Any) -> None:
    ours, theirs, layout = both_steps("dpo", tmp_path, beta=0.3, use_peft=True, **options)
    assert layout.startswith("rows: end to end, one forward a pass")
    assert_same_step(ours, theirs)
