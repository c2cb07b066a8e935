"""The algorithms: one file each, with its options, published defaults and the dataset it needs."""

from __future__ import annotations

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.core.registry import Registry

ALGORITHMS: Registry[AlgorithmSpec] = Registry("algorithm")
ALGORITHMS.register("sft", "aligntune.algorithms.sft:SPEC", summary="supervised fine-tuning")
ALGORITHMS.register("reward", "aligntune.algorithms.reward:SPEC", summary="reward model on pairs (Bradley-Terry)")
ALGORITHMS.register("dpo", "aligntune.algorithms.dpo:SPEC", summary="direct preference optimisation")
ALGORITHMS.register("ipo", "aligntune.algorithms.ipo:SPEC", summary="identity preference optimisation")
ALGORITHMS.register("kto", "aligntune.algorithms.kto:SPEC", summary="good and bad completions, no pairs")
ALGORITHMS.register("orpo", "aligntune.algorithms.orpo:SPEC", summary="likelihood and odds ratio, no reference")
ALGORITHMS.register("simpo", "aligntune.algorithms.simpo:SPEC", summary="mean log-probs as reward, no reference")
ALGORITHMS.register("cpo", "aligntune.algorithms.cpo:SPEC", summary="likelihood and contrast, no reference")
ALGORITHMS.register("rloo", "aligntune.algorithms.rloo:SPEC", summary="REINFORCE with a leave-one-out baseline")
ALGORITHMS.register("grpo", "aligntune.algorithms.grpo:SPEC", summary="group-relative policy optimisation")
ALGORITHMS.register("gspo", "aligntune.algorithms.gspo:SPEC", summary="group sequence policy optimisation")
ALGORITHMS.register("dapo", "aligntune.algorithms.dapo:SPEC", summary="decoupled clip and dynamic sampling")
ALGORITHMS.register("dr_grpo", "aligntune.algorithms.dr_grpo:SPEC", aliases=("drgrpo", "dr-grpo"),
                    summary="GRPO without its length and difficulty biases")
ALGORITHMS.register("ppo", "aligntune.algorithms.ppo:SPEC", summary="proximal policy optimisation with a critic")
