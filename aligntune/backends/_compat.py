"""Every difference between supported versions of transformers, trl and peft, each with the version that ends it."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

TESTED: Final = {"transformers": ("5.17", "5.23"), "trl": ("1.16", "1.16"), "peft": ("0.21", "0.21"),
                 "torch": ("2.11", "2.15")}
"""Package -> first and last minor version that the tests ran with. (TRL 1.15 has its loss in a Triton kernel also on a
CPU, which has none.)"""


def minor(text: str) -> tuple[int, int]:
    """(major, minor) of a version string."""
    major_text, minor_text = text.split(".")[:2]
    return int(major_text), int("".join(c for c in minor_text if c.isdigit()) or 0)


_warned = False


def warn_untested() -> None:
    """One warning in a process where an installed package is newer than any the tests ran with."""
    global _warned
    if _warned:
        return
    _warned = True
    newer = [f"{name} {version(name)} (tested {low} to {high})" for name, (low, high) in TESTED.items()
             if minor(version(name)) > minor(high)]
    if newer:
        warnings.warn(f"aligntune has not been tested with {', '.join(newer)}", UserWarning, stacklevel=3)


def config_kwargs(config_class: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` in the names that the installed `config_class` knows."""
    import dataclasses

    known = {item.name for item in dataclasses.fields(config_class)}
    renamed = {}
    for name, value in kwargs.items():
        # transformers >= 5.23 deprecates the first name for the second, which 5.17 does not know. TRL up to 1.16
        # still declares the first itself; this row ends with the TRL that drops it.
        if name == "gradient_checkpointing" and name not in known:
            name = "activation_checkpointing"
        renamed[name] = value
    return renamed


def load_top_adapter(model: Any, checkpoint: str) -> None:
    """Load "default", whose file lies at the top of a checkpoint of several adapters.

    transformers up to 5.22 loads those in subfolders alone (TRL's "ref"): "default" would train on as it was given.
    """
    from peft import PeftModel
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

    if minor(version("transformers")) >= (5, 23) or not isinstance(model, PeftModel):
        return
    here, names = Path(checkpoint), (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    several = any(next(here.glob(f"*/{name}"), None) for name in names)
    if several and "default" in model.peft_config and any((here / name).is_file() for name in names):
        active = model.active_adapters[0]
        model.load_adapter(checkpoint, "default", is_trainable=active == "default")
        model.set_adapter(active)


def flash_kernel(implementation: str) -> str | None:
    """What a model stores in place of this attention where its package is not installed; None where there is none."""
    from transformers import modeling_flash_attention_utils

    # Not public: a later transformers may keep it elsewhere.
    return getattr(modeling_flash_attention_utils, "FLASH_ATTN_KERNEL_FALLBACK", {}).get(implementation)
