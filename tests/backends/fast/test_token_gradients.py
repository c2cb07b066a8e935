"""Gradients made in the head's forward: TRL's losses, gradients and weights; what is not covered, a wrong rule."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from aligntune.backends.fast import head
from aligntune.backends.fast.online import Flat
from aligntune.backends.fast.token_gradients import TokenRule
from tests.backends.fast.forced import Pair
from tests.backends.fast.rollout.test_trl import built_of

_SLOW = pytest.mark.slow
_WHERE = "loss: gradients in the forward where its logits do not fit"


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits never fit the budget."""
    monkeypatch.setattr(head, "_budget", lambda model: 1)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=_SLOW)


@pytest.mark.parametrize(("algorithm", "options"), [
    ("grpo", {"max_steps": 1}),
    slow("grpo", {"num_iterations": 2, "max_steps": 2}),
    slow("grpo", {"num_iterations": 2, "max_steps": 2, "beta": 0.0, "delta": 1.01, "loss_type": "bnpo"}),
    slow("grpo", {"num_iterations": 2, "max_steps": 2, "loss_type": "cispo", "epsilon_high": 2.0}),
    slow("grpo", {"num_iterations": 2, "max_steps": 2, "loss_type": "sapo"}),
    slow("dr_grpo", {"num_iterations": 2, "max_steps": 2, "beta": 0.1}),
    slow("dapo", {"gradient_accumulation_steps": 2, "batch_size": 2, "max_steps": 2, "num_generations": 2}),
    slow("ppo", {"num_generations": 1, "max_steps": 2, "num_ppo_epochs": 2, "entropy_coef": 0.05}),
    slow("ppo", {"num_generations": 1, "max_steps": 2, "num_ppo_epochs": 2, "value_model_name": "policy",
                 "gradient_accumulation_steps": 2, "batch_size": 2}),
], ids=str)
def test_steps_are_trls(no_room: None, algorithm: str, options: dict[str, Any], tmp_path: Any) -> None:
    pair = Pair(algorithm, tmp_path, **options)
    assert _WHERE in pair.built.attestation()["layout"]
    accumulated = options.get("gradient_accumulation_steps", 1)
    assert pair.ours.in_forward == options["max_steps"] * accumulated and pair.ours._token_rule_holds
    for key in ("loss", "grad_norm", "entropy", "reward"):
        ours, theirs = pair.logged(key)
        assert ours and ours == pytest.approx(theirs, rel=5e-4, abs=2e-6), key
    assert max(pair.logged("grad_norm")[0]) > 1e-3
    for name, apart_by, moved in pair.weights():
        assert moved > 1e-4 and apart_by < 0.02 * moved, name
    step = pair.built.attestation()["step"]
    assert step["ok"] and step["promised"]["logits_grad"] >= 1


def loss_pass(trainer: Any, **inputs: Any) -> dict[str, Any]:
    device = trainer.accelerator.device
    trainer.current_gradient_accumulation_steps = 1  # transformers' train() sets it
    ids = torch.randint(3, 250, (2, 7), generator=torch.Generator().manual_seed(0)).to(device)
    given = {"prompt_ids": ids[:, :3], "prompt_mask": torch.ones(2, 3, dtype=torch.long, device=device),
             "completion_ids": ids[:, 3:], "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=device),
             "advantages": torch.tensor([1.0, -0.5], device=device), "num_items_in_batch": torch.tensor(6),
             "ref_per_token_logps": torch.full((2, 4), -5.0, device=device)}
    return given | inputs


def gradient_of(trainer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, inputs).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


SAPO = {"trainer_options": {"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.6}}


@pytest.mark.parametrize("given", ["old", "none", "sampled", "tools"])
@pytest.mark.parametrize(("algorithm", "options"), [
    ("grpo", {}), ("grpo", {"delta": 1.3, "epsilon_high": 0.25, "beta": 0.0}), ("grpo", {"loss_type": "bnpo"}),
    ("dr_grpo", {"beta": 0.1}), ("dapo", {}), ("grpo", {"loss_type": "cispo", "epsilon_high": 1.1}),
    ("grpo", {"loss_type": "sapo", **SAPO}),
], ids=str)
def test_rules_are_autograds_of_trls_losses(
    algorithm: str, options: dict[str, Any], given: str, tmp_path: Any
) -> None:
    """The gradient of TRL's own loss to log-probs that nothing computed: fp32, ratios on both sides of the clips."""
    trainer = built_of("fast", algorithm, tmp_path, **options).trainer
    trainer.model.train()
    trainer.args.use_bias_correction_kl = algorithm == "dr_grpo"  # no algorithm of ours sets it
    noise = torch.Generator().manual_seed(1)
    log_probs = (-5 + 0.5 * torch.randn(2, 4, generator=noise)).to(trainer.accelerator.device).requires_grad_()
    apart = torch.tensor([[0.4, -0.4, 0.1, 0.0], [0.5, -0.5, 0.0, 0.0]], device=log_probs.device)
    more = {"old_per_token_logps": log_probs.detach() - apart} if given != "none" else {}
    if given == "sampled":  # what an engine's log-probs are corrected by, of a token or of a completion
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        more["importance_sampling_ratio"] = torch.tensor([[0.4], [1.7]], device=log_probs.device)
    elif given == "tools":
        more["tool_mask"] = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]], device=log_probs.device)
    inputs = loss_pass(trainer, **more)
    trainer.current_gradient_accumulation_steps = 2
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (log_probs, torch.ones_like(log_probs), None)
    (expected,) = torch.autograd.grad(GRPOTrainer._compute_loss(trainer, trainer.model, inputs), log_probs)
    assert trainer.makes_token_gradients() and expected.any()
    found, nothing = trainer._token_rule(inputs).gradients(log_probs, torch.ones_like(log_probs))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert nothing is None


def test_a_rule_that_is_not_the_loss_is_caught(no_room: None, tmp_path: Any, caplog: Any) -> None:
    trainer = built_of("fast", "grpo", tmp_path).trainer
    inputs = loss_pass(trainer)
    right = gradient_of(trainer, inputs)
    assert trainer.in_forward == 1 and right.norm() > 0.1
    weights = trainer._token_weights
    trainer._token_weights, trainer._token_rule_holds = lambda given: 1.01 * weights(given), None
    with caplog.at_level(logging.WARNING, logger="aligntune"):
        again = gradient_of(trainer, inputs)
    assert "gradients are made after the forward" in caplog.text and trainer.in_forward == 1
    assert (again - right).norm() < 1e-4 * right.norm()
    assert not trainer.makes_token_gradients()


@pytest.mark.slow
def test_gradients_that_tell_nothing_are_no_comparison(no_room: None, tmp_path: Any) -> None:
    """Where every reward is the same, and the policy is the reference, a wrong rule would give the same zeros."""
    trainer = built_of("fast", "grpo", tmp_path, beta=0.0).trainer
    inputs = loss_pass(trainer)
    same = inputs | {"advantages": torch.zeros_like(inputs["advantages"])}
    assert gradient_of(trainer, same).norm() == 0 and trainer._token_rule_holds is None
    lost = inputs | {"advantages": torch.full_like(inputs["advantages"], float("nan"))}
    assert gradient_of(trainer, lost).isnan().any() and trainer._token_rule_holds is None
    assert gradient_of(trainer, inputs).norm() > 0.1 and trainer._token_rule_holds is True
    assert trainer.in_forward == 3
    weights = trainer._token_weights
    trainer._token_weights, trainer._token_rule_holds = lambda given: 1.01 * weights(given), None
    gradient_of(trainer, same)
    gradient_of(trainer, inputs)
    assert trainer._token_rule_holds is False


NOT_BY_TOKEN: dict[str, dict[str, Any]] = {
    "entropy": {"trainer_options": {"entropy_coef": 0.1}}, "quantile": {"top_entropy_quantile": 0.5},
    "off-policy": {"trainer_options": {"off_policy_mask_threshold": 0.05}}, "frozen": {"use_peft": True},
}


@pytest.mark.parametrize("what", [
    "fits", "frozen", *(slow(what) for what in ("eval", "entropy", "quantile", "off-policy", "padded"))])
def test_what_is_not_covered_takes_log_probs_first(
    what: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what != "fits":
        monkeypatch.setattr(head, "_budget", lambda model: 1)
    trainer = built_of("fast", "grpo", tmp_path, **NOT_BY_TOKEN.get(what, {})).trainer
    inputs = loss_pass(trainer)
    trainer.rows_end_to_end = what != "padded"
    trainer.model.train(what != "eval")
    loss = trainer._compute_loss(trainer.model, inputs)
    assert trainer.in_forward == 0 and loss.requires_grad and trainer._made is None


@pytest.mark.parametrize(("options", "said"), [
    *((options, False) for options in NOT_BY_TOKEN.values()),
    ({}, True), ({"loss_type": "cispo"}, True), ({"loss_type": "sapo"}, True),
], ids=str)
def test_the_layout_says_it_where_it_is_done(options: dict[str, Any], said: bool, tmp_path: Any) -> None:
    built = built_of("fast", "grpo", tmp_path, **options)
    assert (_WHERE in built.attestation()["layout"]) is said is built.trainer.makes_token_gradients()


def test_constants_lie_where_their_tokens_are() -> None:
    ids, mask = torch.arange(1, 15).view(2, 7), torch.tensor([[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]])
    flat = Flat.of(ids, mask, 4)
    rule = TokenRule(lambda log_probs, entropy, weight: log_probs * weight, {"weight": ids[:, 3:].float()})
    # Token t holds the constants of token t + 1, which it scores.
    assert rule.laid(flat).per_token["weight"].tolist() == [[0, 4, 5, 6, 0, 0, 0, 11, 0]]
    gradient, nothing = rule.gradients(torch.zeros(2, 4), torch.zeros(2, 4))
    assert gradient.tolist() == ids[:, 3:].tolist() and nothing is None
