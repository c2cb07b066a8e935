"""The reference under adapters: two flags give what PEFT's own switches give, and leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trl.trainer.utils import use_adapter

from aligntune.backends.fast.reference import ReferenceFlags
from tests.backends.fast.preference_steps import assert_same_step, built_of, moved, small, step

IDS = torch.tensor([[5, 6, 7, 8]])


def policy(*, copied: bool = False, **options: Any) -> Any:
    model = get_peft_model(small(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options))
    if copied:
        model.add_adapter("ref", model.peft_config["default"])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if ".ref." in name and "lora_B" in name:
                    value.normal_(0, 0.1, generator=generator)
    return moved(model, 0.1)


def state(model: nn.Module) -> list[Any]:
    flags = ("_disable_adapters", "_active_adapter", "gradient_checkpointing")
    found: list[Any] = [[getattr(module, name, None) for name in flags] for module in model.modules()]
    return found + [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    "options", [{}, {"copied": True}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=str)
def test_the_flags_are_peft_s_switches(options: dict[str, Any]) -> None:
    model = policy(**options)
    flags = ReferenceFlags.of(model)
    assert flags.known
    before = state(model)
    with torch.no_grad():
        with use_adapter(model, "ref" if "ref" in model.peft_config else None):
            expected = model(IDS).logits
        assert state(model) == before
        with flags.set():
            found = model(IDS).logits
        after = model(IDS).logits
    assert torch.equal(found, expected)
    assert (after - expected).abs().max() > 1e-3
    assert state(model) == before


def test_what_raises_inside_leaves_nothing_behind() -> None:
    model = policy()
    before = state(model)
    with pytest.raises(RuntimeError, match="stop"), ReferenceFlags.of(model).set():
        assert state(model) != before
        raise RuntimeError("stop")
    assert state(model) == before


def test_recomputation_is_off() -> None:
    model = policy()
    model.gradient_checkpointing_enable()
    parts = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert parts
    with ReferenceFlags.of(model).set():
        assert not any(part.gradient_checkpointing for part in parts)
    assert all(part.gradient_checkpointing for part in parts)


def test_a_new_adapter_is_seen() -> None:
    model = policy()
    flags = ReferenceFlags.of(model)
    assert flags.still_of(model) and not flags.still_of(policy())
    model.add_adapter("second", model.peft_config["default"])
    assert not flags.still_of(model)


def test_other_adapters_go_through_peft() -> None:
    from peft import IA3Config

    model = get_peft_model(small(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    flags = ReferenceFlags.of(model)
    assert not flags.known
    before = state(model)
    with torch.no_grad(), flags.set():
        assert state(model) != before
    assert state(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=str)
def test_a_step_from_adapters_that_were_trained_before(options: dict[str, Any], tmp_path: Any) -> None:
    """TRL copies them; the copy is the reference."""
    found = []
    for backend in ("fast", "trl"):
        trainer = built_of(backend, "dpo", tmp_path, model_name=policy(), ref_model_name=None, beta=0.3,
                           size=0.0, **options).trainer
        assert "ref" in trainer.model.peft_config
        with torch.no_grad():
            for name, value in trainer.model.named_parameters():
                if ".default." in name:
                    value.mul_(1.5)
        found.append(step(trainer))
    assert_same_step(*found)
    assert abs(found[1][2]["rewards/margins"]) > 1e-3
