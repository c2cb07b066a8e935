"""Reward models on rows end to end give TRL's loss, gradients and metrics; the score is of each row's last token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset

from aligntune.backends.fast import attach, attach_trainer, attachment_of, detach
from aligntune.backends.fast.preference_rows import ScoredPairsEndToEnd
from tests.backends.fast.preference_steps import LENGTHS, assert_same_step, built_of, ids, step
from tests.core import tiny


def scored(margin: bool = False, tail: int = 2) -> Dataset:
    """Whole rows; `tail`: the id that each ends with (0 is the padding). No two rows of a pair are the same: which of
    two equal rewards is the larger one is decided by rounding."""
    rows = [{"chosen_ids": [*ids(i, prompt + chosen), tail], "rejected_ids": [*ids(i + 9, prompt + rejected), tail],
             **({"margin": 0.3 * i} if margin else {})} for i, (prompt, chosen, rejected) in enumerate(LENGTHS)]
    return Dataset.from_list(rows)


def scorer(**overrides: Any) -> Any:
    return tiny.scorer(num_hidden_layers=1, intermediate_size=48, **overrides)


@pytest.mark.parametrize(("adapters", "centring", "margin", "tail"), [
    (True, None, False, 2), (False, 0.2, True, 2), (True, 0.2, False, 0),
])  # fmt: skip
def test_a_step(adapters: bool, centring: float | None, margin: bool, tail: int, tmp_path: Any) -> None:
    ours, theirs = (
        built_of(backend, "reward", tmp_path, scored(margin, tail), model_name=scorer(), use_peft=adapters,
                 center_rewards_coefficient=centring) for backend in ("fast", "trl")
    )  # fmt: skip
    assert ours.attestation()["layout"].startswith("rows: end to end, one forward a pass")
    assert "score: scores of every token (x1)" in ours.attestation()["modules"]
    found = step(theirs.trainer)
    assert_same_step(step(ours.trainer), found)
    assert found[2]["max_reward"] - found[2]["min_reward"] > 0.1


def test_detach_gives_the_forward_back(tmp_path: Any) -> None:
    model = scorer()
    trainer = built_of("fast", "reward", tmp_path, scored(), model_name=model).trainer
    assert attachment_of(trainer.model) is not None and "forward" in vars(model)
    padded = {"input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])}
    with_ours = model(**padded).logits
    detach(model)
    assert "forward" not in vars(model)
    torch.testing.assert_close(model(**padded).logits, with_ours, rtol=1e-5, atol=1e-6)


def test_attaching_again_keeps_the_scores(tmp_path: Any) -> None:
    trainer = built_of("fast", "reward", tmp_path, scored(), model_name=scorer()).trainer
    before = step(trainer)
    attach_trainer(trainer)  # as `fast_train` does
    assert_same_step(step(trainer), before, without=("num_tokens",))  # which are counted on
    detach(trainer.model)
    assert "forward" not in vars(trainer.model) and attach(trainer.model).also == []


def test_copies_of_the_model_are_their_own(tmp_path: Any) -> None:
    model = scorer()
    built_of("fast", "reward", tmp_path, scored(), model_name=model)
    flat = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "score_tokens": True}
    clone = copy.deepcopy(model)
    detach(clone)
    assert "forward" not in vars(clone) and model(**flat).logits.shape == (1, 4)
    torch.save(model, tmp_path / "model.pt")
    assert type(torch.load(tmp_path / "model.pt", weights_only=False)) is type(model)


def test_the_last_token_is_the_one_that_transformers_finds() -> None:
    rows = [{"chosen_ids": [5, 0, 6, 0], "rejected_ids": [0, 0]}, {"chosen_ids": [7], "rejected_ids": [8, 9, 4]}]
    batch = ScoredPairsEndToEnd(0)(rows)
    assert batch["last_tokens"].tolist() == [2, 4, 5, 9]
    assert batch["input_ids"][0, batch["last_tokens"]].tolist() == [6, 7, 0, 4]
    assert batch["num_tokens"] == 10
