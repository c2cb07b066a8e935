"""TRL's own trainers over an attached model: the history they log is the one they log over the model's own forwards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from aligntune.backends.fast import attach_trainer
from tests.core import tiny

NOT_NUMBERS_OF_THE_MODEL = ("runtime", "per_second", "time", "total_flos", "epoch", "learning_rate")


def common(path: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "output_dir": str(path), "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "bf16": False, "use_cpu": True, "gradient_checkpointing": False,
        "report_to": "none", "seed": 3, "disable_tqdm": True,
    } | overrides  # fmt: skip


def different_letters(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def make(name: str, path: Path, *, peft: bool, **overrides: Any) -> Any:
    import trl

    model = tiny.llama(num_hidden_layers=1)
    online = name in ("GRPO", "RLOO")
    rows = {
        "DPO": tiny.pairs,
        "KTO": lambda: Dataset.from_list(
            [{"prompt": f"say {i}", "completion": f" {i}" * (i % 3 + 1), "label": i % 2 == 0} for i in range(8)]
        ),
    }.get(name, tiny.prompts)()
    settings = {"max_completion_length": 5, "num_generations": 2} if online else {"max_length": 32}
    kwargs: dict[str, Any] = {"reward_funcs": different_letters} if online else {}
    if name in ("DPO", "KTO") and not peft:
        kwargs["ref_model"] = tiny.llama(num_hidden_layers=1, seed=1)
    if peft:
        kwargs["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(**common(path, **settings, **overrides)),
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
        **kwargs,
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in trainer.model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return trainer


def history(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [
        {k: v for k, v in row.items() if not any(word in k for word in NOT_NUMBERS_OF_THE_MODEL)}
        for row in trainer.state.log_history
    ]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "peft", "overrides"),
    [
        ("GRPO", True, {"beta": 0.1}),
        ("DPO", True, {}),
        slow("GRPO", False, {"beta": 0.0, "num_iterations": 2, "steps_per_generation": 2}),
        slow("GRPO", False, {"cast_lm_head_to_fp32": True}),
        slow("DPO", False, {"use_weighting": True}),
        slow("DPO", False, {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 1.0]}),
        slow("KTO", True, {}),
        slow("KTO", False, {}),
        slow("RLOO", True, {"beta": 0.1}),
        slow("RLOO", False, {"beta": 0.0}),
        slow("DPO", True, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    ],
    ids=str,
)
def test_the_same_history(name, peft, overrides, tmp_path):
    histories = []
    for fast in (False, True):
        trainer = make(name, tmp_path / str(fast), peft=peft, **overrides)
        if fast:
            attachment = attach_trainer(trainer, strict=True)
        histories.append(history(trainer))
    plain, ours = histories
    assert [set(row) for row in ours] == [set(row) for row in plain]
    compared = 0
    for a, b in zip(ours, plain, strict=True):
        for key, value in b.items():
            if isinstance(value, float) and not math.isnan(value):
                compared += value != 0
                assert a[key] == pytest.approx(value, abs=2e-4, rel=2e-3), key
    assert compared > 10 and plain[0]["grad_norm"] > 0.01
    assert not [line for line in attachment.report if line.eager]
