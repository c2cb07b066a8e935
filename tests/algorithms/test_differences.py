"""`explain` and the pages tell every setting that is not TRL's own default: the two configurations are compared."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import aligntune
from aligntune.algorithms import ALGORITHMS
from aligntune.algorithms.base import EVERY_DIFFERS, ONLINE_DIFFERS
from aligntune.algorithms.policy_gradient import group_advantages
from aligntune.backends.loading import Precision
from aligntune.backends.trl.options import CONFIGS, trl_config
from aligntune.core.resolve import resolve

NAMES = ALGORITHMS.names()

NOT_COMPARED: dict[str, str] = {
    "logging_steps": "logging: online runs log every step",
    "logging_first_step": "logging: the first step is logged too",
    "disable_tqdm": "logging: progress is shown by the package's own callback",
    "report_to": "logging: which trackers are written to",
    "save_steps": "saving: null is one checkpoint, at the end",
    "activation_checkpointing": "transformers' new name of gradient_checkpointing, which is compared",
    "num_generations_eval": "TRL's null is num_generations, and with default sizes ours is that number",
    "generation_batch_size": "a product of sizes and steps_per_generation, which is compared",
    "dataset_kwargs": "data: rows are prepared before TRL sees them",
    "remove_unused_columns": "data: the collator of CPO and ORPO picks the columns, and sets False itself",
}
"""Every field that may differ without a word of it, and why."""

TOLD: dict[str, str] = {
    "loss_type": "loss_type", "beta": "beta", "epsilon": "clip range", "epsilon_high": "clip range",
    "importance_sampling_level": "importance_sampling_level", "scale_rewards": "divided by a standard deviation",
    "use_bias_correction_kl": "without an importance ratio", "steps_per_generation": "micro-steps",
    "num_generations": "completions a prompt", "learning_rate": "learning_rate", "cpo_alpha": "cpo_alpha",
    "simpo_gamma": "gamma",
}
"""TRL's field, and the words of ours that tell of it in an algorithm's own list."""

EVERY: dict[str, tuple[Any, Any]] = {
    "num_train_epochs": (3, 1), "optim": ("adamw_torch_fused", "adamw_torch"), "gradient_checkpointing": (True, False),
    "bf16": (True, False),
}
ONLINE: dict[str, tuple[Any, Any]] = {
    "lr_scheduler_type": ("linear", "constant_with_warmup"), "max_completion_length": (512, 256),
}
OURS = {"num_train_epochs": "num_epochs", "lr_scheduler_type": "lr_scheduler", "optim": "optimizer",
        "bf16": "precision"}
"""TRL's field, and the option that a general sentence begins with."""

CHANGED: dict[str, dict[str, tuple[Any, Any]]] = {
    "sft": {},
    "reward": {"learning_rate": (1e-4, 1e-5)},
    "dpo": {},
    "ipo": {"loss_type": (["sigmoid"], ["ipo"])},
    "kto": {"learning_rate": (1e-6, 5e-6)},
    "orpo": {"learning_rate": (1e-6, 8e-6)},
    "simpo": {"beta": (0.1, 2.0), "loss_type": ("sigmoid", "simpo"), "cpo_alpha": (1.0, 0.0),
              "simpo_gamma": (0.5, 1.0)},
    "cpo": {},
    "ppo": {},
    "rloo": {"num_generations": (2, 4)},
    "grpo": {"beta": (0.0, 0.04), "loss_type": ("dapo", "grpo"), "use_bias_correction_kl": (True, False)},
    "gspo": {"epsilon": (0.2, 3e-4), "epsilon_high": (None, 4e-4), "importance_sampling_level": ("token", "sequence"),
             "loss_type": ("dapo", "grpo"), "steps_per_generation": (1, 4), "use_bias_correction_kl": (True, False)},
    "dapo": {"epsilon_high": (None, 0.28), "use_bias_correction_kl": (True, False)},
    "dr_grpo": {"scale_rewards": ("group", "none"), "loss_type": ("dapo", "dr_grpo"),
                "use_bias_correction_kl": (True, False)},
}
"""What an algorithm itself changes, (TRL's, ours)."""


def job_of(name: str, folder: Path) -> Any:
    """Its defaults."""
    reward = {"reward_functions": ["exact_match"]} if ALGORITHMS.load(name).needs_reward else {}
    return resolve({"algorithm": name, "backend": "trl", "model_name": "m", "dataset_name": "d",
                    "output_dir": str(folder), **reward})


def changed(name: str, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Every field of the algorithm's config class whose value on a CPU is not its default, (TRL's, ours)."""
    job, cls = job_of(name, folder), CONFIGS[name]
    ours = trl_config(job, Precision("fp32", "cpu", "as on a machine without a GPU"), eval_rows=0)
    theirs = cls(output_dir=str(folder), use_cpu=True)
    found = {}
    for item in dataclasses.fields(cls):
        pair = (getattr(theirs, item.name), getattr(ours, item.name))
        if pair[0] != pair[1] and item.name not in NOT_COMPARED:
            found[item.name] = tuple(getattr(value, "value", value) for value in pair)
    return found


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_is_not_trls_is_told(name: str, tmp_path: Path) -> None:
    spec, found = ALGORITHMS.load(name), changed(name, tmp_path)
    if name == "sft":  # the length is cut in preparation, to the same number
        assert found.pop("max_length") == (job_of(name, tmp_path).options.max_seq_length, None)
    general = EVERY | (ONLINE if spec.online else {})
    assert found == general | CHANGED[name]
    said = " ".join(spec.differs)
    for field, values in CHANGED[name].items():
        assert TOLD[field] in said, (field, values)
    for field, (theirs, ours) in general.items():
        lines = [line for line in spec.differences if line.startswith(f"{OURS.get(field, field)} ")]
        assert len(lines) == 1, field
        for value in (theirs, ours):
            assert re.search(rf"(?<![\w.]){value}(?![\w.])", lines[0]), (field, value)
    assert len(spec.differences) == len(spec.differs) + len(general)
    text = str(aligntune.explain("trl", name))
    assert all(text.count(line) == 1 for line in spec.differences)


def test_what_differs_in_every_algorithm_is_written_once() -> None:
    assert len(EVERY_DIFFERS) == len(EVERY) and len(ONLINE_DIFFERS) == len(ONLINE)
    for name in NAMES:
        own = " ".join(ALGORITHMS.load(name).differs)
        for word in ("num_epochs", "lr_scheduler", "optimizer '", "gradient_checkpointing", "_completion_length 256"):
            assert word not in own, (name, word)


def test_no_reason_stands_for_a_field_that_trl_lacks() -> None:
    fields = {item.name for cls in CONFIGS.values() for item in dataclasses.fields(cls)}
    assert set(NOT_COMPARED) - {"activation_checkpointing"} <= fields  # which came with transformers 5.23
    assert set(TOLD) | set(EVERY) | set(ONLINE) <= fields


def test_what_dapo_adds_to_trl_is_told() -> None:
    said = " ".join(ALGORITHMS.load("dapo").differs)
    for what in ("dynamic sampling", "max_resample_rounds", "soft overlong punishment", "overlong filtering",
                 "accumulation window"):
        assert what in said


def test_advantages_that_are_stated_are_those_that_are_computed() -> None:
    """One right answer in 8: with the sample's deviation and 0.0001, with the population's, and undivided."""
    rewards = torch.tensor([1.0] + [0.0] * 7, dtype=torch.float64)
    sample = group_advantages(rewards, 8)[0].item()
    population = ((rewards[0] - rewards.mean()) / rewards.std(correction=0)).item()
    centred = group_advantages(rewards, 8, scale_rewards="none")[0].item()
    assert (population, centred) == (pytest.approx(math.sqrt(7)), 0.875) and population - sample > 0.1
    for name, numbers in {"grpo": (sample, population), "dr_grpo": (sample, centred)}.items():
        stated = set(re.findall(r"\d+\.\d{3,4}(?!\d)", " ".join(ALGORITHMS.load(name).differs)))
        assert stated - {"0.0001"} == {f"{number:.4f}".rstrip("0") for number in numbers}, name
