"""Supervised fine-tuning: the negative log-likelihood of the supervised tokens."""

from __future__ import annotations

from dataclasses import dataclass

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.core.options import option


@dataclass
class SFTOptions:
    loss_type: str = option(
        "nll", "nll: -log p, the mean over supervised tokens; dft: each token weighted by its own probability "
        "(arXiv 2508.05629).", choices=("nll", "dft"),
    )


SPEC = AlgorithmSpec(
    name="sft",
    title="Supervised fine-tuning",
    paper="the maximum-likelihood objective; DFT: arXiv 2508.05629",
    options=SFTOptions,
    takes="sft",
    defaults={"learning_rate": 2e-5},
    differs=(
        "gradient checkpointing follows the device (TRL: on everywhere), precision too (TRL: bf16 everywhere)",
    ),
)
