"""The algorithms: one file each, with its options, published defaults and the dataset it needs."""

from __future__ import annotations

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.core.registry import Registry

ALGORITHMS: Registry[AlgorithmSpec] = Registry("algorithm")
ALGORITHMS.register("sft", "aligntune.algorithms.sft:SPEC", summary="supervised fine-tuning")
ALGORITHMS.register("dpo", "aligntune.algorithms.dpo:SPEC", summary="direct preference optimisation")
ALGORITHMS.register("rloo", "aligntune.algorithms.rloo:SPEC", summary="REINFORCE with a leave-one-out baseline")
ALGORITHMS.register("grpo", "aligntune.algorithms.grpo:SPEC", summary="group-relative policy optimisation")
ALGORITHMS.register("gspo", "aligntune.algorithms.gspo:SPEC", summary="group sequence policy optimisation")
ALGORITHMS.register("dapo", "aligntune.algorithms.dapo:SPEC", summary="decoupled clip and dynamic sampling")
ALGORITHMS.register("dr_grpo", "aligntune.algorithms.dr_grpo:SPEC", aliases=("drgrpo", "dr-grpo"),
                    summary="GRPO without its length and difficulty biases")
