"""What `benchmarks.parity` runs: the arms, the parts with their options, and the jobs of a part.

A part is a method, or one with options of its loss. Of the options there are none that the backends share all code
for, or that a part has already:

* GRPO's forms dapo and dr_grpo, its loss without a reference: the parts of these names, dapo of which has none;
* DPO's form ipo: the part ipo. Its forms sft and bco_pair are terms of a sum of forms;
* what advantages are made from, numbers to both: of RLOO and PPO, whose rewards hold a KL, there is a part each;
* gradients that fast makes in the forward, where a head's logits do not fit: those of a tiny model do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """A backend with the options that make it this arm."""

    backend: str
    options: Mapping[str, Any]
    fp64: bool = False
    """Trains in fp64 once it is built."""


ARMS = {
    "trl": Arm("trl", {"precision": "fp32", "attn_implementation": "sdpa"}),
    "trl-eager": Arm("trl", {"precision": "fp32", "attn_implementation": "eager"}),
    "trl-fp64": Arm("trl", {"precision": "fp32", "attn_implementation": "sdpa"}, fp64=True),
    "fast": Arm("fast", {"precision": "fp32"}),
    "trl-bf16": Arm("trl", {"precision": "bf16", "attn_implementation": "sdpa"}),
    "fast-bf16": Arm("fast", {"precision": "bf16"}),
    "fast-fp8": Arm("fast", {"precision": "bf16", "base_precision": "fp8"}),
}
HELD = ("fast", "trl", "trl-eager", "trl-bf16", "fast-bf16")
"""The arms of all but `sft`, which has all; of the online methods the first draws what all are given."""
EXACT = HELD[:-1]
"""Those of a method's options: trl in bf16 is what tells whether its two runs in fp32 are chaotic."""
TRUTH, TRUE_LOSS = "trl-fp64", "rms of loss - fp64 loss"
"""One more, of preference methods that are looked at again: what two runs round alike is no part of a yardstick."""
STILL = ("fast", "trl", "trl-bf16", "fast-bf16")
"""Those of runs that move no weight, for their gradients; the first, which draws, is of the online methods alone."""
STILL_STEPS, PASSES = 32, 2
"""Few of a step's tokens teach: over the first steps of two seeds the gradient of one parameter was up to 2.0 times as
far from fp32's in one run of trl in bf16 (eager) as in another (sdpa) with GRPO, 2.2 times with KTO."""
LEARNING = ("trl", "trl-bf16", "fast-bf16", "fast-fp8")
SFT: dict[str, dict[str, Any]] = {
    "sft": {}, "sft-full": {"use_peft": False, "learning_rate": 1e-4}, "sft-nf4": {"quantization": "nf4"},
}  # fmt: skip
"""Of the last two the yardstick's steps alone."""
ONLINE: dict[str, dict[str, Any]] = {
    "grpo": {"num_iterations": 2}, "dapo": {"num_iterations": 2}, "rloo": {"num_iterations": 2},
    "dr_grpo": {"num_iterations": 2, "beta": 0.04},
    "ppo": {"num_generations": 1, "num_ppo_epochs": 2, "num_mini_batches": 1},
}  # fmt: skip
"""Two passes over each rollout: on the first the ratio is 1, and a loss may be near 0."""
PREFERENCE: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1}, "kto": {"beta": 0.1}, "orpo": {"beta": 0.1}, "ipo": {"beta": 0.1}, "simpo": {}, "cpo": {},
    "reward": {},
}  # fmt: skip
"""The reference of DPO, KTO and IPO is the policy without its adapters, whose B is drawn: no loss begins at log 2."""
PARTS = (*SFT, *ONLINE, *PREFERENCE)
JUDGED = {"ppo": ("loss/policy_avg", "loss/value_avg")}
"""Where it is not the loss: PPO's is the sum of these, and nearly all the second."""
HALVES: dict[str, Any] = {"batch_size": 4, "gradient_accumulation_steps": 2}
"""A step's tokens are then not a micro-batch's."""
SMOOTHED: dict[str, Any] = {"label_smoothing": 0.1}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo-bnpo": ("grpo", {"loss_type": "bnpo", **HALVES}),
    "grpo-cispo": ("grpo", {"loss_type": "cispo", "epsilon_high": 1.0}),
    "grpo-sapo": ("grpo", {"loss_type": "sapo"}),
    "grpo-delta": ("grpo", {"epsilon": 0.1, "epsilon_high": 0.15, "delta": 1.2}),
    "grpo-quantile": ("grpo", {"top_entropy_quantile": 0.5}),
    "grpo-entropy": ("grpo", {"trainer_options": {"entropy_coef": 0.05}}),
    "grpo-temperature": ("grpo", {"temperature": 0.7}),
    "grpo-off-policy": ("grpo", {"trainer_options": {"off_policy_mask_threshold": 0.005}}),
    "dapo-halves": ("dapo", HALVES),
    "dapo-filtered": ("dapo", {"mask_truncated_completions": True, "max_completion_length": 12}),
    "rloo-free": ("rloo", {"beta": 0.0}),
    "rloo-clip": ("rloo", {"epsilon": 0.05, "epsilon_high": 0.1, "normalize_advantages": True}),
    "ppo-entropy": ("ppo", {"entropy_coef": 0.05, "vf_coef": 0.5}),
    "ppo-critic": ("ppo", {"value_model_name": "policy"}),
    "ppo-clip": ("ppo", {"cliprange": 0.05, "cliprange_value": 0.05}),
    "ppo-rewards": ("ppo", {"kl_estimator": "k3", "kl_control": "adaptive", "gamma": 0.98, "whiten_rewards": True,
                            "missing_eos_penalty": 1.0}),
    **{f"dpo-{form}": ("dpo", {"loss_type": form}) for form in (
        "hinge", "nca_pair", "sppo_hard", "discopop", "apo_zero", "apo_down", "sigmoid_norm")},
    **{f"dpo-{form}": ("dpo", {"loss_type": form, **SMOOTHED}) for form in (
        "exo_pair", "robust", "aot", "aot_unpaired")},
    "dpo-summed": ("dpo", {"loss_type": ["sigmoid", "sft", "bco_pair"], "loss_weights": [0.7, 1.3, 0.4]}),
    "dpo-weighting": ("dpo", {"use_weighting": True}),
    "dpo-ld": ("dpo", {"trainer_options": {"ld_alpha": 0.4}}),
    "dpo-forward_kl": ("dpo", {"trainer_options": {"f_divergence_type": "forward_kl"}}),
    "dpo-js": ("dpo", {"trainer_options": {"f_divergence_type": "js_divergence"}}),
    "dpo-alpha": ("dpo", {"trainer_options": {"f_divergence_type": "alpha_divergence",
                                              "f_alpha_divergence_coef": 0.5}}),
    "kto-apo_zero": ("kto", {"loss_type": "apo_zero_unpaired"}),
    "kto-weights": ("kto", {"desirable_weight": 0.7, "undesirable_weight": 1.4}),
    "simpo-smoothed": ("simpo", SMOOTHED),
    "simpo-nll": ("simpo", {"cpo_alpha": 0.2}),
    "simpo-alpha": ("simpo", {"trainer_options": {"alpha": 0.25}}),
    "cpo-smoothed": ("cpo", {"cpo_alpha": 0.6, **SMOOTHED}),
    "cpo-hinge": ("cpo", {"loss_type": "hinge"}),
    "cpo-ipo": ("cpo", {"loss_type": "ipo", "cpo_alpha": 0.0}),
    "reward-centred": ("reward", {"center_rewards_coefficient": 0.1}),
}
"""What each adds to its method's options."""
PROMPTS = [{"prompt": f"What is {i} plus {3 * i % 7}?"} for i in range(64)]


def algorithm_of(part: str) -> str:
    return OPTIONS[part][0] if part in OPTIONS else part


def is_online(part: str) -> bool:
    return algorithm_of(part) in ONLINE


@dataclass(frozen=True, eq=False)
class Job:
    """Runs that are made one after the other, as a process of a pool is given them."""

    part: str
    arms: tuple[str, ...]
    seed: int
    steps: int
    source: str
    rows: Any
    options: Mapping[str, Any]
    still: bool = False
    """For the gradients of bf16 at weights that do not move."""

    def __str__(self) -> str:
        return f"{', '.join(self.arms)}, seed {self.seed}"

    @property
    def size(self) -> int:
        """Making a trainer and compiling its kernels takes as long as some 50 steps."""
        return len(self.arms) * (self.steps + 50)


@dataclass(frozen=True)
class Plan:
    """How many steps and seeds: `steps` are those of the runs that learn, which the yardsticks are cut from.

    `bf16_seeds`: of SFT's yardstick in bf16. One seed of 100 steps is 0.2 to 2.6 times as far from fp32 on fast as on
    trl: three decide nothing.
    `option_seeds`: of a method's options; of their gradients, where a batch has two passes, twice as many.
    `truth`: whether those of preference methods run in fp64 as well.
    """

    source: str
    steps: int
    seeds: int = 1
    learn_seeds: int = 1
    bf16_seeds: int = 1
    option_seeds: int = 1
    truth: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def yard_steps(self) -> int:
        return min(100, self.steps)

    def jobs(self, part: str) -> list[Job]:
        """A job an arm, but of runs on the same rollouts, and of those whose gradients are held against each other.

        An arm's are in the order of seeds.
        """
        seeds = range(1, self.seeds + 1)
        if part not in SFT:
            online, few = is_online(part), part in OPTIONS
            rows = PROMPTS if online else "builtin:arithmetic-preference"
            toy = {"batch_size": 4, "max_completion_length": 8} if online else {"batch_size": 2}
            options = {**self.options, **(toy if self.steps < 10 else {}), **(OPTIONS[part][1] if few else {})}
            held = (*EXACT, TRUTH) if few and self.truth and not online else EXACT if few else HELD
            together: list[tuple[str, ...]] = [held] if online else [(name,) for name in held]
            asked = [(arms, min(50, self.steps), False, 1) for arms in together]
            asked.append((STILL if online else STILL[1:], min(STILL_STEPS, self.steps), True, PASSES if online else 1))
            seeds = range(1, PASSES * self.option_seeds + 1) if few else seeds
            return [Job(part, arms, seed, steps, self.source, rows, options, still) for seed in seeds
                    for arms, steps, still, most in asked if seed <= most * self.option_seeds or not few]
        wanted = {(name, seed): self.yard_steps for name in HELD for seed in seeds}
        wanted |= {(name, seed): self.yard_steps for name in STILL[1:] for seed in range(1, self.bf16_seeds + 1)}
        if part == "sft":
            wanted |= {(name, seed): self.steps for name in LEARNING for seed in range(1, self.learn_seeds + 1)}
            wanted["trl-eager", 1] = self.steps
        toy = {"batch_size": 2, "max_seq_length": 48} if self.steps < 10 else {}
        return [Job(part, (name,), seed, steps, self.source, "builtin:pydoc", {**self.options, **SFT[part], **toy})
                for (name, seed), steps in wanted.items()]
