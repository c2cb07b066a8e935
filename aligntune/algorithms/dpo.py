"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""

from __future__ import annotations

from dataclasses import dataclass

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.core.options import option

LOSS_TYPES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
              "aot_unpaired", "discopop", "apo_zero", "apo_down", "sft", "sigmoid_norm")


@dataclass
class DPOOptions:
    beta: float = option(0.1, "Strength of the pull to the reference model.", ge=0)
    loss_type: list[str] | str = option(
        "sigmoid", "Form of the loss ('sigmoid' is the paper's), or a list of forms to sum.", choices=LOSS_TYPES
    )
    label_smoothing: float = option(
        0.0, "Share of pairs assumed to be labelled the wrong way round (cDPO, robust DPO).", ge=0, lt=0.5
    )
    ref_model_name: str | None = option(
        None, "Reference model; null is the starting model (under LoRA: the base with adapters off).",
        objects="a transformers model",
    )
    precompute_ref_log_probs: bool = option(False, "Compute the reference's log-probs once, before training.")
    loss_weights: list[float] | None = option(None, "Weights where loss_type is a list; null is 1 each.")
    use_weighting: bool = option(False, "Weight pairs by their probability under the policy (WPO, arXiv 2406.11827).")


SPEC = AlgorithmSpec(
    name="dpo",
    title="Direct preference optimisation",
    paper="Rafailov et al. 2023, arXiv 2305.18290, equation 7",
    options=DPOOptions,
    takes="preference",
    defaults={"learning_rate": 1e-6, "batch_size": 8, "max_seq_length": 1024},
    reference=True,
    differs=(
        "rows whose prompt alone fills max_seq_length are reported (TRL drops them without a word)",
        "the reference of an in-memory model is a copy from memory (TRL reads the hub again)",
    ),
)
