"""Copies of a trained model are independent of it, whichever forward is called."""

from __future__ import annotations

import copy

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from aligntune.core.model_hygiene import copy_model, forget_patched_forward, plain_forward
from tests.core import tiny

IDS = torch.arange(3, 13)[None]


def plain(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def fused(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs


def perturb(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)


@pytest.fixture
def trained(tmp_path):
    trainer = tiny.sft(tmp_path, max_steps=1)
    trainer.train()
    return trainer


def test_trl_leaves_a_forward_whose_copies_follow_the_original(trained):
    """The surprise this module exists for; if it goes away upstream, so can the module."""
    policy = trained.model
    naive = copy.deepcopy(policy)
    before = plain(naive)
    perturb(policy)
    assert not torch.equal(plain(naive), before)


def test_a_reference_copied_after_sft_moves_with_neither_forward(trained):
    policy = trained.model
    reference = copy_model(policy)
    add_fused_lm_head(reference)
    before, before_fused = plain(reference), fused(reference)
    assert torch.equal(before, plain(policy.eval()))
    assert before_fused.abs().sum() > 1
    perturb(policy)
    assert not torch.equal(plain(policy), before)
    assert torch.equal(plain(reference), before)
    assert torch.equal(fused(reference), before_fused)


def test_a_copy_is_frozen_in_eval_mode_and_shares_no_storage(trained):
    policy = trained.model.train()
    reference = copy_model(policy)
    assert not reference.training and policy.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in policy.parameters())
    owned = {parameter.data_ptr() for parameter in policy.parameters()}
    assert owned.isdisjoint(parameter.data_ptr() for parameter in reference.parameters())


def test_plain_forward_is_put_back_and_works_through_an_error(trained):
    policy = trained.model
    patched = vars(policy)["forward"]
    with pytest.raises(RuntimeError, match="inside"), plain_forward(policy):
        assert "forward" not in vars(policy)
        raise RuntimeError("inside")
    assert vars(policy)["forward"] is patched
    assert fused(policy).shape == (1, 9)


def test_forget_ends_the_stacking(trained):
    policy = trained.model
    add_fused_lm_head(policy)
    assert forget_patched_forward(policy) == 1
    assert "forward" not in vars(policy)
    assert forget_patched_forward(policy) == 0


def test_the_base_under_adapters_is_cleaned_too(tmp_path):
    trainer = tiny.sft(tmp_path, max_steps=1, peft_config=tiny.lora())
    trainer.train()
    reference = copy_model(trainer.model)
    assert not any("forward" in vars(module) for module in reference.modules())
    before = plain(reference)
    perturb(trainer.model)
    assert torch.equal(plain(reference), before)
    assert not torch.equal(plain(trainer.model.eval()), before)


def test_a_copy_to_a_device_lands_there_tied_weights_stay_tied():
    model = tiny.llama(tie_word_embeddings=True)
    clone = copy_model(model, device="cpu")
    assert clone.lm_head.weight is clone.model.embed_tokens.weight
    assert clone.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert torch.equal(plain(clone), plain(model.eval()))
