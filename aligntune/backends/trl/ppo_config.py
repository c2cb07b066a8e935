"""Configuration of our PPO trainer: TRL's GRPOConfig with the names that TRL's PPOConfig had until 1.12."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


UNREAD: dict[str, str] = {
    "epsilon": "cliprange is what clips", "epsilon_high": "cliprange is what clips", "delta": "cliprange is what clips",
    "scale_rewards": "whiten_rewards and whiten_advantages are what scales",
    **dict.fromkeys(("loss_type", "importance_sampling_level", "sapo_temperature_neg", "sapo_temperature_pos",
                     "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
                    "its loss has one form, of each token's own ratio"),
    "multi_objective_aggregation": "its rewards are one weighted sum",
    **dict.fromkeys(("top_entropy_quantile", "off_policy_mask_threshold"), "its loss is of every token"),
    **dict.fromkeys(("use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta",
                     "entropy_target"), "entropy_coef is its weight, which is constant"),
    "use_bias_correction_kl": "its KL is in the reward",
}  # fmt: skip
"""Fields of GRPOConfig that PPO does not read, and why."""


@dataclass
class PPOConfig(GRPOConfig):
    """What `PPOTrainer` takes; every field of GRPOConfig and transformers' TrainingArguments beside its own.

    An optimizer step takes per_device_train_batch_size x gradient_accumulation_steps x processes completions: a mini
    batch. A rollout is `num_mini_batches` of them, and is passed over `num_ppo_epochs` times.

    Raises:
        ValueError: a rollout does not hold whole groups of `num_generations`, or a field of GRPO's contradicts PPO's or
            is one that PPO does not read.
    """

    learning_rate: float = _field(3e-6, "The initial learning rate.")
    num_generations: int | None = _field(1, "Completions per prompt.")
    num_generations_eval: int | None = _field(None, "Completions per prompt in evaluation; None is num_generations.")
    disable_dropout: bool = _field(True, "Dropout would make the ratio of an unchanged policy differ from 1.")
    num_ppo_epochs: int = _field(4, "Passes over each rollout.")
    num_mini_batches: int = _field(1, "Optimizer steps in a pass.")
    cliprange: float = _field(0.2, "Clip range of the probability ratio.")
    cliprange_value: float | None = _field(0.2, "Clip range of values; None does not clip.")
    vf_coef: float = _field(0.1, "Weight of the value loss.")
    entropy_coef: float = _field(0.0, "Weight of the entropy bonus.")
    gamma: float = _field(1.0, "Discount.")
    lam: float = _field(0.95, "Lambda of the generalised advantage estimate.")
    kl_coef: float = _field(0.05, "Weight of the KL penalty in the reward; 0 keeps no reference.")
    kl_estimator: str = _field("k1", "k1 or k3.")
    kl_control: str = _field("fixed", "fixed or adaptive.")
    kl_goal: float = _field(6.0, "KL of a completion that an adaptive coefficient aims at.")
    kl_gain: float = _field(0.1, "Gain of the adaptive coefficient.")
    target_kl: float | None = _field(None, "Approximate KL above which the rest of a rollout's passes is left out.")
    whiten_rewards: bool = _field(False, "Scale rewards to deviation 1.")
    whiten_advantages: bool = _field(True, "Bring advantages to mean 0 and deviation 1.")
    missing_eos_penalty: float | None = _field(None, "Taken off the score of a completion that does not end.")
    value_learning_rate: float | None = _field(None, "Learning rate of the critic; None is learning_rate.")

    def __post_init__(self) -> None:
        for one in fields(GRPOConfig):
            if one.name in UNREAD and getattr(self, one.name) != one.default:
                raise ValueError(f"{one.name} = {getattr(self, one.name)!r}: PPO does not read it; {UNREAD[one.name]}")
        self._refuse("beta", 0.0, self.kl_coef, "kl_coef")
        self._refuse("num_iterations", 1, self.num_ppo_epochs, "num_ppo_epochs")
        steps = self.gradient_accumulation_steps * self.num_mini_batches
        self._refuse("steps_per_generation", None, steps, "num_mini_batches")
        group = self.num_generations or 1
        group_eval = self.num_generations_eval or group
        # GRPOConfig refuses one completion a prompt: it checks a pair in its place, and the real numbers come after.
        self.num_generations, self.num_generations_eval = 2, 1
        self.steps_per_generation, self.generation_batch_size = 2, None
        super().__post_init__()
        self.beta, self.num_iterations, self.steps_per_generation = self.kl_coef, self.num_ppo_epochs, steps
        self.num_generations, self.num_generations_eval = group, group_eval
        self.generation_batch_size = self.per_device_train_batch_size * self.world_size * steps
        if self.generation_batch_size % group:
            raise ValueError(f"num_generations {group} does not divide the {self.generation_batch_size} completions "
                             "of a rollout")
        if self.per_device_eval_batch_size * self.world_size % group_eval:
            raise ValueError(f"num_generations_eval {group_eval} does not divide the evaluation batch")
        if self.kl_estimator not in ("k1", "k3") or self.kl_control not in ("fixed", "adaptive"):
            raise ValueError("kl_estimator is 'k1' or 'k3', kl_control 'fixed' or 'adaptive'")
        if self.fp16 and self.target_kl is not None:
            # Steps that are left out have no gradients, and the loss scaler of fp16 refuses such a step.
            raise ValueError("target_kl does not go with fp16; use bf16 or fp32")

    def _refuse(self, name: str, default: Any, ours: Any, replaced_by: str) -> None:
        if getattr(self, name) not in (default, ours):
            raise ValueError(f"{name} is set by {replaced_by} in PPO")
