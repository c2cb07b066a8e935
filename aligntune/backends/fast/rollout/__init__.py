"""The in-process rollout engine: completions from the model that is being trained.

    from aligntune.backends.fast.rollout import RolloutEngine, Sampling

Importing it imports no torch; names load on first use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligntune.backends.fast.rollout.engine import Rollout, RolloutEngine, RolloutStats, cannot_run_because
    from aligntune.backends.fast.rollout.sampling import Sampling

_HOMES = {
    "Rollout": "engine",
    "RolloutEngine": "engine",
    "RolloutStats": "engine",
    "Sampling": "sampling",
    "cannot_run_because": "engine",
}

__all__ = ["Rollout", "RolloutEngine", "RolloutStats", "Sampling", "cannot_run_because"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
