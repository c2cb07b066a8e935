"""The largest batch, or the longest rows, that an arm trains without running out of the card's memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aligntune.compare.arm import ArmSpec
from aligntune.compare.protocol import Run, Runner, spec_of
from aligntune.compare.settings import Arm, Settings
from aligntune.errors import ComparisonError, ConfigError

WHAT = {"batch": "batch_size", "context": "max_seq_length"}
MOST = {"batch": 4096, "context": 1 << 20}
_STEPS = 3  # the second holds the optimizer's state, a third shows that it goes on


def require_card(what: str, *, cards: int, algorithm: str) -> None:
    """Raise a ConfigError where the question has no answer."""
    if what not in WHAT:
        raise ConfigError(f"fits = {what!r}: 'batch' or 'context'")
    if not cards:
        raise ConfigError(f"fits = {what!r}: there is no card here; a CPU swaps where a card refuses")
    if algorithm != "sft":
        raise ConfigError(f"fits = {what!r}: rows of a wanted length are made for sft, not for {algorithm}")


def largest(
    settings: Settings, arm: Arm, role: str, what: str, folder: Path, *, start: int, seed: int, runner: Runner,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The largest value of the option that trains: doubled until it does not fit, then halved in between.

    Rows are of exactly max_seq_length random tokens. Found to within 1/16 of its size.

    Returns:
        {"value", "tried", "ended"}: None if even `start` halved down to 1 does not fit; every value tried and whether
        it fitted; what ended the search where it was not memory: `value` is the largest seen until then.
    """
    tried: dict[int, bool] = {}

    def fits(value: int) -> bool:
        if value not in tried:
            say(f"{role}: {WHAT[what]}={value}")
            spec = _trial(settings, Run(role, 0, arm), folder / "fits" / str(value), WHAT[what], value, seed=seed)
            tried[value] = _ran(runner(spec, arm), spec)
        return tried[value]

    low, high, ended = 0, start, None
    try:
        while high <= MOST[what] and fits(high):
            low, high = high, high * 2
        while low == 0 and high > 1:
            high //= 2
            if fits(high):
                low, high = high, high * 2
        while low and high - low > max(1, low // 16) and high <= MOST[what]:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
    except ComparisonError as error:  # the comparison itself is done, and is worth its report
        ended = str(error).splitlines()[-1].strip()
        say(f"{role}: the search ends: {ended}")
    return {"value": low or None, "tried": dict(sorted(tried.items())), "ended": ended}


def _trial(settings: Settings, run: Run, folder: Path, option: str, value: int, *, seed: int) -> ArmSpec:
    settings = dataclasses.replace(settings, steps=_STEPS)
    run = Run(run.role, 0, dataclasses.replace(run.arm, options={
        **{name: old for name, old in run.arm.options.items() if name.rpartition(".")[2] not in (option, "packing")},
        option: value, "packing": False}))
    spec = spec_of(settings, run, folder, seed=seed, online=False, peft=False)
    return dataclasses.replace(spec, gradient_steps=[], probe=False, fill=True)


def _ran(result: dict[str, Any], spec: ArmSpec) -> bool:
    if result["status"] == "error":
        raise ComparisonError(f"arm {spec.label!r}: {result['kind']}: {result['message']}")
    return result["status"] == "ok"


def fill(trainer: Any) -> None:
    """Put rows of exactly max_seq_length random tokens in the place of an SFT trainer's."""
    import numpy as np
    from datasets import Dataset

    inner, length = trainer.trainer, int(trainer.config.data.max_seq_length)
    vocabulary = inner.model.config.get_text_config().vocab_size
    count = inner.args.per_device_train_batch_size * inner.args.gradient_accumulation_steps * inner.args.max_steps
    ids = np.random.default_rng(0).integers(0, vocabulary, size=(max(count, 1), length)).tolist()
    inner.train_dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
