"""What every arm starts from, as a folder on disk: arms are processes, and a peer knows folders and hub ids alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aligntune.builtin import is_builtin, model_path
from aligntune.compare.settings import Settings
from aligntune.core.resolve import Job
from aligntune.errors import ConfigError

FOLDER = "start"
NAMES = ("model_name", "tokenizer_name")


def check_objects(job: Job, own: Mapping[str, Any]) -> None:
    """Raise a ConfigError for Python objects other than a model and a tokenizer that both arms start from.

    Args:
        own: the options of one arm alone.
    """
    named = {name.rpartition(".")[2] for name in own}
    found = sorted(name for name in job.objects if name not in NAMES or name in named)
    if found:
        raise ConfigError(f"{', '.join(found)}: arms run in processes of their own and take names and paths, not "
                          "Python objects (save for a model and a tokenizer that both arms start from)")
    if hasattr(job.options.model_name, "peft_config"):
        raise ConfigError("model_name: a model with adapters in it cannot be written down as one checkpoint; save it "
                          "merged and give the folder, or give the base")


def on_disk(settings: Settings, job: Job, folder: Path) -> Settings:
    """The settings with a model and a tokenizer that are Python objects written below `folder`, each by its path.

    A model stays in its type: `model_dtype` is that one unless it was given. The weights of a builtin model that are
    not stored are written by this process, so that no two arms write them.
    """
    model = job.options.model_name
    if is_builtin(model):
        model_path(model)
    if not set(NAMES) & set(job.objects):
        return settings
    from aligntune.backends.loading import DTYPES, load_tokenizer

    path = folder / FOLDER
    tokenizer = job.options.tokenizer_name
    found: dict[str, Any] = {}
    if not isinstance(model, str):
        model.save_pretrained(path)
        found["model_name"] = str(path)
        stored = str(model.dtype).removeprefix("torch.")
        short = next((short for short, long in DTYPES.items() if long == stored), None)
        if short is not None and not job.given("model_dtype"):
            found["model_dtype"] = short
    if not isinstance(tokenizer, str):  # the object, or that of the checkpoint that the model came from
        load_tokenizer(job).save_pretrained(path)
        found["tokenizer_name"] = str(path)
    return dataclasses.replace(settings, config=_without(settings.config, found),
                               overrides={**_without(settings.overrides, found), **found})


def _without(options: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """The options, flat, by section or in sections, without `names`."""
    return {key: _without(value, names) if isinstance(value, Mapping) and key == "model" else value
            for key, value in options.items() if key.rpartition(".")[2] not in names}
