"""Losses take log-probs through the head: under LoRA the logits of a chunk are there at a time, never those of all."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from aligntune.backends.fast import head
from aligntune.backends.fast.ops import head as head_op
from tests.backends.fast.preference_steps import LENGTHS, built_of, pairs, step
from tests.backends.fast.rollout.test_trl import built_of as online_of
from tests.backends.fast.test_preference_unpaired import unpaired
from tests.backends.fast.widest import ROWS, Widest
from tests.core import tiny

LORA: dict[str, Any] = {"use_peft": True, "lora_r": 4}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_op, "plan_rows", lambda *args: ROWS)


@pytest.mark.parametrize("algorithm", [
    "dpo", pytest.param("ipo", marks=pytest.mark.slow), pytest.param("kto", marks=pytest.mark.slow)])
def test_losses_of_preferences(algorithm: str, tmp_path: Any) -> None:
    """The pass of the reference, the policy's and its backward."""
    rows = unpaired() if algorithm == "kto" else pairs()
    built = built_of("fast", algorithm, tmp_path, rows, **LORA)
    assert "one forward a pass" in built.attestation()["layout"] and sum(map(sum, LENGTHS[:4])) > 4 * ROWS
    with Widest(built.trainer.model) as seen:
        loss, _, _ = step(built.trainer)
    assert loss > 0 and seen.rows == seen.held == ROWS


def watched(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Widest, list[int]]:
    """Of all passes that score completions and of the loss's backward; and how many tokens the loss pass has scored."""
    seen, tokens = Widest(trainer.model), []

    def within(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with contextlib.nullcontext() if seen.entered else seen:
                return function(*args, **kwargs)
        return run

    compute = trainer._compute_loss

    def counted(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        found = compute(model, inputs)
        tokens.append(sum(flat.inputs.get("kept", flat.inputs["input_ids"]).numel() for flat in trainer.flats))
        return found

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies",
                        within(trainer._get_per_token_logps_and_entropies))
    monkeypatch.setattr(trainer, "_compute_loss", within(counted))
    monkeypatch.setattr(trainer.accelerator, "backward", within(trainer.accelerator.backward))
    return seen, tokens


@pytest.mark.parametrize(("algorithm", "options"), [
    ("grpo", {}), ("rloo", {}), ("ppo", {"num_ppo_epochs": 1, "num_mini_batches": 1})], ids=str)
def test_losses_of_rollouts(
    algorithm: str, options: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes that score a rollout, its reference's, and the loss's with its backward, which makes no logits."""
    trainer = online_of("fast", algorithm, tmp_path, model_name=tiny.llama(num_hidden_layers=1), max_steps=1,
                        **LORA, **options).trainer
    seen, tokens = watched(trainer, monkeypatch)
    trainer.train()
    assert len(tokens) == 1 and tokens[0] > 4 * ROWS
    assert seen.rows == seen.held == ROWS, (seen.rows, seen.held, tokens)


@pytest.mark.parametrize("fits", [True, False])
def test_logits_of_a_weight_that_trains_are_kept_where_they_fit(
    fits: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_budget", lambda model: None if fits else 1)
    trainer = online_of("fast", "grpo", tmp_path, model_name=tiny.llama(num_hidden_layers=1), max_steps=1,
                        beta=0.0).trainer
    seen, tokens = watched(trainer, monkeypatch)
    trainer.train()
    assert tokens[0] > 4 * ROWS
    assert seen.rows == seen.held == (tokens[0] if fits else ROWS), (seen.rows, seen.held, tokens)
