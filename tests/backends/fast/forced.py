"""A fast online trainer beside TRL's own on the same completions."""

from __future__ import annotations

from typing import Any

import torch

from aligntune.backends.fast.rollout.engine import RolloutEngine
from tests.backends.fast.rollout.test_trl import built_of, logged


class Pair:
    """Trains `algorithm` on backend fast, then on trl with the completions that our engine drew; reads both."""

    def __init__(self, algorithm: str, path: Any, **options: Any) -> None:
        self.built = built_of("fast", algorithm, path, **options)
        self.ours = self.built.trainer
        self.start = copy_of(self.ours)
        self.drawn: list[Any] = []
        generate = self.ours._generate_single_turn

        def recorded(*args: Any) -> Any:
            self.drawn.append(generate(*args))
            return self.drawn[-1]

        self.ours._generate_single_turn = recorded
        self.ours.train()
        assert isinstance(self.ours.rollout_engine, RolloutEngine)
        self.theirs = built_of("trl", algorithm, path, **options).trainer
        forced = iter(self.drawn)
        self.theirs._generate_single_turn = lambda *args: next(forced)
        self.theirs.train()
        assert next(forced, None) is None, "as many rollouts on both"

    def logged(self, key: str) -> tuple[list[float], list[float]]:
        return logged(self.ours, key), logged(self.theirs, key)

    def weights(self) -> list[tuple[str, float, float]]:
        """(name, how far apart, how far from the start) of every parameter that trains."""
        ours, theirs = copy_of(self.ours), copy_of(self.theirs)
        assert ours.keys() == theirs.keys()
        return [(name, float((value - theirs[name]).norm()), float((value - self.start[name]).norm()))
                for name, value in ours.items()]


def copy_of(trainer: Any) -> dict[str, torch.Tensor]:
    both = list(trainer.model.named_parameters())
    if hasattr(trainer, "critic"):
        both += [(f"critic.{name}", value) for name, value in trainer.critic.named_parameters()]
    return {name: value.detach().cpu().clone() for name, value in both if value.requires_grad}
