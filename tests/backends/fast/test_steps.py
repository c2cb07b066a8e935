"""What a micro-step asks of every module is asked once, and what transformers would have done still happens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from aligntune import create_rl_trainer, create_sft_trainer
from aligntune.backends.fast.steps import QuickSteps
from aligntune.backends.fast.trainers import FAST_TRAINERS


class Base:
    """As much of transformers' Trainer as the mixin touches."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before, self.inside = model, lambda: None, lambda: None

    def train(self) -> None:
        self.training_step(self.model)

    def training_step(self, model: nn.Module) -> list[bool]:
        self.before()
        model.train()
        self.inside()
        return [module.training for module in model.modules()]


class Quick(QuickSteps, Base):
    pass


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> Counter[type]:
    """Calls of `nn.Module.train` by the class of the module."""
    calls: Counter[type] = Counter()
    original = nn.Module.train

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        calls[type(self)] += 1
        return original(self, mode)

    monkeypatch.setattr(nn.Module, "train", train)
    return calls


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.ReLU()))


def test_a_model_in_training_is_not_walked(walked: Counter[type]) -> None:
    trainer = Quick(model())
    for _ in range(3):
        assert trainer.training_step(trainer.model) == [True] * 5
    assert not walked and "train" not in vars(trainer.model)


def test_what_was_put_to_evaluation_trains_again(walked: Counter[type]) -> None:
    trainer = Quick(model())
    trainer.training_step(trainer.model)
    trainer.model[1][0].eval()  # one module of five, as somebody's callback might
    walked.clear()
    assert trainer.training_step(trainer.model) == [True] * 5 and walked[nn.Dropout] == 1
    trainer.model.eval()
    assert trainer.training_step(trainer.model) == [True] * 5


def test_the_step_s_own_calls_are_the_model_s(walked: Counter[type]) -> None:
    """A rollout inside the step evaluates, and what it leaves the next step's call finds."""
    trainer = Quick(model())
    trainer.inside = trainer.model.eval
    assert trainer.training_step(trainer.model) == [False] * 5
    trainer.inside = lambda: trainer.model.eval().train()
    assert trainer.training_step(trainer.model) == [True] * 5
    assert "train" not in vars(trainer.model)


def test_an_error_leaves_the_model_its_own() -> None:
    trainer = Quick(model())

    def fail() -> None:
        raise RuntimeError("seen")

    trainer.before = fail  # when nobody has called it yet
    with pytest.raises(RuntimeError, match="seen"):
        trainer.training_step(trainer.model)
    assert "train" not in vars(trainer.model)


class Frozen(nn.Linear):
    """Stays in evaluation, as frozen batch norms do."""

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


def test_who_trains_in_a_way_of_their_own_is_asked_each_time() -> None:
    trainer = Quick(nn.Sequential(Frozen(2, 2), nn.ReLU()))
    assert trainer.training_step(trainer.model) == [True, False, True]
    trainer.model[0].training = True
    assert trainer.training_step(trainer.model) == [True, False, True]
    own = Quick(model())
    own.model.train = lambda mode=True: None  # on the instance
    own.model[0].eval()
    assert own.training_step(own.model)[1] is False and "train" in vars(own.model)


def test_modules_that_came_since_are_looked_at_from_the_next_training_on() -> None:
    trainer = Quick(model())
    trainer.training_step(trainer.model)
    trainer.model.append(nn.Dropout().eval())
    trainer.train()
    assert trainer.training_step(trainer.model) == [True] * 6


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_flops_are_transformers(algorithm: str, tmp_path: Path) -> None:
    """The count is made once; it is what transformers counts in each micro-step."""
    options: dict[str, Any] = {"backend": "fast", "max_samples": 4, "use_peft": True, "output_dir": tmp_path / "run"}
    if algorithm == "sft":
        trainer = create_sft_trainer("builtin:tiny", "builtin:arithmetic", **options).trainer
    else:
        trainer = create_rl_trainer("builtin:tiny", "builtin:arithmetic-prompts", algorithm="grpo", batch_size=4,
                                    num_generations=2, reward_functions=["exact_match"], **options).trainer
    for tokens in (3, 50):
        inputs = {"input_ids": torch.ones(2, tokens, dtype=torch.long), "labels": torch.ones(2, tokens)}
        found = trainer.floating_point_ops(inputs)
        assert found == Trainer.floating_point_ops(trainer, inputs) > 1e6 * tokens
    online = {"prompt_ids": torch.ones(2, 3)}
    assert trainer.floating_point_ops(online) == 0 == Trainer.floating_point_ops(trainer, online)
    assert trainer.floating_point_ops([{"prompt": "1+1="}]) == 0


def test_every_fast_trainer_steps_so() -> None:
    plain = {name for name, kind in FAST_TRAINERS.items() if not issubclass(kind, QuickSteps)}
    assert plain == {"gspo"}  # which fast does not run
