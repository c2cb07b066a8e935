"""A model object that one trainer had and the next one gets: nothing of the first goes along."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from aligntune.backends.fast import attach, attachment_of
from aligntune.backends.fast.recompute import install, recompute_of
from aligntune.core.model_hygiene import copy_model, detach_backends
from tests.backends.fast.preference_steps import built_of as preference_of
from tests.backends.fast.rollout.test_trl import built_of as online_of
from tests.backends.fast.test_rows_end_to_end import trainer_of
from tests.core import tiny

FP8 = "fp8 base"


def left(model: nn.Module) -> set[str]:
    """Names of what a backend set on modules, and of methods and functions of ours among what modules hold."""
    found = set()
    for module in model.modules():
        for name, value in vars(module).items():
            function = getattr(getattr(value, "func", value), "__func__", getattr(value, "func", value))
            if "_aligntune" in name or str(getattr(function, "__module__", "")).startswith("aligntune."):
                found.add(name)
    return found


def attached() -> Any:
    model = tiny.llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    attach(model)
    install(model, offload=True).choose(1)
    assert {"_aligntune", "forward", "_gradient_checkpointing_func", "_set_gradient_checkpointing"} < left(model)
    return model


def test_detaching_takes_everything_away_and_nobody_elses() -> None:
    model = attached()
    mine = model.model.norm.forward = lambda x: x
    detach_backends(nn.ModuleList([model]))
    assert left(model) == set() and attachment_of(model) is None and recompute_of(model) is None
    assert vars(model.model.norm)["forward"] is mine
    detach_backends(model)


def test_a_copy_has_nothing_of_the_backends_and_leaves_the_original_alone() -> None:
    model = attached()
    clone = copy_model(model)
    assert left(clone) == set()
    assert attachment_of(model).attached and recompute_of(model).first == 1
    layer = model.model.layers[0]
    assert layer._gradient_checkpointing_func.func == recompute_of(model).run


@pytest.mark.parametrize("backend", ["trl", "fast"])
def test_the_next_trainer_begins_with_the_model_alone(backend: str, tmp_path: Any) -> None:
    lora = {"use_peft": True, "lora_r": 4, "gradient_checkpointing": True, "precision": "fp32"}
    model = tiny.llama(hidden_size=32, intermediate_size=48)
    first = trainer_of("fast", "llama", tmp_path, model_name=model, base_precision="fp8", **lora)
    assert FP8 in str(first.attestation()["modules"]) and "e4m3" in first.attestation()["layout"]
    policy = first.trainer.model
    second = trainer_of(backend, "llama", tmp_path / "second", model_name=policy, **lora)
    assert second.trainer.model is policy
    if backend == "trl":
        assert left(policy) == set()
    else:
        assert attachment_of(policy).attached and FP8 not in str(second.attestation()["modules"])
        assert not any("_aligntune_fp8" in vars(module) for module in policy.modules())


def test_references_scorers_and_critics_come_alone_too(tmp_path: Any) -> None:
    reference = attached()
    preference_of("trl", "dpo", tmp_path, model_name=tiny.llama(), ref_model_name=reference)
    assert left(reference) == set()
    scorer, critic = tiny.scorer(), attached()
    attach(scorer)
    online_of("trl", "ppo", tmp_path, reward_model_name=scorer, reward_functions=None, value_model_name=critic)
    assert left(scorer) == set() and left(critic) == set()
