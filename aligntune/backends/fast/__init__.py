"""Backend "fast": the same trainers over our own kernels.

    from aligntune.backends.fast import accelerate_trl

    with accelerate_trl():
        trainer = SFTTrainer(model, train_dataset=rows)
    trainer.train()

Importing it imports no torch and patches nothing; names load on first use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligntune.backends.fast.attachment import Attachment, Line, attach, attachment_of, detach
    from aligntune.backends.fast.attestation import Attestation
    from aligntune.backends.fast.language_model import FastLanguageModel
    from aligntune.backends.fast.scripts import accelerate_trl, attach_trainer, fast_train
    from aligntune.backends.fast.sft_trainer import FastSFTTrainer, FastTrainingArguments

_HOMES = {
    "Attachment": "attachment",
    "Attestation": "attestation",
    "FastLanguageModel": "language_model",
    "FastSFTTrainer": "sft_trainer",
    "FastTrainingArguments": "sft_trainer",
    "Line": "attachment",
    "accelerate_trl": "scripts",
    "attach": "attachment",
    "attach_trainer": "scripts",
    "attachment_of": "attachment",
    "detach": "attachment",
    "fast_train": "scripts",
}

__all__ = [
    "Attachment",
    "Attestation",
    "FastLanguageModel",
    "FastSFTTrainer",
    "FastTrainingArguments",
    "Line",
    "accelerate_trl",
    "attach",
    "attach_trainer",
    "attachment_of",
    "detach",
    "fast_train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
