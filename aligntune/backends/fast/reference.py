"""The reference that lies under a policy's adapters: the same model with them off, without a walk over its modules.

PEFT turns adapters off and on by visiting every module several times, and flips `requires_grad` on the way: 53 ms for
112 adapted layers on one CPU core, of a step that should take 150. A pass without gradients reads two flags alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

_ABSENT = object()


@dataclass(frozen=True)
class ReferenceFlags:
    """What a pass of the reference sets on modules: `(module, attribute, value)`; for passes without gradients.

    `known`: whether the flags are all that PEFT would change; else it is called itself.
    """

    model: Any
    adapters: tuple[str, ...]
    settings: tuple[tuple[nn.Module, str, Any], ...]
    known: bool

    @classmethod
    def of(cls, model: Any) -> ReferenceFlags:
        """Of a model; under PEFT its copy named "ref" takes the place of its adapters where it has one, as in TRL."""
        adapters = tuple(getattr(model, "peft_config", ()))
        off: tuple[str, Any] = ("_active_adapter", ["ref"]) if "ref" in adapters else ("_disable_adapters", True)
        settings, known = [], True
        for module in model.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                settings.append((module, *off))
                known = known and _plain(module)
            elif "gradient_checkpointing" in vars(module):
                settings.append((module, "gradient_checkpointing", False))
        return cls(model, adapters, tuple(settings), known)

    def still_of(self, model: Any) -> bool:
        return self.model is model and self.adapters == tuple(getattr(model, "peft_config", ()))

    @contextlib.contextmanager
    def set(self) -> Iterator[None]:
        """The flags, for the length of the block."""
        if not self.known:
            with disable_gradient_checkpointing(self.model), \
                    use_adapter(self.model, adapter_name="ref" if "ref" in self.adapters else None):
                yield
            return
        before = [vars(module).get(name, _ABSENT) for module, name, _ in self.settings]
        try:
            for module, name, value in self.settings:
                vars(module)[name] = value
            yield
        finally:
            for (module, name, _), value in zip(self.settings, before, strict=True):
                if value is _ABSENT:
                    del vars(module)[name]
                else:
                    vars(module)[name] = value


def _plain(module: Any) -> bool:
    """Whether the module's adapters are switched by the two flags alone."""
    if isinstance(module, ModulesToSaveWrapper):
        return type(module) is ModulesToSaveWrapper
    return (isinstance(module, LoraLayer) and type(module).enable_adapters is BaseTunerLayer.enable_adapters
            and type(module).set_adapter is BaseTunerLayer.set_adapter)
