"""What backend "fast" runs, as data; and whether this machine can run it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from aligntune.backends.base import Built, Gate, Prepared
from aligntune.core.registry import Support

if TYPE_CHECKING:
    from aligntune.core.resolve import Job

SEQUENCE_RATIOS = (
    "the fast online trainer covers token-level ratios; sequence-ratio GRPO is not in its parity suite; "
    "backend='trl' runs it"
)
_COMPILED = "no test covers dynamo over our forwards; leave it out, or backend='trl' runs it"
_REQUIRES = "an NVIDIA GPU of compute capability 8.0 or later with a CUDA build of torch"


class FastBackend:
    """TRL's trainers over our kernels."""

    name = "fast"
    support: Mapping[str, Support] = {
        "sft": Support("supported"),
        **dict.fromkeys(("reward", "dpo", "ipo", "kto", "orpo", "simpo", "cpo"), Support("supported")),
        "grpo": Support("supported"),
        "dapo": Support("supported"),
        "dr_grpo": Support("supported"),
        "rloo": Support("supported"),
        "ppo": Support("supported"),
        "gspo": Support("unsupported", SEQUENCE_RATIOS),
    }
    gates: tuple[Gate, ...] = (
        Gate("importance_sampling_level", ("sequence",), SEQUENCE_RATIOS, ("grpo", "dapo", "dr_grpo")),
        Gate("loss_type", ("luspo", "vespo"), SEQUENCE_RATIOS, ("grpo",)),  # the form of the others is fixed
        Gate("torch_compile", (True,), _COMPILED),
        Gate("torch_compile_backend", None, _COMPILED),  # transformers compiles where one of these is given
        Gate("torch_compile_mode", None, _COMPILED),
        Gate("use_liger_kernel", (True,),
             "its kernels would take modules from ours; leave it out, or backend='trl' runs it"),
    )

    def available(self) -> Support:
        """Whether a GPU is here; with TRITON_INTERPRET=1 it runs without one, for tests."""
        if os.environ.get("TRITON_INTERPRET") == "1":
            return Support("supported", "TRITON_INTERPRET=1: kernels are interpreted, for tests, about 1000x slower")
        import torch

        if not torch.cuda.is_available():
            built = torch.version.cuda
            reason = "torch sees no CUDA GPU" if built else f"this torch ({torch.__version__}) is built without CUDA"
            return Support("unavailable", reason + "; backend='trl' runs here", _REQUIRES)
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            name = torch.cuda.get_device_name()
            return Support("unavailable", f"{name} has compute capability {major}.{minor}; backend='trl' runs here",
                           _REQUIRES)
        return Support("supported", torch.cuda.get_device_name())

    def build(self, job: Job, prepared: Prepared) -> Built:
        """A TRL trainer for the job, with our kernels attached to its model."""
        from aligntune.backends.fast.build import build

        return build(job, prepared)


BACKEND = FastBackend()
