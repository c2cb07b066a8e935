"""Recipes, the faults that are put into them, and a runner that runs each arm once."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from aligntune.compare.protocol import Runner, in_this_process

SFT = {"algorithm": "sft", "model": {"model_name": "builtin:tiny"},
       "data": {"dataset_name": "builtin:arithmetic", "max_samples": 200, "max_seq_length": 64},
       "train": {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-3}}
PACKED = {**SFT, "data": {**SFT["data"], "packing": True, "max_seq_length": 48}, "train": {
    **SFT["train"], "batch_size": 1}}
LORA = {**SFT, "lora": {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}}
DPO = {"algorithm": "dpo", "model": {"model_name": "builtin:tiny-instruct"},
       "data": {"dataset_name": "builtin:arithmetic-preference", "max_samples": 64, "max_seq_length": 64},
       "train": {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-4}}
GRPO = {"algorithm": "grpo", "model": {"model_name": "builtin:tiny-instruct"},
        "data": {"dataset_name": "builtin:arithmetic-prompts", "max_samples": 64, "max_seq_length": 64},
        "train": {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-3},
        "loss": {"beta": 0.04}, "rollout": {"num_generations": 4, "max_completion_length": 6, "temperature": 1.5},
        "rewards": {"reward_functions": ["exact_match"]}}
# Every round of rollouts feeds four steps: what tells of rollouts is in the first of them.
PPO = {**GRPO, "algorithm": "ppo", "loss": {"kl_coef": 0.05, "num_ppo_epochs": 4},
       "train": {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-3},
       "rollout": {"max_completion_length": 6, "temperature": 1.5}}

# recipe, fault, kind of the finding, words of it, whether the comparison is still valid
FAULTS: list[tuple[dict[str, Any], str, str, str, bool]] = [
    (SFT, "loss_scaled", "loss-scale", "1.0100 times", True),
    (SFT, "layer_without_gradient", "zero-gradient", "model.layers.1.mlp", True),
    (PACKED, "leak_across_documents", "document-leak", "leaks across documents", True),
    (GRPO, "without_kl", "kl-missing", "KL term is missing", True),
    (GRPO, "without_kl_metric", "kl-missing", "beta is 0.04", True),
    (SFT, "mask_shifted_in_the_batch", "mask", "shifted by one token (+1)", False),
    (SFT, "mask_shifted_in_the_loss", "mask", "shifted by one token (+1)", True),
    (SFT, "other_order", "data-order", "order", False),
]


class Once:
    """Runs the same arm only once: a, the oracle and the yardstick are in every test of a recipe."""

    def __init__(self, folder: Path, runner: Runner = in_this_process) -> None:
        self.folder, self.runner = folder, runner
        self.known: dict[str, dict[str, Any]] = {}

    def __call__(self, spec: Any, arm: Any) -> dict[str, Any]:
        options = {name: value for name, value in spec.overrides.items() if name != "output_dir"}
        key = json.dumps([spec.role, spec.repeat, spec.setup, spec.config, options], sort_keys=True)
        if key not in self.known:
            spec.folder = str(self.folder / str(len(self.known)))
            spec.overrides["output_dir"] = f"{spec.folder}/run"
            self.known[key] = self.runner(spec, arm) | {"kept": spec.folder}
        spec.folder = self.known[key]["kept"]
        return copy.deepcopy(self.known[key])


def kinds(report: Any) -> dict[str, str]:
    """What was found against an arm, by kind."""
    return {one["kind"]: one["text"] for one in report.data["findings"] if one["severity"] != "said"}
