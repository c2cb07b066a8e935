"""What transformers asks of every module and every parameter in each micro-step, asked once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


class QuickSteps:
    """Mixin before a transformers Trainer: a micro-step does not walk the model where nothing has changed.

    transformers calls `model.train()` and counts the parameters (for the flops that it notes) in every micro-step. With
    adapters on a 1B model that is 1,337 modules, and more time than the launches of a whole replayed step take: after a
    log, which waits for the GPU, the GPU waits for it.
    """

    _walked: tuple[nn.Module, list[nn.Module] | None] | None = None
    _flops_a_token: int | None = None

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers'."""
        self._walked = self._flops_a_token = None
        plan = getattr(self, "memory", None)
        if plan is not None:
            plan.training_begins()
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """transformers'; its `model.train()` costs a look at the modules where all of them are training."""
        if self._walked is None or self._walked[0] is not model:
            modules = list(model.modules())
            plain = all(type(module).train is nn.Module.train for module in modules)  # what another does, nobody knows
            self._walked = model, modules if plain else None
        with _trained_already(*self._walked):
            return super().training_step(model, *args, **kwargs)  # type: ignore[misc]

    def floating_point_ops(self: Any, inputs: Any) -> int:
        """transformers': a multiple of the tokens, and of a count that stays."""
        given = inputs.get(getattr(self.model, "main_input_name", "input_ids")) if isinstance(inputs, Mapping) else None
        tokens = 0 if given is None else given.numel()
        if not tokens:  # online methods have no such input, and 0 is noted
            return 0
        if self._flops_a_token is None:
            self._flops_a_token = super().floating_point_ops(inputs) // tokens  # type: ignore[misc]
        return tokens * self._flops_a_token


@contextlib.contextmanager
def _trained_already(model: nn.Module, modules: list[nn.Module] | None) -> Iterator[None]:
    """The next `model.train()` does nothing if all of `modules` are training; every other call is the model's own."""
    if modules is None or "train" in model.__dict__:
        yield
        return

    def train(mode: bool = True) -> nn.Module:
        del model.__dict__["train"]
        return model if mode and all(module.training for module in modules) else model.train(mode)

    model.__dict__["train"] = train
    try:
        yield
    finally:
        model.__dict__.pop("train", None)
