"""The backends: engines that build a trainer for a job."""

from __future__ import annotations

from aligntune.backends.base import Backend
from aligntune.core.registry import Registry

BACKENDS: Registry[Backend] = Registry("backend")
BACKENDS.register("trl", "aligntune.backends.trl.support:BACKEND", summary="Hugging Face TRL as it is; CPU and GPU")
BACKENDS.register("fast", "aligntune.backends.fast.support:BACKEND",
                  summary="the same trainers over our own kernels; NVIDIA GPU")
