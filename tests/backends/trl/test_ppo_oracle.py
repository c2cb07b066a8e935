"""Our PPO against the numbers of TRL 1.12's (trl_1_12_ppo.json, which make_ppo_fixture.py wrote)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from aligntune.algorithms.policy_gradient import clipped_surrogate
from aligntune.algorithms.ppo import clipped_value_loss, generalized_advantages, token_kl, token_rewards, whiten
from aligntune.backends.trl.ppo import PPOTrainer
from aligntune.backends.trl.ppo_config import PPOConfig
from aligntune.backends.trl.trainers import reference_from_memory
from tests.backends.trl import ppo_oracle as oracle
from tests.core import tiny

FIXTURE = json.loads(Path(__file__).with_name("trl_1_12_ppo.json").read_text())
S = oracle.SETTINGS
EPOCHS = S["num_ppo_epochs"]
PAGE = Path(__file__).parents[3] / "docs" / "algorithms" / "ppo.md"
ONE_LATER = 0.0236
"""How far advantages move because TRL 1.12 puts the score one position behind a completion that ended early."""


def rows_in_order(run: str) -> torch.Tensor:
    """The completions in the order in which TRL's loader took their prompts."""
    prompts, completions = oracle.rows(run)
    place = {tuple(prompt): index for index, prompt in enumerate(prompts.tolist())}
    return completions[[place[tuple(query)] for query in FIXTURE["runs"][run]["queries"]]]


def tensors(run: str) -> dict[str, torch.Tensor]:
    kept = FIXTURE["runs"][run]
    names = ("scores", "old_log_probs", "ref_log_probs", "old_values", "advantages", "log_probs", "values", "means")
    return {name: torch.tensor(kept[name], dtype=torch.float64) for name in names}


@pytest.mark.parametrize("run", oracle.RUNS)
def test_rewards_advantages_and_losses_are_trl_s(run: str) -> None:
    """TRL's episode of a completion that ended early is a padding token longer: `reach` is the mask of that."""
    settings, kept = {**S, **oracle.RUNS[run]}, tensors(run)
    ids = rows_in_order(run)
    mask = (ids != oracle.PAD).long()
    lengths = mask.sum(1, keepdim=True)
    reach = (torch.arange(oracle.LENGTH) <= lengths).long()
    assert (run == "ragged") == bool((reach != mask).any())
    scores = kept["scores"] - settings.get("missing_eos_penalty", 0.0) * ~(ids == oracle.EOS).any(1)
    kl = token_kl(kept["old_log_probs"], kept["ref_log_probs"], estimator=settings.get("kl_estimator", "k1")) * mask
    rewards = token_rewards(scores, kl, reach, kl_coef=settings["kl_coef"])
    if settings.get("whiten_rewards"):
        rewards = whiten(rewards, reach, shift_mean=False)
    advantages, returns = generalized_advantages(
        rewards, kept["old_values"], reach, gamma=settings["gamma"], lam=settings["lam"])
    whitened = whiten(advantages, mask)
    torch.testing.assert_close(whitened, kept["advantages"] * mask, atol=2e-6, rtol=1e-5)
    for epoch in range(EPOCHS):
        back = torch.tensor(FIXTURE["runs"][run]["orders"][epoch]).argsort()  # each pass took the rows in another order
        log_probs, values = kept["log_probs"][epoch][back], kept["values"][epoch][back]
        ratio = (log_probs - kept["old_log_probs"]).exp()
        policy = clipped_surrogate(ratio, whitened, epsilon=settings["cliprange"])
        value, clipped = clipped_value_loss(
            values, kept["old_values"], returns, cliprange=settings["cliprange_value"])
        ours = [2 * (value * reach).sum() / reach.sum(), (clipped * reach).sum() / reach.sum(),
                (policy * mask).sum() / mask.sum(),  # TRL halves the value loss after the mean
                ((policy > -ratio * whitened) * mask).sum() / mask.sum()]
        assert [float(number) for number in ours] == pytest.approx(kept["means"][epoch].tolist(), abs=2e-6)
    assert kept["means"][1:, 3].min() > 0.1, "the policy's clip is at work"
    assert kept["means"][:, 1].max() > 0.05 or run == "full"


def test_where_ours_differs_from_trl_s() -> None:
    """The score at the last token instead of one behind it; rows that fill every token are as in TRL."""
    kept, ids = tensors("ragged"), rows_in_order("ragged")
    mask = (ids != oracle.PAD).long()
    scores = kept["scores"] - 0.75 * ~(ids == oracle.EOS).any(1)
    kl = token_kl(kept["old_log_probs"], kept["ref_log_probs"])
    rewards = token_rewards(scores, kl, mask, kl_coef=S["kl_coef"])
    ours, _ = generalized_advantages(rewards, kept["old_values"], mask, gamma=S["gamma"], lam=S["lam"])
    reach = (torch.arange(oracle.LENGTH) <= mask.sum(1, keepdim=True)).long()
    theirs, _ = generalized_advantages(token_rewards(scores, kl * mask, reach, kl_coef=S["kl_coef"]),
                                       kept["old_values"], reach, gamma=S["gamma"], lam=S["lam"])
    apart = ((ours - theirs) * mask).abs()
    assert apart.max().item() == pytest.approx(ONE_LATER, abs=1e-4)
    deviation = theirs[mask.bool()].std().item()
    moved = f"moves advantages by up to {apart.max():.3f}, a tenth of their deviation ({deviation:.2f})"
    assert moved in " ".join(PAGE.read_text().split()) and deviation == pytest.approx(10 * ONE_LATER, rel=0.1)
    assert apart[mask.all(1)].max() < 1e-12 < apart[~mask.all(1)].max()


def trainer_for(run: str, tmp_path: Any) -> PPOTrainer:
    parts, kept = oracle.models(), FIXTURE["runs"][run]
    prompts, completions = oracle.rows(run)
    scores = {tuple(query): score for query, score in zip(kept["queries"], kept["scores"], strict=True)}
    by_place = [scores[tuple(prompt)] for prompt in prompts.tolist()]
    args = PPOConfig(
        str(tmp_path), per_device_train_batch_size=oracle.ROWS, max_steps=EPOCHS, bf16=False, use_cpu=True,
        report_to="none", max_completion_length=oracle.LENGTH, gradient_checkpointing=False, save_strategy="no",
        learning_rate=oracle.LEARNING_RATE, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
        logging_steps=1, disable_tqdm=True, **{**S, **oracle.RUNS[run]},
    )
    with reference_from_memory(parts["policy"], args):
        trainer = PPOTrainer(
            parts["policy"], lambda prompts, **columns: [by_place[int(prompt)] for prompt in prompts], args,
            value_model=parts["value"], processing_class=tiny.tokenizer(template=None),
            train_dataset=Dataset.from_list([{"prompt": str(row)} for row in range(oracle.ROWS)]),
        )
    oracle.fill(trainer.ref_model, 0.02)
    place: list[int] = []

    def tokenize(asked: list[str]) -> Any:
        place[:] = [int(prompt) for prompt in asked]
        return [prompts[row].tolist() for row in place], None, {}

    trainer._tokenize_prompts = tokenize
    trainer._generate_single_turn = lambda *args: (completions[place].tolist(), None)
    return trainer


@pytest.mark.parametrize("run", ["full", "whitened"])
def test_three_steps_of_our_trainer_are_trl_s(run: str, tmp_path: Any) -> None:
    """From the same weights and completions: every logged number of each epoch, and the weights at the end."""
    trainer, kept = trainer_for(run, tmp_path), FIXTURE["runs"][run]
    before = oracle.outputs(trainer.model, trainer.critic.backbone, trainer.critic.head)
    trainer.train()
    logged = trainer.state.log_history[:EPOCHS]
    names = ("loss/value_avg", "val/clipfrac_avg", "loss/policy_avg", "policy/clipfrac_avg")
    for epoch in range(EPOCHS):
        value, *others = kept["means"][epoch]
        assert [logged[epoch][name] for name in names] == pytest.approx([value / 2, *others], abs=2e-5)
    theirs = kept["logged"]
    for name in ("objective/kl", "objective/scores", "objective/non_score_reward", "objective/rlhf_reward"):
        assert logged[0][name] == pytest.approx(theirs[name], abs=1e-5), name
    for name, ours in (("val/ratio", "val/ratio"), ("policy/entropy_avg", "entropy")):
        assert sum(entry[ours] for entry in logged) / EPOCHS == pytest.approx(theirs[name], abs=1e-4), name
    after = oracle.outputs(trainer.model, trainer.critic.backbone, trainer.critic.head)
    for name, values in kept["after"].items():
        step = (torch.tensor(values) - torch.tensor(before[name])).abs().max()
        off = (torch.tensor(values) - torch.tensor(after[name])).abs().max()
        assert step > 0.1 and off < 1e-3 * step, (name, step, off)

