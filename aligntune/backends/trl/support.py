"""What backend "trl" runs, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aligntune.backends.base import Built, Gate, Prepared
from aligntune.core.registry import Support

if TYPE_CHECKING:
    from aligntune.core.resolve import Job

_YES = Support("supported")


class TRLBackend:
    """Hugging Face TRL, unmodified: its trainers and losses, with options set and data prepared by us."""

    name = "trl"
    support = dict.fromkeys((
        "sft", "reward", "dpo", "ipo", "kto", "orpo", "simpo", "cpo",
        "rloo", "grpo", "gspo", "dapo", "dr_grpo", "ppo",
    ), _YES)
    gates = (
        Gate("rollout_engine", ("fast",), "TRL generates with 'hf' and 'vllm'"),
        Gate("rollout_memory_gib", None, "TRL's engines size their own memory"),
        Gate("gradient_checkpointing", ("offload",), "TRL recomputes (True) or keeps (False) activations"),
        Gate("memory_budget_gib", None, "TRL does not plan recompute by memory"),
        Gate("base_precision", ("fp8",), "TRL multiplies the base as it is loaded"),
        Gate("embedding_learning_rate", None, "TRL trains every parameter at learning_rate"),
        Gate("strict", (True,), "TRL has no kernels of ours that a module could lack"),
    )

    def available(self) -> Support:
        """Everything it needs is a dependency of the package."""
        return Support("supported", "runs on CPU and GPU")

    def build(self, job: Job, prepared: Prepared) -> Built:
        """A TRL trainer for the job."""
        from aligntune.backends.trl.build import build

        return build(job, prepared)


BACKEND = TRLBackend()
