"""`explain` tells every setting of the loss that is not TRL's own default: the two configurations are compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import aligntune
from aligntune.algorithms import ALGORITHMS
from aligntune.backends.loading import precision_of
from aligntune.backends.trl.options import CONFIGS, trl_config
from aligntune.core.resolve import resolve

SCALE = {"num_generations_eval", "generation_batch_size", "num_generations", "max_completion_length"}
"""What is scale, not the loss; `max_completion_length` is both in Dr. GRPO, whose sentence has it."""

TOLD: dict[str, str] = {
    "loss_type": "loss_type", "beta": "beta", "epsilon": "clip range", "epsilon_high": "clip range",
    "importance_sampling_level": "importance_sampling_level", "scale_rewards": "divided by a standard deviation",
    "use_bias_correction_kl": "multiplies by the ratio", "steps_per_generation": "micro-steps",
}
"""TRL's field, and the words of ours that tell of it."""

CHANGED: dict[str, dict[str, tuple[Any, Any]]] = {
    "grpo": {"beta": (0.0, 0.04), "loss_type": ("dapo", "grpo"), "use_bias_correction_kl": (True, False)},
    "gspo": {"epsilon": (0.2, 3e-4), "epsilon_high": (None, 4e-4), "importance_sampling_level": ("token", "sequence"),
             "loss_type": ("dapo", "grpo"), "steps_per_generation": (1, 4), "use_bias_correction_kl": (True, False)},
    "dapo": {"epsilon_high": (None, 0.28), "use_bias_correction_kl": (True, False)},
    "dr_grpo": {"scale_rewards": ("group", "none"), "loss_type": ("dapo", "dr_grpo"),
                "use_bias_correction_kl": (True, False)},
    "rloo": {},
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", CHANGED)
def test_every_setting_of_the_loss_that_is_not_trls_is_told(name: str, tmp_path: Path) -> None:
    job = resolve({"algorithm": name, "backend": "trl", "model_name": "m", "dataset_name": "d",
                   "reward_functions": ["exact_match"], "output_dir": str(tmp_path)})
    cls = CONFIGS[name]
    ours = trl_config(job, precision_of(job), eval_rows=0)
    theirs = cls(output_dir=str(tmp_path), use_cpu=ours.use_cpu, bf16=False)
    own = {item.name for item in dataclasses.fields(cls) if item.name in cls.__annotations__} - SCALE
    changed = {field: (getattr(theirs, field), getattr(ours, field)) for field in own
               if getattr(theirs, field) != getattr(ours, field)}
    if name == "gspo":  # TRL's follows the accumulation
        changed["steps_per_generation"] = (1, changed["steps_per_generation"][1])
    assert changed == CHANGED[name]
    said = " ".join(ALGORITHMS.load(name).differs)
    for field, values in changed.items():
        assert TOLD[field] in said, (field, values)
    text = str(aligntune.explain("trl", name))
    assert all(line in text for line in ALGORITHMS.load(name).differs)


def test_what_dapo_adds_to_trl_is_told() -> None:
    said = " ".join(ALGORITHMS.load("dapo").differs)
    for what in ("dynamic sampling", "max_resample_rounds", "soft overlong punishment", "overlong filtering",
                 "accumulation window"):
        assert what in said
