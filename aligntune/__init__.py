"""aligntune: post-training for language models on interchangeable backends.

    from aligntune import create_sft_trainer

    trainer = create_sft_trainer("builtin:tiny", "builtin:arithmetic", backend="trl", max_steps=20)
    trainer.train()

Importing the package imports no torch and patches nothing; names load on first use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aligntune._version import __version__

if TYPE_CHECKING:
    from aligntune.compare import compare
    from aligntune.core.backend_factory import (
        BackendType,
        create_reward_trainer,
        create_rl_trainer,
        create_sft_trainer,
        create_trainer,
    )
    from aligntune.core.introspection import explain, list_algorithms, list_backends
    from aligntune.core.options import UNSET
    from aligntune.core.recipe_run import run_recipe
    from aligntune.core.recipes import list_recipes
    from aligntune.core.trainer import AlignTrainer
    from aligntune.errors import (
        AlignTuneError,
        BackendUnavailableError,
        CheckpointError,
        ConfigError,
        DataError,
        NonFiniteError,
        UnsupportedAlgorithmError,
    )

_HOMES = {
    "create_sft_trainer": "aligntune.core.backend_factory", "create_rl_trainer": "aligntune.core.backend_factory",
    "create_reward_trainer": "aligntune.core.backend_factory",
    "create_trainer": "aligntune.core.backend_factory", "BackendType": "aligntune.core.backend_factory",
    "explain": "aligntune.core.introspection", "list_algorithms": "aligntune.core.introspection",
    "list_backends": "aligntune.core.introspection", "list_recipes": "aligntune.core.recipes",
    "run_recipe": "aligntune.core.recipe_run", "UNSET": "aligntune.core.options",
    "AlignTrainer": "aligntune.core.trainer", "AlignTuneError": "aligntune.errors",
    "BackendUnavailableError": "aligntune.errors", "CheckpointError": "aligntune.errors",
    "ConfigError": "aligntune.errors", "DataError": "aligntune.errors", "NonFiniteError": "aligntune.errors",
    "UnsupportedAlgorithmError": "aligntune.errors", "compare": "aligntune.compare",
}

__all__ = [
    "UNSET", "AlignTrainer", "AlignTuneError", "BackendType", "BackendUnavailableError", "CheckpointError",
    "ConfigError", "DataError", "NonFiniteError", "UnsupportedAlgorithmError", "__version__", "compare",
    "create_reward_trainer", "create_rl_trainer", "create_sft_trainer", "create_trainer", "explain", "list_algorithms",
    "list_backends", "list_recipes", "run_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'aligntune' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
